"""The main job: train the paper's model on real digits, draw posteriors of unseen ones, weigh them, and show it on a page."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_aevb.datasets import ImageData
from pyro_aevb.demo import page
from pyro_aevb.demo.report import report
from pyro_aevb.demo.trial import PLANS, Plan, Trial, compare_estimators, try_model
from pyro_aevb.demo.trust import draw_trust, examine
from pyro_aevb.diagnostics.report import TrustReport
from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.evidence_plots import plot_agreement, plot_forest, plot_k_hat
from pyro_aevb.plots import (
    plot_embedding,
    plot_history,
    plot_images,
    plot_log_marginal,
    plot_manifold,
    plot_reconstructions,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DemoResult", "run"]

NUM_SHOWN = 12
"""Unseen digits in the picture of reconstructions."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo did.

    Attributes:
        page: The page's file.
        trials: The model with many latents and the one with two.
        estimates: log p(x) of a few digits under the first, by method.
        trust: The first guide beside Hamiltonian Monte Carlo, and what its bound lacks.
        pictures: The page's figures by name.
        seconds: Wall-clock time of everything.
    """

    page: Path
    trials: tuple[Trial, Trial]
    estimates: dict[str, LogMarginal]
    trust: TrustReport
    pictures: dict[str, "Figure"]
    seconds: float


def run(
    data: str = "digits",
    out: str | Path = "report",
    *,
    num_epochs: int | None = None,
    latent: int | None = None,
    seed: int = 0,
    pictures: str | Path | None = None,
    progress: bool = True,
) -> DemoResult:
    """Train two models on real digits and write ``index.html`` about what they learned.

    Args:
        data: ``"digits"`` (scikit-learn's, 8 x 8, no file needed) or ``"mnist"``.
        out: Folder of the page.
        num_epochs: Passes over the data; by default 500 for digits and 20 for MNIST.
        latent: Latents of the first model; by default 10 for digits and 20 for MNIST. The second always has two.
        seed: Seed of weights, shuffles and draws.
        pictures: Folder for the figures as PNG files; by default they are in the page only.
        progress: Whether to show progress bars and say what happens.

    Raises:
        SettingError: If a setting is out of range.
        DataError: If MNIST is neither found nor can be downloaded.
        FileError: If a folder can't be written to; this is found out before training.
        KeyboardInterrupt: If training was interrupted: no page is written then.
    """
    start = time.perf_counter()
    plan = _plan(data, num_epochs, latent)
    folders = [Path(folder) for folder in (out, pictures) if folder is not None]
    for folder in folders:
        _check_folder(folder)
    with _threads(plan.num_threads):
        images = plan.load()
        many, two = (try_model(plan, images, size, seed=seed, progress=progress) for size in (plan.latent, 2))
        estimates = compare_estimators(many, images.test, seed=seed, progress=progress)
        trust = examine(many, images.test, seed=seed, progress=progress)
        figures = _draw(images, many, two, seed) | _draw_estimates(many, estimates) | draw_trust(many, trust)
        drawn = {name: page.png(figure) for name, figure in figures.items()}
        for name, content in drawn.items() if pictures is not None else ():
            page.write(folders[-1] / f"{name}.png", content)
        seconds = time.perf_counter() - start
        result = DemoResult(folders[0] / "index.html", (many, two), estimates, trust, figures, seconds)
        page.write(result.page, report(plan, images, result.trials, estimates, trust, drawn, seconds))
    return result


def _plan(data: str, num_epochs: int | None, latent: int | None) -> Plan:
    """Return what to train, with the sizes that were asked for."""
    if data not in PLANS:
        raise SettingError(f"Unknown data {data!r}; known are {', '.join(map(repr, PLANS))}.")
    asked: dict[str, Any] = {
        name: count for name, count in (("num_epochs", num_epochs), ("latent", latent)) if count is not None
    }
    for name, count in asked.items():
        if count < 1:
            raise SettingError(f"{name} must be at least 1, got {count}.")
    return replace(PLANS[data], **asked)


def _check_folder(folder: Path) -> None:
    """Make a folder and try to write to it, before anything takes long."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FileError(f"Could not write to the folder {folder}: {error}. Choose another.") from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Give torch so many threads in the block; ``None`` leaves it those it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _draw(images: ImageData, many: Trial, two: Trial, seed: int) -> dict[str, "Figure"]:
    """Draw every picture of the page."""
    unseen = images.test[:NUM_SHOWN]
    draws = many.vi.posterior(unseen, num_samples=3, seed=seed)["z"]
    prior = many.vi.simulate(num_rows=60, seed=seed)["z"]
    with torch.no_grad():
        copies = torch.cat([many.vi.reconstruct(unseen)["x"][None], many.vae.decode(draws)])
        samples = many.vae.decode(prior)
    shape = images.image_shape
    few = slice(0, 3000)  # more points hide each other
    names = ["unseen digit", "at the median", *(f"posterior draw {number}" for number in (1, 2, 3))]
    return {
        "history": plot_history(many.fit),
        "reconstructions": plot_reconstructions(
            unseen.unflatten(1, shape),
            copies.unflatten(2, shape),
            names=names,
            title="Unseen digits, and what the model says they could be",
        ),
        "samples": plot_images(
            samples.unflatten(1, shape), columns=12, title="Digits that nobody wrote: E[x | z], z from the prior"
        ),
        "manifold": plot_manifold(two.vae.decode, shape),
        "embedding": plot_embedding(
            two.vi.embed(images.test[few])["z"],
            images.test_labels[few] if images.test_labels is not None else None,
            title="Unseen digits in two dimensions; labels were not used in training",
        ),
        "log_marginal": plot_log_marginal(many.evidence),
    }


def _draw_estimates(many: Trial, estimates: dict[str, LogMarginal]) -> dict[str, "Figure"]:
    """Draw what each estimator of log p(x) says about the same digits."""
    return {
        "forest": plot_forest(estimates, title="The same digits by annealing and by importance sampling"),
        "agreement": plot_agreement(estimates["ais"], estimates["importance"]),
        "k_hat": plot_k_hat(many.evidence),
    }
