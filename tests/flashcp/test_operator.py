"""What users rely on beside the numbers: no leaks between documents, repeatability, nothing kept without need."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

import flashcp
from flashcp.comm.choice import Connection
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.transport import Alone
from flashcp.sharding.numbered import numbered
from tests.packs import random_qkv
from tests.ranks import run_cases, run_ranks

LENGTHS = (50, 7, 1, 70)
CASES = [
    (strategy, exchange, attention)
    for attention in ("cpu", "varlen")
    for strategy in flashcp.strategies()
    for exchange in EXCHANGE_CLASSES
]


def probe(strategy: str, exchange: str, attention: str) -> list[int]:
    """Change one token of document 0; count changed output and gradient elements of the other documents."""
    cp = flashcp.ContextParallel(exchange=exchange, attention=attention, timeout_s=20)
    plan = flashcp.plan(LENGTHS, cp.world_size, strategy)

    def run(change: float) -> list[torch.Tensor]:
        *qkv, grad = random_qkv(sum(LENGTHS), 6, 6, 8, torch.float32, seed=0)
        for x in qkv:
            x[3] += change
        local = [cp.shard(x, plan).requires_grad_() for x in qkv]
        out = cp.attention(*local, plan)
        gradients = torch.autograd.grad(out, local, cp.shard(grad, plan))
        return [cp.unshard(x.detach(), plan) for x in (out, *gradients)]

    before, after = run(0.0), run(1.0)
    changed = [(a != b).flatten(1).any(1) for a, b in zip(before, after, strict=True)]
    return [int(x[: LENGTHS[0]].sum()) for x in changed] + [int(x[LENGTHS[0] :].sum()) for x in changed]


def test_no_document_sees_another() -> None:
    for case, ranks in zip(CASES, run_cases(probe, 3, CASES), strict=True):
        for counts in ranks:
            assert min(counts[:4]) > 0, case  # the probe does change its own document
            assert counts[4:] == [0, 0, 0, 0], case


def twice(strategy: str, exchange: str, attention: str) -> bool:
    cp = flashcp.ContextParallel(exchange=exchange, attention=attention, timeout_s=20)
    plan = flashcp.plan(LENGTHS, cp.world_size, strategy)
    *qkv, grad = random_qkv(sum(LENGTHS), 6, 6, 8, torch.float32, seed=0)
    local = [cp.shard(x, plan).requires_grad_() for x in qkv]

    def run() -> list[torch.Tensor]:
        out = cp.attention(*local, plan)
        return [out, *torch.autograd.grad(out, local, cp.shard(grad, plan))]

    return all(map(torch.equal, run(), run()))


def test_runs_repeat_bit_for_bit() -> None:
    assert all(same for ranks in run_cases(twice, 3, CASES) for same in ranks)


def kept(exchange: str, backward: str) -> list[bool]:
    """Whether the receive buffer outlives the call, without and with gradients."""
    cp = flashcp.ContextParallel(exchange=exchange, backward=backward, timeout_s=20)
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
    *qkv, _ = random_qkv(sum(LENGTHS), 6, 6, 8, torch.float32, seed=0)
    q, k, v = (cp.shard(x, plan).requires_grad_() for x in qkv)
    alive = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            handle = cp.prefetch(k, v, plan)
            buffer = weakref.ref(numbered(int(handle._begun)).incoming.inbox.rows)
            out = handle.attention(q)
            assert out.requires_grad == grad
            alive.append(buffer() is not None)
    return alive


@pytest.mark.parametrize("exchange", list(EXCHANGE_CLASSES))
def test_received_rows_are_kept_for_a_backward_only(exchange: str) -> None:
    keep, refetch = run_cases(kept, 2, [(exchange, "keep"), (exchange, "refetch")])
    # What becomes heads stays in memory of its own, in place of q, k and v: its buffer serves the next call.
    assert keep == [[False, exchange != "ulysses"]] * 2
    assert refetch == [[False, False]] * 2


def handle_and_helpers() -> None:
    cp = flashcp.ContextParallel(timeout_s=20)
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
    *qkv, _ = random_qkv(sum(LENGTHS), 4, 2, 8, torch.float32, seed=0)
    q, k, v = (cp.shard(x, plan) for x in qkv)
    handle = cp.prefetch(k, v, plan)
    assert torch.equal(handle.attention(q), cp.attention(q, k, v, plan))
    with pytest.raises(RuntimeError, match="prefetch again"):
        handle.attention(q)
    handle = cp.prefetch(k, v, plan)
    k.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        handle.attention(q)
    with torch.no_grad():
        handle = cp.prefetch(k, v, plan)
    with pytest.raises(RuntimeError, match="prefetched without gradients"):
        handle.attention(q.clone().requires_grad_())
    assert cp.transport == "shm"
    assert cp.overlap == "staged"
    assert cp.stats.attention_ms > 0
    assert cp.stats.exposed_exchange_ms > 0
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    assert torch.equal(cp.position_ids(plan), cp.shard(positions, plan))
    full = torch.randn(3, sum(LENGTHS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(cp.unshard(cp.shard(full, plan, dim=1), plan, dim=1), full)
    one = cp.shard(full[0], plan).requires_grad_()  # rows that are single numbers
    cp.unshard(one, plan).sum().backward()
    assert torch.equal(one.grad, torch.full_like(one, cp.world_size))
    # Every rank weighs the copies of a row with rank + 1: the adjoint is their sum.
    local = cp.shard(full, plan, dim=1).requires_grad_()
    (gradient,) = torch.autograd.grad(cp.unshard(local, plan, dim=1), local, full * (cp.rank + 1))
    assert torch.allclose(gradient, local.detach() * sum(range(1, cp.world_size + 1)))


def test_prefetch_shard_unshard_and_positions() -> None:
    run_ranks(handle_and_helpers, 3)


def test_alone_without_a_process_group() -> None:
    cp = flashcp.ContextParallel()
    assert (cp.rank, cp.world_size, cp.transport) == (0, 1, "none")
    plan = flashcp.plan(LENGTHS, 1)
    *qkv, _ = random_qkv(sum(LENGTHS), 4, 2, 8, torch.float32, seed=0)
    assert torch.equal(cp.attention(*qkv, plan), flashcp.varlen_attention(*qkv, LENGTHS))


def test_lengths_seen_in_inference_mode_can_be_trained_on() -> None:
    *qkv, _ = random_qkv(13, 2, 2, 8, torch.float32, seed=0)
    with torch.inference_mode():
        flashcp.varlen_attention(*qkv, [6, 7])
    q, k, v = (x.requires_grad_() for x in qkv)
    flashcp.varlen_attention(q, k, v, [6, 7]).sum().backward()
    assert k.grad is not None


def gradient_of_an_imaginary_part() -> bool:
    cp = flashcp.ContextParallel()
    plan = flashcp.plan((9, 4), cp.world_size, "per_document")
    x = torch.randn(int(plan.tokens[cp.rank]), 2, dtype=torch.complex64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cp.unshard(x, plan).imag.sum(), x)
    return torch.equal(gradient, torch.full_like(gradient, 2j))  # one from each rank's copy


def test_unshard_keeps_all_of_a_gradient() -> None:
    assert all(run_ranks(gradient_of_an_imaginary_part, 2))


HERE = Connection(Alone(), None, "this test's")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout_s": 1e15}, "expected seconds from 0.001 to 1e"),
        ({"timeout_s": 1e-300}, "expected seconds from 0.001"),
        ({"tuning": "forward=16x16x4x1"}, "tuning is a str: expected"),
        ({"options": {"heap_mib": 1.0}}, r"options is a dict: expected a flashcp\.TransportOptions, or None"),
        ({"group": HERE, "transport": "shm"}, "transport='shm': expected none beside a Connection, which has its own"),
        ({"group": HERE, "timeout_s": 5}, "timeout_s=5: expected none beside a Connection"),
        ({"group": HERE, "options": flashcp.TransportOptions()}, "options=TransportOptions.*: expected none beside a"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        flashcp.ContextParallel(**options)


def test_a_connection_stands_for_what_it_was_made_with() -> None:
    assert flashcp.ContextParallel(HERE).transport_reason == "this test's"


@pytest.mark.parametrize("field", ["heap_mib", "region_mib", "throttle_gbps"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1"])
def test_transport_options_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}={value!r}: expected a number >= 0$"):
        flashcp.TransportOptions(**{field: value})
