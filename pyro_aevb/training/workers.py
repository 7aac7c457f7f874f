"""Processes that load data for a DataLoader, and how it shows that one died."""

__all__ = ["worker_death"]

_SAYING = "DataLoader worker"
"""How torch begins to say that one died."""


def worker_death(error: BaseException) -> str | None:
    """Return what says that a worker died, in an error or in what led to it; ``None`` where nothing does.

    A worker's end of a pipe may be gone before torch could say so.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _SAYING in str(cause):
            return next(line for line in str(cause).splitlines() if _SAYING in line)
        if isinstance(cause, (ConnectionError, EOFError)):
            return f"{type(cause).__name__}: {cause}."
        cause = cause.__cause__ or cause.__context__
    return None
