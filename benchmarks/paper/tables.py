"""Results as CSV: one row a dict, numbers where they are numbers."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Row", "merge", "read_table", "write_table"]

Row = dict[str, Any]


def read_table(path: Path) -> list[Row]:
    """Read a CSV; without the file there are no rows."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _parse(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV in one piece; numbers have seven significant digits, and a column may be empty in some rows.

    Without rows nothing is written.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    names = list(dict.fromkeys(name for row in rows for name in row))
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _format(value) for name, value in row.items()} for row in rows)
    os.replace(part, path)


def merge(old: Sequence[Row], new: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Return the old rows and the new ones, which replace all old ones of the same keys."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in keys)

    fresh = {key(row) for row in new}
    return [*(row for row in old if key(row) not in fresh), *new]


def _parse(value: str) -> Any:
    """Read a number where there is one."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _format(value: Any) -> Any:
    """Write a number short."""
    return f"{value:.7g}" if isinstance(value, float) else value
