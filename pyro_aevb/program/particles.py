"""The axes [S, K, rows] put around a program.

S particles are drawn outside, so that globals and locals get them; K importance samples act on sites inside the data plate
alone, so that globals are shared by a particle's importance samples:

    globals  [S, 1, (1 per plate), *event]       locals  [S, K, plates, rows, *event]

With S = K = 1 nothing is put around the program, and Pyro's own shapes hold. Programs whose tensors do not broadcast over
leading axes run once per particle instead.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_aevb._types import Args, Kwargs, PyroProgram, SiteDistribution, Values
from pyro_aevb.errors import AEVBError, ModelError, ParticleWarning, warn_user
from pyro_aevb.program.fixed_rank import Ranks, flattened
from pyro_aevb.program.sites import ReplayValues, sample_sites, unmasked_value, value_mask
from pyro_aevb.program.structure import Structure

__all__ = ["ParticleAxes", "Records", "SiteRecord", "as_draws", "can_vectorize", "first_difference", "run_program"]


_NOT_GLOBAL = (
    "Site {name!r} lies outside the data plate but depends on latents inside it, so rows have no weights of their own. Use SGVB "
    "with num_particles=1, or data_plate=None."
)


@dataclass(frozen=True)
class ParticleAxes:
    """How many particles and importance samples a program runs with, and in which way.

    Attributes:
        num_particles: S, draws of everything, averaged outside the logarithm.
        num_importance_samples: K, draws of the local sites, averaged inside it.
        is_vectorized: Whether plates carry the axes; else the program runs S * K times.
        is_weighed: Whether sites are weighed; a draw alone does without.
    """

    num_particles: int = 1
    num_importance_samples: int = 1
    is_vectorized: bool = True
    is_weighed: bool = True

    @property
    def is_single(self) -> bool:
        """Whether there are no axes to add."""
        return self.num_particles == self.num_importance_samples == 1


@dataclass(frozen=True)
class SiteRecord:
    """A sample site after a run under particle axes.

    Attributes:
        name: The site.
        fns: Its distribution, one per run of the program.
        value: Its value with the particle axes of the run.
        log_prob: Log density summed over all but particles, importance samples and rows: ``[S, K, rows]`` or ``[S]``; ``[0]``
            where sites are not weighed.
        is_local: Whether it lies inside the data plate.
        is_observed: Whether its value is given.
        is_auxiliary: Whether it is a guide's auxiliary site.
        mask: Which entries of its value count, ``True`` where all do.
        scale: Its scale apart from the data plate's own.
        data_scale: The data plate's own scale; ``None`` for a global site.
        reduce: Sums tensors of the site's batch shape, one per run, to rows.
    """

    name: str
    fns: tuple[SiteDistribution, ...]
    value: Tensor
    log_prob: Tensor
    is_local: bool
    is_observed: bool
    is_auxiliary: bool
    mask: Tensor | bool
    scale: Tensor | float
    data_scale: Tensor | float | None
    reduce: Callable[[list[Tensor]], Tensor]


Records: TypeAlias = dict[str, SiteRecord]
"""Sample sites of one run under particle axes, by name."""


class _ParticlePlate(IndepMessenger):
    """An independent dimension put around a program, over every site or over the data plate's alone."""

    def __init__(self, name: str, size: int, dim: int, inside: str | None = None) -> None:
        super().__init__(name, size, dim=dim)
        self.inside = inside

    def _process_message(self, msg: Message) -> None:
        if self.inside is None or any(frame.name == self.inside for frame in msg["cond_indep_stack"]):
            super()._process_message(msg)
            BroadcastMessenger._pyro_sample(msg)


@contextmanager
def _particle_plates(structure: Structure, axes: ParticleAxes) -> Iterator[None]:
    """Enter the plates of importance samples and particles, left of every plate of the program."""
    nesting = structure.max_plate_nesting
    with ExitStack() as stack:
        stack.enter_context(_ParticlePlate("_particles", axes.num_particles, -nesting - 2))
        inner = _ParticlePlate("_importance_samples", axes.num_importance_samples, -nesting - 1, structure.data_plate)
        stack.enter_context(inner)
        yield


def run_program(
    program: PyroProgram,
    structure: Structure,
    axes: ParticleAxes,
    args: Args,
    kwargs: Kwargs,
    *,
    values: Values | None = None,
    ranks: Ranks | None = None,
) -> Records:
    """Run a program under particle axes and record its sample sites.

    Args:
        program: A model or a guide.
        structure: The model's structure.
        axes: Numbers of particles and importance samples, and how to run them.
        args: The batch, as positional arguments.
        kwargs: The batch, as keyword arguments.
        values: Values of latent sites, as an earlier run under the same axes recorded them; other sites are sampled.
        ranks: Ranks of modules of fixed rank, from :func:`module_ranks`.

    Returns:
        The sites by name, in the program's order.
    """
    values = values or {}
    if not axes.is_single and not axes.is_vectorized:
        return _run_loop(program, structure, axes, args, kwargs, values)
    with ExitStack() as stack:
        stack.enter_context(ReplayValues(values))
        if not axes.is_single:
            stack.enter_context(flattened(ranks or {}))
            stack.enter_context(_particle_plates(structure, axes))
        trace = poutine.trace(program).get_trace(*args, **kwargs)
    return {name: _record(node, structure, axes) for name, node in sample_sites(trace).items()}


def _record(node: dict[str, Any], structure: Structure, axes: ParticleAxes) -> SiteRecord:
    """Weigh one site of a run."""
    frames = {frame.name: frame for frame in node["cond_indep_stack"]}
    data_frame = frames.get(structure.data_plate) if structure.data_plate is not None else None
    is_local = structure.data_plate is None or data_frame is not None
    data_scale, scale = _scales(node["scale"], data_frame)
    mask = value_mask(node)
    rows = data_frame.size if data_frame is not None else 1
    data_dim = data_frame.dim if data_frame is not None else None

    def reduce(parts: list[Tensor]) -> Tensor:
        scaled = scale_and_mask(parts[0], scale, node["mask"])
        return _to_rows(scaled, structure, axes, (is_local, data_dim, rows), node["name"])

    log_prob = torch.empty(0)
    if axes.is_weighed:
        log_prob = reduce([node["fn"].log_prob(unmasked_value(node), *node["args"], **node["kwargs"])])
    return SiteRecord(
        name=node["name"],
        fns=(node["fn"],),
        value=node["value"],
        log_prob=log_prob,
        is_local=is_local,
        is_observed=node["is_observed"],
        is_auxiliary=bool(node["infer"].get("is_auxiliary", False)),
        mask=True if mask is None else mask,
        scale=scale,
        data_scale=data_scale if is_local else None,
        reduce=reduce,
    )


def _scales(scale: Tensor | float, data_frame: Any) -> tuple[Tensor | float, Tensor | float]:
    """Return the data plate's own scale, and what is left of a site's scale without it."""
    full_size = None if data_frame is None else data_frame.full_size
    if isinstance(full_size, Tensor):  # of a recording: the site's scale is without it (DataPlateScale)
        return full_size / data_frame.size, scale
    data_scale = full_size / data_frame.size if full_size else 1.0
    if isinstance(scale, Tensor):
        return data_scale, scale / data_scale
    return data_scale, 1.0 if scale == data_scale else scale / data_scale


def _to_rows(
    tensor: Tensor, structure: Structure, axes: ParticleAxes, where: tuple[bool, int | None, int], name: str
) -> Float[Tensor, "..."]:
    """Sum a tensor of a site's batch shape over its inner plates: to ``[S, K, rows]`` inside the data plate, ``[S]`` outside."""
    is_local, data_dim, rows = where
    samples, inner = axes.num_particles, axes.num_importance_samples
    nesting = structure.max_plate_nesting + 2
    if tensor.dim() < nesting:
        tensor = tensor.reshape((1,) * (nesting - tensor.dim()) + tensor.shape)
    plates = tuple(dim for dim in range(-nesting + 2, 0) if dim != data_dim)
    if plates:
        tensor = tensor.sum(plates, keepdim=True)
    if is_local:
        return tensor.reshape(*tensor.shape[:2], -1).expand(samples, inner, rows)
    if tensor.shape[1] != 1:
        raise ModelError(_NOT_GLOBAL.format(name=name), site=name)
    return tensor.reshape(-1).expand(samples)


def _run_loop(
    program: PyroProgram, structure: Structure, axes: ParticleAxes, args: Args, kwargs: Kwargs, values: Values
) -> Records:
    """Run a program once per particle and importance sample, and stack what it recorded."""
    runs: list[list[Records]] = []
    for s in range(axes.num_particles):
        shared: Values = {}
        runs.append([])
        for k in range(axes.num_importance_samples):
            given = shared | {name: _slice(value, s, k, structure.ranks[name]) for name, value in values.items()}
            single = ParticleAxes(is_weighed=axes.is_weighed)
            record = run_program(program, structure, single, args, kwargs, values=given)
            runs[-1].append(record)
            shared = {name: site.value for name, site in record.items() if not site.is_local and not site.is_observed}
    return {name: _stack_site([[record[name] for record in row] for row in runs], structure) for name in runs[0][0]}


def _slice(value: Tensor, s: int, k: int, rank: int) -> Tensor:
    """Take one particle's value out of a stacked one, with the rank that it has in a run without particles."""
    part = value[s, k if value.shape[1] > 1 else 0]
    return part.reshape(part.shape[part.dim() - rank :])


def _pad(value: Tensor, rank: int) -> Tensor:
    """Put axes of size 1 in front."""
    return value.reshape((1,) * (rank - value.dim()) + value.shape)


def _stack_site(runs: list[list[SiteRecord]], structure: Structure) -> SiteRecord:
    """Join the records of one site: values ``[S, K, plates, *event]``, densities ``[S, K, rows]`` or ``[S]``."""
    first = runs[0][0]
    nesting = structure.max_plate_nesting

    def stack(tensors: list[list[Tensor]]) -> Tensor:
        if not first.is_local:
            return torch.stack([row[0].reshape(()) for row in tensors])
        return torch.stack([torch.cat(row, 1) for row in tensors]).squeeze(1)

    def stack_log_prob() -> Tensor:
        for row in runs:
            if not first.is_local and not all(_is_same(row[0].log_prob, site.log_prob) for site in row[1:]):
                raise ModelError(_NOT_GLOBAL.format(name=first.name), site=first.name)
        return stack([[site.log_prob for site in row] for row in runs])

    def reduce(parts: list[Tensor]) -> Tensor:
        flat = iter(parts)
        return stack([[site.reduce([next(flat)]) for site in row] for row in runs])

    event_dim = first.fns[0].event_dim
    value = torch.stack([torch.stack([_pad(site.value, nesting + event_dim) for site in row]) for row in runs])
    value = value if first.is_local else value[:, :1]
    return SiteRecord(
        name=first.name,
        fns=tuple(fn for row in runs for site in row for fn in site.fns),
        value=value,
        log_prob=stack_log_prob() if first.log_prob.numel() else first.log_prob,
        is_local=first.is_local,
        is_observed=first.is_observed,
        is_auxiliary=first.is_auxiliary,
        mask=first.mask,
        scale=first.scale,
        data_scale=first.data_scale,
        reduce=reduce,
    )


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Compare densities of one value, up to the rounding of a flow that one run inverts and another does not."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def as_draws(site: SiteRecord, structure: Structure) -> Tensor:
    """Lay out a site's value as draws: ``[S, rows, inner plates, *event]``, outer plates first and axes of size 1 dropped.

    A global site has no rows. Importance samples, of which there must be one, are dropped.
    """
    event_dim = site.fns[0].event_dim
    nesting = structure.max_plate_nesting
    value = _pad(site.value, 2 + nesting + event_dim).squeeze(1)
    rows = [structure.data_dim] if site.is_local and structure.data_dim is not None else []
    inner = [dim for dim in structure.sites[site.name].plate_dims if dim not in rows]
    unused = [dim for dim in range(-nesting, 0) if dim not in (*rows, *inner)]
    value = value.permute(0, *(1 + nesting + dim for dim in (*rows, *inner, *unused)), *range(1 + nesting, value.dim()))
    plates, event = value.shape[1 + len(rows) : 1 + nesting], value.shape[1 + nesting :]
    return value.reshape(*value.shape[: 1 + len(rows)], *(size for size in plates if size > 1), *event)


def can_vectorize(compare: Callable[[], str | None]) -> bool:
    """Tell whether programs broadcast over particle plates; if not, say so in one warning.

    Args:
        compare: Runs them under particle plates and one by one, and returns the first site whose densities differ.
    """
    try:
        site = compare()
        reason = f"site {site!r} has other densities than without particles" if site else ""
    except AEVBError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if reason:
        warn_user(
            f"Particles run one by one, because model or guide does not broadcast over particle axes: {reason}. The numbers are "
            f"the same, the time grows with the number of particles. Index from the right (dim=-1, x[..., 0]) to vectorize.",
            ParticleWarning,
        )
    return not reason


def first_difference(vectorized: Values, looped: Values) -> str | None:
    """Return the first site whose log density differs between two ways of running.

    By more than rounding, which a narrow distribution far from 0 enlarges.
    """
    for name, density in vectorized.items():
        other = looped[name]
        tolerance = 1e-4 if other.dtype == torch.float32 else 1e-8
        if not torch.allclose(density, other, rtol=tolerance, atol=100 * tolerance, equal_nan=True):
            return name
    return None
