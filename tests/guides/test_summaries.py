"""Medians and quantiles of a guide: closed forms against SciPy, everything else against draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_classes.base import ModelClass
from model_classes.registry import REGISTRY
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch.distributions import constraints

from pyro_aevb import AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal, embed
from pyro_aevb.errors import SettingError
from pyro_aevb.program.quantiles import has_marginal_quantiles, marginal_quantile

LEVELS = [0.05, 0.3, 0.5, 0.9]

KINDS = ["chain", "circular", "crossed", "decoder_weights", "globals_hierarchical", "images_linear", "innovations"]
KINDS += ["label_and_style", "markov_loop", "nested_latents", "ordered", "ragged_groups", "simplex", "unit_interval"]
every_kind = pytest.mark.parametrize("entry", [pytest.param(REGISTRY[name], id=name) for name in KINDS])


class Below(dist.TransformedDistribution):
    """Two minus a log normal: its support ends above, so that the map from the line decreases."""

    support = constraints.less_than(2.0)

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Below, _instance))


def below() -> Below:
    return Below(dist.LogNormal(0.0, 1.0), [dist.transforms.AffineTransform(2.0, -1.0)])


def scattered(guide, scale: float = 0.5):
    """Move every parameter away from where it starts, so that rows, locations and scales differ."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += scale * torch.randn_like(parameter) / math.sqrt(max(1, parameter.shape[-1:].numel()))
    return guide


def built(guide, entry: ModelClass):
    args, kwargs = entry.batch() if entry.joint else entry.test_batch()
    return scattered(guide.build(*args, **kwargs)), args, kwargs


def scalar_model(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def chain(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.LogNormal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def with_globals(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z + share[..., 0], 1.0), obs=x)


def normal_below(fn):
    """Return location and scale of the normal under a site's distribution."""
    while not isinstance(fn, torch.distributions.Normal | torch.distributions.MultivariateNormal):
        fn = fn.base_dist
    return fn.loc.detach().numpy(), fn.stddev.detach().numpy()


class TestClosedForms:
    x = torch.linspace(-1.5, 1.5, 5)

    @pytest.mark.parametrize(
        ("prior", "quantile"),
        [
            (lambda: dist.Normal(1.0, 2.0), lambda p, m, s: stats.norm(m, s).ppf(p)),
            (lambda: dist.LogNormal(0.0, 1.0), lambda p, m, s: stats.lognorm(s, scale=math.e**m).ppf(p)),
            (lambda: dist.Beta(2.0, 2.0), lambda p, m, s: stats.logistic.cdf(stats.norm(m, s).ppf(p))),
            (lambda: dist.Uniform(-1.0, 3.0), lambda p, m, s: 4 * stats.logistic.cdf(stats.norm(m, s).ppf(p)) - 1),
            (below, lambda p, m, s: 2 - stats.lognorm(s, scale=math.e**m).ppf(1 - p)),
        ],
        ids=["real", "positive", "unit interval", "interval", "decreasing"],
    )
    @pytest.mark.parametrize("kind", [AutoAmortizedNormal, AutoAmortizedMultivariateNormal])
    def test_of_normals_on_supports_of_single_entries(self, kind, prior, quantile):
        guide = scattered(kind(scalar_model(prior)).build(self.x))
        loc, scale = normal_below(poutine.trace(guide).get_trace(self.x).nodes["z"]["fn"])
        loc, scale = loc.reshape(5), scale.reshape(5)
        found = guide.quantiles(LEVELS, self.x)["z"]
        for level, value in zip(LEVELS, found, strict=True):
            torch.testing.assert_close(value, torch.tensor(quantile(level, loc, scale)).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(guide.median(self.x)["z"], found[2])

    def test_of_entries_of_a_multivariate_normal(self):
        entry = REGISTRY["vector_bernoulli"]
        guide, args, kwargs = built(AutoAmortizedMultivariateNormal(entry.model), entry)
        fn = poutine.trace(guide).get_trace(*args, **kwargs).nodes["z"]["fn"]
        factor = fn.scale_tril.detach()
        scale = (factor @ factor.mT).diagonal(dim1=-2, dim2=-1).sqrt()
        expected = stats.norm(fn.loc.detach(), scale).ppf(0.9)
        found = guide.quantiles([0.9], *args, **kwargs)["z"][0]
        torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["normal", "multivariate_normal"])
    def test_of_globals(self, kind):
        guide = scattered(AutoAmortizedNormal(with_globals, global_guide=kind).build(self.x), 2.0)
        nodes = poutine.trace(guide).get_trace(self.x).nodes
        if kind == "normal":
            loc, scale = normal_below(nodes["tau"]["fn"])
        else:
            loc, scale = (item[1] for item in normal_below(nodes["_AutoAmortizedNormal_globals"]["fn"]))
        expected = stats.lognorm(scale, scale=math.e**loc).ppf(LEVELS)
        found = guide.quantiles(torch.tensor(LEVELS), self.x)["tau"]
        torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-4, atol=0.0)

    def test_of_globals_whose_map_mixes_entries(self):
        guide = scattered(AutoAmortizedMultivariateNormal(with_globals, init_scale=1.0).build(self.x))
        found, count = guide.quantiles([0.2], self.x)["share"][0], 4000
        with torch.no_grad(), pyro.plate("draws", count, dim=-2):
            draws = guide(self.x)["share"].reshape(count, 3)
        error = math.sqrt(0.2 * 0.8 * (1 / 1000 + 1 / count))
        assert ((draws <= found).float().mean(0) - 0.2).abs().max() < 5 * error

    def test_in_double_precision(self):
        x = self.x.double()
        guide = scattered(AutoAmortizedNormal(scalar_model(lambda: dist.Normal(x.new_zeros(()), 1.0))).build(x))
        loc, scale = normal_below(poutine.trace(guide).get_trace(x).nodes["z"]["fn"])
        found = guide.quantiles([0.8], x)["z"][0]
        torch.testing.assert_close(found, torch.tensor(stats.norm(loc, scale).ppf(0.8)), rtol=1e-12, atol=0.0)

    def test_medians_are_given_those_before_them(self):
        guide = scattered(AutoAmortizedNormal(chain).build(self.x))
        medians = guide.median(self.x)
        at_median = poutine.trace(poutine.condition(guide, {"z": medians["z"]})).get_trace(self.x).nodes["w"]["fn"]
        loc, _ = normal_below(at_median)
        torch.testing.assert_close(medians["w"], torch.tensor(loc).exp())


@every_kind
class TestEveryKindOfSite:
    def test_quantiles_rise_in_the_shapes_of_the_guide(self, entry):
        guide, args, kwargs = built(AutoAmortizedFlow(entry.model, data_plate=entry.data_plate), entry)
        draw, found = guide(*args, **kwargs), guide.quantiles(LEVELS, *args, **kwargs)
        assert {name: value.shape for name, value in found.items()} == {
            name: (len(LEVELS), *value.shape) for name, value in draw.items()
        }
        for value in found.values():
            assert value.isfinite().all()
            assert (value.diff(dim=0) >= 0).all()
        medians = guide.median(*args, **kwargs)
        assert {name: value.shape for name, value in medians.items()} == {n: v.shape for n, v in draw.items()}
        supports = {site.name: site.support for site in guide.built.structure.select("latent")}
        for name, value in medians.items():
            assert supports[name].check(value).all()

    def test_quantiles_hold_as_many_draws_as_they_say(self, entry):
        guide, args, kwargs = built(AutoAmortizedMultivariateNormal(entry.model, data_plate=entry.data_plate), entry)
        found, count = guide.quantiles(LEVELS, *args, **kwargs), 2000
        nesting = guide.built.structure.max_plate_nesting
        with torch.no_grad(), pyro.plate("draws", count, dim=-1 - nesting):
            draws = guide(*args, **kwargs)
        # quantiles of 1,000 draws and shares of 2,000; six standard errors over some thousand entries in all
        error = 6 * torch.tensor([math.sqrt(p * (1 - p) * (1 / 1000 + 1 / count)) for p in LEVELS])
        for name, value in found.items():
            own = draws[name].reshape(count, *value.shape[1:])
            for level, quantile, allowed in zip(LEVELS, value, error, strict=True):
                share = (own <= quantile).float().mean(0)
                assert (share - level).abs().max() < allowed, name


class TestAroundTheGuide:
    x = torch.linspace(-1.5, 1.5, 5)

    def test_runs_leave_everything_as_it_was(self):
        guide = AutoAmortizedNormal(with_globals).build(self.x).train()
        state = torch.get_rng_state()
        with poutine.trace() as outer, poutine.block(hide_all=False):
            medians, quantiles = guide.median(self.x), guide.quantiles([0.5], self.x)
        assert torch.equal(state, torch.get_rng_state())
        assert not [name for name, node in outer.trace.nodes.items() if node["type"] in ("sample", "param")]
        assert not any(value.requires_grad for value in (*medians.values(), *quantiles.values()))
        assert guide.training
        assert not list(pyro.get_param_store().keys())

    def test_handlers_outside_change_nothing(self):
        guide = AutoAmortizedNormal(chain).build(self.x)
        alone = guide.quantiles([0.2], self.x)["w"]
        with poutine.condition(data={"z": torch.full((5,), 9.0)}):
            assert torch.equal(guide.quantiles([0.2], self.x)["w"], alone)

    def test_medians_are_those_of_embed(self):
        guide = scattered(AutoAmortizedFlow(chain).build(self.x))
        expected = embed(chain, guide, self.x)
        for name, value in guide.median(self.x).items():
            torch.testing.assert_close(value, expected[name])

    def test_a_guide_is_built_by_its_first_question(self):
        assert AutoAmortizedNormal(chain).median(self.x)["z"].shape == (5,)

    def test_a_plate_that_draws_its_rows_draws_them_once(self):
        def model(x):
            with pyro.plate("data", len(x), subsample_size=4) as rows:
                z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        x = 10 * torch.randn(300)
        guide = scattered(AutoAmortizedNormal(model).build(x), 3.0)
        assert (guide.quantiles(LEVELS, x)["z"].diff(dim=0) >= 0).all()

    def test_globals_of_pyros_own_guide(self):
        guide = AutoAmortizedNormal(with_globals, global_guide=AutoNormal).build(self.x)
        own = guide.networks.of_globals[0].guide.quantiles([0.1, 0.9])["tau"]
        found = guide.quantiles([0.1, 0.9], self.x)["tau"]
        # sqrt(p (1 - p) / 1000) / density, with a scale of 0.1 in log tau: a standard error of 0.005 in log tau
        assert (found.log() - own.log()).abs().max() < 0.03

    @pytest.mark.parametrize("levels", [[0.0], [0.5, 1.0], [-0.1], [math.nan], []])
    def test_levels_that_are_none(self, levels):
        with pytest.raises(SettingError, match="between 0 and 1"):
            AutoAmortizedNormal(chain).quantiles(levels, self.x)


class TestDistributions:
    @pytest.mark.parametrize(
        ("fn", "median"),
        [
            (dist.Delta(torch.tensor([3.0])), [3.0]),
            (dist.VonMises(torch.tensor([3.1, -1.0]), 2.0), [3.1, -1.0]),
            (dist.ProjectedNormal(torch.tensor([3.0, 4.0])), [0.6, 0.8]),
            (dist.StudentT(3.0, torch.tensor([2.0]), 1.0), [2.0]),
            (dist.Exponential(torch.tensor([math.log(2.0)])), [1.0]),
        ],
        ids=["delta", "circle", "sphere", "symmetric", "quantile function"],
    )
    def test_medians(self, fn, median):
        torch.testing.assert_close(marginal_quantile(fn, 0.5), torch.tensor(median))

    def test_what_mixes_entries_has_no_marginal_quantiles(self):
        normal = dist.Normal(torch.zeros(3), 1.0)
        stick = dist.TransformedDistribution(normal.to_event(1), [dist.transforms.StickBreakingTransform()])
        assert not has_marginal_quantiles(stick)
        assert has_marginal_quantiles(
            dist.TransformedDistribution(normal, [dist.transforms.ExpTransform()]).to_event(1)
        )
        assert has_marginal_quantiles(normal.mask(torch.tensor([True, False, True])))
