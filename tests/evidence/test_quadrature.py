"""Quadrature: closed forms of every shape, honest changes, boxes that grow, and nothing of the guide."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from known_evidence import TwoModes, bernoulli_decoder, dirichlet_multinomial, gamma_exponential
from torch.distributions import Cauchy, MultivariateNormal, Normal

from pyro_aevb import log_marginal
from pyro_aevb.errors import SettingError, UnreliableWarning
from pyro_aevb.evidence.problem import Problem
from pyro_aevb.evidence.quadrature import Quadrature, integrate
from pyro_aevb.evidence.result import Bound, Status
from pyro_aevb.mcmc.noise import RowNoise
from pyro_aevb.program.density import LogDensity
from pyro_aevb.testing import BetaBinomial, GammaPoisson, LinearGaussian, LinearGaussianStateSpace

quadrature = functools.partial(log_marginal, method="quadrature", progress=False)


def box(rows: int, dim: int, half: float) -> tuple[torch.Tensor, torch.Tensor]:
    corner = torch.full((rows, dim), half).double()
    return -corner, corner


def normal(u, loc=0.0, scale=1.0):
    return Normal(loc, scale).log_prob(u).sum(-1)


class TestIntegrate:
    @pytest.mark.parametrize("scale", [1.0, 0.3, 0.03, 1e-3])
    @pytest.mark.parametrize("dim", [1, 2, 3])
    def test_normals_of_any_width_at_any_place(self, dim, scale):
        loc = torch.randn(6, dim, generator=torch.Generator().manual_seed(dim)).double()
        result = integrate(lambda u: normal(u, loc, scale), *box(6, dim, 7.0))
        assert result.change.max() < 0.01
        assert result.value.abs().max() < 0.002

    @pytest.mark.parametrize("scale", [0.5, 0.01])
    @pytest.mark.parametrize("dim", [1, 2, 3])
    def test_two_modes(self, dim, scale):
        torch.manual_seed(dim)
        first, second = 2 * torch.randn(2, 5, dim).double()

        def target(u):
            return torch.logaddexp(math.log(0.3) + normal(u, first, scale), math.log(0.7) + normal(u, second, scale))

        result = integrate(target, *box(5, dim, 8.0))
        assert result.change.max() < 0.01
        assert result.value.abs().max() < 0.005

    @pytest.mark.parametrize(("wide", "narrow"), [(0.3, 0.02), (0.1, 0.01), (0.03, 0.003)])
    def test_a_second_mode_is_seen_by_its_slopes(self, wide, narrow):
        # the second mode is far narrower than a cell of the first grid, a sixth, and the first mode alone would settle
        torch.manual_seed(2)
        first, second = 2 * torch.randn(2, 20, 2).double()

        def target(u):
            return torch.logaddexp(normal(u, first, wide), normal(u, second, narrow)) - math.log(2)

        result = integrate(target, *box(20, 2, 8.0))
        assert result.change.max() < 0.01
        assert result.value.abs().max() < 0.01

    @pytest.mark.parametrize(("dim", "correlation"), [(2, 0.9), (2, 0.99), (2, 0.999), (3, 0.9), (3, 0.99)])
    def test_ridges_askew(self, dim, correlation):
        covariance = torch.full((dim, dim), correlation).double().fill_diagonal_(1.0)
        ridge = MultivariateNormal(torch.zeros(dim).double(), covariance)
        result = integrate(ridge.log_prob, *box(2, dim, 7.0))
        assert result.change.max() < 0.01
        assert result.value.abs().max() < 0.01

    @pytest.mark.parametrize("dim", [2, 3])
    def test_a_banana(self, dim):
        def banana(u):
            first, second, rest = u[..., 0], u[..., 1], u[..., 2:]
            bend = 0.03 * (first.square() - 100)
            return Normal(0.0, 10.0).log_prob(first) + Normal(bend, 1.0).log_prob(second) + normal(rest)

        assert integrate(banana, *box(1, dim, 80.0)).value.abs().item() < 0.005

    @pytest.mark.parametrize("slant", [0.0, 1.0])
    @pytest.mark.parametrize("scale", [1.0, 0.1])
    @pytest.mark.parametrize("dim", [1, 2])
    def test_the_end_of_a_support_is_followed(self, dim, scale, slant):
        axis = torch.tensor([1.0, slant])[:dim].double()
        axis = axis / axis.norm()

        def cut(u):
            return normal(u, 0.0, scale).masked_fill(u @ axis < 0.3137 * scale, -math.inf)

        result = integrate(cut, *box(1, dim, 6.6))
        exact = torch.special.log_ndtr(torch.tensor(-0.3137).double())
        assert result.change.item() < 0.01
        assert abs(result.value - exact).item() < 0.01

    def test_mass_that_cannot_be_followed_is_not_settled(self):
        # the funnel's neck needs more cells than there are; a wrong value that calls itself settled would be the failure
        def funnel(u):
            return Normal(0.0, 3.0).log_prob(u[..., 0]) + normal(u[..., 1:], 0.0, (u[..., :1] / 2).exp())

        result = integrate(funnel, *box(1, 3, 200.0), max_evaluations=150_000)
        assert result.value.abs().item() > 0.1
        assert result.change.item() > 0.01

    def test_nan_is_no_density_and_rows_are_their_own(self):
        loc = torch.linspace(-1, 1, 4)[:, None].double().expand(4, 2)

        def sound(u):
            return normal(u, loc, 0.5)

        def broken(u):
            values = sound(u)
            values = torch.where(torch.arange(4) == 1, math.nan, values)
            return torch.where((torch.arange(4) == 2) & (u[..., 0] > 3.0), math.nan, values)

        alone, beside = integrate(sound, *box(4, 2, 7.0)), integrate(broken, *box(4, 2, 7.0))
        assert torch.equal(alone.value[[0, 3]], beside.value[[0, 3]])
        assert beside.value[1] == -math.inf
        assert not beside.change[1] < 0.01
        assert beside.value[2].abs() < 0.005

    def test_pieces_change_nothing(self):
        whole, parts = (
            integrate(lambda u: normal(u, 0.3, 0.1), *box(2, 2, 6.0), piece=piece) for piece in (10**6, 999)
        )
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-10)

    def test_the_budget_is_kept(self):
        counts = []

        def target(u):
            counts.append(u.shape[0])
            return Cauchy(0.0, 1.0).log_prob(u).sum(-1)

        integrate(target, *box(1, 3, 1000.0), max_evaluations=60_000)
        assert 32_768 < sum(counts) <= 60_000


class TestModels:
    @pytest.mark.parametrize("family", [LinearGaussian, GammaPoisson, BetaBinomial])
    def test_rows_have_their_closed_forms(self, family):
        exact, fixture = family.fixture()
        x = torch.cat([fixture, exact.simulate(15, seed=1)[0].reshape(-1, *fixture.shape[1:])])
        result = quadrature(exact.model, None, x)
        assert (result.value - exact.log_marginal(x)).abs().max() < 0.002
        assert set(result.status) == {"ok"}
        assert result.bound is Bound.ESTIMATE
        assert result.change.max() < 0.01
        assert (result.standard_error >= result.change).all()

    @pytest.mark.parametrize("make", [bernoulli_decoder, gamma_exponential, dirichlet_multinomial])
    def test_known_evidence(self, make):
        known = make()
        assert quadrature(known.model, None, known.x).value.item() == pytest.approx(known.log_evidence, abs=1e-3)

    def test_neither_guide_nor_seed_nor_chunks_move_a_row(self):
        exact, _ = LinearGaussian.fixture()
        x = exact.simulate(7, seed=2)[0]

        def far_off(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_full((3,), 50.0), 0.01).to_event(1))

        result = quadrature(exact.model, None, x, chunk_size=7, seed=1)
        assert torch.allclose(result.value, quadrature(exact.model, None, x, chunk_size=2).value, rtol=0, atol=1e-10)
        assert torch.equal(result.value, quadrature(exact.model, far_off, x, chunk_size=7, seed=2).value)

    @pytest.mark.parametrize("x", [0.5, 40.0, -300.0])
    def test_the_box_grows_to_a_posterior_far_from_the_prior(self, x):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 0.1), obs=x)

        x = torch.tensor([x]).double()
        exact = Normal(x.new_zeros(()), math.sqrt(1.01)).log_prob(x)
        assert (quadrature(model, None, x).value - exact).abs().item() < 0.001

    def test_only_rows_whose_box_leaks_are_integrated_again(self):
        seen = []

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                seen.append(len(x))
                pyro.sample("x", dist.Normal(z, 0.1), obs=x)

        x = torch.tensor([0.5, 40.0, -1.0, 0.0]).double()
        exact = Normal(x.new_zeros(()), math.sqrt(1.01)).log_prob(x)
        assert (quadrature(model, None, x).value - exact).abs().max() < 0.001
        assert 4 in seen
        assert seen[-1] == 1  # the box of the second row grew last

    @pytest.mark.parametrize("noise", [0.5, 1e6])
    def test_the_box_grows_with_heavy_tails(self, noise):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Cauchy(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Cauchy(z, noise), obs=x)

        x = torch.tensor([0.7, 300.0]).double()
        result = quadrature(model, None, x)
        assert (result.value - Cauchy(0.0, 1 + noise).log_prob(x)).abs().max() < 0.005
        assert set(result.status) == {"ok"}

    def test_the_box_grows_where_a_few_hundredths_lie_outside(self):
        density = LogDensity.from_function(
            normal,
            lambda u: u.new_zeros(u.shape[:-1]),
            2,
            dtype=torch.float64,
            draw_prior=lambda n: (0.4 * torch.randn(n, 1, 2)).double(),
        )
        problem = Problem(density, None, RowNoise(0, torch.arange(1), dtype=torch.float64))
        assert abs(Quadrature().estimate(problem).value.item()) < 1e-3

    @pytest.mark.parametrize(("dim", "scale", "place"), [(2, 0.3, 4.0), (2, 0.1, 3.0), (3, 0.3, 3.0)])
    def test_modes_apart(self, dim, scale, place):
        modes = TwoModes(dim, scale, place, rows=2)
        density = modes.density()
        problem = Problem(density, None, RowNoise(0, torch.arange(2), dtype=density.dtype))
        result = Quadrature().estimate(problem)
        assert result.value.tolist() == pytest.approx([modes.log_evidence] * 2, abs=2e-3)

    def test_a_row_that_does_not_settle_is_unreliable(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ z.new_tensor([1.0, 2.0, 3.0]), 1e-4), obs=x)

        with pytest.warns(UnreliableWarning, match="did not settle"):
            result = quadrature(model, None, torch.tensor([0.3]).double(), max_evaluations=60_000)
        assert result.status == (Status.UNRELIABLE,)


class TestBadInput:
    def test_four_coordinates_are_too_many(self):
        exact, x = LinearGaussianStateSpace.fixture()
        with pytest.raises(SettingError, match=r"up to 3 .* these have 5.*'bridge' or 'ais'"):
            quadrature(exact.model, None, x)

    @pytest.mark.parametrize("number", [0, -1, 49_999])
    def test_too_few_evaluations(self, number):
        with pytest.raises(SettingError, match="max_evaluations"):
            Quadrature(max_evaluations=number)


def test_networks_of_float32_are_integrated():
    decoder = torch.nn.Linear(1, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    x = torch.randn(3, 4)
    weight, bias = decoder.weight.detach(), decoder.bias.detach()
    exact = torch.distributions.MultivariateNormal(bias, weight @ weight.T + torch.eye(4)).log_prob(x).double()
    found = log_marginal(model, None, x, method="quadrature", progress=False)
    torch.testing.assert_close(found.value, exact, rtol=0.0, atol=1e-4)
