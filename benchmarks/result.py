"""What every comparison returns, and the page that the results are written to."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Result", "Row", "environment", "load", "read_sections", "write_page"]

PACKAGES = ("pyro_aevb", "pyro-ppl", "torch", "numpy", "lightning-fabric")

PREFACE = """# Results

Numbers of this project beside those of its peers, each comparison measured in one process. This page is written by
`python -m benchmarks.run` (all comparisons) or `python -m benchmarks.run NAME` (one of them, the others stay); do not edit it.
`--quick` runs a smaller setting and leaves this page alone. Each section says when, where and by which command it was measured. A
row with a bar says `met` or **missed**; rows without one inform. Times depend on the machine and on what else it does: read ratios.
"""


class Row(NamedTuple):
    """One number of a table.

    Attributes:
        quantity: What it is.
        value: The number, with its unit.
        spread: Its error or range, empty where it has none.
        bar: What it must reach, empty where it only informs.
        is_met: Whether it does; ``None`` without a bar.
    """

    quantity: str
    value: str
    spread: str = ""
    bar: str = ""
    is_met: bool | None = None

    def to_markdown(self) -> str:
        """Return the row of a Markdown table."""
        verdict = {None: "", True: "met", False: "**missed**"}[self.is_met]
        return f"| {self.quantity} | {self.value} | {self.spread} | {self.bar} | {verdict} |"


@dataclass(frozen=True)
class Result:
    """What one comparison found.

    Attributes:
        title: The comparison in a few words.
        setting: What was run: model, data, sizes, repetitions, threads.
        rows: The table.
        notes: How to read it, and what a reader could get wrong.
    """

    title: str
    setting: str
    rows: Sequence[Row]
    notes: Sequence[str] = field(default=())

    @property
    def missed(self) -> list[Row]:
        """Rows that do not reach their bar."""
        return [row for row in self.rows if row.is_met is False]

    def to_markdown(self, name: str, command: str, environment: str) -> str:
        """Return the section of the page."""
        lines = [f"## {name}", "", f"{self.title}. {self.setting}", "", f"`{command}`: {environment}", ""]
        lines += ["| quantity | value | spread | bar | |", "|---|---|---|---|---|"]
        lines += [row.to_markdown() for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def environment() -> str:
    """Describe date, versions and machine in one line, without names of hosts, users or directories."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{_processor()}, {os.cpu_count()} cores, {_memory()}, {gpu}, {platform.system()} {platform.machine()}"
    return f"{date.today()}; Python {platform.python_version()}, {versions}; {machine}"


def load() -> str:
    """Return the mean number of running processes over the last minute: more than ours say that others took our time."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    table = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", table.read_text(encoding="utf-8")) if table.is_file() else None
    return found[1].strip() if found else platform.processor() or "unknown processor"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError):
        return "unknown memory"


def read_sections(page: str) -> dict[str, str]:
    """Split a written page into its sections, by name."""
    parts = re.split(r"^## (\w+)\n", page, flags=re.MULTILINE)
    return {name: f"## {name}\n{body}".rstrip() + "\n" for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def write_page(path: Path, sections: Mapping[str, str], order: Sequence[str]) -> None:
    """Replace the given sections of a page and keep the others, in the given order."""
    old = read_sections(path.read_text(encoding="utf-8")) if path.is_file() else {}
    merged = old | dict(sections)
    path.write_text("\n".join([PREFACE, *(merged[name] for name in order if name in merged)]), encoding="utf-8")
