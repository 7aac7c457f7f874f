"""Convergence diagnostics, against ArviZ one quantity at a time."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_aevb.errors import SettingError
from pyro_aevb.mcmc import convergence
from pyro_aevb.mcmc.convergence import bulk_ess, diagnose, mean_ess, nested_r_hat, split_r_hat

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    az = pytest.importorskip("arviz")


def ar1(chains: int, draws: int, coefficient: float, seed: int) -> Tensor:
    """Simulate stationary autoregressive chains."""
    noise = torch.randn(chains, draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = [noise[:, 0]]
    for t in range(1, draws):
        values.append(coefficient * values[-1] + math.sqrt(1 - coefficient**2) * noise[:, t])
    return torch.stack(values, 1)


def quantities(chains: int, draws: int) -> dict[str, Tensor]:
    """Return chains of many kinds, ``[chains, draws]`` each."""
    random = torch.Generator().manual_seed(chains * 1000 + draws)
    noise = torch.randn(chains, draws, generator=random, dtype=torch.float64)
    found = {f"ar {rho}": ar1(chains, draws, rho, seed=i) for i, rho in enumerate([-0.9, -0.5, 0.0, 0.5, 0.9, 0.99])}
    found |= {
        "drift": noise + torch.linspace(0, 2, draws, dtype=torch.float64),
        "chains apart": noise + torch.arange(chains)[:, None],
        "scales apart": noise * (1.0 + torch.arange(chains)[:, None]),
        "heavy": noise / torch.randn(chains, draws, generator=random, dtype=torch.float64),
        "ties": noise.round(),
        "two values": (noise > 1).double(),
        "stuck": noise[:, :1].expand(chains, draws).clone(),
        "constant": torch.full_like(noise, 3.7),
        "float32": (1e3 + noise).float().double(),
        "tiny": 1e-9 * noise,
        "huge": 1e12 * noise,
        "alternating": torch.tensor([1.0, -1.0]).double().repeat(draws)[:draws] + 1e-3 * noise,
        "one NaN": noise.clone().index_fill_(1, torch.tensor([1]), math.nan),
        "one infinity": torch.where(torch.arange(draws) == 2, math.inf, noise),
    }
    return found


def loop(statistic: Callable[[np.ndarray], float], draws: dict[str, Tensor]) -> np.ndarray:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.array([statistic(value.numpy()) for value in draws.values()])


SHAPES = [(1, 40), (2, 5), (3, 4), (4, 6), (4, 7), (4, 8), (4, 9), (4, 10), (4, 11), (2, 100), (4, 101), (16, 200)]
"""Numbers of chains and draws, down to the fewest for which ArviZ has an answer."""
ORACLES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[np.ndarray], float]]] = {
    "bulk ESS": (bulk_ess, lambda draws: float(az.ess(draws, method="bulk"))),
    "mean ESS": (mean_ess, lambda draws: float(az.ess(draws, method="mean"))),
    "split R-hat": (split_r_hat, lambda draws: float(az.rhat(draws, method="rank"))),
    "nested R-hat": (lambda draws: nested_r_hat(draws, 2), lambda draws: nested_by_hand(draws, 2)),
}


def nested_by_hand(draws: np.ndarray, num_superchains: int) -> float:
    """Compute nested R-hat chain by chain, as Margossian et al. (2024) write it."""

    def scores(values: np.ndarray) -> np.ndarray:
        ranks = stats.rankdata(values, method="average")
        return stats.norm.ppf((ranks - 0.375) / (values.size + 0.25)).reshape(values.shape)

    def nested(chains: np.ndarray, owner: np.ndarray) -> float:
        groups = [chains[owner == k] for k in range(num_superchains)]
        between = np.var([group.mean() for group in groups], ddof=1)
        within = [np.mean([chain.var(ddof=1) for chain in group]) for group in groups]
        inside = [np.var([chain.mean() for chain in group], ddof=1) for group in groups]
        return float(np.sqrt(1 + between / np.mean(np.add(within, inside))))

    if np.isnan(draws).any():
        return math.nan
    half = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :half], draws[:, -half:]])
    owner = np.tile(np.repeat(np.arange(num_superchains), len(draws) // num_superchains), 2)
    return max(nested(scores(halves), owner), nested(scores(abs(halves - np.median(halves))), owner))


@pytest.mark.parametrize(("chains", "draws"), SHAPES, ids=lambda number: str(number))
@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_definition_for_every_kind_of_chain(name: str, chains: int, draws: int) -> None:
    ours, oracle = ORACLES[name]
    if name == "nested R-hat" and chains % 2:
        pytest.skip("an odd number of chains has no two superchains")
    found = quantities(chains, draws)
    # chains that never move are infinitely apart, or as far as the rounding of a mean allows
    values, expected = (
        ours(torch.stack([*found.values()], -1)).clamp(max=1e6).numpy(),
        loop(oracle, found).clip(max=1e6),
    )
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_equals_arviz_on_many_vectors_at_once() -> None:
    draws = torch.stack([ar1(4, 60, rho, seed=seed) for seed in range(30) for rho in (-0.4, 0.3, 0.8)], -1)
    columns = {str(index): draws[..., index] for index in range(draws.shape[-1])}
    for ours, oracle in ORACLES.values():
        np.testing.assert_allclose(ours(draws.reshape(4, 60, 10, 3, 3)).flatten().numpy(), loop(oracle, columns), 1e-6)


def test_all_at_once_are_the_same_as_each() -> None:
    draws = torch.stack([*quantities(4, 60).values()], -1)
    each = (bulk_ess(draws), split_r_hat(draws), nested_r_hat(draws, 2))
    for found, alone in zip(diagnose(draws, 2), each, strict=True):
        torch.testing.assert_close(found, alone, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(SettingError, match="num_superchains=3 of 4 chains"):
        diagnose(draws, 3)


@pytest.mark.parametrize("name", ORACLES)
def test_draws_too_few_to_tell_give_nan(name: str) -> None:
    ours, _ = ORACLES[name]
    assert ours(torch.randn(4, 3, 2)).isnan().all()
    assert ours(torch.randn(4, 8, 0)).shape == (0,)


@pytest.mark.parametrize("name", ["split R-hat", "nested R-hat"])
def test_one_chain_can_not_be_compared(name: str) -> None:
    if name == "split R-hat":
        assert split_r_hat(torch.randn(1, 100)).isnan()
    else:
        with pytest.raises(SettingError, match="num_superchains=2 of 1 chains"):
            nested_r_hat(torch.randn(1, 100), 2)


@pytest.mark.parametrize("number", [0, 1, 3, 8])
def test_superchains_are_of_equal_size(number: int) -> None:
    with pytest.raises(SettingError, match=f"num_superchains={number} of 4 chains"):
        nested_r_hat(torch.randn(4, 100), number)


@pytest.mark.parametrize("name", ORACLES)
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = ORACLES[name]
    draws = torch.stack([*quantities(4, 60).values()], -1)
    whole = ours(draws)
    monkeypatch.setattr(convergence, "_BLOCK", 3 * 4 * 60)
    assert torch.equal(ours(draws).nan_to_num(-1), whole.nan_to_num(-1))


def test_ess_of_autoregressive_chains_is_the_exact_one() -> None:
    # tau = (1 + rho) / (1 - rho); the sd of the estimate over 20 repetitions is about 10 %
    draws = torch.stack([ar1(8, 1000, 0.6, seed=100 + seed) for seed in range(20)], -1)
    for ours in (bulk_ess, mean_ess):
        assert ours(draws).mean().item() == pytest.approx(8000 * 0.4 / 1.6, rel=4 * 0.1 / math.sqrt(20))


def test_superchains_that_disagree_are_seen_where_chains_hide_it() -> None:
    # 16 chains that each wander slowly: their halves agree as badly as the chains, the two groups are apart by 3 sd
    noise = torch.randn(16, 200, 1, generator=torch.Generator().manual_seed(0))
    apart = noise + 3.0 * (torch.arange(16) >= 8)[:, None, None]
    assert nested_r_hat(noise, 2) < 1.01 < 1.5 < nested_r_hat(apart, 2)
    spread = noise * torch.where(torch.arange(16) >= 8, 2.0, 1.0)[:, None, None]
    assert nested_r_hat(spread, 2) > 1.05  # equal means, unequal spread
