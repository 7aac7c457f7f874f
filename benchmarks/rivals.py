r"""AEVB beside its rivals on MNIST: wake-sleep, both importance-weighted kin, Monte Carlo EM, and mean fields without an encoder.

The paper compares AEVB with wake-sleep and Monte Carlo EM (arXiv 1312.6114, section 5, Figures 2 and 3). Here all train the same
decoder from the same weights, with the same optimizer and the same number of minibatch steps, on pixels that were drawn once from
the grey levels, so that log p(x) is one of binary data. Decoders are then judged by one estimator of log p(x) of test digits,
which knows no encoder: annealing from the prior. Encoders are judged by their bound on test digits; some contenders have none.
"""

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.optim import Adam

from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.timing import threads
from pyro_aevb import IWELBO, SGVB, fit, log_marginal
from pyro_aevb._types import PyroProgram
from pyro_aevb.datasets import mnist
from pyro_aevb.errors import AEVBWarning
from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
from pyro_aevb.training.em import MonteCarloEM

__all__ = ["run"]

BATCH_SIZE = 100
LEARNING_RATE = 1e-3
NUM_DRAWS = 10
NUM_IMPORTANCE_SAMPLES = 10
CHUNK = 1000


class Setting(NamedTuple):
    """One comparison.

    Attributes:
        num_train: Training digits, the first ones.
        hidden: Hidden units of encoder and decoder.
        latent: Latents.
        num_steps: Minibatches of each contender.
        num_test: Test digits for the bound.
        num_weighed: Test digits for log p(x).
        num_temperatures: Temperatures of annealing.
        has_fixed_rows: Whether there are so few digits that each may have variational parameters of its own.
    """

    num_train: int
    hidden: int
    latent: int
    num_steps: int
    num_test: int
    num_weighed: int
    num_temperatures: int
    has_fixed_rows: bool


QUICK = Setting(1000, 100, 3, 300, 1000, 10, 50, has_fixed_rows=True)
SMALL = Setting(1000, 100, 3, 20_000, 10_000, 100, 300, has_fixed_rows=True)
"""The left panel of Figure 3."""
LARGE = Setting(50_000, 500, 20, 20_000, 10_000, 100, 1000, has_fixed_rows=False)
"""Where AEVB must end above wake-sleep in test bound."""


class Trained(NamedTuple):
    """One contender, judged; nats per row.

    Attributes:
        bound: ELBO of test digits under the contender's encoder; ``None`` without one.
        log_marginal: log p(x) of test digits.
        standard_error: Monte Carlo error of that mean.
        seconds: Time of training.
    """

    bound: float | None
    log_marginal: float
    standard_error: float
    seconds: float


class Measured(NamedTuple):
    """What one setting found, by contender."""

    setting: Setting
    trained: dict[str, Trained]


Train = Callable[[VAE, Tensor, Setting], PyroProgram | None]
"""Trains a decoder and returns the guide that can encode new rows, if there is one."""


def run(*, quick: bool) -> Result:
    data = mnist("stochastic")
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", AEVBWarning)  # rows that annealing is unsure of show in the standard error
        measured = [_measure(setting, data.train, data.test) for setting in ((QUICK,) if quick else (LARGE, SMALL))]
    return Result(
        title="AEVB beside wake-sleep, its reweighted form, the importance-weighted bound, Monte Carlo EM and mean fields",
        setting=f"MNIST, pixels drawn once; the same initial weights, Adam {LEARNING_RATE}, batches of {BATCH_SIZE}, one seed, "
        f"one thread, steps compiled where they repay it. "
        f"{'; '.join(_told(item.setting) for item in measured)}. Test bound: ELBO, {NUM_DRAWS} draws. log p(x): "
        f"annealed importance sampling from the prior, 16 chains.",
        rows=[row for item in measured for row in _table(item)],
        notes=(
            "A minibatch step of Monte Carlo EM is one trajectory of 10 leapfrog steps and 5 updates of the decoder; the others "
            "make one update.",
            "A step of Pyro's mean field (`AutoNormal` under `SGVB`) takes all training digits, each of which has parameters of "
            "its own; it can't encode others.",
            "Wake-sleep and its reweighted form do not train for the test bound, which is the ELBO for all.",
            "Bound and log p(x) are means over different numbers of test digits: compare each among contenders.",
        ),
    )


def _measure(setting: Setting, train: Tensor, test: Tensor) -> Measured:
    """Train and judge all contenders of a setting."""
    trained = {}
    for name, contender in _contenders(setting).items():
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = VAE(hidden=setting.hidden, latent=setting.latent)
        start = time.perf_counter()
        guide = contender(vae, train[: setting.num_train], setting)
        seconds = time.perf_counter() - start
        trained[name] = _judge(vae, guide, test, setting, seconds)
        sys.stderr.write(f"rivals, {setting.num_train} rows, {name}: {trained[name]}\n")
    return Measured(setting, trained)


def _contenders(setting: Setting) -> dict[str, Train]:
    few = NUM_IMPORTANCE_SAMPLES
    contenders: dict[str, Train] = {
        "AEVB": partial(_train_amortized, SGVB()),
        "wake-sleep": partial(_train_amortized, WakeSleep()),
        f"reweighted wake-sleep, K = {few}": partial(_train_amortized, ReweightedWakeSleep(few)),
        f"importance-weighted bound, K = {few}": partial(_train_amortized, IWELBO(few)),
        "Monte Carlo EM": _train_em,
    }
    return contenders | ({"Pyro's mean field, all rows a step": _train_rows} if setting.has_fixed_rows else {})


def _train_amortized(objective: Objective, vae: VAE, x: Tensor, setting: Setting) -> PyroProgram:
    fit(
        vae.model,
        vae.guide,
        objective,
        x,
        num_epochs=setting.num_steps * BATCH_SIZE // setting.num_train,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        seed=0,
        progress=False,
    )
    return vae.guide


def _train_em(vae: VAE, x: Tensor, setting: Setting) -> None:
    MonteCarloEM(vae.model).fit(
        x,
        num_epochs=setting.num_steps * BATCH_SIZE // setting.num_train,
        batch_size=BATCH_SIZE,
        optimizer=partial(Adam, lr=LEARNING_RATE),
        seed=0,
        progress=False,
    )


def _train_rows(vae: VAE, x: Tensor, setting: Setting) -> None:
    fit(
        vae.model,
        AutoNormal(vae.model),
        SGVB(),
        x,
        num_epochs=setting.num_steps,
        batch_size=len(x),
        learning_rate=LEARNING_RATE,
        seed=0,
        progress=False,
    )


def _judge(vae: VAE, guide: PyroProgram | None, test: Tensor, setting: Setting, seconds: float) -> Trained:
    """Evaluate a decoder, and its encoder where there is one."""
    pyro.set_rng_seed(1)
    bound = None
    if guide is not None:
        objective = SGVB(NUM_DRAWS)
        parts = test[: setting.num_test].split(CHUNK)
        bound = float(torch.cat([objective.bounds(vae.model, guide, part).local for part in parts]).mean())
    result = log_marginal(
        vae.model,
        None,
        test[: setting.num_weighed],
        method="ais",
        num_temperatures=setting.num_temperatures,
        seed=0,
        progress=False,
    )
    error = float(result.standard_error.square().sum().sqrt()) / setting.num_weighed
    return Trained(bound, float(result.value.mean()), error, seconds)


def _told(setting: Setting) -> str:
    return (
        f"{setting.num_train:,} training digits: 784-{setting.hidden}-{setting.latent}-{setting.hidden}-784, "
        f"{setting.num_steps:,} minibatch steps, bound of {setting.num_test:,} and log p(x) of {setting.num_weighed} test digits "
        f"({setting.num_temperatures} temperatures)"
    )


def _table(measured: Measured) -> list[Row]:
    setting, trained = measured
    rows = [
        Row(
            f"{setting.num_train:,} digits, {name}: test log p(x)",
            f"{item.log_marginal:.2f}",
            f"SE {item.standard_error:.2f}; test bound {'none' if item.bound is None else f'{item.bound:.2f}'}; "
            f"{item.seconds:.0f} s",
        )
        for name, item in trained.items()
    ]
    ours, theirs = trained["AEVB"].bound, trained["wake-sleep"].bound
    difference = float("nan") if ours is None or theirs is None else ours - theirs
    has_bar = setting is LARGE
    return [
        *rows,
        Row(
            f"{setting.num_train:,} digits, test bound: AEVB minus wake-sleep",
            f"{difference:+.2f} nats",
            "",
            "> 0" if has_bar else "",
            difference > 0 if has_bar else None,
        ),
    ]
