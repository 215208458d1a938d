"""gather and attend: the halves of attention, for rows of any kind, and latents that are expanded on arrival."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.comm.errors import PeerFailedError, PlanMismatchError
from tests.packs import AWKWARD, random_lengths, random_qkv, relative_error
from tests.ranks import run_cases, run_ranks

RECEIVING = ("exact", "compacted", "all_gather", "ring")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LATENT, HEADS, NOPE, ROPE, VALUES = 512 + 64, 4, 128, 64, 128  # DeepSeek-V3's dims, of fewer heads


def halves_and_whole(
    lengths: tuple[int, ...], strategy: str, exchange: str, dtype: torch.dtype, transport: str
) -> list[float]:
    """Errors of out and of all gradients against the float64 reference; K and V travel as one tensor [T, 2 K D]."""
    cp = flashcp.ContextParallel(exchange=exchange, transport=transport, timeout_s=20)
    plan = flashcp.plan(lengths, cp.world_size, strategy)
    q, k, v, grad = random_qkv(sum(lengths), 4, 2, 16, dtype, 3)
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    handle = cp.prefetch_gather(torch.stack(local[1:], dim=1), plan)
    received = handle.rows()
    assert received.shape[1:] == (2, 2, 16)
    out = cp.attend(*local, *received.unbind(1), plan)
    with pytest.raises(RuntimeError, match="gather again"):
        handle.rows()
    gradients = torch.autograd.grad(out, local, cp.shard(grad, plan))
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    reference = flashcp.reference_attention(*whole, lengths)
    expected = (reference, *torch.autograd.grad(reference, whole, grad.double()))
    got = [cp.unshard(x.detach(), plan) for x in (out, *gradients)]
    return list(map(relative_error, got, expected))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_halves_of_attention_are_attention(world_size: int) -> None:
    cases = []
    for i, exchange in enumerate(RECEIVING * 3):
        lengths = random_lengths(world_size + 10 * i) if i % 2 else AWKWARD[i // 2 % len(AWKWARD)]
        strategy, dtype = flashcp.strategies()[i % 6], list(BOUND)[i // 2 % 2]
        cases.append((lengths, strategy, exchange, dtype, ("gloo", "shm")[i % 2] if world_size > 1 else "auto"))
    for case, ranks in zip(cases, run_cases(halves_and_whole, world_size, cases), strict=True):
        for errors in ranks:
            assert max(errors) < BOUND[case[3]], case


def expand(latent: Tensor, up_k: Tensor, up_v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [rows, heads, 192] and values [rows, heads, 128] of latents [rows, 576]: the last 64 are the keys' rope."""
    low, rope = latent.split([LATENT - ROPE, ROPE], dim=1)
    nope = (low @ up_k).unflatten(1, (HEADS, NOPE))
    return torch.cat((nope, rope[:, None].expand(-1, HEADS, -1)), dim=2), (low @ up_v).unflatten(1, (HEADS, VALUES))


def latents(exchange: str) -> list[tuple[list[Tensor], int]]:
    """Out, gradients of queries and latents, of the whole pack, and bytes sent: by latents, then by expanded heads."""
    cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    lengths = (70, 9, 33)
    plan = flashcp.plan(lengths, cp.world_size, "per_document")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    full_q, full_latent, up_k, up_v = (
        draw(sum(lengths), HEADS, NOPE + ROPE), draw(sum(lengths), LATENT), draw(LATENT - ROPE, HEADS * NOPE),
        draw(LATENT - ROPE, HEADS * VALUES),
    )  # fmt: skip
    grad = cp.shard(draw(sum(lengths), HEADS, VALUES), plan)
    both = []
    for by_latent in (True, False):
        q, latent = (cp.shard(x, plan).requires_grad_() for x in (full_q, full_latent))
        before = cp.sent_bytes
        k, v = expand(latent, up_k, up_v)
        if by_latent:
            received = expand(cp.gather(latent, plan), up_k, up_v)
        else:
            rows = cp.gather(torch.cat((k, v), dim=2), plan)
            received = rows[..., : NOPE + ROPE], rows[..., NOPE + ROPE :]
        out = cp.attend(q, k, v, *received, plan)
        gradients = torch.autograd.grad(out, (q, latent), grad)
        sent = cp.sent_bytes - before
        both.append(([cp.unshard(x.detach(), plan) for x in (out, *gradients)], sent))
    whole = [x.double().requires_grad_() for x in (full_q, full_latent)]
    offset, outs = 0, []
    for rows in lengths:  # the specification takes one head_dim: a softmax by hand
        k, v = expand(whole[1][offset : offset + rows], up_k.double(), up_v.double())
        scores = torch.einsum("ihd,jhd->hij", whole[0][offset : offset + rows], k) * (NOPE + ROPE) ** -0.5
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        outs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v))
        offset += rows
    reference = torch.cat(outs)
    gradients = torch.autograd.grad(reference, whole, cp.unshard(grad, plan).double())
    for got, _ in both:
        assert max(map(relative_error, got, (reference, *gradients))) < 1e-5
    return both


@pytest.mark.parametrize("exchange", ["exact", "all_gather"])
def test_latents_give_what_expanded_heads_give_for_fewer_bytes(exchange: str) -> None:
    for (by_latent, few), (by_heads, many) in run_ranks(latents, 3, exchange):
        assert max(map(relative_error, by_latent, by_heads)) < 1e-5
        assert few * HEADS * (NOPE + ROPE + VALUES) == many * LATENT


def layers_that_share() -> tuple[int, int, bool]:
    """Bytes of one gather and of two attention calls on its rows; whether an odd row comes as it left."""
    cp = flashcp.ContextParallel(timeout_s=20)
    plan = flashcp.plan((50, 20), cp.world_size, "per_document")
    kv, grad = torch.randn(70, 2, 1, 8), torch.randn(70, 2, 8)
    rows = cp.shard(kv, plan).requires_grad_()
    received = cp.gather(rows, plan)
    once = cp.sent_bytes
    total = sum(
        (cp.attend(cp.shard(grad, plan) * scale, *rows.unbind(1), *received.unbind(1), plan).sum() for scale in (1, 2)),
        torch.zeros(()),
    )
    total.backward()
    odd = cp.shard(torch.arange(70.0)[:, None].expand(-1, 3), plan)
    first, stop = cp.gather(odd, plan, window=4), plan.route("exact", window=4).received(cp.rank)
    places = plan.offsets[stop.document] + stop.start
    expected = torch.cat([torch.arange(a, b) for a, b in zip(places, places + stop.stop - stop.start, strict=True)])
    return once, cp.sent_bytes, bool((first == expected.float()[:, None].expand(-1, 3)).all())


def test_layers_that_share_kv_fetch_it_once() -> None:
    for once, both_passes, whole in run_ranks(layers_that_share, 2):
        assert both_passes > once > 0
        assert whole


def odd_rows(transport: str) -> list[tuple[int, ...]]:
    """Shapes of what comes of rows without an axis, of no columns, and of their gradients."""
    cp = flashcp.ContextParallel(transport=transport, timeout_s=20)
    plan, order = (
        flashcp.plan((50, 20), cp.world_size, "per_document"),
        flashcp.plan((70,), cp.world_size, "contiguous"),
    )
    shapes = []
    for full in (torch.arange(70.0), torch.zeros(70, 0), torch.zeros(70, 3, 0)):
        x = cp.shard(full, plan).requires_grad_()
        came, there = cp.gather(x, plan), cp.reshard(x, plan, order)
        (came.sum() + there.sum()).backward()
        assert x.grad is not None
        assert torch.equal(there, cp.shard(full, order))
        assert came.shape[0] == plan.route("exact").received_rows[cp.rank]
        shapes.append((*came.shape[1:], *x.grad.shape[1:]))
    return shapes


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_rows_may_be_single_numbers_or_nothing(transport: str) -> None:
    assert run_ranks(odd_rows, 2, transport) == [[(), (0, 0), (3, 0, 3, 0)]] * 2


def other_calls() -> list[str]:
    """What ranks hear that call different things."""
    said = []
    plan = flashcp.plan((8, 8), 2)
    x, y = torch.zeros(8, 4), torch.zeros(8, 1, 4)

    def hear(here, there) -> None:  # type: ignore[no-untyped-def]
        cp = flashcp.ContextParallel(timeout_s=20)
        with pytest.raises(PlanMismatchError) as caught:
            (there if cp.rank else here)(cp)
        said.append(str(caught.value))

    hear(lambda cp: cp.gather(x, plan), lambda cp: cp.attention(y, y, y, plan))
    hear(lambda cp: cp.reshard(x, plan, plan), lambda cp: cp.gather(x, plan))
    hear(lambda cp: cp.reshard(x, plan, plan), lambda cp: cp.unshard(x, plan))
    hear(lambda cp: cp.gather(x, plan), lambda cp: cp.gather(x[:, :3], plan))
    hear(lambda cp: cp.attention(y, y, y, plan, softcap=5), lambda cp: cp.attention(y, y, y, plan, softcap=6))
    return said


def test_ranks_that_call_different_things_hear_what() -> None:
    expected = (
        "operation (call 1): rank 0 gather; rank 1 attention",
        "operation (call 1): rank 0 reshard; rank 1 gather",
        "operation (call 1): rank 0 reshard; rank 1 unshard",
        "row bytes (call 1): rank 0 16; rank 1 12",
        "softcap (call 1): rank 0 5.0; rank 1 6.0",
    )
    for said in run_ranks(other_calls, 2):
        for text, part in zip(said, expected, strict=True):
            assert part in text


def wrong_calls() -> Iterator[str]:
    cp = flashcp.ContextParallel(timeout_s=20)
    plan = flashcp.plan((8, 8), cp.world_size)
    x = torch.zeros(8, 4)
    y = torch.zeros(8, 1, 4)

    def message(error: type[Exception], function, *arguments: object, **named: object) -> str:  # type: ignore[no-untyped-def]
        with pytest.raises(error) as caught:
            function(*arguments, **named)
        return str(caught.value)

    return [  # type: ignore[return-value]
        message(ValueError, cp.gather, x[:3], plan),
        message(ValueError, cp.gather, x.long(), plan),
        message(ValueError, cp.gather, None, plan),
        message(ValueError, cp.gather, x, plan, window=0),
        message(ValueError, cp.attention, y, y, y, plan, return_lse="yes"),
        message(ValueError, cp.attend, y, y, y, y[:0], y[:0], plan, return_lse=1),
        message(ValueError, cp.attend, y, y, y, y[:0], None, plan),
        message(ValueError, cp.attend, y, y, y, y[:0, :, :2], y[:0], plan),
        message(ValueError, cp.attend, y, y, y, y[:1], y[:0], plan),
        message(ValueError, cp.reshard, x, plan, flashcp.plan((8, 9), 2)),
        message(ValueError, cp.reshard, x[:2], plan, plan),
        message(ValueError, cp.reshard, x, plan, "plan"),
    ]


def test_bad_calls_say_what_is_wrong() -> None:
    expected = (
        "x has 3 rows: expected 8 on rank",
        "x is torch.int64: expected a floating-point dtype",
        "x is a NoneType: expected a dense tensor",
        "window=0: expected a whole number of rows >= 1",
        "return_lse='yes': expected True or False",
        "return_lse=1: expected True or False",
        "received_v is NoneType: expected torch.float32 [rows, 1, 4]",
        "received_k is torch.float32 [0, 1, 2]: expected torch.float32 [rows, 1, 4]",
        "received_k and received_v have 1 and 0 rows: expected as many",
        "plans for 16 and 17 tokens: expected two plans of one pack",
        "x has 2 rows: expected 8 on rank",
        "plan is a str: expected a ShardingPlan",
    )
    for said in run_ranks(wrong_calls, 2):
        for text, part in zip(said, expected, strict=True):
            assert part in text


def late_gradients() -> None:
    """Rows that left under no_grad: as `prefetch` has it, nobody may want gradients of them later."""
    cp = flashcp.ContextParallel(timeout_s=20)
    plan, other = (flashcp.plan((8, 8), cp.world_size, name) for name in ("per_document", "contiguous"))
    x = torch.ones(16 // cp.world_size, 4, requires_grad=True)
    with torch.no_grad():
        handles = cp.prefetch_gather(x, plan), cp.prefetch_reshard(x, plan, other)
    for handle in handles:
        with pytest.raises(RuntimeError, match="without gradients: prefetch again where gradients are on"):
            handle.rows()
        with torch.no_grad():
            assert (handle.rows() == 1).all()


def test_rows_that_left_without_gradients_have_none_later() -> None:
    for world_size in (1, 2):
        run_ranks(late_gradients, world_size)


def where_no_rows_come(exchange: str, head_ranks: int) -> str:
    cp = flashcp.ContextParallel(exchange=exchange, head_ranks=head_ranks, timeout_s=20)
    plan = flashcp.plan((8, 8), cp.holders)
    with pytest.raises(ValueError, match="expected exact, compacted, all_gather or ring with head_ranks=1"):
        cp.gather(torch.zeros(8, 4), plan)
    with pytest.raises(PeerFailedError if cp.rank == 0 else ValueError) as caught:
        cp.reshard(torch.zeros(8, 4), plan, plan if cp.rank == 0 else None)  # type: ignore[arg-type]
    return str(caught.value)


def test_exchanges_that_bring_no_rows_say_so_on_all_ranks() -> None:
    for said in run_ranks(where_no_rows_come, 2, "ulysses", 1):
        assert "rank 1" in said or "plan is a NoneType" in said
