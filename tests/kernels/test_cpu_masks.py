"""Masks, softcap, sinks and other head dims of v on the CPU, against the float64 reference."""

from __future__ import annotations

import itertools
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcp
from flashcp import Mask
from flashcp.kernels.cpu import CpuAttention
from flashcp.kernels.cpu_steps import Batch, Piece, Tile, steps
from flashcp.kernels.interface import KV
from flashcp.kernels.reference import sees
from flashcp.kernels.schedule import Schedule, build_schedule, whole_pack_schedule
from flashcp.kernels.sinks import add_sinks, sink_gradients
from flashcp.sharding.masks import read_masks
from tests.kernels.one_rank import Rank
from tests.packs import random_qkv, relative_error

LENGTHS = (300, 1, 70, 9, 300, 12)
MASKS = {
    "causal": Mask(),
    "window 1": Mask("window", 1),
    "window 127": Mask("window", 127),
    "window of all": Mask("window", 400),
    "chunk": Mask("chunk", 50),
    "full": Mask("full"),
    "prefix": Mask("prefix", 33),
    "prefix of all": Mask("prefix", 1000),
}
IN_BLOCKS = {
    "block at the start": Mask(blocks=[(0, 40)]),
    "block at the end": Mask(blocks=[(200, 300)]),
    "block of all": Mask(blocks=[(0, 300)]),
    "blocks and a window": Mask("window", 60, [(0, 7), (100, 280), (280, 300)]),
    "blocks and chunks": Mask("chunk", 64, [(30, 100), (299, 300)]),
}


def inputs(
    tokens: int, heads: tuple[int, int], dtype: torch.dtype, v_dim: int = 16, spikes: bool = False
) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the output's gradient. spikes: scores of some rows far beyond those of others."""
    q, k, _, _ = random_qkv(tokens, *heads, 16, torch.float32, seed=tokens)
    _, _, v, grad = random_qkv(tokens, *heads, v_dim, torch.float32, seed=tokens + 1)
    if spikes:
        q[::7] *= 12
        k[3::11] *= 12
    *qkv, grad = (x.to(dtype) for x in (q, k, v, grad))
    return qkv, grad


def errors(lengths, masks, heads=(4, 2), dtype=torch.float32, v_dim=16, spikes=False, sinks=None, **how) -> float:  # type: ignore[no-untyped-def]
    """The largest relative error of output and gradients; where the reference's gradient cancels, of the difference."""
    qkv, grad = inputs(sum(lengths), heads, dtype, v_dim, spikes)
    tensors = [*qkv, *([] if sinks is None else [sinks])]
    fast = [x.clone().requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    found, wanted = [
        attention(*x[:3], lengths, masks=masks, sinks=x[3] if sinks is not None else None, **how)
        for attention, x in ((flashcp.varlen_attention, fast), (flashcp.reference_attention, exact))
    ]
    got, want = torch.autograd.grad(found, fast, grad), torch.autograd.grad(wanted, exact, grad.double())
    size = grad.double().norm().item()

    def error(a: Tensor, b: Tensor) -> float:
        return relative_error(a, b) if b.norm() > 1e-6 * size else a.double().norm().item() / size

    return max(error(a, b) for a, b in zip((found, *got), (wanted, *want), strict=True))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_kind_of_mask_matches_the_reference(mask: Mask) -> None:
    for heads in ((2, 2), (4, 2)):
        assert errors(LENGTHS, mask, heads) < 1e-5
        assert errors(LENGTHS, mask, heads, torch.bfloat16) < 1e-2
    assert errors(LENGTHS, mask, dtype=torch.float16) < 2e-3


@pytest.mark.parametrize("mask", IN_BLOCKS.values(), ids=IN_BLOCKS)
def test_blocks_match_the_reference(mask: Mask) -> None:
    masks = [mask, Mask(), Mask("prefix", 5), Mask("full"), mask, Mask("window", 3)]
    assert errors(LENGTHS, masks) < 1e-5
    assert errors(LENGTHS, masks, dtype=torch.bfloat16) < 1e-2


@pytest.mark.parametrize("masks", [None, Mask("window", 100), Mask(blocks=[(0, 5)]), Mask("full")], ids=str)
def test_softcap_sinks_and_head_dims_match_the_reference(masks: Mask | None) -> None:
    """With spikes in the input: small uniform scores hide a wrong rescale."""
    lengths = (300, 20, 25, 25, 300)
    sinks = torch.tensor([-3.0, 0.5, 4.0, 30.0])
    for how in ({"softcap": 5.0}, {"sinks": sinks}, {"softcap": 20.0, "sinks": sinks}):
        assert errors(lengths, masks, spikes=True, **how) < 1e-5
    for v_dim in (8, 24):
        assert errors(lengths, masks, v_dim=v_dim, sinks=sinks) < 1e-5
    assert errors(lengths, masks, dtype=torch.bfloat16, softcap=5.0, sinks=sinks) < 1e-2
    assert errors(lengths, masks, v_dim=24, softcap=5.0) < 1e-5


def test_edges_apart_from_what_all_rows_see_match_the_reference() -> None:
    """Some rows see nothing of the first keys that their tile reads."""
    assert errors((1700,), Mask("window", 800), (1, 1)) < 1e-5
    assert errors((1700,), Mask("window", 700, [(100, 1600)]), (2, 1)) < 1e-5


def test_long_calls_that_hold_their_scores_are_cut() -> None:
    assert errors((2500,), None, (1, 1), softcap=3.0) < 1e-5
    schedule = whole_pack_schedule(np.array([6000]))
    sizes = [rows * keys for rows, keys, _ in computed(schedule, holds_scores=True)]
    assert max(sizes) <= 256 * 2048
    assert sum(sizes) < 1.05 * schedule.pairs


def test_sinks_are_in_the_log_sum_exp_and_leave_rows_of_nothing_alone() -> None:
    out, lse = torch.randn(3, 2, 4), torch.tensor([[0.0, 2.0], [-torch.inf, 5.0], [1.0, 1.0]])
    out[1, 0] = 0
    sinks = torch.tensor([-torch.inf, 2.0])
    joined, joined_lse = add_sinks(out, lse, sinks)
    assert torch.allclose(joined_lse, torch.tensor([[0.0, 2.6931], [-torch.inf, 5.0486], [1.0, 2.3133]]), atol=1e-4)
    assert torch.equal(joined[:, 0], out[:, 0])
    assert torch.allclose(joined[0, 1], out[0, 1] / 2)
    assert sink_gradients(joined, torch.ones_like(out), joined_lse, sinks)[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["cpu", "varlen"])
def test_a_sink_of_infinity_takes_all_weight(attention: str, dtype: torch.dtype) -> None:
    """Its head gives zeros and has no gradients; the other head is as it would be."""
    qkv, grad = inputs(60, (2, 2), dtype)
    qkv = [x.requires_grad_() for x in qkv]
    sinks = torch.tensor([torch.inf, 0.5], dtype=dtype).requires_grad_()
    found = []
    for attend in (partial(flashcp.varlen_attention, attention=attention), flashcp.reference_attention):
        out = attend(*qkv, (50, 10), masks=Mask("window", 9), sinks=sinks)
        found.append((out, *torch.autograd.grad(out, [*qkv, sinks], grad.to(out.dtype))))
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all()
        alone = ours[:1] if ours.dim() == 1 else ours[:, 0]
        assert alone.count_nonzero() == 0
        assert relative_error(ours, theirs) < (1e-5 if dtype is torch.float32 else 1e-2)


SHARDED = [
    Mask("window", 40),
    Mask("full"),
    Mask(blocks=[(10, 90), (250, 300)]),
    Mask("chunk", 64),
    Mask("window", 30, [(0, 100)]),
]


@pytest.mark.parametrize("mask", SHARDED, ids=str)
def test_ranks_that_hold_parts_of_documents_match_the_reference(mask: Mask) -> None:
    """What others sent lies in the receive buffer, where rows that nobody reads are NaN; at once and part by part."""
    lengths = (300, 5, 7, 300)
    masks = [mask, Mask(), Mask("prefix", 3), mask]
    qkv, grad = inputs(sum(lengths), (4, 2), torch.float32)
    exact = [x.double().requires_grad_() for x in qkv]
    out = flashcp.reference_attention(*exact, lengths, masks=masks)
    wanted = out, *torch.autograd.grad(out, exact, grad.double())
    for (ranks, strategy), exchange in itertools.product(
        ((3, "per_document"), (2, "contiguous")), ("exact", "all_gather")
    ):
        plan = flashcp.plan(lengths, ranks, strategy, masks=masks)
        for how in ("at once", "staged"):
            totals = [torch.zeros(x.shape, dtype=torch.float64) for x in wanted]
            for rank in range(ranks):
                state = Rank(plan, exchange, rank, qkv, grad)
                state.whole = build_schedule(state.queries, state.queries, state.received, plan.masks)
                state.parts = [
                    build_schedule(state.queries, state.queries, masks=plan.masks),
                    build_schedule(state.queries, received=state.received, masks=plan.masks),
                ]
                run = state.one_launch if how == "at once" else state.staged
                found, of_q, of_local, back = run(CpuAttention(), 0.25)
                totals[0][state.rows] = found.detach().double()
                totals[1][state.rows] = of_q.double()
                for total, own, others in zip(totals[2:], of_local, back.unbind(1), strict=True):
                    total[state.rows] += own.double()
                    total.index_add_(0, state.sent, others[state.slots].double())
            assert max(map(relative_error, totals, wanted)) < 1e-5


def computed(schedule: Schedule, holds_scores: bool = False) -> list[tuple[int, int, bool]]:
    """Query rows and keys of every call but those of batches, and whether it has a mask."""
    pieces: list[tuple[Tile, Piece]] = []
    for step in steps(schedule, holds_scores):
        assert isinstance(step, Tile)
        pieces += [(step, piece) for piece in step.pieces]
    rows = [tile.rows.stop - tile.rows.start for tile, _ in pieces]
    keys = [piece.keys.stop - piece.keys.start for _, piece in pieces]
    return list(zip(rows, keys, [piece.mask is not False for _, piece in pieces], strict=True))


def test_work_grows_with_the_window_and_masks_are_at_the_edges() -> None:
    lengths = np.array([32_768])
    for window in (1, 300, 1024, 5000):
        schedule = whole_pack_schedule(lengths, read_masks(Mask("window", window), lengths))
        calls = computed(schedule)
        assert sum(rows * keys for rows, keys, _ in calls) <= 32_768 * (window + 2 * 256)
        if window >= 1024:
            assert sum(rows * keys for rows, keys, masked in calls if masked) <= 32_768 * 2 * 256
    full = whole_pack_schedule(lengths, read_masks(Mask("full"), lengths))
    assert computed(full) == [(32_768, 32_768, False)]


def seconds(lengths: list[int], masks: Mask | None) -> float:
    """CPU time of forward and backward; the second run, for the first one loads things."""
    qkv, grad = inputs(sum(lengths), (1, 1), torch.float32)
    leaves = [x.requires_grad_() for x in qkv]
    for _ in range(2):
        start = time.process_time()
        torch.autograd.grad(flashcp.varlen_attention(*leaves, lengths, masks=masks), leaves, grad)
    return time.process_time() - start


@pytest.mark.timeout(900)
def test_a_window_takes_a_fraction_of_the_causal_layers_time() -> None:
    """A window of 1,024 in a document of 32,768, at half the size; its pairs are a sixteenth."""
    assert seconds([16_384], Mask("window", 512)) < seconds([16_384], None) / 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize("masks", [None, Mask("window", 3)], ids=str)
def test_short_documents_take_no_longer_than_one_long_one(masks: Mask | None) -> None:
    assert seconds([1] * 8192, masks) < 2 * seconds([8192], None)
    lengths = np.array([1 + i % 100 for i in range(2000)])
    schedule = whole_pack_schedule(lengths, read_masks(masks, lengths))
    batches = list(steps(schedule, holds_scores=False))
    assert len(batches) < 40
    assert all(isinstance(batch, Batch) for batch in batches)
    padded = sum(batch.shards * batch.length for batch in batches if isinstance(batch, Batch))
    assert lengths.sum() <= padded <= 1.25 * lengths.sum()


def run(tensors: list[Tensor], lengths: tuple[int, ...], masks: list[Mask], softcap: float) -> list[Tensor]:
    read = np.array(lengths)
    schedule = whole_pack_schedule(read, read_masks(masks, read))
    q, k, v, grad = tensors
    state = q, KV(k, v), KV(k[:0], v[:0])
    out, lse = CpuAttention().attend(*state, schedule, 0.25, softcap=softcap)
    grads = CpuAttention().gradients(grad, *state, out, lse, schedule, 0.25, softcap=softcap)
    return [out, lse, grads.q, *grads.local]


POISONED = {
    "windows": (Mask("window", 20), (300, 300)),
    "short windows": (Mask("window", 4), (30, 31, 1, 29, 32)),
    "short causal": (Mask(), (30, 31, 1, 29, 32)),
    "chunks": (Mask("chunk", 32), (300, 40, 41)),
    "blocks": (Mask("window", 10, [(50, 90)]), (300, 300)),
}


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("mask", "lengths"), POISONED.values(), ids=POISONED)
def test_a_row_outside_every_interval_changes_no_bit(mask: Mask, lengths: tuple[int, ...], softcap: float) -> None:
    """Neither another number nor NaN or infinity: not of rows that do not see it, nor of keys that it does not see."""
    masks = [mask] * len(lengths)
    rng = np.random.default_rng(0)
    qkv, grad = inputs(sum(lengths), (4, 2), torch.float32)
    clean = [*qkv, grad]
    before = run(clean, lengths, masks, softcap)
    visible = torch.block_diag(*(sees(mask, rows).float() for rows in lengths)).bool()
    across = torch.block_diag(*(torch.ones(rows, rows) for rows in lengths)).bool()
    spoilt = 0
    for name, value in itertools.product(range(4), (3.0, torch.nan, torch.inf)):
        changed = [x.clone() for x in clean]
        row = int(rng.integers(0, sum(lengths)))
        head = int(rng.integers(0, 2))
        changed[name][row, head, 3] = value
        after = run(changed, lengths, masks, softcap)
        if name in (1, 2):
            readers = visible[:, row]
        else:
            readers = torch.zeros(sum(lengths), dtype=torch.bool)
            readers[row] = True
        keys = (visible & readers[:, None]).any(0)
        if mask.is_causal:  # inside a causal document torch's operator multiplies by zero what a row does not see
            readers, keys = across[row], across[row]
        for what, touched in ((0, readers), (1, readers), (2, readers), (3, keys), (4, keys)):
            same = before[what] == after[what]
            assert same[~touched].all(), (
                f"{name}, row {row}: {('out', 'lse', 'q', 'k', 'v')[what]} of rows it cannot reach"
            )
        spoilt += sum(int((~x.isfinite()).any()) for x in after)
    assert spoilt > 12


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"softcap": 0.0}, r"softcap=0.0: expected a positive number, or None"),
        ({"softcap": -1.0}, r"softcap=-1.0: expected a positive number"),
        ({"softcap": float("nan")}, r"softcap=nan: expected a positive number"),
        ({"softcap": 1e39}, r"softcap=1e\+39: expected a positive number, or None \(scores are fp32\)"),
        ({"softcap": 1e-39}, r"softcap=1e-39: expected a positive number"),
        ({"softcap": 10**400}, r"\.\.\.: expected a positive number"),
        ({"softcap": True}, r"softcap=True: expected a positive number"),
        ({"softcap": "50"}, r"softcap='50': expected a positive number"),
        ({"sinks": torch.zeros(3)}, r"sinks is torch.float32 \[3\]: expected floating-point \[2\]"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, r"sinks is torch.int64 \[2\]: expected floating-point"),
        ({"sinks": [0.0, 0.0]}, r"sinks is a list: expected floating-point"),
        ({"masks": "full"}, r"masks='full': expected a flashcp.Mask, or a list"),
        ({"masks": 3}, r"masks=3: expected a flashcp.Mask, or a list"),
        ({"masks": [Mask(), Mask(), Mask()]}, "3 masks for 2 documents"),
        ({"masks": Mask(blocks=[(2, 4)])}, r"block \(2, 4\) in document 1 of 3 tokens"),
        ({"masks": Mask("chunk", 2), "attention": "varlen"}, "with chunks: expected window, full or causal documents"),
        ({"masks": Mask("prefix", 2), "attention": "varlen"}, "with prefixes or blocks: expected window, full or"),
    ],
)
def test_what_is_not_computed_is_refused_in_one_line(how: dict[str, object], says: str) -> None:
    x = torch.zeros(7, 2, 8)
    with pytest.raises(ValueError, match=says) as caught:
        flashcp.varlen_attention(x, x, x, [4, 3], **how)  # type: ignore[call-overload]
    assert "\n" not in str(caught.value)
    if how.get("attention") != "varlen":
        with pytest.raises(ValueError, match=says):
            flashcp.reference_attention(x, x, x, [4, 3], **how)  # type: ignore[arg-type]


def test_other_head_dims_of_v_are_refused_where_they_are_not_computed() -> None:
    x, v = torch.zeros(7, 2, 8), torch.zeros(7, 2, 4)
    assert flashcp.varlen_attention(x, x, v, [4, 3]).shape == (7, 2, 4)
    with pytest.raises(ValueError, match="expected k and v of one head_dim"):
        flashcp.varlen_attention(x, x, v, [4, 3], attention="varlen")
    plan = flashcp.plan([4, 3], 1)
    with pytest.raises(ValueError, match="expected k and v of one head_dim"):
        flashcp.ContextParallel().attention(x, x, v, plan)
