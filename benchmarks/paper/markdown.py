"""What sections of the page have in common: tables, commands, names."""

from collections.abc import Sequence

from benchmarks.paper.tables import Row

__all__ = ["NAMES", "command", "missing", "table"]

NAMES = {"mnist": "MNIST", "frey": "Frey Face"}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def missing(rows: Sequence[Row], title: str) -> list[str]:
    """Return a section that says that nothing is there yet, unless something is."""
    return [] if rows else [title, "", "No run of this part is in the tables yet."]


def command(part: str, **settings: int) -> str:
    """Return the command that a section is of."""
    return f"`{' '.join(['python -m benchmarks.paper', part, *(f'--{name} {value}' for name, value in settings.items())])}`"
