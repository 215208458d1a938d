"""Exchanges that move rows, one class each, under the names of `flashcp.sharding.exchanges.EXCHANGES`."""

from __future__ import annotations

from flashcp.comm.exchanges.exact import AllGather, Compacted, Exact
from flashcp.comm.exchanges.exchange import Exchange
from flashcp.comm.exchanges.heads import Ulysses
from flashcp.comm.exchanges.ring import Ring

__all__ = ["EXCHANGE_CLASSES"]

EXCHANGE_CLASSES: dict[str, type[Exchange]] = {
    exchange.name: exchange for exchange in (Exact, Compacted, AllGather, Ring, Ulysses)
}
