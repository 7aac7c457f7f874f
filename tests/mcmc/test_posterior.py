"""Posterior draws against exact posteriors, simulated latents and reference draws; rows that go wrong alone."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from known_evidence import Known, dirichlet_multinomial, gamma_exponential
from posteriordb import Regression, ark, sblrc
from scipy import stats
from torch import Tensor

from pyro_aevb.errors import ModelError, SettingError, UnreliableWarning
from pyro_aevb.mcmc import starts
from pyro_aevb.mcmc.convergence import mean_ess
from pyro_aevb.mcmc.draws import PosteriorDraws
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.mcmc.posterior import hmc_posterior, sample_rows
from pyro_aevb.program.density import LogDensity
from pyro_aevb.status import Status
from pyro_aevb.testing import (
    BetaBinomial,
    EightSchools,
    ExactModel,
    GammaPoisson,
    LinearGaussian,
    LinearGaussianStateSpace,
    NormalNormal,
)


def draw(*args: Any, **settings: Any) -> PosteriorDraws:
    """Draw without a bar; a warning of unreliable rows is an error unless a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreliableWarning)
        return hmc_posterior(*args, **{"seed": 0, "progress": False, **settings})


@pytest.fixture
def quick_annealing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anneal in a third of the steps, which find both of two modes still."""
    monkeypatch.setattr(starts, "_NUM_TEMPERATURES", 12)


@pytest.fixture
def short_annealing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anneal in few steps, for tests that do not ask where chains start."""
    monkeypatch.setattr(starts, "_NUM_TEMPERATURES", 4)


def probabilities(values: Tensor, posterior: Any) -> Tensor:
    """Return the posterior probability below each value, coordinate by coordinate: uniform if the posterior is right."""
    if isinstance(posterior, torch.distributions.Beta):
        a, b = posterior.concentration1.numpy(), posterior.concentration0.numpy()
        return torch.from_numpy(stats.beta.cdf(values.numpy(), a, b))
    if isinstance(posterior, torch.distributions.Gamma):
        return posterior.cdf(values)
    return torch.distributions.Normal(posterior.mean, posterior.stddev).cdf(values)


def check_moments(values: Tensor, posterior: Any) -> None:
    """Hold centre and spread of ``[chains, draws, ...]`` to a known posterior, within 4.5 of their Monte Carlo standard errors.

    Moments of probabilities have errors next to normal, whose standard deviations are known but for the effective size. One in
    150,000 lies beyond that.
    """
    u = probabilities(values, posterior)
    for moment, exact, sd in ((u, 1 / 2, 12**-0.5), ((u - 0.5).square(), 1 / 12, 180**-0.5)):
        assert ((moment.mean((0, 1)) - exact) * mean_ess(moment).sqrt() / sd).abs().max() < 4.5


# Exact posteriors


@pytest.mark.usefixtures("quick_annealing")
@pytest.mark.parametrize(
    "kind",
    [GammaPoisson, pytest.param(BetaBinomial, marks=pytest.mark.slow), LinearGaussian],
    ids=lambda kind: kind.__name__,
)
def test_moments_are_those_of_the_exact_posterior(kind: type[ExactModel]) -> None:
    exact, _ = kind.fixture()
    x, _ = exact.simulate(50, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        draws = hmc_posterior(
            exact.model, x, num_chains=32, num_samples=100, warmup_steps=60, num_leapfrog=5, seed=0, progress=False
        )
    for name, posterior in exact.posterior(x).items():
        check_moments(draws.samples[name], posterior)
    assert draws.is_flagged.double().mean() <= 0.04  # by chance


@pytest.mark.usefixtures("quick_annealing")
def test_a_guide_does_not_change_what_is_sampled() -> None:
    # a guide that is the posterior of other data, five standard deviations off
    exact, _ = LinearGaussian.fixture()
    x, _ = exact.simulate(50, seed=5)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.posterior(x)["z"].mean + 3.0, 0.5).to_event(1))

    settings: dict[str, Any] = {"num_chains": 32, "num_samples": 100, "warmup_steps": 60, "num_leapfrog": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        draws = hmc_posterior(exact.model, x, guide=guide, **settings, seed=0, progress=False)
    check_moments(draws.samples["z"], exact.posterior(x)["z"])
    assert draws.is_flagged.double().mean() <= 0.04  # by chance


def test_a_guide_may_hold_a_table_of_its_rows() -> None:
    exact, _ = LinearGaussian.fixture()
    x, _ = exact.simulate(70, seed=5)
    loc = exact.posterior(x)["z"].mean

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        draws = hmc_posterior(exact.model, x, guide=guide, num_samples=4, warmup_steps=2, seed=0, progress=False)
    assert draws.samples["z"].shape == (16, 4, 70, 3)


def check_smoother(num_steps: int, num_rows: int, *, num_leapfrog: int) -> None:
    """Hold states to the RTS smoother."""
    exact = LinearGaussianStateSpace(num_steps=num_steps)
    x, _ = exact.simulate(num_rows, seed=2)
    draws = draw(exact.model, x, num_chains=64, num_samples=100, warmup_steps=80, num_leapfrog=num_leapfrog)
    for name, posterior in exact.posterior(x).items():
        values = draws.samples[name]
        check_moments(values, posterior)
        # sd about .25 and ESS above 2,500 make these four standard errors and more
        assert (values.mean((0, 1)) - posterior.mean).abs().max() < 0.02
        assert (values.std((0, 1)) - posterior.stddev).abs().max() < 0.02


@pytest.mark.usefixtures("quick_annealing")
def test_states_are_those_of_the_smoother() -> None:
    check_smoother(num_steps=2, num_rows=3, num_leapfrog=4)


@pytest.mark.slow
def test_states_of_long_series_are_those_of_the_smoother() -> None:
    check_smoother(num_steps=20, num_rows=5, num_leapfrog=10)


@pytest.mark.slow
@pytest.mark.usefixtures("short_annealing")
def test_ranks_of_simulated_latents_are_uniform() -> None:
    # Talts et al. (2018), with the log joint as a further quantity (Modrak et al. 2023): 1,000 rows at once
    exact, _ = LinearGaussian.fixture()
    x, latents = exact.simulate(1000, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # 240 draws of a row are few
        settings: dict[str, Any] = {"num_chains": 4, "num_samples": 60, "warmup_steps": 40, "num_leapfrog": 5}
        draws = hmc_posterior(exact.model, x, **settings, seed=0, progress=False)
    truth = latents["z"]
    log_joint = LogDensity(exact.model, x).log_joint(truth)
    drawn = torch.cat((draws.unconstrained, draws.log_joint[..., None]), -1).flatten(0, 1)
    ranks = (drawn < torch.cat((truth, log_joint[:, None]), -1)).double().mean(0)
    for quantity in ranks.T:
        assert stats.kstest(quantity.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "make", [pytest.param(make, marks=pytest.mark.slow) for make in (gamma_exponential, dirichlet_multinomial)]
)
def test_conjugate_means_are_known(make: Callable[[], Known]) -> None:
    # sd up to .44 and ESS above 8,000 make .02 four standard errors; without its Jacobian a map to the support is further off
    known = make()
    draws = draw(known.model, known.x, num_chains=64, num_samples=220, warmup_steps=80, num_leapfrog=5)
    for name, exact in known.posterior_mean.items():
        assert (draws.samples[name].mean((0, 1))[0] - exact).abs().max() < 0.02


# Globals


@pytest.mark.usefixtures("quick_annealing")
def test_rows_are_conditioned_on_given_globals() -> None:
    exact, x = NormalNormal.fixture()
    given = torch.tensor(1.5, dtype=torch.float64)
    draws = draw(exact.model, x, given={"g": given}, num_chains=32, num_samples=60, warmup_steps=60, num_leapfrog=5)
    precision = exact.local_scale**-2 + exact.noise_scale**-2
    mean = (given * exact.local_scale**-2 + x * exact.noise_scale**-2) / precision
    check_moments(draws.samples["z"], dist.Normal(mean, precision**-0.5))


def test_globals_must_be_given_and_one_at_a_time() -> None:
    exact, x = NormalNormal.fixture()
    with pytest.raises(ModelError, match="'g'"):
        draw(exact.model, x)
    with pytest.raises(SettingError, match=r"one value of each global.*\[3\]"):
        draw(exact.model, x, given={"g": torch.zeros(3, dtype=torch.float64)})


@pytest.mark.usefixtures("quick_annealing")
def test_a_whole_model_is_one_row() -> None:
    exact, x = NormalNormal.fixture()
    draws = draw(exact.model, x, data_plate=None, num_chains=64, num_samples=80, warmup_steps=80, num_leapfrog=6)
    assert len(draws) == 1
    assert {name: tuple(value.shape) for name, value in draws.samples.items()} == {"g": (64, 80), "z": (64, 80, 8)}
    for name, posterior in exact.posterior(x).items():
        check_moments(draws.samples[name], posterior)


@pytest.mark.slow
def test_eight_schools() -> None:
    exact, y = EightSchools.fixture()
    draws = draw(exact.model, y, data_plate=None, num_chains=64, num_samples=300, warmup_steps=300)
    assert draws.ess.item() >= 2000
    assert draws.samples["mu"].mean().item() == pytest.approx(4.397, abs=0.25)
    assert draws.samples["tau"].mean().item() == pytest.approx(3.598, abs=0.25)
    assert draws.samples["mu"].std().item() == pytest.approx(3.318, abs=0.25)
    assert draws.samples["tau"].std().item() == pytest.approx(3.220, abs=0.35)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sblrc, ark], ids=lambda make: make.__name__)
def test_posteriordb(make: Callable[[], Regression]) -> None:
    regression = make()
    draws = draw(regression.model, *regression.batch, data_plate=None, num_chains=32, warmup_steps=500)
    for name, expected in regression.mean.items():
        values, sd = draws.samples[name], regression.sd[name]
        error = (values.var((0, 1)) / mean_ess(values) + sd.square() / regression.num_draws).sqrt()
        assert ((values.mean((0, 1)) - expected) / error).abs().max() < 4, name
        assert (values.std((0, 1)) / sd - 1).abs().max() < 0.1, name


# Rows that go wrong


def square(x: Tensor) -> None:
    """Observe the square of a latent: two modes where it is far above 0."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
        pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)


def root(x: Tensor) -> None:
    """Know the positive root alone."""
    with pyro.plate("data", len(x)):
        positive = x.clamp(min=0)
        pyro.sample("z", dist.Normal(positive.sqrt(), torch.where(positive > 1, 0.15, 0.5)))


@pytest.mark.usefixtures("quick_annealing")
@pytest.mark.parametrize("guide", [None, root], ids=["without guide", "with guide"])
def test_modes_that_chains_do_not_connect_are_told(guide: Callable[..., None] | None) -> None:
    x = torch.tensor([9.0, -1.0], dtype=torch.float64).repeat_interleave(100)
    with pytest.warns(UnreliableWarning, match="of 200 rows"):
        draws = hmc_posterior(
            square, x, guide=guide, num_samples=100, warmup_steps=40, num_leapfrog=3, seed=0, progress=False
        )
    two, one = draws.is_flagged.double().view(2, -1).mean(1)
    # eight annealed chains all end in the guide's mode in about one row of a hundred; chance flags a few of the others
    assert two >= 0.95
    assert one <= 0.1
    is_positive = (draws.samples["z"][..., :100] > 0).double().mean((1, 2))
    assert is_positive[8:].mean().item() == pytest.approx(0.5, abs=0.1)
    if guide is root:
        assert (is_positive[:8] == 1).all()  # the guide's half alone would have looked converged
        assert (draws.nested_r_hat[:100] > 1.01).double().mean() >= 0.95


LEFT = torch.tensor([1e-4, 0.3], dtype=torch.float64).repeat_interleave(20)


def peaks(z: Tensor, left: Tensor) -> Tensor:
    """Return the log likelihood of two peaks at -2 and 2, of which the left one holds a share ``left``."""
    return torch.logaddexp(
        left.log() - 0.5 * ((z + 2) / 0.3).square(), (1 - left).log() - 0.5 * ((z - 2) / 0.4).square()
    )


def two_peaks(left: Tensor) -> None:
    with pyro.plate("data", len(left)):
        z = pyro.sample("z", dist.Normal(left.new_zeros(()), 3.0))
        pyro.factor("peaks", peaks(z, left))


def left_peak(left: Tensor) -> None:
    """Know the left peak alone."""
    with pyro.plate("data", len(left)):
        pyro.sample("z", dist.Normal(left.new_full((), -2.0), 0.3))


@pytest.mark.usefixtures("quick_annealing")
def test_chains_leave_a_mode_that_is_empty_and_no_other() -> None:
    z = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    mass = (peaks(z, LEFT) - z.square() / 18).softmax(0)
    is_empty = (mass * (z < 0)).sum(0) < 1e-3
    assert is_empty.sum() == 20
    assert (mass * (z < 0)).sum(0)[~is_empty].min() > 0.2
    with pytest.warns(UnreliableWarning, match="of 40 rows"):
        draws = hmc_posterior(
            two_peaks, LEFT, guide=left_peak, num_samples=100, warmup_steps=60, num_leapfrog=3, seed=0, progress=False
        )
    values = draws.samples["z"]
    is_left = values < 0
    assert not is_left[:, :, is_empty].any()
    inside = values[:, :, is_empty]
    mean, error = inside.mean((0, 1)), inside.std((0, 1)) / mean_ess(inside).sqrt()
    assert ((mean - (mass * z).sum(0)[is_empty]).abs() < 4.5 * error).all()
    assert is_left[:8, :, ~is_empty].double().mean() > 0.9  # where the guide led; a few jump before steps are small
    assert draws.is_flagged[~is_empty].double().mean() > 0.9
    assert draws.is_flagged[is_empty].double().mean() < 0.1


def normals(spoil: Callable[[Tensor], Tensor] | None = None) -> LogDensity:
    """Return four rows of two normals; the third row's likelihood is spoilt."""
    sds = torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)

    def likelihood(u: Tensor) -> Tensor:
        rows = [-0.5 * (u[..., row, :] / sds[row]).square().sum(-1) for row in range(4)]
        if spoil is not None:
            rows[2] = spoil(u[..., 2, :])
        return torch.stack(rows, -1)

    return LogDensity.from_function(
        lambda u: -0.5 * u.square().sum(-1),
        likelihood,
        2,
        rows=4,
        dtype=torch.float64,
        draw_prior=lambda count: torch.randn(count, 4, 2, dtype=torch.float64),
    )


def sample(density: LogDensity, **settings: Any) -> PosteriorDraws:
    noise = RowNoise(0, torch.arange(density.num_rows), dtype=density.dtype)
    return sample_rows(density, None, noise, **{"num_samples": 80, "warmup_steps": 60, **settings})


def nan(u: Tensor) -> Tensor:
    return u.sum(-1) * math.nan


def zero(u: Tensor) -> Tensor:
    return torch.full_like(u[..., 0], -math.inf)


def improper(u: Tensor) -> Tensor:
    return u.square().sum(-1)


@pytest.mark.parametrize("spoil", [nan, zero, improper], ids=lambda spoil: spoil.__name__)
def test_a_broken_row_is_flagged_and_leaves_the_others_alone_bit_for_bit(spoil: Callable[[Tensor], Tensor]) -> None:
    clean, spoilt = sample(normals()), sample(normals(spoil))
    others = [0, 1, 3]
    assert torch.equal(clean.unconstrained[:, :, others], spoilt.unconstrained[:, :, others])
    assert torch.equal(clean.ess[others], spoilt.ess[others])
    assert [clean.status[row] for row in others] == [spoilt.status[row] for row in others]
    assert clean.status[2] is not Status.UNRELIABLE
    assert spoilt.status[2] is Status.UNRELIABLE


# Chunks, seeds, settings


@pytest.mark.usefixtures("short_annealing")
@pytest.mark.parametrize(
    ("has_guide", "trajectory"),
    [(False, "jittered"), (True, "jittered"), (False, "chees")],
    ids=["without guide", "with guide", "learned length"],
)
def test_chunks_change_nothing(has_guide: bool, trajectory: str) -> None:
    exact, _ = GammaPoisson.fixture()
    x, _ = exact.simulate(5, seed=4)
    # short chains: the last bit of a density depends on the length of the vector, and chains let it grow
    settings: dict[str, Any] = {"num_chains": 4, "num_samples": 10, "warmup_steps": 10, "seed": 7, "progress": False}
    settings |= {"guide": exact.guide} if has_guide else {}
    settings |= {"trajectory": trajectory, "num_leapfrog": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        whole = hmc_posterior(exact.model, x, **settings)
        parts = hmc_posterior(exact.model, x, chunk_size=3, **settings)
    torch.testing.assert_close(parts.unconstrained, whole.unconstrained, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts.samples["rate"], whole.samples["rate"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts.ess, whole.ess, rtol=1e-8, atol=0)
    assert parts.status == whole.status
    assert parts.num_leapfrog == whole.num_leapfrog
    assert (whole.num_leapfrog == 3) == (trajectory == "jittered")


@pytest.mark.usefixtures("short_annealing")
def test_a_seed_draws_the_same_again_and_leaves_the_generator_alone() -> None:
    x = torch.tensor([1.0, 3.0])
    settings: dict[str, Any] = {"num_chains": 2, "num_samples": 5, "warmup_steps": 5, "progress": False}
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        first, again, other = (hmc_posterior(square, x, seed=seed, **settings).unconstrained for seed in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), state)
        free = hmc_posterior(square, x, **settings).unconstrained
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, free)


@pytest.mark.usefixtures("short_annealing")
def test_numpy_arrays_are_rows() -> None:
    x = np.array([1.0, 3.0])
    settings: dict[str, Any] = {"num_chains": 2, "num_samples": 5, "warmup_steps": 5, "progress": False, "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        draws, expected = (hmc_posterior(square, batch, **settings) for batch in (x, torch.from_numpy(x)))
        by_name = hmc_posterior(square, x=x, **settings)
    assert torch.equal(draws.unconstrained, expected.unconstrained)
    assert torch.equal(by_name.unconstrained, expected.unconstrained)
    u = torch.zeros(3, 2, 1, dtype=torch.float64)
    for density in (LogDensity(square, x), LogDensity(square, x=x)):
        assert torch.equal(density.log_joint(u), LogDensity(square, torch.from_numpy(x)).log_joint(u))


@pytest.mark.usefixtures("short_annealing")
def test_draws_are_carried_to_their_supports() -> None:
    exact, x = GammaPoisson.fixture()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        draws = hmc_posterior(exact.model, x, num_chains=4, num_samples=10, warmup_steps=5, seed=0, progress=False)
    torch.testing.assert_close(draws.samples["rate"], draws.unconstrained[..., 0].exp())
    density = LogDensity(exact.model, x)
    torch.testing.assert_close(draws.log_joint, density.log_joint(draws.unconstrained))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 15}, "num_chains must be an even integer of at least 2.*got 15"),
        ({"num_chains": 0}, "num_chains.*got 0"),
        ({"target_accept_prob": 1.0}, "target_accept_prob must lie between 0 and 1; got 1.0"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 1, got -1"),
        ({"num_leapfrog": 0}, "num_leapfrog must be an integer of at least 1, got 0"),
        ({"trajectory": "nuts"}, "trajectory must be one of jittered, chees; got 'nuts'"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
        ({"num_chain": 8}, "no setting 'num_chain'. Did you mean 'num_chains'"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        draw(square, torch.ones(2), **settings)


def test_progress_adds_up() -> None:
    told: list[float] = []
    sample(normals(), num_samples=13, warmup_steps=17, advance=told.append)
    assert sum(told) == pytest.approx(1)
    assert min(told) > 0
    assert np.max(told) < 0.1


@pytest.mark.usefixtures("short_annealing")
def test_the_bar_ends_where_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        hmc_posterior(square, torch.ones(3), num_chains=2, num_samples=4, warmup_steps=6, chunk_size=2, seed=0)
    assert "30.0/30.0" in capsys.readouterr().err
