"""Resident memory of this process: its own (anonymous) pages, apart from pages of files that the system can drop."""

import ctypes
import gc
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Peak", "anonymous", "watched"]


class Peak:
    """The largest growth, in bytes, and how often it was looked at."""

    growth = 0
    looks = 0

    def wait(self, seconds: float = 60.0) -> None:
        """Wait until what is there now was looked at, which a busy machine may be late with."""
        seen, deadline = self.looks, time.monotonic() + seconds
        while self.looks < seen + 2 and time.monotonic() < deadline:
            time.sleep(0.001)


def anonymous() -> int:
    """Return the bytes of this process's own pages, ``RssAnon`` of Linux."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


def _release() -> None:
    """Give free pages back to the system: a copy that takes what others left behind would not be seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


@contextmanager
def watched() -> Iterator[Peak]:
    """Look at the process's own pages every millisecond, from a thread."""
    _release()
    peak, before, done = Peak(), anonymous(), threading.Event()

    def look() -> None:
        while not done.is_set():
            peak.growth = max(peak.growth, anonymous() - before)
            peak.looks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
