"""What can go wrong between ranks. Every message names the rank that says it and the ranks it is about."""

from __future__ import annotations


class ExchangeError(RuntimeError):
    """Ranks could not exchange rows. The process group should not be used after it."""


class ExchangeTimeoutError(ExchangeError):
    """A rank did not arrive within the time-out."""


class PeerFailedError(ExchangeError):
    """A rank stopped with an error of its own, or received rows that are not those that were sent."""


class RowsDifferError(ExchangeError):
    """This rank received rows that are not those that were sent. source: the number of the rank that sent them."""

    def __init__(self, message: str, source: int = -1) -> None:
        super().__init__(message)
        self.source = source


class PlanMismatchError(ExchangeError):
    """Ranks came to one exchange with different plans, exchanges or shapes; raised on all of them."""


class HeapError(ExchangeError):
    """Memory for receive buffers is not there, or more than the limit."""
