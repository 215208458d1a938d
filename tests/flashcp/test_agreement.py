"""Ranks that disagree, fail or stay away: named on every rank, never a hang; and what runs after that."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

import flashcp
from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError, PeerFailedError, PlanMismatchError
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.handshake import Handshake
from flashcp.comm.header import Header
from flashcp.comm.mail import Mail
from tests.packs import random_qkv
from tests.ranks import run_cases, run_ranks

YESTERDAY, TODAY = (40, 24), (24, 40)


def attention(cp: flashcp.ContextParallel, plan: flashcp.ShardingPlan, heads: int = 2, **grad: bool) -> torch.Tensor:
    q, k, v, _ = random_qkv(int(plan.offsets[-1]), heads, heads, 8, torch.float32, seed=0)
    q, k, v = (cp.shard(x, plan).requires_grad_(grad.get("grad", False)) for x in (q, k, v))
    return cp.attention(q, k, v, plan)


def message(error: type[Exception], call, *args) -> str:  # type: ignore[no-untyped-def]
    try:
        call(*args)
    except error as raised:
        return str(raised)
    return "nothing was raised"


def old_plan_on_rank_1(exchange: str, warm: bool) -> tuple[str, float, float]:
    cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    old, new = (flashcp.plan(lengths, 3, "per_document") for lengths in (YESTERDAY, TODAY))
    if warm:
        attention(cp, old)  # everybody agreed once: the check must not be remembered
    started = time.monotonic()
    said = message(PlanMismatchError, attention, cp, old if cp.rank == 1 else new)
    elapsed = time.monotonic() - started
    if cp.transport == "shm":
        assert "earlier error, make a new ContextParallel" in message(ExchangeError, attention, cp, new)
        cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    return said, elapsed, attention(cp, new).sum().item()


@pytest.mark.parametrize("warm", [False, True])
def test_a_rank_with_an_old_plan_stops_all_ranks_by_name(warm: bool) -> None:
    new = flashcp.plan(TODAY, 3, "per_document").fingerprint
    old = flashcp.plan(YESTERDAY, 3, "per_document").fingerprint
    cases = [(exchange, warm) for exchange in ("exact", "compacted", "all_gather", "ring")]
    for ranks in run_cases(old_plan_on_rank_1, 3, cases):
        for said, elapsed, _ in ranks:
            assert f"rank 1 {old}; ranks 0, 2 {new}" in said
            assert elapsed < 5


def other_settings_on_rank_0(what: str, exchange: str) -> str:
    """Rank 0 calls with one thing different from rank 1."""
    odd = dist.get_rank() == 0
    cp = flashcp.ContextParallel(
        exchange="all_gather" if what == "exchange" and odd else exchange,
        backward="refetch" if what == "refetch" and odd else "keep",
        gradient_wire="fp32" if what == "gradient wire" and odd else "auto",
        timeout_s=20,
    )
    plan = flashcp.plan(TODAY, 2, "per_document")
    q, k, v, _ = random_qkv(32, 4, 4 if what == "kv heads" and odd else 2, 8, torch.float32, seed=0)
    if what == "query heads" and odd:
        q = q[:, :2]
    if what == "dtype":
        q, k, v = (x.to(torch.float16 if odd else torch.bfloat16) for x in (q, k, v))
    k.requires_grad_(what != "gradients" or odd)
    scale = 1.0 if what == "scale" and odd else None
    window = 5 if what == "plan or the layer's window or chunk" and odd else None
    softcap = 4.0 if what == "softcap" and odd else None

    def call() -> None:
        with torch.set_grad_enabled(what != "gradients" or odd):
            handle = cp.prefetch(k, v, plan) if what == "query heads" else None
            of_layer = {"window": window, "softcap": softcap}
            out = handle.attention(q, scale) if handle else cp.attention(q, k, v, plan, scale, **of_layer)
        out.sum().backward()

    return message(PlanMismatchError, call)


OTHERS = {
    "exchange": "rank 0 all_gather; rank 1 {exchange}",
    "kv heads": "rank 0 4; rank 1 2",
    "query heads": "rank 0 2; rank 1 4",
    "dtype": "rank 0 torch.float16; rank 1 torch.bfloat16",
    "scale": "rank 0 1.0; rank 1 0.35",
    "softcap": "rank 0 4.0; rank 1 0.0",
    "gradients": "rank 0 yes; rank 1 no",
    "refetch": "rank 0 yes; rank 1 no",
    "gradient wire": "rank 0 fp32; rank 1 auto",
    "plan or the layer's window or chunk": "rank 0 {one}; rank 1 {all}: did all ranks get the same documents?",
}
"""What rank 0 has another of, and what all say of it."""


@pytest.mark.parametrize("exchange", ["exact", "ring", "ulysses"])
def test_other_exchanges_shapes_dtypes_scales_and_settings_are_named_with_both_values(exchange: str) -> None:
    plan = flashcp.plan(TODAY, 2, "per_document")
    values = {"exchange": exchange, "one": plan.narrow(5, None).fingerprint, "all": plan.fingerprint}
    cases = [(what, exchange) for what in OTHERS]
    for (what, _), ranks in zip(cases, run_cases(other_settings_on_rank_0, 2, cases), strict=True):
        for said in ranks:
            assert said.startswith(f"ranks disagree on {what} (call 1): {OTHERS[what].format(**values)}")


def handles_out_of_order(exchange: str) -> str:
    cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    plan = flashcp.plan(TODAY, 2, "per_document")
    q, k, v, _ = random_qkv(32, 2, 2, 8, torch.float32, seed=0)
    first, second = cp.prefetch(k, v, plan), cp.prefetch(k + 1, v, plan)
    return message(PlanMismatchError, (first if cp.rank else second).attention, q)


def test_handles_used_in_another_order_are_named() -> None:
    for exchange in ("ring", "ulysses"):
        for said in run_ranks(handles_out_of_order, 2, exchange):
            where = "rank 0 is at call 2, forward (attention); rank 1 is at call 1, forward (attention)"
            assert said == f"{where}: expected calls in the same order on all ranks"


def thrown_away_handles(exchange: str) -> None:
    cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    plan = flashcp.plan(TODAY, 3, "per_document")
    *qkv, _ = random_qkv(64, 3, 3, 8, torch.float32, seed=0)
    q, k, v = (cp.shard(x, plan) for x in qkv)
    for _ in range(3):
        cp.prefetch(k, v, plan)
    full = flashcp.reference_attention(*qkv, TODAY)
    assert torch.allclose(cp.attention(q, k, v, plan).double(), cp.shard(full, plan), atol=1e-5)


def test_a_handle_may_be_thrown_away() -> None:
    run_cases(thrown_away_handles, 3, [(exchange,) for exchange in ("exact", "all_gather", "ring", "ulysses")])


def outside_the_group() -> str:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return message(ValueError, lambda: flashcp.ContextParallel(group=group))
    cp = flashcp.ContextParallel(group=group, timeout_s=20)
    attention(cp, flashcp.plan(TODAY, 2, "per_document"))
    return f"rank {cp.rank} of {cp.world_size}"


def test_groups_smaller_than_the_world() -> None:
    outside, *inside = run_ranks(outside_the_group, 3)
    assert "member" in outside
    assert inside == ["rank 0 of 2", "rank 1 of 2"]
    with pytest.raises(ValueError, match="member"):
        flashcp.ContextParallel(group=5)  # type: ignore[arg-type]


def empty_rank(exchange: str) -> None:
    cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    plan = flashcp.ShardingPlan.from_shards([10], 2, [(0, 0, 10, 0)])
    *qkv, grad = random_qkv(10, 2, 2, 8, torch.float32, seed=0)
    local = [cp.shard(x, plan).requires_grad_() for x in qkv]
    out = cp.attention(*local, plan)
    out.backward(cp.shard(grad, plan))
    full = flashcp.reference_attention(*qkv, [10])
    assert torch.allclose(cp.unshard(out.detach(), plan).double(), full, atol=1e-5)


def test_a_rank_without_rows_takes_part() -> None:
    run_cases(empty_rank, 2, [(exchange,) for exchange in EXCHANGE_CLASSES])


def absent_rank_2() -> tuple[str, float]:
    cp = flashcp.ContextParallel(timeout_s=2)
    started = time.monotonic()
    if cp.rank == 2:
        time.sleep(4)
    said = message(ExchangeError, attention, cp, flashcp.plan(TODAY, 3, "per_document"))
    return said, time.monotonic() - started


def test_a_rank_that_does_not_come_is_named_within_the_time_out() -> None:
    *others, (late, late_elapsed) = run_ranks(absent_rank_2, 3)
    for said, elapsed in others:
        assert "rank 2 did not come" in said
        assert "waited 2 s" in said
        assert elapsed < 6
    assert late.startswith("rank 2")  # it comes to a group that gave it up
    assert late_elapsed < 10


def absent_in_the_backward() -> str:
    cp = flashcp.ContextParallel(timeout_s=8)
    out = attention(cp, flashcp.plan(TODAY, 2, "per_document"), grad=True)
    if cp.rank == 0:
        time.sleep(10)
        return ""
    return message(ExchangeTimeoutError, out.sum().backward)


def test_a_rank_that_skips_the_backward_is_named() -> None:
    assert "rank 0 did not come" in run_ranks(absent_in_the_backward, 2)[1]


def goes_on_without_its_backward(transport: str, then: str) -> str:
    cp = flashcp.ContextParallel(timeout_s=20, transport=transport)
    plan = flashcp.plan(TODAY, 3, "per_document")
    out = attention(cp, plan, grad=True)
    next_call = cp.synchronize if then == "synchronize" else lambda: attention(cp, plan)
    return message(PlanMismatchError, next_call if cp.rank == 0 else out.sum().backward)


def test_a_rank_that_goes_on_without_its_backward_is_named_with_what_it_skipped() -> None:
    cases = [(transport, then) for transport in ("shm", "gloo") for then in ("call 2, forward", "synchronize")]
    for (_, then), said in zip(cases, run_cases(goes_on_without_its_backward, 3, cases), strict=True):
        at = f"call 1, {then}" if then == "synchronize" else then
        why = f"rank 0 is at {at}; ranks 1, 2 are at call 1, backward: did rank 0 skip its backward?"
        assert said == [why] * 3


def absent_for_part_of_a_millisecond(timeout_s: float) -> str:
    """gloo waits whole milliseconds, so its wait ends before our own clock says so."""
    group = dist.new_group([0, 1])
    said = ""
    if dist.get_rank() == 1:
        header = Header(failed=0, call=1)
        said = message(ExchangeTimeoutError, Handshake(Mail(group, timeout_s)).compare, header)
    dist.barrier()
    return said


def test_a_rank_is_missing_by_the_kind_of_the_error_and_not_by_the_clock() -> None:
    for _, said in run_cases(absent_for_part_of_a_millisecond, 2, [(0.0309 + 0.001 * case,) for case in range(10)]):
        assert "rank 0 did not come" in said


def failing_rank_0() -> tuple[str, float]:
    cp = flashcp.ContextParallel(timeout_s=30)
    plan = flashcp.plan(TODAY, 2, "per_document")
    q, k, v, _ = random_qkv(int(plan.tokens[cp.rank]), 2, 2, 8, torch.float32, seed=0)
    started = time.monotonic()
    if cp.rank == 0:
        said = message(ValueError, cp.attention, q[:-1], k, v, plan)
    else:
        said = message(PeerFailedError, cp.attention, q, k, v, plan)
    assert "earlier error, make a new ContextParallel" in message(ExchangeError, attention, cp, plan)
    cp = flashcp.ContextParallel(timeout_s=30)
    return f"{said} | {attention(cp, plan).shape[0]} rows after", time.monotonic() - started


def test_an_error_on_one_rank_reaches_the_others_at_once_and_leaves_the_group_usable() -> None:
    (own, _), (other, elapsed) = run_ranks(failing_rank_0, 2)
    assert "equal tokens" in own
    assert "32 rows after" in own
    assert "rank 0 stopped with an error" in other
    assert "32 rows after" in other
    assert elapsed < 10


def bad_calls() -> list[str]:
    cp = flashcp.ContextParallel(exchange="ulysses", timeout_s=20)
    plan = flashcp.plan(TODAY, 2, "per_document")
    rows = int(plan.tokens[cp.rank])
    x = torch.zeros(rows, 3, 8)
    y = torch.zeros(rows, 2, 8)
    return [
        message(ValueError, cp.attention, x, x, x, plan),
        message(ValueError, cp.attention, y.half(), y, y, plan),
        message(ValueError, cp.attention, y[1:], y[1:], y[1:], plan),
        message(ValueError, cp.attention, y, y, y, flashcp.plan(TODAY, 4)),
        message(ValueError, cp.attention, y, y, y, "plan"),
        message(ValueError, cp.shard, torch.zeros(3), plan),
        message(ValueError, cp.unshard, torch.zeros(3), plan),
        message(ValueError, cp.unshard, torch.zeros(32), plan, 7),
        message(ValueError, cp.attention, None, y, y, plan),
        message(ValueError, lambda: cp.attention(y, y, y, plan, softmax_scale=-1)),
        message(ValueError, cp.attention, y.double(), y.double(), y.double(), plan),
    ]


def test_bad_calls_say_what_is_wrong() -> None:
    expected = (
        "query_heads=3, kv_heads=3: cannot be shared out among 2 ranks; expected multiples of 2",
        "one floating-point dtype",
        "q has 31 rows: expected 32",
        "plan for 4 ranks: expected the group's 2",
        "plan is a str",
        "x has 3 rows along dim 0: expected the pack's 64",
        "local has 3 rows along dim 0: expected 32 on rank",
        "dim=7: expected an axis of local, which has 1",
        "q is a NoneType: expected a dense tensor",
        "softmax_scale=-1: expected a positive number",
        "q is torch.float64",
    )
    for said in run_ranks(bad_calls, 2):
        for text, part in zip(said, expected, strict=True):
            assert part in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exchange", "nope"),
        ("overlap", "nope"),
        ("attention", "nope"),
        ("transport", "nccl"),
        ("backward", "nope"),
        ("gradient_wire", "bf16"),
        ("verify_rows", "yes"),
        ("timeout_s", 0),
        ("timeout_s", float("inf")),
    ],
)
def test_unknown_names_list_the_legal_ones(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}: expected"):
        flashcp.ContextParallel(**{field: value})  # type: ignore[arg-type]
