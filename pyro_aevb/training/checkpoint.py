"""Checkpoints: a folder of files, from each of which a fit continues bit for bit as if it had never stopped."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.training.batches import Batch, describe
from pyro_aevb.training.files import Contents, draft_file, publish_file, read_file
from pyro_aevb.training.packing import pack, unpack
from pyro_aevb.training.saving import FIT, describe_program, explain_difference, load_tensors

__all__ = ["Checkpoints", "check_setting", "collect", "distribute"]

_PATTERN = "step-*.safetensors"
_BEST = "best.safetensors"


class Checkpoints:
    """The last few checkpoints of one fit and its best, in a folder of their own.

    Args:
        folder: The folder; it is made.
        keep: How many of the last ones stay.
        resume: Whether to continue what is there.

    Raises:
        FileError: If the folder can't be made, or holds checkpoints that nobody asked to continue.
    """

    def __init__(self, folder: str | Path, *, keep: int, resume: bool) -> None:
        self.folder, self.keep = Path(folder), keep
        self._pending: Future[None] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"Could not make the folder {self.folder} for checkpoints: {error}.") from error
        present = sorted(self.folder.glob("*.safetensors"))
        if not resume and present:
            raise FileError(
                f"{self.folder} holds checkpoints, the latest {present[-1]}. Continue that fit with resume=True, or give an "
                f"empty folder."
            )

    def latest(self) -> Path | None:
        """Return the file of the latest checkpoint, ``None`` if there is none."""
        return max(self.folder.glob(_PATTERN), default=None)

    def read_latest(self) -> tuple[Path, Contents] | None:
        """Return the latest checkpoint, ``None`` if there is none.

        Raises:
            FileError: If it is damaged; an older one is named, from which the same fit continues.
        """
        path = self.latest()
        if path is None:
            return None
        try:
            return path, read_file(path)
        except FileError as error:
            if "damaged" not in str(error):
                raise
            older = sorted(self.folder.glob(_PATTERN))[:-1]
            advice = f"Delete it to continue from {older[-1].name}" if older else "Empty the folder to start anew"
            raise FileError(f"{error} {advice}.") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the folder from other fits inside the block; the lock of a process that is gone is none.

        When the block is left, all that was written in it is on disk.

        Raises:
            FileError: If another fit holds it, or the last checkpoint can't be written.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise FileError(
                f"Another fit that is running writes its checkpoints to {self.folder}. Wait for it, or give another folder."
            ) from error
        try:
            yield
            self._finish()
        finally:
            with suppress(FileError):  # of a block that something else has ended
                self._finish()
            lock.release()

    def write(self, number: int, contents: Contents) -> None:
        """Write the checkpoint after so many batches, then delete what is older than the last few.

        Training may go on at once: a thread waits for the disk. A checkpoint is there for others once it is all on disk.

        Raises:
            FileError: If it can't be written, or the one before couldn't; those that are there stay.
        """
        self._write(f"step-{number:09d}.safetensors", contents)

    def write_best(self, contents: Contents) -> None:
        """Write the checkpoint of the best validation bound, as :meth:`write` does."""
        self._write(_BEST, contents)

    def _write(self, name: str, contents: Contents) -> None:
        self._finish()
        draft = draft_file(self.folder / name, contents)
        thread = ThreadPoolExecutor(1)
        self._pending = thread.submit(self._publish, draft, name)
        thread.shutdown(wait=False)  # it ends with its work

    def _publish(self, draft: Path, name: str) -> None:
        publish_file(draft, self.folder / name)
        # beside the oldest, what a process that was killed while writing left behind: no other is running
        for path in (*sorted(self.folder.glob(_PATTERN))[: -self.keep], *self.folder.glob(".*.safetensors.*")):
            with suppress(OSError):  # a file that another program has open stays until the next time
                path.unlink()

    def _finish(self) -> None:
        """Wait until what was written last is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def collect(module: ObjectiveModule, state: dict[str, Any]) -> Contents:
    """Return what a checkpoint holds: the program, as it is saved on its own, and the state of the fit.

    Args:
        module: Model, guide and objective.
        state: Numbers, strings, tensors, arrays, and lists, tuples and dicts of them.
    """
    batch = None if module.example is None else describe(Batch(module.example[0], dict(module.example[1])))
    header, tensors = describe_program(module, batch)
    packed = pack(state | {"objective": dict(module.objective_state.state_dict())}, tensors, f"{FIT}state")
    return Contents(header | {"fit": packed}, tensors)


def distribute(module: ObjectiveModule, contents: Contents, path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Load the program of a checkpoint, and return the state of the fit.

    Args:
        module: Model, guide and objective, built.
        contents: What the file held.
        path: The file, for messages.
        setting: What must be the same as it was, by the name of the argument that sets it.

    Raises:
        FileError: If it is no checkpoint, or one of another model or guide.
        SettingError: If the fit is set up in another way.
    """
    header, tensors = contents
    if "fit" not in header:
        raise FileError(
            f"{path} is no checkpoint of AEVB.fit: it holds a program, not a fit, which AEVB.load reads, or a fit by Monte Carlo "
            f"EM. Give an empty folder."
        )
    if difference := explain_difference(module.structure, header):
        raise FileError(
            f"{path} belongs to another model: {difference}. Give the model that it was saved with, or an empty folder."
        )
    state = unpack(header["fit"], tensors)
    check_setting(path, state["setting"], setting)
    load_tensors(module.program, {name: item for name, item in tensors.items() if not name.startswith(FIT)}, path)
    module.objective_state.load_state_dict(state["objective"])
    if module.is_growing:
        module.num_data = header["num_data"]
    return state


def check_setting(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse to continue a fit on other data or with another optimizer: nothing in the state would mean the same.

    Raises:
        SettingError: Naming what differs.
    """
    own = json.loads(json.dumps(own))  # as it was written: lists for tuples
    different = [f"{name}={saved.get(name)!r} (now {own[name]!r})" for name in own if saved.get(name) != own[name]]
    if different:
        raise SettingError(
            f"{path} was written by a fit with {', '.join(different)}. Continue with the same, or give an empty folder."
        )
