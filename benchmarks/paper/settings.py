"""What the paper fixes (arXiv 1312.6114, section 5 and App. C to E), what it leaves open and is fixed here, and what a run is."""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from torch import Tensor

from pyro_aevb.datasets import frey_face, mnist

__all__ = [
    "BATCH_SIZE",
    "GREY_LEVELS",
    "HIDDEN",
    "INITIAL_SD",
    "INITIAL_SDS",
    "LATENTS",
    "METHODS",
    "NUM_TRAIN",
    "RATES",
    "SEEDS",
    "Curve",
    "Images",
    "Job",
    "due",
    "load_images",
]

BATCH_SIZE = 100
"""M of Algorithm 1; L is 1."""
RATES = (0.01, 0.02, 0.1)
"""Adagrad's global steps, of which the first iterations choose one (section 5)."""
SEEDS = range(3)
"""Seeds of figure 2 that tables may hold; pictures show the first."""
INITIAL_SD = 0.01
"""Standard deviation of every initial parameter; the author's later code reads "N(0, 0.01)" so."""
INITIAL_SDS = (INITIAL_SD, 0.1)
"""What "N(0, 0.01)" may stand for: as a variance it is a standard deviation of 0.1. Tables may hold both."""
GREY_LEVELS = 256
"""Frey Face is divided by this, so that its densities are those of the author's own code."""
LATENTS = {"mnist": (3, 5, 10, 20, 200), "frey": (2, 5, 10, 20)}
"""N_z of each panel of figure 2."""
HIDDEN = {"mnist": 500, "frey": 200}
NUM_TRAIN = {"mnist": 50_000, "frey": 1_600}
METHODS = {"aevb": "AEVB", "wake_sleep": "wake-sleep", "mcem": "Monte Carlo EM"}
"""Contenders, as the pictures call them."""
_POINTS_PER_DECADE = 12
_FIRST_POINT = 2_000
_QUICK_TRAIN = 1_000
_QUICK_SAMPLES = 5_000


@dataclass(frozen=True)
class Curve:
    """One training run and what is followed during it.

    Args:
        data: ``"mnist"`` or ``"frey"``.
        latent: Latents, N_z in the paper.
        method: ``"aevb"``, ``"wake_sleep"`` or ``"mcem"``.
        hidden: Hidden units on either side.
        num_train: Training rows, the first of the data set.
        seed: Seed of weights, order and noise.
        initial_sd: Standard deviation of every initial parameter.
    """

    data: str
    latent: int
    method: str
    hidden: int
    num_train: int
    seed: int = 0
    initial_sd: float = INITIAL_SD

    @property
    def name(self) -> str:
        """Say in a file's name which run it is."""
        seed = f"_seed{self.seed}" if self.seed else ""
        start = f"_sd{self.initial_sd}" if self.initial_sd != INITIAL_SD else ""
        return f"{self.data}_z{self.latent}_h{self.hidden}_n{self.num_train}_{self.method}{start}{seed}"

    @property
    def is_grey(self) -> bool:
        """Tell whether pixels are grey levels taken for Bernoulli means, and not Gaussian."""
        return self.data == "mnist"

    @property
    def keys(self) -> dict[str, str | int | float]:
        """Say in a table's row which run it is."""
        names = ("data", "latent", "method", "hidden", "num_train", "seed", "initial_sd")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Job:
    """What the command line asks for.

    Args:
        state: Directory of runs, to go on from.
        out: Directory of tables and pictures.
        num_samples: Training samples of each curve; by default the figure's own.
        is_quick: Whether to take few rows, small networks and few samples, which says nothing about the paper.
        trains: Whether to train at all; otherwise tables and pictures are made of what the state holds.
        num_rows: Rows whose log p(x) is estimated; by default the part's own.
        seed: Seed of figure 2's curves; pictures show the first.
        initial_sd: Standard deviation of their initial parameters; each has a picture of its own.
    """

    state: Path
    out: Path
    num_samples: int | None = None
    is_quick: bool = False
    trains: bool = True
    num_rows: int | None = None
    seed: int = 0
    initial_sd: float = INITIAL_SD

    def shrink(self, curve: Curve) -> Curve:
        """Return the curve that a quick run has in its place."""
        if not self.is_quick:
            return curve
        return replace(curve, hidden=5 + curve.hidden // 20, num_train=min(curve.num_train, _QUICK_TRAIN))

    def samples(self, default: float) -> int:
        """Return the training samples to reach."""
        return self.num_samples or (_QUICK_SAMPLES if self.is_quick else int(default))


@dataclass(frozen=True, eq=False)
class Images:
    """Rows to learn from and rows to judge by.

    Args:
        train: Training rows.
        test: Test rows.
        image_shape: Height and width.
    """

    train: Tensor
    test: Tensor
    image_shape: tuple[int, int]


@cache
def load_images(data: str, num_train: int) -> Images:
    """Return the first training rows and all test rows.

    MNIST: 50,000 of the 60,000 training digits, as the paper's figure 3 names them; the other 10,000 are left aside. Frey Face: the
    first 1,600 of 1,965 frames; the others, later in time, are the test rows.
    """
    found = mnist() if data == "mnist" else frey_face()
    scale = 1.0 if data == "mnist" else 255 / GREY_LEVELS
    return Images(found.train[:num_train] * scale, found.test * scale, found.image_shape)


def due(num_samples: int, epoch_samples: int) -> bool:
    """Tell whether a point of the log-spaced grid lies in the epoch that ended after so many samples.

    Example:
        >>> [count for count in range(50_000, 500_001, 50_000) if due(count, 50_000)]
        [50000, 100000, 150000, 200000, 250000, 300000, 350000, 400000, 500000]
    """
    if num_samples < _FIRST_POINT:
        return False
    before = max(num_samples - epoch_samples, 1)
    return _cell(num_samples) > _cell(before)


def _cell(num_samples: int) -> int:
    """Return the place on the log-spaced grid; a rounding error may not move 100,000 below its own line."""
    return math.floor(math.log10(num_samples) * _POINTS_PER_DECADE + 1e-9)
