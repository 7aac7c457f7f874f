"""After the paper: tighter bounds, lower variance, richer guides, on digits binarised anew at every presentation, judged by AIS."""

import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.paper.curves import obey
from benchmarks.paper.settings import BATCH_SIZE, NUM_TRAIN, Curve, Job, load_images
from benchmarks.paper.tables import Row, merge, read_table, write_table
from benchmarks.programs import VAE
from pyro_aevb import (
    AEVB,
    IWELBO,
    SGVB,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    MLPEncoder,
    log_marginal,
)
from pyro_aevb._types import PyroProgram
from pyro_aevb.errors import AEVBWarning
from pyro_aevb.objectives.base import Objective

__all__ = ["CONTENDERS", "Rebinarized", "run"]

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
    "VAE, automatic guide": Contender(SGVB(), partial(_guide, AutoAmortizedNormal)),
    "VAE, full covariance": Contender(SGVB(), partial(_guide, AutoAmortizedMultivariateNormal)),
    "VAE, flow": Contender(SGVB(), partial(_guide, AutoAmortizedFlow)),
    "IWAE, k = 5": Contender(IWELBO(5)),
    "DReG, k = 1": Contender(IWELBO(1, gradient="dreg")),
    "DReG, k = 5": Contender(IWELBO(5, gradient="dreg")),
    "IWAE, k = 50": Contender(IWELBO(50)),
    "DReG, k = 50": Contender(IWELBO(50, gradient="dreg")),
}
"""The cheap ones first. IWAE with k = 1 is the VAE; DReG with k = 1 is sticking the landing. The three automatic guides differ in
their family alone, and from the VAE in their encoder too."""
_QUICK = ("VAE", "VAE, full covariance", "DReG, k = 5")


class Rebinarized(Dataset[Tensor]):
    """Digits whose pixels are drawn from the grey levels whenever they are presented (arXiv 1509.00519, section 5).

    Draws come from torch's own generator, whose state a checkpoint of the fit holds.

    Args:
        grey: Grey levels.
    """

    def __init__(self, grey: Tensor) -> None:
        self.grey = grey

    def __len__(self) -> int:
        """Count the digits."""
        return len(self.grey)

    def __getitem__(self, row: int) -> Tensor:
        """Present one digit."""
        return torch.bernoulli(self.grey[row])

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        """Present the digits of a batch, all at once."""
        return list(torch.bernoulli(self.grey[rows]).unbind())


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
    num_epochs = math.ceil(num_samples / curve.num_train)
    result = vi.fit(
        Rebinarized(images.train),
        num_epochs=num_epochs,
        batch_size=BATCH_SIZE,
        learning_rate=_LEARNING_RATE,
        seed=curve.seed,
        checkpoint=job.state / f"after_{''.join(letter if letter.isalnum() else '_' for letter in name)}",
        keep=1,
        resume=True,
        progress=False,
    )
    obey(result.stopped_by)
    row = {
        "contender": name,
        "parameters": sum(item.numel() for item in vi.module.parameters()),
        "samples": num_epochs * curve.num_train,
        "seconds": sum(record["seconds"] for record in result.history),
        **_judge(job, vi, images.test),
    }
    sys.stderr.write(f"after: {row}, {result}\n")
    return row


def _judge(job: Job, vi: AEVB, grey: Tensor) -> Row:
    """Estimate bounds and log p(x) of test digits binarised once."""
    test = torch.bernoulli(grey, generator=torch.Generator().manual_seed(0))
    few = test[: job.num_rows or (_QUICK_ROWS if job.is_quick else _ROWS)]
    settings: dict[str, Any] = {"num_temperatures": _TEMPERATURES, "start": "prior"}
    if job.is_quick:
        settings |= {"num_temperatures": 50, "compile": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AEVBWarning)  # flagged rows are counted in the table
        bounds = vi.log_marginal(
            test, num_samples=1, seed=0, progress=False
        ).value  # one log weight a row: its mean is the ELBO
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
