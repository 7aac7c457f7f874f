"""p(x_missing | x_observed): exact conditionals of Gaussian and discrete models, with right and wrong guides."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import nn

from pyro_aevb import AEVB, impute
from pyro_aevb.errors import DataError, ModelError, SettingError, UnreliableWarning
from pyro_aevb.testing import BetaBinomial, LinearGaussian, LinearGaussianStateSpace, NormalNormal

impute = functools.partial(impute, progress=False, seed=0)
NAN = float("nan")
LIMIT = 4.5
"""Standard errors that a right estimate stays within: fewer than one in 100,000 lie outside, over some 500 comparisons."""


def hidden(x, known):
    return torch.where(known, x, torch.full_like(x, NAN))


def gaussian():
    """Four rows of six pixels: one known in part, one as a pattern, one wholly, one not at all."""
    exact = LinearGaussian.fixture()[0]
    x = exact.simulate(4, seed=1)[0]
    known = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1], [1] * 6, [0] * 6]).bool()
    return exact, x, known


def shifted_guide(exact, shift=0.3, width=1.5):
    """A guide that is off the posterior by a shift and too wide, as a trained one may be."""

    def guide(x):
        q = exact.posterior(x)["z"]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(q.loc + shift, scale_tril=width * q.scale_tril))

    return guide


def conditional(mean, covariance, x, known):
    """Mean and covariance of the missing entries of one normal row given the known ones."""
    gain = torch.linalg.solve(covariance[known][:, known], covariance[known][:, ~known]).T
    rest = covariance[~known][:, ~known] - gain @ covariance[known][:, ~known]
    return mean[~known] + gain @ (x - mean)[known], rest


def worst_error(draws, mean, covariance):
    """Largest deviation of the sample mean and covariance, in standard errors."""
    count, scale = len(draws), covariance.diagonal().sqrt()
    errors = (draws.mean(0) - mean).abs() / scale * math.sqrt(count)
    spread = (covariance**2 + torch.outer(scale, scale) ** 2).sqrt() / math.sqrt(count)
    centred = draws - mean
    return max(errors.max(), ((centred.T @ centred / count - covariance).abs() / spread).max()).item()


def row_errors(draws, exact, x, known):
    covariance = exact.weight @ exact.weight.T + exact.noise_variance.diag()
    return [
        worst_error(draws[:, row][:, ~known[row]], *conditional(exact.bias, covariance, x[row], known[row]))
        for row in range(len(x))
        if not known[row].all()
    ]


@functools.cache
def corrected():
    """One run with a wrong guide, which two tests look at."""
    exact, x, known = gaussian()
    settings = {"observed": known, "num_samples": 2500, "num_steps": 120}
    return impute(exact.model, shifted_guide(exact), hidden(x, known), **settings)


class TestGibbs:
    def test_an_exact_guide_gives_the_exact_conditional_and_rejects_nothing(self):
        exact, x, known = gaussian()
        result = impute(exact.model, exact.guide, hidden(x, known), observed=known, num_samples=2500, num_steps=30)
        assert result.method == "gibbs"
        assert max(row_errors(result.samples["x"], exact, x, known)) < LIMIT
        assert torch.allclose(result.acceptance, torch.ones(4))
        assert not result.is_flagged.any()

    def test_a_wrong_guide_gives_the_exact_conditional_too(self):
        exact, x, known = gaussian()
        result = corrected()
        assert max(row_errors(result.samples["x"], exact, x, known)) < LIMIT
        assert (result.acceptance < 0.9).all()

    def test_without_the_correction_a_wrong_guide_gives_something_else(self):
        exact, x, known = gaussian()
        settings = {"observed": known, "num_samples": 2500, "num_steps": 0, "warmup_steps": 60}
        result = impute(exact.model, shifted_guide(exact), hidden(x, known), **settings)
        assert min(row_errors(result.samples["x"], exact, x, known)) > 2 * LIMIT
        assert result.acceptance.isnan().all()

    def test_latents_are_draws_given_what_is_known(self):
        exact, x, known = gaussian()
        z = corrected().latents["z"]
        assert z.shape == (2500, 4, 3)
        for row in range(4):
            seen = known[row]
            scaled = exact.weight[seen].T / exact.noise_variance[seen]
            covariance = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + scaled @ exact.weight[seen])
            mean = covariance @ scaled @ (x[row] - exact.bias)[seen]
            assert worst_error(z[:, row], mean, covariance) < LIMIT

    def test_two_latents_one_given_the_other_are_accepted_together(self):
        def model(x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(torch.stack([a, b, a + b], -1), 0.5).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                # precision of (a, b) given x: [[10, 3], [3, 9]]; this is off by 0.1 and a third too wide
                h = 4 * (x[:, :2] + x[:, 2:])
                a = pyro.sample("a", dist.Normal((h[:, 0] - h[:, 1] / 3) / 9 + 0.1, 0.45))
                pyro.sample("b", dist.Normal((h[:, 1] - 3 * a) / 9 + 0.1, 0.45))

        mixing = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
        covariance = mixing @ mixing.T + 0.25 * torch.eye(3)
        x, known = torch.tensor([[1.0, -0.5, 0.3]]), torch.tensor([[True, False, False]])
        draws = impute(model, guide, hidden(x, known), observed=known, num_samples=2500, num_steps=100).samples["x"]
        assert worst_error(draws[:, 0, 1:], *conditional(torch.zeros(3), covariance, x[0], known[0])) < LIMIT

    @pytest.mark.parametrize("shift", [0.0, 1.0])
    def test_counts(self, shift):
        exact = BetaBinomial(num_counts=3)
        x = torch.tensor([[7.0, 2.0, NAN], [NAN, NAN, NAN]], dtype=torch.float64)

        def guide(x):
            a, b = exact._concentrations(x)
            with pyro.plate("data", len(x)):
                pyro.sample("probability", dist.Beta(a + shift, b + shift))

        draws = impute(exact.model, guide, x, observed=~x.isnan(), num_samples=2500, num_steps=60).samples["x"][:, :, 2]
        for row, (a, b) in enumerate([(2 + 9, 3 + 11), (2, 3)]):
            expected = 2500 * stats.betabinom(10, a, b).pmf(range(11))
            found = torch.bincount(draws[:, row].long(), minlength=11).numpy()
            # the rarest counts are joined, or the statistic would not follow its law
            common = expected > 5
            pairs = [(found[common], expected[common]), ([found[~common].sum()], [expected[~common].sum()])]
            statistic = sum(
                ((a - b) ** 2 / b).sum() if len(a) > 1 else (a[0] - b[0]) ** 2 / max(b[0], 1) for a, b in pairs
            )
            assert stats.chi2(common.sum()).sf(statistic) > 1e-5

    def test_binary_pixels_of_a_decoder(self):
        """The oracle sums over a fine grid of the latent."""
        torch.manual_seed(1)
        decoder = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4))
        with torch.no_grad():
            decoder[2].weight *= 6.0

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.2 * (x.sum(-1, keepdim=True) - 2), 1.2).to_event(1))

        x, known = torch.tensor([[1.0, 0.0, NAN, NAN], [0.0, NAN, NAN, 1.0]]), None
        known = ~x.isnan()
        draws = impute(model, guide, x, observed=known, num_samples=2500, num_steps=100).samples["x"]
        z = torch.linspace(-6.0, 6.0, 2001)[:, None]
        pixels = dist.Bernoulli(logits=decoder(z).detach())
        for row in range(2):
            log_joint = dist.Normal(0.0, 1.0).log_prob(z[:, 0])
            log_joint = log_joint + pixels.log_prob(x[row].nan_to_num())[:, known[row]].sum(-1)
            weights = log_joint.softmax(0)
            p = pixels.probs[:, ~known[row]]
            pairs = draws[:, row][:, ~known[row]]
            for value, expected in ((pairs, weights @ p), (pairs.prod(-1), weights @ p.prod(-1))):
                error = (expected * (1 - expected) / 2500).sqrt()
                assert ((value.mean(0) - expected).abs() < LIMIT * error).all()

    def test_integer_data_get_their_most_frequent_draw(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                probs = torch.tensor([0.1, 0.1, 0.8]).expand(*z.shape, 2, 3)
                pyro.sample("x", dist.Categorical(probs).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

        result = impute(model, guide, torch.tensor([[0, 0]]), observed=torch.tensor([[True, False]]), num_steps=5)
        assert result.filled.tolist() == [[0, 2]]
        assert result.filled.dtype == torch.long
        assert result.mean["x"][0, 1].item() == pytest.approx(1.7, abs=0.3)


class TestWhereEntriesAre:
    @pytest.mark.parametrize("dims", [(-2, -1), (-1, -2)])
    def test_inner_plates_in_any_order(self, dims):
        """x[n, i] = z[n] + noise, so that E[x_missing | x_known] = sum of the known / (known + 1)."""

        def run(x, *, site):
            with pyro.plate("data", len(x), dim=dims[0]):
                shape = (len(x), *[1] * (-1 - dims[0]))
                count = x.shape[1]
                if site == "guide":
                    return pyro.sample("z", dist.Normal(x.sum(1).reshape(shape) / (count + 1), (count + 1) ** -0.5))
                z = pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0))
                with pyro.plate("inner", count, dim=dims[1]):
                    return pyro.sample("x", dist.Normal(z, 1.0), obs=x if dims[0] == -2 else x.T)

        x = torch.tensor([[2.0, 1.0, NAN], [NAN, NAN, -3.0]])
        model, guide = (functools.partial(run, site=site) for site in ("model", "guide"))
        result = impute(model, guide, x, observed=~x.isnan(), num_samples=4000, num_steps=30)
        assert result.samples["x"].shape == (4000, 2, 3)
        expected = torch.tensor([[2.0, 1.0, 1.0], [-1.5, -1.5, -3.0]])
        assert (result.filled - expected).abs().max() < LIMIT * math.sqrt(1.5 / 4000)

    def test_a_series_of_sites_that_share_one_argument(self):
        exact, x = LinearGaussianStateSpace.fixture()
        known = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 0, 1]]).bool()
        result = impute(exact.model, exact.guide, hidden(x, known), observed=known, num_samples=2000, num_steps=20)
        assert set(result.samples) == {f"x_{t}" for t in range(1, 6)}
        loadings = torch.tensor([[0.9 ** (t - s) if s <= t else 0.0 for s in range(5)] for t in range(5)])
        scales = torch.tensor([1.0, 0.25, 0.25, 0.25, 0.25])
        covariance = ((loadings * scales) @ loadings.T + 0.09 * torch.eye(5)).double()
        draws = torch.stack([result.samples[f"x_{t}"] for t in range(1, 6)], -1)
        zeros = torch.zeros(5, dtype=torch.float64)
        for row in range(3):
            moments = conditional(zeros, covariance, x[row], known[row])
            assert worst_error(draws[:, row][:, ~known[row]], *moments) < LIMIT
        assert torch.equal(result.filled[known], x[known])
        assert torch.allclose(result.filled, draws.mean(0), atol=1e-6)

    def test_masks_by_site_and_sites_left_out(self):
        def model(x, y):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                pyro.sample("y", dist.Normal(-z, 1.0), obs=y)

        def guide(x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x - y) / 3, 3**-0.5))

        x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, NAN])
        settings = {"num_samples": 4000, "num_steps": 20}
        result = impute(model, guide, x, y=y, observed={"y": ~y.isnan()}, **settings)
        assert set(result.samples) == {"y"}
        assert (result.filled - torch.tensor([3.0, -1.0])).abs().max() < LIMIT * math.sqrt(1.5 / 4000)
        both = impute(model, guide, x, y, observed={"x": torch.tensor([True, False]), "y": ~y.isnan()}, **settings)
        assert both.filled is None
        assert both.mean["y"][1].abs() < LIMIT * math.sqrt(2 / 4000)

    def test_values_computed_from_the_batch_go_back_by_to_batch(self):
        def model(grey):
            with pyro.plate("data", len(grey)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=grey / 10)

        def guide(grey):
            with pyro.plate("data", len(grey)):
                pyro.sample("z", dist.Normal(grey.sum(-1) / 30, 3**-0.5))

        grey = torch.tensor([[20.0, NAN]])
        settings = {"observed": ~grey.isnan(), "num_samples": 4000, "num_steps": 20}
        result = impute(model, guide, grey, to_batch=lambda values, args, kwargs: ((values["x"] * 10,), {}), **settings)
        assert result.filled[0, 0] == 2.0
        assert result.filled[0, 1].item() == pytest.approx(1.0, abs=LIMIT * math.sqrt(1.5 / 4000))
        with pytest.raises(ModelError, match="to_batch"):
            impute(model, guide, grey, **settings)

    def test_a_plate_sized_by_the_whole_data_set(self):
        def run(x, *, site):
            with pyro.plate("data", 1000, subsample_size=len(x)):
                if site == "guide":
                    return pyro.sample("z", dist.Normal(x.sum(-1) / 3, 3**-0.5))
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                return pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=x)

        model, guide = (functools.partial(run, site=site) for site in ("model", "guide"))
        x = torch.tensor([[2.0, NAN], [-1.0, NAN], [0.0, 1.0]])
        result = impute(model, guide, x, observed=~x.isnan(), num_samples=900, num_steps=20)
        expected = torch.tensor([[2.0, 1.0], [-1.0, -0.5], [0.0, 1.0]])
        assert (result.filled - expected).abs().max() < LIMIT * math.sqrt(1.5 / 900)


class TestGlobals:
    def test_missing_rows_are_predicted_under_the_guide_of_the_globals(self):
        exact, data = NormalNormal.fixture()
        x = torch.cat([data, torch.full((1,), NAN, dtype=torch.float64)])
        guide = functools.partial(exact.guide, data=data)
        settings = {"num_samples": 400, "num_global_samples": 40, "num_steps": 2, "warmup_steps": 1}
        result = impute(exact.model, guide, x, observed=~x.isnan(), **settings)
        assert result.samples["x"].shape == (400, 9)
        assert result.latents["g"].shape == (400,)
        assert len(result.latents["g"].unique()) == 40
        mean, variance = exact._global_posterior(data)
        local = exact.local_scale**2 + exact.noise_scale**2
        error = math.sqrt(variance / 40 + local / 400)
        assert abs(result.filled[-1] - mean) < LIMIT * error
        # draws stay with their own globals
        residual = result.samples["x"][:, -1] - result.latents["g"]
        assert abs(residual.var() - local) < LIMIT * local * math.sqrt(2 / 400)
        z = result.latents["z"][:, -1] - result.latents["g"]
        assert abs(z.var() - exact.local_scale**2) < LIMIT * exact.local_scale**2 * math.sqrt(2 / 400)

    @pytest.mark.parametrize(("num_samples", "num_globals", "distinct"), [(3, 10, 3), (7, 3, 3), (4, 1, 1)])
    def test_draws_share_globals_evenly(self, num_samples, num_globals, distinct):
        exact, x = NormalNormal.fixture()
        known = torch.arange(8) < 4
        settings = {"num_samples": num_samples, "num_global_samples": num_globals, "num_steps": 2, "chunk_size": 3}
        g = impute(exact.model, exact.guide, hidden(x, known), observed=known, **settings).latents["g"]
        counts = g.unique(return_counts=True)[1]
        assert (len(g), len(counts)) == (num_samples, distinct)
        assert counts.max() - counts.min() <= 1


def pixels(exact, *, downstream=False):
    """The linear-Gaussian model with a plate of pixels and a mask, and a guide that knows only that pixels may miss."""

    def model(x, mask):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
            with pyro.plate("pixels", 6, dim=-1):
                loc = (z @ exact.weight.T).squeeze(-2) + exact.bias
                pyro.sample("x", dist.Normal(loc, exact.noise_variance.sqrt()), obs=x, obs_mask=mask)

    def guide(x, mask):
        seen = torch.where(mask, x - exact.bias, 0.0)
        scaled = exact.weight.T / exact.noise_variance
        precision = torch.eye(3, dtype=x.dtype) + (scaled * mask[:, None, :].to(x.dtype)) @ exact.weight
        mean = torch.linalg.solve(precision, (seen @ scaled.T)[..., None])[..., 0] + 0.2
        with pyro.plate("data", len(x), dim=-2):
            wide = dist.MultivariateNormal(mean[:, None, :], precision_matrix=precision[:, None] / 1.7)
            pyro.sample("z", wide)

    return model, guide


class TestMask:
    @pytest.mark.parametrize("gives_mask", [True, False])
    def test_one_pass_for_a_model_with_a_mask(self, gives_mask):
        exact, x, known = gaussian()
        model, guide = pixels(exact)
        settings = {"num_samples": 2000, "num_importance_samples": 20_000, "observed": known if gives_mask else None}
        result = impute(model, guide, hidden(x, known), known, **settings)
        assert result.method == "mask"
        assert set(result.samples) == {"x"}
        # resampling repeats draws, so that there are fewer independent ones: at most a tenth here
        assert max(row_errors(result.samples["x"], exact, x, known)) < 1.2 * LIMIT
        assert not result.is_flagged.any()
        assert ((result.ess > 1000) & (result.ess < 19_000)).all()
        assert result.acceptance.isnan().all()

    def test_the_weights_matter(self):
        exact, x, known = gaussian()
        model, guide = pixels(exact)
        with pytest.warns(UnreliableWarning):
            result = impute(model, guide, hidden(x, known), known, num_samples=2000, num_importance_samples=1)
        assert min(row_errors(result.samples["x"], exact, x, known)) > 2 * LIMIT

    def test_entries_coded_as_nan(self):
        exact, x, known = gaussian()

        def model(x):
            with pyro.plate("data", len(x), dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
                with pyro.plate("pixels", 6, dim=-1), poutine.mask(mask=~x.isnan()):
                    loc = (z @ exact.weight.T).squeeze(-2) + exact.bias
                    pyro.sample("x", dist.Normal(loc, exact.noise_variance.sqrt()), obs=x)

        with_mask = pixels(exact)[1]

        def guide(x):
            with_mask(x, ~x.isnan())

        x = hidden(x, known)
        result = impute(model, guide, x, num_samples=2000, num_importance_samples=20_000)
        assert torch.equal(result.observed["x"], known)
        assert torch.equal(result.filled[known], x[known])
        assert max(row_errors(result.samples["x"], exact, x, known)) < 1.2 * LIMIT

    def test_what_the_mask_hides_and_something_else_reads_is_a_latent(self):
        """y = x + noise, x missing: p(x | y) = N(y / 2, 1 / 2)."""

        def model(x, y, mask):
            with pyro.plate("data", len(x)):
                value = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x, obs_mask=mask)
                pyro.sample("y", dist.Normal(value, 1.0), obs=y)

        def guide(x, y, mask):
            with pyro.plate("data", len(x)), poutine.mask(mask=~mask):
                pyro.sample("x_unobserved", dist.Normal(y / 2 + 0.3, 0.9))

        x, y = torch.tensor([1.0, NAN]), torch.tensor([2.0, 2.0])
        settings = {"num_samples": 2000, "num_importance_samples": 20_000}
        result = impute(model, guide, x, y, ~x.isnan(), observed={"x": ~x.isnan()}, **settings)
        assert worst_error(result.samples["x"][:, 1:], torch.ones(1), torch.full((1, 1), 0.5)) < 1.2 * LIMIT
        assert (result.samples["x"][:, 0] == 1.0).all()

    def test_what_the_model_counts_needs_a_chain(self):
        exact, x, known = gaussian()
        model, guide = pixels(exact)
        every = torch.ones_like(known)
        settings = {"num_samples": 1000, "num_steps": 50, "observed": known}
        result = impute(model, guide, hidden(x, known), every, **settings)
        assert result.method == "gibbs"
        assert max(row_errors(result.samples["x"], exact, x, known)) < LIMIT
        with pytest.raises(SettingError, match="lets some of them count"):
            impute(model, guide, hidden(x, known), every, method="mask", observed=known)

    def test_uneven_weights_are_told(self):
        exact, x, known = gaussian()
        model, _ = pixels(exact)

        def far(x, mask):
            with pyro.plate("data", len(x), dim=-2):
                pyro.sample("z", dist.Normal(torch.full((len(x), 1, 3), 2.0, dtype=x.dtype), 0.2).to_event(1))

        with pytest.warns(UnreliableWarning, match="too uneven"):
            assert impute(model, far, hidden(x, known), known).is_flagged.any()


class TestContract:
    def run(self, **settings):
        exact, x, known = gaussian()
        settings = {"num_samples": 20, "num_steps": 5, "observed": known} | settings
        return impute(exact.model, exact.guide, hidden(x, known), **settings)

    def test_known_entries_stay_bit_for_bit_and_nothing_is_nan(self):
        _, x, known = gaussian()
        result = self.run()
        for value in (*result.samples["x"], result.filled, result.mean["x"]):
            assert torch.equal(value[known], x[known])
            assert value.isfinite().all()
        assert (result.std["x"][known] == 0).all()
        assert (result.std["x"][~known] > 0).all()
        assert torch.allclose(result.std["x"][~known], result.samples["x"].std(0)[~known])
        assert torch.equal(result.filled, result.mean["x"])
        assert "20 draws of 12 missing entries in 4 rows" in repr(result)

    @pytest.mark.parametrize("junk", [NAN, math.inf, -1e30, 7.0])
    def test_what_stands_in_a_missing_entry_does_not_matter(self, junk):
        exact, x, known = gaussian()
        dirty = torch.where(known, x, torch.full_like(x, junk))
        result = impute(exact.model, exact.guide, dirty, observed=known, num_samples=20, num_steps=5)
        assert torch.equal(result.samples["x"], self.run().samples["x"])

    def test_the_batch_is_left_alone(self):
        exact, x, known = gaussian()
        before = x.clone()
        impute(exact.model, exact.guide, x, observed=known, num_samples=2, num_steps=2)
        assert torch.equal(x, before)

    def test_a_seed_reproduces_and_leaves_the_generators(self):
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        assert torch.equal(self.run().samples["x"], self.run().samples["x"])
        assert not torch.equal(self.run(seed=1).samples["x"], self.run().samples["x"])
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.parametrize("chunk_size", [1, 3])
    def test_chunks_are_joined_in_order(self, chunk_size):
        exact, x, known = gaussian()
        result = self.run(chunk_size=chunk_size, num_samples=1000, num_steps=20)
        assert max(row_errors(result.samples["x"], exact, x, known)) < LIMIT
        assert result.latents["z"].shape == (1000, 4, 3)
        assert result.acceptance.shape == (4,)

    def test_a_chain_that_does_not_move_is_told(self):
        exact, x, known = gaussian()
        far = shifted_guide(exact, shift=0.0, width=30.0)
        with pytest.warns(UnreliableWarning, match="[34] of 4 rows .* less than 1 %"):
            result = impute(exact.model, far, hidden(x, known), observed=known, num_samples=5)
        assert (result.acceptance[result.is_flagged] < 0.01).all()

    def test_the_wrapper(self):
        exact, x, known = gaussian()
        vi = AEVB(exact.model, exact.guide)
        settings = {"num_samples": 20, "num_steps": 5, "seed": 0, "progress": False}
        expected = self.run().samples["x"]
        for given in (known, known.numpy(), {"x": known}):
            assert torch.equal(
                vi.impute(hidden(x, known).nan_to_num(), observed=given, **settings).samples["x"], expected
            )
        with pytest.raises(SettingError, match="num_steps"):
            vi.impute(x, observed=known, num_step=3)


def model_of(likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", likelihood(z), obs=x)

    return model


def guide_of_three(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1))


class TestRefusals:
    x = torch.zeros(4, 3)
    known = torch.tensor([[True, False, True]] * 3 + [[True] * 3])
    whole = torch.tensor([[True] * 3, [False] * 3] * 2)
    diagonal = staticmethod(model_of(lambda z: dist.Normal(z, 1.0).to_event(1)))
    correlated = staticmethod(model_of(lambda z: dist.MultivariateNormal(z, 0.5 * torch.eye(3) + 0.5)))

    @pytest.mark.parametrize(
        ("observed", "error", "message"),
        [
            (known.float(), DataError, "must be boolean.*float32"),
            (known.long(), DataError, "must be boolean.*int64"),
            (known[:2], DataError, r"shape \[2, 3\].*'x' \[4, 3\]"),
            (known[:, :2], DataError, r"shape \[4, 2\]"),
            (known[:, 0], DataError, r"shape \[4\]"),
            ({"x": known[:2]}, DataError, r"shape \[2, 3\]"),
            ({"y": known}, SettingError, r"\['y'\]; the model observes \['x'\]"),
            ({}, SettingError, "the model observes"),
            (None, SettingError, "Nothing says what is missing"),
        ],
    )
    def test_bad_masks(self, observed, error, message):
        with pytest.raises(error, match=message):
            impute(self.diagonal, guide_of_three, self.x, observed=observed)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"method": "magic"}, "Unknown method 'magic'"),
            ({"num_samples": 0}, "num_samples"),
            ({"num_steps": -1}, "num_steps must be an integer of at least 0"),
            ({"num_steps": 0, "warmup_steps": 0}, "both 0"),
            ({"num_importance_samples": 0}, "num_importance_samples"),
            ({"chunk_size": 0}, "chunk_size"),
            ({"num_stepz": 3}, "Did you mean 'num_steps'"),
            ({"method": "mask"}, "lets some of them count"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(SettingError, match=message):
            impute(self.diagonal, guide_of_three, self.x, observed=self.known, **settings)

    def test_a_mask_that_splits_an_event(self):
        with pytest.raises(ModelError, match=r"'x' \(MultivariateNormal, event shape \[3\]\).* splits 3 of its events"):
            impute(self.correlated, guide_of_three, self.x, observed=self.known)

    def test_an_event_that_is_missing_as_a_whole_is_drawn_from_its_joint(self):
        draws = impute(self.correlated, guide_of_three, self.x, observed=self.whole, num_samples=4000, num_steps=20)
        covariance = 1.5 * torch.eye(3) + 0.5
        assert worst_error(draws.samples["x"][:, 1], torch.zeros(3), covariance) < LIMIT

    def test_data_that_reach_another_distribution_directly(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                for t in range(3):
                    loc = z[..., t] + (0.5 * x[:, t - 1] if t else 0.0)
                    pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=x[:, t])

        with pytest.raises(ModelError, match="'x_2' depends on missing entries"):
            impute(model, guide_of_three, self.x, observed=self.known)
        # the last of a series reaches nothing
        last = torch.tensor([[True, True, False]] * 4)
        x = torch.tensor([0.0, 4.0, NAN]).expand(4, 3)
        draws = impute(model, guide_of_three, x, observed=last, num_samples=2000, num_steps=20).samples["x_2"]
        assert (draws.mean(0) - 2.0).abs().max() < LIMIT * math.sqrt(2 / 2000)

    def test_an_earlier_observation_keeps_its_value(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                first = pyro.sample("x_0", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])
                pyro.sample("x_1", dist.Normal(first + z[..., 1], 1.0), obs=x[:, 1])

        x = torch.tensor([5.0, NAN]).expand(4, 2)
        draws = impute(model, guide_of_three, x, observed=~x.isnan(), num_samples=2000, num_steps=20).samples["x_1"]
        assert (draws.mean(0) - 5.0).abs().max() < LIMIT * math.sqrt(2 / 2000)

    def test_missing_entries_that_no_site_observes(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z[..., 0] + x[:, 1], 1.0), obs=x[:, 0])

        with pytest.raises(DataError, match="3 entries of argument 0 as missing that no site"):
            impute(model, guide_of_three, self.x, observed=self.known)

    def test_nan_in_a_known_entry(self):
        x = self.x.clone()
        x[0, 0] = NAN
        with pytest.raises(DataError, match="NaN"):
            impute(self.diagonal, guide_of_three, x, observed=self.known)

    def test_models_without_rows_of_their_own(self):
        with pytest.raises(ModelError, match="no rows"):
            impute(self.diagonal, guide_of_three, self.x, observed=self.known, data_plate=None)

        def model(x):
            with pyro.plate("data", len(x), subsample_size=2) as index:
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[index])

        with pytest.raises(ModelError, match="draws 2 of its 4 rows"):
            impute(model, guide_of_three, self.x, observed=self.known)
