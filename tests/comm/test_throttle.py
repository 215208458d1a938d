"""A slowed link slows every exchange, both passes; a transport that slows nothing says so."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from tests.packs import random_qkv
from tests.ranks import run_cases

LENGTHS, GBPS = (300, 180, 120), 0.002  # 100 KiB in 50 ms


def seconds_and_bytes(exchange: str, overlap: str) -> list[tuple[float, int]]:
    """Of this rank's forward and of its backward."""
    options = flashcp.TransportOptions(throttle_gbps=GBPS)
    cp = flashcp.ContextParallel(exchange=exchange, overlap=overlap, transport="shm", timeout_s=20, options=options)
    assert cp.throttle_gbps == GBPS
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_sequence")
    *qkv, grad = random_qkv(sum(LENGTHS), 4, 2, 32, torch.float32, seed=0)
    q, k, v = (cp.shard(x, plan).requires_grad_() for x in qkv)
    found = []

    def watched(work: object) -> torch.Tensor:
        dist.barrier()
        started, sent = time.perf_counter(), cp.sent_bytes
        out = work()  # type: ignore[operator]
        cp.synchronize()  # all has left
        found.append((time.perf_counter() - started, cp.sent_bytes - sent))
        return out

    out = watched(lambda: cp.attention(q, k, v, plan))
    watched(lambda: out.backward(cp.shard(grad, plan)))
    return found


@pytest.mark.parametrize("overlap", ["none", "staged"])
def test_every_exchange_pays_for_its_rows_in_both_passes(overlap: str) -> None:
    cases = [(exchange, overlap) for exchange in EXCHANGE_CLASSES]
    for (exchange, _), ranks in zip(cases, run_cases(seconds_and_bytes, 2, cases), strict=True):
        for each in ranks:
            for which, (seconds, sent) in zip(("forward", "backward"), each, strict=True):
                assert sent > 10_000, (exchange, which)
                assert seconds >= sent / GBPS / 1e9, (exchange, which)


def throttles(transport: str) -> float:
    options = flashcp.TransportOptions(throttle_gbps=GBPS)
    return flashcp.ContextParallel(transport=transport, timeout_s=20, options=options).throttle_gbps


def test_a_transport_that_slows_nothing_says_so() -> None:
    assert run_cases(throttles, 2, [("gloo",), ("shm",)]) == [[0.0, 0.0], [GBPS, GBPS]]
