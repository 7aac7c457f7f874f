"""Log-weights, their reductions and the scale, held against numbers computed by hand and by numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyro_aevb.weights import Bounds, LatentTerm, LogWeights, ObservedTerm, Terms, log_mean_exp


def latent(name: str, is_local: bool, log_p: Tensor, log_q: Tensor, kl: Tensor | None = None) -> LatentTerm:
    return LatentTerm(name, is_local, torch.zeros(()), log_p, log_q, kl, (), ())


def random_weights(seed: int, samples: int) -> LogWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return LogWeights(3 * draw(4, samples, 5), draw(4), 7.5)


def test_log_mean_exp_is_numpys_and_does_not_overflow() -> None:
    values = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]], dtype=torch.float64)
    expected = np.log(np.exp(values.numpy()).mean(1))
    np.testing.assert_allclose(log_mean_exp(values, 1).numpy(), expected, rtol=1e-14)
    torch.testing.assert_close(log_mean_exp(values + 5000, 1), log_mean_exp(values, 1) + 5000)
    assert log_mean_exp(torch.tensor([-math.inf, 0.0]), 0).item() == pytest.approx(-math.log(2))


def test_terms_sum_to_weights_by_place_and_never_by_closed_form() -> None:
    ones = torch.ones(2, 3, 4)
    terms = Terms(
        latents=(
            latent("z", True, 2 * ones, 5 * ones, kl=1000 * ones),
            latent("g", False, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]), kl=torch.full((2,), 1000.0)),
        ),
        observed=(ObservedTerm("x", True, -ones), ObservedTerm("y", False, torch.tensor([-3.0, -4.0]))),
        scale=10.0,
        shape=(2, 3, 4),
        like=ones,
    )
    weights = terms.log_weights()
    torch.testing.assert_close(weights.local, -4 * ones)
    torch.testing.assert_close(weights.global_, torch.tensor([-2.5, -2.25]))
    assert weights.scale == 10.0
    assert [term.negative_kl.flatten()[0].item() for term in terms.latents] == [-1000.0, -1000.0]
    assert latent("z", True, 2 * ones, 5 * ones).negative_kl.flatten()[0].item() == -3.0
    assert list(terms.values) == ["z", "g"]


def test_models_without_locals_or_globals_have_zero_in_their_place() -> None:
    terms = Terms((), (), 1.0, (2, 3, 0), torch.zeros((), dtype=torch.float64))
    bounds = terms.log_weights().importance_weighted()
    assert bounds.local.shape == (0,)
    assert bounds.local.dtype == torch.float64
    assert bounds.total.item() == 0.0


def test_the_scale_multiplies_a_rows_bound_and_never_enters_a_weight() -> None:
    weights = random_weights(0, 6)
    local = np.log(np.exp(weights.local.numpy()).mean(1)).mean(0)
    bounds = weights.importance_weighted()
    np.testing.assert_allclose(bounds.local.numpy(), local, rtol=1e-12)
    assert bounds.total.item() == pytest.approx(weights.global_.mean().item() + 7.5 * local.sum(), rel=1e-12)
    assert weights.elbo().total.item() == pytest.approx(
        weights.global_.mean().item() + 7.5 * weights.local.mean((0, 1)).sum().item(), rel=1e-12
    )


@given(seed=st.integers(0, 1000), samples=st.integers(1, 8))
def test_importance_weighted_bound_lies_between_mean_and_maximum(seed: int, samples: int) -> None:
    weights = random_weights(seed, samples)
    elbo, bound = weights.elbo().local, weights.importance_weighted().local
    assert (bound >= elbo - 1e-12).all()
    assert (bound <= weights.local.amax(1).mean(0) + 1e-12).all()
    if samples == 1:
        torch.testing.assert_close(bound, elbo)


@given(seed=st.integers(0, 1000), shift=st.floats(-500, 500))
def test_a_constant_in_the_weights_moves_the_bounds_by_itself(seed: int, shift: float) -> None:
    weights = random_weights(seed, 5)
    moved = LogWeights(weights.local + shift, weights.global_, weights.scale)
    for reduce in (LogWeights.elbo, LogWeights.importance_weighted):
        torch.testing.assert_close(reduce(moved).local, reduce(weights).local + shift)


def test_total_is_global_plus_scaled_rows() -> None:
    assert Bounds(torch.tensor([1.0, 2.0]), torch.tensor(0.5), 3.0).total.item() == 9.5
