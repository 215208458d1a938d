"""A table of faults: whatever happens to a message or a rank, all others end within a bound and say what happened.

A cell is a fault, an exchange, a transport, and the level that it happens on: between holders, which are ranks there,
or inside a holder of two.
"""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

import flashcp
from flashcp.comm.errors import ExchangeError
from tests.faults import RANK, SIGNALS, Fault, Mishap, faulty, strike
from tests.packs import random_qkv, relative_error
from tests.ranks import _POOL, run_ranks

LENGTHS, OTHER_LENGTHS = (50, 7, 39), (48, 9, 39)
HEADS = 12
TIMEOUT_S = 2.5
BOUND_S = 2 * TIMEOUT_S + 1 + 4
"""Rows and a header after each other, news from another holder, and a slow machine."""
TRANSPORTS = ("gloo", "shm")
EXCHANGES = ("exact", "compacted", "all_gather", "ring", "ulysses")
OTHER = {
    "plan": ("plan or the layer's window or chunk", ""),
    "dtype": ("dtype", "torch.bfloat16; "),
    "shape": ("kv heads", "6; "),
    "exchange": ("exchange", "all_gather; "),
    "verify_rows": ("verify rows", "yes; "),
}
"""What one rank has another of: what the header's comparison calls it, and its value."""


class Cell(NamedTuple):
    """`right`: nothing is noticed, and numbers are right. `unnoticed`: numbers are wrong. `differ`: all ranks name who
    received what of whom. `disagree`: all name who does something else. `gone`: all name a rank that they waited
    for."""

    answer: str
    fault: Fault
    exchange: str
    transport: str
    verify_rows: bool = False

    def __str__(self) -> str:
        fault = self.fault
        where = f"{'behind' if fault.begun else 'at'} {fault.what}" if fault.kind in RANK else fault.what
        words = [fault.kind, where, self.exchange, self.transport, "inside" if fault.inside else "between"]
        return " ".join([*words, *["verified"] * self.verify_rows]).replace(" ", "-")


def table() -> Iterator[Cell]:
    first = {"ring": 2}  # the transfers of a call before: two blocks there
    for transport in TRANSPORTS:
        for exchange in EXCHANGES:
            rows, collective = first.get(exchange, 1), transport == "gloo" and exchange in ("all_gather", "compacted")
            of_rows = [Fault(kind, nth=rows) for kind in ("corrupt", "misplace", *["truncate"] * (not collective))]
            for fault in (*of_rows, Fault("corrupt", what="gradients", nth=0)):
                yield Cell("differ", fault, exchange, transport, verify_rows=True)
            if exchange != "compacted":  # all_gather's own way
                for kind in ("delay", *["duplicate", "reorder"] * (not collective)):
                    yield Cell("right", Fault(kind, nth=rows), exchange, transport, kind != "delay")
                # The flag of a ring's next block stands for a lost one, too.
                lost_in_a_ring = exchange == "ring" and transport == "shm"
                yield Cell("differ" if lost_in_a_ring else "gone", Fault("drop", nth=rows), exchange, transport, True)
                yield Cell("gone", Fault("raise", nth=rows), exchange, transport)
            if exchange in ("all_gather", "ring", "ulysses"):  # each way once: a cell takes seconds
                kind = "kill" if (exchange == "ulysses") == (transport == "shm") else "stop"
                yield Cell("gone", Fault(kind, nth=rows), exchange, transport)
            yield Cell("differ", Fault("corrupt", inside=True), exchange, transport, verify_rows=True)
        yield Cell("unnoticed", Fault("misplace"), "exact", transport)
        for what in ("queries", "outputs", "gradients"):
            fault = Fault("corrupt", inside=True, what=what, nth=int(what != "gradients"))
            yield Cell("differ", fault, "exact", transport, verify_rows=True)
        for kind in ("delay", "reorder", "duplicate"):
            # Over gloo the rows of a holder come before its next header, and so before what could overtake them.
            waits = kind == "reorder" and transport == "gloo"
            yield Cell("gone" if waits else "right", Fault(kind, inside=True), "exact", transport)
        for kind in ("drop", "raise", "kill"):
            yield Cell("gone", Fault(kind, inside=True), "exact", transport)
        for kind, what, begun in (
            ("kill", "header", False),
            ("kill", "rows", False),
            ("kill", "rows", True),
            ("kill", "gradients", False),
            ("terminate", "rows", False),
            ("stop", "header", False),
            ("stop", "gradients", False),
            ("raise", "header", False),
            ("raise", "rows", True),
            ("raise", "gradients", False),
        ):
            yield Cell("gone", Fault(kind, what=what, nth=int(what == "rows"), begun=begun), "exact", transport)
        for kind in OTHER:
            for inside in (False, True):
                yield Cell("disagree", Fault(kind, inside=inside), "exact", transport)


class Answer(NamedTuple):
    """What a rank said, in how many seconds; how far its numbers were off; threads that it left."""

    kind: str
    said: str
    took: float
    error: float
    left: list[str]


def answer(cell: Cell) -> Answer:
    """Two layers at once, forward and backward, behind a call that all goes well in."""
    fault, own = cell.fault, dist.get_rank()
    other = fault.kind if own == fault.rank else ""
    with faulty(fault):
        cp = flashcp.ContextParallel(
            exchange="all_gather" if other == "exchange" else cell.exchange,
            transport=cell.transport,
            head_ranks=2 if fault.inside else 1,
            timeout_s=TIMEOUT_S,
            verify_rows=cell.verify_rows ^ (other == "verify_rows"),
        )
    plan = flashcp.plan(OTHER_LENGTHS if other == "plan" else LENGTHS, cp.holders, "per_document")
    dtype = torch.bfloat16 if other == "dtype" else torch.float32
    q, k, v, grad = random_qkv(sum(LENGTHS), HEADS, HEADS // 2 if other == "shape" else HEADS, 8, dtype, seed=1)
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    full = sum(flashcp.reference_attention(whole[0], times * whole[1], whole[2], LENGTHS) for times in (1, 2))
    expected = [cp.shard(x, plan) for x in (full, *torch.autograd.grad(full, whole, grad.double()))]
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    kind, said, found = "", "", list[torch.Tensor]()
    dist.barrier()
    started = time.monotonic()
    try:
        with cp:
            if fault.kind not in OTHER:
                cp.attention(*(-x.detach() for x in local), plan)
            if fault.what == "header" and own == fault.rank:
                strike(fault.kind)
            one, two = cp.prefetch(*local[1:], plan), cp.prefetch(2 * local[1], local[2], plan)
            out = one.attention(local[0]) + two.attention(local[0])
            found = [out, *torch.autograd.grad(out, local, cp.shard(grad, plan))]
            cp.synchronize()
    except (ExchangeError, Mishap) as raised:
        kind, said = type(raised).__name__, str(raised)
    took = time.monotonic() - started
    error = max(map(relative_error, found, expected), default=0.0)
    wait_for_all([rank for rank in range(dist.get_world_size()) if rank != fault.rank or not is_lost(fault)])
    return Answer(kind, said, took, error, [one.name for one in threading.enumerate() if "flashcp" in one.name])


def is_lost(fault: Fault) -> bool:
    """Whether the rank answers nothing."""
    return fault.kind in SIGNALS


def wait_for_all(ranks: Sequence[int]) -> None:
    """Whose sockets close before others have said what they wait for would be what they say."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"answered {dist.get_rank()}", "")
    store.wait([f"answered {rank}" for rank in ranks], timedelta(seconds=2 * BOUND_S))


def check(cell: Cell, rank: int, given: Answer) -> None:
    """Whether a rank's answer is the cell's."""
    odd, of_a_rank = cell.fault.rank, cell.fault.kind in RANK
    assert given.took < BOUND_S
    assert not given.left
    if cell.answer in ("right", "unnoticed"):
        assert not given.said
        assert cell.answer == "unnoticed" or given.error < 1e-5
    elif cell.answer == "differ":
        assert given.kind == "RowsDifferError"
        assert re.search(rf"received rows of rank {odd} that are not those that were sent \(call [23]\)", given.said)
    elif cell.answer == "disagree":
        assert given.kind == "PlanMismatchError"
        field, value = OTHER[cell.fault.kind]
        assert f"disagree on {field} (call 1): rank {odd} {value}" in given.said
    elif rank == odd and of_a_rank:
        assert given.kind == "Mishap"
    else:
        assert given.kind in ("ExchangeTimeoutError", "ExchangeError", "PeerFailedError")
        of_all = cell.transport == "gloo" and cell.exchange == "all_gather"  # gloo tells nothing of an all-gather
        assert re.search(rf"rank {rank} .*\branks? \d|^ranks? (?!{rank} )\d" + "|of another rank" * of_all, given.said)


@pytest.mark.parametrize("cell", list(table()), ids=str)
def test_a_fault_is_harmless_or_named_within_the_bound(cell: Cell) -> None:
    fault = cell.fault
    ranks = 4 if fault.inside else 3
    answers = run_ranks(answer, ranks, cell, timeout_s=3 * BOUND_S, lost=[fault.rank] if is_lost(fault) else [])
    said = [given.said for given in answers if given is not None]
    for rank, given in enumerate(answers):
        if given is not None:
            check(cell, rank, given)
    if cell.answer == "gone" and not (cell.exchange == "all_gather" and cell.transport == "gloo"):
        assert any(re.search(rf"rank (?!{fault.rank} ).* rank {fault.rank}\b", text) for text in said), said
    if cell.answer == "differ":
        assert len(set(said)) == 1
    if cell.answer == "unnoticed":
        assert max(given.error for given in answers) > 1e-3
    assert {worker.process for worker in _POOL.workers} >= set(multiprocessing.active_children())


def test_the_table_has_every_fault_exchange_transport_and_level() -> None:
    cells = list(table())
    assert len(cells) == len(set(map(str, cells))) >= 60
    for inside in (False, True):
        for transport in TRANSPORTS:
            some = [cell for cell in cells if cell.transport == transport and cell.fault.inside == inside]
            assert {cell.exchange for cell in some} == set(EXCHANGES)
            assert {"corrupt", "drop", "duplicate", "delay", "reorder", "kill", "raise", *OTHER} <= {
                cell.fault.kind for cell in some
            }
    lost = {(cell.exchange, cell.fault.kind) for cell in cells if is_lost(cell.fault)}
    assert lost >= {*product(("exact", "all_gather", "ring", "ulysses"), ("kill", "stop")), ("exact", "terminate")}
