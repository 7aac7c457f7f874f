"""One run of a module recorded as a graph of tensor operations, and used where it gives the same numbers.

``torch.export`` records a run of a Pyro program, so that effect handlers cost nothing afterwards. What a recording gets silently
wrong (custom backward, tensor hooks, numbers that change) is caught by the gate: one eager and one recorded run under one seed
must agree in the loss and in every gradient, else the eager module is used, with a warning that says why.
"""

import logging
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_aevb._types import PyroProgram
from pyro_aevb.errors import StagingWarning, warn_user
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.unchanged import module_hooks
from pyro_aevb.randomness import preserved_rng

__all__ = ["compare", "export", "first_line", "is_close", "record", "stage"]

_SEED = 13126114
"""Seed of the gate's two runs: none that a user's program is likely to be recorded under, so that frozen noise shows."""


def stage(
    objective: ELBO, model: PyroProgram, guide: PyroProgram, *batch: Any, num_data: int | None = None
) -> nn.Module:
    """Record objective, model and guide on a batch as a graph: ``stage(...)(*batch)`` is the loss.

    The graph shares the parameters of model and guide, draws fresh noise at each call and is fixed to the batch's shapes and to
    the modes, train or eval, that modules have now.

    Args:
        objective: Any ``pyro.infer.ELBO`` that has ``differentiable_loss``.
        model: The model.
        guide: The guide.
        *batch: A batch of the shapes that later calls use.
        num_data: Rows of the whole data set, for a data plate that knows only its batch.

    Returns:
        A module whose call is the loss; the eager one, after a :class:`~pyro_aevb.errors.StagingWarning`, if the graph would
        not give the same numbers.
    """
    module = ObjectiveModule(
        model, guide, objective, num_data=num_data, data_plate=getattr(objective, "data_plate", "auto")
    )
    return record(module.build(*batch), *batch)


def record(module: nn.Module, *inputs: Any, **named: Any) -> nn.Module:
    """Record one run of a module as a graph, and return it if its loss and gradients are those of an eager run.

    Args:
        module: A module that returns a scalar loss, or a tuple that begins with one.
        *inputs: Tensors to record with; later calls must have their shapes.
        **named: Such tensors as keyword arguments.

    Returns:
        The graph, which shares the module's parameters and buffers; the module itself, after a
        :class:`~pyro_aevb.errors.StagingWarning`, where the graph would not give the same numbers.
    """
    with preserved_state([module], evaluate=False), pyro.validation_enabled(False):
        args, kwargs = _copied(inputs, named)
        unknown = _unknown_leaves(module, _loss(module(*args, **kwargs)))
    if unknown:
        return _eager(
            module,
            f"parameters of shapes {unknown} belong to a network that model and guide reach in a way that can't be followed; make "
            f"it an attribute of their nn.Module, or register it with pyro.module",
        )
    if hooked := _hooked(module):
        return _eager(
            module,
            f"modules of types {hooked} have hooks, which a graph does not call; remove them, or call what they do",
        )
    for part in module.modules():
        if isinstance(part, ObjectiveModule):
            part.hold_num_data()
    args, kwargs = _copied(inputs, named)
    try:
        graph = export(module, *args, **kwargs)
    except Exception as error:
        return _eager(module, f"it can't be recorded ({first_line(error)})")
    reason = compare(module, graph, inputs, named)
    return _eager(module, reason) if reason else graph


def export(module: nn.Module, *inputs: Any, **named: Any) -> nn.Module:
    """Record one run of a module as a graph, whatever its numbers are.

    Raises:
        Exception: Whatever torch raises at what it can't record.
    """
    # a graph holds the very buffers that the module has while it is recorded, so that these are not put aside
    with preserved_rng(), pyro.get_param_store().scope(), pyro.validation_enabled(False), _quiet():
        return _hold_outside(torch.export.export(module, inputs, named, strict=False).module())


def _hold_outside(graph: Any) -> Any:
    """Make buffers of tensors that a program read from outside, a global or a plain attribute, and list them in the graph's meta.

    Their values may change as those of buffers may; what compiles a graph takes any other tensor for a constant. Literals, which
    the recording made itself, are copied where they are used, and stay constants.
    """
    outside: dict[int, Tensor] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        path, _, name = node.target.rpartition(".")
        holder = graph.get_submodule(path)
        item = vars(holder).get(name)
        if isinstance(item, Tensor) and any(
            user.target is not torch.ops.aten.lift_fresh_copy.default for user in node.users
        ):
            delattr(holder, name)
            holder.register_buffer(name, item, persistent=False)
            outside[id(item)] = item
    graph.meta["outside"] = list(outside.values())
    return graph


def _copied(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy a batch for a run that may write into it, a tensor that is in it twice but once.

    Memory is laid out as it is, which a compiled run depends on.
    """
    copies: dict[int, Any] = {}

    def copy(item: Any) -> Any:
        if id(item) not in copies:
            copies[id(item)] = item if _can_t_be_written(item) else _like(item)
        return copies[id(item)]

    return tuple(map(copy, inputs)), {name: copy(item) for name, item in named.items()}


def _can_t_be_written(item: Any) -> bool:
    """Tell what is no tensor, or one that shows an entry several times, from what a program may write into."""
    if not isinstance(item, Tensor):
        return True
    return any(step == 0 and size > 1 for size, step in zip(item.shape, item.stride(), strict=True))


def _like(item: Tensor) -> Tensor:
    return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=item.device).copy_(item)


def _loss(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


_QUIET = threading.RLock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing whole graphs where a recording fails, and from warning of itself: one warning says why in a line.

    These are settings of the whole process, so that one thread has them at a time.
    """
    with _QUIET:
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with redirect_stderr(StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)


def _eager(module: nn.Module, reason: str) -> nn.Module:
    warn_user(f"The program runs eagerly: {reason}. The numbers are the same, steps are slower.", StagingWarning)
    return module


def first_line(error: BaseException) -> str:
    """Return an error's first cause: its type, the first line of its message, and the user's line where it tells."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    where = [after for line, after in pairwise(lines) if line.startswith("The following call raised this error")]
    return f"{type(error).__name__}: {lines[0][:200]}" + (f" at {where[0]}" if where else "")


def _unknown_leaves(module: nn.Module, loss: Tensor) -> list[list[int]]:
    """Return the shapes of tensors that the loss differentiates and that are not the module's parameters."""
    known = {id(parameter) for parameter in module.parameters()}
    pending: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    unknown = []
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            unknown.append(list(leaf.shape))
        pending.extend(function for function, _ in node.next_functions)
    return unknown


def _hooked(module: nn.Module) -> list[str]:
    """Return types of modules that have hooks other than torch's own, by which it computes a weight."""
    hooks = ((part, hook) for part in module.modules() for held in module_hooks(part) for hook in held.values())
    return sorted({type(part).__name__ for part, hook in hooks if not type(hook).__module__.startswith("torch.")})


def _numbers(module: nn.Module) -> dict[tuple[int, str], Any]:
    """Return attributes of modules that are numbers of Python or texts."""
    found = ((part, name, value) for part in module.modules() for name, value in vars(part).items())
    return {(id(part), name): value for part, name, value in found if isinstance(value, (bool, int, float, str))}


class _Run(NamedTuple):
    """What one run of a module gave.

    Attributes:
        loss: Its loss, detached.
        gradients: Gradient of each parameter, ``None`` where it has none.
        buffers: Buffers after the run, by name.
        rebound: Names of buffers that the run replaced instead of writing into them.
        counted: Names of attributes whose numbers the run changed.
        next_draw: What is drawn next, after all that the run drew.
    """

    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    rebound: list[str]
    counted: list[str]
    next_draw: Tensor


def compare(module: nn.Module, graph: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> str:
    """Compare an eager and a recorded run under one seed; return what differs, or nothing."""
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    eager = _run(module, parameters, inputs, named)
    if eager.rebound:
        return f"a run replaces the buffers {eager.rebound}, which a graph goes on to write into; write into them too"
    if eager.counted:
        return f"a run changes the attributes {eager.counted}, which a graph does not; make them buffers, and write into these"
    try:
        recorded = _run(graph, parameters, inputs, named)
    except Exception as error:
        return f"the recorded run failed ({first_line(error)})"
    if not is_close(eager.loss, recorded.loss):
        return f"the recorded loss is {recorded.loss.item():.6g}, the eager one {eager.loss.item():.6g}"
    for name, gradient in eager.gradients.items():
        if not is_close(gradient, recorded.gradients[name]):
            return f"the recorded gradient of parameter {name!r} is not the eager one"
    for name, buffer in recorded.buffers.items():
        if name in eager.buffers and not is_close(eager.buffers[name], buffer):
            return f"the recorded run leaves another value in buffer {name!r} than the eager one"
    if not torch.equal(eager.next_draw, recorded.next_draw):
        return "the recorded run draws more or fewer random numbers than the eager one"
    return ""


def _run(run: nn.Module, parameters: dict[str, nn.Parameter], inputs: tuple[Any, ...], named: dict[str, Any]) -> _Run:
    """Run once under a seed, and leave generators and buffers as they were."""
    with preserved_state([run], evaluate=False), pyro.validation_enabled(False):
        pyro.set_rng_seed(_SEED)
        before, numbers = dict(run.named_buffers()), _numbers(run)
        args, kwargs = _copied(inputs, named)
        loss = _loss(run(*args, **kwargs))
        gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if parameters and loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        next_draw = torch.rand((), device=loss.device)
        buffers = {name: buffer.clone() for name, buffer in run.named_buffers()}
        rebound = [name for name, buffer in run.named_buffers() if before.get(name) is not buffer]
        counted = [
            name for (part, name), value in _numbers(run).items() if repr(numbers.get((part, name))) != repr(value)
        ]
        return _Run(loss.detach(), dict(zip(parameters, gradients, strict=True)), buffers, rebound, counted, next_draw)


def is_close(a: Tensor | None, b: Tensor | None, *, like: Iterable[Tensor | None] = ()) -> bool:
    """Hold recorded numbers against eager ones: rtol 1e-5, in float64 1e-10, relative to the largest entry.

    Args:
        a: Eager numbers.
        b: Recorded numbers.
        like: Tensors that these were computed beside: what is 0 but for the rounding of a sum of such numbers (the gradient of a
            bias before BatchNorm) differs by a tenth of the tolerance of their largest entry.
    """
    if a is None or b is None or a.shape != b.shape:
        return a is b
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = 1e-10 if a.dtype == torch.float64 else 1e-5
    own = float(a.abs().max()) if a.numel() else 0.0
    others = max((float(item.detach().abs().max()) for item in like if item is not None and item.numel()), default=0.0)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(own, 0.1 * others), equal_nan=True)
