"""SIGTERM and Ctrl-C are taken note of, so that a step is finished and saved before they are obeyed."""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interruption"]


class Interruption:
    """Note signals inside a block; a second one is obeyed at once.

    Signals reach the main thread only: in any other, nothing is noted and they work as ever.

    Attributes:
        signal: The signal that came, ``None`` so far.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            return
        self._restore()
        signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def obey(self) -> None:
        """End the process as SIGTERM asks, once the block is left: by the handler that was there, else with exit status 143."""
        if self.signal != signal.SIGTERM:
            return
        if callable(self._before[signal.SIGTERM]):
            signal.raise_signal(signal.SIGTERM)
            return
        raise SystemExit(128 + signal.SIGTERM)
