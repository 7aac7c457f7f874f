"""Densities of rows with their gradients, recorded once for a shape and compiled to one graph."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_aevb._types import Args, Kwargs, Values
from pyro_aevb.errors import StagingWarning, warn_user
from pyro_aevb.program.compiling import (
    Compile,
    compile_graph,
    held_tensors,
    reading,
    repays,
    signature,
    trace,
)
from pyro_aevb.program.parameters import serving_program
from pyro_aevb.program.staging import export, first_line, is_close
from pyro_aevb.program.unchanged import Unchanged

__all__ = ["CompiledRows", "Rows"]

Weigh: TypeAlias = Callable[[Tensor, Args, Kwargs, Values], tuple[Tensor, ...]]
"""From u ``[S, K, rows, D]``, the rows and values of globals to log densities ``[S, K, rows]``, of each row by its own u alone."""


class Rows(NamedTuple):
    """What a density is evaluated on beside u.

    Attributes:
        args: The rows, as positional arguments.
        kwargs: The rows, as keyword arguments.
        given: Values of globals in plates.
    """

    args: Args
    kwargs: Kwargs
    given: Values

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors, in a row."""
        return [item for item in self._items if isinstance(item, Tensor)]

    @property
    def constants(self) -> tuple[str, ...]:
        """What else there is, and the names of it all."""
        others = (repr(item) for item in self._items if not isinstance(item, Tensor))
        return (*self.kwargs, "", *self.given, "", *others)

    @property
    def _items(self) -> list[Any]:
        return [*self.args, *self.kwargs.values(), *self.given.values()]

    def like(self, inputs: Sequence[Tensor]) -> "Rows":
        """Put other tensors in the place of these."""
        pending = iter(inputs)

        def pick(item: Any) -> Any:
            return next(pending) if isinstance(item, Tensor) else item

        args = tuple(map(pick, self.args))
        kwargs = {name: pick(item) for name, item in self.kwargs.items()}
        return Rows(args, kwargs, {name: pick(item) for name, item in self.given.items()})


class CompiledRows:
    """Evaluations of densities, compiled once there were so many of one shape that it repays.

    What was taken eagerly until then is what compiling costs, so that it never costs more than twice the best (the rule of those
    who rent or buy). Counts decide, not clocks: one seed gives one result.

    Args:
        weigh: The densities.
        modules: Modules that it reads; their parameters may change between evaluations.
        compile: Whether to compile; ``True`` does so at the first evaluation.
    """

    def __init__(self, weigh: Weigh, modules: Sequence[nn.Module], compile: Compile) -> None:  # noqa: A002  torch's own word
        self.weigh, self.modules, self.compile = weigh, list(modules), compile
        self._graphs: dict[Any, _Graph] = {}

    def __call__(self, u: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """Return the densities, with gradients by u."""
        if self.compile is False or not (u.requires_grad and torch.is_grad_enabled()):
            return self.weigh(u, *rows)
        inputs = rows.inputs
        key = (rows.constants, signature([u, *inputs]))
        graph = self._graphs.setdefault(key, _Graph())
        if graph.run is None and graph.is_wanted(self.compile):
            graph.build(_Weighing(self.weigh, self.modules, rows), u, inputs)
        if graph.run is None or not graph.holds:
            return self.weigh(u, *rows)
        return _Evaluate.apply(u, graph.run, inputs)


class _Graph:
    """Evaluations of one shape: how many there were, and the compiled run once there is one."""

    def __init__(self) -> None:
        self.run: Callable[..., Any] | None = None
        self.num_evaluations = 0
        self.is_given_up = False
        self.unchanged: Unchanged | None = None

    @property
    def holds(self) -> bool:
        """Whether modules are still as they were recorded; their parameters' values may differ."""
        return self.unchanged is not None and self.unchanged.holds

    def is_wanted(self, compile: Compile) -> bool:  # noqa: A002  torch's own word
        """Count an evaluation, and tell whether it is time to compile."""
        self.num_evaluations += 1
        if self.is_given_up:
            return False
        return compile is True or repays(_TYPICAL_OPERATIONS, self.num_evaluations)

    def build(self, weighing: "_Weighing", u: Tensor, inputs: list[Tensor]) -> None:
        """Record, compile and compare with an eager evaluation; on any difference stay eager, and say why."""
        try:
            run, difference = weighing.compile(u.detach(), inputs)
        except Exception as error:  # whatever a program, Inductor or a C++ compiler that is not there raise
            run, difference = None, first_line(error)
        if difference:
            self.is_given_up = True
            warn_user(
                f"Densities are evaluated eagerly: {difference}. The numbers are the same, evaluations are slower.",
                StagingWarning,
            )
        else:
            self.run, self.unchanged = run, Unchanged(weighing.reached)


_TYPICAL_OPERATIONS = 100
"""Operations of a density with its gradient, as far as the time to compile them counts; recording it would tell, in seconds."""


class _StoreReads(Messenger):
    """Note ``pyro.param`` statements whose values are no parameters of the modules at hand.

    Attributes:
        names: Their names.
    """

    def __init__(self, own: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.own = {id(parameter) for parameter in own}
        self.names: list[str] = []

    def _pyro_post_param(self, message: Message) -> None:
        value: Any = message["value"]
        unconstrained = value.unconstrained() if hasattr(value, "unconstrained") else value
        if id(unconstrained) not in self.own:
            self.names.append(str(message["name"]))


class _Weighing(nn.Module):
    """Densities as a module whose call takes tensors alone."""

    def __init__(self, weigh: Weigh, modules: Sequence[nn.Module], rows: Rows) -> None:
        super().__init__()
        self.weigh, self.template = weigh, rows
        serving = serving_program()
        self.reached = nn.ModuleList([*modules, *([] if serving is None else [serving])])

    def forward(self, u: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Evaluate them at u."""
        return self.weigh(u, *self.template.like(inputs))

    def compile(self, u: Tensor, inputs: list[Tensor]) -> tuple[Callable[..., Any], str]:  # type: ignore[override]
        """Return the compiled run of u and inputs, and in what it differs from an eager one."""
        with torch.no_grad(), _StoreReads(self.parameters()) as reads:
            self(u, *inputs)  # what a program tries once, it tries now and not while it is recorded
        if reads.names:
            return self, (
                f"parameters {reads.names} live in the global param store, where a graph does not see them change; call a method "
                f"of AEVB, which holds them, or make them parameters of an nn.Module"
            )
        graph: Any = export(self, u, *inputs)
        held = held_tensors(graph)  # read anew at each run

        def differentiate(u: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            live = u.detach().requires_grad_()
            with reading(graph, dict(zip(map(id, held), others, strict=False))), torch.enable_grad():
                parts = graph(live, *others[len(held) :])
                gradients = [_gradient(part, live) for part in parts]
            return *(part.detach() for part in parts), *gradients

        flat = [u, *held, *inputs]
        run = compile_graph(trace(differentiate, *(item.detach().clone() for item in flat)), *flat)

        def call(u: Tensor, *inputs: Tensor) -> Any:
            return run(u, *held, *inputs)

        return call, self._compare(call, u, inputs)

    def _compare(self, run: Callable[..., Any], u: Tensor, inputs: list[Tensor]) -> str:
        """Hold a compiled evaluation against an eager one, at other coordinates than it was recorded at."""
        live = (u + 0.1 * torch.arange(1.0, 1.0 + u.numel()).sin().reshape(u.shape).to(u)).requires_grad_()
        with torch.enable_grad():
            parts = self(live, *inputs)
            gradients = [_gradient(part, live) for part in parts]
        found, count = run(live.detach(), *inputs), len(parts)
        for name, eager, compiled in (("density", parts, found[:count]), ("gradient", gradients, found[count:])):
            for one, other in zip(eager, compiled, strict=True):
                if not is_close(one.detach(), other, like=eager):
                    return f"a compiled {name} is not the eager one"
        return ""


def _gradient(part: Tensor, live: Tensor) -> Tensor:
    """Differentiate each row by its own coordinates; what depends on none has a gradient of 0."""
    if not part.requires_grad:
        return torch.zeros_like(live)
    (gradient,) = torch.autograd.grad(part, live, torch.ones_like(part), retain_graph=True, allow_unused=True)
    return torch.zeros_like(live) if gradient is None else gradient


class _Evaluate(torch.autograd.Function):
    """A compiled evaluation, whose gradients came with its values: rows are independent of each other."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, run: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        found = run(u.detach(), *inputs)
        count = len(found) // 2
        ctx.save_for_backward(*found[count:])
        ctx.set_materialize_grads(False)
        return tuple(found[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, None, None]:
        parts = [one[..., None] * own for one, own in zip(outer, ctx.saved_tensors, strict=True) if one is not None]
        return sum(parts[1:], parts[0]) if parts else None, None, None
