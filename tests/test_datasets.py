"""Data sets from files, caches and a local server, whole and damaged."""

import gzip
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from pyro_aevb import datasets
from pyro_aevb.errors import AEVBError, DataError, SettingError

TINY = {
    "train_images": np.arange(5 * 3 * 2, dtype=np.uint8).reshape(5, 3, 2) * 8,
    "train_labels": np.array([3, 1, 4, 1, 5], dtype=np.uint8),
    "test_images": np.full((2, 3, 2), 255, dtype=np.uint8),
    "test_labels": np.array([9, 2], dtype=np.uint8),
}
ARCHIVE_PARTS = {"mnist.npz": TINY, "freyface.npz": {"images": np.arange(1965 * 4, dtype=np.uint8).reshape(1965, 2, 2)}}


def real(name: str) -> None:
    """Skip, by name, a test of a real file that this machine does not have."""
    if not any(
        (Path(place) / name).is_file() for place in (os.environ.get("PYRO_AEVB_DATA", ""), pooch.os_cache("pyro_aevb"))
    ):
        pytest.skip(f"{name} is not on this machine; PYRO_AEVB_DATA names its directory")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the user's cache, empty, with no directory named by the environment."""
    monkeypatch.delenv(datasets.DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def tiny_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write tiny archives with hashes of their own, and return their directory."""
    place = tmp_path / "named"
    place.mkdir()
    for name, arrays in ARCHIVE_PARTS.items():
        np.savez(place / name, **arrays)
        monkeypatch.setitem(datasets.ARCHIVES, name, sha256((place / name).read_bytes()))
    return place


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve the four idx files of a tiny MNIST as the only mirror; yield the served directory."""
    served = tmp_path / "served"
    served.mkdir()
    originals = {}
    for part, (name, _) in datasets.MNIST_ORIGINALS.items():
        array = TINY[part]
        idx = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
        (served / name).write_bytes(gzip.compress(idx))
        originals[part] = (name, sha256((served / name).read_bytes()))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served))) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(datasets, "MNIST_ORIGINALS", originals)
        monkeypatch.setattr(datasets, "MNIST_MIRRORS", (f"http://127.0.0.1:{http.server_port}/",))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield served
        http.shutdown()
        thread.join()


def unreachable() -> str:
    """Return the address of a port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def check_tiny_mnist(data: datasets.ImageData) -> None:
    """Compare with the arrays that were written."""
    assert data.image_shape == (3, 2)
    torch.testing.assert_close(data.train, torch.arange(30).reshape(5, 6) * 8 / 255)
    torch.testing.assert_close(data.test, torch.ones(2, 6))
    assert data.train_labels.tolist() == [3, 1, 4, 1, 5]
    assert data.test_labels.tolist() == [9, 2]


# The real data.


def test_digits_are_all_there_shuffled_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    data = datasets.digits()
    assert (data.train.shape, data.test.shape, data.image_shape) == ((1500, 64), (297, 64), (8, 8))
    assert data.train.dtype == torch.float32
    assert data.train_labels.shape == (1500,)
    images, labels = load_digits(return_X_y=True)
    every_row = torch.cat([data.train, data.test]).mul(16).numpy()
    every_label = torch.cat([data.train_labels, data.test_labels]).numpy()
    found = sorted(map(tuple, np.c_[every_row, every_label]))
    assert found == sorted(map(tuple, np.c_[images, labels]))
    assert every_label[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]  # the split never moves
    assert torch.bincount(data.test_labels).min() >= 20


def test_mnist_is_the_whole_of_it() -> None:
    real("mnist.npz")
    data = datasets.mnist()
    assert (data.train.shape, data.test.shape, data.image_shape) == ((60000, 784), (10000, 784), (28, 28))
    assert (data.train.min(), data.train.max()) == (0, 1)
    assert data.train.mean().item() == pytest.approx(0.1306604, abs=1e-6)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_frey_face_is_the_whole_of_it() -> None:
    real("freyface.npz")
    data = datasets.frey_face()
    assert (data.train.shape, data.test.shape, data.image_shape) == ((1600, 560), (365, 560), (28, 20))
    assert 0 <= data.train.min() < data.train.max() <= 1
    assert data.train_labels is None
    assert data.test_labels is None


# Where files are looked for.


def test_the_named_directory_comes_before_the_cache(
    tiny_archives: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    (cache / "mnist.npz").write_bytes(b"not read")
    monkeypatch.setenv(datasets.DIRECTORY_VARIABLE, str(tiny_archives))
    check_tiny_mnist(datasets.mnist())


def test_the_cache_serves_where_the_named_directory_lacks_the_file(
    tiny_archives: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_archives.rename(cache)
    monkeypatch.setenv(datasets.DIRECTORY_VARIABLE, str(tiny_archives))
    check_tiny_mnist(datasets.mnist())


def test_frey_face_splits_by_time(tiny_archives: Path, cache: Path) -> None:
    tiny_archives.rename(cache)
    data = datasets.frey_face()
    images = ARCHIVE_PARTS["freyface.npz"]["images"].reshape(1965, 4)
    torch.testing.assert_close(data.train, torch.from_numpy(images[:1600] / 255).float())
    torch.testing.assert_close(data.test, torch.from_numpy(images[1600:] / 255).float())


def test_without_its_file_frey_face_says_where_to_put_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(datasets.DIRECTORY_VARIABLE, str(cache.parent / "elsewhere"))
    with pytest.raises(DataError, match="no stable public address") as caught:
        datasets.frey_face()
    for place in (cache, cache.parent / "elsewhere"):
        assert str(place / "freyface.npz") in str(caught.value)
    assert datasets.ARCHIVES["freyface.npz"] in str(caught.value)


@pytest.mark.parametrize(("name", "load"), [("mnist.npz", datasets.mnist), ("freyface.npz", datasets.frey_face)])
def test_a_damaged_file_is_named_and_left_alone(name: str, load: object, cache: Path) -> None:
    cache.mkdir()
    (cache / name).write_bytes(b"half a file")
    with pytest.raises(DataError, match="should have sha256") as caught:
        load()
    assert str(cache / name) in str(caught.value)
    assert sha256(b"half a file") in str(caught.value)
    assert (cache / name).read_bytes() == b"half a file"


# Binarisation.


def test_threshold_splits_at_one_half(tiny_archives: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(datasets.DIRECTORY_VARIABLE, str(tiny_archives))
    data = datasets.mnist("threshold")
    assert data.train.dtype == torch.float32
    assert data.train.flatten().tolist() == [float(level >= 128) for level in TINY["train_images"].flatten()]


def test_stochastic_draws_with_the_grey_levels_and_repeats_by_seed(
    tiny_archives: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(datasets.DIRECTORY_VARIABLE, str(tiny_archives))
    grey = datasets.mnist().train
    state = torch.get_rng_state()
    draws = torch.stack([datasets.mnist("stochastic", seed=seed).train for seed in range(300)])
    assert torch.equal(state, torch.get_rng_state())
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(draws[7], datasets.mnist("stochastic", seed=7).train)
    standard_error = (grey * (1 - grey) / 300).sqrt()
    assert ((draws.mean(0) - grey).abs() <= 4 * standard_error).all()


def test_unknown_binarization_lists_the_known() -> None:
    with pytest.raises(SettingError, match=r"None, 'threshold', 'stochastic'; got 'median'"):
        datasets.mnist("median")


# Downloading.


def test_download_fills_the_cache_and_is_done_once(server: Path, cache: Path) -> None:
    check_tiny_mnist(datasets.mnist())
    assert sorted(path.name for path in cache.iterdir()) == sorted(path.name for path in server.iterdir())
    for path in server.iterdir():
        path.unlink()
    check_tiny_mnist(datasets.mnist())


def test_next_mirror_is_tried(server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MNIST_MIRRORS", (unreachable(), *datasets.MNIST_MIRRORS))
    check_tiny_mnist(datasets.mnist())


def test_damaged_cache_file_is_fetched_anew(server: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "train-labels-idx1-ubyte.gz").write_bytes(b"half a file")
    check_tiny_mnist(datasets.mnist())


def test_wrong_hash_is_our_error_and_leaves_nothing_half_written(server: Path, cache: Path) -> None:
    (server / "t10k-images-idx3-ubyte.gz").write_bytes(b"another file")
    with pytest.raises(DataError, match=r"MNIST needs t10k-images-idx3-ubyte\.gz .* no mirror gave it") as caught:
        datasets.mnist()
    assert sha256(b"another file") in str(caught.value)
    assert sorted(path.name for path in cache.iterdir()) == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


def test_a_file_the_server_lacks_is_our_error(server: Path, cache: Path) -> None:
    (server / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(AEVBError, match="404"):
        datasets.mnist()
    assert list(cache.iterdir()) == []


def test_unreachable_mirrors_are_our_error_that_offers_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrors = (unreachable(), unreachable())
    monkeypatch.setattr(datasets, "MNIST_MIRRORS", mirrors)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DataError, match=r"Check the network, or put mnist\.npz") as caught:
        datasets.mnist()
    assert all(mirror in str(caught.value) for mirror in (*mirrors, str(cache)))
    assert not cache.exists() or list(cache.iterdir()) == []
