"""Where chains start: every mode that annealing reaches, in about its share of the mass, and nowhere far off."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_aevb.errors import SettingError
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.mcmc.starts import draw_starts
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.proposal import GuideDensity

ROWS = 300


def density(log_likelihood: Callable[[Tensor], Tensor], *, prior_sd: float = 2.0, rows: int = ROWS) -> LogDensity:
    """Return equal rows of one latent under a normal prior."""
    return LogDensity.from_function(
        lambda u: dist.Normal(0.0, prior_sd).log_prob(u[..., 0]),
        lambda u: log_likelihood(u[..., 0]),
        1,
        rows=rows,
        dtype=torch.float64,
        draw_prior=lambda count: prior_sd * torch.randn(count, rows, 1, dtype=torch.float64),
    )


def starts(density: LogDensity, *, num_chains: int = 16, seed: int = 0) -> Tensor:
    with torch.no_grad():
        noise = RowNoise(seed, torch.arange(density.num_rows), dtype=density.dtype)
        return draw_starts(density, None, noise, num_chains=num_chains)[0][..., 0]


def two_modes(share: float) -> Callable[[Tensor], Tensor]:
    """Return a likelihood of two equally wide peaks at -2 and 2 that gives the right one a share of the posterior."""

    def log_likelihood(u: Tensor) -> Tensor:
        parts = [math.log(1 - share) - 0.5 * ((u + 2) / 0.4).square(), math.log(share) - 0.5 * ((u - 2) / 0.4).square()]
        return torch.stack(parts).logsumexp(0)

    return log_likelihood


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_modes_are_started_at_by_their_mass(share: float) -> None:
    # flattened weights are half-way between the share and where chains happened to end, which is one half
    found = (starts(density(two_modes(share))) > 0).double().mean().item()
    assert share - 0.05 < found < (share + 0.5) / 2 + 0.05


@pytest.mark.parametrize("half", [slice(0, 8), slice(8, 16)], ids=["first half", "second half"])
def test_each_half_finds_both_modes(half: slice) -> None:
    is_right = (starts(density(two_modes(0.5)))[half] > 0).double().mean(0)
    assert ((is_right > 0) & (is_right < 1)).double().mean() > 0.95


def test_a_mode_without_mass_is_no_start() -> None:
    # e^-30 of the mass, and half of the prior
    found = (starts(density(two_modes(math.exp(-30)))) > 0).double().mean()
    assert found < 0.02


def test_a_posterior_ten_thousand_times_as_narrow_as_the_prior_is_approached() -> None:
    # the warm-up goes the rest of the way
    found = starts(density(lambda u: -0.5 * ((u - 3.0) / 1e-3).square(), prior_sd=10.0))
    assert ((found - 3.0).abs() < 0.1).double().mean() > 0.99


def test_rows_without_a_density_start_somewhere() -> None:
    found = starts(density(lambda u: torch.full_like(u, -math.inf), rows=3))
    assert found.shape == (16, 3)
    assert found.isfinite().all()


def test_half_of_the_chains_starts_at_draws_of_the_guide_that_weigh() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        # the posterior is N(0.8 x, 0.45^2); a third of these draws is far off
        far = dist.Categorical(torch.tensor([0.7, 0.3]))
        parts = dist.Normal(torch.stack((0.8 * x, x + 20), -1), 0.45)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(far, parts))

    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    with torch.no_grad():
        rows = LogDensity(model, x)
        noise = RowNoise(0, torch.arange(50), dtype=torch.float64)
        found, scale = draw_starts(rows, GuideDensity(guide, rows), noise, num_chains=16)
        draws, _ = GuideDensity(guide, rows).draw(64, seed=(noise.fork(0x57A27).seed + 1) % 2**31)
    first = found[:8]
    assert ((first[:, None] == draws).any(1)).all()
    assert ((found[..., 0] - 0.8 * x).abs() < 6 * 0.45).all()
    torch.testing.assert_close(scale, draws.std(0))


def test_draws_from_the_prior_are_needed() -> None:
    rows = LogDensity.from_function(lambda u: -u.square().sum(-1), lambda u: -u.square().sum(-1), 1)
    noise = RowNoise(0, torch.arange(1), dtype=torch.float32)
    with pytest.raises(SettingError, match="draw_prior"):
        draw_starts(rows, None, noise, num_chains=4)
