"""Figure 3's three ways to train one decoder: AEVB, wake-sleep, and Monte Carlo EM, each with its networks kept on the way."""

import math
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import nn
from torch.optim import Adagrad, Optimizer

from benchmarks.paper.curves import snapshot_path, train_curve, write_state
from benchmarks.paper.models import FaceVAE, make_vae
from benchmarks.paper.settings import BATCH_SIZE, RATES, Curve, due, load_images
from benchmarks.paper.tables import read_table, write_table
from benchmarks.programs import VAE
from pyro_aevb import MonteCarloEM, log_marginal
from pyro_aevb.errors import AEVBWarning

__all__ = ["snapshots", "train"]

_WEIGHT_UPDATES = 5
"""Updates of the weights after each trajectory (App. E)."""
_TRIAL_SAMPLES = 50_000
_TRIAL_ROWS = 20


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


class _Following:
    """Make Adagrad that keeps the networks after so many samples, for a fit that tells nobody of its epochs.

    Args:
        curve: The run.
        vae: Its networks.
        rate: Global step.
        path: Where they are kept; ``None`` keeps none.
    """

    def __init__(self, curve: Curve, vae: VAE | FaceVAE, rate: float, path: Path | None) -> None:
        self.curve, self.vae, self.rate, self.path = curve, vae, rate, path
        self.num_updates = 0
        self.batch = batch_size(curve)

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Adagrad:
        """Make the optimizer, with the prior N(0, I) on weight matrices."""
        groups = [{"params": [item], "weight_decay": float(item.dim() == 2)} for item in parameters]
        optimizer = Adagrad(groups, lr=self.rate)
        optimizer.register_step_post_hook(self._follow)
        return optimizer

    def _follow(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Count an update, and keep the networks where a point of the grid is reached."""
        self.num_updates += 1
        steps, rest = divmod(self.num_updates, _WEIGHT_UPDATES)
        if self.path is not None and not rest and due(steps * self.batch, self.batch):
            write_state(snapshot_path(self.path, steps * self.batch), self.vae.state_dict())


def batch_size(curve: Curve) -> int:
    """Return all rows for few of them, as the paper has it, and minibatches for the online variant of many."""
    return curve.num_train if curve.num_train <= 1_000 else BATCH_SIZE


def _train_em(curve: Curve, num_samples: int, state: Path) -> None:
    """Train by Monte Carlo EM in one go, for its chains can't be taken up again."""
    path = state / f"{curve.name}.pt"
    if max(snapshots(curve, state), default=0) >= num_samples - curve.num_train and path.is_file():
        return
    rate, begin = _choose_rate(curve, min(_TRIAL_SAMPLES, num_samples), state), time.perf_counter()
    vae = make_vae(curve, 784)
    write_state(snapshot_path(path, 0), vae.state_dict())
    _fit(curve, vae, _Following(curve, vae, rate, path), math.ceil(num_samples / curve.num_train))
    write_state(path, vae.state_dict())
    samples = curve.num_train * math.ceil(num_samples / curve.num_train)
    write_state(snapshot_path(path, samples), vae.state_dict())
    write_table(path.with_suffix(".csv"), [{"samples": samples, "seconds": time.perf_counter() - begin}])


def _choose_rate(curve: Curve, num_samples: int, state: Path) -> float:
    """Return the rate whose decoder gives training rows the highest log p(x) after the first samples."""
    path = state / f"{curve.name}_rates.csv"
    if not path.is_file():
        num_epochs, found = math.ceil(num_samples / curve.num_train), []
        x = load_images(curve.data, curve.num_train).train[:_TRIAL_ROWS]
        for rate in RATES:
            vae = make_vae(curve, 784)
            _fit(curve, vae, _Following(curve, vae, rate, None), num_epochs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AEVBWarning)  # rates are compared on the same rows and draws
                result = log_marginal(vae.model, None, x, method="ais", preset="fast", seed=0, progress=False)
            found.append({"rate": rate, "log_marginal": float(result.value.mean())})
        write_table(path, found)
    return float(max(read_table(path), key=lambda row: row["log_marginal"])["rate"])


def _fit(curve: Curve, vae: VAE | FaceVAE, make: _Following, num_epochs: int) -> None:
    """Train by Monte Carlo EM, all of App. E's numbers in it."""
    begin = time.perf_counter()
    em = MonteCarloEM(vae.model, num_leapfrog=10, target_accept_prob=0.9, num_weight_updates=_WEIGHT_UPDATES)
    x = load_images(curve.data, curve.num_train).train
    result = em.fit(x, num_epochs=num_epochs, batch_size=make.batch, optimizer=make, seed=curve.seed, progress=False)
    sys.stderr.write(f"{curve.name}, rate {make.rate}: {time.perf_counter() - begin:.0f} s, {result}\n")
