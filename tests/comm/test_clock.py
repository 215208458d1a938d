"""The clock of a rank: blocks add up to totals, and are named ranges where a profiler runs."""

from __future__ import annotations

import time
from collections import Counter

from torch.profiler import ProfilerActivity, profile

from flashcp.comm.clock import Clock, span


def test_a_block_inside_another_counts_for_itself_alone() -> None:
    clock = Clock()
    outer = time.perf_counter()
    with clock.measure("attention_ms", "local tiles"):
        started = time.perf_counter()
        with clock.measure("exposed_exchange_ms"):
            time.sleep(0.04)
        inner_ms = 1e3 * (time.perf_counter() - started)
        time.sleep(0.02)
    outer_ms = 1e3 * (time.perf_counter() - outer)
    # Bounds that hold however long the machine stops between two lines; counted twice, 40 ms would break the last.
    assert 40 <= clock.exposed_exchange_ms <= inner_ms
    assert clock.attention_ms >= 20
    assert clock.attention_ms + clock.exposed_exchange_ms <= outer_ms


def test_blocks_with_a_name_are_ranges_of_a_trace() -> None:
    clock = Clock()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for name in ("headers", "", "headers"):
            with clock.measure("wait_ms", name):
                pass
        with span("send rows to rank 1"):
            pass
    names = Counter(event.name for event in profiler.events() or ())
    assert names == {"headers": 2, "send rows to rank 1": 1}


def test_no_profiler_no_range() -> None:
    with profile(activities=[ProfilerActivity.CPU]):
        pass
    assert span("one") is span("other")
