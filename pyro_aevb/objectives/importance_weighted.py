"""The importance-weighted bound of Burda et al. (arXiv 1509.00519), per row, with two estimators of its gradient."""

from typing import Any, Literal

import torch
from torch import Tensor

from pyro_aevb._types import Args, Kwargs
from pyro_aevb.errors import SettingError
from pyro_aevb.objectives.base import Evaluation, Objective, check_choice, check_estimator, with_value
from pyro_aevb.program.agreement import check_separable
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.program.parameters import preserved_buffers
from pyro_aevb.program.particles import ParticleAxes, Records
from pyro_aevb.program.settings import check_count
from pyro_aevb.weights import Bounds, LogWeights, Terms

__all__ = ["IWELBO"]


class IWELBO(Objective):
    r"""The importance-weighted bound (Burda et al. 2015, arXiv 1509.00519, Eq 8), each row with its own weights.

    .. math:: \log \frac1K \sum_k \frac{p(x_n, z_k | g)}{q(z_k | x_n, g)}, \quad z_k \sim q(z | x_n, g)

    A lower bound on log p(x) in expectation that rises with K; for K = 1 it is the ELBO. Globals g enter outside the logarithm:
    mean over particles of [log p(g) - log q(g) + scale * sum over rows], so that subsampling keeps a bound and rows keep their
    own weights.

    Args:
        num_importance_samples: K, draws of the local latents inside the logarithm.
        num_particles: S, draws averaged outside it.
        gradient: ``"reparam"``: the total derivative, whose signal-to-noise ratio for the guide falls as K grows. ``"dreg"``:
            doubly reparameterized (Tucker et al. 2018, arXiv 1810.04152, Eq 8), unbiased, whose ratio rises with K; costs one more
            run of the guide and, without gradient, of the model.
        data_plate: As in :class:`~pyro_aevb.objectives.base.Objective`.

    Raises:
        SettingError: If a number of samples is below 1 or the gradient unknown; ``"stl"`` is biased for K > 1 and refused.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the exact posterior: every weight is p(x)
        >>> IWELBO(num_importance_samples=10).bounds(model, guide, torch.tensor([0.0, 1.0])).local
        tensor([-1.2655, -1.5155])
    """

    def __init__(
        self,
        num_importance_samples: int,
        num_particles: int = 1,
        *,
        gradient: Literal["reparam", "dreg"] = "reparam",
        data_plate: str | None = "auto",
    ) -> None:
        super().__init__(num_particles, data_plate=data_plate)
        check_count("num_importance_samples", num_importance_samples)
        if gradient == "stl":
            raise SettingError(
                "gradient='stl' is biased for more than one importance sample (Tucker et al. 2018, arXiv 1810.04152). "
                "Use gradient='dreg', its unbiased counterpart."
            )
        check_choice("gradient", gradient, ("reparam", "dreg"))
        self.num_importance_samples = num_importance_samples
        self.gradient = gradient

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        names = ("num_importance_samples", "num_particles", "gradient", "data_plate")
        return {name: getattr(self, name) for name in names}

    def _prepare(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> None:
        check_estimator(self.gradient, program, args, kwargs)

    def _evaluate(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Evaluation:
        axes = program.axes(self.num_particles, self.num_importance_samples)
        guide = program.sample_guide(args, kwargs, axes, keeps_noise=self.gradient == "dreg")
        if self.gradient == "dreg" and torch.is_grad_enabled():
            return self._evaluate_dreg(program, args, kwargs, axes, guide)
        values = {name: site.value for name, site in guide.items()}
        weights = self._weights(program, program.score_model(args, kwargs, axes, values), guide, axes).log_weights()
        bounds = weights.importance_weighted()
        return Evaluation(-bounds.total, _detached(bounds))

    def _weights(self, program: ImportanceProgram, model: Records, guide: Records, axes: ParticleAxes) -> Terms:
        check_separable("an importance-weighted bound", model | guide, program.guide_sites)
        return program.terms(model, guide, axes)

    def _evaluate_dreg(
        self, program: ImportanceProgram, args: Args, kwargs: Kwargs, axes: ParticleAxes, guide: Records
    ) -> Evaluation:
        r"""Weigh with the normalized weights w: :math:`\sum_k w_k^2 \partial_{z_k} \log w_k` to q, :math:`\sum_k w_k` to p.

        Inside log q(z|x, g) the guide's parameters and the globals g are fixed; in log p(x, z|g) and in log w_g they are live
        (leaving g live in log q biases the gradient of q(g)).
        """
        values = {name: site.value for name, site in guide.items()}
        with torch.no_grad(), preserved_buffers(program.modules):
            fixed = self._weights(program, program.score_model(args, kwargs, axes, values), guide, axes).log_weights()
        normalized = torch.softmax(fixed.local, 1)
        slowed = {
            name: _scale_gradient(site.value, _as_value(normalized, site.value, program, name))
            if site.is_local
            else site.value
            for name, site in guide.items()
        }
        model = program.score_model(args, kwargs, axes, slowed)
        stopped = {name: value if guide[name].is_local else value.detach() for name, value in slowed.items()}
        rescored = program.rescore_guide(args, kwargs, axes, stopped)
        local = {name: rescored[name] if site.is_local else site for name, site in guide.items()}
        weights = self._weights(program, model, local, axes).log_weights()
        surrogate = Bounds((normalized * weights.local).sum(1).mean(0), weights.global_.mean(), weights.scale)
        bounds = LogWeights(weights.local.detach(), weights.global_.detach(), weights.scale).importance_weighted()
        return Evaluation(-with_value(bounds.total, surrogate.total), bounds)


def _detached(bounds: Bounds) -> Bounds:
    return Bounds(bounds.local.detach(), bounds.global_.detach(), bounds.scale)


def _scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """Return a tensor of the same value whose gradient arrives multiplied by ``factor``."""
    fixed = value.detach()
    return fixed + factor * (value - fixed)


def _as_value(weights: Tensor, value: Tensor, program: ImportanceProgram, name: str) -> Tensor:
    """Lay weights ``[S, K, rows]`` along the axes of a site's value ``[S, K, plates, rows, *event]``."""
    structure = program.structure
    event_dim = program.guide_sites[name].fns[0].event_dim
    plates = [1] * structure.max_plate_nesting
    if structure.data_dim is not None:
        plates[structure.data_dim] = weights.shape[2]
    shape = (*weights.shape[:2], *plates, *(1,) * event_dim)
    return weights.reshape(shape[len(shape) - value.dim() :])
