"""`fit`: what it does to parameters, against closed forms of deterministic and conjugate models."""

import copy
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from pyro_aevb import IWELBO, SGVB, fit
from pyro_aevb.errors import AEVBWarning, NonFiniteError
from pyro_aevb.testing import LinearGaussian, NormalNormal
from pyro_aevb.training.loop import EpochEnd


class Mean(nn.Module):
    """x ~ N(theta, 1) without latents: loss and gradient are known in closed form, and there is no noise."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.theta, 1.0), obs=x)


def no_latents(*args):
    pass


def fit_mean(model, data, **settings):
    settings = {"num_epochs": 1, "batch_size": len(data), "progress": False} | settings
    return fit(model, no_latents, SGVB(kl="sampled"), data, **settings)


def sgd(learning_rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=learning_rate)


class TestSteps:
    x = torch.tensor([1.0, 2.0, 4.0, 9.0])

    def test_any_optimizer_descends_the_gradient_of_the_whole_data_set(self):
        model = Mean(0.5)
        fit_mean(model, self.x, optimizer=sgd(0.01))
        assert model.theta.item() == pytest.approx(0.5 - 0.01 * (4 * 0.5 - 16), rel=1e-6)

    def test_batches_are_scaled_to_the_whole_data_set(self):
        model = Mean(0.0)
        fit(
            model,
            no_latents,
            SGVB(kl="sampled"),
            self.x[:1].expand(8),
            num_epochs=1,
            batch_size=2,
            optimizer=sgd(0.01),
            progress=False,
        )
        theta = 0.0
        for _ in range(4):
            theta += 0.01 * 8 / 2 * 2 * (1.0 - theta)
        assert model.theta.item() == pytest.approx(theta, rel=1e-5)

    def test_default_optimizer_is_adam_whose_first_step_has_the_length_of_the_learning_rate(self):
        model = Mean(0.0)
        fit_mean(model, self.x, learning_rate=0.03)
        assert model.theta.item() == pytest.approx(0.03, rel=1e-4)
        model = Mean(0.0)
        fit_mean(model, self.x)
        assert model.theta.item() == pytest.approx(1e-3, rel=1e-4)

    def test_gradients_of_parameters_that_are_not_the_optimizer_s_do_not_add_up(self):
        class Two(Mean):
            def __init__(self):
                super().__init__()
                self.other = nn.Parameter(torch.tensor(0.0))

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("x", dist.Normal(self.theta + self.other, 1.0), obs=x)

        model = Two()
        # both have the same gradient, which is clipped to a norm of 1 at each of two steps
        fit_mean(model, self.x, optimizer=lambda _: torch.optim.SGD([model.theta], lr=0.1), clip_norm=1.0, num_epochs=2)
        assert model.theta.item() == pytest.approx(2 * 0.1 / math.sqrt(2), rel=1e-5)
        assert model.other.item() == 0.0

    @pytest.mark.parametrize(("clip_norm", "step"), [(0.5, 0.5), (1e3, 16.0)])
    def test_clipping_bounds_the_norm_over_all_parameters(self, clip_norm, step):
        model = Mean(0.0)
        model.other = nn.Parameter(torch.zeros(()))  # gradient of 0
        fit_mean(model, self.x, optimizer=sgd(1.0), clip_norm=clip_norm)
        assert model.theta.item() == pytest.approx(step, rel=1e-5)

    def test_learning_rate_follows_the_schedule(self):
        rates = fit_mean(
            Mean(), self.x, num_epochs=3, learning_rate=0.1, schedule=lambda optimizer: StepLR(optimizer, 1, gamma=0.5)
        ).to_pandas()["learning_rate"]
        assert rates.tolist() == pytest.approx([0.1, 0.05, 0.025])

    @pytest.mark.parametrize(("held_out", "last"), [(4.0, 0.01), (-4.0, 0.0001)])
    def test_reduce_on_plateau_reads_the_validation_bound(self, held_out, last):
        result = fit_mean(
            Mean(),
            self.x,
            num_epochs=4,
            optimizer=sgd(0.01),
            validation=torch.full((3,), held_out),
            schedule=lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.1, patience=0),
        )
        # away from the held-out rows the bound falls from the second epoch on, and the rate with it
        assert result.history[-1]["learning_rate"] == pytest.approx(last)

    def test_float64_is_honoured(self):
        model = Mean(0.5).double()
        fit_mean(model, self.x.double(), optimizer=sgd(0.01))
        assert model.theta.item() == pytest.approx(0.5 - 0.01 * (4 * 0.5 - 16), rel=1e-14)

    def test_a_fabric_of_ones_own_gives_the_same_parameters(self):
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=1)
        models = Mean(0.5), Mean(0.5)
        fit_mean(models[0], self.x, num_epochs=3)
        fit_mean(models[1], self.x, num_epochs=3, fabric=fabric)
        assert torch.equal(models[0].theta, models[1].theta)

    def test_a_short_last_batch_is_scaled_by_its_own_rows(self):
        model = Mean(0.0)
        fit_mean(model, torch.ones(5), batch_size=3, optimizer=sgd(0.1))
        theta = 0.0
        for rows in (3, 2):
            theta += 0.1 * 5 / rows * rows * (1.0 - theta)
        assert model.theta.item() == pytest.approx(theta, rel=1e-5)


class TestHistory:
    x = torch.tensor([1.0, 2.0, 4.0, 9.0, 0.0])

    def test_bounds_are_nats_per_row(self):
        model, held_out = Mean(1.5), torch.linspace(-1, 3, 250)
        record = fit_mean(model, self.x, optimizer=sgd(0.0), batch_size=2, validation=held_out).history[0]
        assert record["bound"] == pytest.approx(dist.Normal(1.5, 1.0).log_prob(self.x).mean().item(), rel=1e-5)
        expected = dist.Normal(1.5, 1.0).log_prob(held_out).mean().item()
        assert record["validation_bound"] == pytest.approx(expected, rel=1e-5)

    def test_held_out_bound_leaves_the_globals_out(self):
        exact, x = NormalNormal.fixture()
        guide = GlobalGuide(exact, x)
        guide.exact_start()
        result = fit(
            exact.model, guide, SGVB(kl="sampled"), x, num_epochs=1, optimizer=sgd(0.0), validation=x, progress=False
        )
        total = result.history[0]["bound"] * len(x)
        held_out = result.history[0]["validation_bound"] * len(x)
        assert total == pytest.approx(exact.log_marginal(x).item(), rel=1e-8)
        # log p(x | g) is above the joint evidence by log q(g) - log p(g), which no tolerance hides here
        assert abs(held_out - total) > 0.5

    def test_counts_and_table(self):
        result = fit_mean(Mean(), self.x, num_epochs=3, batch_size=2)
        table = result.to_pandas()
        assert result.num_steps == 9
        assert table["epoch"].tolist() == [1, 2, 3]
        assert table["num_skipped"].tolist() == [0, 0, 0]
        assert result.stopped_by == "epochs"
        assert "9 steps" in repr(result)
        assert result.seconds_per_step == pytest.approx(table["seconds"].sum() / 9)

    def test_the_bar_shows_the_bound_or_nothing(self, capsys):
        fit_mean(Mean(), self.x)
        assert capsys.readouterr() == ("", "")
        fit_mean(Mean(), self.x, progress=True)
        assert "bound" in capsys.readouterr().err


class TestStopping:
    x = torch.full((4,), 5.0)

    def test_patience_restores_the_best_state(self):
        model, thetas = Mean(0.0), []

        def remember(event: EpochEnd):
            thetas.append(model.theta.detach().clone())

        result = fit_mean(
            model,
            self.x,
            num_epochs=100,
            optimizer=sgd(0.02),
            validation=torch.full((3,), 2.0),
            patience=3,
            callbacks=[remember],
        )
        closest = int(torch.stack(thetas).sub(2.0).abs().argmin())
        assert result.best_epoch == closest + 1
        assert result.stopped_by == "patience"
        assert len(thetas) == result.best_epoch + 3
        assert torch.equal(model.theta, thetas[closest])

    def test_buffers_belong_to_the_best_state(self):
        class Normed(Mean):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(1)

            def forward(self, x):
                self.norm(x[:, None])
                super().forward(x)

        model, means = Normed(), []
        fit_mean(
            model,
            self.x + torch.arange(4.0),
            num_epochs=6,
            optimizer=sgd(0.02),
            validation=torch.full((3,), 0.0),
            patience=2,
            callbacks=[lambda event: means.append(model.norm.running_mean.clone())],
        )
        assert torch.equal(model.norm.running_mean, means[0])
        assert not torch.equal(means[0], means[1])

    def test_without_patience_the_last_state_stays(self):
        model = Mean(0.0)
        result = fit_mean(model, self.x, num_epochs=30, optimizer=sgd(0.02), validation=torch.full((3,), 2.0))
        assert result.best_epoch < 30
        assert model.theta.item() > 4.0

    def test_validation_that_is_nan_at_first_can_still_improve(self):
        class Late(Mean):
            def forward(self, x):
                is_early = bool((x == 7.0).any() and self.theta < 0.3)
                scale = torch.full((), math.nan if is_early else 1.0)
                with pyro.plate("data", len(x)):
                    pyro.sample("x", dist.Normal(self.theta, scale, validate_args=False), obs=x)

        held_out = torch.full((3,), 7.0)
        result = fit_mean(Late(), self.x, num_epochs=3, optimizer=sgd(0.01), validation=held_out, patience=3)
        assert result.to_pandas()["validation_bound"].isna().tolist() == [True, False, False]
        assert result.best_epoch == 3

    def test_a_callback_ends_it(self):
        result = fit_mean(Mean(), self.x, num_epochs=9, callbacks=[lambda event: event.epoch == 2])
        assert (result.stopped_by, len(result.history)) == ("callback", 2)

    def test_a_callback_may_add_to_the_history(self):
        result = fit_mean(Mean(), self.x, callbacks=[lambda event: event.record.update(mine=7.0)])
        assert result.to_pandas()["mine"].tolist() == [7.0]

    def test_ctrl_c_in_a_callback_ends_with_the_last_state(self):
        def interrupt(event: EpochEnd):
            if event.epoch == 2:
                raise KeyboardInterrupt

        model, reference = Mean(), Mean()
        result = fit_mean(model, self.x, num_epochs=9, optimizer=sgd(0.01), callbacks=[interrupt])
        fit_mean(reference, self.x, num_epochs=2, optimizer=sgd(0.01))
        assert (result.stopped_by, result.num_steps) == ("interrupt", 2)
        assert torch.equal(model.theta, reference.theta)

    def test_ctrl_c_within_a_step_keeps_the_last_state_even_with_patience(self):
        class Interrupted(Mean):
            calls = 0

            def forward(self, x):
                if self.training and torch.is_grad_enabled():
                    self.calls += 1
                    if self.calls == 4:
                        raise KeyboardInterrupt
                super().forward(x)

        model, reference = Interrupted(), Mean()
        model.eval()
        settings = {"optimizer": sgd(0.01)}
        held_out = {"validation": torch.full((3,), -9.0), "patience": 5}  # the first epoch is the best
        result = fit_mean(model, self.x, num_epochs=9, **settings, **held_out)
        fit_mean(reference, self.x, num_epochs=3, **settings)
        assert (result.stopped_by, result.num_steps, len(result.history)) == ("interrupt", 3, 3)
        assert torch.equal(model.theta, reference.theta)
        assert not model.training


class Spoiled(Mean):
    """A model whose loss or gradient is not finite in chosen training steps."""

    def __init__(self, steps, what):
        super().__init__()
        self.steps, self.what, self.count = steps, what, 0
        self.norm = nn.BatchNorm1d(1)
        self.seen = []

    def forward(self, x):
        if torch.is_grad_enabled():
            self.seen.append(self.theta.item())
            self.count += 1
        is_spoiled = torch.is_grad_enabled() and self.count in self.steps
        noise = torch.full_like(x, math.nan) if is_spoiled and self.what == "loss" else x
        self.norm(noise[:, None])
        loc = self.theta
        if is_spoiled:
            loc = loc * math.nan if self.what == "loss" else loc + (0.0 * loc).sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("fine", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=x)


class TestNonFinite:
    x = torch.tensor([1.0, 2.0, 4.0, 9.0])

    @pytest.mark.parametrize("what", ["loss", "gradient"])
    def test_the_step_is_skipped_and_counted(self, what):
        model, reference = Spoiled({2, 4}, what), Mean()
        with pytest.warns(AEVBWarning, match="2 of 6 steps were skipped"):
            result = fit_mean(model, self.x, num_epochs=6, learning_rate=0.1)
        fit_mean(reference, self.x, num_epochs=4, learning_rate=0.1)
        assert (result.num_steps, result.num_skipped) == (4, 2)
        assert result.to_pandas()["num_skipped"].tolist() == [0, 1, 0, 1, 0, 0]
        assert model.seen[1] == model.seen[2] != model.seen[3] == model.seen[4]
        assert torch.equal(model.theta, reference.theta)  # Adam's state too knows nothing of the skipped steps
        assert torch.isfinite(model.norm.running_mean).all()
        assert model.norm.num_batches_tracked == 4

    @pytest.mark.parametrize("what", ["loss", "gradient"])
    def test_after_the_limit_an_error_names_the_site_and_parameters_are_the_last_good(self, what):
        model = Spoiled(set(range(3, 99)), what)
        with pytest.warns(AEVBWarning), pytest.raises(NonFiniteError) as caught:
            fit_mean(model, self.x, num_epochs=50, learning_rate=0.1, max_skipped=3)
        reference = Mean()
        fit_mean(reference, self.x, num_epochs=2, learning_rate=0.1)
        assert caught.value.num_skipped == 4
        assert torch.equal(model.theta, reference.theta)
        assert "last good step" in str(caught.value)

    def test_the_site_is_named(self):
        class Diverging(Mean):
            def forward(self, x):
                scale = torch.where(self.theta > 0.5, math.nan, 1.0)
                with pyro.plate("data", len(x)):
                    pyro.sample("fine", dist.Normal(0.0, 1.0), obs=x)
                    pyro.sample("culprit", dist.Normal(self.theta, scale, validate_args=False), obs=x)

        with pytest.warns(AEVBWarning, match="skipped"), pytest.raises(NonFiniteError, match="'culprit'") as caught:
            fit_mean(Diverging(), self.x, num_epochs=50, learning_rate=0.3, max_skipped=2)
        assert caught.value.site == "culprit"
        assert caught.value.num_skipped == 3

    def test_a_good_step_resets_the_count(self):
        model = Spoiled({2, 3, 5, 6, 8, 9}, "loss")
        with pytest.warns(AEVBWarning):
            assert fit_mean(model, self.x, num_epochs=10, max_skipped=2).num_skipped == 6


class TestSeeds:
    def run(self, seed):
        exact, x = LinearGaussian.fixture(torch.float32)
        data, _ = exact.simulate(150, dtype=torch.float32)
        guide = exact.mean_field_guide(dtype=torch.float32)
        settings = {"num_epochs": 2, "batch_size": 40, "progress": False, "validation": x, "learning_rate": 0.01}
        fit(exact.model, guide, SGVB(num_particles=2), data, seed=seed, **settings)
        return torch.cat([parameter.flatten() for parameter in guide.parameters()])

    def test_one_seed_gives_the_same_parameters_bit_for_bit(self):
        first = self.run(3)
        torch.randn(7)
        assert torch.equal(first, self.run(3))
        assert not torch.equal(first, self.run(4))

    def test_the_callers_generators_are_left_as_they_were(self):
        # Python's own generator is left out: the run-time checks of annotations draw from it
        pyro.set_rng_seed(11)
        expected = torch.randn(3), np.random.rand(3)
        pyro.set_rng_seed(11)
        self.run(3)
        assert torch.equal(torch.randn(3), expected[0])
        assert np.array_equal(np.random.rand(3), expected[1])

    def test_without_a_seed_the_callers_seed_decides(self):
        pyro.set_rng_seed(5)
        first = self.run(None)
        pyro.set_rng_seed(5)
        assert torch.equal(first, self.run(None))
        assert not torch.equal(first, self.run(None))

    def test_a_shuffling_loader_is_reproduced(self):
        def run():
            data = torch.utils.data.TensorDataset(torch.arange(20.0))
            loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
            model = Mean()
            before = torch.get_rng_state()
            fit(
                model, no_latents, SGVB(kl="sampled"), loader, num_epochs=2, optimizer=sgd(0.01), seed=1, progress=False
            )
            assert torch.equal(before, torch.get_rng_state())
            return model.theta.item()

        assert run() == run()


class GlobalGuide(nn.Module):
    """A normal for the global g of :class:`NormalNormal`, the exact conditional for z."""

    def __init__(self, exact, data, plate=None):
        super().__init__()
        self.exact, self.data = exact, data
        self.loc = nn.Parameter(torch.zeros((), dtype=data.dtype))
        self.log_scale = nn.Parameter(torch.zeros((), dtype=data.dtype))
        self.plate = plate or (lambda x: pyro.plate("data", len(x)))

    def exact_start(self):
        posterior = self.exact.posterior(self.data)["g"]
        with torch.no_grad():
            self.loc.copy_(posterior.mean)
            self.log_scale.copy_(torch.as_tensor(posterior.stddev).log())

    def forward(self, x):
        g = pyro.sample("g", dist.Normal(self.loc, self.log_scale.exp()))
        slope, variance = self.exact._local_posterior()
        with self.plate(x) as index:
            rows = x if len(index) == len(x) else x[index]
            pyro.sample("z", dist.Normal(slope * g + (1 - slope) * rows, math.sqrt(variance)))


def kl_to_posterior(guide, exact, data):
    q = dist.Normal(guide.loc, guide.log_scale.exp())
    return dist.kl.kl_divergence(q, exact.posterior(data)["g"]).item()


class TestScale:
    """With globals the weight of the rows decides the posterior of g.

    KL(q(g) || p(g | data)) of the last iterate is some .01 nats, from the noise of minibatches; half the weight costs .15.
    """

    exact = NormalNormal()
    data = NormalNormal().simulate(40, seed=2)[0]

    def model_of(self, plate):
        def model(x):
            g = pyro.sample("g", dist.Normal(x.new_zeros(()), self.exact.global_scale))
            with plate(x) as index:
                rows = x if len(index) == len(x) else x[index]
                z = pyro.sample("z", dist.Normal(g, self.exact.local_scale))
                pyro.sample("x", dist.Normal(z, self.exact.noise_scale), obs=rows)

        return model

    def train(self, plate, **settings):
        guide = GlobalGuide(self.exact, self.data, plate)
        settings = {"num_epochs": 100, "batch_size": 20, "learning_rate": 0.1, "seed": 0, "progress": False} | settings
        schedule = lambda optimizer: StepLR(optimizer, 35, gamma=0.2)  # noqa: E731
        objective = SGVB(gradient="stl")
        result = fit(self.model_of(plate), guide, objective, self.data, schedule=schedule, **settings)
        return kl_to_posterior(guide, self.exact, self.data), result

    def test_a_wrong_weight_would_show(self):
        wrong = self.exact.posterior(self.data[:20])["g"]
        right = self.exact.posterior(self.data)["g"]
        assert dist.kl.kl_divergence(dist.Normal(right.mean, wrong.stddev), right) > 0.14

    def test_a_plate_of_the_batch_gets_the_size_of_the_data(self):
        kl, result = self.train(lambda x: pyro.plate("data", len(x)))
        assert result.num_steps == 200
        assert kl < 0.03

    def test_a_plate_of_the_whole_size_is_left_alone(self):
        kl, _ = self.train(lambda x: pyro.plate("data", 40, subsample_size=len(x)))
        assert kl < 0.03

    def test_a_model_that_draws_its_own_rows_gets_all_data_at_each_step(self):
        kl, result = self.train(lambda x: pyro.plate("data", len(x), subsample_size=20), batch_size=None)
        assert result.num_steps == 200  # two draws of 20 rows are an epoch
        assert kl < 0.03

    def test_without_globals_the_scale_does_not_move_the_optimum_but_the_gradient(self):
        models = Mean(0.0), Mean(0.0)
        x = torch.ones(4)
        fit_mean(models[0], x, optimizer=sgd(0.001))
        fit_mean(models[1], x, optimizer=sgd(0.001), num_data=400)
        assert models[1].theta.item() == pytest.approx(100 * models[0].theta.item(), rel=1e-5)


class TestPyrosOwn:
    """Pyro's guides and losses train under `fit` as they are: a normal mean with a conjugate posterior."""

    x = 1.5 + torch.randn(30, generator=torch.Generator().manual_seed(0))

    def model(self, x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def posterior(self):
        precision = 1 / 4 + len(self.x)
        return dist.Normal(self.x.sum() / precision, precision**-0.5)

    @pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
    @pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO, SGVB])
    @pytest.mark.parametrize("data_plate", ["auto", None])
    def test_automatic_guides_reach_the_posterior(self, auto, objective, data_plate):
        if objective is TraceMeanField_ELBO and auto is AutoMultivariateNormal:
            pytest.skip("Pyro's analytic KL has no closed form for a joint draw")
        guide = auto(self.model)
        schedule = lambda optimizer: StepLR(optimizer, 50, gamma=0.2)  # noqa: E731
        particles = {} if objective is SGVB else {"vectorize_particles": True}
        objective = objective(num_particles=10, **particles)
        settings = {"num_epochs": 150, "learning_rate": 0.1, "progress": False, "seed": 0, "schedule": schedule}
        fit(self.model, guide, objective, self.x, data_plate=data_plate, **settings)
        exact = self.posterior()
        q05, q50, q95 = guide.quantiles([0.05, 0.5, 0.95])["loc"]
        stddev = (q95 - q05) / (2 * 1.6448536)
        q = dist.Normal(q50.detach().squeeze(), stddev.detach().squeeze())
        # the last iterate's noise; a posterior of half the rows would be .15 nats away
        assert dist.kl.kl_divergence(q, exact).item() < 0.02

    def test_minibatches_reach_the_same_posterior(self):
        guide = AutoNormal(self.model)
        schedule = lambda optimizer: StepLR(optimizer, 20, gamma=0.2)  # noqa: E731
        settings = {"num_epochs": 60, "batch_size": 10, "learning_rate": 0.1, "progress": False, "seed": 0}
        objective = Trace_ELBO(num_particles=10, vectorize_particles=True)
        fit(self.model, guide, objective, self.x, schedule=schedule, **settings)
        q05, q50, q95 = guide.quantiles([0.05, 0.5, 0.95])["loc"]
        q = dist.Normal(q50.detach(), (q95 - q05).detach() / (2 * 1.6448536))
        assert dist.kl.kl_divergence(q, self.posterior()).item() < 0.03

    def test_an_automatic_guide_keeps_its_model(self):
        guide = AutoNormal(self.model)
        fit(self.model, guide, Trace_ELBO(), self.x, num_epochs=1, progress=False)
        assert guide.model is not None
        assert guide(self.x)["loc"].shape == ()


def by_module(theta):
    net = Mean(theta)

    def model(x):
        pyro.module("net", net)
        net(x)

    return model, lambda: net.theta


def by_param(theta):
    def model(x):
        loc = pyro.param("theta", torch.tensor(theta))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model, lambda: pyro.param("theta")


def by_method(theta):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Mean(theta)

        def generate(self, x):
            self.net(x)

    holder = Holder()
    return holder.generate, lambda: holder.net.theta


def by_pyro_module(theta):
    class Typed(PyroModule):
        def __init__(self):
            super().__init__()
            self.theta = PyroParam(torch.tensor(theta))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.theta, 1.0), obs=x)

    model = Typed()
    return model, lambda: model.theta_unconstrained


def by_nn_module(theta):
    model = Mean(theta)
    return model, lambda: model.theta


def by_closure(theta):
    net = Mean(theta)
    return lambda x: net(x), lambda: net.theta


WAYS = [by_nn_module, by_method, by_module, by_param, by_pyro_module, by_closure]


class TestWaysToHoldParameters:
    x = torch.tensor([1.0, 2.0, 4.0, 9.0])

    @pytest.mark.parametrize("way", WAYS)
    def test_all_ways_take_the_same_steps(self, way):
        model, read = way(0.5)
        fit_mean(model, self.x, num_epochs=2, optimizer=sgd(0.01))
        theta = 0.5
        for _ in range(2):
            theta -= 0.01 * (4 * theta - 16)
        assert read().item() == pytest.approx(theta, rel=1e-6)

    @pytest.mark.parametrize("way", WAYS)
    def test_fitting_again_goes_on_from_there(self, way):
        model, read = way(0.5)
        if way is by_param:
            pytest.skip("a function's pyro.param starts anew in each program; AEVB keeps the program")
        for _ in range(2):
            fit_mean(model, self.x, optimizer=sgd(0.01))
        theta = 0.5
        for _ in range(2):
            theta -= 0.01 * (4 * theta - 16)
        assert read().item() == pytest.approx(theta, rel=1e-6)

    @pytest.mark.parametrize("way", [by_param, by_pyro_module, by_module])
    def test_two_models_with_one_name_never_collide(self, way):
        first, read_first = way(0.0)
        second, read_second = way(0.0)
        result = fit_mean(first, self.x, optimizer=sgd(0.25))
        assert read_first().item() == pytest.approx(4.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other = fit_mean(second, -self.x, num_epochs=1, optimizer=sgd(0.25))
        # the second starts at 0, not where the first ended, and the first is not moved
        expected = dist.Normal(0.0, 1.0).log_prob(self.x).mean().item()
        assert result.history[0]["bound"] == pytest.approx(expected)
        assert other.history[0]["bound"] == pytest.approx(expected)
        assert read_first().item() == pytest.approx(4.0)
        if way is by_param:
            assert any("theta" in str(warning.message) for warning in caught)
        else:
            assert read_second().item() == pytest.approx(-4.0)

    def test_constrained_parameters_stay_inside(self):
        def model(x):
            scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0.0, scale), obs=x)

        x = torch.tensor([0.1, -0.1, 0.2, -0.2])
        fit_mean(model, x, num_epochs=400, learning_rate=0.05)
        assert pyro.param("scale").item() == pytest.approx(x.square().mean().sqrt().item(), rel=1e-3)


class TestModes:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.linear = nn.Linear(6, 6)
            self.frozen = nn.Dropout()

        def forward(self, x):
            loc, log_scale = self.linear(self.frozen(self.norm(x))).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    @pytest.mark.parametrize("objective", [SGVB(), SGVB(num_particles=3), IWELBO(4)])
    def test_batchnorm_in_a_guide_sees_each_training_batch_once(self, objective):
        exact, _ = LinearGaussian.fixture(torch.float32)
        data, _ = exact.simulate(60, dtype=torch.float32)
        guide = self.Net()
        guide.frozen.eval()
        guide.norm.momentum = None  # a plain average over the batches seen
        settings = {"num_epochs": 1, "batch_size": 20, "progress": False, "validation": data + 100.0}
        fit(exact.model, guide, objective, data, **settings)
        assert guide.norm.num_batches_tracked == 3
        assert torch.allclose(guide.norm.running_mean, data.mean(0), atol=1e-5)

    def test_modes_are_restored(self):
        exact, _ = LinearGaussian.fixture(torch.float32)
        data, _ = exact.simulate(20, dtype=torch.float32)
        guide = self.Net()
        guide.frozen.eval()
        fit(exact.model, guide, SGVB(), data, num_epochs=1, progress=False)
        assert guide.training
        assert guide.norm.training
        assert not guide.frozen.training

    def test_programs_can_be_copied_after_a_fit(self):
        exact, _ = LinearGaussian.fixture(torch.float32)
        data, _ = exact.simulate(20, dtype=torch.float32)
        guide = self.Net()
        fit(exact.model, guide, SGVB(), data, num_epochs=1, progress=False)
        twin = copy.deepcopy(guide)
        assert torch.equal(twin.linear.weight, guide.linear.weight)
