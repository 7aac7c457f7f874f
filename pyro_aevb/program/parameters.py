"""Where a program's parameters live: in the program's own module, never in the global param store.

A Pyro program keeps parameters in three places: ``nn.Module`` s that it is or reaches, ``pyro.param`` statements, and
``PyroModule`` s, which copy their tensors to the global store as they run. :class:`Program` runs model and guide inside an
empty param store, so that a ``PyroModule`` uses its own tensors, and serves ``pyro.param`` from its own ``ParameterDict``. Two
programs in one process can then use one name for two parameters.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import ref

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.nn.parameter import is_lazy

from pyro_aevb._types import PyroProgram
from pyro_aevb.errors import AEVBWarning, ParameterError, warn_user
from pyro_aevb.program.reach import code_names, find_modules, modules_below
from pyro_aevb.program.settings import check_programs
from pyro_aevb.program.swapping import swapped_buffers, swapped_parameters
from pyro_aevb.randomness import preserved_rng

__all__ = [
    "Program",
    "detaching",
    "evaluating",
    "preserved_buffers",
    "preserved_param_store",
    "preserved_state",
    "serving_program",
]


@contextmanager
def preserved_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave random generators and buffers as they were before the block.

    The block works on copies of the buffers: writing saved values back would touch tensors that a backward pass still needs.
    """
    with preserved_rng(), swapped_buffers(modules, _copied):
        yield


def _copied(buffer: Tensor) -> Tensor:
    """Copy a buffer; one that a lazy module has yet to make stays, and is made."""
    return buffer if is_lazy(buffer) else buffer.detach().clone()


@contextmanager
def preserved_state(modules: Iterable[nn.Module], *, evaluate: bool = True) -> Iterator[None]:
    """Leave random generators, buffers, train/eval mode and param store as they were before the block.

    Args:
        modules: Modules whose buffers and modes are restored.
        evaluate: Whether to run the block in eval mode, so that BatchNorm accepts single rows and dropout is off.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_buffers(modules))
        stack.enter_context(preserved_param_store())
        stack.enter_context(_isolated())
        if evaluate:
            stack.enter_context(evaluating(*modules))
        yield


@contextmanager
def preserved_param_store() -> Iterator[None]:
    """Leave the global param store as it was before the block, which sees its parameters.

    Pyro's own scope takes the attribute ``unconstrained`` from them, which the trace of an SVI step outside still needs.
    """
    store = pyro.get_param_store()
    references = [
        (item, vars(item)["unconstrained"]) for _, item in store.named_parameters() if "unconstrained" in vars(item)
    ]
    try:
        with store.scope(state=store.get_state()):
            yield
    finally:
        for item, reference in references:
            item.unconstrained = reference  # type: ignore[attr-defined]


@contextmanager
def evaluating(*programs: PyroProgram) -> Iterator[None]:
    """Run the modules that programs reach in eval mode inside the block."""
    every = modules_below(find_modules(*programs))
    modes = [module.training for module in every]
    try:
        for module in every:
            module.training = False
        yield
    finally:
        for module, mode in zip(every, modes, strict=True):
            module.training = mode


@contextmanager
def _isolated() -> Iterator[None]:
    """Hide every message from handlers outside the block, such as the trace by which SVI collects parameters."""
    serving = _SERVING.get()
    with poutine.block(), _Serve(serving) if serving is not None else nullcontext():
        yield


def serving_program() -> "Program | None":
    """Return the program whose ``pyro.param`` statements are being served."""
    return _SERVING.get()


class _DetachParameters(Messenger):
    """Detach the value of every ``pyro.param`` statement."""

    def _pyro_post_param(self, message: Message) -> None:
        value: Any = message["value"]
        if value is not None and value.requires_grad:
            detached: Any = value.detach()
            detached.unconstrained = lambda: value
            message["value"] = detached


@contextmanager
def detaching(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Detach every parameter inside the block; sampled values stay live.

    This is what makes the path derivative of Roeder et al. (2017, arXiv 1703.09194) right for guides with several latents:
    a site's own parameters stop, the ancestors that it is conditioned on do not. Draws are to be weighed inside the block,
    since a flow reads its parameters only when it is weighed.
    """
    # pyro.module warns for each parameter that does not require a gradient, which here is the point
    with _DetachParameters(), swapped_parameters(modules, Tensor.detach), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
        yield


class _Serve(Messenger):
    """Serve ``pyro.param`` statements from a program's own parameters."""

    def __init__(self, program: "Program") -> None:
        super().__init__()
        self.program = program

    def _pyro_param(self, message: Message) -> None:
        name, args = str(message["name"]), message["args"]
        initial = args[1] if len(args) > 1 else None
        if isinstance(initial, nn.Parameter) and self.program.reaches(initial):
            # a module's own parameter; Pyro's store would take it too, and thaw it if it is frozen
            message["value"] = initial
        elif self.program.owns(name) or initial is not None:
            constraint = message["kwargs"].get("constraint", constraints.real)
            if initial is not None and not self.program.owns(name):
                self.program.declare(name, initial, constraint)
            message["value"] = self.program.constrained(name, constraint)
        else:
            return  # a PyroModule asks for what it has just put into the (else empty) store
        message["done"] = message["stop"] = True


def _makes_parameters(program: PyroProgram) -> bool:
    """Tell whether a program may make parameters as it runs.

    A function may; a module if it is an automatic guide before its first call, has lazy parameters, or names ``pyro.param``.
    """
    owner = getattr(program, "__self__", program)
    if not isinstance(owner, nn.Module):
        return True
    if getattr(owner, "prototype_trace", True) is None or any(map(is_lazy, owner.parameters())):
        return True
    code = getattr(getattr(program, "__func__", type(owner).forward), "__code__", None)
    return code is not None and "param" in code_names(code)


def _check_local_params(modules: Iterable[nn.Module]) -> None:
    """Refuse modules that were made before Pyro's setting ``module_local_params`` was switched on: Pyro can't run them."""
    if not pyro.settings.get("module_local_params"):
        return
    for module in modules_below(modules):
        if isinstance(module, PyroModule) and not hasattr(module._pyro_context, "param_state"):
            raise ParameterError(
                f"The PyroModule {type(module).__name__} was made before pyro.settings.set(module_local_params=True), and Pyro "
                f"can't run it with this setting. Switch it on before making any PyroModule, or leave it off."
            )


def _escape(name: str) -> str:
    """Write a parameter's name as a key of ``ParameterDict``, which allows no dots."""
    return name.replace("%", "%25").replace(".", "%2E")


def _unescape(key: str) -> str:
    return key.replace("%2E", ".").replace("%25", "%")


_SERVING: ContextVar["Program | None"] = ContextVar("serving", default=None)
"""The program whose parameters are being served."""

_WRITTEN: dict[str, tuple[ref["Program"], ref[Tensor]]] = {}
"""Names of the global param store that programs wrote: which program, and which unconstrained tensor."""


class Program(nn.Module):
    """A model and a guide with every parameter that they reach, as one module.

    Attributes:
        model: The model, as given.
        guide: The guide, as given.
        parameters_by_name: Values of ``pyro.param`` statements on unconstrained space, keyed by escaped name.
        is_built: Whether both have run inside :meth:`building`; before that parameters may be missing.
    """

    model: PyroProgram
    guide: PyroProgram

    def __init__(self, model: PyroProgram, guide: PyroProgram) -> None:
        check_programs(model, guide)
        super().__init__()
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "guide", guide)
        self.reached = nn.ModuleList(find_modules(model, guide))
        _check_local_params(self.reached)
        self.parameters_by_name = nn.ParameterDict()
        self._constraints: dict[str, constraints.Constraint] = {}
        self._reachable: set[int] = set()
        self.is_built = False
        self._is_building = False

    @contextmanager
    def running(self, *handlers: Messenger) -> Iterator[None]:
        """Run model and guide with the parameters of this module and an empty param store, inside further handlers."""
        token = _SERVING.set(self)
        try:
            with ExitStack() as stack:
                stack.enter_context(pyro.get_param_store().scope())
                for handler in (_Serve(self), *handlers):
                    stack.enter_context(handler)
                yield
        finally:
            _SERVING.reset(token)

    @property
    def may_lack_parameters(self) -> bool:
        """Whether the programs have not run yet and may make parameters when they do."""
        return not self.is_built and any(_makes_parameters(program) for program in (self.model, self.guide))

    @contextmanager
    def building(self) -> Iterator[None]:
        """Let the programs make their parameters: run both once inside the block."""
        self._reachable = {id(parameter) for parameter in self.reached.parameters()}
        self._is_building = True
        try:
            with self.running():
                yield
        finally:
            self._is_building = False
        self._adopt_modules_parameters()
        self.is_built = True

    def _adopt_modules_parameters(self) -> None:
        """Forget served parameters that a module turned out to hold itself (a PyroModule that made them as it ran)."""
        held = {id(parameter) for parameter in self.reached.parameters()}
        for key, parameter in list(self.parameters_by_name.items()):
            if id(parameter) in held:
                del self.parameters_by_name[key]
                del self._constraints[_unescape(key)]
        self._reachable = held

    def owns(self, name: str) -> bool:
        """Tell whether a ``pyro.param`` of this name is served from this module."""
        return _escape(name) in self.parameters_by_name

    def reaches(self, parameter: nn.Parameter) -> bool:
        """Tell whether a parameter belongs to a module that model or guide reach."""
        # while a graph is recorded, modules hold stand-ins for their parameters
        return id(parameter) in self._reachable or any(parameter is other for other in self.reached.parameters())

    def declare(self, name: str, initial: Tensor | Callable[[], Tensor], constraint: constraints.Constraint) -> None:
        """Make the parameter of a ``pyro.param`` statement from its initial value.

        Raises:
            ParameterError: If the program is built already: no optimizer would see the new parameter.
        """
        if self.is_built and not self._is_building:
            raise ParameterError(
                f"Parameter {name!r} appeared after the program was built, so no optimizer trains it. Let every batch reach "
                f"every pyro.param statement, or build again with a batch that reaches it.",
                site=name,
            )
        with torch.no_grad():
            value = initial() if callable(initial) else initial
            parameter = (
                initial if isinstance(initial, nn.Parameter) else nn.Parameter(self._unconstrained(value, constraint))
            )
        self.parameters_by_name[_escape(name)] = parameter
        self._constraints[name] = constraint

    @staticmethod
    def _unconstrained(value: Tensor, constraint: constraints.Constraint) -> Tensor:
        return transform_to(constraint).inv(value.detach()).contiguous().clone()

    def constrained(self, name: str, constraint: constraints.Constraint | None = None) -> Tensor:
        """Return a served parameter on constrained space, with Pyro's ``unconstrained`` reference."""
        parameter = self.parameters_by_name[_escape(name)]
        constraint = self._constraints.setdefault(name, constraint or constraints.real)
        value = transform_to(constraint)(parameter)
        value.unconstrained = ref(parameter)
        return value

    def pyro_params(self) -> dict[str, Tensor]:
        """Return the values of ``pyro.param`` statements on constrained space, detached."""
        return {name: self.constrained(name).detach() for name in map(_unescape, self.parameters_by_name)}

    @staticmethod
    def key(name: str) -> str:
        """Return the entry of ``state_dict`` that holds a ``pyro.param``."""
        return f"parameters_by_name.{_escape(name)}"

    def restore_params(self, unconstrained: dict[str, Tensor]) -> None:
        """Make ``pyro.param`` values from saved unconstrained tensors, before the program has run."""
        for name, tensor in unconstrained.items():
            self.parameters_by_name[_escape(name)] = nn.Parameter(tensor)

    def unconstrained_params(self) -> dict[str, Tensor]:
        """Return the values of ``pyro.param`` statements on unconstrained space, detached."""
        return {_unescape(key): parameter.detach() for key, parameter in self.parameters_by_name.items()}

    def _may_overwrite(self, name: str) -> bool:
        """Tell whether a name of the global store is ours: written by a program that is gone, or has our model and guide."""
        if name not in _WRITTEN:
            return False
        program, tensor = _WRITTEN[name][0](), _WRITTEN[name][1]()
        value: Any = pyro.get_param_store()[name]
        if tensor is None or value.unconstrained() is not tensor:
            return False  # somebody else has put another value there since
        return program is None or (program.model, program.guide) == (self.model, self.guide)

    def write_param_store(self) -> None:
        """Write the values of ``pyro.param`` statements to the global store under the user's names.

        A name that something else put there is left alone, with a warning: two programs never collide.
        """
        store = pyro.get_param_store()
        kept = []
        for name, value in self.pyro_params().items():
            if name in store:
                if not self._may_overwrite(name):
                    kept.append(name)
                    continue
                del store[name]
            written: Any = store.setdefault(name, value.clone(), self._constraints[name])
            _WRITTEN[name] = (ref(self), ref(written.unconstrained()))
        if kept:
            warn_user(
                f"The global param store already holds {kept} of something else, and keeps it. Read the trained values with "
                f"result.module.program.pyro_params(), or clear the store before fitting.",
                AEVBWarning,
            )
