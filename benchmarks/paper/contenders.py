"""Figure 3's three ways to train one decoder: AEVB, wake-sleep, and Monte Carlo EM, each with its networks kept on the way."""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

from benchmarks.paper.curves import Adagrads, Clock, obey, snapshot_path, train_curve, write_state
from benchmarks.paper.models import FaceVAE, make_vae
from benchmarks.paper.settings import BATCH_SIZE, RATES, Curve, due, load_images
from benchmarks.paper.tables import read_table, write_table
from benchmarks.programs import VAE
from pyro_aevb import MonteCarloEM, log_marginal
from pyro_aevb.errors import AEVBWarning, NonFiniteError
from pyro_aevb.training.result import EMEpochEnd

__all__ = ["chosen_rate", "snapshots", "train"]

_WEIGHT_UPDATES = 5
"""Updates of the weights after each trajectory (App. E)."""
_TRIAL_SAMPLES = 50_000
_TRIAL_ROWS = 20
_CHECKPOINT_SAMPLES = 50_000
"""Training samples from one checkpoint to the next."""


def train(curve: Curve, num_samples: int, state: Path) -> None:
    """Train a contender and keep its networks at log-spaced numbers of samples."""
    if curve.method == "mcem":
        _train_em(curve, num_samples, state)
    else:
        train_curve(curve, num_samples, state, keeps_snapshots=True)


def snapshots(curve: Curve, state: Path) -> dict[int, Path]:
    """Return where the networks are kept, by training samples."""
    found = {path.stem.removeprefix(f"{curve.name}_"): path for path in state.glob(f"{curve.name}_*.pt")}
    return {int(samples): found[samples] for samples in sorted(filter(str.isdigit, found), key=int)}


class _Follower(Clock):
    """Keep the networks after the epochs in which a point of the grid lies.

    Args:
        curve: The run.
        vae: Its networks.
        path: Where they are kept.
        last: The last epoch, which is a point wherever it lies.
    """

    def __init__(self, curve: Curve, vae: VAE | FaceVAE, path: Path, last: int) -> None:
        self.curve, self.vae, self.path, self.last = curve, vae, path, last

    def __call__(self, event: EMEpochEnd) -> None:
        """Follow one epoch."""
        samples = event.epoch * self.curve.num_train
        self.seconds += event.record["seconds"]
        if due(samples, self.curve.num_train) or event.epoch == self.last:
            write_state(snapshot_path(self.path, samples), self.vae.state_dict())


def batch_size(curve: Curve) -> int:
    """Return all rows for few of them, as the paper has it, and minibatches for the online variant of many."""
    return curve.num_train if curve.num_train <= 1_000 else BATCH_SIZE


def _train_em(curve: Curve, num_samples: int, state: Path) -> None:
    """Train by Monte Carlo EM, bit for bit on from where an earlier run ended."""
    path, num_epochs = state / f"{curve.name}.pt", math.ceil(num_samples / curve.num_train)
    if path.is_file() and max(snapshots(curve, state), default=0) >= num_epochs * curve.num_train:
        return
    rate, vae = _choose_rate(curve, min(_TRIAL_SAMPLES, num_samples), state), make_vae(curve, 784)
    write_state(snapshot_path(path, 0), vae.state_dict())
    follower = _Follower(curve, vae, path, num_epochs)
    every = max(1, _CHECKPOINT_SAMPLES // batch_size(curve))
    settings = {"callbacks": [follower], "checkpoint": state / curve.name, "every": every, "keep": 1, "resume": True}
    _fit(curve, vae, rate, num_epochs, **settings)
    write_state(path, vae.state_dict())
    write_table(path.with_suffix(".csv"), [{"samples": num_epochs * curve.num_train, "seconds": follower.seconds}])


def _choose_rate(curve: Curve, num_samples: int, state: Path) -> float:
    """Return the rate whose decoder gives training rows the highest log p(x) after the first samples."""
    path = state / f"{curve.name}_rates.csv"
    if not path.is_file():
        num_epochs, found = math.ceil(num_samples / curve.num_train), []
        x = load_images(curve.data, curve.num_train).train[:_TRIAL_ROWS]
        for rate in RATES:
            vae = make_vae(curve, 784)
            try:
                _fit(curve, vae, rate, num_epochs)
            except NonFiniteError:
                found.append({"rate": rate, "log_marginal": -math.inf})
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AEVBWarning)  # rates are compared on the same rows and draws
                result = log_marginal(vae.model, None, x, method="ais", preset="fast", seed=0, progress=False)
            mean = float(result.value.mean())
            found.append({"rate": rate, "log_marginal": mean if mean == mean else -math.inf})
        write_table(path, found)
    return chosen_rate(curve, state)


def chosen_rate(curve: Curve, state: Path) -> float:
    """Return the rate that did best in the trials."""
    rows = read_table(state / f"{curve.name}_rates.csv")
    return float(max(rows, key=lambda row: row["log_marginal" if curve.method == "mcem" else "train_bound"])["rate"])


def _fit(curve: Curve, vae: VAE | FaceVAE, rate: float, num_epochs: int, **settings: Any) -> None:
    """Train by Monte Carlo EM, all of App. E's numbers in it, with the prior N(0, I) on weight matrices."""
    em = MonteCarloEM(vae.model, num_leapfrog=10, target_accept_prob=0.9, num_weight_updates=_WEIGHT_UPDATES)
    x = load_images(curve.data, curve.num_train).train
    settings = {"batch_size": batch_size(curve), "seed": curve.seed, "progress": False, **settings}
    result = em.fit(x, num_epochs=num_epochs, optimizer=Adagrads(vae, rate), **settings)
    sys.stderr.write(f"{curve.name}, rate {rate}: {num_epochs} epochs, {result}\n")
    obey(result.stopped_by)
