"""Posterior moments from nothing but a model's own log density: quadrature, exact normal algebra, NUTS.

They share no code with the package: Pyro runs the model, torch gives the bijections onto each support. Elements of a latent
that a mask drops keep their prior, and what ``obs_mask`` imputes without anything downstream is left out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from model_classes.base import Moments
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

Features = Mapping[str, Callable[[Tensor], Tensor]]
CHUNK = 400_000
"""Grid points times rows that are evaluated at once."""


class RowDensity:
    """The log joint density of a model in unconstrained coordinates, row by row.

    Args:
        model: The model.
        args: Its batch; floats are taken in float64.
        kwargs: The same, by keyword.
        data_plate: The plate of rows; ``None`` for one row that holds everything.
    """

    def __init__(self, model: Any, args: Any, kwargs: Any, data_plate: str | None = "data") -> None:
        self.model, self.data_plate = model, data_plate
        self.args = tuple(_double(item) for item in args)
        self.kwargs = {name: _double(item) for name, item in kwargs.items()}
        nodes = self._nodes({})
        self.sites = {name: node for name, node in nodes.items() if not node["is_observed"]}
        for name in [name for name in self.sites if name.endswith("_unobserved") and not self._is_used(name)]:
            del self.sites[name]
        frames = [frame for node in nodes.values() for frame in node["cond_indep_stack"] if frame.name == data_plate]
        self.dim = frames[0].dim if frames else None
        self.rows = frames[0].size if frames else 1
        self.nesting = max((-frame.dim for node in nodes.values() for frame in node["cond_indep_stack"]), default=0)
        self.sizes = {name: self._flatten(name, self._unconstrain(name)).shape[-1] for name in self.sites}
        self.size = sum(self.sizes.values())

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return each site's value ``[points, *plates, *event]`` and the log Jacobian ``[points, rows]`` at points as below."""
        values, jacobian = {}, torch.zeros(u.shape[:-1], dtype=u.dtype)
        for (name, node), part in zip(self.sites.items(), u.split(list(self.sizes.values()), -1), strict=True):
            transform, shape = biject_to(node["fn"].support), self._unconstrain(name).shape
            if self.dim is not None:
                axis = len(node["fn"].batch_shape) + self.dim
                moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
                raw = part.reshape(len(u), *moved).movedim(1, 1 + axis)
            else:
                raw = part.reshape(len(u), *shape)
            values[name] = transform(raw)
            volume = transform.log_abs_det_jacobian(raw, values[name])
            jacobian = jacobian + self._per_row(volume.reshape(len(u), *node["fn"].batch_shape, -1).sum(-1))
        return values, jacobian

    def __call__(self, u: Tensor) -> Tensor:
        """Return the log density ``[points, rows]`` at points ``[points, rows, D]``."""
        values, total = self.constrain(u)
        for name, node in self._nodes({name: self._pad(name, value) for name, value in values.items()}).items():
            if name not in self.sites and not node["infer"].get("was_observed", node["is_observed"]):
                continue  # imputed, with nothing downstream
            log_prob = node["fn"].log_prob(node["value"])
            if name not in self.sites and node["mask"] is not None:
                log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, torch.zeros_like(log_prob))
            everywhere = [1] * (1 + self.nesting - log_prob.dim())  # what no latent reaches has no axis of points
            total = total + self._per_row(log_prob.reshape(*everywhere, *log_prob.shape))
        return total

    def _nodes(self, values: dict[str, Tensor]) -> dict[str, Any]:
        """Run the model at those values and return its random sites."""
        with torch.random.fork_rng(devices=[]):
            nodes = poutine.trace(poutine.condition(self.model, data=values)).get_trace(*self.args, **self.kwargs).nodes
        return {
            name: node
            for name, node in nodes.items()
            if node["type"] == "sample" and not site_is_subsample(node) and not node["infer"].get("_deterministic")
        }

    def _is_used(self, name: str) -> bool:
        """Return whether anything but its own site reads an imputed value: whether moving it moves another's density."""
        value = self._nodes({})[name]["value"]
        if not value.is_floating_point():
            return False
        others = [name, name.removesuffix("_unobserved") + "_observed"]
        shared = {other: node["value"] for other, node in self._nodes({}).items() if not node["is_observed"]}
        first, second = (self._nodes({**shared, name: value + shift}) for shift in (0.0, 1.0))
        return any(
            not torch.equal(first[other]["fn"].log_prob(first[other]["value"]), node["fn"].log_prob(node["value"]))
            for other, node in second.items()
            if other not in others
        )

    def _pad(self, name: str, value: Tensor) -> Tensor:
        """Move the axis of points to the left of every plate of the model."""
        missing = self.nesting - len(self.sites[name]["fn"].batch_shape)
        return value.reshape(len(value), *[1] * missing, *value.shape[1:])

    def _unconstrain(self, name: str) -> Tensor:
        node = self.sites[name]
        return biject_to(node["fn"].support).inv(node["value"])

    def _flatten(self, name: str, raw: Tensor) -> Tensor:
        """Return what belongs to each row, ``[rows, D]``."""
        if self.dim is None:
            return raw.reshape(1, -1)
        return raw.movedim(len(self.sites[name]["fn"].batch_shape) + self.dim, 0).reshape(self.rows, -1)

    def _per_row(self, log_prob: Tensor) -> Tensor:
        """Sum ``[points, *plates]`` over every plate but the rows'."""
        if self.dim is None:
            return log_prob.reshape(len(log_prob), -1).sum(-1, keepdim=True)
        axis = log_prob.dim() + self.dim
        return log_prob.movedim(axis, 1).reshape(len(log_prob), self.rows, -1).sum(-1)


def quadrature(
    model: Any, args: Any, kwargs: Any, *, data_plate: str | None = "data", features: Features | None = None
) -> dict[str, Moments]:
    """Integrate each row's posterior by the trapezoid rule on a grid around it.

    The rule is exact to rounding for smooth densities once the step is below a standard deviation (Trefethen and Weideman
    2014); here it is .4 of one, with three coordinates .7. The grid starts wide and closes in, row by row, to 12 standard
    deviations along the axes of the posterior's own covariance.

    Raises:
        ArithmeticError: If more than 3e-5 of a row's mass lies on the border of its grid.
    """
    density = RowDensity(model, args, kwargs, data_plate)
    nodes = 61 if density.size < 3 else 37
    axis = torch.linspace(-1, 1, nodes, dtype=torch.float64)
    base = torch.stack(torch.meshgrid(*[axis] * density.size, indexing="ij"), -1).reshape(-1, density.size)
    identity = torch.eye(density.size, dtype=torch.float64)
    next_centre, next_axes = torch.zeros(density.rows, density.size).double(), 9 * identity.expand(density.rows, -1, -1)
    for _ in range(6):
        centre, axes = next_centre, next_axes
        grid = centre + torch.einsum("gd,red->gre", base, axes)
        weights = torch.cat([density(part) for part in _chunks(grid, density.rows)]).softmax(0)
        mean = torch.einsum("gr,gd->rd", weights, base)
        covariance = torch.einsum("gr,gd,ge->rde", weights, base, base) - mean[:, :, None] * mean[:, None]
        blurred = covariance + identity / (nodes - 1) ** 2  # half a step: a grid still coarse may see one point alone
        next_centre = centre + torch.einsum("red,rd->re", axes, mean)
        next_axes = axes @ (12 * torch.linalg.cholesky(blurred))
    cut = float(weights[(base.abs() == 1).any(-1)].sum(0).max())
    if cut > 3e-5:
        raise ArithmeticError(f"The grid cuts the posterior: {cut:.1e} on its border.")
    return _integrate(density, grid, weights, features or {})


def _chunks(base: Tensor, rows: int) -> Iterator[Tensor]:
    return iter(base.split(max(1, CHUNK // rows)))


def _integrate(density: RowDensity, grid: Tensor, weights: Tensor, features: Features) -> dict[str, Moments]:
    """Return the moments of every site's value under weights ``[points, rows]``."""
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for part, weight in zip(_chunks(grid, density.rows), _chunks(weights, density.rows), strict=True):
        for name, value in density.constrain(part)[0].items():
            value = features.get(name, lambda same: same)(value)
            event = value.dim() - 1 - len(density.sites[name]["fn"].batch_shape)
            by_row = _beside(weight, value, density.dim, event)
            first[name] = first.get(name, 0) + (by_row * value).sum(0)
            second[name] = second.get(name, 0) + (by_row * value**2).sum(0)
    return {name: Moments(mean, (second[name] - mean**2).clamp_min(0).sqrt()) for name, mean in first.items()}


def _beside(weight: Tensor, value: Tensor, dim: int | None, event: int) -> Tensor:
    """Return weights ``[points, rows]`` in a shape that broadcasts with ``[points, *plates, *event]``."""
    shape = [len(weight)] + [1] * (value.dim() - 1)
    if dim is not None:
        shape[value.dim() - event + dim] = weight.shape[1]
    return weight.reshape(shape)


def gaussian(model: Any, args: Any, kwargs: Any, *, data_plate: str | None = "data") -> dict[str, Moments]:
    """Solve a model whose log joint density is quadratic in its latents, all of them real: one Newton step is exact.

    Raises:
        ArithmeticError: If the gradient there is not 0, so that the density is not quadratic.
    """
    density = RowDensity(model, args, kwargs, data_plate)
    shape = (1, density.rows, density.size)

    def total(flat: Tensor) -> Tensor:
        return density(flat.reshape(shape)).sum()

    start = torch.zeros(density.rows * density.size, dtype=torch.float64)
    precision = -torch.autograd.functional.hessian(total, start)
    mean = torch.linalg.solve(precision, torch.autograd.functional.jacobian(total, start))
    if torch.autograd.functional.jacobian(total, mean).abs().max() > 1e-6:
        raise ArithmeticError("The model is not linear-Gaussian.")
    sd = precision.inverse().diagonal().sqrt()
    means, sds = (density.constrain(flat.reshape(shape))[0] for flat in (mean, sd))
    return {name: Moments(value[0], sds[name][0]) for name, value in means.items()}


def nuts(model: Any, args: Any, kwargs: Any) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Run Pyro's NUTS on all rows at once; return moments and their quality, as :func:`summarize` does."""
    return summarize(draw_chains(model, args, kwargs))


def draw_chains(
    model: Any, args: Any, kwargs: Any, *, num_chains: int = 2, warmup: int = 1000, draws: int = 4000
) -> dict[str, Tensor]:
    """Run Pyro's NUTS with seeds 0, 1, ...; return draws by site, ``[chains, draws, *plates, *event]``."""
    chains = []
    for seed in range(num_chains):
        pyro.set_rng_seed(seed)
        kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
        run = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
        run.run(*args, **kwargs)
        chains.append(run.get_samples())
    return {name: torch.stack([chain[name] for chain in chains]).double() for name in chains[0]}


def summarize(chains: dict[str, Tensor]) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Return moments, and by site the worst split R-hat, least effective size, largest error of a mean in posterior sds.

    Raises:
        ArithmeticError: If an R-hat reaches 1.02.
    """
    moments, quality = {}, {}
    for name, values in chains.items():
        ess, r_hat = float(effective_sample_size(values).min()), float(split_gelman_rubin(values).max())
        if r_hat >= 1.02:
            raise ArithmeticError(f"The chains disagree about {name!r}: R-hat {r_hat:.3f}.")
        settings = {"chains": len(values), "draws": values.shape[1], "r_hat": round(r_hat, 5), "ess": round(ess)}
        quality[name] = {**settings, "mcse": round(1 / math.sqrt(ess), 5)}
        moments[name] = Moments(values.mean((0, 1)), values.flatten(0, 1).std(0))
    return moments, quality


def _double(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item
