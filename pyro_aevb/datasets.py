r"""Images to learn from: the digits inside scikit-learn, MNIST, and the Frey faces of the paper.

``digits`` needs no file. The others look for theirs in the directory that the environment variable ``PYRO_AEVB_DATA``
names, then in the user's cache (``pooch.os_cache("pyro_aevb")``), and ``mnist`` then downloads the public originals
into that cache. Every file is checked against its SHA-256 before it is read.
"""

import gzip
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pyro_aevb.errors import DataError, SettingError

__all__ = ["ImageData", "digits", "frey_face", "mnist"]

_Pixels = UInt8[np.ndarray, "..."]

DIRECTORY_VARIABLE = "PYRO_AEVB_DATA"
ARCHIVES = {
    "mnist.npz": "39b9b1ffaa0ba4d8995a616551f0966941fe02a3fe79ba4a9db7373db16d53ad",
    "freyface.npz": "3c70375e0a9c4751ad49ad5f1f692bd094c46f133cf4aa8ea77d1cb14e1efcd1",
}
MNIST_ORIGINALS = {
    "train_images": ("train-images-idx3-ubyte.gz", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "train_labels": ("train-labels-idx1-ubyte.gz", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "test_images": ("t10k-images-idx3-ubyte.gz", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "test_labels": ("t10k-labels-idx1-ubyte.gz", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
DOWNLOAD_TIMEOUT = 30.0
"""Seconds without an answer after which the next mirror is tried."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """Grey-level images as rows of pixels, split into training and test rows.

    Args:
        train: Training images, one flattened image a row, grey levels in [0, 1].
        test: Test images, likewise.
        image_shape: Height and width; ``data.train[n].reshape(data.image_shape)`` is the n-th image.
        train_labels: Class of each training row, ``None`` where there are no classes.
        test_labels: Class of each test row, likewise.
    """

    train: Float[Tensor, "train_rows pixels"]
    test: Float[Tensor, "test_rows pixels"]
    image_shape: tuple[int, int]
    train_labels: Int64[Tensor, " train_rows"] | None = None
    test_labels: Int64[Tensor, " test_rows"] | None = None


def digits() -> ImageData:
    """Load the 1,797 handwritten digits (8 x 8, grey levels 0 to 16) that scikit-learn carries.

    The originals are ordered by writer, so a fixed permutation shuffles them: the first 1,500 train, the last 297 test.

    Returns:
        Images as float32 in [0, 1], with labels.

    Example:
        >>> digits().train.shape
        torch.Size([1500, 64])
    """
    from sklearn.datasets import load_digits  # slow to import

    images, labels = load_digits(return_X_y=True)
    # RandomState, not default_rng: only the legacy generator promises the same permutation in every version of NumPy.
    order = np.random.RandomState(0).permutation(len(images))
    rows = torch.from_numpy(images[order].astype(np.float32) / 16)
    classes = torch.from_numpy(labels[order].astype(np.int64))
    return ImageData(rows[:1500], rows[1500:], (8, 8), classes[:1500], classes[1500:])


def mnist(binarize: str | None = None, *, seed: int = 0) -> ImageData:
    """Load MNIST: 60,000 training and 10,000 test digits of 28 x 28 pixels, in their original order.

    Bounds of a Bernoulli model on grey levels (the paper's setting) are not log-likelihoods of binary data; do not
    compare numbers across the settings of ``binarize``.

    Args:
        binarize: ``None`` keeps the grey levels, ``"threshold"`` sets those above one half to 1 and the others to 0,
            ``"stochastic"`` draws each pixel once, as 1 with probability equal to its grey level.
        seed: Seed of the stochastic draw; the global random state is neither read nor changed.

    Returns:
        Images as float32 in [0, 1] (about 220 MB), with labels.

    Raises:
        SettingError: If ``binarize`` is not known.
        DataError: If a file is damaged, or none is found and no mirror can be reached.
    """
    if binarize not in _BINARIZATIONS:
        known = ", ".join(repr(name) for name in _BINARIZATIONS)
        raise SettingError(f"binarize must be one of {known}; got {binarize!r}.")
    archive = _find("mnist.npz")
    arrays = _read_archive(archive) if archive is not None else _download_mnist()
    generator = torch.Generator().manual_seed(seed)
    to_binary = _BINARIZATIONS[binarize]
    train, test = (to_binary(_grey_levels(arrays[f"{part}_images"]), generator) for part in ("train", "test"))
    labels = (torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64)) for part in ("train", "test"))
    return ImageData(train, test, _image_shape(arrays["train_images"]), *labels)


def frey_face() -> ImageData:
    """Load the Frey faces: 1,965 frames of one face, 28 x 20 pixels; the first 1,600 train, as in the paper's own code.

    Neighbouring frames are alike, so the split is by time and not by chance.

    Returns:
        Images as float32 in [0, 1], without labels.

    Raises:
        DataError: If the file is not found (it has no stable public address) or is damaged.
    """
    archive = _find("freyface.npz")
    if archive is None:
        places = " or ".join(str(place / "freyface.npz") for place in _places())
        raise DataError(
            "Frey Face needs a file, because it has no stable public address; none was found. Put freyface.npz (array "
            f"'images', uint8 [1965, 28, 20], sha256 {ARCHIVES['freyface.npz']}) at {places}, or into the directory "
            f"that the environment variable {DIRECTORY_VARIABLE} names."
        )
    images = _read_archive(archive)["images"]
    rows = _grey_levels(images)
    return ImageData(rows[:1600], rows[1600:], _image_shape(images))


def _places() -> list[Path]:
    """List the directories where files may lie, in the order of search."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    return [Path(named), _cache()] if named else [_cache()]


def _cache() -> Path:
    return Path(str(pooch.os_cache("pyro_aevb")))


def _find(name: str) -> Path | None:
    """Return the first file of that name, or ``None``; a damaged file is an error, not a reason to look further."""
    found = next((place / name for place in _places() if (place / name).is_file()), None)
    if found is not None and (sha256 := pooch.file_hash(str(found))) != ARCHIVES[name]:
        raise DataError(
            f"{found} should have sha256 {ARCHIVES[name]}; got {sha256}. It is damaged, or another: "
            "replace or remove it."
        )
    return found


def _read_archive(path: Path) -> dict[str, _Pixels]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _download_mnist() -> dict[str, _Pixels]:
    """Fetch and read the four original files; those that the cache already holds are not fetched again."""
    return {part: _read_idx(_retrieve(name, sha256)) for part, (name, sha256) in MNIST_ORIGINALS.items()}


def _retrieve(name: str, sha256: str) -> Path:
    """Return the path of one checked file in the cache, downloaded from the first mirror that serves it whole."""
    failures = []
    downloader = pooch.HTTPDownloader(timeout=DOWNLOAD_TIMEOUT)
    for mirror in MNIST_MIRRORS:
        try:
            # pooch writes to a temporary file and moves it into place only after the hash is right.
            return Path(pooch.retrieve(mirror + name, f"sha256:{sha256}", name, _cache(), downloader=downloader))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
            failures.append(f"{mirror}: {error}")
    raise DataError(
        f"MNIST needs {name} (sha256 {sha256}); no mirror gave it: {'; '.join(failures)}. Check the network, or put "
        f"mnist.npz (sha256 {ARCHIVES['mnist.npz']}) into {_cache()} or the directory that {DIRECTORY_VARIABLE} names."
    )


def _read_idx(path: Path) -> _Pixels:
    """Read a gzipped idx file of bytes: two zeros, type, number of dimensions, big-endian sizes, then the values."""
    raw = gzip.decompress(path.read_bytes())
    num_dimensions = raw[3]
    sizes = np.frombuffer(raw, ">u4", count=num_dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dimensions).reshape(sizes)


def _grey_levels(images: _Pixels) -> Float[Tensor, "rows pixels"]:
    flat = images.reshape(len(images), math.prod(images.shape[1:]))
    return torch.from_numpy(flat.astype(np.float32)).div_(255)


def _image_shape(images: _Pixels) -> tuple[int, int]:
    return images.shape[1], images.shape[2]


_BINARIZATIONS: dict[str | None, Callable[[Tensor, torch.Generator], Tensor]] = {
    None: lambda grey, _: grey,
    "threshold": lambda grey, _: (grey > 0.5).float(),
    "stochastic": lambda grey, generator: torch.bernoulli(grey, generator=generator),
}
