"""How KV travels, as arithmetic: for each exchange the rows every rank sends and receives, and where they land.

An exchange is one `Route`, listed once in `EXCHANGES`. `comm/exchanges` moves the rows; nothing here imports torch.
"""

from __future__ import annotations

from flashcp.sharding.exchanges.blocks import AllGather, Compacted, Ring, Ulysses
from flashcp.sharding.exchanges.exact import Exact
from flashcp.sharding.route import Route

__all__ = ["EXCHANGES"]

EXCHANGES: dict[str, type[Route]] = {route.exchange: route for route in (Exact, Compacted, AllGather, Ring, Ulysses)}
