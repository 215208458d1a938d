"""Masks and schedules against a dense matrix of what each row sees, row by row."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from flashcp.kernels.schedule import Schedule, build_schedule, whole_pack_schedule
from flashcp.sharding.documents import document_offsets, expand_ranges
from flashcp.sharding.mask import Mask
from flashcp.sharding.masks import Masks, read_masks
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import Segments
from flashcp.sharding.strategies import plan

SEEDS = range(60)
LAYERS = [(Mask("causal"), 2), (Mask("window", 7), 5)]


def random_mask(rng: random.Random, rows: int) -> Mask:
    kind = rng.choice(["causal", "window", "chunk", "full", "prefix"])
    blocks, free = [], 0
    while kind in ("causal", "window", "chunk") and free < rows and rng.random() < 0.6:
        start = rng.randint(free, rows - 1)
        free = rng.randint(start + 1, rows)
        blocks.append((start, free))
    return Mask(kind, rng.randint(1, rows + 5) if kind in ("window", "chunk", "prefix") else None, blocks)


def dense(mask: Mask, rows: int, window: int = 0, chunk: int = 0) -> np.ndarray:
    """Which key (second axis) each row sees, as the class says it in words."""
    sees = np.zeros((rows, rows), dtype=bool)
    blocks = {"full": [(0, rows)], "prefix": [(0, min(mask.size, rows))]}.get(mask.kind, list(mask.blocks))
    for row in range(rows):
        lowest = 0
        for kind, size in ((mask.kind, mask.size), ("window", window), ("chunk", chunk)):
            if kind == "window" and size:
                lowest = max(lowest, row - size + 1)
            if kind == "chunk" and size:
                lowest = max(lowest, row // size * size)
        past = row + 1
        for start, stop in blocks:
            if start <= row < stop:
                lowest, past = min(lowest, start), stop
        sees[row, lowest:past] = True
    return sees


def packs(seed: int) -> tuple[list[int], list[Mask], random.Random]:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 5))]
    return lengths, [random_mask(rng, rows) for rows in lengths], rng


def whole(lengths: list[int], masks: list[Mask], window: int = 0, chunk: int = 0) -> np.ndarray:
    """Of a pack: rows and keys are rows of the pack."""
    offsets = document_offsets(np.array(lengths))
    sees = np.zeros((offsets[-1],) * 2, dtype=bool)
    for mask, rows, first in zip(masks, lengths, offsets.tolist(), strict=False):
        sees[first : first + rows, first : first + rows] = dense(mask, rows, window, chunk)
    return sees


def random_plan(lengths: list[int], masks: list[Mask], rng: random.Random, ranks: int) -> ShardingPlan:
    """Any cuts, any ranks: rows need not be balanced."""
    shards = []
    for document, rows in enumerate(lengths):
        cuts = sorted({0, rows, *(rng.randint(0, rows) for _ in range(rng.randint(0, 4)))})
        shards += [(document, a, b, rng.randrange(ranks)) for a, b in pairwise(cuts)]
    return ShardingPlan.from_shards(lengths, ranks, shards, masks)


def pack_rows(split: ShardingPlan, rows: Segments) -> np.ndarray:
    return expand_ranges(split.offsets[rows.document] + rows.start, rows.stop - rows.start)


def cases() -> Iterator[tuple[Masks, Mask, int, int, int]]:
    for seed in range(600):
        rng = random.Random(seed)
        rows = rng.randint(1, 40)
        mask = random_mask(rng, rows)
        window = rng.randint(1, 45) if rng.random() < 0.4 else 0
        chunk = rng.randint(1, 45) if rng.random() < 0.2 and mask.kind != "chunk" else 0
        yield (
            read_masks([Mask(), mask, mask], np.array([5, rows, rows])).narrow(window, chunk),
            mask,
            rows,
            window,
            chunk,
        )


def test_intervals_readers_and_pairs_are_those_of_the_dense_matrix() -> None:
    for masks, mask, rows, window, chunk in cases():
        sees = dense(mask, rows, window, chunk)
        row, document = np.arange(rows), np.full(rows, 2)
        what = f"{mask}, {rows} rows, window {window}, chunk {chunk}"
        assert (masks.lowest(document, row) == sees.argmax(axis=1)).all(), what
        assert (masks.past(document, row) == rows - sees[:, ::-1].argmax(axis=1)).all(), what
        assert (masks.first_reader(document, row) == sees.argmax(axis=0)).all(), what
        assert (masks.past_reader(document, row) == rows - sees[::-1].argmax(axis=0)).all(), what
        below = np.concatenate(([0], np.cumsum(sees.sum(axis=1))))
        assert (masks.pairs_below(np.full(rows + 1, 2), np.arange(rows + 1)) == below).all(), what


def sees_of(schedule: Schedule, local: np.ndarray, received: np.ndarray, rows: int) -> np.ndarray:
    """Pairs that a schedule lists, and what masks leave of them, as a matrix over rows of the pack."""
    listed = np.zeros((rows, rows), dtype=bool)
    for query, masked, place, start, stop, position in zip(
        schedule.query, schedule.masked, schedule.received, schedule.row_start, schedule.row_stop, schedule.position,
        strict=True,
    ):  # fmt: skip
        queries = np.arange(schedule.query_start[query], schedule.query_stop[query])
        keys = np.arange(start, stop)
        at = schedule.query_position[query] + np.arange(len(queries))
        if schedule.seen is None:
            first, past = np.zeros_like(at), at + 1
        else:
            document = schedule.seen.document[query]
            first, past = (f(document, at) for f in (schedule.seen.masks.lowest, schedule.seen.masks.past))
        where = position + np.arange(len(keys))
        seen = (where >= first[:, None]) & (where < past[:, None])
        assert masked or seen.all()
        listed[np.ix_(local[queries], (received if place else local)[keys])] |= seen
    return listed


@pytest.mark.parametrize("seed", SEEDS)
def test_schedules_list_what_rows_see(seed: int) -> None:
    lengths, masks, rng = packs(seed)
    ranks = rng.randint(1, min(4, sum(lengths)))
    split = random_plan(lengths, masks, rng, ranks)
    sees = whole(lengths, masks)
    for exchange in ("exact", "compacted", "all_gather"):
        for rank in range(ranks):
            rows = split.rows(rank)
            arriving = split.route(exchange).received(rank)
            buffer = np.zeros(int((arriving.row + arriving.stop - arriving.start).max(initial=0)), dtype=int)
            buffer[arriving.buffer_rows()] = pack_rows(split, arriving)
            schedule = build_schedule(split.local(rank), split.local(rank), arriving, split.masks)
            expected = np.zeros_like(sees)
            expected[rows] = sees[rows]
            assert (sees_of(schedule, rows, buffer, len(sees)) == expected).all()
            assert schedule.pairs == sees[rows].sum()
            again = Schedule.from_array(schedule.array)
            assert (again.array == schedule.array).all()
            assert again.pairs == schedule.pairs
            odd = np.arange(len(schedule.query_start)) % 2 == 1
            assert schedule.take(odd).pairs + schedule.take(~odd).pairs == schedule.pairs


def test_a_causal_pack_keeps_no_masks() -> None:
    lengths = np.array([30, 4, 9])
    assert whole_pack_schedule(lengths, read_masks(Mask("window", 30), lengths)).seen is None
    assert whole_pack_schedule(lengths, read_masks(Mask("window", 29), lengths)).seen is not None


@pytest.mark.parametrize("strategy", ["contiguous", "per_document", "per_sequence", "wlb_adaptive", "flashcp_paper"])
def test_a_layer_mix_counts_the_work_of_all_layers(strategy: str) -> None:
    lengths = [40, 3, 17]
    split = plan(lengths, 3, strategy, layers=LAYERS)
    pairs = 2 * split.narrow().work + 5 * split.narrow(window=7).work
    assert split.work.tolist() == pairs.tolist()
    assert split.layers == ((0, 0, 2), (7, 0, 5))
    assert split.narrow().layers == ()


def test_plans_with_masks_survive_json_and_are_told_apart() -> None:
    lengths = [40, 3, 17]
    masks = [Mask("causal", blocks=[(5, 9), (20, 40)]), Mask("full"), Mask("chunk", 5)]
    plans = [
        plan(lengths, 3, "per_document"),
        plan(lengths, 3, "per_document", masks=masks),
        plan(lengths, 3, "per_document", layers=LAYERS),
        plan(lengths, 3, "per_document", masks=masks).narrow(window=4),
    ]
    assert len({one.fingerprint for one in plans}) == len(plans)
    for one in plans:
        again = ShardingPlan.from_json(one.to_json())
        assert again == one
        assert again.fingerprint == one.fingerprint
        assert (again.work == one.work).all()
    assert plans[1] != plans[0]
    assert plan(lengths, 3, "per_document", masks=Mask("window", 40)) == plans[0]
    fields = json.loads(plans[1].to_json())
    for column, value in ((0, [1, 2]), (1, [-1, 0, 0]), (3, [[9]]), (4, [99, 99, 99]), (5, [[0, 0, 0]])):
        broken = {**fields, "workload": [*fields["workload"]]}
        broken["workload"][column] = value
        with pytest.raises(ValueError, match=r"masks or layers that no plan has|not the JSON of a plan"):
            ShardingPlan.from_json(json.dumps(broken))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask("sliding"), "mask='sliding': expected one of causal, window, chunk, full, prefix"),
        (lambda: Mask("window"), r"Mask\('window', None\): expected a whole number of rows >= 1"),
        (lambda: Mask("chunk", 0), r"Mask\('chunk', 0\): expected a whole number of rows >= 1"),
        (lambda: Mask("window", 2**31), r"expected a whole number of rows >= 1 and < 2\*\*31"),
        (lambda: Mask(blocks=np.array([[3, 2], [1, 0]])), r"blocks=array\(\[\[3, 2\], \[1, 0\]\]\)\): expected"),
        (lambda: plan([5], 1, masks=np.zeros((3, 3))), r"0.\]\]\): expected a flashcp.Mask, or a list"),  # type: ignore[arg-type]
        (lambda: plan([5] * 1000, 1, masks=["full"] * 1000), r"^masks=.{240}\.\.\.: expected a flashcp.Mask"),  # type: ignore[list-item]
        (lambda: Mask("full", 3), r"Mask\('full', 3\): expected no size"),
        (lambda: Mask(blocks=[(3, 3)]), r"expected \[\(start, stop\), ...\] with 0 <= start < stop"),
        (lambda: Mask(blocks=[3]), r"expected \[\(start, stop\), ...\] with 0 <= start < stop"),  # type: ignore[list-item]
        (lambda: Mask(blocks=[(0, 4), (3, 5)]), "expected blocks that do not overlap"),
        (lambda: Mask("full", blocks=[(0, 2)]), "expected blocks of causal, window or chunk masks"),
        (lambda: plan([5], 1, masks=[Mask(), Mask()]), "2 masks for 1 documents: expected one for each"),
        (lambda: plan([5], 1, masks="causal"), "expected a flashcp.Mask, or a list with one for each document"),  # type: ignore[arg-type]
        (lambda: plan([5], 1, masks=3), "expected a flashcp.Mask, or a list with one for each document"),  # type: ignore[arg-type]
        (lambda: plan([9, 5], 1, masks=Mask(blocks=[(3, 7)])), r"block \(3, 7\) in document 1 of 5 tokens"),
        (lambda: plan([5], 1, layers=[]), r"layers=\[\]: expected \[\(flashcp.Mask, how many\), ...\]"),
        (lambda: plan([5], 1, layers=[(Mask(), 0)]), r"expected \[\(flashcp.Mask, how many\), ...\]"),
        (lambda: plan([5], 1, layers=[(Mask("full"), 1)]), "expected causal, window or chunk; give blocks, full and"),
        (lambda: plan([5], 1).narrow(window=0), "window=0: expected a whole number of rows >= 1, or None"),
        (lambda: plan([5], 1).route(chunk=True), "chunk=True: expected a whole number of rows >= 1, or None"),
        (lambda: plan([9], 1, masks=Mask("chunk", 4)).narrow(chunk=3), "chunk=3 of documents in chunks of 4"),
    ],
)
def test_what_no_mask_is_is_refused_in_one_line(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_window_larger_than_anything_is_none() -> None:
    made = plan([9, 40], 2, masks=[Mask("full"), Mask("window", 30)])
    for size in (2**31, 2**63, 10**30, np.uint64(2**63)):
        assert made.narrow(window=size) == made.narrow(chunk=size) == made  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (0, [10**30, 0]),
        (0, [4.5, 0]),
        (0, ["4", 0]),
        (0, [40, 0]),  # as long as its document: no limit, which plans leave out
        (4, [3, 10**30]),
        (4, [3, 6]),  # one row
        (5, [[0, 0, 2**62]]),
        (5, [[0, 0, 1.5]]),
    ],
)
def test_json_has_masks_as_plans_have_them(column: int, value: list[object]) -> None:
    made = plan([40, 9], 2, masks=[Mask("window", 7, blocks=[(1, 3)]), Mask(blocks=[(5, 9)])], layers=[(Mask(), 2)])
    fields = json.loads(made.to_json())
    fields["workload"][column] = value
    with pytest.raises(ValueError, match="not the JSON of a plan"):
        ShardingPlan.from_json(json.dumps(fields))


def test_masks_of_many_kinds_are_read_kind_by_kind() -> None:
    lengths = np.full(500, 600)
    kinds = [Mask("window", 1 + i % 250, blocks=[(i % 250, i % 250 + 2)]) for i in range(500)]
    masks = read_masks(kinds, lengths)
    assert masks.window.tolist() == [mask.size for mask in kinds]
    assert masks.block_document.tolist() == list(range(500))
    assert masks.block_start.tolist() == [mask.blocks[0][0] for mask in kinds]


def test_the_longest_block_of_a_pack() -> None:
    blocks = [Mask("causal", blocks=[(1, 3), (4, 9)]), Mask(), Mask("prefix", 6)]
    assert plan([10, 20, 30], 2, masks=blocks).masks.longest_block == 6
    assert plan([10, 20, 30], 2).masks.longest_block == 0
