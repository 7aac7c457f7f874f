"""Tensors and JSON in one safetensors file: written whole or not at all, held against a checksum on reading, without pickle."""

import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_aevb.errors import FileError

__all__ = ["FORMAT", "Contents", "draft_file", "publish_file", "read_file", "write_file"]

FORMAT = 3
"""Version of the file: 2 brought the checksum, 3 the factor of full covariance in units of its scales."""
_KEY, _CHECKSUM = "pyro_aevb", "crc32"


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        header: JSON values by name.
        tensors: Tensors by name, on the CPU.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def write_file(path: str | Path, contents: Contents) -> None:
    """Write a file atomically: to a temporary one beside the target, flushed to disk, then renamed.

    Args:
        path: Target; a file that is there is replaced only once the new one is whole.
        contents: Header and tensors; tensors are not copied if they are dense and on the CPU.

    Raises:
        FileError: If the file can't be written, for want of room or rights; an old file is left as it was.
    """
    publish_file(draft_file(path, contents), path)


def draft_file(path: str | Path, contents: Contents) -> Path:
    """Write the temporary file, after which the contents may change.

    Raises:
        FileError: As of :func:`write_file`.
    """
    target = Path(path)
    tensors = _separate(contents.tensors)
    text = _as_json(target, contents.header)
    metadata = {_KEY: text, _CHECKSUM: _checksum(text, tensors)}
    draft = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    with _explained(draft, target):
        save_file(tensors, draft, metadata=metadata)
    return draft


def publish_file(draft: Path, path: str | Path) -> None:
    """Flush the temporary file to disk and put it in the target's place.

    Raises:
        FileError: As of :func:`write_file`.
    """
    target = Path(path)
    with _explained(draft, target):
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(target)
        _flush_folder(target.parent)


@contextmanager
def _explained(draft: Path, target: Path) -> Iterator[None]:
    """Say what could not be written, and leave nothing of it."""
    try:
        yield
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if not isinstance(error, (OSError, SafetensorError, KeyError)):
            raise
        raise FileError(
            f"Could not write {target}: {error}. A file that was there is unchanged, and what was to be saved is still in memory. "
            f"Make room, or give another folder."
        ) from error


def read_file(path: str | Path) -> Contents:
    """Read a file and hold it against its checksum.

    Raises:
        FileError: If the file is missing, damaged, of another kind or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (FileNotFoundError, SafetensorError) as error:
        raise FileError(f"{path} is missing or damaged: {error}.") from error
    except OSError as error:
        raise FileError(f"{path} could not be read: {error}.") from error
    if _KEY not in metadata:
        raise FileError(f"{path} was not written by this package: its header has no {_KEY!r} entry.")
    try:
        header = json.loads(metadata[_KEY])
        version = header.get("format")
    except (ValueError, AttributeError) as error:
        raise FileError(f"{path} is damaged: its header can't be read.") from error
    if version != FORMAT:
        raise FileError(f"{path} has format {version!r}, this version reads {FORMAT}. Save it anew with this one.")
    if metadata.get(_CHECKSUM) != _checksum(metadata[_KEY], tensors):
        raise FileError(
            f"{path} is damaged: its contents do not give the checksum that was written with them. Use another copy."
        )
    return Contents(header, tensors)


def _as_json(target: Path, header: dict[str, Any]) -> str:
    try:
        return json.dumps(header | {"format": FORMAT})
    except TypeError as error:
        raise FileError(f"Could not write {target}: its settings are no JSON values, {error}.") from error


def _separate(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return dense tensors on the CPU, of which no two share memory: a file holds each by itself."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            what = f"a {tensor.layout} tensor" if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"
            raise FileError(
                f"{name!r} can't be saved: it is {what}, and a file without pickle holds dense tensors. Keep it as one, or out of "
                f"state_dict (a buffer with persistent=False)."
            )
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = dense.untyped_storage()
        is_whole = storage.nbytes() == dense.numel() * dense.element_size()
        found[name] = dense if is_whole and storage.data_ptr() not in seen else dense.clone()
        seen.add(storage.data_ptr())
    return found


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of a header and of names, types, shapes and bytes of tensors: one flipped byte always changes it."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(data, value)
    return f"{value:08x}"


def _flush_folder(folder: Path) -> None:
    """Flush a folder's own entries, without which a rename may not outlive a power cut; not every system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
