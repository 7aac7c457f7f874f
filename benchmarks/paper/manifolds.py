"""Figures 4 and 5: what decoders of two latents draw across the prior, and draws from the prior of more latents."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.curves import read_vae, train_curve
from benchmarks.paper.models import FaceVAE
from benchmarks.paper.pictures import save
from benchmarks.paper.settings import HIDDEN, NUM_TRAIN, Curve, Job, load_images
from benchmarks.paper.tables import read_table, write_table
from benchmarks.programs import VAE
from pyro_aevb import simulate
from pyro_aevb.plots import plot_images, plot_manifold

__all__ = ["mean_of", "run_manifolds", "run_samples"]

_SAMPLES = 3e6
_NAMES = {"mnist": "MNIST", "frey": "Frey Face"}
_MANIFOLDS = ("mnist", "frey")
_LATENTS = (2, 5, 10, 20)
_QUICK_LATENTS = (2,)
_GRID = 10


def run_manifolds(job: Job) -> None:
    """Write ``figure4_mnist.png`` and ``figure4_frey.png``."""
    for data in _MANIFOLDS:
        curve = job.shrink(Curve(data, 2, "aevb", HIDDEN[data], NUM_TRAIN[data]))
        path = _trained(job, curve)
        if path is None:
            continue
        decode = mean_of(read_vae(curve, path))
        title = f"{_NAMES[data]}: what the decoder draws across its two latents"
        shape = load_images(data, curve.num_train).image_shape
        save(plot_manifold(_as_ink(decode, data), shape, title=title), job.out / f"figure4_{data}.png")
        _note(job, curve)


def run_samples(job: Job) -> None:
    """Write ``figure5_z2.png`` to ``figure5_z20.png``: 100 draws from each model of digits."""
    for latent in _QUICK_LATENTS if job.is_quick else _LATENTS:
        curve = job.shrink(Curve("mnist", latent, "aevb", HIDDEN["mnist"], NUM_TRAIN["mnist"]))
        path = _trained(job, curve)
        if path is None:
            continue
        vae, images = read_vae(curve, path), load_images("mnist", curve.num_train)
        z = simulate(vae.model, images.train[: _GRID**2], seed=0)["z"]
        with torch.no_grad():
            means = mean_of(vae)(z).reshape(-1, *images.image_shape)
        save(plot_images(means, title=f"$N_z$ = {latent}: means of 100 draws"), job.out / f"figure5_z{latent}.png")
        _note(job, curve)


def mean_of(vae: VAE | FaceVAE) -> Callable[[Tensor], Tensor]:
    """Return E[x | z] as a function of z."""
    if isinstance(vae, FaceVAE):
        return lambda z: vae.decode(z)[0]
    return lambda z: torch.sigmoid(vae.decoder(z))


def _as_ink(decode: Callable[[Tensor], Tensor], data: str) -> Callable[[Tensor], Tensor]:
    """Turn faces, which are bright on dark, for pictures that draw 1 as black."""
    return decode if data == "mnist" else lambda z: 1 - decode(z)


def _trained(job: Job, curve: Curve) -> Path | None:
    """Train a curve where that is asked for, and return where its networks are."""
    if job.trains:
        train_curve(curve, job.samples(_SAMPLES), job.state)
    path = job.state / f"{curve.name}.pt"
    return path if path.is_file() else None


def _note(job: Job, curve: Curve) -> None:
    """Note which network a picture shows."""
    path = job.out / "figures45.csv"
    last = read_table(job.state / f"{curve.name}.csv")[-1]
    rows = [row for row in read_table(path) if (row["data"], row["latent"]) != (curve.data, curve.latent)]
    write_table(path, sorted([*rows, {**curve.keys, **last}], key=lambda row: (row["data"], row["latent"])))
