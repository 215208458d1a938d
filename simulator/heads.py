"""Head ranks: ranks that hold rows together share out the heads, so that rows travel with a part of them.

N ranks are R = N / h holders of h members, consecutive ranks. A plan is for holders; a holder's rows are dealt evenly
to its members. Before attention an all-to-all inside every holder turns rows into heads. Then member j of every holder
runs the exchange with members j of the others, for its heads, over ports of its own; an all-to-all turns back. h = 1
is the exchange alone and h = N is `ulysses` (DeepSpeed-Ulysses, arXiv 2309.14509).

Members of a holder compute the same queries and keys for as many heads: one timeline stands for all of them.
All-to-alls are charged in full, one after another: a code that hides some of them is faster.
"""

from __future__ import annotations

from typing import NamedTuple

from flashcp.sharding.holders import inner_roundings
from flashcp.simulator.planned import Module, Planned
from flashcp.simulator.timeline import Timeline


class Copies(NamedTuple):
    """Times that what an all-to-all moves is copied: Q, K and V; the output and its gradient; the gradient of Q; those
    of K and V."""

    rows: int
    output: int
    query_gradient: int
    key_gradients: int


COPIES = {"published": Copies(2, 2, 2, 2), "best effort": Copies(0, 0, 0, 0), "ours": Copies(1, 1, 1, 2)}
"""As published an all-to-all packs what it sends and unpacks what it gets. Of ours Q, K and V are read where they
arrive, and so is the gradient of the output; the output and the gradient of Q leave as the kernel wrote them."""


def share_heads(planned: Planned, inner: Module, copies: Copies) -> Module:
    """The exchange between holders, `inner`, with the all-to-alls before and after it.

    Gradients travel in the model's dtype here. Where several members have one KV head, each is sent its rows, and the
    gradients of each, which are sums over its own query heads, travel as the setting says and are added up by the rows'
    rank.
    """
    head_ranks, shape = planned.setting.head_ranks, planned.shape
    if head_ranks == 1:
        return inner
    rows = -(-int(planned.plan.tokens.max()) // head_ranks)
    queries, keys = rows * shape.query_bytes / 2, float(rows * shape.kv_bytes)  # for one other member
    links, alone = planned.setting.machine.links, inner.exchange_us

    def swap(timeline: Timeline, moved: float, times: int) -> None:
        nonlocal alone
        exchange = links.all_to_all_us(moved, head_ranks)
        timeline.run("copies", planned.copies.us(2 * head_ranks * times * moved, launches=times))
        timeline.run("exchange", exchange)
        alone += exchange

    forward, backward = Timeline(planned.ranks), Timeline(planned.ranks)
    swap(forward, queries + keys, copies.rows)
    forward.follow(inner.forward)
    swap(forward, queries, copies.output)
    swap(backward, queries, copies.output)
    backward.follow(inner.backward)
    wire = planned.setting.wire_bytes(inner_roundings(head_ranks, planned.setting.shape.kv_heads))
    home = keys * wire / shape.dtype_bytes
    if wire == shape.dtype_bytes and copies.query_gradient == copies.key_gradients:
        swap(backward, queries + home, copies.key_gradients)
    else:  # each dtype by itself, and what leaves as it is
        swap(backward, queries, copies.query_gradient)
        swap(backward, home, copies.key_gradients)
    if head_ranks > planned.setting.shape.kv_heads:
        backward.run("copies", planned.sum_us(head_ranks * home, wire))
    held = float(planned.plan.tokens.max()) * shape.kv_bytes
    return inner._replace(
        forward=forward,
        backward=backward,
        exchange_us=alone,
        kept_bytes=inner.kept_bytes + held,
        working_bytes=inner.working_bytes + held,
    )
