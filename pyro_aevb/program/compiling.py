r"""A function of tensors traced to one graph of operations, and the graph compiled to machine code by torch's Inductor.

Compiling costs seconds for each hundred operations, once for each shape; Inductor keeps what it compiled on disk, so that a second
process takes a fraction of it. Whether it repays is decided from counts alone, never from a clock, so that one seed gives one
result:

.. math:: \text{steps} \cdot (s_0 + s_1 n) > c_0 + c_1 n

for a recorded run of n operations. The constants are calibrated by ``python -m benchmarks.run compiled_step``.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_aevb.errors import SettingError
from pyro_aevb.program.swapping import swapped_buffers, swapped_parameters

__all__ = [
    "Compile",
    "check_compile",
    "compile_graph",
    "count_operations",
    "estimated_seconds",
    "held_tensors",
    "reading",
    "repays",
    "signature",
    "trace",
]

Compile: TypeAlias = bool | Literal["auto"]
"""Whether programs are compiled; ``"auto"`` where it repays."""

FEWEST_STEPS = 2000
"""Steps below which nothing is even recorded, which takes two seconds itself."""
_SECONDS_AHEAD, _SECONDS_OF_OPERATION = 8.0, 0.05
_SAVED_BY_STEP, _SAVED_BY_OPERATION = 1e-3, 1.2e-5
"""Seconds: Pyro's handlers in one run of a program, and what an operation costs to call and to differentiate eagerly."""


def check_compile(value: Any) -> None:
    """Refuse what is not ``"auto"``, ``True`` or ``False``.

    Raises:
        SettingError: Naming what came.
    """
    if not isinstance(value, bool) and value != "auto":
        raise SettingError(f"compile must be 'auto', True or False, got {value!r}.")


def count_operations(graph: Any) -> int:
    """Return the number of operations of a recorded graph."""
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def estimated_seconds(num_operations: int) -> float:
    """Estimate how long a step of a program of so many operations takes to compile, in seconds, on two cores."""
    return _SECONDS_AHEAD + _SECONDS_OF_OPERATION * num_operations


def repays(num_operations: int, num_steps: int) -> bool:
    """Tell whether compiling saves more time over so many steps than it takes."""
    saved = _SAVED_BY_STEP + _SAVED_BY_OPERATION * num_operations
    return num_steps * saved > estimated_seconds(num_operations)


def signature(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Return what a graph is fixed to: shape, strides, dtype and device of each tensor; other arguments as they are."""
    return tuple(
        (item.shape, item.stride(), item.dtype, item.device) if isinstance(item, Tensor) else item for item in tensors
    )


def held_tensors(graph: nn.Module) -> list[Tensor]:
    """Return parameters and buffers that a graph holds, each once."""
    return list({id(item): item for item in (*graph.parameters(), *graph.buffers())}.values())


@contextmanager
def reading(graph: nn.Module, others: Mapping[int, Tensor]) -> Iterator[None]:
    """Let a graph read, and write, other tensors in the place of those that it holds, which are keys by their ``id``."""

    def stand_in(item: Tensor) -> Tensor:
        return others[id(item)]

    with swapped_parameters([graph], stand_in), swapped_buffers([graph], stand_in):
        yield


def trace(function: Callable[..., Any], *tensors: Tensor) -> fx.GraphModule:
    """Run a function on tensors once, which it may write into, and return its operations as a graph of these tensors."""
    with torch.no_grad():
        return make_fx(function)(*tensors)


def compile_graph(graph: fx.GraphModule, *tensors: Tensor) -> Callable[..., Any]:
    """Compile a graph for tensors of these shapes; the result has no gradient and draws the numbers that torch draws eagerly.

    Raises:
        Exception: Whatever Inductor and the C++ compiler raise; there may be none.
    """
    standalone = getattr(torch._inductor, "standalone_compile", None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about parts of its own
        if standalone is None:  # before torch 2.8; the other way checks every tensor again at each call
            compiled: Any = torch.compile(graph, options={"fallback_random": True}, fullgraph=True)
        else:
            # what calls the kernels is C++ too: a quarter of the time of a small program, for no longer compilation
            patches = {"fallback_random": True, "cpp_wrapper": all(item.device.type == "cpu" for item in tensors)}
            options = {"config_patches": patches}
            compiled = standalone(graph, list(tensors), dynamic_shapes="from_example_inputs", options=options)
    return torch.no_grad()(compiled)
