"""SIGTERM and Ctrl-C are taken note of, so that a step is finished and saved before they are obeyed."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "Interruption"]


class Interrupted(BaseException):
    """A signal came while nothing but waiting would have been interrupted."""


class Interruption:
    """Note signals inside a block; a second one is obeyed at once.

    Signals reach the main thread only: in any other, nothing is noted and they work as ever. Signals that the process ignores
    stay ignored.

    Attributes:
        signal: The signal that came, ``None`` so far.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._is_waiting = False

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # None is a handler that was not installed from Python, and can't be put back
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self._restore()
            signal.raise_signal(number)
            return
        self.signal = number
        if self._is_waiting:
            self._is_waiting = False
            raise Interrupted

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal end the block at once.

        Raises:
            Interrupted: If one came before it, or comes inside.
        """
        if self.signal is not None:
            raise Interrupted
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def comes_soon(self) -> bool:
        """Tell whether a signal came, or comes in a moment: one to a group of processes reaches them one by one."""
        deadline = time.monotonic() + 0.5
        while self.signal is None and self._before and time.monotonic() < deadline:
            # torch's handler of SIGCHLD may say only now that the worker died whose silence was noticed before
            with suppress(RuntimeError):
                time.sleep(0.01)
        return self.signal is not None

    def obey(self) -> None:
        """End the process as SIGTERM asks, once the block is left: by the handler that was there, else with exit status 143."""
        if self.signal != signal.SIGTERM:
            return
        if callable(self._before.get(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)
            return
        raise SystemExit(128 + signal.SIGTERM)
