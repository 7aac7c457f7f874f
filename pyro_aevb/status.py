"""The verdict on a row, which estimates of log p(x) and posterior draws share."""

from enum import StrEnum

from jaxtyping import Bool
from torch import Tensor

__all__ = ["Status", "judge"]


class Status(StrEnum):
    r"""How far a row's number can be trusted.

    For importance weights a row is ``unreliable`` if k-hat > 0.7, if the standard error exceeds 0.5 nats (the delta method
    behind it has then broken down), if all weights are zero, or if a single weight leaves no error to estimate; it is
    ``warn`` if k-hat > 0.5 or the standard error exceeds 0.25 nats; otherwise ``ok``. Below 100 weights there is no k-hat
    and the standard error decides alone: ``ok`` says less there. The rules for posterior draws are told in
    :mod:`pyro_aevb.mcmc.draws`.
    """

    OK = "ok"
    WARN = "warn"
    UNRELIABLE = "unreliable"


def judge(is_doubtful: Bool[Tensor, " rows"], is_unreliable: Bool[Tensor, " rows"]) -> tuple[Status, ...]:
    """Return the verdict on each row; unreliable outweighs doubtful.

    Example:
        >>> [str(status) for status in judge(torch.tensor([False, True, True]), torch.tensor([False, False, True]))]
        ['ok', 'warn', 'unreliable']
    """
    levels = tuple(Status)
    return tuple(levels[level] for level in is_doubtful.long().where(~is_unreliable, 2).tolist())
