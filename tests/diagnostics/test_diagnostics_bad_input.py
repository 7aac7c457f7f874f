"""Bad input to diagnostics and rivals: an error of our own says what was expected and what came, and nothing is lost.

Every door gets the same mistakes, then the ones that only it can get. Parameters, the global param store and the random
generators are as before afterwards.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jaxtyping
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch import nn

from pyro_aevb import (
    AEVB,
    CollapseMonitor,
    LogDensity,
    MonteCarloEM,
    ReweightedWakeSleep,
    WakeSleep,
    calibrate,
    collapse_report,
    compare_posteriors,
    fit,
    gradient_report,
    inference_gap,
    nuts_posterior,
    predictive_check,
    trust_report,
)
from pyro_aevb.errors import AEVBError, DataError, GuideError, ModelError, ParameterError, SettingError
from pyro_aevb.mcmc.draws import assess

X = torch.linspace(-2.0, 2.0, 6)
NAN = X.clone().index_fill_(0, torch.tensor([3]), float("nan"))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(nn.Module):
    """The exact posterior, until its scale is trained."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5**0.5))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, self.scale))


GUIDE = Guide()


def sampling(site, make):
    """Make a guide that samples one site in the data plate, with a parameter."""

    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample(site, make(x + 0 * GUIDE.scale))

    return program


def observing(make_latent=None):
    """Make a model whose latent, if there is one, has another distribution."""

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", make_latent()) if make_latent else 0.0
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return program


def trainable(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def failing(x):
    raise ValueError("no such thing")


def automatic(kind):
    """Return a guide of Pyro's that has seen the data."""
    guide = kind(model)
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        guide(X)
    return guide


@functools.cache
def chains(num_samples=40):
    """Return exact posterior draws as if they were of chains."""
    generator = torch.Generator().manual_seed(0)
    z = X / 2 + 0.5**0.5 * torch.randn(4, num_samples, 6, generator=generator)
    of_rows, log_joint = torch.ones(6), LogDensity(model, X).log_joint(z[..., None])
    judged = assess(z[..., None], log_joint, acceptance=of_rows, step_size=of_rows, num_divergent=torch.zeros(6).long())
    return replace(judged, samples={"z": z})


# The doors, each with settings that keep a call that should have been refused short

QUIET = {"seed": 0, "progress": False}
SHORT = {"num_samples": 40, "warmup_steps": 30, "num_chains": 4}
LEDGER = {"method": "quadrature", "num_draws": 50, "num_steps": 3}
TRUST = {**QUIET, "sampling": SHORT, "num_samples": 100, "num_simulations": 20, "evidence": LEDGER}


def opened(name, function, **defaults):
    """Return a function of model, guide, batch and settings, which has a name."""

    def door(model, guide, *batch, **settings):
        return function(model, guide, *batch, **{**defaults, **settings})

    door.__name__ = name
    return door


def _compare(first, guide, *batch, **settings):
    return compare_posteriors(guide, chains(), *batch, **{"model": first, **settings})


compare = opened("compare", _compare, **QUIET, num_samples=100)
nuts = opened(
    "nuts", lambda model, _, *batch, **own: nuts_posterior(model, *batch, **own), **QUIET, **{**SHORT, "num_chains": 2}
)
ledger = opened("ledger", inference_gap, **QUIET, **LEDGER)
ranks = opened("ranks", calibrate, **QUIET, num_simulations=20, num_draws=20)
gradients = opened("gradients", gradient_report, **QUIET, num_samples=3, num_reference=3)
replicate = opened("replicate", predictive_check, **QUIET, num_samples=10)
collapse = opened("collapse", collapse_report, seed=0)
trust = opened("trust", trust_report, **TRUST)
wrapped = opened("wrapped", lambda model, guide, *batch, **own: AEVB(model, guide).compare(*batch, **own), **TRUST)
DOORS = (compare, nuts, ledger, ranks, gradients, replicate, collapse, trust, wrapped)


def train(objective, model=model, guide=GUIDE, data=X, **settings):
    return fit(model, guide, objective, data, **{"num_epochs": 1, "batch_size": 3, "progress": False, **settings})


def em(data=X, program=trainable, making=(), **settings):
    return MonteCarloEM(program, **dict(making)).fit(data, **{"num_epochs": 1, "progress": False, **settings})


class Mistake(NamedTuple):
    """A mistake that every door can be given: in the batch, the model, the guide or a setting.

    Attributes:
        names: What the message must name.
        change: What takes the place of a batch, a model, a guide or settings.
        spares: Doors to which it is none, by name.
    """

    names: str
    change: dict[str, Any]
    spares: tuple[str, ...] = ()


NO_GUIDE = ("nuts",)
TAKES_POINTS = ("nuts", "gradients", "replicate")
EVERYWHERE = {
    "text": Mistake("str|'digits'", {"batch": ("digits",)}),
    "a list": Mistake(r"list|\[1.0, 2.0\]", {"batch": ([1.0, 2.0],)}),
    "no batch": Mistake(r"missing 1 required|there are none", {"batch": ()}),
    "None": Mistake("None", {"batch": (None,)}),
    "no rows": Mistake(r"at least one, got|there are none", {"batch": (X[:0],)}),
    "a number": Mistake(r"0-d tensor|there are none", {"batch": (torch.tensor(1.0),)}),
    "NaN": Mistake("argument 0", {"batch": (NAN,)}, spares=("ranks",)),
    "a seed of text": Mistake(r"seed must be an integer between 0 .* got 'one'", {"seed": "one"}),
    "a negative seed": Mistake("seed must be .* got -1", {"seed": -1}),
    "a fraction as seed": Mistake(r"seed must be .* got 1\.5", {"seed": 1.5}),
    "a misspelt setting": Mistake("no setting 'num_sample'", {"num_sample": 3}),
    "a plate that is not there": Mistake("'rows'", {"data_plate": "rows"}),
    "a model of text": Mistake(r"function, module or method .* got 'normal'", {"model": "normal"}),
    "a model that fails": Mistake("model failed .* no such thing", {"model": failing}),
    "a discrete latent": Mistake("'z' is discrete", {"model": observing(lambda: dist.Bernoulli(0.5))}),
    "no latents": Mistake(
        "no latents|latents, and the model has none|latents .* unknown|samples site 'z', which is not in the model",
        {"model": observing()},
        spares=("replicate",),
    ),
    "a guide of text": Mistake(r"function, module or method .* got 'normal'", {"guide": "normal"}, NO_GUIDE),
    "a guide that fails": Mistake("guide failed .* no such thing", {"guide": failing}, NO_GUIDE),
    "a guide of another model": Mistake(
        r"lacks the model's latent sites \['z'\]; it has \['w'\]",
        {"guide": sampling("w", lambda x: dist.Normal(x, 1.0))},
        NO_GUIDE,
    ),
    "a guide of another shape": Mistake(
        r"'z' has event shape \[2\] in the guide and \[\] in the model",
        {"guide": sampling("z", lambda x: dist.Normal(torch.zeros(2), 1.0).to_event(1))},
        NO_GUIDE,
    ),
    "a guide that samples nothing": Mistake(
        r"lacks the model's latent sites \['z'\]", {"guide": lambda x: GUIDE.scale}, NO_GUIDE
    ),
    "a point": Mistake(r"point \(Delta\)", {"guide": sampling("z", dist.Delta)}, TAKES_POINTS),
    "a point of Pyro's": Mistake("point|AutoDelta", {"guide": automatic(AutoDelta)}, TAKES_POINTS),
    "one for all rows": Mistake("joint draw|point|AutoD", {"guide": automatic(AutoDiagonalNormal)}, TAKES_POINTS),
}


@pytest.fixture(autouse=True)
def as_users_run():
    """Run without the check of annotations, which would come first."""
    pyro.clear_param_store()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    pyro.clear_param_store()


def str_of(item):
    """Name a parameter of a test."""
    return getattr(item, "__name__", str(item))


def refused(do: Callable[[], Any], error: type[AEVBError], names: str) -> AEVBError:
    """Make a mistake; return the error once it is known to name it, and to have left everything as it was."""
    before = GUIDE.scale.detach().clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.raises(error) as caught:
        do()
    assert re.search(names, str(caught.value), re.DOTALL), str(caught.value)
    assert "Trace Shapes" not in str(caught.value)
    after = GUIDE.scale.detach(), torch.get_rng_state(), np.random.get_state()[1]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    return caught.value


@pytest.mark.parametrize(
    ("door", "name"),
    [(door, name) for name in EVERYWHERE for door in DOORS if door.__name__ not in EVERYWHERE[name].spares],
    ids=str_of,
)
def test_every_door_names_the_mistake(door, name):
    mistake = EVERYWHERE[name]
    change = {"model": model, "guide": GUIDE, "batch": (X,), **mistake.change}
    refused(
        lambda: door(change.pop("model"), change.pop("guide"), *change.pop("batch"), **change),
        AEVBError,
        "data_plate belongs" if door is wrapped and "data_plate" in change else mistake.names,
    )
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("door", DOORS[:-2], ids=str_of)  # the last two call the others
def test_numpy_arrays_simply_work(door):
    assert door(model, GUIDE, X.numpy())


COUNTS = {
    compare: ["num_samples"],
    nuts: ["num_samples", "warmup_steps", "num_chains", "max_rows", "max_tree_depth"],
    ledger: ["num_draws", "num_steps", "num_particles", "chunk_size"],
    ranks: ["num_simulations", "num_draws", "chunk_size"],
    gradients: ["num_samples", "num_reference", "num_importance_samples", "num_data"],
    replicate: ["num_samples", "num_kept"],
    collapse: ["num_samples", "max_rows"],
    trust: ["num_samples", "num_simulations"],
}


@pytest.mark.parametrize(
    ("door", "name", "count"),
    [(door, name, count) for door, names in COUNTS.items() for name in names for count in (-3, 10.5, "many", True)],
    ids=str_of,
)
def test_counts_are_counts(door, name, count):
    text = f"{name} must be an (even )?integer of at least [12].*{re.escape(repr(count))}"
    refused(lambda: door(model, GUIDE, X, **{name: count}), SettingError, text)


# What only one door can be given


def reference(change=lambda draws: draws, *batch, **settings):
    return lambda: compare_posteriors(GUIDE, change(chains()), *(batch or (X,)), **QUIET, model=model, **settings)


def of_site(name, shape=()):
    return lambda draws: replace(draws, samples={name: draws.samples["z"].reshape(4, 40, 6, *shape)})


def statistic(function):
    return lambda: replicate(model, GUIDE, X, statistics={"mine": function})


def asked(door, **settings):
    return lambda: door(model, GUIDE, X, **settings)


def calling(function, *args, **settings):
    return lambda: function(*args, **settings)


CASES = {
    # reference draws
    "draws by site": (reference(lambda draws: draws.samples), SettingError, "hmc_posterior.* got dict"),
    "guide and draws swapped": (lambda: compare_posteriors(chains(), GUIDE, X, model=model), SettingError, "got Guide"),
    "other rows": (reference(lambda draws: draws, X[:4]), DataError, "expected 4 rows, got 6"),
    "rows in another order": (reference(lambda draws: draws, X.flip(0)), DataError, "6 of 6 rows"),
    "other sites": (reference(of_site("w")), DataError, r"missing \['z'\], unknown \['w'\]"),
    "other shapes": (reference(of_site("z", (1,))), DataError, r"'z' must have shape .*\[6\].* got \[4, 40, 6, 1\]"),
    "few reference draws": (reference(lambda draws: chains(9)), SettingError, "100 .* Got 36 of the reference"),
    "few draws of a guide": (reference(num_samples=99), SettingError, "at least 100 .* Got 99 of the guide"),
    "no model": (lambda: compare_posteriors(GUIDE, chains(), X), SettingError, "model=model"),
    "globals that are none": (reference(given={"g": 1.0}), SettingError, r"\['g'\].* globals are \[\]"),
    "globals of text": (reference(given="g"), SettingError, "given must be .* got str"),
    # NUTS
    "60,000 rows": (calling(nuts, model, None, torch.zeros(60000)), SettingError, "60,000 rows.*hours.*max_rows="),
    "odd chains": (asked(nuts, num_chains=3), SettingError, "even.* got 3"),
    "acceptance of 2": (asked(nuts, target_accept_prob=2.0), SettingError, "1; got 2"),
    "acceptance of text": (asked(nuts, target_accept_prob="a"), SettingError, "0 and 1; got 'a'"),
    # the ledger
    "a method": (asked(ledger, method="chib"), SettingError, "Unknown method 'chib'; known are"),
    "one draw": (asked(ledger, num_draws=1), SettingError, "at least 2, .* got 1"),
    "a rate of text": (asked(ledger, learning_rate="a"), SettingError, "positive number, got 'a'"),
    "another's setting": (asked(ledger, warmup_steps=3), SettingError, "no setting 'warmup_steps'"),
    # calibration
    "no simulations": (asked(ranks, num_simulations=0), SettingError, "at least 1, got 0"),
    "a to_batch of text": (asked(ranks, to_batch="x"), SettingError, "to_batch must be a function"),
    "a to_batch of 3": (asked(ranks, to_batch=lambda v, a, k: 3), SettingError, "tuple.* got int"),
    "a level": (lambda: ranks(model, GUIDE, X).failures("low"), SettingError, "level must lie between .* got 'low'"),
    "numbers of its rows": (calling(ranks, model, automatic(AutoNormal), X), GuideError, "AutoNormal holds numbers"),
    # gradients
    "groups": (asked(gradients, groups="all"), SettingError, "'all'; known are 'program', 'module'"),
    "no parameters": (lambda: gradients(model, lambda x: model(x), X), ParameterError, "param"),
    "few data": (asked(gradients, num_data=2), SettingError, "at least the batch's 6; got 2"),
    "no estimator": (lambda: gradients(model, GUIDE, X).find("Z", "guide"), SettingError, r"\('Z', 'guide'\); known"),
    # predictive checks
    "no data": (lambda: replicate(lambda x: GUIDE(x), GUIDE, X), ModelError, "nothing"),
    "a function alone": (asked(replicate, statistics=torch.mean), SettingError, "name: function"),
    "no statistics": (asked(replicate, statistics={}), SettingError, "empty"),
    "no function": (statistic(3), SettingError, "got int for 'mine'"),
    "another site": (asked(replicate, statistics={"y": {"m": abs}}), SettingError, "'y'.*'x'"),
    "a statistic of None": (statistic(lambda x: None), SettingError, "'mine' failed .* NoneType"),
    "a statistic of text": (statistic(lambda x: "high"), SettingError, "'mine' failed .* 'str'"),
    "a statistic that fails": (statistic(lambda x: x.foo), SettingError, "'mine' failed .* no attribute 'foo'"),
    "shapes that change": (statistic(lambda x: x[x > 0]), SettingError, "in one data set and"),
    # reports
    "against": (asked(trust, against=["hmc"]), SettingError, r"'hmc', 'nuts', got \['hmc'\]"),
    "sampling of text": (asked(trust, sampling="hmc"), SettingError, "by name.* got 'hmc'"),
    "a method for evidence": (asked(trust, evidence={"metod": 1}), SettingError, "mean 'method'"),
    "a seed for evidence": (asked(trust, evidence={"seed": 1}), SettingError, "evidence .*'seed'"),
    # collapse
    "one row": (calling(collapse, model, GUIDE, X[:1]), DataError, "at least two of them, got 1"),
    "no plate": (asked(collapse, data_plate=None), SettingError, "which has no rows"),
    "a threshold of text": (calling(CollapseMonitor, X, threshold="low"), SettingError, "threshold .* got 'low'"),
    "text to monitor": (calling(CollapseMonitor, "x"), DataError, "argument 0, got str"),
    "no rows to monitor": (calling(CollapseMonitor, X[:0]), DataError, "got 0"),
    "no epochs": (calling(CollapseMonitor, X, every=0), SettingError, "every must be .* got 0"),
    "a monitor's seed": (calling(CollapseMonitor, X, seed="s"), SettingError, "seed must be .* got 's'"),
    # rivals
    "wake-sleep of a plate": (lambda: train(WakeSleep(data_plate="rows")), ModelError, "no plate 'rows'"),
    "wake-sleep's to_batch": (lambda: train(WakeSleep(to_batch="x")), SettingError, "to_batch must be a function"),
    "wake-sleep of a point": (lambda: train(WakeSleep(), trainable, sampling("z", dist.Delta)), GuideError, "Delta"),
    "numbers of rows": (
        lambda: train(WakeSleep(), trainable, automatic(AutoNormal), batch_size=6),
        GuideError,
        "auxiliary",
    ),
    "wake-sleep of NaN": (lambda: train(WakeSleep(), data=NAN), DataError, "row 3"),
    "one importance sample": (calling(ReweightedWakeSleep, 1), SettingError, "at least 2 .* got 1"),
    "samples of text": (calling(ReweightedWakeSleep, "many"), SettingError, "got 'many'"),
    "leapfrog": (calling(em, making={"num_leapfrog": 0}), SettingError, "num_leapfrog .* got 0"),
    "acceptance": (calling(em, making={"target_accept_prob": "a"}), SettingError, "between 0 and 1; got 'a'"),
    "EM of text": (calling(em, "x"), DataError, "argument 0, got str"),
    "EM of NaN": (calling(em, NAN), DataError, "'x' hold 1 entries"),
    "EM of no rows": (calling(em, X[:0]), DataError, "at least one row"),
    "EM of no program": (calling(em, program="model"), SettingError, "got 'model'"),
    "EM without parameters": (calling(em, program=model), ParameterError, "no parameters"),
    "an optimizer": (calling(em, optimizer="adam"), SettingError, "callable .* got 'adam'"),
    "a rate": (calling(em, learning_rate=-1), SettingError, "positive number, got -1"),
    "a large batch": (calling(em, batch_size=60), SettingError, "number of rows, 6; got 60"),
    "EM's seed": (calling(em, seed="s"), SettingError, "seed must be .* got 's'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_door_names_what_only_it_can_get(name):
    do, error, names = CASES[name]
    assert type(refused(do, error, names)) is error
