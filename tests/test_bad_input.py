"""Bad input: an error of our own that names what is wrong, and nothing is lost.

One row a mistake: what is done, the exception, and what its message must name. Parameters, buffers and modes of the modules
involved, the global param store and the random generators are as before afterwards.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep
from safetensors.torch import save_file
from torch import nn

from pyro_aevb import (
    AEVB,
    IWELBO,
    SGVB,
    AutoAmortizedNormal,
    ConvEncoder,
    LogDensity,
    MLPEncoder,
    bdmc,
    export_posterior,
    fit,
    hmc_posterior,
    log_marginal,
    posterior,
    predict,
    simulate,
)
from pyro_aevb.errors import (
    AEVBError,
    DataError,
    FileError,
    GuideError,
    ModelError,
    NonFiniteError,
    ParameterError,
    SettingError,
)
from pyro_aevb.testing import NormalNormal

X = torch.linspace(-2.0, 2.0, 30)[:, None] * torch.ones(4)
NAN_IN_ROW_17 = X.clone().index_put_((torch.tensor(17), torch.tensor(2)), torch.tensor(float("nan")))
NAN_IN_ROW_3 = X.clone().index_put_((torch.tensor(3), torch.tensor(2)), torch.tensor(float("nan")))
INF_IN_ROW_17 = X.clone().index_put_((torch.tensor(17), torch.tensor(2)), torch.tensor(float("inf")))
fit = functools.partial(fit, progress=False, num_epochs=1, batch_size=10)
estimate = functools.partial(log_marginal, progress=False)
log_marginal = functools.partial(log_marginal, progress=False, num_samples=10)


class Model(nn.Module):
    """A decoder with parts that a row of the table may replace."""

    def __init__(self, prior=None, plate=None, likelihood=None):
        super().__init__()
        self.decoder = nn.Linear(2, 4)
        self.norm = nn.BatchNorm1d(2)
        self.prior = prior or (lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1))
        self.plate = plate or (lambda x: pyro.plate("data", len(x)))
        self.likelihood = likelihood or (lambda loc: dist.Normal(loc, 1.0).to_event(1))

    def forward(self, x):
        with self.plate(x):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)


class Guide(nn.Module):
    """An encoder whose distribution, sites and plate a row of the table may replace."""

    def __init__(self, posterior=None, plate=None, sites=("z",), size=4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, 4), nn.BatchNorm1d(4))
        self.posterior = posterior or (lambda loc, scale: dist.Normal(loc, scale).to_event(1))
        self.plate = plate or (lambda x: pyro.plate("data", len(x)))
        self.sites = sites

    def forward(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with self.plate(x):
            for site in self.sites:
                pyro.sample(site, self.posterior(loc, log_scale.exp()))


def no_plate(x):
    return contextlib.nullcontext()


def discrete():
    return dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)


class Unregistered:
    """Networks that nothing reaches: their tensors are no parameters."""

    def __init__(self):
        self.weight = torch.ones(4, 2)

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.weight, 1.0).to_event(1))


def constant_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 4]).to_event(1), obs=x)


class Uniform(Guide):
    """A guide whose support depends on its parameters."""

    def __init__(self):
        super().__init__(lambda loc, scale: dist.Uniform(loc - scale, loc + scale).to_event(1))


@dataclass
class Case:
    """A mistake.

    Attributes:
        do: Makes it, given the modules and a folder.
        error: The exception.
        names: What its message must name, as a regular expression.
        model: Makes the model.
        guide: Makes the guide.
    """

    do: Callable[[Any, Any, Path], Any]
    error: type[AEVBError]
    names: str
    model: Callable[[], Any] = Model
    guide: Callable[[], Any] = Guide


def fitting(data=X, objective=SGVB, **settings):
    return lambda model, guide, folder: fit(model, guide, objective(), data, **settings)


def weighing(data=X, **settings):
    return lambda model, guide, folder: log_marginal(model, guide, data, **settings)


def estimating(method, data=X, *, guided=True, **settings):
    return lambda model, guide, folder: estimate(model, guide if guided else None, data, method=method, **settings)


def drawing(data=X, **settings):
    return lambda model, guide, folder: posterior(model, guide, data, **settings)


def wrapped(method, *args, **settings):
    return lambda model, guide, folder: getattr(AEVB(model, guide), method)(*args, **settings)


def making(objective, *args, **settings):
    return lambda model, guide, folder: objective(*args, **settings)


def loading(damage):
    def load(model, guide, folder):
        with torch.random.fork_rng():
            saved = AEVB(Model(), Guide())
            saved.embed(X)
        saved.save(folder / "vi")
        damage(folder / "vi")
        AEVB.load(folder / "vi", model, guide=guide)

    return load


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_version(path):
    save_file({}, path, metadata={"pyro_aevb": json.dumps({"format": 99})})


def sized(size):
    return lambda: Model(plate=lambda x: pyro.plate("data", size))


MODELS = {
    "no data plate": Case(
        fitting(),
        ModelError,
        r"no plates.*data_plate=None",
        lambda: Model(plate=no_plate),
        lambda: Guide(plate=no_plate),
    ),
    "no data plate, asked of the wrapper": Case(
        wrapped("posterior", X),
        ModelError,
        r"data_plate=None",
        lambda: Model(plate=no_plate),
        lambda: Guide(plate=no_plate),
    ),
    "plate of another name": Case(fitting(data_plate="rows"), ModelError, r"no plate 'rows'.*'data' \(size 10\)"),
    "discrete latent": Case(fitting(), ModelError, r"'z' is discrete \(Bernoulli\)", lambda: Model(discrete)),
    "plate of the whole data and smaller batches": Case(
        fitting(X.repeat(5, 1), batch_size=None), DataError, "'data' has 150 rows and the batch 100", sized(150)
    ),
    "likelihood of another event shape": Case(
        fitting(),
        DataError,
        "'x' does not fit its distribution",
        lambda: Model(likelihood=lambda loc: dist.Normal(loc[..., :3], 1.0).to_event(1)),
    ),
    "likelihood of another event shape, new rows": Case(
        drawing(),
        ModelError,
        r"float32 \[\d+, 4\]",
        lambda: Model(likelihood=lambda loc: dist.Normal(loc[..., :3], 1.0).to_event(1)),
    ),
    "plate of a fixed size": Case(fitting(), ModelError, r"batch of \(0: float32 \[10, 4\]\)", sized(7)),
    "model returns NaN": Case(
        fitting(),
        NonFiniteError,
        "log density of site 'x'.*NaN",
        lambda: Model(
            likelihood=lambda loc: dist.Normal(loc.mean() + loc * float("nan"), 1.0, validate_args=False).to_event(1)
        ),
    ),
}

GUIDES = {
    "site missing": Case(fitting(), GuideError, r"lacks.*\['z'\]", guide=lambda: Guide(sites=())),
    "site extra": Case(fitting(), GuideError, r"'w'.*not in the model.*\['z'\]", guide=lambda: Guide(sites=("z", "w"))),
    "site that the model observes": Case(
        fitting(), GuideError, "'x'.*observed in the model", guide=lambda: Guide(sites=("z", "x"))
    ),
    "support outside the model's": Case(
        fitting(),
        GuideError,
        "'z'.*outside the model's",
        lambda: Model(lambda: dist.Exponential(torch.ones(2)).to_event(1)),
    ),
    "support outside the model's, new rows": Case(
        drawing(),
        GuideError,
        "'z'.*outside the model's",
        lambda: Model(lambda: dist.Exponential(torch.ones(2)).to_event(1)),
    ),
    "no rsample": Case(
        fitting(),
        GuideError,
        r"'z' \(.*no rsample.*'score'",
        lambda: Model(lambda: dist.VonMises(torch.zeros(2), 1.0).to_event(1)),
        lambda: Guide(lambda loc, scale: dist.VonMises(loc.tanh(), scale).to_event(1)),
    ),
    "another event shape": Case(
        fitting(),
        GuideError,
        r"'z' has event shape \[\] in the guide and \[2\]",
        guide=lambda: Guide(lambda loc, scale: dist.Normal(loc[:, 0], 1.0)),
    ),
    "another event shape, new rows": Case(
        drawing(),
        GuideError,
        r"'z' has event shape \[\] in the guide and \[2\]",
        lambda: constant_model,
        lambda: Guide(lambda loc, scale: dist.Normal(loc[:, 0], 1.0)),
    ),
    "outside the data plate": Case(
        fitting(),
        GuideError,
        "'z' lies inside the data plate",
        guide=lambda: Guide(lambda loc, scale: dist.Normal(loc.mean(0), 1.0).to_event(1), plate=no_plate),
    ),
    "no parameters": Case(
        fitting(), ParameterError, "no parameters to train.*pyro.module", lambda: constant_model, Unregistered
    ),
    "no parameters, step by step": Case(
        wrapped("partial_fit", X), ParameterError, "no parameters to train", lambda: constant_model, Unregistered
    ),
}

DATA = {
    "wrong event shape": Case(fitting(X[:, :3]), ModelError, r"guide failed.*float32 \[10, 3\]"),
    "wrong event shape, new rows": Case(drawing(X[:, :3]), ModelError, r"float32 \[2, 3\]"),
    "wrong event shape, wrapper": Case(wrapped("log_marginal", X[:, :3]), ModelError, r"float32 \[\d+, 3\]"),
    "unequal lengths": Case(fitting((X, X[:4])), DataError, r"\{0: 30, 1: 4\}"),
    "unequal lengths, new rows": Case(
        lambda model, guide, folder: posterior(model, guide, X, X[:4]), DataError, r"\{0: 30, 1: 4\}"
    ),
    "NaN in the first batch": Case(fitting(NAN_IN_ROW_3), DataError, "argument 0, row 3"),
    "NaN further on": Case(fitting(NAN_IN_ROW_17), DataError, "NaN.*argument 0, row 17.*site '[xz]'"),
    "infinity further on": Case(fitting(INF_IN_ROW_17), DataError, "infinity.*argument 0, row 17.*site '[xz]'"),
    "NaN in an argument of a mapping": Case(fitting({"x": NAN_IN_ROW_17}), DataError, "argument 'x', row 17"),
    "NaN in rows to weigh": Case(weighing(NAN_IN_ROW_17), DataError, "argument 0, row 17.*site '[xz]'"),
    "NaN in rows to draw": Case(drawing(NAN_IN_ROW_17), DataError, "argument 0, row 17.*site '[xz]'"),
    "NaN in the first rows to draw": Case(drawing(NAN_IN_ROW_3[2:]), DataError, "argument 0, row 1"),
    "no rows": Case(fitting(X[:0]), DataError, "empty.*at least one row"),
    "no rows to draw": Case(drawing(X[:0]), DataError, "no rows"),
    "no rows to weigh": Case(weighing(X[:0]), DataError, "no rows"),
    "no tensors": Case(fitting(()), DataError, "no tensors"),
    "text": Case(fitting("digits"), DataError, "tensor or a numpy array.*str"),
    "a single number": Case(
        fitting((X, torch.tensor(1.0))), DataError, "Argument 1 is a single number.*functools.partial"
    ),
    "whole numbers where floats are needed": Case(fitting(X.long()), ModelError, r"int64.*\.float\(\)"),
    "whole numbers to weigh": Case(weighing(X.long()), ModelError, r"int64.*\.float\(\)"),
    "double precision into single": Case(fitting(X.double()), ModelError, r"float64.*dtype"),
    "batch larger than the data": Case(
        fitting(batch_size=31), SettingError, "between 1 and the number of rows, 30; got 31"
    ),
    "empty batches": Case(fitting(batch_size=0), SettingError, "batch_size.*got 0"),
    "a value outside the likelihood's support": Case(
        fitting(),
        DataError,
        "'x'.*Bernoulli",
        lambda: Model(likelihood=lambda loc: dist.Bernoulli(logits=loc).to_event(1)),
    ),
}

SETTINGS = {
    "particles below 1": Case(making(SGVB, 0), SettingError, "num_particles.*got 0"),
    "importance samples below 1": Case(making(IWELBO, 0), SettingError, "num_importance_samples.*got 0"),
    "draws below 1": Case(drawing(num_samples=0), SettingError, "num_samples.*got 0"),
    "draws to weigh below 1": Case(weighing(num_samples=0), SettingError, "num_samples.*got 0"),
    "draws of globals below 1": Case(weighing(num_global_samples=0), SettingError, "num_global_samples.*got 0"),
    "chunks below 1": Case(weighing(chunk_size=0), SettingError, "chunk_size.*got 0"),
    "chunks of draws below 1": Case(drawing(chunk_size=-3), SettingError, "chunk_size.*got -3"),
    "simulated rows below 1": Case(
        lambda model, guide, folder: simulate(model, X, num_rows=0), SettingError, "num_rows.*got 0"
    ),
    "unknown method": Case(weighing(method="chib"), SettingError, "'chib'.*'importance'"),
    "unknown gradient": Case(making(SGVB, gradient="stil"), SettingError, "'stil'.*'reparam', 'stl', 'score'"),
    "unknown gradient of the weighted bound": Case(
        making(IWELBO, 2, gradient="score"), SettingError, "'score'.*'reparam', 'dreg'"
    ),
    "unknown kl": Case(making(SGVB, kl="exact"), SettingError, "'exact'.*'auto', 'sampled', 'analytic'"),
    "weighted bound with stl": Case(making(IWELBO, 2, gradient="stl"), SettingError, "stl.*biased.*'dreg'"),
    "analytic with stl": Case(making(SGVB, kl="analytic", gradient="stl"), SettingError, "analytic.*'stl'"),
    "analytic with score": Case(making(SGVB, kl="analytic", gradient="score"), SettingError, "analytic.*'score'"),
    "analytic where there is no closed form": Case(
        fitting(objective=lambda: SGVB(kl="analytic")),
        SettingError,
        "'z'.*no closed-form KL",
        lambda: Model(lambda: dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1)),
    ),
    "misspelt setting of fit": Case(fitting(epochs=3), SettingError, r"'epochs'.*num_epochs"),
    "misspelt setting of the wrapper's fit": Case(
        wrapped("fit", X, batchsize=3), SettingError, "'batchsize'.*'batch_size'"
    ),
    "misspelt setting of posterior": Case(drawing(num_sample=3), SettingError, "'num_sample'.*'num_samples'"),
    "misspelt setting of the wrapper's posterior": Case(
        wrapped("posterior", X, num_sample=3), SettingError, "'num_sample'.*'num_samples'"
    ),
    "misspelt setting of log_marginal": Case(wrapped("log_marginal", X, seeds=3), SettingError, "'seeds'.*'seed'"),
    "misspelt setting of embed": Case(wrapped("embed", X, chunk=3), SettingError, "'chunk'"),
    "misspelt setting of reconstruct": Case(wrapped("reconstruct", X, num_samples=3), SettingError, "'num_samples'"),
    "misspelt setting of predict": Case(
        lambda model, guide, folder: predict(model, guide, X, samples=2), SettingError, "'samples'.*num_samples"
    ),
    "misspelt setting of simulate": Case(wrapped("simulate", X, rows=3), SettingError, "'rows'.*'num_rows'"),
    "misspelt setting of partial_fit": Case(wrapped("partial_fit", X, lr=0.1), SettingError, "'lr'.*learning_rate"),
    "epochs below 1": Case(fitting(num_epochs=0), SettingError, "num_epochs.*got 0"),
    "learning rate without end": Case(fitting(learning_rate=math.inf), SettingError, "learning_rate.*got inf"),
    "checkpoints every 0 steps": Case(fitting(checkpoint="there", every=0), SettingError, "every.*at least 1, got 0"),
    "resuming without a folder": Case(fitting(resume=True), SettingError, "checkpoint='...'"),
    "learning rate of 0": Case(fitting(learning_rate=0.0), SettingError, "learning_rate.*got 0.0"),
    "learning rate of another optimizer": Case(
        fitting(learning_rate=0.1, optimizer=torch.optim.SGD), SettingError, "learning_rate.*functools.partial"
    ),
    "clipping at 0": Case(fitting(clip_norm=0.0), SettingError, "clip_norm.*got 0.0"),
    "patience without validation": Case(fitting(patience=3), SettingError, "patience needs validation.*got 3"),
    "patience below 1": Case(fitting(patience=0, validation=X), SettingError, "patience.*got 0"),
    "skipping below 0": Case(fitting(max_skipped=-1), SettingError, "max_skipped.*got -1"),
    "compilation of a density": Case(
        lambda model, guide, folder: LogDensity(model, X, compile="yes"),
        SettingError,
        "compile must be 'auto'.*got 'yes'",
    ),
    "compilation of chains": Case(
        lambda model, guide, folder: hmc_posterior(model, X, compile=None),
        SettingError,
        "compile must be 'auto'.*got None",
    ),
    "compilation of an estimator": Case(
        estimating("ais", guided=False, compile=2), SettingError, "compile must be 'auto', True or False, got 2"
    ),
    "compilation in fit": Case(fitting(compile=1), SettingError, "compile must be 'auto', True or False, got 1"),
    "compilation": Case(
        lambda model, guide, folder: AEVB(model, guide, compile="yes"),
        SettingError,
        "compile must be 'auto'.*got 'yes'",
    ),
    "two data plates": Case(
        lambda model, guide, folder: AEVB(model, guide, SGVB(data_plate="a"), data_plate="b"), SettingError, "'a'.*'b'"
    ),
    "a batch size for a loader": Case(
        lambda model, guide, folder: fit(model, guide, SGVB(), torch.utils.data.DataLoader(X)),
        SettingError,
        "DataLoader.*batch_size=10",
    ),
    "Pyro's importance-weighted bound": Case(fitting(objective=RenyiELBO), SettingError, "RenyiELBO.*IWELBO"),
    "Pyro's reweighted wake-sleep": Case(
        fitting(objective=ReweightedWakeSleep), SettingError, "ReweightedWakeSleep.*IWELBO"
    ),
    "globals without the number of rows": Case(
        wrapped("partial_fit", NormalNormal.fixture()[1]),
        SettingError,
        "num_data",
        lambda: NormalNormal().model,
        lambda: NormalNormal().guide,
    ),
}
SETTINGS |= {
    f"{gradient} on a support that depends on parameters": Case(
        fitting(objective=objective),
        GuideError,
        rf"support of the guide's site 'z' \(.*{gradient}",
        lambda: Model(lambda: dist.Uniform(torch.full((2,), -99.0), 99.0).to_event(1)),
        Uniform,
    )
    for gradient, objective in {
        "stl": lambda: SGVB(gradient="stl"),
        "score": lambda: SGVB(gradient="score"),
        "dreg": lambda: IWELBO(2, gradient="dreg"),
    }.items()
}


class TiedRows(Model):
    """A model in which a row's likelihood depends on the latents of all rows."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.decoder(z - z.mean(0))), obs=x)


def exponential(loc):
    return dist.Exponential(loc.exp()).to_event(1)


def four_latents():
    return Model(
        lambda: dist.Normal(torch.zeros(2, 2), 1.0).to_event(2),
        likelihood=lambda loc: dist.Normal(loc[..., 0, :], 1.0).to_event(1),
    )


WITHOUT_GUIDE = ("bridge", "reciprocal", "quadrature")
EVIDENCE = {
    "samples of annealing": Case(
        estimating("ais", num_samples=50), SettingError, "'ais' has no num_samples.*num_chains"
    ),
    "importance sampling without a guide": Case(
        estimating("importance", guided=False), SettingError, "'importance' draws from a guide.*'quadrature'"
    ),
    "annealing from a guide that is not there": Case(
        estimating("ais", guided=False, start="guide"), SettingError, "guide"
    ),
    "an unknown preset": Case(estimating("ais", preset="slow"), SettingError, "'ais' has no preset 'slow'.*'wu2017'"),
    "misspelt setting of a method": Case(
        estimating("ais", num_temperature=3), SettingError, "'num_temperature'.*'num_temperatures'"
    ),
    "misspelt setting of the wrapper's method": Case(
        lambda model, guide, folder: AEVB(model, guide).log_marginal(X, method="bridge", num_chain=4),
        SettingError,
        "'num_chain'.*'num_chains'",
    ),
    "chains below 1": Case(estimating("ais", num_chains=0), SettingError, "num_chains.*got 0"),
    "temperatures below 1": Case(estimating("ais", num_temperatures=-1), SettingError, "num_temperatures.*got -1"),
    "leapfrog steps below 1": Case(estimating("ais", num_leapfrog=0), SettingError, "num_leapfrog.*got 0"),
    "posterior draws below 1": Case(estimating("bridge", num_draws=0), SettingError, "num_draws.*got 0"),
    "chains of the bridge below 1": Case(estimating("bridge", num_chains=0), SettingError, "num_chains.*got 0"),
    "simulations below 1": Case(
        lambda model, guide, folder: bdmc(model, guide, X, num_simulations=0, progress=False),
        SettingError,
        "num_simulations.*got 0",
    ),
    "quadrature of four latents": Case(
        estimating("quadrature"),
        SettingError,
        "up to 3 unconstrained.*have 4",
        four_latents,
        lambda: Guide(lambda loc, scale: dist.Normal(torch.stack([loc, loc], -2), 1.0).to_event(2)),
    ),
    "a guide of another model": Case(
        estimating("ais"), GuideError, r"lacks.*\['z'\]", guide=lambda: Guide(sites=("other",))
    ),
    "globals that no guide draws": Case(
        estimating("bridge", NormalNormal.fixture()[1], guided=False),
        ModelError,
        r"\['g'\] lie outside.*guide=None",
        lambda: NormalNormal().model,
    ),
    "globals that are not given": Case(
        lambda model, guide, folder: LogDensity(model, NormalNormal.fixture()[1]),
        ModelError,
        r"\['g'\] lie outside.*given=",
        lambda: NormalNormal().model,
    ),
    "globals of posterior draws that are not given": Case(
        lambda model, guide, folder: hmc_posterior(model, NormalNormal.fixture()[1], progress=False),
        ModelError,
        r"\['g'\] lie outside.*given=",
        lambda: NormalNormal().model,
    ),
}
EVIDENCE |= {
    f"{mistake}, {method}": Case(estimating(method, data, guided=False), error, names, model)
    for mistake, (data, error, names, model) in {
        "rows that are not independent": (X, ModelError, "'x'", TiedRows),
        "a discrete latent": (X, ModelError, r"'z' is discrete \(Bernoulli\)", lambda: Model(discrete)),
        "data outside the support": (X, DataError, r"'x'.*\[0, 1", lambda: Model(likelihood=exponential)),
        "NaN in a row": (NAN_IN_ROW_17, DataError, "row 17", Model),
        "no rows": (X[:0], DataError, "no rows", Model),
    }.items()
    for method in ("ais", *WITHOUT_GUIDE)
}

FILES = {
    "missing file": Case(
        lambda model, guide, folder: AEVB.load(folder / "nothing", model, guide=guide), FileError, "nothing is missing"
    ),
    "damaged file": Case(loading(truncate), FileError, "damaged"),
    "another version": Case(loading(change_version), FileError, "format 99"),
    "another model": Case(
        loading(lambda path: None),
        FileError,
        r"another model.*\['z'\]",
        lambda: Model(lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1)),
        lambda: Guide(lambda loc, scale: dist.LogNormal(loc, scale).to_event(1)),
    ),
    "another guide": Case(loading(lambda path: None), FileError, "another model", guide=lambda: Guide(size=3)),
    "no folder to save to": Case(
        lambda model, guide, folder: AEVB(model, guide).save(folder / "a" / "b"), FileError, "Could not write"
    ),
}


def stepping(*batches, **settings):
    """Take a step on each batch, the first ones right."""

    def step(model, guide, folder):
        vi = AEVB(model, guide, **settings)
        for batch in batches:
            vi.partial_fit(batch)

    return step


def training(data, **settings):
    """Fit without a batch size, which an iterator has by itself."""
    return lambda model, guide, folder: AEVB(model, guide).fit(data(), progress=False, **settings)


def encoding(encoder, **settings):
    return lambda model, guide, folder: AEVB(model, AutoAmortizedNormal(model, encoder=encoder, **settings)).embed(X)


def drawing_chains(data=X, **settings):
    return lambda model, guide, folder: hmc_posterior(model, data, progress=False, **settings)


HALF = torch.ones_like(X, dtype=torch.bool)
MASKED = np.ma.masked_array(X.numpy(), mask=X.numpy() > 0)
STREAMS = {
    "a step on no rows": Case(stepping(X[:0]), DataError, r"no rows.*float32 \[0, 4\]"),
    "a step on nothing": Case(wrapped("partial_fit"), DataError, "no rows"),
    "a step on text": Case(stepping("rows"), DataError, "argument 0, got str"),
    "a step on a list of numbers": Case(stepping([1.0, 2.0]), DataError, "argument 0, got list"),
    "a step on one number": Case(stepping(torch.tensor(1.0)), DataError, r"no rows.*float32 \[\]"),
    "a step on NaN": Case(stepping(NAN_IN_ROW_3), DataError, "NaN or infinity in argument 0"),
    "a step on rows of another width": Case(stepping(X[:, :3]), ModelError, r"float32 \[30, 3\]"),
    "a step on a row that is no row": Case(stepping(X[0]), ModelError, r"float32 \[4\]"),
    "a step on unequal lengths": Case(
        lambda model, guide, folder: AEVB(model, guide).partial_fit(X, X[:4]), DataError, r"\{0: 30, 1: 4\}"
    ),
    "a step on complex numbers": Case(stepping(X.to(torch.complex64)), ModelError, "complex64"),
    "a step on a sparse tensor": Case(stepping(X.to_sparse()), DataError, r"dense.*sparse_coo.*to_dense"),
    "a learning rate below 0": Case(
        wrapped("partial_fit", X, learning_rate=-1.0), SettingError, "learning_rate.*got -1"
    ),
    "a seed below 0": Case(wrapped("partial_fit", X, seed=-1), SettingError, "seed must be an integer.*got -1"),
    "an unknown number of rows": Case(stepping(X, num_data="shrinking"), SettingError, "'growing'.*got 'shrinking'"),
    "part of a row": Case(stepping(X, num_data=2.5), SettingError, "num_data.*got 2.5"),
    "no effective rows": Case(stepping(X, effective_num_data=0), SettingError, "effective_num_data.*got 0"),
    "two numbers of rows": Case(stepping(X, num_data=30, effective_num_data=30), SettingError, "one of the two"),
    "an empty iterator": Case(training(lambda: iter([])), DataError, "no batch with rows.*anew"),
    "an iterator of text": Case(training(lambda: iter("rows")), DataError, "argument 0, got str"),
    "a batch size of an iterator": Case(
        training(lambda: iter([X]), batch_size=3), SettingError, "batch_size=3.*IterableDataset"
    ),
    "held-out data of an iterator": Case(
        training(lambda: X, validation=iter([X])), SettingError, "iterator lasts for one.*validation="
    ),
    "part of a batch": Case(fitting(batch_size=2.5), SettingError, "batch_size.*got 2.5"),
    "no data": Case(fitting(None), DataError, "argument 0, got NoneType"),
    "numbers in lists": Case(fitting([[1.0, 2.0]]), DataError, "argument 0, got list"),
    "a sparse tensor": Case(fitting(X.to_sparse()), DataError, "dense.*sparse_coo"),
    "a tensor without numbers": Case(fitting(X.to("meta")), DataError, "meta device"),
    "an array of words": Case(fitting(np.array(["a"] * 30)), DataError, "argument 0.*<U1"),
    "a masked array": Case(fitting(MASKED), DataError, "masked array as argument 0.*obs_mask"),
    "an argument that the model does not have": Case(fitting({"y": X}), ModelError, "unexpected keyword argument 'y'"),
    "one argument too many": Case(fitting((X, X)), ModelError, "positional arguments"),
}


def one_for_all(x):
    """A distribution of one number for a row's four."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)


class Endless(torch.utils.data.Dataset):
    """Rows without a number of them."""

    def __getitem__(self, index):
        return X[index % 30]


class Nothing(torch.utils.data.IterableDataset):
    """A stream that ends at once."""

    def __iter__(self):
        return iter(())


def forked(model, guide, folder):
    from lightning_fabric import Fabric

    posterior(model, guide, X, fabric=Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn"))


REST = {
    "data wider than their distribution": Case(
        lambda model, guide, folder: AEVB(model).fit(X, progress=False),
        ModelError,
        r"'x' observes data of shape \[30, 4\] under a distribution of shape \[30, 1\]",
        lambda: one_for_all,
    ),
    "data wider than their distribution, new rows": Case(
        lambda model, guide, folder: AEVB(model).posterior(X),
        ModelError,
        r"\[\d+, 4\].*\[\d+, 1\]",
        lambda: one_for_all,
    ),
    "held-out data of another width": Case(fitting(validation=X[:, :3]), ModelError, r"validation=.*float32 \[30, 3\]"),
    "held-out data with NaN": Case(fitting(validation=NAN_IN_ROW_17), DataError, "validation=.*NaN.*argument 0"),
    "held-out data with NaN further on": Case(
        fitting(validation=torch.cat([X, X, X, X, NAN_IN_ROW_17])), DataError, "validation=.*argument 0, row 137"
    ),
    "held-out data outside the support": Case(
        fitting(X.sign().clamp(min=0), validation=torch.cat([X.sign().clamp(min=0)] * 4 + [X])),
        DataError,
        "validation=.*'x' lie outside the support",
        lambda: Model(likelihood=lambda loc: dist.Bernoulli(logits=loc).to_event(1)),
    ),
    "held-out data that are none": Case(fitting(validation=Nothing()), DataError, "validation=.*empty"),
    "a dataset without a length": Case(training(Endless), DataError, "Endless has no length.*IterableDataset"),
    "an argument without a name": Case(fitting({0: X}), DataError, "by their names, got the key 0"),
    "a file of draws with an empty name": Case(
        lambda model, guide, folder: export_posterior(model, guide, X, path=""), SettingError, "name a file, got ''"
    ),
    "a device that is none": Case(wrapped("to", "tpu9"), SettingError, "'cpu' or 'cuda:0', got 'tpu9'"),
    "a device of another machine": Case(wrapped("to", "cuda:99"), SettingError, "got 'cuda:99'"),
    "processes in words": Case(fitting(fabric="ddp"), SettingError, "must be a Fabric.*got 'ddp'"),
    "processes in words, new rows": Case(drawing(fabric="ddp"), SettingError, "must be a Fabric.*got 'ddp'"),
    "processes that are forked": Case(forked, SettingError, "DDPStrategy in forked processes.*strategy='ddp'"),
    "a masked array of rows to draw": Case(wrapped("posterior", MASKED), DataError, "masked array"),
    "sparse rows to draw": Case(drawing(X.to_sparse()), DataError, "dense.*sparse_coo"),
    "rows to draw that are none": Case(drawing(None), ModelError, "0: None.*tensors or numpy arrays"),
    "part of a draw": Case(drawing(num_samples=2.5), SettingError, "num_samples.*got 2.5"),
    "infinity in rows to weigh": Case(weighing(INF_IN_ROW_17), DataError, "argument 0, row 17"),
    "a number as method": Case(weighing(method=3), SettingError, "Unknown method 3.*'importance'"),
    "a comparison with an unknown sampler": Case(
        wrapped("compare", X, against="gibbs"), SettingError, "'hmc', 'nuts', got 'gibbs'"
    ),
    "a comparison of no rows": Case(wrapped("compare", X[:0]), DataError, "no rows"),
    "a comparison of rows with NaN": Case(
        wrapped("compare", NAN_IN_ROW_17), DataError, "NaN or infinity in argument 0"
    ),
    "misspelt setting of compare": Case(wrapped("compare", X, ledgers=True), SettingError, "'ledgers'.*'ledger'"),
    "misspelt setting of compare's chains": Case(
        wrapped("compare", X, sampling={"num_chain": 4}), SettingError, "'num_chain'.*'num_chains'"
    ),
    "a mask of another shape": Case(wrapped("impute", X, observed=HALF[:3]), DataError, r"\[3, 4\].*'x' \[30, 4\]"),
    "a mask of numbers": Case(wrapped("impute", X, observed=torch.rand(30, 4)), DataError, "boolean.*float32"),
    "a mask in words": Case(wrapped("impute", X, observed="all"), DataError, "boolean tensor.*'all'"),
    "nothing to impute": Case(wrapped("impute", X), SettingError, "Nothing says what is missing"),
    "imputations below 1": Case(wrapped("impute", X, observed=HALF, num_samples=0), SettingError, "num_samples.*got 0"),
    "no rows to impute": Case(wrapped("impute", X[:0], observed=HALF[:0]), DataError, "no rows"),
    "no chains": Case(drawing_chains(num_chains=0), SettingError, "num_chains.*got 0"),
    "an odd number of chains": Case(drawing_chains(num_chains=3), SettingError, "even integer.*got 3"),
    "no draws of chains": Case(drawing_chains(num_samples=0), SettingError, "num_samples.*got 0"),
    "an unknown trajectory": Case(drawing_chains(trajectory="nuts"), SettingError, "jittered, chees; got 'nuts'"),
    "misspelt setting of chains": Case(drawing_chains(num_chain=4), SettingError, "'num_chain'.*'num_chains'"),
    "NaN for chains": Case(drawing_chains(NAN_IN_ROW_17), DataError, "row 17.*site 'x'"),
    "text for chains": Case(drawing_chains("rows"), ModelError, "'x' has the value 'rows'"),
    "an encoder that is none": Case(encoding("mlp"), SettingError, "nn.Module.*got str"),
    "an encoder of another width": Case(encoding(nn.Linear(3, 8)), GuideError, r"encoder Linear failed.*\[30, 4\]"),
    "an encoder that mixes rows": Case(
        encoding(nn.Flatten(0)), GuideError, r"must return \[30, 'features'\].*got \[120\]"
    ),
    "an encoder of an unknown site": Case(encoding({"w": nn.Linear(4, 8)}), GuideError, r"\['w'\].*\['z'\]"),
    "an initial scale below 0": Case(encoding(None, init_scale=-1.0), SettingError, "init_scale.*got -1.0"),
    "an unknown guide of globals": Case(
        encoding(None, global_guide="laplace"), SettingError, "global_guide.*'laplace'"
    ),
    "an encoder of nothing": Case(making(MLPEncoder, 0), SettingError, r"event_shape.*\(0,\)"),
    "images without height": Case(making(ConvEncoder, 0), SettingError, r"event_shape.*\(0,\)"),
    "a weight of the KL below 0": Case(making(SGVB, kl_weight=-1.0), SettingError, "kl_weight.*got -1.0"),
    "a weight of the KL in words": Case(making(SGVB, kl_weight="full"), SettingError, "kl_weight.*got 'full'"),
    "free bits that are NaN": Case(making(SGVB, free_bits=float("nan")), SettingError, "free_bits.*got nan"),
    "part of a particle": Case(making(SGVB, 1.5), SettingError, "num_particles.*got 1.5"),
    "an objective in words": Case(fitting(objective=lambda: "elbo"), SettingError, "str has no differentiable_loss"),
    "an objective that is a class": Case(fitting(objective=lambda: SGVB), SettingError, "has no differentiable_loss"),
    "a model that is none": Case(lambda model, guide, folder: AEVB(None), SettingError, "got None"),
    "a folder as file": Case(
        lambda model, guide, folder: AEVB(model, guide).save(folder), FileError, "Could not write"
    ),
    "a folder as file of draws": Case(
        lambda model, guide, folder: export_posterior(model, guide, X, path=folder, num_samples=2, seed=0),
        FileError,
        "Could not write",
    ),
    "a file of draws without a name": Case(
        lambda model, guide, folder: export_posterior(model, guide, X, path=None), SettingError, "path.*got None"
    ),
    "a template of text": Case(
        lambda model, guide, folder: simulate(model, "rows"), ModelError, "'x' has the value 'rows'"
    ),
}

CASES = MODELS | GUIDES | DATA | SETTINGS | EVIDENCE | FILES | STREAMS | REST


def state_of(*programs):
    """Return everything that a failure must leave as it was."""
    modules = [program for program in programs if isinstance(program, nn.Module)]
    tensors = [value.detach().clone() for module in modules for value in module.state_dict().values()]
    modes = [part.training for module in modules for part in module.modules()]
    store = {name: value.clone() for name, value in pyro.get_param_store().items()}
    return tensors, modes, store, torch.get_rng_state(), np.random.get_state()[1].copy()


@pytest.fixture
def unchecked():
    """Run as users do, without the run-time check of annotations, which refuses some mistakes before the package does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_nothing_is_lost(name, tmp_path):
    case = CASES[name]
    model, guide = case.model(), case.guide()
    pyro.param("mine", torch.tensor(3.0))
    tensors, modes, store, *generators = state_of(model, guide)

    with pytest.raises(case.error) as caught:
        case.do(model, guide, tmp_path)

    assert type(caught.value) is case.error
    assert re.search(case.names, str(caught.value), re.DOTALL), str(caught.value)
    after = state_of(model, guide)
    assert all(torch.equal(a, b) for a, b in zip(tensors, after[0], strict=True))
    assert modes == after[1]
    assert store.keys() == after[2].keys() == {"mine"}
    assert torch.equal(store["mine"], after[2]["mine"])
    assert torch.equal(generators[0], after[3])
    assert np.array_equal(generators[1], after[4])


class TestAccepted:
    """What looks like a mistake and is none."""

    def masked(self, x, *, site):
        seen = ~x.isnan()
        with pyro.plate("data", len(x)):
            loc = torch.where(seen, x, 0.0).mean(-1)
            if site == "guide":
                shift = pyro.param("shift", torch.tensor(0.0))
                pyro.sample("z", dist.Normal(loc + shift, 1.0))
            else:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("pixels", x.shape[1], dim=-2), pyro.poutine.mask(mask=seen.T):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def test_nan_that_is_masked(self):
        model, guide = functools.partial(self.masked, site="model"), functools.partial(self.masked, site="guide")
        result = fit(model, guide, SGVB(), NAN_IN_ROW_17)
        assert result.num_skipped == 0
        assert np.isfinite(result.history[0]["bound"])
        assert posterior(model, guide, NAN_IN_ROW_17, num_samples=2)["z"].isfinite().all()
        assert log_marginal(model, guide, NAN_IN_ROW_17).value.isfinite().all()

    def test_the_row_that_is_not_masked_is_named(self):
        def partly(x, *, site):
            seen = ~x.isnan()
            seen[:, 3] = True  # the mask forgets this column
            with pyro.plate("data", len(x)):
                loc = torch.where(x.isnan(), 0.0, x).mean(-1)
                z = pyro.sample("z", dist.Normal(loc if site == "guide" else 0.0, 1.0))
                if site == "model":
                    shift = pyro.param("shift", torch.tensor(0.0))
                    with pyro.plate("pixels", x.shape[1], dim=-2), pyro.poutine.mask(mask=seen.T):
                        pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x.T)

        x = NAN_IN_ROW_17.clone()
        x[23, 3] = float("nan")
        with pytest.raises(DataError, match=r"row 23.*'x'"):
            fit(functools.partial(partly, site="model"), functools.partial(partly, site="guide"), SGVB(), x)

    def test_unused_whole_numbers(self):
        model, guide = Model(), Guide()
        labelled = lambda program: lambda x, label: program(x)  # noqa: E731
        assert fit(labelled(model), labelled(guide), SGVB(), (X, torch.arange(30))).num_steps == 3
