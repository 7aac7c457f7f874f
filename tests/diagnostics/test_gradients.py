"""Gradients' bias, variance and signal-to-noise ratio against closed forms; what does not apply says why."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_aevb import SGVB, AutoAmortizedNormal, fit
from pyro_aevb.diagnostics.gradient_draws import GradientMoments, GradientSource
from pyro_aevb.diagnostics.gradients import GradientEstimate, _recommend, _summarize, gradient_report
from pyro_aevb.errors import NonFiniteError, ParameterError, SettingError
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.rows import inferring
from pyro_aevb.testing import LinearGaussian, NormalNormal

quiet = functools.partial(gradient_report, seed=0, progress=False)


class One(nn.Module):
    """z ~ N(0, 1), x ~ N(w z, 1), q = N(m + a x, s^2): gradients of one row are polynomials of the noise."""

    def __init__(self, m, s, w=1.0):
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m, dtype=torch.float64))
        self.log_s = nn.Parameter(torch.tensor(math.log(s), dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.m.expand(len(x)), self.log_s.exp()))

    def gradients(self, x, estimator, e):
        """Gradients of the loss with respect to (m, log s, w) at noise e, z = m + s e.

        A: -log p + log q = (z^2 + (x - w z)^2) / 2 - log s - e^2 / 2 with e fixed. B: KL = (m^2 + s^2 - 1) / 2 - log s. STL drops
        the score of q, d/dm log q = e / s and d/dlog s log q = e^2 - 1, from A's path. The score function multiplies it by the
        loss.
        """
        m, s, w = self.m.item(), self.log_s.exp().item(), self.w.item()
        z = m + s * e
        slope = z - w * (x - w * z)  # d(-log p) / dz
        of_w = -z * (x - w * z)
        if estimator == "A":
            rows = [slope, slope * s * e - 1, of_w]
        elif estimator == "B":
            rows = [m - w * (x - w * z), s**2 - 1 - w * (x - w * z) * s * e, of_w]
        elif estimator == "STL":
            inner = slope - e / s  # d(-log p + log q) / dz
            rows = [inner, inner * s * e, of_w]
        else:
            cost = -self.log_weights(x, e)
            rows = [cost * e / s, cost * (e**2 - 1), of_w]
        return torch.stack([torch.as_tensor(row).double() + 0 * e for row in rows])

    def log_weights(self, x, e):
        """Return log p(x, z) - log q(z) at noise e."""
        m, s, w = self.m.item(), self.log_s.exp().item(), self.w.item()
        z = m + s * e
        return -((z**2 + (x - w * z) ** 2) / 2 + math.log(2 * math.pi) / 2 - math.log(s) - e**2 / 2)

    def gradients_of_two(self, x, estimator, e):
        """Gradients of -log((w_1 + w_2) / 2) at pairs of noise ``[2, pairs]``, with v_k = w_k / (w_1 + w_2).

        IWAE: the sum of v_k times A's gradient, the path of -log w_k. DReG: of v_k^2 times STL's for the guide (Tucker et al.
        2018, Eq 8), and of v_k times the model's.
        """
        share = torch.softmax(self.log_weights(x, e), 0)
        if estimator == "IWAE":
            return (share * self.gradients(x, "A", e)).sum(1)
        rows = self.gradients(x, "STL", e)
        return torch.cat([(share**2 * rows[:2]).sum(1), (share * rows[2:]).sum(1)])

    def moments(self, x, estimator):
        """Moments of the loss' gradient for (m, log s, w), by Gauss-Hermite quadrature over e, for IWAE and DReG over two of them.

        Returned are the mean, the variance, and the covariance of the squared deviations, the noise of sample variances.
        """
        e, weight = (torch.tensor(item) for item in np.polynomial.hermite_e.hermegauss(60))
        weight = weight / weight.sum()
        if estimator in ("IWAE", "DReG"):
            gradient = self.gradients_of_two(x, estimator, torch.cartesian_prod(e, e).T)
            weight = torch.outer(weight, weight).flatten()
        else:
            gradient = self.gradients(x, estimator, e)
        mean = gradient @ weight
        squares = (gradient - mean[:, None]).square()
        variance = squares @ weight
        deviation = squares - variance[:, None]
        return mean, variance, (deviation * weight) @ deviation.T


X = torch.tensor([0.8], dtype=torch.float64)


@functools.cache
def measured(m):
    """Measure once for all estimators."""
    pair = One(m, 0.6, 1.4)
    settings = {"num_samples": 200 if m > 0 else 100, "num_reference": 20, "num_importance_samples": 2}
    return pair, quiet(pair.model, pair.guide, X, **settings)


@pytest.mark.parametrize("m", [pytest.param(0.3, marks=pytest.mark.slow), -1.0])  # at -1.0 it tells K = 2 from other K
@pytest.mark.parametrize("estimator", ["A", "B", "STL", "score", "IWAE", "DReG"])
def test_every_number_is_the_closed_one(estimator, m):
    pair, report = measured(m)
    mean, variance, noise_of_variance = pair.moments(0.8, estimator)
    for group, at in (("guide", slice(0, 2)), ("model", slice(2, 3))):
        found = report.find(estimator, group)
        assert found.num_parameters == len(mean[at])
        reference, num_draws = ("IWAE", 1000) if estimator in ("IWAE", "DReG") else ("A", 2000)
        error = math.sqrt(pair.moments(0.8, reference)[1][at].sum() / num_draws)
        assert found.norm == pytest.approx(mean[at].norm().item(), abs=4 * error)
        tolerance = 5 * math.sqrt(noise_of_variance[at, at].sum() / report.num_samples)
        assert found.variance == pytest.approx(variance[at].sum().item(), abs=tolerance)
        assert found.snr == pytest.approx(found.norm / math.sqrt(found.variance))
        assert not found.is_biased


def test_sticking_the_landing_has_no_variance_at_the_exact_posterior():
    pair = One(0.4, math.sqrt(0.5))  # the posterior of x = .8
    report = quiet(pair.model, pair.guide, X, num_samples=50, num_reference=20)
    found = report.find("STL", "guide")
    assert found.variance < 1e-25
    assert found.bias <= 4 * found.bias_error
    assert report.find("A", "guide").variance == pytest.approx(pair.moments(0.8, "A")[1][:2].sum().item(), rel=0.8)
    assert "SGVB(gradient='stl') (STL)" in report.recommendation
    assert report.find("DReG", "guide").variance < 1e-25  # every weight is p(x)


def test_the_paper_is_right_about_the_score_function():
    exact, _ = LinearGaussian.fixture()
    x, guide = exact.simulate(20, seed=2)[0], exact.mean_field_guide(at_optimum=True)
    report = quiet(exact.model, guide, x, num_samples=40, num_reference=5)
    ratio = report.find("score", "guide").variance / report.find("A", "guide").variance
    assert ratio > 15
    assert f"{ratio:.3g} times the variance of A" in report.recommendation
    assert "section 2.2" in report.recommendation
    assert "can't be told from 0" not in report.recommendation  # the importance-weighted gradient is not 0 here


class Biased(SGVB):
    """An estimator with a mistake: the gradient of twice the bound."""

    def _evaluate(self, program, args, kwargs):
        evaluation = super()._evaluate(program, args, kwargs)
        return evaluation._replace(loss=2 * evaluation.loss)


def test_a_biased_estimator_is_found():
    pair = One(1.5, 0.6, 1.4)
    with inferring(0, pair.model, pair.guide):
        source = GradientSource(ObjectiveModule(pair.model, pair.guide, SGVB()), (X,), {})
        exact = source.draw(SGVB(100), 20, lambda: None)
        found, sound = (
            _summarize(
                "A", "guide", source.groups(by_module=False)["guide"], source.draw(item, 100, lambda: None), exact
            )
            for item in (Biased(), SGVB())
        )
    expected = pair.moments(0.8, "A")[0][:2].norm().item()
    assert found.is_biased
    assert found.bias == pytest.approx(expected, rel=0.2)
    assert not sound.is_biased
    assert "A is biased here for the guide's parameters" in _recommend((found,), 5)


def entry(estimator, variance, seconds, norm=1.0, group="guide"):
    """An entry with given numbers."""
    objective = "IWAE" if estimator in ("IWAE", "DReG") else "ELBO"
    return GradientEstimate(estimator, objective, group, 3, norm, 0.1, 0.1, variance, 1.0, seconds)


def test_the_recommendation_weighs_variance_against_time():
    fast = _recommend((entry("A", 10.0, 1.0), entry("B", 8.0, 1.0), entry("STL", 2.0, 2.0)), 5)
    assert "SGVB(gradient='stl') (STL): its gradient of the guide's parameters has 0.25 times" in fast
    assert "variance of B, in 2 times the time" in fast
    assert "SGVB() (B), no other is clearly better" in _recommend((entry("B", 8.0, 1.0), entry("STL", 4.0, 2.0)), 5)
    assert "the only one that applies" in _recommend((entry("score", 8.0, 1.0),), 5)
    assert "near an optimum" in _recommend((entry("A", 8.0, 1.0, norm=0.0),), 5)
    both = _recommend((entry("IWAE", 9.0, 1.0), entry("DReG", 1.0, 2.0)), 7)
    assert "K = 7: IWELBO(..., gradient='dreg') (DReG)" in both
    assert "model's parameters" in _recommend(
        (entry("A", 9.0, 2.0, group="model"), entry("STL", 1.0, 1.0, group="model")), 5
    )


def test_moments_are_those_of_the_draws():
    """Welford's recurrence against the plain formulas, on a mean far from 0."""
    pair = One(0.3, 0.6)

    class Counting(SGVB):
        number = 0

        def differentiable_loss(self, model, guide, *args, **kwargs):
            Counting.number += 1
            return pair.m * (1e6 + Counting.number**2) + 0 * pair.w + 0 * pair.log_s

    with inferring(0, pair.model, pair.guide):
        source = GradientSource(ObjectiveModule(pair.model, pair.guide, SGVB()), (X,), {})
        drawn = source.draw(Counting(), 6, lambda: None)
    draws = 1e6 + torch.arange(1, 7).double() ** 2
    place = list(source.parameters).index(next(name for name in source.parameters if name.endswith(".m")))
    assert drawn.mean[place].item() == pytest.approx(draws.mean().item())
    assert drawn.variance[place].item() == pytest.approx(draws.var().item())
    assert drawn.squared_error[place].item() == pytest.approx(draws.var().item() / 6)


# --- Groups and parameters ---


def test_parameters_go_to_the_program_whose_density_they_move():
    class Both(One):
        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.m + self.w * x, self.log_s.exp()))

    pair = Both(0.3, 0.6)
    pair.idle = nn.Parameter(torch.zeros(2).double())
    report = quiet(pair.model, pair.guide, X, num_samples=2, num_reference=2)
    found = {(item.group, item.num_parameters) for item in report.estimates}
    assert found == {("guide", 2), ("guide and model", 1)}


def test_groups_by_module():
    exact, _ = LinearGaussian.fixture(torch.float32)
    x = exact.simulate(8, seed=2, dtype=torch.float32)[0]
    guide = AutoAmortizedNormal(exact.model)
    report = quiet(exact.model, guide, x, num_samples=3, num_reference=2, groups="module")
    sizes = {item.group: item.num_parameters for item in report.estimates}
    parts = [size for group, size in sizes.items() if group.startswith("guide: ")]
    assert len(parts) > 1
    assert sizes["guide"] == sum(parts) == sum(item.numel() for item in guide.parameters())


def model(x):
    g = pyro.sample("g", dist.Normal(pyro.param("mean", torch.tensor(0.0).double()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    scale = pyro.param("scale", torch.tensor(1.0).double(), constraint=dist.constraints.positive)
    g = pyro.sample("g", dist.Normal(pyro.param("loc", torch.tensor(0.0).double()), scale))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((g + x) / 2, 0.5**0.5))


def test_params_of_the_store_are_taken_as_training_left_them():
    x = torch.tensor([3.0, 4.0, 5.0]).double()
    before = quiet(model, guide, x, num_samples=2, num_reference=20, num_data=3).find("A", "guide").norm
    fit(model, guide, SGVB(), x, num_epochs=80, batch_size=3, learning_rate=0.15, progress=False, seed=0)
    names = sorted(pyro.get_param_store().keys())
    after = quiet(model, guide, x, num_samples=2, num_reference=20, num_data=3)
    assert after.find("A", "guide").norm < before / 4
    assert after.find("A", "guide").num_parameters == 2
    assert after.find("A", "model").num_parameters == 1
    assert sorted(pyro.get_param_store().keys()) == names


def test_a_part_of_the_data_stands_for_all():
    x = NormalNormal.fixture()[1]
    pair = One(0.0, 1.0)

    def scaled(x):
        mean = pyro.sample("g", dist.Normal(pair.m, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def q(x):
        pyro.sample("g", dist.Normal(x.new_zeros(()), 1e-4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pair.w * x, 0.5))

    # d loss / d w = scale * sum over rows of x (w x - g) - x (x - w x) at w = 1: scale * sum of x^2
    norms = [quiet(scaled, q, x, num_samples=2, num_reference=50, num_data=n).find("A", "guide").norm for n in (8, 80)]
    assert norms[0] == pytest.approx(x.square().sum().item(), rel=0.05)
    assert norms[1] == pytest.approx(10 * x.square().sum().item(), rel=0.05)


# --- What does not apply ---


def test_estimators_that_do_not_apply_are_listed_with_the_reason():
    pair = One(0.3, 0.6)

    def uniform(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(pair.m.expand(len(x)) - 1, pair.m + 1))

    report = quiet(pair.model, uniform, X, num_samples=3, num_reference=2)
    assert set(report.skipped) == {"STL", "score", "DReG"}
    assert "support" in report.skipped["STL"]
    assert "STL does not apply: " in repr(report)
    with pytest.raises(SettingError, match="There is no estimate of"):
        report.find("STL", "guide")


def test_without_a_closed_form_estimator_b_is_estimator_a():
    pair = One(0.3, 0.6)

    def heavy(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(5.0, pair.m.expand(len(x)), pair.log_s.exp()))

    report = quiet(pair.model, heavy, X, num_samples=3, num_reference=2)
    assert set(report.skipped) == {"B"}
    assert "no closed-form KL" in report.skipped["B"]


def test_without_reparameterized_draws_the_score_function_is_left_and_bias_is_unknown():
    pair = One(0.3, 0.6)

    class Fixed(dist.Normal):
        has_rsample = False

        def rsample(self, *args, **kwargs):
            raise NotImplementedError

    def fixed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Fixed(pair.m.expand(len(x)), 0.5))

    report = quiet(pair.model, fixed, X, num_samples=50, num_reference=2)
    assert {item.estimator for item in report.estimates} == {"score"}
    assert math.isnan(report.find("score", "guide").bias)
    assert not report.find("score", "guide").is_biased
    assert "the only one that applies" in report.recommendation


def test_the_report_reads():
    pair = One(0.3, 0.6)
    report = quiet(pair.model, pair.guide, X, num_samples=2, num_reference=2, num_importance_samples=3)
    frame = report.to_pandas()
    assert len(frame) == 12
    assert {"estimator", "group", "bias", "bias_error", "variance", "snr", "seconds", "is_biased"} <= set(frame.columns)
    assert "K = 3" in repr(report)
    assert "<table" in report._repr_html_()


def test_the_generators_and_modes_stay():
    pair = One(0.3, 0.6)
    pair.train()
    state = torch.get_rng_state()
    quiet(pair.model, pair.guide, X, num_samples=2, num_reference=2)
    assert torch.equal(state, torch.get_rng_state())
    assert pair.training
    assert pair.m.grad is None


# --- Bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"num_reference": 0}, "num_reference must be an integer"),
        ({"groups": "site"}, "Unknown groups 'site'"),
        ({"num_data": 0}, "num_data"),
        ({"num_sample": 5}, "Did you mean 'num_samples'"),
        ({"num_particles": 0}, "num_particles"),
    ],
)
def test_settings_out_of_range(settings, message):
    pair = One(0.3, 0.6)
    with pytest.raises(SettingError, match=message):
        quiet(pair.model, pair.guide, X, **settings)


def test_nothing_to_differentiate():
    exact, x = LinearGaussian.fixture()
    with pytest.raises(ParameterError, match="Neither model nor guide has a parameter"):
        quiet(exact.model, exact.guide, x)


def test_a_gradient_that_is_not_finite_names_its_site():
    pair = One(0.3, 0.6)
    with torch.no_grad():
        pair.w.fill_(1e200)
    with pytest.raises(NonFiniteError, match="site 'x'"):
        quiet(pair.model, pair.guide, X, num_samples=2, num_reference=2)


def test_one_moment_of_a_group_is_the_sum_over_its_parameters():
    drawn = GradientMoments(torch.tensor([3.0, 4.0, 9.0]).double(), torch.tensor([1.0, 3.0, 5.0]).double(), 100, 0.5)
    exact = GradientMoments(torch.tensor([3.0, 3.0, 0.0]).double(), torch.tensor([2.0, 2.0, 9.0]).double(), 4, 0.1)
    found = _summarize("A", "guide", torch.tensor([0, 1]), drawn, exact)
    assert found.variance == 4.0
    assert found.bias == 1.0
    assert found.bias_error == pytest.approx(math.sqrt(0.04 + 1.0))
    assert found.norm == pytest.approx(math.sqrt(18 - 1.0))
    assert found.snr == pytest.approx(found.norm / 2)
    assert found.cost == 2.0
