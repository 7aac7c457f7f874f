"""SGVB: estimators A and B, the choice between them, Eq 8 over batches, KL weights and free bits."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from pyro_aevb.errors import GuideError, SettingError
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB, KLChoice

X = torch.tensor([0.7, -1.2, 2.0], dtype=torch.float64)
Program = Callable[[Tensor], None]


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


# Models and guides


def two_level(x: Tensor) -> None:
    """z1 ~ N(0, 1), z2 ~ N(z1, .8), x ~ N(z2, .6)."""
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 0.8))
        pyro.sample("x", dist.Normal(z2, 0.6), obs=x)


def top_down(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.3 * x, 0.9))
        pyro.sample("z2", dist.Normal(0.5 * z1 + 0.4 * x, 0.5))


def bottom_up(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.6 * x, 0.6))
        pyro.sample("z1", dist.Normal(0.7 * z2 + 0.1, 0.7))


def positive_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
        pyro.sample("x", dist.Normal(rate * weight[..., 0], 1.0), obs=x)


def positive_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(1 + x.exp(), 1.5))
        pyro.sample("weight", dist.Dirichlet(torch.tensor([2.0, 1.5])))


def global_model(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("data", 30, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x)


def global_guide(x: Tensor) -> None:
    pyro.sample("scale", dist.LogNormal(torch.tensor(0.2), 0.3))
    with pyro.plate("data", 30, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(x[..., None] * torch.tensor([0.3, 0.4]), 0.7).to_event(1))


PAIRS: dict[str, tuple[Program, Program]] = {
    "top down": (two_level, top_down),
    "bottom up": (two_level, bottom_up),
    "gamma and Dirichlet": (positive_model, positive_guide),
    "with a global": (global_model, global_guide),
}


def draw_totals(objective: SGVB, model: Program, guide: Program, count: int = 25) -> Tensor:
    return torch.stack([objective.bounds(model, guide, X).total for _ in range(count)])


# Estimators A and B


@pytest.mark.parametrize("name", PAIRS)
def test_estimators_a_and_b_agree_in_mean(name: str) -> None:
    model, guide = PAIRS[name]
    a, b = (draw_totals(SGVB(2000, kl=kl), model, guide) for kl in ("sampled", "auto"))
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    assert abs(a.mean() - b.mean()) < 4 * error
    assert "B" in {choice.estimator for choice in SGVB().explain(model, guide, X).values()}


def exact_two_level(guide: str) -> float:
    """The ELBO of :func:`two_level` by two-dimensional Gauss-Hermite quadrature, exact for quadratic log densities."""
    points, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(6))
    weights = weights / weights.sum()
    first, second = points[:, None, None], points[None, :, None]
    if guide == "top down":
        q1 = Normal(0.3 * X, 0.9)
        z1 = 0.3 * X + 0.9 * first
        q2 = Normal(0.5 * z1 + 0.4 * X, 0.5)
        z2 = q2.loc + 0.5 * second
    else:
        q2 = Normal(0.6 * X, 0.6)
        z2 = 0.6 * X + 0.6 * first
        q1 = Normal(0.7 * z2 + 0.1, 0.7)
        z1 = q1.loc + 0.7 * second
    log_p = Normal(0.0, 1.0).log_prob(z1) + Normal(z1, 0.8).log_prob(z2) + Normal(z2, 0.6).log_prob(X)
    log_w = log_p - q1.log_prob(z1) - q2.log_prob(z2)
    return float(torch.einsum("ijn,i,j->", log_w.expand(6, 6, 3), weights, weights))


@pytest.mark.parametrize("name", ["top down", "bottom up"])
@pytest.mark.parametrize("kl", ["sampled", "auto"])
def test_both_estimators_have_the_exact_mean(name: str, kl: Any) -> None:
    totals = draw_totals(SGVB(2000, kl=kl), *PAIRS[name])
    assert abs(totals.mean() - exact_two_level(name)) < 4 * totals.std() / len(totals) ** 0.5


def test_closed_form_is_taken_only_where_the_prior_is_sampled_before() -> None:
    down = SGVB().explain(two_level, top_down, X)
    assert {name: choice.estimator for name, choice in down.items()} == {"z1": "B", "z2": "B"}
    up = SGVB().explain(two_level, bottom_up, X)
    assert {name: choice.estimator for name, choice in up.items()} == {"z2": "A", "z1": "B"}
    assert "['z1']" in up["z2"].reason
    assert str(up).splitlines()[0].startswith("z2  A  ")


def test_closed_form_taken_where_it_is_not_valid_would_be_wrong() -> None:
    objective = SGVB(2000)
    objective.explain(two_level, bottom_up, X)["z2"] = KLChoice("B", "forced")
    totals = torch.stack([objective.bounds(two_level, bottom_up, X).total for _ in range(25)])
    assert abs(totals.mean() - exact_two_level("bottom up")) > 20 * totals.std() / len(totals) ** 0.5


def test_closed_form_of_a_row_is_the_sum_over_its_event_and_inner_plates() -> None:
    x = torch.tensor([[0.5, 1.0], [-0.3, 0.2], [0.1, 0.4]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("v", dist.Normal(z.sum(-1), 0.5))
                pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            loc = torch.stack([x[:, :1]] * 3, -1)
            pyro.sample("z", dist.Normal(loc, 1e-9).to_event(1))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("v", dist.Normal(x, 0.3))

    for particles in (1, 4):
        local = SGVB(particles, kl="analytic").bounds(model, guide, x).local
        kl = 3 * kl_divergence(Normal(x[:, 0], 1e-9), Normal(0.0, 1.0))
        kl = kl + kl_divergence(Normal(x, 0.3), Normal(3 * x[:, :1], 0.5)).sum(1)
        torch.testing.assert_close(local, Normal(0.0, 1.0).log_prob(x).sum(1) - kl, atol=1e-6, rtol=0)


def test_plain_variational_autoencoder_uses_the_closed_form_and_draws_only_the_likelihood() -> None:
    """App. B: with mu = (.5, -1), s = (.7, 1.2) the KL is .7643534 and free of noise."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor([0.5, -1.0]), torch.tensor([0.7, 1.2])).to_event(1))

    local = SGVB().bounds(model, guide, X).local
    torch.testing.assert_close(Normal(0.0, 1.0).log_prob(X) - local, torch.full((3,), 0.7643534), atol=1e-6, rtol=0)


def test_analytic_refuses_what_has_no_valid_closed_form_by_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.1 * x, 1.0))

    with pytest.raises(SettingError, match=r"not valid at site 'z': no closed-form KL") as caught:
        SGVB(kl="analytic").bounds(model, guide, X)
    assert caught.value.site == "z"
    with pytest.raises(SettingError, match=r"not valid at site 'z2'.*\['z1'\]"):
        SGVB(kl="analytic").bounds(two_level, bottom_up, X)
    assert SGVB().explain(model, guide, X)["z"].estimator == "A"


@pytest.mark.parametrize(
    ("objective", "reason"), [(SGVB(kl="sampled"), "kl='sampled'"), (SGVB(gradient="stl"), "gradient='stl'")]
)
def test_sampled_kl_says_why(objective: SGVB, reason: str) -> None:
    assert all(choice.estimator == "A" for choice in objective.explain(two_level, top_down, X).values())
    assert reason in objective.explain(two_level, top_down, X)["z1"].reason


# Eq 8


class GivenNoise(dist.Normal):
    """A normal whose draws use given noise, ``[rows, K]`` or ``[rows]``."""

    def __init__(self, loc: Tensor, scale: Tensor | float, noise: Tensor) -> None:
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GivenNoise":
        return GivenNoise(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = self.noise
        if noise.dim() == 2:
            noise = noise.T[: self.loc.shape[-2]] if self.loc.dim() > 1 else noise[:, 0]
        return self.loc + self.scale * noise.expand(self.loc.shape)


class Rows(nn.Module):
    """A model of rows under a global, both with given noise."""

    num_data = 23

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.4, 0.6, -0.3]))

    def model(self, x: Tensor, noise: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(self.w[0] * z, 0.8), obs=x)

    def guide(self, x: Tensor, noise: Tensor) -> None:
        g = pyro.sample("g", GivenNoise(self.w[1], 0.5, torch.tensor(0.7)))
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            pyro.sample("z", GivenNoise(self.w[1] * x + 0.2 * g, self.w[2].exp(), noise))


@pytest.mark.parametrize("sizes", [(23,), (10, 10, 3), (1,) * 23, (22, 1)], ids=str)
@pytest.mark.parametrize(
    "objective",
    [SGVB(kl="sampled"), SGVB(kl="auto"), SGVB(gradient="stl"), IWELBO(4), IWELBO(4, gradient="dreg")],
    ids=repr,
)
def test_batches_of_a_partition_weighted_by_rows_average_to_the_whole(
    sizes: tuple[int, ...], objective: SGVB | IWELBO
) -> None:
    """Eq 8: loss and gradient, with the same noise for each row, ragged batches too."""
    program = Rows()
    x = torch.randn(23)
    noise = torch.randn(23, 4) if isinstance(objective, IWELBO) else torch.randn(23)

    def evaluate(*batch: Tensor) -> Tensor:
        loss = objective.differentiable_loss(program.model, program.guide, *batch)
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, program.w)[0]])

    parts = [
        len(rows) / 23 * evaluate(rows, part) for rows, part in zip(x.split(sizes), noise.split(sizes), strict=True)
    ]
    torch.testing.assert_close(sum(parts), evaluate(x, noise), rtol=1e-10, atol=1e-10)


def test_bounds_are_unscaled_per_row_and_the_loss_is_their_total() -> None:
    program, x, noise = Rows(), torch.randn(5), torch.randn(5)
    loss, bounds = SGVB().evaluate(program.model, program.guide, x, noise)
    assert bounds.local.shape == (5,)
    assert bounds.scale == pytest.approx(23 / 5)
    assert not bounds.local.requires_grad
    assert loss.item() == pytest.approx(-float(bounds.global_ + 23 / 5 * bounds.local.sum()), rel=1e-12)


# KL weight and free bits


def weighted_loss(objective: SGVB) -> tuple[float, float]:
    torch.manual_seed(3)
    evaluation = objective.evaluate(global_model, global_guide, X)
    return evaluation.loss.item(), evaluation.bounds.total.item()


@pytest.mark.parametrize("kl", ["sampled", "auto"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_kl_weight_multiplies_the_kl_in_the_loss_and_not_the_reported_bound(kl: Any, weight: float) -> None:
    objective = SGVB(kl=kl, kl_weight=weight)
    loss, bound = weighted_loss(objective)
    assert bound == pytest.approx(weighted_loss(SGVB(kl=kl))[1], rel=1e-12)
    fit = -weighted_loss(SGVB(kl=kl, kl_weight=0.0))[0]
    assert -loss == pytest.approx(fit + weight * (bound - fit), rel=1e-12)


def test_kl_weight_of_zero_leaves_the_likelihood() -> None:
    torch.manual_seed(3)
    g = pyro.poutine.trace(global_guide).get_trace(X).nodes
    fit = 10 * Normal(g["z"]["value"].sum(-1), g["scale"]["value"]).log_prob(X).sum()
    assert weighted_loss(SGVB(kl_weight=0.0))[0] == pytest.approx(-fit.item(), rel=1e-12)


def test_schedule_gives_the_weight_of_its_step() -> None:
    objective = SGVB(kl="sampled", kl_weight=lambda step: min(1.0, step / 10))
    for step, weight in ((0, 0.0), (3, 0.3), (10, 1.0), (25, 1.0)):
        objective.set_step(step)
        assert weighted_loss(objective)[0] == pytest.approx(
            weighted_loss(SGVB(kl="sampled", kl_weight=weight))[0], rel=1e-12
        )


def test_a_number_is_no_schedule() -> None:
    objective = SGVB(kl="sampled", kl_weight=0.3)
    objective.set_step(7)
    assert weighted_loss(objective) == weighted_loss(SGVB(kl="sampled", kl_weight=0.3))


@pytest.mark.parametrize("free", [0.05, 0.4, 3.0])
def test_free_bits_hold_each_sites_mean_kl_from_below(free: float) -> None:
    """Kingma et al. 2016 (arXiv 1606.04934), Eq 16: lambda = free bits, mean over the batch, per site."""
    kl_z = kl_divergence(Normal(X[:, None] * torch.tensor([0.3, 0.4]), 0.7), Normal(0.0, 1.0)).sum(1).mean()
    kl_scale = kl_divergence(Normal(0.2, 0.3), Normal(0.0, 0.5))
    loss, bound = weighted_loss(SGVB(free_bits=free, kl_weight=0.5))
    assert bound == pytest.approx(weighted_loss(SGVB())[1], rel=1e-12)
    fit = -weighted_loss(SGVB(kl_weight=0.0))[0]
    penalty = 30 * max(free, kl_z.item()) + max(free, kl_scale.item())
    assert -loss == pytest.approx(fit - 0.5 * penalty, rel=1e-12)


def test_free_bits_give_no_gradient_below_and_the_whole_above() -> None:
    scale = torch.tensor(0.9, requires_grad=True)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(torch.zeros(()), scale))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    def derivative(free: float) -> float:
        loss = SGVB(free_bits=free).differentiable_loss(model, guide, X)
        return torch.autograd.grad(loss, scale)[0].item()

    assert derivative(1.0) == 0.0
    assert derivative(1e-6) == pytest.approx(3 * (0.9 - 1 / 0.9), rel=1e-12)


def test_free_bits_need_a_kl_of_each_site() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z1", dist.Delta(a[..., 0]))
            pyro.sample("z2", dist.Delta(a[..., 1]))

    with pytest.raises(GuideError, match="free_bits"):
        SGVB(free_bits=0.1).bounds(two_level, guide, X)


def test_auxiliary_sites_count_in_log_q() -> None:
    """A point read off a normal has the bound of that normal."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x, 0.9), infer={"is_auxiliary": True})
            z1 = pyro.sample("z1", dist.Delta(a))
            pyro.sample("z2", dist.Normal(0.5 * z1 + 0.4 * x, 0.5))

    totals = []
    for each in (guide, top_down):
        torch.manual_seed(0)
        totals.append(SGVB(5, kl="sampled").bounds(two_level, each, X).local)
    torch.testing.assert_close(*totals)


# Settings


@pytest.mark.parametrize(
    "objective",
    [
        SGVB(),
        SGVB(3, kl="sampled", gradient="stl", kl_weight=0.5, free_bits=0.2, data_plate="rows"),
        SGVB(kl="analytic", data_plate=None),
        SGVB(gradient="score"),
        IWELBO(5),
        IWELBO(7, 2, gradient="dreg", data_plate=None),
    ],
    ids=repr,
)
def test_settings_and_repr_make_the_same_objective_again(objective: SGVB | IWELBO) -> None:
    again = type(objective)(**objective.settings)
    assert again.settings == objective.settings
    assert eval(repr(objective), {"SGVB": SGVB, "IWELBO": IWELBO}).settings == objective.settings


def test_a_schedule_is_left_out_of_the_settings() -> None:
    assert "kl_weight" not in SGVB(kl_weight=lambda step: 1.0).settings


BAD_SETTINGS: list[tuple[Callable[[], Any], str]] = [
    (lambda: SGVB(0), r"num_particles must be an integer of at least 1, got 0"),
    (lambda: SGVB(1.5), r"num_particles must be an integer"),
    (lambda: SGVB(kl="exact"), r"Unknown kl 'exact'; known are 'auto', 'sampled', 'analytic'"),
    (lambda: SGVB(gradient="dreg"), r"Unknown gradient 'dreg'; known are 'reparam', 'stl', 'score'"),
    (lambda: SGVB(kl="analytic", gradient="stl"), r"kl='analytic' has no log q.*'stl'"),
    (lambda: SGVB(kl="analytic", gradient="score"), r"kl='analytic' has no log q.*'score'"),
    (lambda: SGVB(gradient="score", free_bits=0.1), r"free_bits.*gradient='score'"),
    (lambda: SGVB(free_bits=-1.0), r"at least 0"),
    (lambda: SGVB(kl_weight=-0.1), r"at least 0"),
    (lambda: IWELBO(0), r"num_importance_samples must be an integer of at least 1, got 0"),
    (lambda: IWELBO(2, 0), r"num_particles must be an integer of at least 1, got 0"),
    (lambda: IWELBO(5, gradient="stl"), r"'stl' is biased.*'dreg'"),
    (lambda: IWELBO(5, gradient="score"), r"Unknown gradient 'score'; known are 'reparam', 'dreg'"),
]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Run as users do, without the run-time check of annotations, which refuses a wrong name before the package does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), BAD_SETTINGS)
def test_settings_out_of_range_say_what_is_known(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()


def test_another_data_plate_is_taken_once() -> None:
    objective = SGVB(kl_weight=0.5)
    changed = objective.with_data_plate("rows")
    assert (changed.data_plate, objective.data_plate) == ("rows", "auto")
    assert changed.settings == {**objective.settings, "data_plate": "rows"}
    assert changed.with_data_plate("rows") is changed
    assert objective.with_data_plate("auto") is objective
    with pytest.raises(SettingError, match=r"data_plate='rows'.*'data'"):
        changed.with_data_plate("data")


def test_a_number_of_free_bits_is_finite_and_reported() -> None:
    assert math.isfinite(weighted_loss(SGVB(free_bits=0.1))[0])
    assert "free_bits=0.1" in repr(SGVB(free_bits=0.1))
