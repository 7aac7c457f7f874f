"""What a site's distribution is computed from, sites and arguments, read from two runs of the model.

Each run misses what the other sees. In the first all values and arguments are leaves of the autograd graph, which loses steps
without derivatives (indexing by an integer, rounding). In the second they carry Pyro's provenance, which is lost by assignment
into a tensor (``out[..., 0] = z``). What both lose (a detour through numpy) shows when a latent reaches nothing that is
observed; each such latent is then moved once, and sites whose density changes with it depend on it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import AEVBWarning, ModelError, warn_user
from pyro_aevb.program.parameters import preserved_state
from pyro_aevb.program.reach import find_modules
from pyro_aevb.program.readings import Runs

__all__ = ["Dependencies", "ReadModel", "prior_parents", "read_dependencies"]


@dataclass(frozen=True)
class Dependencies:
    """Who depends on whom in a model.

    Attributes:
        parents: For each site the sites, latent and observed, and the arguments that the parameters of its distribution are
            computed from directly. Arguments are written ``"@x"``. What only a mask is computed from is no parent, unless it
            is a latent.
        arguments: Tensor arguments with rows, by the same names.
        ordered: Inner plates along which a site at one index depends on a value at another, as in a vectorised time series.
        whole: Arguments that a site at one index of its inner plates reads at others too, whatever the sizes of their axes.
    """

    parents: dict[str, frozenset[str]]
    arguments: dict[str, Tensor]
    ordered: frozenset[str]
    whole: frozenset[str] = frozenset()


@runtime_checkable
class ReadModel(Protocol):
    """What is asked of a model's structure: :class:`~pyro_aevb.program.structure.Structure` has it."""

    @property
    def sites(self) -> Mapping[str, Any]:
        """Sites by name, each with its ``kind``, its ``plates`` and whether it ``is_local``."""

    @property
    def data_plate(self) -> str | None:
        """Name of the plate whose indices are rows."""


def read_dependencies(model: PyroProgram, args: Args, kwargs: Kwargs, structure: ReadModel) -> Dependencies:
    """Read who depends on whom by two runs of a model, and one more for each latent that then reaches nothing observed.

    The runs leave random state, buffers and param store as they were, and share their noise and the rows that plates draw.

    Args:
        model: The model.
        args: A batch, as positional arguments.
        kwargs: A batch, as keyword arguments.
        structure: The model's structure.

    Returns:
        The direct dependencies. They err on the side of too many: a product with zero still counts.

    Raises:
        ModelError: If the model fails, or has other sites than in its structure.

    Example:
        >>> from pyro_aevb.program.structure import read_structure
        >>> def model(x, shift):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)
        >>> batch = torch.zeros(3), torch.ones(3)
        >>> read = read_dependencies(model, batch, {}, read_structure(model, batch))
        >>> sorted(read.parents["x"]), sorted(read.parents["z"])
        (['@shift', 'z'], [])
    """
    inner = {plate for site in structure.sites.values() for plate in site.plates} - {structure.data_plate}
    members = {
        plate: frozenset(name for name, site in structure.sites.items() if site.is_local and plate in site.plates)
        for plate in inner
    }
    with preserved_state(find_modules(model)):
        runs = Runs(model, args, kwargs, _argument_places(model, args, kwargs))
        first, parents = runs.read({}, members, has_rows=structure.data_plate is not None)
        _check_sites(parents.keys(), structure)
        for name in _lost_latents(parents, structure):
            for child in runs.children(name, first):
                parents[child] |= {name}
    for name in _lost_latents(parents, structure):
        warn_user(
            f"Latent site {name!r} reaches no observed site and no factor: as far as this run shows, its posterior is its prior. "
            f"Let an observation depend on it, or drop it from the model.",
            AEVBWarning,
        )
    return Dependencies(parents, runs.arguments, frozenset(first.ordered), frozenset(first.whole))


def prior_parents(model: PyroProgram, values: Values, args: Args, kwargs: Kwargs) -> dict[str, frozenset[str]]:
    """Say which latents each site's distribution depends on in the model.

    Args:
        model: The model.
        values: Values of its latent sites.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.

    Returns:
        For each site the names of the latents that its parameters are computed from.
    """
    with preserved_state(find_modules(model)):
        first, parents = Runs(model, args, kwargs, {}).read(values, {})
    return {name: found.intersection(first.latents) for name, found in parents.items()}


def _argument_places(model: PyroProgram, args: Args, kwargs: Kwargs) -> dict[str, int | str]:
    """Name the tensor arguments with rows as the model's signature does, and say where each stands."""
    try:
        spec = list(signature(model.forward if isinstance(model, nn.Module) else model).parameters.values())
    except (TypeError, ValueError):  # a builtin or a class with a signature of its own making
        spec = []
    positional = [
        item.name for item in spec if item.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    rest = next((item.name for item in spec if item.kind is Parameter.VAR_POSITIONAL), "args")
    names = [*positional[: len(args)], *(f"{rest}[{index}]" for index in range(len(args) - len(positional)))]
    named: list[tuple[str, int | str, Any]] = [(name, index, args[index]) for index, name in enumerate(names)]
    named += [(name, name, item) for name, item in kwargs.items()]
    return {f"@{name}": place for name, place, item in named if isinstance(item, Tensor) and item.dim() > 0}


def _check_sites(names: Collection[str], structure: ReadModel) -> None:
    """Refuse a model whose sites change from run to run."""
    new, gone = sorted(set(names) - structure.sites.keys()), sorted(structure.sites.keys() - set(names))
    if new or gone:
        raise ModelError(
            f"Two runs of the model on one batch have different sites: first {list(structure.sites)}, then {list(names)} (new: "
            f"{new}, missing: {gone}). Let the sites depend neither on sampled values nor on chance; switch parts off with "
            f"poutine.mask instead.",
            site=(new + gone)[0],
        )


def _lost_latents(parents: Mapping[str, frozenset[str]], structure: ReadModel) -> list[str]:
    """Name the latents that no observed site and no factor descends from."""
    reached: set[str] = set()
    pending = [name for name, site in structure.sites.items() if site.kind in ("observed", "factor")]
    while pending:
        new = parents[pending.pop()].intersection(parents) - reached
        reached |= new
        pending += new
    return [name for name, site in structure.sites.items() if site.kind == "latent" and name not in reached]
