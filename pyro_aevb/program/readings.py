"""Runs of a model that read what each site's distribution is computed from: by autograd, by provenance, by moving a latent."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import Independent
from torch.overrides import TorchFunctionMode

from pyro_aevb._types import Args, Kwargs, PyroProgram, SiteDistribution, Values
from pyro_aevb.program.batch import explained
from pyro_aevb.program.sites import ReplayValues, SharedIndices, unmasked_value, without_masks
from pyro_aevb.randomness import random_state, replayed_rng, seeded

__all__ = ["FirstReading", "Runs"]


class Runs:
    """Runs of one model on one batch, all under the same noise and the same subsampled rows.

    Args:
        model: The model.
        args: A batch, as positional arguments.
        kwargs: A batch, as keyword arguments.
        places: Tensor arguments that sites may depend on: their names, and where each stands, as an index or a keyword.

    Attributes:
        arguments: These arguments.
    """

    def __init__(self, model: PyroProgram, args: Args, kwargs: Kwargs, places: Mapping[str, int | str]) -> None:
        self._model, self._args, self._kwargs, self._places = model, args, kwargs, places
        self.arguments: Values = {
            name: args[place] if isinstance(place, int) else kwargs[place] for name, place in places.items()
        }
        self._state = random_state()
        self._indices = SharedIndices()
        self._densities: Values = {}

    def read(
        self, values: Values, members: Mapping[str, frozenset[str]], *, has_rows: bool = True
    ) -> tuple["FirstReading", dict[str, frozenset[str]]]:
        """Run twice, with given values of latents or with drawn ones, and return the first reading and the joined parents.

        Where a program cannot live with leaves as arguments (``x.numpy()``) or with provenance (a foreign kernel), it runs as it
        is, and an error of the program itself comes out of that run.
        """
        leaves = {name: _leaf(item) for name, item in self.arguments.items() if item.is_floating_point()}
        try:
            first = FirstReading(leaves, members, has_rows=has_rows)
            # a leaf itself could not be assigned into, its copy can
            self._run(first, ReplayValues(values), arguments={name: leaf.clone() for name, leaf in leaves.items()})
        except Exception:
            first = FirstReading({}, members)
            self._run(first, ReplayValues(values))
        tagged: Values = {name: _tagged(item, name) for name, item in self.arguments.items()}
        second, replay = _SecondReading(first), ReplayValues(first.latents)
        try:
            self._run(second, _TagValues(), replay, _TemplatesLeaveNoTrace(), torch.no_grad(), arguments=tagged)
        except Exception:
            second = _SecondReading(first)
            self._run(second, replay, torch.no_grad())
        self._densities = second.densities
        return first, {name: found | second.parents.get(name, frozenset()) for name, found in first.parents.items()}

    def children(self, name: str, first: "FirstReading") -> list[str]:
        """Move one latent to another draw from its prior, all else as it was, and name the sites whose densities change."""
        seed = int(torch.randint(2**31, ()))  # under the seed of the runs it could be the same draw
        with torch.no_grad(), seeded(seed):
            other = first.fns[name]()
        moved = _SecondReading(first)
        self._run(moved, ReplayValues({**first.latents, name: other}), torch.no_grad())
        # same noise and same operations: what does not depend on the latent is equal bit for bit
        return [
            site
            for site, density in moved.densities.items()
            if not torch.equal(density.nan_to_num(), self._densities[site].nan_to_num())
        ]

    def _run(self, *contexts: AbstractContextManager[Any], arguments: Values | None = None) -> None:
        args, kwargs = list(self._args), dict(self._kwargs)
        for name, item in (arguments or {}).items():
            place = self._places[name]
            if isinstance(place, int):
                args[place] = item
            else:
                kwargs[place] = item
        with ExitStack() as stack:
            stack.enter_context(replayed_rng(self._state))
            stack.enter_context(pyro.validation_enabled(False))  # densities are read at values of another run
            stack.enter_context(torch.enable_grad())
            for context in (self._indices, *contexts):
                stack.enter_context(context)
            with explained("model", self._args, self._kwargs):
                self._model(*args, **kwargs)


class FirstReading(Messenger):
    """Make every value a leaf of the autograd graph and read which leaves each site's density hangs on.

    The graph is asked as each site is met: tensors that a program fills in place are later out of date.

    Attributes:
        parents: Names of leaves by site.
        ordered: Plates of ``members`` along which a site's density at one index depends on a value at another.
        whole: Arguments that a site at one index of a plate reads at others, though their axes have the plates' sizes.
        fixed: A value of each site, inside the support, at which densities are compared.
        latents: Values of the sites that are not observed.
        fns: Distributions by site.
    """

    def __init__(self, leaves: Values, members: Mapping[str, frozenset[str]], *, has_rows: bool = True) -> None:
        super().__init__()
        self.whole: set[str] = set()
        self._arguments = dict(leaves)
        self._first_axis = 1 if has_rows else 0
        self.parents: dict[str, frozenset[str]] = {}
        self.ordered: set[str] = set()
        self.fixed: dict[str, Any] = {}
        self.latents: Values = {}
        self.fns: dict[str, SiteDistribution] = {}
        self._leaves = dict(leaves)
        self._members = members
        self._axes: dict[str, dict[str, int]] = {plate: {} for plate in members}

    def _pyro_post_sample(self, message: Message) -> None:
        if not _has_density(message):
            return
        name, value = str(message["name"]), message["value"]
        fixed = unmasked_value(dict(message))
        self.fixed[name] = fixed.detach() if isinstance(fixed, Tensor) else fixed
        self.fns[name] = message["fn"]
        density = _density(message, self.fixed[name])
        gradients = zip(self._leaves, _gradients(density, self._leaves.values()), strict=True)
        self.parents[name] = frozenset(leaf for leaf, gradient in gradients if gradient is not None)
        self._compare_indices(message, density)
        self._compare_arguments(message, density)
        if not message["is_observed"] and isinstance(value, Tensor):
            self.latents[name] = value.detach()
        if isinstance(value, Tensor) and value.is_floating_point():
            leaf = self._leaves[name] = _leaf(value)
            message["value"] = leaf.clone()

    def _compare_indices(self, message: Message, density: Tensor) -> None:
        """Find plates along which the site's indices interact with those of earlier sites, and note its own axes."""
        fn: Any = message["fn"]
        name, value = str(message["name"]), message["value"]
        for frame in message["cond_indep_stack"]:
            if frame.dim is None or name not in self._members.get(frame.name, ()):
                continue
            axes = self._axes[frame.name]
            leaves = [(self._leaves[leaf], axis) for leaf, axis in axes.items()]
            whole = density + density.new_zeros(fn.batch_shape)
            if frame.name not in self.ordered and _indices_interact(whole, frame.dim, leaves):
                self.ordered.add(frame.name)
            axis = frame.dim - fn.event_dim
            if _has_axis(value, axis, frame.size):
                axes[name] = axis

    def _compare_arguments(self, message: Message, density: Tensor) -> None:
        """Find arguments whose axes behind the rows look like the site's inner plates and are not."""
        fn: Any = message["fn"]
        stack = [frame for frame in message["cond_indep_stack"] if frame.name in self._members]
        plates = sorted((frame.dim, frame.size) for frame in stack if frame.dim is not None)
        sizes, first = tuple(size for _, size in plates), self._first_axis
        alike = {
            name: leaf for name, leaf in self._arguments.items() if leaf.shape[first : first + len(sizes)] == sizes
        }
        if not sizes or not alike or not density.requires_grad:
            return
        whole = density + density.new_zeros(fn.batch_shape)
        for name, leaf in alike.items():
            axes = [(dim, axis) for axis, (dim, _) in enumerate(plates, start=first)]
            if any(_indices_interact(whole, dim, [(leaf, axis)]) for dim, axis in axes):
                self.whole.add(name)


class _SecondReading(Messenger):
    """Read each site's density at a fixed value, and its provenance where values carry some.

    Attributes:
        densities: Log densities by site.
        parents: Names of what parameters are computed from, by site; of masks only the latents.
    """

    def __init__(self, first: FirstReading) -> None:
        super().__init__()
        self.densities: Values = {}
        self.parents: dict[str, frozenset[str]] = {}
        self._first = first

    def _pyro_post_sample(self, message: Message) -> None:
        name = str(message["name"])
        if not _has_density(message) or name not in self._first.fixed:
            return
        density = _density(message, self._first.fixed[name])
        self.densities[name] = detach_provenance(density)
        self.parents[name] = get_provenance(density) | get_provenance(_masks(message)).intersection(self._first.latents)


class _TagValues(Messenger):
    """Let the value of every site carry the site's name, and nothing of what it was computed from."""

    def _pyro_post_sample(self, message: Message) -> None:
        if _has_density(message) and isinstance(message["value"], Tensor):
            message["value"] = _tagged(message["value"], str(message["name"]))


_TEMPLATES: dict[Any, int] = {
    **dict.fromkeys((Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros), 0),
    **dict.fromkeys((torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like), 0),
    **dict.fromkeys((torch.rand_like, torch.randint_like, torch.randn_like), 0),
    **dict.fromkeys((Tensor.expand_as, Tensor.reshape_as, Tensor.to, Tensor.type_as, Tensor.view_as), 1),
}
"""Functions that take only shape, dtype or device from one argument, and which one."""


class _TemplatesLeaveNoTrace(TorchFunctionMode):
    """Let ``x.new_zeros(...)``, the usual prior mean of a VAE, be no function of ``x``."""

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        template = _TEMPLATES.get(func)
        if template is not None:
            args = tuple(detach_provenance(item) if place == template else item for place, item in enumerate(args))
        return func(*args, **(kwargs or {}))


def _has_density(message: Message) -> bool:
    """Tell sample statements from plates and from ``pyro.deterministic``."""
    is_computed = (message["infer"] or {}).get("_deterministic", False)
    return type(message["fn"]).__name__ != "_Subsample" and not is_computed


def _masks(message: Message) -> list[Any]:
    """Return the masks on a site: of ``poutine.mask`` and of its distribution."""
    fn, masks = message["fn"], [message["mask"]]
    while isinstance(fn, (Independent, ExpandedDistribution, MaskedDistribution)):
        masks += [fn._mask] if isinstance(fn, MaskedDistribution) else []
        fn = fn.base_dist
    return masks


def _density(message: Message, value: Any) -> Tensor:
    """Return a site's log density at a value as if nothing was masked; 0 where a plain ``False`` drops the site."""
    is_dropped = any(mask is False for mask in _masks(message))
    return torch.zeros(()) if is_dropped else without_masks(message["fn"]).log_prob(value)


def _gradients(density: Tensor, leaves: Collection[Tensor]) -> list[Tensor | None]:
    """Return the gradient of a density's sum for each leaf; ``None`` for leaves that it does not hang on."""
    if not leaves or not density.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(density.sum(), list(leaves), retain_graph=True, allow_unused=True))


def _indices_interact(density: Tensor, dim: int, leaves: Collection[tuple[Tensor, int]]) -> bool:
    """Tell whether a density at the first or the last index of a plate depends on leaves at other indices.

    Args:
        density: The density, with the plate at ``dim``.
        dim: The plate's dimension.
        leaves: Values in the plate, each with the plate's axis in it.
    """
    for index in (0, density.shape[dim] - 1):
        gradients = _gradients(density.select(dim, index), [leaf for leaf, _ in leaves])
        for (_, axis), gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                # NaN comes of missing values that a program reads and masks, and tells nothing
                elsewhere = gradient.nan_to_num().index_fill(axis, torch.tensor(index, device=gradient.device), 0.0)
                if bool(elsewhere.any()):
                    return True
    return False


def _has_axis(value: Any, axis: int, size: int) -> bool:
    """Tell whether a value can be a leaf and has an entry for each index of a plate."""
    is_leaf = isinstance(value, Tensor) and value.is_floating_point()
    return is_leaf and value.dim() >= -axis and value.shape[axis] == size


def _tagged(value: Tensor, name: str) -> Tensor:
    return ProvenanceTensor(detach_provenance(value.detach()), frozenset({name}))


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()
