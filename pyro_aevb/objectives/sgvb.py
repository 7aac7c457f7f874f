"""Stochastic gradient variational Bayes: the evidence lower bound of arXiv 1312.6114."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_aevb._types import Args, Kwargs, PyroProgram
from pyro_aevb.errors import GuideError, ModelError, SettingError
from pyro_aevb.objectives.base import Evaluation, Objective, check_choice, check_estimator, with_value
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.program.particles import Records
from pyro_aevb.weights import Bounds, LatentTerm, Terms

__all__ = ["SGVB", "KLChoice", "KLPlan"]

KLName = Literal["auto", "sampled", "analytic"]
Gradient = Literal["reparam", "stl", "score"]


@dataclass(frozen=True)
class KLChoice:
    """Which estimator one latent site gets, and why.

    Attributes:
        estimator: ``"A"``, sampled log p - log q (Eq 6), or ``"B"``, closed-form KL (Eq 7).
        reason: Why.
    """

    estimator: Literal["A", "B"]
    reason: str


class KLPlan(dict[str, KLChoice]):
    """The choice for each latent site; printing it gives a table."""

    def __str__(self) -> str:
        """Return a table of site, estimator and reason."""
        width = max((len(name) for name in self), default=4)
        return "\n".join(f"{name:{width}}  {choice.estimator}  {choice.reason}" for name, choice in self.items())

    __repr__ = __str__


class _KLWeight(nn.Module):
    """The KL weight as a buffer, so that a recorded graph reads its present value instead of freezing it."""

    kl_weight: Tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.register_buffer("kl_weight", torch.tensor(initial, dtype=torch.float64), persistent=False)


class SGVB(Objective):
    r"""The evidence lower bound, estimated by reparameterized draws (Kingma & Welling 2013, arXiv 1312.6114).

    With :math:`z_l \sim q(z|x)`, for a row x:

    - estimator A, Eq 6: :math:`\frac1L \sum_l \log p(x, z_l) - \log q(z_l|x)`
    - estimator B, Eq 7: :math:`-KL(q(z|x) \| p(z)) + \frac1L \sum_l \log p(x|z_l)`

    and Eq 8 over a batch: num_data / rows times the sum over its rows. Both are unbiased for the ELBO, a lower bound on
    log p(x). Choosing per site, ``kl="auto"`` takes B where it is valid: the closed form exists and the prior's parameters at
    the site depend on nothing that is sampled from it or after it in q.

    Args:
        num_particles: L, draws per row, averaged.
        kl: ``"auto"``, ``"sampled"`` (A everywhere) or ``"analytic"`` (B everywhere, an error where it is not valid).
        gradient: ``"reparam"``: the total derivative. ``"stl"``: sticking the landing (Roeder et al. 2017, arXiv 1703.09194),
            which drops the score of q, of expectation 0, and whose variance vanishes at the exact posterior; it implies
            ``kl="sampled"``. ``"score"``: the score-function estimator that the paper rejects for its variance (section 2.2), as
            a baseline; row n's score is multiplied by row n's cost alone.
        kl_weight: Weight of the latents' KL in the loss, or a function of the optimisation step that returns it. The bound is
            reported with weight 1.
        free_bits: Nats of KL per latent site, on the mean over the batch, below which the loss does not reward less (Kingma et
            al. 2016, arXiv 1606.04934, Eq 16). The bound is reported without.
        data_plate: As in :class:`~pyro_aevb.objectives.base.Objective`.

    Raises:
        SettingError: If a name is unknown, a number out of range, or kl and gradient do not go together.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the exact posterior
        >>> SGVB(kl="sampled").bounds(model, guide, torch.tensor([0.0, 1.0])).local
        tensor([-1.2655, -1.5155])
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        kl: KLName = "auto",
        gradient: Gradient = "reparam",
        kl_weight: float | Callable[[int], float] = 1.0,
        free_bits: float = 0.0,
        data_plate: str | None = "auto",
    ) -> None:
        super().__init__(num_particles, data_plate=data_plate)
        check_choice("kl", kl, ("auto", "sampled", "analytic"))
        check_choice("gradient", gradient, ("reparam", "stl", "score"))
        if kl == "analytic" and gradient != "reparam":
            raise SettingError(
                f"kl='analytic' has no log q to differentiate, got gradient={gradient!r}. Use kl='sampled'."
            )
        if free_bits and gradient == "score":
            raise SettingError(
                f"free_bits holds the KL back by the derivative of a maximum, which gradient='score' doesn't take; got "
                f"free_bits={free_bits!r}. Use gradient='reparam' or 'stl'."
            )
        for name, value in (("free_bits", free_bits), ("kl_weight", 1.0 if callable(kl_weight) else kl_weight)):
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise SettingError(f"{name} must be a number of at least 0, got {value!r}.")
        self.kl = kl
        self.gradient = gradient
        self.kl_weight = kl_weight
        self.free_bits = free_bits
        initial = kl_weight(0) if callable(kl_weight) else kl_weight
        self.state: _KLWeight = _KLWeight(float(initial))
        self._plan = KLPlan()

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments as JSON values; a schedule is left out."""
        names = ("num_particles", "kl", "gradient", "kl_weight", "free_bits", "data_plate")
        return {name: getattr(self, name) for name in names if not callable(getattr(self, name))}

    def set_step(self, step: int) -> None:
        """Set the KL weight of a schedule."""
        schedule = self.kl_weight
        if callable(schedule):
            self.state.kl_weight.fill_(float(schedule(step)))

    def explain(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> KLPlan:
        """Say for each latent site whether estimator A or B is used, and why."""
        self.read(model, guide, *args, **kwargs)
        return self._plan

    def _prepare(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> None:
        check_estimator(self.gradient, program, args, kwargs)
        if self.gradient == "score":
            _check_separate_costs(program, args, kwargs)
        self._plan = _plan_kl(program, args, kwargs, self.kl, self.gradient)
        if self.free_bits and any(site.is_auxiliary for site in program.guide_sites.values()):
            raise GuideError(
                "free_bits counts the KL of each latent site, but this guide shares auxiliary sites between them."
            )

    def _evaluate(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Evaluation:
        if self.gradient == "score":
            return self._evaluate_score(program, args, kwargs)
        terms = self._draw(program, args, kwargs)
        bounds = _bounds(terms, [latent.negative_kl for latent in terms.latents])
        detached = Bounds(bounds.local.detach(), bounds.global_.detach(), bounds.scale)
        return Evaluation(-self._weighted(terms, bounds), detached)

    def _draw(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Terms:
        """Draw from the guide; under STL, log q is taken with the guide's parameters detached."""
        axes = program.axes(self.num_particles, 1)
        guide = program.sample_guide(args, kwargs, axes, keeps_noise=self.gradient == "stl")
        values = {name: site.value for name, site in guide.items()}
        model = program.score_model(args, kwargs, axes, values)
        if self.gradient == "stl" and torch.is_grad_enabled():
            guide = program.rescore_guide(args, kwargs, axes, values)
        kl_sites = [name for name, choice in self._plan.items() if choice.estimator == "B"]
        return program.terms(model, guide, axes, kl_sites)

    def _weighted(self, terms: Terms, bounds: Bounds) -> Tensor:
        """Return what training maximizes: the bound with KL weight and free bits."""
        if not self.free_bits and not callable(self.kl_weight) and self.kl_weight == 1.0:
            return bounds.total
        reconstruction = _bounds(terms, []).total
        kl = sum((self._penalty(latent, terms) for latent in terms.latents), torch.zeros_like(reconstruction))
        return reconstruction - self.state.kl_weight.to(kl) * kl

    def _penalty(self, latent: LatentTerm, terms: Terms) -> Tensor:
        """Return a site's KL over the data set, at least ``free_bits`` a row."""
        mean = -latent.negative_kl.mean()
        if self.free_bits:
            mean = mean.clamp(min=self.free_bits)
        return mean * (terms.scale * terms.shape[2] if latent.is_local else 1.0)

    def _evaluate_score(self, program: ImportanceProgram, args: Args, kwargs: Kwargs) -> Evaluation:
        r"""Weigh fixed draws: the gradient of q is :math:`f(z) \nabla \log q(z)` (section 2.2), f the row's own cost."""
        axes = program.axes(self.num_particles, 1)
        with torch.no_grad():
            draws: Records = program.sample_guide(args, kwargs, axes, keeps_noise=True)
        values = {name: site.value.detach() for name, site in draws.items()}
        guide = program.rescore_guide(args, kwargs, axes, values, is_detached=False)
        terms = program.terms(program.score_model(args, kwargs, axes, values), guide, axes)
        weights = terms.log_weights()
        bounds = weights.elbo()
        value = self._weighted(terms, bounds)
        surrogate = self._score_surrogate(terms)
        detached = Bounds(bounds.local.detach(), bounds.global_.detach(), bounds.scale)
        return Evaluation(-with_value(value, surrogate), detached)

    def _score_surrogate(self, terms: Terms) -> Tensor:
        """Return a scalar whose gradient is the score-function estimator of q's and the plain one of p's parameters."""
        weight = self.state.kl_weight.to(terms.like)

        def split(*, is_local: bool) -> tuple[Tensor, Tensor, Tensor]:
            add = terms.sum_local if is_local else terms.sum_global
            observed = add([site.log_p for site in terms.observed if site.is_local == is_local])
            log_p = add([latent.log_p for latent in terms.latents if latent.is_local == is_local])
            log_q = add([latent.log_q for latent in terms.latents if latent.is_local == is_local])
            return observed + weight * log_p, log_q, observed + weight * (log_p - log_q)

        log_p, log_q, cost = split(is_local=True)
        global_log_p, global_log_q, global_cost = split(is_local=False)
        # locals are drawn given the globals, so that a global's score is multiplied by everything
        total_cost = (global_cost + terms.scale * cost.sum((1, 2)) / terms.shape[1]).detach()
        rows = (log_p + cost.detach() * log_q).mean((0, 1)).sum()
        return terms.scale * rows + (global_log_p + total_cost * global_log_q).mean()


def _bounds(terms: Terms, negative_kls: list[Tensor]) -> Bounds:
    """Add the latents' -KL, one entry per latent or none, to the observed sites and average over particles."""
    parts = [(site.is_local, site.log_p) for site in terms.observed]
    parts += [(latent.is_local, part) for latent, part in zip(terms.latents, negative_kls, strict=False)]
    local = terms.sum_local([part for is_local, part in parts if is_local])
    global_ = terms.sum_global([part for is_local, part in parts if not is_local])
    return Bounds(local.mean((0, 1)), global_.mean(), terms.scale)


def _check_separate_costs(program: ImportanceProgram, args: Args, kwargs: Kwargs) -> None:
    """Refuse sites outside the data plate that depend on rows: the cost of a row would not be its own."""
    parents = program.parents(args, kwargs)
    structure = program.structure
    local = {site.name for site in structure.select("latent", is_local=True)}
    for name, site in structure.sites.items():
        if not site.is_local and parents.get(name, frozenset()) & local:
            raise ModelError(
                f"Site {name!r} lies outside the data plate but depends on latents inside it, so rows have no cost of their own, "
                f"which gradient='score' multiplies a row's score by. Use gradient='reparam' or 'stl'.",
                site=name,
            )


def _plan_kl(program: ImportanceProgram, args: Args, kwargs: Kwargs, kl: KLName, gradient: Gradient) -> KLPlan:
    """Choose estimator A or B for each latent site."""
    if kl == "sampled" or gradient != "reparam":
        reason = "kl='sampled'" if kl == "sampled" else f"gradient={gradient!r} needs log q"
        return KLPlan({name: KLChoice("A", reason) for name in program.guide_sites if name in program.names})
    closed = program.closed_form_sites(args, kwargs)
    parents = program.parents(args, kwargs)
    order = [name for name in program.guide_sites if name in program.names]
    plan = KLPlan({name: _choose(name, order, parents, closed) for name in order})
    for name, choice in plan.items():
        if kl == "analytic" and choice.estimator == "A":
            raise SettingError(
                f"kl='analytic' is not valid at site {name!r}: {choice.reason}. Use kl='auto', which takes the closed form "
                f"where it is valid, or kl='sampled'.",
                site=name,
            )
    return plan


def _choose(name: str, order: list[str], parents: Mapping[str, frozenset[str]], closed: frozenset[str]) -> KLChoice:
    later = set(order[order.index(name) :])
    blocking = sorted(parents.get(name, frozenset()) & later)
    if blocking:
        return KLChoice("A", f"the prior's parameters depend on {blocking}, sampled at or after this site in the guide")
    if name not in closed:
        return KLChoice("A", "no closed-form KL between the guide's and the model's distribution")
    return KLChoice("B", "closed form, and the prior's parameters depend on nothing sampled at or after this site")
