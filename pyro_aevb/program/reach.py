"""Which networks a program reaches."""

import functools
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["code_names", "find_modules", "modules_below"]

_LIBRARIES = ("torch", "pyro", "numpy", "builtins", "functools", "pyro_aevb")

_LARGEST_CONTAINER = 1000
"""Longer lists and dictionaries hold data, not networks."""


def find_modules(*programs: Any) -> list[nn.Module]:
    """List the modules that programs are, are methods of, or reach through attributes, closures, globals and containers.

    Globals count only by the names that a program's code reads. Each module is listed once, its submodules are not.
    """
    found: dict[int, nn.Module] = {}
    pending, seen = deque(programs), set()
    while pending:
        item = pending.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        pending.extend(_reached_by(item))
    inner = {id(child) for module in found.values() for child in module.modules() if child is not module}
    return [module for key, module in found.items() if key not in inner]


def _reached_by(item: Any) -> Iterable[Any]:
    """Return what a callable or a container holds and may run."""
    if isinstance(item, types.MethodType):
        return (item.__self__, item.__func__)
    if isinstance(item, functools.partial):
        return (item.func, *item.args, *item.keywords.values())
    if isinstance(item, types.FunctionType):
        return () if _is_library(item.__module__) else _reached_by_function(item)
    if isinstance(item, (list, tuple, dict)):
        held = item.values() if isinstance(item, dict) else item
        return held if len(item) <= _LARGEST_CONTAINER else ()
    if isinstance(item, (type, types.ModuleType)) or not hasattr(item, "__dict__"):
        return ()
    if _is_library(type(item).__module__):
        return ()
    return (vars(type(item)).get("forward"), vars(type(item)).get("__call__"), *vars(item).values())


def _is_library(module: str | None) -> bool:
    """Tell whether a module of Python's is one in which no user's network is looked for."""
    return module is None or module.split(".")[0] in _LIBRARIES


def _reached_by_function(function: types.FunctionType) -> Iterable[Any]:
    """Return what a function's closure, defaults, wrapped function and named globals hold."""
    yield from (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield getattr(function, "__wrapped__", None)
    names = code_names(function.__code__)
    for value in (function.__globals__.get(name) for name in names):
        yield value
        if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
            yield from (vars(value).get(name) for name in names)


def _is_filled(cell: types.CellType) -> bool:
    """Tell whether a closure's cell has a value yet (a recursive function's own cell may not)."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def code_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that code reads, in nested functions too, in an order that is the same in every process."""
    nested = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for inner in nested for name in code_names(inner))]))


def modules_below(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """List modules and their submodules, each once."""
    return list({id(module): module for root in roots for module in root.modules()}.values())
