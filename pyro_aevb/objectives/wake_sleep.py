"""The wake-sleep algorithms: model and guide each follow an objective of their own, so that neither needs reparameterization.

The paper compares itself with the first of them (arXiv 1312.6114, section 5). Neither gradient is that of one function, so
that convergence is not promised, and what a guide with too small a family learns differs from what a bound would teach it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_aevb._types import Args, GlobalWeights, Kwargs, LocalWeights, Scalar, Values
from pyro_aevb.errors import GuideError, ModelError, SettingError
from pyro_aevb.objectives.base import Evaluation, Objective, with_value
from pyro_aevb.program.agreement import check_separable, is_delta
from pyro_aevb.program.divergence import has_moving_support
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.program.observations import (
    Door,
    ToBatch,
    check_to_batch,
    find_doors,
    through_doors,
    write_observations,
)
from pyro_aevb.program.particles import ParticleAxes, as_draws
from pyro_aevb.program.settings import check_count
from pyro_aevb.weights import Bounds, Terms

__all__ = ["ReweightedWakeSleep", "WakeSleep"]


class WakeSleep(Objective):
    r"""The wake-sleep algorithm (Hinton, Dayan, Frey and Neal 1995), as the paper runs it (arXiv 1312.6114, section 5).

    .. math:: -\text{scale} \sum_n \log p(x_n, z_n) - \sum_m \log q(z'_m | x'_m), \quad z_n \sim q(z | x_n), \quad
              (z'_m, x'_m) \sim p

    with every draw held fixed: the wake phase trains the model on the guide's latents, the sleep phase the guide on dreams, as many
    rows as the batch has, drawn from the model with the batch's covariates. One draw a row in each phase. The model's gradient is
    the ELBO's; the guide descends :math:`KL(p(z | x) \| q(z | x))` averaged over the model's data, not over the given ones.

    The loss is no bound and its size means nothing. :meth:`bounds`, and with them history and early stopping of
    :func:`pyro_aevb.fit`, give the ELBO of the wake phase's draws (arXiv 1312.6114, Eq 6), which training does not maximize and
    which needs no dream.

    Dreams of a model that hardly heeds its latents teach the guide nothing, and latents of such a guide teach the model nothing:
    networks that begin with weights near zero may stay there, where latents are dead (:func:`~pyro_aevb.collapse_report` tells).

    Guides need no ``rsample``. Costs two runs of the model, one with gradients, and two of the guide, one with gradients; and one
    more of the model for the first batch of a shape.

    Args:
        to_batch: Puts simulated values into a batch, for observations that are no views of an argument: from
            ``(values, args, kwargs)`` to new ``(args, kwargs)``. It is not saved with the other settings.
        data_plate: As in :class:`~pyro_aevb.objectives.base.Objective`.

    Raises:
        ModelError: When first used: if the model has global latents, to whose q no row of a dream tells anything, or draws rows
            by itself; if an observed value is no view of an argument.
        GuideError: When first used: if a site is a point, auxiliary, or of a support that is trained.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.5**0.5))
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), WakeSleep())
        >>> losses = [svi.step(torch.zeros(200)) for _ in range(200)]  # the guide learns from dreams, not from these zeros
        >>> bool((pyro.param("slope") - 0.5).abs() < 0.1)
        True
    """

    def __init__(self, *, to_batch: ToBatch | None = None, data_plate: str | None = "auto") -> None:
        check_to_batch(to_batch)
        super().__init__(data_plate=data_plate)
        self.to_batch = to_batch
        self._doors: tuple[Any, dict[Any, dict[str, Door]]] = None, {}

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments as JSON values; ``to_batch`` is left out."""
        return {"data_plate": self.data_plate}

    def _prepare(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> None:
        _check(program, "WakeSleep")
        if program.structure.draws_own_rows:
            raise ModelError(
                f"The model draws rows of plate {program.structure.data_plate!r} by itself, so that simulated rows can't be put "
                f"in order. Size the plate by the batch, pyro.plate({program.structure.data_plate!r}, len(x)), without "
                f"subsample_size."
            )

    def _evaluate(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Evaluation:
        wake, bounds = self._wake(program, args, kwargs)
        return Evaluation(-(wake + self._dream(program, args, kwargs)), bounds)

    def _bounds(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Bounds:
        return self._wake(program, args, kwargs)[1]

    def _wake(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> tuple[Scalar, Bounds]:
        """Draw latents from the guide and return log p(x, z), scaled and summed, and the ELBO."""
        axes = ParticleAxes()
        with torch.no_grad():
            guide = program.sample_guide(args, kwargs, axes)
        values = {name: site.value.detach() for name, site in guide.items()}
        terms = program.terms(program.score_model(args, kwargs, axes, values), guide, axes)
        elbo = terms.log_weights().elbo()
        local, global_ = _log_joint(terms)
        return global_.sum() + terms.scale * local.sum(), Bounds(elbo.local.detach(), elbo.global_.detach(), elbo.scale)

    def _dream(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Scalar:
        """Draw a batch from the model and return the sum of log q(z' | x') over its rows."""
        axes, structure = ParticleAxes(), program.structure
        with torch.no_grad():
            records = program.simulate_model(args, kwargs, axes, {})
        observed = {
            name: as_draws(site, structure)[0]
            for name, site in records.items()
            if structure.sites[name].kind == "observed"
        }
        dream = self._write(program, args, kwargs, observed)
        latents = {name: records[name].value for name in program.guide_sites}
        guide = program.rescore_guide(*dream, axes, latents, is_detached=False)
        return torch.stack([site.log_prob.sum() for site in guide.values()]).sum()

    def _write(self, program: ImportanceProgram, args: Args, kwargs: Kwargs, observed: Values) -> tuple[Args, Kwargs]:
        """Put a dream into a batch; where the model reads it is found out once for a batch's layout."""
        if self.to_batch is not None:
            return write_observations(program.model, args, kwargs, observed, to_batch=self.to_batch)
        if self._doors[0] is not program:
            self._doors = program, {}
        found, key = self._doors[1], _layout(args, kwargs)
        if key not in found:
            found[key] = find_doors(program.model, args, kwargs, observed, structure=program.structure)
        return through_doors(found[key], args, kwargs, observed)


def _layout(args: Args, kwargs: Kwargs) -> tuple[Any, ...]:
    """Return what the views of a batch depend on: sizes, strides and types of its tensors, which are the same one, and the rest."""
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    first = {id(item): number for number, item in reversed(list(enumerate(leaves)))}
    return spec, *(
        (first[id(item)], item.shape, item.stride(), item.dtype) if isinstance(item, Tensor) else repr(item)
        for item in leaves
    )


class ReweightedWakeSleep(Objective):
    r"""Reweighted wake-sleep with the wake update of q (Bornschein and Bengio 2015, arXiv 1406.2751), weights of each row's own.

    .. math:: -\text{scale} \sum_n \sum_k \tilde w_{nk} \left( \log p(x_n, z_{nk}) + \log q(z_{nk} | x_n) \right), \quad
              z_{nk} \sim q(z | x_n), \quad \tilde w_{nk} = \frac{w_{nk}}{\sum_j w_{nj}}, \quad
              w_{nk} = \frac{p(x_n, z_{nk})}{q(z_{nk} | x_n)}

    with draws and weights held fixed. The model's gradient is that of the importance-weighted bound
    (:class:`~pyro_aevb.objectives.importance_weighted.IWELBO`); the guide's is a self-normalized estimate, biased by O(1/K), of
    that of :math:`KL(p(z | x_n) \| q)`. Weights of a whole batch, which ``pyro.infer.ReweightedWakeSleep`` takes, leave nearly all
    weight to one draw.

    The loss has the value of minus the importance-weighted bound, which is what :meth:`bounds` and the history give: a lower bound
    on log p(x) in expectation. It is not what the guide's gradient descends. Guides need no ``rsample``. Costs K evaluations a row
    of the model and of the guide, and one more run of the guide to draw.

    Args:
        num_importance_samples: K, draws of each row; at least 2, for a single one has weight 1 whatever it is.
        data_plate: As in :class:`~pyro_aevb.objectives.base.Objective`.

    Raises:
        SettingError: If there are fewer than 2 importance samples.
        ModelError: When first used: if the model has global latents, which rows have no weights of their own for.
        GuideError: When first used: if a site is a point, auxiliary, or of a support that is trained.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the exact posterior: every weight is p(x)
        >>> ReweightedWakeSleep(num_importance_samples=10).bounds(model, guide, torch.tensor([0.0, 1.0])).local
        tensor([-1.2655, -1.5155])
    """

    def __init__(self, num_importance_samples: int, *, data_plate: str | None = "auto") -> None:
        super().__init__(data_plate=data_plate)
        check_count("num_importance_samples", num_importance_samples)
        if num_importance_samples == 1:
            raise SettingError(
                "ReweightedWakeSleep needs at least 2 importance samples, got 1: a single draw has weight 1, and the guide's "
                "gradient mean 0. Use more, or WakeSleep, which trains the guide on draws from the model."
            )
        self.num_importance_samples = num_importance_samples

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        return {name: getattr(self, name) for name in ("num_importance_samples", "data_plate")}

    def _prepare(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> None:
        _check(program, "ReweightedWakeSleep")

    def _evaluate(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Evaluation:
        axes = program.axes(1, self.num_importance_samples)
        with torch.no_grad():
            guide = program.sample_guide(args, kwargs, axes, keeps_noise=True)
        values = {name: site.value.detach() for name, site in guide.items()}
        if torch.is_grad_enabled():
            guide = program.rescore_guide(args, kwargs, axes, values, is_detached=False)
        model = program.score_model(args, kwargs, axes, values)
        check_separable("an importance weight", model | guide, program.guide_sites)
        terms = program.terms(model, guide, axes)
        weights = terms.log_weights()
        normalized = torch.softmax(weights.local.detach(), 1)
        local, global_ = _log_joint(terms)
        log_q = terms.sum_local([latent.log_q for latent in terms.latents])
        surrogate = global_.sum() + terms.scale * (normalized * (local + log_q)).sum()
        iw = weights.importance_weighted()
        bounds = Bounds(iw.local.detach(), iw.global_.detach(), iw.scale)
        return Evaluation(-with_value(bounds.total, surrogate), bounds)


def _log_joint(terms: Terms) -> tuple[LocalWeights, GlobalWeights]:
    """Sum log p over sites, inside and outside the data plate."""
    parts = [(latent.is_local, latent.log_p) for latent in terms.latents]
    parts += [(site.is_local, site.log_p) for site in terms.observed]
    return (
        terms.sum_local([part for is_local, part in parts if is_local]),
        terms.sum_global([part for is_local, part in parts if not is_local]),
    )


def _check(program: ImportanceProgram, objective: str) -> None:
    """Refuse globals, models without latents, and guides whose log density at a given point does not train them."""
    names = [site.name for site in program.structure.select("latent", is_local=False)]
    if names:
        raise ModelError(
            f"{objective} trains q of latents inside the data plate alone, and the model has the global latents {names}. Use SGVB "
            f"or IWELBO, or make them parameters (pyro.param).",
            site=names[0],
        )
    if not program.names:
        raise ModelError(f"{objective} trains a guide of latents, and the model has none. Sample some without obs=.")
    for name, site in program.guide_sites.items():
        if site.is_auxiliary or is_delta(site):
            what = "auxiliary" if site.is_auxiliary else "a point (Delta)"
            raise GuideError(
                f"The guide's site {name!r} is {what}, so that the guide has no density at given latents, which {objective} "
                f"trains it by. Sample every latent from a distribution with a density, as AutoAmortizedNormal does.",
                site=name,
            )
        if has_moving_support(site.fns[0]):
            raise GuideError(
                f"The support of the guide's site {name!r} ({type(site.fns[0]).__name__}) depends on its parameters, and "
                f"{objective} weighs latents that may lie outside it. Use a family of fixed support.",
                site=name,
            )
