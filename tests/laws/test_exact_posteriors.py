"""Laws of every exact model: with the exact posterior as guide every weight is the evidence."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.testing import (
    BetaBinomial,
    ExactModel,
    GammaPoisson,
    HierarchicalNormal,
    LinearGaussian,
    LinearGaussianStateSpace,
    NormalNormal,
)

MODELS: list[type[ExactModel]] = [
    BetaBinomial,
    GammaPoisson,
    HierarchicalNormal,
    LinearGaussian,
    LinearGaussianStateSpace,
    NormalNormal,
]
OBJECTIVES: list[Callable[[], Objective]] = [
    lambda: SGVB(kl="sampled"),
    lambda: SGVB(3, kl="sampled"),
    lambda: SGVB(2, gradient="stl"),
    lambda: SGVB(2, gradient="score"),
    lambda: IWELBO(1),
    lambda: IWELBO(7),
    lambda: IWELBO(50, 3),
    lambda: IWELBO(5, 2, gradient="dreg"),
]


def fixture_and_simulated(kind: type[ExactModel]) -> list[tuple[ExactModel, Tensor]]:
    model, x = kind.fixture()
    return [(model, x), (model, model.simulate(4, seed=1)[0])]


def test_every_exact_model_is_registered() -> None:
    assert set(MODELS) == set(ExactModel.__subclasses__())


@pytest.mark.parametrize("make", OBJECTIVES, ids=lambda make: repr(make()))
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_bound_is_the_evidence(kind: type[ExactModel], make: Callable[[], Objective]) -> None:
    """To 1e-8 in float64, at any number of samples; with globals the total, for each draw of them."""
    for model, x in fixture_and_simulated(kind):
        bounds, exact = make().bounds(model.model, model.guide, x), model.log_marginal(x)
        torch.testing.assert_close(bounds.total, exact.sum(), atol=1e-8, rtol=0)
        if exact.dim():
            torch.testing.assert_close(bounds.local, exact, atol=1e-8, rtol=0)
            assert bounds.global_.item() == 0.0


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_weights_have_no_variance(kind: type[ExactModel]) -> None:
    for model, x in fixture_and_simulated(kind):
        weights = ImportanceProgram(model.model, model.guide, (x,), {}).draw_terms((x,), {}, 3, 20).log_weights()
        total = weights.global_ + weights.local.sum(2).mean(1)
        assert total.std() < 1e-8
        assert weights.local.std(1).max() < 1e-8  # given a particle's globals, its importance samples agree


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_without_a_data_plate_the_joint_evidence_is_the_one_row(kind: type[ExactModel]) -> None:
    for model, x in fixture_and_simulated(kind):
        bounds = IWELBO(5, data_plate=None).bounds(model.model, model.guide, x)
        torch.testing.assert_close(bounds.local, model.log_marginal(x).sum()[None], atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_float32_is_honoured_and_within_its_rounding(kind: type[ExactModel]) -> None:
    model, x = kind.fixture(torch.float32)
    bounds = IWELBO(3).bounds(model.model, model.guide, x)
    assert bounds.total.dtype == torch.float32
    torch.testing.assert_close(bounds.total, model.log_marginal(x).sum(), atol=1e-3, rtol=1e-5)


def test_linear_gaussian_fixture_to_its_known_digits() -> None:
    model, x = LinearGaussian.fixture()
    assert IWELBO(3).bounds(model.model, model.guide, x).local.item() == pytest.approx(-12.2620864, abs=1e-7)


def test_best_mean_field_guide_lies_the_known_gap_below() -> None:
    """ELBO* = -13.1759186, to 5 standard errors of 1e5 draws."""
    model, x = LinearGaussian.fixture()
    guide = model.mean_field_guide(at_optimum=True)
    for objective in (SGVB(4000, kl="sampled"), SGVB(4000)):
        draws = torch.stack([objective.bounds(model.model, guide, x).total for _ in range(25)])
        assert abs(draws.mean().item() + 13.1759186) < 5 * draws.std().item() / 5
