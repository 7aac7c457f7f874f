"""Train one curve through ``AEVB.fit``, follow its bounds, and go on where an earlier run ended."""

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Adagrad

from benchmarks.paper.models import FaceVAE, make_vae
from benchmarks.paper.settings import BATCH_SIZE, RATES, Curve, due, load_images
from benchmarks.paper.tables import Row, read_table, write_table
from benchmarks.programs import VAE
from pyro_aevb import AEVB, SGVB, WakeSleep
from pyro_aevb.errors import NonFiniteError
from pyro_aevb.training.loop import EpochEnd, FitResult

__all__ = [
    "Adagrads",
    "Clock",
    "Follower",
    "bound_of",
    "choose_rate",
    "divergence_of",
    "obey",
    "read_vae",
    "snapshot_path",
    "train_curve",
    "write_state",
]

_EVALUATED_ROWS = 10_000
_ROWS_AT_ONCE = 1_000
_TRIAL_SAMPLES = 50_000
"""Training samples after which the rates are compared: "the first few iterations"."""
_CHECKPOINT_STEPS = 500
"""Batches from one checkpoint to the next."""


class Adagrads:
    """Make Adagrad with the paper's prior N(0, I) on weight matrices, as weight decay.

    The loss is a sum over the data set, so that the prior enters once, with weight decay 1. The sleep phase is a sum over the
    dreams of one batch instead: there the prior's share is that of a batch, M / N, for the encoder's weights.

    Args:
        vae: The networks.
        rate: Global step.
        encoder_decay: Weight decay of the encoder's matrices.
        decoder_decay: Weight decay of the decoder's.
    """

    def __init__(
        self, vae: VAE | FaceVAE, rate: float, *, encoder_decay: float = 1.0, decoder_decay: float = 1.0
    ) -> None:
        self.rate = rate
        self.decay = {id(item): encoder_decay for item in vae.encoder.parameters() if item.dim() == 2}
        self.decay |= {id(item): decoder_decay for item in vae.decoder.parameters() if item.dim() == 2}

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Adagrad:
        """Make the optimizer of some parameters."""
        groups = [{"params": [item], "weight_decay": self.decay.get(id(item), 0.0)} for item in parameters]
        return Adagrad(groups, lr=self.rate)


def bound_of(vae: VAE | FaceVAE, x: Tensor, *, seed: int = 0) -> float:
    """Estimate the mean lower bound of rows in nats a row, from one draw each under a fixed seed (Eq 7)."""
    objective = SGVB()
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        parts = [objective.bounds(vae.model, vae.guide, part).local for part in x.split(_ROWS_AT_ONCE)]
    return float(torch.cat(parts).double().mean())


def divergence_of(vae: VAE | FaceVAE, x: Tensor) -> float:
    """Return what the encoder tells of a row, nats: the mean KL of App. B, which is 0 where latents are dead."""
    with torch.no_grad():
        loc, log_variance = vae.encoder(x[:_EVALUATED_ROWS]).chunk(2, -1)
        kl = (loc.square() + log_variance.exp() - log_variance - 1).sum(-1) / 2
    return float(kl.double().mean())


class Clock:
    """Count the seconds of training, over interruptions too: a callback whose state checkpoints keep."""

    seconds = 0.0

    def state_dict(self) -> dict[str, float]:
        """Return the time of training so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Count on from a time."""
        self.seconds = state["seconds"]


class Follower(Clock):
    """Take both bounds at log-spaced numbers of samples, into the fit's history and into a table that grows.

    Args:
        curve: The run.
        vae: Its networks.
        path: Where the table goes, ``.csv``, and the networks of the last point, ``.pt``.
        last: The last epoch, which is a point wherever it lies.
        keeps_snapshots: Whether to keep the networks of each point (:func:`snapshot_path`).
    """

    def __init__(self, curve: Curve, vae: VAE | FaceVAE, path: Path, last: int, *, keeps_snapshots: bool) -> None:
        self.curve, self.vae, self.path, self.last, self.keeps_snapshots = curve, vae, path, last, keeps_snapshots

    def __call__(self, event: EpochEnd) -> None:
        """Follow one epoch."""
        samples = event.epoch * self.curve.num_train
        self.seconds += event.record["seconds"]
        if not due(samples, self.curve.num_train) and event.epoch != self.last:
            return
        point = {"samples": float(samples), **self._bounds()}
        event.record.update(point)
        done = [row for row in read_table(self.path.with_suffix(".csv")) if row["samples"] < samples]
        write_table(self.path.with_suffix(".csv"), [*done, {**point, "samples": samples, "seconds": self.seconds}])
        write_state(self.path, self.vae.state_dict())
        if self.keeps_snapshots:
            write_state(snapshot_path(self.path, samples), self.vae.state_dict())

    def _bounds(self) -> Row:
        """Take the bounds of training and test rows, and what else a point tells."""
        images = load_images(self.curve.data, self.curve.num_train)
        train = images.train[:_EVALUATED_ROWS]
        bounds = {"train_bound": bound_of(self.vae, train), "test_bound": bound_of(self.vae, images.test, seed=1)}
        bounds["train_kl"] = divergence_of(self.vae, train)
        if isinstance(self.vae, FaceVAE):
            with torch.no_grad():
                loc = self.vae.encoder(train).chunk(2, -1)[0]
                bounds["least_scale"] = float(self.vae.decode(loc)[1].min())
        return bounds


def train_curve(curve: Curve, num_samples: int, state: Path, *, keeps_snapshots: bool = False) -> list[Row]:
    """Train a curve up to so many samples, bit for bit on from where an earlier run ended.

    Args:
        curve: The run.
        num_samples: Training samples to reach, whole epochs; a curve that is as long or longer is left as it is.
        state: Directory of runs: checkpoints in a folder for each, beside it its table and its networks.
        keeps_snapshots: Whether to keep the networks of each point (:func:`snapshot_path`).

    Returns:
        A row for each point: ``samples``, ``train_bound``, ``test_bound`` (nats a row), ``seconds`` of training.
    """
    path = state / f"{curve.name}.pt"
    num_epochs = math.ceil(num_samples / curve.num_train)
    done = read_table(path.with_suffix(".csv"))
    if path.is_file() and done and done[-1]["samples"] >= num_epochs * curve.num_train:
        return done
    vae = make_vae(curve, load_images(curve.data, curve.num_train).train.shape[1])
    rate = choose_rate(curve, min(_TRIAL_SAMPLES, num_samples), state)
    if keeps_snapshots:
        write_state(snapshot_path(path, 0), vae.state_dict())
    follower = Follower(curve, vae, path, num_epochs, keeps_snapshots=keeps_snapshots)
    result = _fit(
        curve,
        vae,
        rate,
        num_epochs=num_epochs,
        callbacks=[follower],
        checkpoint=state / curve.name,
        every=_CHECKPOINT_STEPS,
        keep=1,
        resume=True,
    )
    rows = _points(result)
    write_table(path.with_suffix(".csv"), rows)
    write_state(path, vae.state_dict())
    return rows


def _points(result: FitResult) -> list[Row]:
    """Read the points off a fit's history, which a fit that was taken up again has from its beginning."""
    rows, seconds = [], 0.0
    for record in result.history:
        seconds += record["seconds"]
        if "samples" in record:
            names = ("train_bound", "test_bound", "train_kl", "least_scale")
            bounds = {name: record[name] for name in names if name in record}
            rows.append({"samples": int(record["samples"]), **bounds, "seconds": seconds})
    return rows


def choose_rate(curve: Curve, num_samples: int, state: Path) -> float:
    """Return the rate with the best training bound after the first samples, and note all of them (section 5)."""
    path = state / f"{curve.name}_rates.csv"
    if not path.is_file():
        images, found = load_images(curve.data, curve.num_train), []
        for rate in RATES:
            vae = make_vae(curve, images.train.shape[1])
            try:
                _fit(curve, vae, rate, num_epochs=math.ceil(num_samples / curve.num_train))
                bound = bound_of(vae, images.train[:_EVALUATED_ROWS])
            except NonFiniteError:
                bound = -math.inf
            found.append({"rate": rate, "train_bound": bound if bound == bound else -math.inf})
        write_table(path, found)
    return float(max(read_table(path), key=lambda row: row["train_bound"])["rate"])


def _fit(curve: Curve, vae: VAE | FaceVAE, rate: float, *, num_epochs: int, **settings: Any) -> FitResult:
    """Train through ``AEVB.fit`` with the curve's objective and prior."""
    is_wake_sleep = curve.method == "wake_sleep"
    vi = AEVB(vae.model, vae.guide, WakeSleep() if is_wake_sleep else SGVB())
    make = Adagrads(vae, rate, encoder_decay=BATCH_SIZE / curve.num_train if is_wake_sleep else 1.0)
    x = load_images(curve.data, curve.num_train).train
    settings = {"batch_size": BATCH_SIZE, "optimizer": make, "seed": curve.seed, "progress": False, **settings}
    result = vi.fit(x, num_epochs=num_epochs, **settings)
    sys.stderr.write(f"{curve.name}, rate {rate}: {num_epochs} epochs, {result}\n")
    obey(result.stopped_by)
    return result


def obey(stopped_by: str) -> None:
    """End the program where Ctrl-C ended a fit, whose parameters are not those that were asked for.

    Raises:
        KeyboardInterrupt: As it was meant.
    """
    if stopped_by == "interrupt":
        raise KeyboardInterrupt


def snapshot_path(path: Path, samples: int) -> Path:
    """Return where the networks of a run are kept after so many samples."""
    return path.with_name(f"{path.stem}_{samples}.pt")


def read_vae(curve: Curve, path: Path) -> VAE | FaceVAE:
    """Make a curve's networks with the parameters of a file of :class:`Follower`."""
    content = torch.load(path, weights_only=True)
    vae = make_vae(curve, load_images(curve.data, curve.num_train).train.shape[1])
    vae.load_state_dict(content.get("vae", content))
    return vae


def write_state(path: Path, content: Any) -> None:
    """Write a file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)
