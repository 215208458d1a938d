"""Interval masks in the Triton kernels, interpreted, against a float64 reference with the mask written out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from flashcp.kernels.interface import KV, WaitFlags
from flashcp.kernels.intervals import interval_key_tiles, interval_query_tiles, visited_blocks
from flashcp.kernels.schedule import build_schedule, whole_pack_schedule
from flashcp.kernels.selection import select_attention
from flashcp.kernels.tiles import RECEIVED, Tiles
from flashcp.kernels.tuning import Blocks, Pass, Tuning, computed_pairs
from flashcp.sharding.mask import Mask
from flashcp.sharding.masks import read_masks
from flashcp.sharding.plan import ShardingPlan
from tests.interpreter import interpreted
from tests.kernels.one_rank import Rank
from tests.packs import random_qkv, relative_error
from tests.sharding.test_masks import whole

LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3}
SMALL = "forward=32x16x4x1xieee,backward_kv=16x32x4x1xieee,backward_q=32x16x4x1xieee"
WIDE = "forward=16x64x4x1xieee,backward_kv=64x16x4x1xieee,backward_q=16x64x4x1xieee"
TOGETHER = "forward=64x16x4x1xieee,backward_kv=16x32x4x1xieee,backward_q=64x16x4x1xieee"


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


class Case(NamedTuple):
    lengths: tuple[int, ...]
    masks: tuple[Mask, ...]
    ranks: int
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    tuning: str
    softcap: float = 0.0
    how: str = "one launch"  # or "staged", "fused"
    seed: int = 0
    v_dim: int | None = None


def cut(case: Case) -> ShardingPlan:
    """A plan of random cuts: shards of a document lie next to each other on a rank, and others between them."""
    random = np.random.default_rng(case.seed)
    shards = []
    for document, rows in enumerate(case.lengths):
        cuts = random.integers(1, rows + 1, 2 * case.ranks * (case.ranks > 1)).tolist()
        pieces = pairwise(sorted({0, rows, *cuts}))
        shards += [(document, start, stop, int(random.integers(case.ranks))) for start, stop in pieces]
    return ShardingPlan.from_shards(case.lengths, case.ranks, shards, list(case.masks))


def errors(case: Case) -> dict[str, float]:
    """Relative errors of the output and the gradients of a whole pack, put together from all its ranks."""
    plan = cut(case)
    *qkv, grad = random_qkv(sum(case.lengths), *case.heads, case.head_dim, case.dtype, case.seed)
    if case.v_dim:
        qkv[2], grad = (x[..., : case.v_dim].contiguous() for x in (qkv[2], grad))
    if case.softcap:
        qkv[0][::7] *= 30  # spikes: scores far beyond the cap
    kernel, scale = select_attention("triton", torch.device("cpu"), Tuning.from_text(case.tuning)), case.head_dim**-0.5
    out, grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float64) for x in (grad, *qkv))
    options = {"softcap": case.softcap} if case.softcap else {}
    for rank in range(case.ranks):
        state = Rank(plan, "sources" if case.how == "staged" else "exact", rank, qkv, grad)
        if case.how == "fused":
            words = torch.zeros((2, case.ranks), dtype=torch.int32)
            options["flags"] = WaitFlags(words[0], 0, words[1], 1.0)
        run = state.staged if case.how == "staged" else state.one_launch
        part, part_q, local, back = run(kernel, scale, **options)
        out[state.rows], grad_q[state.rows] = part.double(), part_q.double()
        for total, own, others in zip((grad_k, grad_v), local, back.unbind(1), strict=True):
            total.index_add_(0, state.rows, own.double())
            total.index_add_(0, state.sent, others[state.slots, :, : total.shape[2]].double())
    exact = [x.double().requires_grad_() for x in qkv]
    seen = torch.from_numpy(whole(list(case.lengths), list(case.masks)))
    expected = dense(*exact, seen, scale, case.softcap)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    found = zip(("out", "q", "k", "v"), (out, grad_q, grad_k, grad_v), (expected, *wanted), strict=True)
    return {name: relative_error(a, b) for name, a, b in found}


fp32, fp16 = torch.float32, torch.float16
BLOCKS = [(0, 3), (10, 27), (35, 41)]
KINDS = {
    "window 1": Mask("window", 1),
    "window 9": Mask("window", 9),
    "window larger than the document": Mask("window", 1000),
    "chunk": Mask("chunk", 13),
    "full": Mask("full"),
    "prefix": Mask("prefix", 17),
    "blocks at start and end": Mask("causal", blocks=BLOCKS),
    "blocks with window": Mask("window", 5, blocks=BLOCKS),
    "blocks with chunks": Mask("chunk", 12, blocks=BLOCKS),
}
CASES = {"window 127": Case((140,), (Mask("window", 127),), 2, (1, 1), 16, fp32, WIDE)}
SHAPES = ((1, 1), 16, fp32, SMALL), ((2, 1), 24, fp16, WIDE), ((4, 1), 16, fp32, TOGETHER)
OTHERS = Mask("full"), Mask(), Mask("window", 3), Mask("chunk", 4)
for i, (name, mask) in enumerate(KINDS.items()):
    how = ("one launch", "staged", "fused")[i // 3]
    CASES[f"{name}, {how}"] = Case((41, 5, 9, 4, 12), (mask, *OTHERS), 2, *SHAPES[i % 3], how=how, seed=i)
SHORT = Mask("window", 2), *OTHERS, Mask("prefix", 2), Mask("causal", blocks=[(0, 2), (3, 5)])
CASES |= {
    "documents share tiles": Case((3, 9, 1, 7, 12, 2, 5), SHORT, 1, (2, 1), 16, fp32, SMALL),
    "softcap 50": Case((40, 21), (Mask(), Mask("window", 6)), 2, (2, 1), 16, fp32, SMALL, 50.0),
    "softcap 2, causal, staged": Case((40, 21), (Mask(), Mask()), 2, (2, 1), 16, fp32, SMALL, 2.0, "staged"),
    "softcap 2, fp16": Case((40, 21), (Mask(), Mask("full")), 2, (2, 1), 16, fp16, SMALL, 2.0),
    "values narrower than keys": Case((40, 21), (Mask(), Mask("full")), 2, (2, 1), 48, fp32, SMALL, v_dim=32),
    "latents": Case((18, 9), (Mask("window", 6), Mask()), 2, (2, 1), 576, fp32, SMALL, v_dim=512),
    "latents, fp16, staged": Case((18, 9), (Mask(),) * 2, 2, (2, 1), 576, fp16, SMALL, 0.0, "staged", v_dim=512),
    "values narrower, causal": Case((23, 18), (Mask(),) * 2, 2, (2, 2), 36, fp32, SMALL, 0.0, "staged", 1, 32),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(case: Case) -> None:
    found = interpreted(errors, case)
    assert max(found.values()) < LIMIT[case.dtype], found


def shares(case: Case) -> Iterator[tuple[ShardingPlan, Rank]]:
    plan = cut(case)
    *qkv, grad = random_qkv(sum(case.lengths), *case.heads, case.head_dim, case.dtype, case.seed)
    for rank in range(case.ranks):
        yield plan, Rank(plan, "exact", rank, qkv, grad)


def held(state: Rank, buffer: bool) -> np.ndarray:
    """The row of the pack that each row of the local tensor or of the receive buffer is, -1: none."""
    if not buffer:
        return state.rows.numpy()
    rows = np.full(len(state.buffer), -1)
    rows[state.slots.numpy()] = state.sent.numpy()
    return rows


def count_blocks(seen: np.ndarray, step: int) -> tuple[int, int]:
    """Blocks of a tile's part of the matrix [its rows, rows of a range], of `step` columns from the first one that any
    row sees to the last one: whole ones that every row sees, and others."""
    any_row, every_row = np.flatnonzero(seen.any(0)), seen.all(0)
    if not len(any_row):
        return 0, 0
    full = masked = 0
    for start in range(any_row[0], any_row[-1] + 1, step):
        if start + step <= any_row[-1] + 1 and every_row[start : start + step].all():
            full += 1
        else:
            masked += 1
    return full, masked


def check_tables(tiles: Tiles, state: Rank, seen: np.ndarray, keys: bool, step: int) -> np.ndarray:
    """Pairs (row of the pack, row of the pack) as the tables' intervals give them; each visit is one that is needed."""
    pairs = np.zeros(seen.shape, dtype=int)
    of_tiles = visited_blocks(tiles, step)
    for (received, row, stop, first, last), visits in zip(tiles.table.tolist(), of_tiles.tolist(), strict=True):
        mine = held(state, bool(received))[row:stop]
        needed, holds = np.zeros(2, dtype=int), []
        for place, start, end, _, shift in tiles.ranges[first:last].tolist():
            others = held(state, place == RECEIVED)[start:end]
            at = np.arange(start, end) + shift
            ends = tiles.reach[received + row : received + stop]
            there = (ends[:, :1] <= at) & (at < ends[:, 1:2])
            where = np.ix_(others, mine) if keys else np.ix_(mine, others)
            pairs[where] += there.T if keys else there
            needed += count_blocks(there, step)
            holds.append(there.any())
        assert visits == needed.tolist()
        assert holds[0], "a tile without work, or one that lists a range before those that it reads"
        assert holds[-1]
    return pairs


MIXED = {name: case for name, case in CASES.items() if not all(mask.is_causal for mask in case.masks)}


@pytest.mark.parametrize("case", MIXED.values(), ids=MIXED)
def test_tables_hold_every_pair_once_and_no_block_without_one(case: Case) -> None:
    seen = whole(list(case.lengths), list(case.masks))
    total = {True: np.zeros(seen.shape, dtype=int), False: np.zeros(seen.shape, dtype=int)}
    for tile_rows, step in ((16, 16), (32, 16), (16, 64)):
        for each in total.values():
            each[:] = 0
        for _, state in shares(case):
            for schedule in (state.whole, *state.parts):
                queries = interval_query_tiles(schedule, len(state.q), tile_rows, by_source=True)
                keys = interval_key_tiles(schedule, len(state.q), tile_rows)
                total[False] += check_tables(queries, state, seen, False, step)
                total[True] += check_tables(keys, state, seen, True, step)
                waits = [bool((queries.ranges[a:b, 3] >= 0).any()) for *_, a, b in queries.table.tolist()]
                assert waits == sorted(waits)
                assert queries.ready == waits.count(False)
                assert (np.diff(keys.table[:, 0]) <= 0).all()  # received rows' tiles first
        for each in total.values():
            assert np.array_equal(each, 2 * seen), "all of it, and its parts together"


def test_work_grows_with_the_window() -> None:
    lengths = np.array([32_768])
    blocks = Blocks(128, 128, 8, 2)
    counted = {}
    for window in (1024, 2048, 40_000):
        masks = read_masks(Mask("window", window), lengths)
        if masks.is_causal:
            masks = read_masks(Mask("causal", blocks=[(0, 2)]), lengths)
        schedule = whole_pack_schedule(lengths, masks)
        both = interval_query_tiles(schedule, 32_768, 128), interval_key_tiles(schedule, 32_768, 128)
        queries, keys = (visited_blocks(tiles, 128).sum(0) for tiles in both)
        assert queries.sum() == keys.sum()
        assert computed_pairs(Pass.FORWARD, schedule, blocks) == 128 * 128 * queries.sum()
        counted[window] = queries.tolist()
    # 256 tiles: each meets its own block and one more at the window's edge in part, in between 7 or 15 whole ones.
    assert counted[1024] == [sum(min(i, 7) for i in range(256)), 256 + 248]
    assert counted[2048] == [sum(min(i, 15) for i in range(256)), 256 + 240]
    assert counted[40_000] == [256 * 255 // 2, 256]


def test_a_tile_lists_and_waits_for_what_its_rows_see_alone() -> None:
    plan = ShardingPlan.from_shards([96], 2, [(0, 0, 48, 0), (0, 48, 96, 1)], Mask("window", 9))
    local, received = plan.local(1), plan.route("all_gather").received(1)
    tiles = interval_query_tiles(build_schedule(local, local, received, plan.masks), 48, 16, by_source=True)
    assert tiles.table[:, 1].tolist() == [16, 32, 0]
    assert tiles.ready == 2
    others = build_schedule(local, received=received, masks=plan.masks)
    assert interval_query_tiles(others, 48, 16).table.tolist() == [[0, 0, 16, 0, 1]]
    keys = interval_key_tiles(others, 48, 16)
    assert keys.table.tolist() == [[48, 32, 48, 0, 1]]
    assert keys.rows == (0, 16)


def hidden_rows() -> None:
    """NaN in all keys that no row of a tile sees: they are not read, not even to be multiplied by 0."""
    rows, window = 96, 20
    q, k, v, grad = random_qkv(rows, 1, 1, 16, fp32, seed=0)
    schedule = whole_pack_schedule(np.array([rows]), read_masks(Mask("window", window), np.array([rows])))
    kernel = select_attention("triton", torch.device("cpu"), Tuning.from_text(SMALL))
    empty = KV(k[:0], v[:0])
    out, lse = kernel.attend(q, KV(k, v), empty, schedule, 0.25)
    for name in ("k", "v"):
        local = {"k": k.clone(), "v": v.clone()}
        local[name][:12] = torch.nan  # seen by rows below 31, whose tile ends at 32
        spoilt = KV(**local)
        found = kernel.attend(q, spoilt, empty, schedule, 0.25)[0]
        assert found[:12].isnan().all()
        assert torch.equal(found[32:], out[32:])
        parts = kernel.gradients(grad, q, spoilt, empty, out, lse, schedule, 0.25)
        clean = kernel.gradients(grad, q, KV(k, v), empty, out, lse, schedule, 0.25)
        assert parts.q[:12].isnan().any()
        assert torch.equal(parts.q[32:], clean.q[32:])
        assert torch.equal(parts.local.k[64:], clean.local.k[64:])


def test_what_no_row_of_a_tile_sees_is_not_read() -> None:
    interpreted(hidden_rows)


def beside_nothing() -> None:
    """Rows that see nothing of the ranges given, in a tile with others that do."""
    mask = Mask("window", 4)
    plan = ShardingPlan.from_shards([48], 2, [(0, 0, 20, 0), (0, 20, 48, 1)], mask)
    *qkv, grad = random_qkv(48, 2, 1, 16, fp32, seed=5)
    state = Rank(plan, "exact", 1, qkv, grad)
    seen = torch.from_numpy(whole([48], [mask]))[20:23].clone()
    seen[:, 20:] = False
    leaves = [x.double().requires_grad_() for x in (qkv[0][20:23], *qkv[1:])]
    expected = dense(*leaves, seen, 0.25, 0.0)
    wanted = torch.autograd.grad(expected, leaves, grad[20:23].double())

    kernel, received = select_attention("triton", torch.device("cpu"), Tuning.from_text(SMALL)), state.parts[1]
    inputs = state.q, state.local, state.from_others
    out, lse = kernel.attend(*inputs, received, 0.25)
    assert relative_error(out[:3], expected.detach()) < 1e-5
    assert out[3:].count_nonzero() == 0
    assert (lse[3:] == -torch.inf).all()
    grads = kernel.gradients(state.grad, *inputs, out, lse, received, 0.25)
    assert relative_error(grads.q[:3], wanted[0]) < 1e-5
    assert grads.q[3:].count_nonzero() == grads.local.k.count_nonzero() == grads.local.v.count_nonzero() == 0
    for half, of in enumerate(wanted[1:]):
        assert relative_error(grads.received[state.slots, half], of[state.sent]) < 1e-5


def test_rows_that_see_nothing_beside_rows_that_do() -> None:
    interpreted(beside_nothing)


def test_auto_on_a_gpu_refuses_what_never_ran_there() -> None:
    from flashcp.kernels.launch import TritonAttention

    q, wide, latent = (torch.empty(8, 1, dim, device="meta") for dim in (16, 32, 576))
    masked = whole_pack_schedule(np.array([8]), read_masks(Mask("window", 2), np.array([8])))
    causal = whole_pack_schedule(np.array([8]))
    for schedule, softcap, k, v in (
        (masked, 0.0, q, q), (causal, 50.0, q, q), (causal, 0.0, q, wide), (causal, 0.0, latent, latent),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"attention=.auto. with masks, softcap, .* expected attention=.triton."):
            TritonAttention(asked=False).attend(k, KV(k, v), KV(k, v), schedule, 0.25, softcap=softcap)
