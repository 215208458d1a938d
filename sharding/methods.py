"""Methods: published pairs of a sharding strategy and an exchange (paper, table of methods compared)."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """A published context-parallel method."""

    name: str
    sharding: str
    exchange: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("llama3", "per_sequence", "all_gather"),
        Method("per_document", "per_document", "all_gather"),
        Method("ring", "contiguous", "ring"),
        Method("ring_zigzag", "per_document", "ring"),
        Method("wlb_adaptive", "wlb_adaptive", "all_gather"),
        Method("ulysses", "contiguous", "ulysses"),
        Method("flashcp_paper", "flashcp_paper", "compacted"),
        Method("flashcp", "flashcp", "exact"),
    )
}
