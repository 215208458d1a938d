"""What can go wrong between ranks. Every message names the rank that says it and the ranks it is about."""

from __future__ import annotations


class ExchangeError(RuntimeError):
    """Ranks could not exchange rows. The process group should not be used after it."""


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
