"""Model and guide must fit: sites, plates, supports, masks, scales; and an estimator must fit the guide."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer.autoguide import AutoDelta, AutoNormal, AutoNormalMessenger
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_aevb.errors import AEVBError, GuideError, ModelError
from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB

X = torch.tensor([0.5, -1.0, 2.0])
Make = Callable[[], Any]


def pair(prior: Make, q: Make) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Return a model with one local latent, which nothing observes, and a guide."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", q())

    return model, guide


def sigmoid(scale: float) -> Any:
    parts = [transforms.SigmoidTransform(), transforms.AffineTransform(0.0, scale)]
    return dist.TransformedDistribution(dist.Normal(torch.tensor(0.0), 1.0), parts)


INSIDE: dict[str, tuple[Make, Make]] = {
    "real": (lambda: dist.Normal(0.0, 1.0), lambda: dist.Laplace(0.0, 1.0)),
    "part of the real line": (lambda: dist.Normal(0.0, 1.0), lambda: dist.Gamma(2.0, 1.0)),
    "positive": (lambda: dist.Gamma(2.0, 1.0), lambda: dist.LogNormal(0.0, 1.0)),
    "nonnegative": (lambda: dist.HalfCauchy(torch.tensor(1.0)), lambda: dist.LogNormal(0.0, 1.0)),
    "interval": (lambda: dist.Uniform(-1.0, 4.0), lambda: dist.Uniform(0.0, 1.0)),
    "unit interval": (lambda: dist.Beta(2.0, 2.0), lambda: dist.Kumaraswamy(torch.tensor(1.0), torch.tensor(2.0))),
    "point": (lambda: dist.Gamma(2.0, 1.0), lambda: dist.Delta(torch.tensor(0.5))),
    "simplex": (lambda: dist.Dirichlet(torch.ones(3)), lambda: dist.Dirichlet(torch.ones(3) * 2)),
    "transformed into an interval": (lambda: dist.Uniform(0.0, 3.0), lambda: sigmoid(3.0)),
    "transformed onto the positive": (lambda: dist.Gamma(2.0, 1.0), lambda: sigmoid(3.0)),
}
OUTSIDE: dict[str, tuple[Make, Make]] = {
    "real in positive": (lambda: dist.Gamma(2.0, 1.0), lambda: dist.Normal(100.0, 0.01)),
    "positive in unit interval": (lambda: dist.Beta(2.0, 2.0), lambda: dist.LogNormal(-9.0, 0.1)),
    "wider interval": (lambda: dist.Uniform(0.0, 1.0), lambda: dist.Uniform(0.0, 1.0001)),
    "wider interval, transformed": (lambda: dist.Uniform(0.0, 1.0), lambda: sigmoid(4.0)),
    "point": (lambda: dist.Gamma(2.0, 1.0), lambda: dist.Delta(torch.tensor(-0.5))),
    "real vector in simplex": (
        lambda: dist.Dirichlet(torch.ones(3)),
        lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1),
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_guides_inside_the_support_are_taken(name: str) -> None:
    model, guide = pair(*INSIDE[name])
    assert torch.isfinite(SGVB(kl="sampled").bounds(model, guide, X).local).all()


@pytest.mark.parametrize("name", OUTSIDE)
def test_guides_outside_the_support_are_refused_by_site(name: str) -> None:
    """Also where the model, run on the guide's draws, is the first to see it."""
    model, guide = pair(*OUTSIDE[name])
    with pytest.raises(AEVBError, match="'z'") as caught:
        SGVB().bounds(model, guide, X)
    assert caught.value.site == "z"


def test_the_error_of_a_guide_outside_the_support_names_both() -> None:
    model, guide = pair(*OUTSIDE["real in positive"])
    with pytest.raises(
        GuideError, match=r"'z' \(Normal on Real\(\)\) puts mass outside the model's support, GreaterThan"
    ):
        SGVB().bounds(model, guide, X)


def test_checking_draws_leave_the_random_state_alone() -> None:
    model, guide = pair(*INSIDE["positive"])
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    SGVB().read(model, guide, X)
    torch.testing.assert_close(torch.randn(3), expected)


def around(handler: Callable[[], Any], inside: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        with handler():
            inside(x)

    return program


def latent_model(x: Tensor, handler: Callable[[], Any]) -> None:
    with pyro.plate("data", len(x)):
        with handler():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def latent_guide(x: Tensor, handler: Callable[[], Any]) -> None:
    with pyro.plate("data", len(x)), handler():
        pyro.sample("z", dist.Normal(5.0, 1.0))


MASK = torch.tensor([True, True, False])
HANDLERS: dict[str, Callable[[], Any]] = {
    "mask": lambda: poutine.mask(mask=MASK),
    "scale": lambda: poutine.scale(scale=0.1),
    "tensor scale": lambda: poutine.scale(scale=torch.tensor([0.1, 0.5, 1.0])),
}
NONE = lambda: poutine.scale(scale=1.0)  # noqa: E731


@pytest.mark.parametrize("name", HANDLERS)
@pytest.mark.parametrize("side", ["model", "guide"])
@pytest.mark.parametrize("objective", [SGVB(), SGVB(3, kl="sampled"), IWELBO(3)], ids=repr)
def test_a_mask_or_scale_on_one_side_is_an_error_that_names_the_site(
    name: str, side: str, objective: Objective
) -> None:
    handlers = {"model": NONE, "guide": NONE, side: HANDLERS[name]}
    with pytest.raises(AEVBError, match="'z'") as caught:
        objective.bounds(lambda x: latent_model(x, handlers["model"]), lambda x: latent_guide(x, handlers["guide"]), X)
    assert caught.value.site == "z"


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_a_mask_on_both_sides_drops_the_latent(kl: str) -> None:
    """Row 2 keeps its likelihood and loses log p - log q."""
    torch.manual_seed(0)
    bounds = SGVB(20_000, kl=kl).bounds(
        lambda x: latent_model(x, HANDLERS["mask"]), lambda x: latent_guide(x, HANDLERS["mask"]), X
    )
    fit = -0.5 * ((X - 5) ** 2 + 1) - 0.918938533
    expected = fit - torch.where(MASK, torch.tensor(12.5), torch.tensor(0.0))
    # log p(x|z) and log p - log q have standard deviations of up to 6 and 5 here
    torch.testing.assert_close(bounds.local, expected, atol=4 * 11 / 20_000**0.5, rtol=0)


@pytest.mark.parametrize("name", ["scale", "tensor scale"])
@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_a_scale_on_both_sides_scales_the_latent_under_sgvb(name: str, kl: str) -> None:
    bounds = SGVB(20_000, kl=kl).bounds(
        lambda x: latent_model(x, HANDLERS[name]), lambda x: latent_guide(x, HANDLERS[name]), X
    )
    scale = torch.tensor([0.1, 0.1, 0.1] if name == "scale" else [0.1, 0.5, 1.0])
    expected = -0.5 * ((X - 5) ** 2 + 1) - 0.918938533 - scale * 12.5
    torch.testing.assert_close(bounds.local, expected, atol=4 * 11 / 20_000**0.5, rtol=0)


def test_equal_scales_reached_in_another_order_are_equal() -> None:
    """(1 * 7 / 3) * 0.1 and (0.1 * 7) / 3 differ in the last digit."""

    def model(x: Tensor) -> None:
        with poutine.scale(scale=0.1), pyro.plate("data", 7, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 7, subsample_size=len(x)), poutine.scale(scale=0.1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert torch.isfinite(SGVB().bounds(model, guide, X).total)


@pytest.mark.parametrize("name", ["scale", "tensor scale"])
def test_a_scale_has_no_place_inside_the_logarithm(name: str) -> None:
    with pytest.raises(ModelError, match=r"'z' has a scale.*inside an importance-weighted bound"):
        IWELBO(3).bounds(lambda x: latent_model(x, HANDLERS[name]), lambda x: latent_guide(x, HANDLERS[name]), X)


def test_a_subsampled_inner_plate_is_kept_under_sgvb_and_refused_inside_the_logarithm() -> None:
    x = torch.tensor([[0.5, 1.0], [-0.3, 0.2]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 6, subsample_size=2, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, torch.full((len(x), 1), 1e-4)))

    expected = 3 * dist.Normal(0.0, 1.0).log_prob(x).sum(1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, 1e-4), torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(SGVB().bounds(model, guide, x).local, expected - kl, atol=1e-2, rtol=0)
    with pytest.raises(ModelError, match="'x' has a scale"):
        IWELBO(2).bounds(model, guide, x)


class Encoder(nn.Module):
    """A guide whose family is built from encoder outputs."""

    def __init__(self, family: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2)
        self.family = family

    def forward(self, x: Tensor) -> None:
        out = self.head(x[:, None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family(out[:, 0], out[:, 1].exp() + 0.1))


def plain_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


MOVING = {
    "uniform": lambda loc, scale: dist.Uniform(loc, loc + scale),
    "stretched uniform": lambda loc, scale: dist.TransformedDistribution(
        dist.Uniform(torch.zeros_like(loc), 1.0), [transforms.AffineTransform(loc, scale)]
    ),
    "transformed uniform": lambda loc, scale: dist.TransformedDistribution(
        dist.Uniform(loc, loc + scale), [transforms.AffineTransform(0.0, 2.0)]
    ),
}
ESTIMATORS = [SGVB(gradient="stl"), SGVB(gradient="score"), IWELBO(3, gradient="dreg")]


@pytest.mark.parametrize("family", MOVING)
@pytest.mark.parametrize("objective", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("bound_first", [False, True])
def test_moving_supports_are_refused_where_they_bias_the_gradient(
    family: str, objective: Objective, bound_first: bool
) -> None:
    guide = Encoder(MOVING[family])
    run = objective.bounds if bound_first else objective.differentiable_loss
    with pytest.raises(GuideError, match="support of the guide's site 'z'"):
        run(plain_model, guide, X)


@pytest.mark.parametrize("family", MOVING)
@pytest.mark.parametrize("objective", [SGVB(kl="sampled"), SGVB(), IWELBO(3)], ids=repr)
def test_moving_supports_are_taken_with_the_total_derivative(family: str, objective: Objective) -> None:
    guide = Encoder(MOVING[family])
    objective.differentiable_loss(plain_model, guide, X).backward()
    assert guide.head.weight.grad is not None


def test_families_without_rsample_are_for_the_score_alone() -> None:
    guide = Encoder(lambda loc, scale: dist.VonMises(loc, scale))
    for objective in (SGVB(), SGVB(gradient="stl"), IWELBO(2), IWELBO(2, gradient="dreg")):
        with pytest.raises(GuideError, match=r"'z' \(VonMises\) has no rsample.*score"):
            objective.bounds(plain_model, guide, X)
    SGVB(gradient="score").differentiable_loss(plain_model, guide, X).backward()
    assert guide.head.weight.grad is not None


class Point(nn.Module):
    """A guide of a point and of a normal, both local."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Delta(self.value))
            pyro.sample("b", dist.Normal(self.loc, 1.0))


def two_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def test_trained_points_are_refused_by_estimators_that_would_not_train_them_rightly() -> None:
    for objective in (SGVB(gradient="score"), IWELBO(3, gradient="dreg")):
        with pytest.raises(GuideError, match=r"'a' is a point \(Delta\)"):
            objective.differentiable_loss(two_latents, Point(), X)
    for objective in (SGVB(), SGVB(gradient="stl"), IWELBO(3)):
        guide = Point()
        objective.differentiable_loss(two_latents, guide, X).backward()
        assert guide.value.grad.abs().min() > 0


def test_points_read_off_another_draw_are_taken_by_every_estimator() -> None:
    """Pyro's AutoNormal: a normal site, and a point with the Jacobian; also with a global beside the locals."""

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    guide(X)
    for objective in (*ESTIMATORS, SGVB(3), IWELBO(3, 2)):
        guide.zero_grad()
        objective.differentiable_loss(model, guide, X).backward()
        assert all(parameter.grad is not None for parameter in guide.parameters())


def test_a_global_point_is_trained_by_stl_and_dreg() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    point = AutoDelta(poutine.block(model, expose=["scale"]))
    point(X)

    def guide(x: Tensor) -> None:
        point(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    for objective in (SGVB(), SGVB(gradient="stl"), IWELBO(3, gradient="dreg")):
        point.zero_grad()
        objective.differentiable_loss(model, guide, X).backward()
        assert next(point.parameters()).grad.abs() > 0
    with pytest.raises(GuideError, match="point"):
        SGVB(gradient="score").differentiable_loss(model, guide, X)


def test_locals_read_off_one_global_draw_have_no_weights_of_their_own() -> None:
    def guide(x: Tensor) -> None:
        joint = pyro.sample("joint", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(joint))

    with pytest.raises(GuideError, match=r"'joint'.*rows have no weights of their own"):
        IWELBO(2).bounds(plain_model, guide, X)


def test_missing_extra_and_misplaced_sites_are_named() -> None:
    def guide_without(x: Tensor) -> None:
        pass

    def guide_with_more(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide_of_data(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def guide_outside(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide_of_another_event(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for guide, message in (
        (guide_without, r"lacks the model's latent sites \['z'\]"),
        (guide_with_more, "'w', which is not in the model"),
        (guide_of_data, "'x', which is observed"),
        (guide_outside, "'z' lies inside the data plate 'data' in the model and outside"),
    ):
        with pytest.raises(GuideError, match=message):
            SGVB().bounds(plain_model, guide, X)
    with pytest.raises(AEVBError, match="z"):
        SGVB().bounds(plain_model, guide_of_another_event, X)


def test_an_event_shape_that_the_model_survives_is_refused_too() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(AEVBError, match="z"):
        SGVB().bounds(model, guide, X)


def test_a_normal_transformed_to_a_composed_support_lies_inside_it():
    """``biject_to`` composes two steps for the support of a Gamma, and torch calls the last step's codomain the support."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x)), 1.0)
            pyro.sample("z", dist.TransformedDistribution(base, biject_to(dist.Gamma(2.0, 1.0).support)))

    x = torch.ones(3)
    assert torch.isfinite(SGVB().bounds(model, guide, x).local).all()
    assert torch.isfinite(SGVB().bounds(model, AutoNormalMessenger(model), x).local).all()
