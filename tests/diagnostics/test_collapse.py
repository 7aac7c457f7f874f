"""Collapse of latents: every number against closed forms and quadrature, in models where they are known."""

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_aevb import SGVB, AutoAmortizedNormal, fit
from pyro_aevb.diagnostics.collapse import CollapseMonitor, collapse_report
from pyro_aevb.errors import AEVBWarning, DataError, GuideError, ModelError, ParticleWarning, SettingError
from pyro_aevb.testing import LinearGaussian, NormalNormal

GRID = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)


def normal_kl(mean, variance):
    """KL(N(mean, variance) || N(0, 1)), appendix B of arXiv 1312.6114."""
    return (variance + mean**2 - 1 - variance.log()) / 2


def information_by_quadrature(means, scale):
    """I(n; z) for q(z | n) = N(means[n], scale^2): entropy of the mixture less that of its parts."""
    parts = dist.Normal(means[:, None], scale).log_prob(GRID)
    mixture = torch.logsumexp(parts, 0) - math.log(len(means))
    entropy = -torch.trapezoid(mixture.exp() * mixture, GRID)
    return (entropy - dist.Normal(0.0, scale).entropy()).item()


def one_latent(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shrinking_guide(x, scale=0.3):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, scale))


class TestClosedForms:
    def linear(self, rows=400):
        exact, _ = LinearGaussian.fixture()
        x, _ = exact.simulate(rows, seed=1)
        return exact, x, exact.mean_field_posterior(x)

    def test_units_of_a_factorised_guide(self):
        exact, x, q = self.linear()
        report = collapse_report(exact.model, exact.mean_field_guide(at_optimum=True), x, seed=0)
        assert report.units == ("z[0]", "z[1]", "z[2]")
        expected = q.mean.var(0)
        assert torch.allclose(report.variance, expected, rtol=1e-9)  # the mean of a normal is known
        kl = normal_kl(q.mean, q.variance).mean(0)
        assert torch.allclose(report.kl, kl, rtol=1e-9)
        assert report.total_kl == pytest.approx(kl.sum().item(), rel=1e-9)
        assert report.site_kl == {"z": report.total_kl}
        spread = normal_kl(q.mean, q.variance).sum(1).std() / math.sqrt(len(x))
        assert report.kl_error == pytest.approx(spread.item(), rel=1e-6)

    def test_the_sum_of_units_is_the_bounds_kl_term(self):
        exact, x, _ = self.linear(60)
        guide = exact.mean_field_guide(at_optimum=True)
        report = collapse_report(exact.model, guide, x, seed=0)
        bound = SGVB(2000, kl="sampled").bounds(exact.model, guide, x).local.mean().item()
        z = guide_draws(guide, x, 2000)
        log_likelihood = dist.Normal(z @ exact.weight.T.double() + exact.bias.double(), exact.noise_variance.sqrt())
        expected = log_likelihood.log_prob(x).sum(-1).mean().item() - bound
        assert report.total_kl == pytest.approx(expected, abs=0.05)

    def test_a_full_covariance_has_a_kl_for_the_site_alone(self):
        exact, x, _ = self.linear()
        report = collapse_report(exact.model, exact.guide, x, num_samples=200, seed=0)
        q = exact.posterior(x)["z"]
        prior = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
        expected = torch.distributions.kl_divergence(q, prior).mean().item()
        # log q - log p has a standard deviation of at most 2 nats here, over 400 rows and 200 draws
        assert report.total_kl == pytest.approx(expected, abs=5 * 2 / math.sqrt(80_000))
        assert report.kl.isnan().all()
        assert torch.allclose(report.variance, q.mean.var(0), rtol=1e-9)

    @pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
    def test_mutual_information_is_that_of_the_mixture(self, scale):
        x = 2**0.5 * torch.randn(500, dtype=torch.float64)
        report = collapse_report(one_latent, functools.partial(shrinking_guide, scale=scale), x, seed=1)
        expected = information_by_quadrature(x / 2, scale)
        assert report.mutual_information == pytest.approx(expected, abs=5 * report.mutual_information_error)
        assert report.mutual_information_error < 0.05
        marginal = report.total_kl - expected
        assert report.marginal_kl == pytest.approx(marginal, abs=5 * report.mutual_information_error)

    def test_rows_far_apart_tell_all_of_their_index(self):
        x = torch.arange(8.0) * 20
        report = collapse_report(one_latent, functools.partial(shrinking_guide, scale=0.1), x, seed=0)
        assert report.mutual_information == pytest.approx(math.log(8), abs=1e-6)

    def test_a_guide_that_is_the_prior_tells_nothing(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        report = collapse_report(one_latent, guide, torch.randn(100), seed=0)
        assert report.mutual_information == pytest.approx(0.0, abs=1e-6)
        assert report.total_kl == pytest.approx(0.0, abs=1e-6)
        assert report.dead_units == ("z",)

    def test_positive_latents_are_measured_in_unconstrained_space(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

        def guide(x):
            loc = torch.stack([x, 0.0 * x], -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.LogNormal(loc, torch.tensor([0.5, 1.0])).to_event(1))

        x = torch.randn(300)
        report = collapse_report(model, guide, x, num_samples=200, seed=0)
        first, second = report.variance.tolist()
        # halves of 100 draws of sd .5 and 1: products of their errors, over 300 rows
        assert first == pytest.approx(x.var().item(), abs=5 * 2 * 0.05 / math.sqrt(300) + 0.01)
        assert second == pytest.approx(0.0, abs=5 * 0.01 / math.sqrt(300))
        assert torch.allclose(report.kl[0], normal_kl(x, torch.tensor(0.25)).mean().double(), rtol=1e-5)
        assert report.dead_units == ("z[1]",)

    def test_a_flow_like_family_is_measured_by_its_draws(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                base = dist.TransformedDistribution(dist.Normal(x, 0.5), [dist.transforms.AffineTransform(0.0, 0.5)])
                pyro.sample("z", base)

        x = torch.randn(400)
        report = collapse_report(one_latent, guide, x, num_samples=400, seed=0)
        expected = normal_kl(x / 2, torch.tensor(0.0625)).mean().item()
        assert report.total_kl == pytest.approx(expected, abs=5 / math.sqrt(160_000) + 1e-3)
        assert report.kl.item() == pytest.approx(report.total_kl, rel=1e-6)
        assert report.variance.item() == pytest.approx((x / 2).var().item(), rel=0.01)


def guide_draws(guide, x, count):
    """Draws of a factorised guide's latent, ``[count, rows, 3]``."""
    node = poutine.trace(guide).get_trace(x).nodes["z"]
    return node["fn"].sample((count,)).detach()


class TestStructures:
    def test_a_guide_in_reverse_order_gets_no_closed_form_where_it_is_biased(self):
        # p: a ~ N(0, 1), b | a ~ N(a, 1), x | b ~ N(b, 1); q draws b first, and a given b
        def model(x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                b = pyro.sample("b", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
                pyro.sample("a", dist.Normal(b / 2, 0.5**0.5))

        x = 3**0.5 * torch.randn(300, dtype=torch.float64)
        report = collapse_report(model, guide, x, num_samples=200, seed=0)
        # the guide is exact: KL(q || p) = E log p(x | a, b) - log p(x)
        log_likelihood = -(math.log(2 * math.pi) + (x / 3) ** 2 + 2 / 3) / 2
        expected = (log_likelihood - dist.Normal(0.0, 3**0.5).log_prob(x)).mean().item()
        assert report.total_kl == pytest.approx(expected, abs=5 / math.sqrt(60_000))
        assert sum(report.site_kl.values()) == pytest.approx(report.kl.sum().item(), rel=1e-6)
        assert report.variance[0].item() == pytest.approx((x / 3).var().item(), rel=0.03)
        assert report.variance[1].item() == pytest.approx((2 * x / 3).var().item(), rel=1e-6)
        # both latents say of x what b says, since a is drawn given b alone
        b = information_by_quadrature(2 * x / 3, (2 / 3) ** 0.5)
        assert report.mutual_information == pytest.approx(b, abs=5 * report.mutual_information_error)

    def test_globals_are_averaged_over(self):
        exact, _ = NormalNormal.fixture()
        x, _ = exact.simulate(200, seed=3)
        guide = functools.partial(exact.guide, data=x)
        report = collapse_report(exact.model, guide, x, num_samples=100, seed=0)
        slope, variance = exact._local_posterior()
        g = exact.posterior(x)["g"]
        distance = (1 - slope) ** 2 * ((x - g.mean) ** 2 + g.variance)
        local = exact.local_scale**2
        expected = (math.log(local / variance) + (variance + distance) / local - 1) / 2
        assert report.units == ("z",)
        # the global is the same for all rows: a draw of it moves every row's KL together
        slack = 5 * (1 - slope) ** 2 * (x - g.mean).mean().abs() * g.stddev / local / 10 + 5e-3
        assert report.total_kl == pytest.approx(expected.mean().item(), abs=slack.item())
        assert report.variance.item() == pytest.approx(((1 - slope) * x).var().item(), rel=1e-6)
        information = information_by_quadrature((1 - slope) * (x - g.mean), math.sqrt(variance))
        assert report.mutual_information == pytest.approx(information, abs=5 * report.mutual_information_error)

    @staticmethod
    def nested(x, scales, is_model, dim=-1):
        inner = -1 if dim == -2 else -2
        with pyro.plate("data", len(x), dim=dim):
            with pyro.plate("times", 3, dim=inner):
                shape = (len(x), 3) if dim == -2 else (3, len(x))
                where = x[:, None] if dim == -2 else x
                loc = (where * torch.tensor(scales).reshape((1, 3) if dim == -2 else (3, 1)))[..., None].expand(
                    *shape, 2
                )
                prior, q = dist.Normal(torch.zeros(*shape, 2), 1.0), dist.Normal(loc, 0.5)
                pyro.sample("z", (prior if is_model else q).to_event(1))
            if is_model:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x if dim == -1 else x[:, None])

    @pytest.mark.parametrize("dim", [-1, -2])
    def test_inner_plates_and_events_are_units(self, dim):
        model = functools.partial(self.nested, scales=[0.0, 1.0, 2.0], is_model=True, dim=dim)
        guide = functools.partial(self.nested, scales=[0.0, 1.0, 2.0], is_model=False, dim=dim)
        x = torch.randn(40)
        report = collapse_report(model, guide, x, num_samples=6, seed=0)
        assert report.units == tuple(f"z[{t}, {k}]" for t in range(3) for k in range(2))
        expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 4.0, 4.0]) * x.var()
        assert torch.allclose(report.variance, expected.double(), rtol=1e-4, atol=1e-6)
        kl = torch.stack([normal_kl(scale * x, torch.tensor(0.25)).mean() for scale in (0, 0, 1, 1, 2, 2)])
        assert torch.allclose(report.kl, kl.double(), rtol=1e-4)
        assert report.total_kl == pytest.approx(kl.sum().item(), rel=1e-4)

    def test_programs_that_run_particle_by_particle_give_the_same(self):
        class Indexed:
            """Stacks over the leftmost axis, which is none of rows under particle plates."""

            def __call__(self, x, is_model=True):
                with pyro.plate("data", len(x)):
                    z = pyro.sample(
                        "z",
                        dist.Normal(torch.zeros(2) if is_model else x[:, None] / 2, 1.0)
                        .expand([len(x), 2])
                        .to_event(1),
                    )
                    first = torch.stack([z[n, 0] for n in range(len(x))])
                    if is_model:
                        pyro.sample("x", dist.Normal(first, 1.0), obs=x)

        program = Indexed()
        x = torch.randn(12)
        with pytest.warns(ParticleWarning):
            report = collapse_report(program, functools.partial(program, is_model=False), x, num_samples=4, seed=0)
        assert torch.allclose(report.variance, (x / 2).var().double().expand(2), rtol=1e-5)
        assert torch.allclose(report.kl, normal_kl(x / 2, torch.tensor(1.0)).mean().double().expand(2), rtol=1e-5)
        assert report.mutual_information < math.log(12)

    def test_masked_latents_add_nothing(self):
        def program(x, mask, is_model):
            with pyro.plate("data", len(x)), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0) if is_model else dist.Normal(x / 2, 0.03))
                if is_model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x, mask = torch.randn(100), torch.arange(100) % 4 > 0
        programs = [functools.partial(program, is_model=is_model) for is_model in (True, False)]
        report = collapse_report(*programs, x, mask, seed=1)
        expected = (normal_kl(x / 2, torch.tensor(0.0009)) * mask).mean().item()
        assert report.kl.item() == pytest.approx(expected, rel=1e-5)
        assert report.total_kl == pytest.approx(expected, rel=1e-5)
        information = information_by_quadrature(x.double() / 2, 0.03)
        assert report.mutual_information == pytest.approx(information, abs=5 * report.mutual_information_error)

    def test_scaled_latents_count_as_in_the_bound_and_have_no_density(self):
        def program(x, is_model):
            with pyro.plate("data", len(x)):
                with poutine.scale(scale=0.25):
                    z = pyro.sample("z", dist.Normal(0.0, 1.0) if is_model else dist.Normal(x / 2, 0.3))
                if is_model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.randn(100)
        programs = [functools.partial(program, is_model=is_model) for is_model in (True, False)]
        report = collapse_report(*programs, x, seed=0)
        expected = 0.25 * normal_kl(x / 2, torch.tensor(0.09)).mean().item()
        assert report.kl.item() == pytest.approx(expected, rel=1e-5)
        assert report.total_kl == pytest.approx(expected, rel=1e-5)
        assert math.isnan(report.mutual_information)

    def test_draws_are_weighed_given_the_globals_that_they_were_drawn_with(self):
        def program(x, is_model):
            g = pyro.sample("g", dist.Normal(0.0, 3.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(g, 1.0) if is_model else dist.Normal(g + x / 2, 0.3))
                if is_model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.randn(300, dtype=torch.float64)
        programs = [functools.partial(program, is_model=is_model) for is_model in (True, False)]
        report = collapse_report(*programs, x, num_samples=20, seed=1)
        # the global moves all rows together: it tells none from another
        information = information_by_quadrature(x / 2, 0.3)
        assert report.mutual_information == pytest.approx(information, abs=5 * report.mutual_information_error)
        assert report.variance.item() == pytest.approx((x / 2).var().item(), rel=1e-6)

    def test_angles_are_turned_into_their_interval(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.VonMises(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(2 * math.pi + x / 4, 1e-3))

        x = torch.randn(100)
        report = collapse_report(model, guide, x, seed=1)
        place = ((x / 4 + math.pi) / (2 * math.pi)).logit()
        assert report.variance.item() == pytest.approx(place.var().item(), rel=1e-3)

    def test_rows_are_spread_over_sorted_data(self):
        x = torch.linspace(-3.0, 3.0, 1000)
        report = collapse_report(one_latent, shrinking_guide, x, max_rows=50, num_samples=2, seed=0)
        assert report.num_rows == 50
        assert report.variance.item() == pytest.approx((x / 2).var().item(), rel=0.1)


class TestReport:
    def report(self):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.stack([0.0 * x, x], -1), 1.0).to_event(1))

        return collapse_report(model, guide, torch.randn(200), seed=0)

    def test_table(self):
        report = self.report()
        frame = report.to_pandas()
        assert list(frame.index) == ["z[1]", "z[0]"]
        assert frame.is_active.tolist() == [True, False]
        text = repr(report)
        assert "1 of 2 units active on 200 rows" in text
        assert "z[1]" in text

    def test_dead_units_are_named(self):
        with pytest.warns(AEVBWarning, match=r"1 of 2 latent units are dead: z\[0\]"):
            self.report().warn_if_dead()

    def test_a_seed_reproduces_and_leaves_the_generator(self):
        state = torch.get_rng_state()
        first, second = self.report(), None
        torch.set_rng_state(state)
        second = self.report()
        assert first.mutual_information == second.mutual_information

    def test_bad_input(self):
        x = torch.randn(10)
        with pytest.raises(SettingError, match="num_samples must be at least 2, got 1"):
            collapse_report(one_latent, shrinking_guide, x, num_samples=1)
        with pytest.raises(SettingError, match="max_row"):
            collapse_report(one_latent, shrinking_guide, x, max_row=10)
        with pytest.raises(SettingError, match="threshold"):
            collapse_report(one_latent, shrinking_guide, x, threshold=-1.0)
        with pytest.raises(SettingError, match="no rows"):
            collapse_report(one_latent, shrinking_guide, x, data_plate=None)
        with pytest.raises(DataError, match="at least two of them, got 1"):
            collapse_report(one_latent, shrinking_guide, x[:1])
        with pytest.raises(SettingError, match="every"):
            CollapseMonitor(x, every=0)
        with pytest.raises(DataError, match="tensor"):
            CollapseMonitor("rows")

    def test_a_model_without_latents_of_rows(self):
        def model(x):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(g, 1.0), obs=x)

        def guide(x):
            pyro.sample("g", dist.Normal(0.0, 1.0))

        with pytest.raises(ModelError, match="no latents inside the data plate"):
            collapse_report(model, guide, torch.randn(4))

    def test_a_guide_that_reads_latents_off_others(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("noise", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(z))

        with pytest.raises(GuideError, match="auxiliary site 'noise'"):
            collapse_report(one_latent, guide, torch.randn(4))

    def test_a_guide_of_points(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(x))

        with pytest.raises(GuideError, match="a point \\(Delta\\) at 'z'"):
            collapse_report(one_latent, guide, torch.randn(4))


class Decoder(nn.Module):
    """A linear decoder of three latents, of which the last is never read."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x):
        pyro.module("decoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z[..., :2]), 0.3).to_event(1), obs=x)


class TestMonitor:
    def data(self):
        return torch.randn(200, 2) @ torch.tensor([[1.0, 0.5, -1.0, 0.3], [0.2, -1.0, 0.4, 1.0]])

    def train(self, callbacks, **settings):
        pyro.set_rng_seed(0)
        model = Decoder()
        guide = AutoAmortizedNormal(model)
        settings = {"num_epochs": 30, "batch_size": 50, "learning_rate": 0.02, "seed": 0, "progress": False} | settings
        return fit(model, guide, SGVB(), self.data(), callbacks=callbacks, **settings), model, guide

    def test_history_and_report(self):
        data = self.data()
        monitor = CollapseMonitor(data[:100], every=10, num_samples=10)
        with pytest.warns(AEVBWarning, match=r"1 of 3 latent units are dead: z\[2\]") as caught:
            result, model, guide = self.train([monitor])
        assert len(caught) == 1
        assert sorted(monitor.reports) == [10, 20, 30]
        measured = [record for record in result.history if "active_units" in record]
        assert [record["epoch"] for record in measured] == [10.0, 20.0, 30.0]
        last = measured[-1]
        assert last["active_units"] == 2.0
        assert last["kl"] == pytest.approx(sum(last[f"kl_z[{unit}]"] for unit in range(3)), rel=1e-6)
        assert last["kl_z"] == pytest.approx(last["kl"], rel=1e-6)
        assert {"kl", "kl_z[0]", "mutual_information"} <= set(result.to_pandas().columns)
        after = collapse_report(model, guide, data[:100], num_samples=10, seed=monitor.settings["seed"])
        assert monitor.report.total_kl == after.total_kl == pytest.approx(last["kl"])
        assert monitor.report.mutual_information == after.mutual_information

    def test_training_is_not_changed(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AEVBWarning)
            _, *watched = self.train([CollapseMonitor(self.data(), num_samples=2)], num_epochs=3)
        _, *alone = self.train([], num_epochs=3)
        for one, other in zip(watched, alone, strict=True):
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(a, b)
            assert one.training == other.training

    @pytest.mark.filterwarnings("ignore:.*latent units are dead")
    def test_the_report_is_of_the_state_that_patience_restores(self):
        monitor = CollapseMonitor(self.data(), num_samples=10)
        settings = {"num_epochs": 40, "learning_rate": 0.3, "validation": self.data()[:50], "patience": 2}
        result, *_ = self.train([monitor], **settings)
        assert result.stopped_by == "patience"
        best = monitor.reports[result.best_epoch]
        assert monitor.report.total_kl == pytest.approx(best.total_kl, rel=1e-6)
        assert monitor.reports[len(result.history)].total_kl != pytest.approx(best.total_kl, rel=1e-6)

    def test_parameters_of_functions_are_those_of_the_fit(self):
        def model(x):
            loc = pyro.param("loc", torch.tensor(0.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            slope = pyro.param("slope", torch.tensor(0.1))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(slope * x, 0.7))

        x = torch.randn(100)
        monitor = CollapseMonitor((x,), every=5)
        fit(model, guide, SGVB(), x, num_epochs=10, learning_rate=0.01, callbacks=[monitor], seed=0, progress=False)
        slope = pyro.param("slope").item()
        assert slope > 0.15
        assert monitor.report.variance.item() == pytest.approx(slope**2 * x.var().item(), rel=1e-4)

    def test_batches_by_name_are_taken(self):
        monitor = CollapseMonitor({"x": torch.randn(20)}, num_samples=4)
        fit(
            one_latent,
            shrinking_guide_named,
            SGVB(),
            {"x": torch.randn(50)},
            num_epochs=1,
            callbacks=[monitor],
            progress=False,
        )
        assert monitor.report.num_rows == 20


def shrinking_guide_named(x):
    slope = pyro.param("named_slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.3))
