"""After the paper: tighter bounds, lower variance, richer guides, on digits binarised anew at every presentation, judged by AIS."""

import math
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from benchmarks.paper.curves import write_state
from benchmarks.paper.settings import BATCH_SIZE, NUM_TRAIN, Curve, Job, load_images
from benchmarks.paper.tables import Row, merge, read_table, write_table
from benchmarks.programs import VAE
from pyro_aevb import (
    AEVB,
    IWELBO,
    SGVB,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    MLPEncoder,
    log_marginal,
)
from pyro_aevb._types import PyroProgram
from pyro_aevb.errors import AEVBWarning
from pyro_aevb.objectives.base import Objective
from pyro_aevb.training.loop import EpochEnd

__all__ = ["CONTENDERS", "Rebinarizer", "run"]

_SAMPLES = 1e6
_LATENT, _HIDDEN = 20, 100
_LEARNING_RATE = 1e-3
_ROWS, _QUICK_ROWS = 100, 2
_IMPORTANCE_SAMPLES = 5_000
_TEMPERATURES = 1_000


class Contender(NamedTuple):
    """What is trained.

    Attributes:
        objective: The bound and its gradient.
        make_guide: From the networks to the guide; ``None`` for the paper's encoder.
    """

    objective: Objective
    make_guide: Callable[[VAE], PyroProgram] | None = None


def _guide(kind: Any, vae: VAE) -> PyroProgram:
    """Make an automatic guide whose encoder is as wide as the paper's."""
    hidden = len(next(vae.encoder.parameters()))
    return kind(vae.model, encoder=MLPEncoder(784, hidden, hidden_features=(hidden,)))


CONTENDERS = {
    "VAE": Contender(SGVB()),
    "VAE, full covariance": Contender(SGVB(), partial(_guide, AutoAmortizedMultivariateNormal)),
    "VAE, flow": Contender(SGVB(), partial(_guide, AutoAmortizedFlow)),
    "IWAE, k = 5": Contender(IWELBO(5)),
    "DReG, k = 1": Contender(IWELBO(1, gradient="dreg")),
    "DReG, k = 5": Contender(IWELBO(5, gradient="dreg")),
    "IWAE, k = 50": Contender(IWELBO(50)),
    "DReG, k = 50": Contender(IWELBO(50, gradient="dreg")),
}
"""The cheap ones first. IWAE with k = 1 is the VAE; DReG with k = 1 is sticking the landing."""
_QUICK = ("VAE", "VAE, full covariance", "DReG, k = 5")


class Rebinarizer:
    """Draw the pixels of the training rows anew after each epoch, in place (arXiv 1509.00519, section 5).

    Args:
        grey: Grey levels.
        seed: Seed of the draws.

    Attributes:
        rows: Binary rows, to train on.
    """

    def __init__(self, grey: Tensor, seed: int = 0) -> None:
        self.grey, self.generator = grey, torch.Generator().manual_seed(seed)
        self.rows = torch.bernoulli(grey, generator=self.generator)

    def __call__(self, event: EpochEnd) -> None:
        """Draw anew."""
        self.rows.copy_(torch.bernoulli(self.grey, generator=self.generator))


def run(job: Job) -> None:
    """Train and judge those that are not done yet, and write ``after.csv`` after each."""
    rows = read_table(job.state / "after.csv")
    for name in (_QUICK if job.is_quick else CONTENDERS) if job.trains else ():
        if not any(row["contender"] == name and row["samples"] >= job.samples(_SAMPLES) for row in rows):
            rows = merge(rows, [_measure(job, name)], ("contender",))
            write_table(job.state / "after.csv", rows)
            write_table(job.out / "after.csv", rows)
    if rows:
        write_table(job.out / "after.csv", rows)


def _measure(job: Job, name: str) -> Row:
    """Train and judge one contender."""
    curve = job.shrink(Curve("mnist", _LATENT, "aevb", _HIDDEN, NUM_TRAIN["mnist"]))
    images, contender, num_samples = load_images("mnist", curve.num_train), CONTENDERS[name], job.samples(_SAMPLES)
    torch.manual_seed(curve.seed)
    vae = VAE(images.train.shape[1], curve.hidden, curve.latent)
    guide = vae.guide if contender.make_guide is None else contender.make_guide(vae)
    vi = AEVB(vae.model, guide, contender.objective)
    train, begin = Rebinarizer(images.train, curve.seed), time.perf_counter()
    num_epochs = math.ceil(num_samples / len(train.rows))
    result = vi.fit(
        train.rows,
        num_epochs=num_epochs,
        batch_size=BATCH_SIZE,
        learning_rate=_LEARNING_RATE,
        seed=curve.seed,
        callbacks=[train],
        progress=False,
    )
    seconds = time.perf_counter() - begin
    stem = "".join(letter if letter.isalnum() else "_" for letter in name)
    write_state(job.state / f"after_{stem}.pt", vi.module.state_dict())
    row = {
        "contender": name,
        "samples": num_epochs * len(train.rows),
        "seconds": seconds,
        **_judge(job, vi, images.test),
    }
    sys.stderr.write(f"after: {row}, {result}\n")
    return row


def _judge(job: Job, vi: AEVB, grey: Tensor) -> Row:
    """Estimate bounds and log p(x) of test digits binarised once."""
    test = torch.bernoulli(grey, generator=torch.Generator().manual_seed(0))
    few = test[: job.num_rows or (_QUICK_ROWS if job.is_quick else _ROWS)]
    objective = SGVB()
    with vi.module.program.running(), torch.random.fork_rng(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        bounds = torch.cat([objective.bounds(vi.model, vi.guide, part).local for part in test.split(1_000)])
    settings: dict[str, Any] = {"num_temperatures": _TEMPERATURES, "start": "prior"}
    if job.is_quick:
        settings |= {"num_temperatures": 50, "compile": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AEVBWarning)  # flagged rows are counted in the table
        weighted = vi.log_marginal(few, num_samples=_IMPORTANCE_SAMPLES, seed=0, progress=False)
        annealed = log_marginal(vi.model, None, few, method="ais", seed=0, progress=False, **settings)
    return {
        "test_bound": float(bounds.double().mean()),
        "importance_weighted": float(weighted.value.mean()),
        "ais": float(annealed.value.mean()),
        "monte_carlo_error": float(annealed.standard_error.nan_to_num(0.0).square().sum().sqrt()) / len(few),
        "rows_error": float(annealed.value.std()) / len(few) ** 0.5,
        "rows": len(few),
        "flagged": int(annealed.is_flagged.sum()),
    }
