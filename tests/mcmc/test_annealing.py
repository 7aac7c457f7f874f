"""Annealing against ratios of normalisers known in closed form, and the exact laws of its weights."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_aevb.mcmc.annealing import PILOT_CHAINS, Annealed, Path, anneal, sigmoid_schedule, tune
from pyro_aevb.mcmc.noise import RowNoise, Stream
from pyro_aevb.testing import LinearGaussian

LEAPFROG = 5


def noise_of(rows: int, seed: int = 0) -> RowNoise:
    return RowNoise(seed, torch.arange(rows), dtype=torch.float64)


def normal(u: Tensor, mean: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> Tensor:
    return Normal(mean, scale, validate_args=False).log_prob(u).sum(-1)


def normal_starts(noise: RowNoise, chains: int, dim: int) -> Tensor:
    return noise.normal(Stream.START, 0, chains, dim)


def run(path: Path, noise: RowNoise, *, chains: int, dim: int, temperatures: int, rows: int) -> tuple[Tensor, Annealed]:
    """Tune and anneal from standard normal draws."""
    start, schedule = normal_starts(noise, PILOT_CHAINS + chains, dim), sigmoid_schedule(temperatures)
    scale = torch.ones(rows, dim, dtype=torch.float64)
    settings = {"scale": scale, "num_leapfrog": LEAPFROG}
    steps = tune(path, start[:PILOT_CHAINS], schedule, noise, **settings)
    return steps, anneal(path, start[PILOT_CHAINS:], schedule, noise, step_size=steps, **settings)


def linear_gaussian(rows: int) -> tuple[Path, Tensor, Tensor]:
    """Return prior to joint of the fixture's simulated rows, exact log p(x), and the latents that the rows were made from."""
    exact, _ = LinearGaussian.fixture()
    x, latents = exact.simulate(rows, seed=0)

    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        prior = normal(u)
        return prior, prior + normal(x, u @ exact.weight.T + exact.bias, exact.noise_variance.sqrt())

    return path, exact.log_marginal(x), latents["z"]


def two_modes(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return a normal of scale 3 and a mixture of two normals far apart, both normalised."""
    modes = torch.stack([math.log(0.3) + normal(u, -4.0, 0.7), math.log(0.7) + normal(u, 3.0, 0.5)])
    return normal(u, 0.0, 3.0), modes.logsumexp(0)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def mean_and_error(log_weights: Tensor) -> tuple[float, float]:
    weights = log_weights.flatten().exp()
    return weights.mean().item(), (weights.std() / len(weights) ** 0.5).item()


@pytest.mark.parametrize("steepness", [0.5, 4.0])
def test_the_schedule_is_the_sigmoid_of_equal_steps(steepness):
    schedule = sigmoid_schedule(10, steepness=steepness)
    raw = [1 / (1 + math.exp(-steepness * (2 * t / 10 - 1))) for t in range(11)]
    expected = [(s - raw[0]) / (raw[-1] - raw[0]) for s in raw]
    assert schedule.tolist() == pytest.approx(expected, abs=1e-14)
    assert schedule[0] == 0
    assert schedule[-1] == 1


def test_one_temperature_is_importance_sampling():
    noise = noise_of(7)
    path, _, _ = linear_gaussian(7)
    start = normal_starts(noise, PILOT_CHAINS + 20, 3)[PILOT_CHAINS:]
    steps, result = run(path, noise, chains=20, dim=3, temperatures=1, rows=7)
    log_start, log_end = path(start)
    assert len(steps) == 0
    assert torch.equal(result.log_weights, log_end - log_start)
    assert torch.equal(result.position, start)
    assert result.acceptance.isnan().all()


def test_between_equal_ends_weights_are_constant():
    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        return normal(u), normal(u) + 2.5

    _, result = run(path, noise_of(3), chains=8, dim=2, temperatures=50, rows=3)
    assert (result.log_weights - 2.5).abs().max() < 1e-12
    assert (result.acceptance > 0.4).all()


def frozen_steps(temperatures: int) -> Tensor:
    return torch.full((temperatures - 1, 1), 0.6, dtype=torch.float64)


def anneal_two_modes(start: Tensor, schedule: Tensor, seed: int) -> Tensor:
    scale = torch.ones(1, 1, dtype=torch.float64)
    settings = {"step_size": frozen_steps(len(schedule) - 1), "scale": scale, "num_leapfrog": 3}
    return anneal(two_modes, start, schedule, noise_of(1, seed), **settings).log_weights


def test_the_mean_weight_is_unbiased_between_two_modes():
    # Steps that adapt inside the weighted run, as each chain accepts, give .98 here: 15 standard errors below 1.
    start = 3 * torch.randn(400_000, 1, 1, dtype=torch.float64)
    mean, error = mean_and_error(anneal_two_modes(start, sigmoid_schedule(12), seed=1))
    assert error < 0.01
    assert abs(mean - 1) < 4 * error


def test_backwards_the_mean_weight_is_unbiased_for_the_inverse_ratio():
    is_left = torch.rand(200_000, 1, 1) < 0.3
    draws = torch.randn(200_000, 1, 1, dtype=torch.float64)
    start = torch.where(is_left, -4 + 0.7 * draws, 3 + 0.5 * draws)
    mean, error = mean_and_error(anneal_two_modes(start, sigmoid_schedule(12).flip(0), seed=2))
    assert error < 0.02
    assert abs(mean - 1) < 4 * error


def test_tuned_runs_are_unbiased_over_rows():
    path, exact, _ = linear_gaussian(3000)
    _, result = run(path, noise_of(3000), chains=4, dim=3, temperatures=25, rows=3000)
    ratios = (result.log_weights - exact).exp().mean(0)
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / 3000**0.5


class Watched(RowNoise):
    """Row noise that remembers what it was asked for."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.asked: list[tuple[int, int]] = []

    def normal(self, stream: int, step: int, num_chains: int, dim: int) -> Tensor:
        self.asked.append((stream, step))
        return super().normal(stream, step, num_chains, dim)

    def uniform(self, stream: int, step: int, num_chains: int) -> Tensor:
        self.asked.append((stream, step))
        return super().uniform(stream, step, num_chains)


def test_no_number_is_used_twice():
    noise = Watched(0, torch.arange(3), dtype=torch.float64)
    run(linear_gaussian(3)[0], noise, chains=5, dim=3, temperatures=30, rows=3)
    assert len(noise.asked) > 2 * 29
    assert len(set(noise.asked)) == len(noise.asked)


def test_end_states_with_their_weights_are_draws_from_the_end():
    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        return normal(u), normal(u, 1.5, 0.5) + 3.0

    _, result = run(path, noise_of(1), chains=40_000, dim=1, temperatures=8, rows=1)
    weights = (result.log_weights - result.log_weights.amax()).exp()[:, 0]
    weights = weights / weights.sum()
    position = result.position[:, 0, 0]
    error = (weights.square() * (position - 1.5).square()).sum().sqrt()
    mean = (weights * position).sum()
    assert abs(mean - 1.5) < 4 * error
    assert abs((weights * (position - mean).square()).sum() - 0.25) < 4 * error
    assert log_mean_exp(result.log_weights).item() == pytest.approx(3.0, abs=0.05)


def test_simulated_rows_are_estimated_within_their_errors():
    path, exact, latents = linear_gaussian(100)
    noise = noise_of(100, seed=1)
    steps, result = run(path, noise, chains=16, dim=3, temperatures=200, rows=100)
    value = log_mean_exp(result.log_weights)
    weights = (result.log_weights - value).exp()
    z = (value - exact) / (weights.std(0) / 4)
    assert abs((value - exact).mean()) < 0.06
    assert z.abs().max() < 4.5
    assert 0.8 < z.std() < 1.25
    assert ((result.acceptance - 0.65).abs() < 0.055).all()
    settings = {"step_size": steps.flip(0), "scale": torch.ones(100, 3).double(), "num_leapfrog": LEAPFROG}
    back = anneal(path, latents.expand(16, 100, 3), sigmoid_schedule(200).flip(0), noise.fork(1), **settings)
    upper = -log_mean_exp(back.log_weights)
    spread = (upper - exact).std() / 10
    assert (upper - exact).mean() > -3 * spread
    assert (upper - value).mean() < 0.12
    assert ((back.acceptance - 0.65).abs() < 0.055).all()


def test_steps_reach_their_target_on_scales_far_apart():
    noise_scale = 10 ** torch.linspace(-2, 1, 40, dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    x = z + noise_scale * torch.randn(40, 2, generator=generator, dtype=torch.float64)

    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        return normal(u), normal(u) + normal(x, u, noise_scale)

    _, result = run(path, noise_of(40), chains=16, dim=2, temperatures=400, rows=40)
    assert (result.acceptance - 0.65).abs().max() < 0.07
    assert (result.acceptance - 0.65).abs().mean() < 0.03


def counted(path: Path) -> tuple[Path, list[int]]:
    calls: list[int] = []

    def counting(u: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(u))
        return path(u)

    return counting, calls


def test_a_transition_costs_its_leapfrog_steps_and_nothing_more():
    path, calls = counted(linear_gaussian(3)[0])
    schedule, noise = sigmoid_schedule(11), noise_of(3)
    settings = {"step_size": torch.full((10, 3), 0.5).double(), "scale": torch.ones(3, 3).double()}
    anneal(path, normal_starts(noise, 6, 3), schedule, noise, num_leapfrog=4, **settings)
    assert calls == [6] * (1 + 10 * 4)


def test_the_pilot_costs_little():
    path, calls = counted(linear_gaussian(3)[0])
    run(path, noise_of(3), chains=16, dim=3, temperatures=150, rows=3)
    pilot = sum(chains for chains in calls if chains == PILOT_CHAINS)
    assert pilot < 0.15 * (sum(calls) - pilot)


def broken(at: Callable[[Tensor], Tensor], value: float) -> Path:
    """Return the fixture's path where the last row's end is ``value`` at some positions."""
    path, _, _ = linear_gaussian(5)

    def spoilt(u: Tensor) -> tuple[Tensor, Tensor]:
        log_start, log_end = path(u)
        is_spoilt = at(u) & (torch.arange(u.shape[-2]) == 4)
        return log_start, torch.where(is_spoilt, value, log_end)

    return spoilt


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_broken_leaves_the_others_bit_for_bit(value):
    _, whole = run(linear_gaussian(5)[0], noise_of(5), chains=6, dim=3, temperatures=30, rows=5)
    path = broken(lambda u: torch.ones_like(u[..., 0], dtype=torch.bool), value)
    _, result = run(path, noise_of(5), chains=6, dim=3, temperatures=30, rows=5)
    assert torch.equal(result.log_weights[:, :4], whole.log_weights[:, :4])
    assert torch.equal(result.position[:, :4], whole.position[:, :4])
    assert (result.log_weights[:, 4] == -math.inf).all()
    assert result.acceptance[4] == 0


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_chain_of_weight_zero_leaves_the_others_finite(value):
    # half of the starts of row 4 have no density at the end: they weigh nothing, and the mean weight stays unbiased
    path = broken(lambda u: u[..., 0] < 0, value)
    _, result = run(path, noise_of(5), chains=40, dim=3, temperatures=30, rows=5)
    start = normal_starts(noise_of(5), PILOT_CHAINS + 40, 3)[PILOT_CHAINS:]
    is_lost = start[:, 4, 0] < 0
    assert torch.equal(result.log_weights[:, 4] == -math.inf, is_lost)
    assert result.log_weights[~is_lost].isfinite().all()
    assert 0.3 < result.acceptance[4] < 0.9
    assert (result.position[~is_lost, 4, 0] >= 0).all()


def test_a_hard_edge_is_integrated_right():
    # half of the start's mass lies where the end has none: Z is that of the other half
    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        return normal(u), torch.where(u[..., 0] > 0, normal(u, 1.0), -math.inf)

    _, result = run(path, noise_of(1), chains=100_000, dim=1, temperatures=10, rows=1)
    mean, error = mean_and_error(result.log_weights)
    assert abs(mean - Normal(0.0, 1.0).cdf(torch.tensor(1.0)).item()) < 4 * error


def test_rows_are_the_same_in_chunks():
    exact, _ = LinearGaussian.fixture()
    x, _ = exact.simulate(7, seed=0)

    def weights(rows: slice) -> Tensor:
        def path(u: Tensor) -> tuple[Tensor, Tensor]:
            prior = normal(u)
            return prior, prior + normal(x[rows], u @ exact.weight.T + exact.bias, exact.noise_variance.sqrt())

        part = noise_of(7).rows(rows)
        return run(path, part, chains=6, dim=3, temperatures=12, rows=part.num_rows)[1].log_weights

    chunks = torch.cat([weights(slice(0, 4)), weights(slice(4, 7))], 1)
    torch.testing.assert_close(chunks, weights(slice(0, 7)), rtol=1e-10, atol=1e-10)


def test_weights_of_single_precision_add_up_in_double():
    path, _, _ = linear_gaussian(50)
    _, double = run(path, noise_of(50), chains=16, dim=3, temperatures=40, rows=50)

    def single_path(u: Tensor) -> tuple[Tensor, Tensor]:
        log_start, log_end = path(u.double())
        return log_start.float(), log_end.float()

    noise = RowNoise(0, torch.arange(50), dtype=torch.float32)
    start, schedule, scale = normal_starts(noise, 20, 3), sigmoid_schedule(40), torch.ones(50, 3)
    steps = tune(single_path, start[:4], schedule, noise, scale=scale, num_leapfrog=5)
    result = anneal(single_path, start[4:], schedule, noise, step_size=steps, scale=scale, num_leapfrog=5)
    assert steps.dtype == result.position.dtype == torch.float32
    assert result.log_weights.dtype == torch.float64
    assert abs((log_mean_exp(result.log_weights) - log_mean_exp(double.log_weights)).mean()) < 0.1


def test_progress_adds_up_to_one():
    told: list[float] = []
    path, _, _ = linear_gaussian(2)
    settings = {"scale": torch.ones(2, 3).double(), "num_leapfrog": 1, "advance": told.append}
    start, noise = torch.zeros(4, 2, 3).double(), noise_of(2)
    for temperatures in (1, 2, 30):
        told.clear()
        steps = tune(path, start, sigmoid_schedule(temperatures), noise, **settings)
        assert sum(told) == pytest.approx(1)
        told.clear()
        anneal(path, start, sigmoid_schedule(temperatures), noise, step_size=steps, **settings)
        assert sum(told) == pytest.approx(1)
