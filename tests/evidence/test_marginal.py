"""The door to the estimators: settings, chunks, progress, and globals in models whose predictive and evidence are known."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from typing_extensions import override

from pyro_aevb import AEVB, log_marginal
from pyro_aevb.errors import DataError, GuideError, ModelError, SettingError, UnreliableWarning
from pyro_aevb.evidence import marginal
from pyro_aevb.evidence.marginal import find_method, make_estimator
from pyro_aevb.evidence.problem import Estimator
from pyro_aevb.evidence.result import Bound, LogMarginal
from pyro_aevb.evidence.rules import rate
from pyro_aevb.mcmc.noise import Stream
from pyro_aevb.program.settings import check_count
from pyro_aevb.testing import GammaPoisson, HierarchicalNormal, LinearGaussian, NormalNormal

quiet = functools.partial(log_marginal, progress=False, seed=0)


@dataclass(frozen=True, kw_only=True)
class Line(Estimator):
    """The trapezoid rule for rows of one latent: an estimator without noise, which shows what the door does with any."""

    method: ClassVar[str] = "line"
    presets: ClassVar = {"coarse": {"num_points": 101}, "wide": {"reach": 30.0}}

    num_points: int = 2001
    reach: float = 12.0

    def __post_init__(self) -> None:
        check_count("num_points", self.num_points)

    @property
    @override
    def draws_per_row(self) -> int:
        return self.num_points

    @override
    def estimate(self, problem):
        density = problem.density
        u = torch.linspace(-self.reach, self.reach, self.num_points, dtype=density.dtype)
        problem.advance(0.5)
        log_joint = density.log_joint(u[:, None, None].expand(-1, density.num_rows, 1)).double()
        problem.advance(0.5)
        value = log_joint.logsumexp(0) + math.log(2 * self.reach / (self.num_points - 1))
        nothing, error = torch.full_like(value, math.nan), torch.zeros_like(value)
        return LogMarginal(
            value=value,
            standard_error=error,
            lower=nothing,
            upper=nothing,
            k_hat=nothing,
            ess=torch.full_like(value, self.num_points),
            status=rate(error),
            method=self.method,
            num_samples=self.num_points,
            bound=Bound.LOWER,
        )


@dataclass(frozen=True, kw_only=True)
class Chains(Estimator):
    """An estimator with the counts of one that draws from the posterior; its value is one random number of the row."""

    method: ClassVar[str] = "chains"

    num_chains: int = 4
    num_draws: int = 50

    @property
    @override
    def draws_per_row(self) -> int:
        return self.num_chains

    @override
    def estimate(self, problem):
        value = problem.noise.normal(Stream.PROPOSAL, 0, 1, 1)[0, :, 0].double()
        error = torch.full_like(value, 0.1)
        return LogMarginal(
            value=value,
            standard_error=error,
            lower=value,
            upper=value,
            k_hat=value * math.nan,
            ess=error,
            status=rate(error),
            method=self.method,
            num_samples=self.num_chains * self.num_draws,
            bound=Bound.ESTIMATE,
        )


@pytest.fixture(autouse=True)
def _register(monkeypatch):
    for estimator in (Line, Chains):
        monkeypatch.setitem(marginal.METHODS, estimator.method, estimator)


class TestSettings:
    exact, x = GammaPoisson.fixture()

    def run(self, **settings):
        return quiet(self.exact.model, self.exact.guide, self.x, **settings)

    def test_an_unknown_method_lists_the_known(self):
        with pytest.raises(SettingError, match=r"'aiss'.*'importance'"):
            self.run(method="aiss")
        with pytest.raises(SettingError, match=r"'aiss'.*'importance'"):
            find_method("aiss")

    @pytest.mark.parametrize(
        ("method", "name", "nearest"),
        [
            ("importance", "num_sample", "num_samples"),
            ("importance", "propsal", "proposal"),
            ("line", "num_point", "num_points"),
            ("line", "chunksize", "chunk_size"),
            ("chains", "num_drawz", "num_draws"),
        ],
    )
    def test_a_misspelt_setting_is_told_with_the_nearest_of_that_method(self, method, name, nearest):
        with pytest.raises(SettingError, match=f"no setting '{name}'. Did you mean '{nearest}'"):
            self.run(method=method, **{name: 3})

    def test_a_setting_of_another_method_is_refused(self):
        with pytest.raises(SettingError, match="no setting 'num_points'"):
            self.run(method="importance", num_points=3)

    def test_a_preset_sets_what_is_not_given(self):
        assert make_estimator("line", None, None, {}) == Line()
        assert make_estimator("line", "coarse", None, {}) == Line(num_points=101)
        assert make_estimator("line", "coarse", None, {"num_points": 7}) == Line(num_points=7)
        assert make_estimator("line", "wide", None, {"num_points": 7}) == Line(num_points=7, reach=30.0)
        assert Line.preset("wide", num_points=9) == Line(num_points=9, reach=30.0)
        assert self.run(method="line", preset="coarse").num_samples == 101

    def test_an_unknown_preset_lists_the_known(self):
        with pytest.raises(SettingError, match=r"'line' has no preset 'fine'; known are 'coarse', 'wide'"):
            self.run(method="line", preset="fine")
        with pytest.raises(SettingError, match=r"'importance' has no preset 'fine'; it has none"):
            self.run(preset="fine")

    def test_a_number_of_samples_is_the_methods_own(self):
        assert make_estimator("importance", None, 7, {}).num_samples == 7
        assert make_estimator("chains", None, 80, {}) == Chains(num_draws=20)
        assert make_estimator("chains", None, 80, {"num_chains": 8}) == Chains(num_chains=8, num_draws=10)
        with pytest.raises(SettingError, match=r"multiple of num_chains = 4, got 81"):
            self.run(method="chains", num_samples=81)
        with pytest.raises(SettingError, match=r"'line' has no num_samples, got 5: its counts are num_points"):
            self.run(method="line", num_samples=5)

    @pytest.mark.parametrize("name", ["num_samples", "num_global_samples", "chunk_size", "num_points"])
    @pytest.mark.parametrize("count", [0, -1])
    def test_counts_are_at_least_one(self, name, count):
        with pytest.raises(SettingError, match=rf"{name} must be an integer of at least 1, got {count}"):
            self.run(method="line" if name == "num_points" else "importance", **{name: count})

    def test_tensors_are_the_models_own_keyword_arguments(self):
        def model(x, num_points):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(num_points, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x, loc = torch.zeros(3).double(), torch.tensor([0.0, 1.0, 2.0]).double()
        result = log_marginal(model, None, x, method="line", num_points=loc, progress=False)
        assert torch.allclose(result.value, dist.Normal(loc, 2**0.5).log_prob(x), atol=1e-9)

    def test_the_wrapper_takes_the_methods_settings(self):
        vi = AEVB(self.exact.model, self.exact.guide)
        result = vi.log_marginal(self.x, method="line", num_points=4001, seed=0, progress=False)
        assert result.num_samples == 4001
        with pytest.raises(SettingError, match="Did you mean 'num_points'"):
            vi.log_marginal(self.x, method="line", num_point=3)


class TestGuides:
    exact, x = GammaPoisson.fixture()

    def test_none_will_do_for_methods_without_one(self):
        result = quiet(self.exact.model, None, self.x, method="line")
        assert torch.allclose(result.value, self.exact.log_marginal(self.x), rtol=0, atol=1e-7)

    def test_none_is_refused_by_methods_that_draw_from_it(self):
        with pytest.raises(SettingError, match=r"'importance' draws from a guide.*'quadrature'"):
            quiet(self.exact.model, None, self.x)

    @pytest.mark.parametrize("method", ["importance", "ais", "bridge", "line"])
    def test_a_guide_for_another_model_is_refused(self, method):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("other", dist.Gamma(x.new_ones(()), 1.0))

        with pytest.raises(GuideError):
            quiet(self.exact.model, guide, self.x, method=method)

    @pytest.mark.parametrize("method", ["importance", "line"])
    def test_no_rows_are_refused(self, method):
        with pytest.raises(DataError, match="no rows"):
            quiet(self.exact.model, self.exact.guide, self.x[:0], method=method)

    def test_globals_need_a_guide(self):
        exact, x = NormalNormal.fixture()
        with pytest.raises(ModelError, match=r"\['g'\] lie outside the data plate 'data'.*pyro.condition"):
            quiet(exact.model, None, x, method="line")
        conditioned = pyro.condition(exact.model, data={"g": torch.tensor(0.5).double()})
        result = quiet(conditioned, None, x, method="line")
        spread = math.hypot(exact.local_scale, exact.noise_scale)
        assert torch.allclose(result.value, dist.Normal(0.5, spread).log_prob(x), atol=1e-9)


class TestChunks:
    exact, _ = GammaPoisson.fixture()
    x = exact.simulate(23, seed=1)[0]

    @pytest.mark.parametrize("chunk_size", [1, 7, 23, 100, None])
    def test_rows_keep_their_order_and_place(self, chunk_size):
        result = quiet(self.exact.model, self.exact.guide, self.x, method="line", chunk_size=chunk_size)
        assert torch.allclose(result.value, self.exact.log_marginal(self.x), rtol=0, atol=1e-7)

    def test_chunks_change_no_random_number(self):
        def run(chunk_size, seed=0):
            model, guide = self.exact.model, self.exact.guide
            return log_marginal(
                model, guide, self.x, method="chains", chunk_size=chunk_size, seed=seed, progress=False
            ).value

        assert torch.equal(run(None), run(7))
        assert torch.equal(run(7), run(1))
        assert not torch.equal(run(7), run(7, seed=1))
        assert len(set(run(None).tolist())) == len(self.x)

    def test_one_seed_leaves_the_generators_as_they_were(self):
        before = torch.get_rng_state()
        quiet(self.exact.model, self.exact.guide, self.x, method="chains")
        assert torch.equal(before, torch.get_rng_state())

    def test_without_a_seed_two_runs_differ(self):
        settings = {"method": "chains", "progress": False}
        runs = [log_marginal(self.exact.model, self.exact.guide, self.x, **settings).value for _ in range(2)]
        assert not torch.equal(*runs)

    def test_chunks_bound_what_is_in_memory(self):
        rows = []

        def model(x):
            rows.append(len(x))
            self.exact.model(x)

        quiet(model, None, self.x, method="line", chunk_size=4)
        assert rows.count(4) >= 5
        rows.clear()
        quiet(
            model, None, self.x.repeat(3, 1) if self.x.dim() > 1 else self.x.repeat(3), method="line", num_points=10_000
        )
        assert rows.count(5) >= 13

    def test_a_model_that_draws_its_own_rows_runs_in_padded_chunks(self):
        exact = LinearGaussian.fixture()[0]

        def model(x):
            with pyro.plate("data", len(x), subsample_size=4) as index:
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        x = exact.simulate(10, seed=1)[0][:, 0]
        result = quiet(model, None, x, method="line")
        assert torch.allclose(result.value, dist.Normal(0.0, 2**0.5).log_prob(x), atol=1e-9)

    def test_the_bar_counts_rows_and_moves_within_a_chunk(self, capsys, monkeypatch):
        monkeypatch.setenv("TQDM_MININTERVAL", "0")
        log_marginal(self.exact.model, self.exact.guide, self.x, method="line", progress=True)
        shown = capsys.readouterr().err
        assert "23/23 rows" in shown
        quiet(self.exact.model, self.exact.guide, self.x, method="line")
        assert capsys.readouterr().err == ""


class TestGlobals:
    exact, data = NormalNormal.fixture()

    def run(self, x, **settings):
        guide = functools.partial(self.exact.guide, data=self.data)
        settings = {"method": "line", "num_points": 401} | settings
        return quiet(self.exact.model, guide, x, **settings)

    def test_a_rows_value_is_its_predictive_density(self):
        new = torch.tensor([-3.0, 0.0, 0.7, 2.0]).double()
        result = self.run(new, num_global_samples=400)
        error = (result.value - self.exact.log_predictive(new, self.data)).abs()
        assert (error < 4.5 * result.standard_error).all()
        assert (result.standard_error > 0).all()
        assert result.label == "log predictive under q(globals)"

    @pytest.mark.parametrize("method", ["line", "importance"])
    @pytest.mark.parametrize("num_global_samples", [1, 2, 30])
    @pytest.mark.filterwarnings("ignore::pyro_aevb.errors.UnreliableWarning")
    def test_with_exact_posteriors_every_draw_gives_the_joint_evidence(self, method, num_global_samples):
        guide = functools.partial(self.exact.guide, data=self.data)
        result = quiet(self.exact.model, guide, self.data, method=method, num_global_samples=num_global_samples)
        assert result.joint.value == pytest.approx(self.exact.log_marginal(self.data).item(), abs=1e-7)
        assert result.joint.num_global_samples == num_global_samples
        assert result.joint.bound is Bound.LOWER
        # another quantity than the sum of the rows' predictive densities
        assert abs(result.value.sum().item() - result.joint.value) > 0.1

    @pytest.mark.filterwarnings("ignore::pyro_aevb.errors.UnreliableWarning")
    def test_with_a_wide_guide_the_error_is_that_of_the_joint_evidence(self):
        def guide(x):
            mean, variance = self.exact._global_posterior(self.data)
            g = pyro.sample("g", dist.Normal(mean + 0.1, 1.3 * math.sqrt(variance)))
            slope, variance = self.exact._local_posterior()
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(slope * g + (1 - slope) * x, 1.1 * math.sqrt(variance)))

        truth = self.exact.log_marginal(self.data).item()
        z = []
        for seed in range(30):
            settings = {"num_samples": 100, "num_global_samples": 60, "seed": seed}
            joint = quiet(self.exact.model, guide, self.data, **settings).joint
            z.append((joint.value - truth) / joint.standard_error)
        z = torch.tensor(z)
        # 30 draws of about a Student t of 59 degrees of freedom: 4.5 standard errors of their mean and spread
        assert abs(z.mean().item()) < 4.5 / math.sqrt(30)
        assert abs(z.std().item() - 1) < 4.5 / math.sqrt(60)

    @pytest.mark.parametrize("chunk_size", [1, 3])
    def test_chunks_change_nothing(self, chunk_size):
        whole = self.run(self.data, num_global_samples=5)
        parts = self.run(self.data, num_global_samples=5, chunk_size=chunk_size)
        assert torch.allclose(parts.value, whole.value, rtol=0, atol=1e-10)
        assert parts.joint.value == pytest.approx(whole.joint.value, abs=1e-10)

    def test_the_joint_of_the_chunks_is_that_of_all_rows(self):
        guide = functools.partial(self.exact.guide, data=self.data)
        results = [
            quiet(self.exact.model, guide, self.data, num_samples=20, num_global_samples=4, chunk_size=chunk_size)
            for chunk_size in (1, 3, 8)
        ]
        for result in results:
            assert result.joint.value == pytest.approx(self.exact.log_marginal(self.data).item(), abs=1e-7)

    def test_constrained_globals_of_several_sites(self):
        exact, x = HierarchicalNormal.fixture()
        result = quiet(exact.model, exact.guide, x, method="line", num_points=801, reach=8.0, num_global_samples=3)
        assert result.joint.value == pytest.approx(exact.log_marginal(x).item(), abs=1e-5)

    def test_the_summary_shows_both_quantities(self):
        text = repr(self.run(self.data, num_global_samples=5))
        assert "log predictive under q(globals)" in text
        assert "joint log evidence" in text
        assert "stochastic lower bound" in text

    def test_without_globals_there_is_none(self):
        exact, x = GammaPoisson.fixture()
        assert quiet(exact.model, exact.guide, x, method="line").joint is None
        assert quiet(exact.model, exact.guide, x).joint is None

    def test_the_whole_model_as_one_row(self):
        result = quiet(self.exact.model, self.exact.guide, self.data, data_plate=None, num_samples=200)
        assert result.joint is None
        assert result.label == "joint log evidence"


@pytest.mark.filterwarnings("ignore::pyro_aevb.errors.UnreliableWarning")
class TestFitted:
    @pytest.mark.slow
    def test_it_needs_no_guide_and_agrees_with_the_closed_form(self):
        exact = LinearGaussian.fixture()[0]
        x = exact.simulate(20, seed=2)[0]
        result = quiet(exact.model, None, x, proposal="fitted", num_samples=2000)
        z = (result.value - exact.log_marginal(x)) / result.standard_error
        assert z.abs().max() < 5
        assert result.standard_error.max() < 0.05
        assert set(result.status) == {"ok"}
        assert result.r_hat is not None

    def test_the_proposal_is_one_of_two(self):
        with pytest.raises(SettingError, match="'guide' or 'fitted', got 'prior'"):
            make_estimator("importance", None, None, {"proposal": "prior"})


def test_unreliable_rows_are_told_once():
    exact = LinearGaussian.fixture()[0]
    x = exact.simulate(10, seed=3)[0]
    with pytest.warns(UnreliableWarning, match=r"use a better guide") as record:
        quiet(exact.model, exact.mean_field_guide(), x, num_samples=300)
    assert len(record) == 1
