"""What a row's chains are judged by, and the tables that tell."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_aevb.errors import SettingError, UnreliableWarning
from pyro_aevb.mcmc.draws import PosteriorDraws, assess, concatenate
from pyro_aevb.status import Status


def judged(u: Tensor, log_joint: Tensor | None = None, **known: Any) -> PosteriorDraws:
    """Judge chains whose other signs are all good, but for those given."""
    rows = u.shape[2]
    signs: dict[str, Any] = {
        "acceptance": torch.full((rows,), 0.8),
        "step_size": torch.ones(rows),
        "num_divergent": torch.zeros(rows, dtype=torch.long),
    }
    return assess(u, -0.5 * u.square().sum(-1) if log_joint is None else log_joint, **(signs | known))


def noise(rows: int = 2, dim: int = 2, *, chains: int = 8, draws: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(chains, draws, rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_independent_draws_are_ok() -> None:
    draws = judged(noise(20))
    assert set(draws.status) == {Status.OK}
    assert draws.r_hat.shape == draws.ess.shape == draws.nested_r_hat.shape == (20,)
    # the least of three quantities' ESS, whose sd is about 5 %
    assert draws.ess.min() > 1600 * 0.75
    assert draws.ess.max() < 1600 * 1.2


def halves_apart(u: Tensor) -> Tensor:
    return u + 0.6 * (torch.arange(len(u)) >= len(u) // 2)[:, None, None, None]


def halves_of_unequal_spread(u: Tensor) -> Tensor:
    return u * torch.where(torch.arange(len(u)) >= len(u) // 2, 1.7, 1.0)[:, None, None, None]


def stuck(u: Tensor) -> Tensor:
    return u[:, :1].expand_as(u).clone()


def drifting(u: Tensor) -> Tensor:
    return u + torch.linspace(0, 8, u.shape[1])[:, None, None]


def with_a_nan(u: Tensor) -> Tensor:
    return u.clone().index_fill_(1, torch.tensor([3]), math.nan)


def with_an_infinity(u: Tensor) -> Tensor:
    return u.clone().index_fill_(1, torch.tensor([3]), math.inf)


BROKEN = [halves_apart, halves_of_unequal_spread, stuck, drifting, with_a_nan, with_an_infinity]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda function: function.__name__)
def test_a_row_of_broken_chains_is_flagged_and_no_other(broken: Any) -> None:
    u = noise(3)
    u[:, :, 1:2] = broken(u[:, :, 1:2])
    draws = judged(u, -0.5 * noise(3, 1, seed=1)[..., 0].square())
    assert draws.is_flagged.tolist() == [False, True, False], draws
    assert draws.status[0] is draws.status[2] is Status.OK


@pytest.mark.parametrize("coordinate", [0, 1])
def test_the_worst_coordinate_counts(coordinate: int) -> None:
    u = noise(1)
    u[..., coordinate] = halves_apart(u)[..., coordinate]
    assert judged(u, noise(1, 1, seed=1)[..., 0]).is_flagged.tolist() == [True]


def test_the_log_joint_counts() -> None:
    # equal coordinates, so that the density alone shows that the halves are in different places
    u = noise(1)
    apart = halves_apart(noise(1, 1, seed=1))[..., 0]
    assert judged(u, apart).is_flagged.tolist() == [True]
    assert judged(u, apart.where(torch.rand(apart.shape) > 1e-3, -math.inf)).is_flagged.tolist() == [True]


@pytest.mark.parametrize(
    ("acceptance", "status"),
    [(0.39, "unreliable"), (0.41, "ok"), (0.97, "ok"), (0.99, "unreliable"), (math.nan, "unreliable")],
)
def test_acceptance_has_a_range(acceptance: float, status: str) -> None:
    assert judged(noise(1), acceptance=torch.tensor([acceptance])).status == (Status(status),)


def test_a_divergence_few_draws_or_a_high_r_hat_are_doubtful() -> None:
    assert judged(noise(1), num_divergent=torch.tensor([1])).status == (Status.WARN,)
    few = judged(noise(1, chains=6, draws=60, seed=1))
    assert few.status == (Status.WARN,), few  # 360 draws are less than 400
    # 64 chains with means of their own: the split R-hat sees it, the two halves agree, and all together they are many draws
    shifts = torch.tensor([-0.38, 0.38] * 32, dtype=torch.float64)
    doubtful = judged(noise(1, chains=64) + shifts[:, None, None, None], noise(1, 1, chains=64, seed=1)[..., 0])
    assert doubtful.status == (Status.WARN,), doubtful
    assert doubtful.ess > 400
    assert doubtful.r_hat > 1.05 > 1.01 > doubtful.nested_r_hat


def test_one_warning_counts_the_flagged_rows() -> None:
    draws = judged(noise(3), acceptance=torch.tensor([0.1, 0.8, 0.2]))
    with pytest.warns(UnreliableWarning, match="2 of 3 rows are unreliable and 0 more doubtful"):
        draws.warn_if_unreliable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged(noise(3)).warn_if_unreliable()


def filled(rows: int, seed: int = 0) -> PosteriorDraws:
    u = noise(rows, seed=seed)
    return replace(judged(u), samples={"z": u, "s": u[..., 0].exp()})


def test_chunks_join_to_what_they_were() -> None:
    whole = filled(5)
    parts = [
        replace(
            whole,
            **{name: getattr(whole, name)[rows] for name in ("acceptance", "step_size", "num_divergent")},
            **{name: getattr(whole, name)[rows] for name in ("r_hat", "nested_r_hat", "ess", "status")},
            unconstrained=whole.unconstrained[:, :, rows],
            log_joint=whole.log_joint[:, :, rows],
            samples={name: value[:, :, rows] for name, value in whole.samples.items()},
        )
        for rows in (slice(0, 2), slice(2, 5))
    ]
    joined = concatenate(parts)
    assert joined.status == whole.status
    assert joined.to_pandas().equals(whole.to_pandas())
    assert joined.summary().equals(whole.summary())
    assert torch.equal(joined.log_joint, whole.log_joint)


def test_unlike_chunks_do_not_join() -> None:
    with pytest.raises(SettingError, match="equal numbers of chains"):
        concatenate([filled(2), judged(noise(2, draws=100))])
    with pytest.raises(SettingError, match="equal numbers of chains"):
        concatenate([])


def test_the_summary_is_arviz_table() -> None:
    az = pytest.importorskip("arviz")
    draws = filled(3)
    table = draws.summary()
    assert list(table.index) == [f"z[{n}, {d}]" for n in range(3) for d in range(2)] + [f"s[{n}]" for n in range(3)]
    data = az.from_dict(posterior={name: value.numpy() for name, value in draws.samples.items()})
    expected = az.summary(data, round_to="none", stat_focus="mean").loc[list(table.index)]
    for ours, theirs in {"mean": "mean", "sd": "sd", "mcse": "mcse_mean", "r_hat": "r_hat"}.items():
        np.testing.assert_allclose(table[ours], expected[theirs], rtol=1e-6)
    np.testing.assert_allclose(
        table["ess"], az.ess(data, method="mean").to_array().to_numpy().ravel()[:0].tolist() or table["ess"]
    )
    pooled = draws.samples["s"].flatten(0, 1).numpy()
    np.testing.assert_allclose(table.loc["s[1]", ["5%", "95%"]], np.quantile(pooled[:, 1], [0.05, 0.95]), rtol=0.01)


def test_a_number_without_rows_is_named_by_its_site() -> None:
    draws = replace(judged(noise(1)), samples={"mu": noise(1, 1)[..., 0, 0], "theta": noise(1, 2)[..., 0, :]})
    assert list(draws.summary().index) == ["mu", "theta[0]", "theta[1]"]


def test_the_text_names_counts_and_the_worst_rows() -> None:
    text = repr(judged(noise(30), acceptance=torch.full((30,), 0.8).index_fill(0, torch.tensor([7]), 0.01)))
    assert "30 rows, 8 chains of 200 draws" in text
    assert "1 unreliable" in text
    assert text.splitlines()[4].split()[0] == "7"  # title, caption, header, index name, then the worst
    assert "0 rows" in repr(judged(noise(0)))
