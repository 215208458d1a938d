"""What can go wrong between ranks. Every message names the rank that says it and the ranks it is about."""

from __future__ import annotations

NEW_GROUP = "make a new process group, or start the run again"
"""What helps where `ends_group` is set."""


class ExchangeError(RuntimeError):
    """Ranks could not exchange rows.

    ends_group: whether nobody can use the process group any more, which messages go over too: gloo closes connections
    after a time-out, and cannot open them again.
    """

    def __init__(self, message: str, ends_group: bool = False) -> None:
        super().__init__(message)
        self.ends_group = ends_group


class ExchangeTimeoutError(ExchangeError):
    """A rank did not arrive within the time-out."""


class PeerFailedError(ExchangeError):
    """A rank stopped with an error of its own before its rows left."""


class RowsDifferError(ExchangeError):
    """A rank received rows that are not those that were sent; raised on all ranks."""


class PlanMismatchError(ExchangeError):
    """Ranks came to one exchange with different plans, exchanges or shapes; raised on all of them."""


class HeapError(ExchangeError):
    """Memory for receive buffers is not there, or more than the limit."""
