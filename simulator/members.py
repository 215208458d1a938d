"""A member of a holder: its heads, its ports, and how many members there may be (`flashcp.simulator.heads`)."""

from __future__ import annotations

from dataclasses import replace

from flashcp.sharding.holders import can_share_heads, members_heads
from flashcp.simulator.cost import AttentionShape, Links


def legal_head_ranks(shape: AttentionShape, links: Links, ranks: int) -> list[int]:
    """Every h that these ranks can have, ascending; 1 is always among them.

    h divides the ranks and the query heads; it divides the KV heads or they divide it. A holder lies inside a node or
    takes whole nodes, unless it is the only one.
    """
    node = links.ranks_per_node
    return [
        h
        for h in range(1, min(ranks, shape.query_heads) + 1)
        if not ranks % h
        and can_share_heads(shape.query_heads, shape.kv_heads, h)
        and (h == ranks <= shape.query_heads or ranks <= node or not node % h or not h % node)
    ]


def member_shape(shape: AttentionShape, head_ranks: int) -> AttentionShape:
    """A member's heads. Fewer KV heads than members: each has one, and several have the same."""
    query_heads, kv_heads = members_heads(shape.query_heads, shape.kv_heads, head_ranks)
    return shape._replace(query_heads=query_heads, kv_heads=kv_heads)


def member_links(links: Links, head_ranks: int) -> Links:
    """Between the members of one place, one in each holder: as many share a node as it has holders.

    All places send at the same time, so that of a port that a node's ranks share each has its part.
    """
    members = min(head_ranks, links.ranks_per_node)  # of a holder on a node
    port = replace(links.network, gbps=links.network.gbps / members) if links.shared_port else links.network
    return replace(links, ranks_per_node=max(1, links.ranks_per_node // head_ranks), network=port)
