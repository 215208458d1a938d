"""How KV travels, as arithmetic: for each exchange the rows every rank sends and receives, and where they land.

An exchange is one module with three functions, listed once in `EXCHANGES`:

    rows(plan)            -> rows sent, rows received: per rank, padding counted, in KV rows (K and V of one token)
    received(plan, rank)  -> Segments of the rank's receive buffer (`rank`: the owner; `row`: buffer row)
    sent(plan, rank)      -> Segments of the rank's local rows in the order they leave (`rank`: the reader)

`comm/exchanges` moves the rows; nothing here imports torch.
"""

from __future__ import annotations

from types import ModuleType

from flashcp.sharding.exchanges import all_gather, compacted, exact, ring, ulysses

__all__ = ["EXCHANGES"]

EXCHANGES: dict[str, ModuleType] = {
    "exact": exact,
    "compacted": compacted,
    "all_gather": all_gather,
    "ring": ring,
    "ulysses": ulysses,
}
