"""Guides under Pyro's own machinery: SVI and its losses, Predictive, AutoGuideList, parameters, copies."""

import copy
import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_classes.registry import REGISTRY
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from torch import nn

from pyro_aevb import SGVB, AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.errors import GuideError

GUIDES = (AutoAmortizedNormal, AutoAmortizedMultivariateNormal, AutoAmortizedFlow)
every_guide = pytest.mark.parametrize("kind", GUIDES)

PAIRS = [
    (AutoAmortizedNormal, "crossed"),
    (AutoAmortizedMultivariateNormal, "globals_ragged"),
    (AutoAmortizedFlow, "globals_ragged"),
    (AutoAmortizedNormal, "label_covariate"),
    (AutoAmortizedFlow, "markov_loop"),
    (AutoAmortizedMultivariateNormal, "obs_mask_counts"),
]
every_kind = pytest.mark.parametrize(
    ("kind", "entry"), [pytest.param(kind, REGISTRY[name], id=f"{kind.__name__} {name}") for kind, name in PAIRS]
)


def conjugate(x):
    """z | x has mean x / 2 and variance 1 / 2."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_globals(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def subsampled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=20) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.3), obs=x[rows])


def batch_of(entry):
    return entry.batch() if entry.joint else entry.test_batch()


def train(model, guide, loss, *batch, steps=150, learning_rate=0.03):
    optimizer = pyro.optim.ClippedAdam({"lr": learning_rate, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, loss)
    return [svi.step(*batch) for _ in range(steps)]


def draws(guide, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return guide(*args, **kwargs)


def assert_same_draws(first, second, *args, **kwargs):
    left, right = draws(first, *args, **kwargs), draws(second, *args, **kwargs)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def rows_and_draws(guide, x):
    """Return draws of z and the rows that they belong to."""
    nodes = poutine.trace(guide).get_trace(x).nodes
    return nodes["data"]["value"], nodes["z"]["value"].detach()


class TestSVI:
    x = torch.linspace(-2, 2, 64)

    @pytest.mark.parametrize(
        "loss",
        [Trace_ELBO(num_particles=5, vectorize_particles=True), TraceMeanField_ELBO(), SGVB()],
        ids=["five draws", "mean field", "ours"],
    )
    def test_losses_reach_the_posterior(self, loss):
        guide = AutoAmortizedNormal(conjugate)
        train(conjugate, guide, loss, self.x)
        fn = poutine.trace(guide).get_trace(self.x).nodes["z"]["fn"]
        assert (fn.mean - self.x / 2).abs().mean() < 0.05
        assert (fn.stddev - 0.5**0.5).abs().mean() < 0.05

    @every_kind
    def test_every_kind_of_model_takes_steps(self, kind, entry):
        if entry.name == "obs_mask_counts":
            warnings.filterwarnings("ignore", "Found vars in model but not guide")  # what is to be imputed
        args, kwargs = batch_of(entry)
        guide = kind(entry.model)
        optimizer = pyro.optim.Adam({"lr": 0.01})
        for loss in (Trace_ELBO(), Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=3)):
            svi = SVI(entry.model, guide, optimizer, loss)
            assert all(torch.tensor(svi.step(*args, **kwargs)).isfinite() for _ in range(2))
        named = dict(guide.named_parameters())
        store = pyro.get_param_store()
        assert {f"{kind.__name__}.{name.replace('networks.', 'networks$$$', 1)}" for name in named} == set(store.keys())
        moved = kind(entry.model).build(*args, **kwargs)
        same = [torch.equal(value, named[name]) for name, value in moved.named_parameters()]
        assert not all(same)

    def test_a_model_that_draws_its_rows(self):
        x = torch.randn(200)
        guide = AutoAmortizedNormal(subsampled)
        train(subsampled, guide, Trace_ELBO(), x, steps=150)
        rows, z = rows_and_draws(guide, x)
        # a row's posterior has mean near 0.92 x; rows of others would leave nothing to learn
        assert torch.corrcoef(torch.stack([z, x[rows]]))[0, 1] > 0.75

    def test_a_loss_as_a_module_in_a_loop(self):
        guide = AutoAmortizedNormal(conjugate).build(self.x)
        module = SGVB(num_particles=5)(conjugate, guide)
        module(self.x)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        for _ in range(150):
            optimizer.zero_grad()
            module(self.x).backward()
            optimizer.step()
            schedule.step()
        assert (guide.median(self.x)["z"] - self.x / 2).abs().mean() < 0.05

    @pytest.mark.parametrize("global_guide", [None, AutoNormal])
    def test_parameters_of_modules_that_keep_their_own(self, global_guide):
        with pyro.settings.context(module_local_params=True):
            guide = AutoAmortizedNormal(with_globals, global_guide=global_guide).build(self.x)
            module = Trace_ELBO()(with_globals, guide)
            assert {id(item) for item in module.parameters()} == {id(item) for item in guide.parameters()}
            module(self.x).backward()
            assert all(item.grad is not None for item in guide.parameters())
        assert not list(pyro.get_param_store().keys())


class TestPredictive:
    @pytest.mark.parametrize("parallel", [True, False])
    @every_guide
    def test_draws_of_rows_never_seen(self, kind, parallel):
        guide = kind(with_globals).build(torch.randn(50))
        found = Predictive(with_globals, guide=guide, num_samples=7, parallel=parallel)(torch.randn(3))
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            "mu": (7, 1),
            "tau": (7, 1),
            "z": (7, 3),
            "x": (7, 3),
        }

    def test_moments_are_those_of_the_guide(self):
        x = torch.tensor([-2.0, 0.0, 3.0])
        guide = AutoAmortizedNormal(conjugate, init_scale=0.7).build(torch.randn(50))
        with torch.no_grad():
            guide.networks.of_locals.heads[0].out.weight.normal_()
            fn = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
        found = Predictive(conjugate, guide=guide, num_samples=4000, parallel=True, return_sites=["z"])(x)["z"]
        assert ((found.mean(0) - fn.mean).abs() < 5 * fn.stddev / 4000**0.5).all()
        assert ((found.std(0) / fn.stddev - 1).abs() < 5 / 8000**0.5).all()


class TestAutoGuideList:
    x = torch.randn(40)

    def make(self, part_of_globals, *, is_first=True, model=with_globals, hidden=("mu", "tau"), **settings):
        parts = [
            part_of_globals(poutine.block(model, expose=list(hidden))),
            AutoAmortizedNormal(poutine.block(model, hide=list(hidden))),
        ]
        guide = AutoGuideList(model, **settings)
        for part in parts if is_first else reversed(parts):
            guide.append(part)
        return guide

    @pytest.mark.filterwarnings("ignore:Latent site")  # a part of globals alone sees no observation
    @pytest.mark.parametrize("is_first", [True, False])
    @pytest.mark.parametrize("part", [AutoDelta, AutoNormal, partial(AutoAmortizedFlow, data_plate=None)])
    def test_another_part_guides_the_globals(self, part, is_first):
        guide = self.make(part, is_first=is_first)
        losses = train(with_globals, guide, Trace_ELBO(), self.x, steps=40)
        assert sum(losses[-10:]) < sum(losses[:10])
        found = Predictive(with_globals, guide=guide, num_samples=5, parallel=True)(self.x)
        assert found["z"].shape == (5, 40)
        assert guide.median(self.x)["z"].shape == (40,)
        if part is not AutoDelta:  # which has none
            assert guide.quantiles([0.1, 0.9], self.x)["z"].shape == (2, 40)

    def test_it_asks_for_other_rows_than_it_has_run_on(self):
        guide = self.make(AutoDelta)
        guide(self.x)
        assert guide.median(self.x[:3])["z"].shape == (3,)

    def test_other_rows_need_plates_of_their_own(self):
        guide = self.make(AutoDelta)
        guide(self.x)
        with pytest.raises(GuideError, match="create_plates"):
            guide(self.x[:3])
        guide = self.make(AutoDelta, create_plates=lambda x: pyro.plate("data", len(x), dim=-1))
        guide(self.x)
        assert guide(self.x[:3])["z"].shape == (3,)

    def test_the_lists_plates_draw_the_rows(self):
        x = torch.randn(200)
        guide = self.make(AutoDelta, model=subsampled, hidden=("mu",))
        train(subsampled, guide, Trace_ELBO(), x, steps=150)
        rows, z = rows_and_draws(guide, x)
        # a row's posterior has mean near 0.92 x; rows of others would leave nothing to learn
        assert torch.corrcoef(torch.stack([z, x[rows]]))[0, 1] > 0.75

    def test_rows_that_the_model_is_given_are_not_replaced(self):
        def model(x, rows):
            mu = pyro.sample("mu", dist.Normal(0.0, 4.0))
            with pyro.plate("data", len(x), subsample=rows):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        guide = self.make(AutoDelta, model=model, hidden=("mu",))
        with pytest.raises(GuideError, match="create_plates"):
            guide(self.x, torch.tensor([3, 5, 8]))

    def test_observations_must_not_be_hidden(self):
        for exposed in (["z"], ["z", "mu", "tau"]):
            guide = AutoGuideList(with_globals)
            guide.append(AutoAmortizedNormal(poutine.block(with_globals, expose=exposed)))
            with pytest.raises(GuideError, match=r"hide=\[\.\.\.\]"):
                guide(self.x)


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, x, covariate):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.net(torch.stack([z, covariate], -1)), 1.0).to_event(1), obs=x)


class TestArguments:
    def test_covariates_of_a_module(self):
        for model in (Regression(), Regression().forward):
            guide = AutoAmortizedNormal(model).build(torch.randn(9, 3), torch.randn(9))
            assert guide.explain().lines[0].observations == "x, argument covariate"
            assert guide(torch.randn(4, 3), covariate=torch.randn(4))["z"].shape == (4,)

    def test_any_number_of_rows_by_position_or_name(self):
        guide = AutoAmortizedNormal(conjugate).build(x=torch.randn(30))
        for rows in (1, 2, 100):
            assert guide(torch.randn(rows))["z"].shape == guide(x=torch.randn(rows))["z"].shape == (rows,)

    @every_kind
    def test_one_row(self, kind, entry):
        args, kwargs = batch_of(entry)
        guide = kind(entry.model).build(*args, **kwargs)
        few = guide(*(item[:1] for item in args), **{name: item[:1] for name, item in kwargs.items()})
        whole = guide(*args, **kwargs)
        assert few.keys() == whole.keys()
        assert all(value.numel() <= whole[name].numel() for name, value in few.items())

    def test_a_row_is_guided_by_itself(self):
        x = torch.randn(30)
        guide = AutoAmortizedNormal(conjugate).build(x)
        with torch.no_grad():
            guide.networks.of_locals.heads[0].out.weight.normal_()
        torch.testing.assert_close(guide.median(x)["z"][4:5], guide.median(x[4:5])["z"])

    def test_double_precision(self):
        scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), scale))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.randn(30, dtype=torch.float64)
        guide = AutoAmortizedNormal(model).build(x)
        assert {item.dtype for item in guide.parameters()} == {torch.float64}
        assert guide(x)["z"].dtype == torch.float64
        moved = AutoAmortizedNormal(conjugate).build(x.float()).to(torch.float64)
        assert moved(x)["z"].dtype == torch.float64


class TestCopies:
    @every_kind
    def test_a_copy_and_the_original_stay_usable(self, kind, entry):
        args, kwargs = batch_of(entry)
        guide = kind(entry.model).build(*args, **kwargs)
        for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
            assert_same_draws(guide, other, *args, **kwargs)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(1.0)
            assert not any(torch.equal(a, b) for a, b in zip(guide.parameters(), other.parameters(), strict=True))
            assert guide.model is entry.model

    def test_a_guide_of_a_guide_list_is_pickled_without_the_list(self):
        guide = AutoGuideList(conjugate)
        guide.append(AutoAmortizedNormal(conjugate))
        guide(torch.randn(4))
        part = pickle.loads(pickle.dumps(guide[0]))
        assert part.master is None
        assert guide[0].master() is guide
        assert part(torch.randn(4))["z"].shape == (4,)

    @every_kind
    def test_a_state_dict_holds_all_that_draws_depend_on(self, kind, entry):
        args, kwargs = batch_of(entry)
        guide = kind(entry.model).build(*args, **kwargs)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        is_real = all("Real" in str(site.support) for site in guide.built.structure.select("observed"))
        scaled = [3 * item if is_real and item.is_floating_point() else item for item in args]
        other = kind(entry.model).build(*scaled, **kwargs)
        other.load_state_dict(guide.state_dict())
        assert_same_draws(guide, other, *args, **kwargs)
