"""Where a fit stands between two steps."""

from dataclasses import dataclass

__all__ = ["Place"]


@dataclass
class Place:
    """Where a fit stands.

    Attributes:
        epochs: Epochs done.
        batches: Batches done of the present one.
        total: Sum of its rows' bounds, in nats.
        rows: Rows in that sum.
        skipped: Batches skipped in it.
        seconds: Time that its steps took.
        all_seconds: Time that all steps took.
        best_bound: The best validation bound.
    """

    epochs: int = 0
    batches: int = 0
    total: float = 0.0
    rows: int = 0
    skipped: int = 0
    seconds: float = 0.0
    all_seconds: float = 0.0
    best_bound: float = float("-inf")

    def begin_epoch(self) -> None:
        """Start counting anew."""
        self.batches = self.rows = self.skipped = 0
        self.total = self.seconds = 0.0
