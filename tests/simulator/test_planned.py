"""Reads against the route and against a list of every row."""

from __future__ import annotations

import numpy as np
import pytest

import flashcp
from flashcp.clusters import read_cluster
from flashcp.sharding.exchanges import traffic
from flashcp.sharding.mask import Mask
from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.cost import ModelShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.pack import Batch, simulate_batch
from flashcp.simulator.planned import Planned
from flashcp.simulator.reads import _causal, _masked, plan_reads
from flashcp.simulator.variants import choose_variants, make_setting
from tests.packs import AWKWARD, random_lengths

TILES = (8, 4)
PACKS = [*AWKWARD, *(random_lengths(seed) for seed in range(4))]


@pytest.mark.parametrize("strategy", flashcp.strategies())
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_traffic_is_the_exact_route_s(strategy: str, ranks: int) -> None:
    for lengths in PACKS:
        if sum(lengths) >= ranks:
            made = flashcp.plan(lengths, ranks, strategy)
            reads, route = plan_reads(made, TILES), made.route("exact")
            assert reads.others.sum(axis=1).tolist() == made.table.start.tolist()
            assert traffic(made).sum(axis=1).tolist() == route.sent_rows.tolist()
            assert traffic(made).sum(axis=0).tolist() == route.received_rows.tolist()


def test_reads_of_a_small_plan() -> None:
    made = ShardingPlan.from_shards([10, 4], 2, [(0, 0, 3, 0), (0, 3, 6, 1), (0, 6, 8, 0), (0, 8, 10, 1), (1, 0, 4, 0)])
    reads = plan_reads(made, TILES)
    assert reads.rows.tolist() == [3, 3, 2, 2, 4]
    assert reads.others.tolist() == [[0, 0], [3, 0], [3, 3], [5, 3], [0, 0]]
    assert reads.ranges.tolist() == [[0, 0], [1, 0], [1, 1], [2, 1], [0, 0]]
    assert traffic(made).tolist() == [[0, 5], [3, 0]]


def dense_reads(plan: ShardingPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every shard and shard: rows read, keys in tiles that all queries of a tile see, keys in other tiles."""
    document, start, stop, _ = (column.tolist() for column in plan.table)
    rows, full, masked = (np.zeros((len(document),) * 2) for _ in range(3))
    for reader, (of, a, b) in enumerate(zip(document, start, stop, strict=True)):
        low, high = ([int(f(of, q)) for q in range(a, b)] for f in (plan.masks.lowest, plan.masks.past))
        for key, (other, first, last) in enumerate(zip(document, start, stop, strict=True)):
            if other != of:
                continue
            rows[reader, key] = sum(any(x <= k < y for x, y in zip(low, high, strict=True)) for k in range(first, last))
            for tile in range(0, b - a, TILES[0]):
                seen = [set(range(max(x, first), min(y, last))) for x, y in zip(low, high, strict=True)][
                    tile : tile + TILES[0]
                ]
                by_all, by_any = len(set.intersection(*seen)), len(set.union(*seen))
                whole = by_all // TILES[1] * TILES[1]
                full[reader, key] += TILES[0] * whole
                masked[reader, key] += TILES[0] * (-(-by_any // TILES[1]) * TILES[1] - whole)
    return rows, full, masked


@pytest.mark.parametrize("mask", [Mask("window", 5), Mask("full"), Mask("chunk", 9), Mask(blocks=[(0, 7), (9, 12)])])
def test_masked_reads_are_those_of_a_list_of_rows(mask: Mask) -> None:
    for strategy in ("per_document", "per_sequence"):
        made = flashcp.plan((41, 13, 30), 3, strategy, masks=mask)
        rows, full, masked = dense_reads(made)
        reads = plan_reads(made, TILES)
        own = np.eye(len(rows), dtype=bool)
        by_owner = reads.rank[None, :] == np.arange(3)[:, None]  # [owner, shard]
        assert reads.own.full_pairs.tolist() == full[own].tolist()
        assert reads.own.masked_pairs.tolist() == masked[own].tolist()
        for found, dense in (
            (reads.by_owner.full_pairs, full),
            (reads.by_owner.masked_pairs, masked),
            (reads.others, rows),
        ):
            assert found.tolist() == (np.where(own, 0, dense) @ by_owner.T).tolist()
        assert reads.ranges.tolist() == ((np.where(own, 0, rows) > 0).astype(int) @ by_owner.T).tolist()
        assert reads.together.full_pairs.tolist() == np.where(own, 0, full).sum(axis=1).tolist()


@pytest.mark.parametrize("strategy", ["flashcp", "per_document"])
def test_causal_plans_cost_the_same_read_by_read(strategy: str) -> None:
    made = flashcp.plan((4100, 130, 900), 4, strategy)
    quick, listed = (f(made, (128, 64)) for f in (_causal, _masked))
    assert (quick.others == listed.others).all()
    assert (quick.ranges == listed.ranges).all()
    for one, other in ((quick.own, listed.own), (quick.by_owner, listed.by_owner)):
        pairs = [(x.full_pairs + x.masked_pairs).sum() for x in (one, other)]
        assert pairs[0] == pytest.approx(pairs[1], rel=0.03)


def machine() -> Machine:
    return read_cluster("h100-nvlink")


def test_a_mix_costs_the_mean_of_its_layers() -> None:
    """Window layers are cheap, all of one kind cost what that kind does, and the plan balances the sum."""
    pack = np.array([30000, 20000, 9000, 6536])
    model = ModelShape(layers=6, window=1024, narrowed_layers=5)
    variants = choose_variants(["llama3", "per_document", "flashcp", "flexible_cp_best_effort"])
    ms = {}
    for layers, narrowed in ((6, 5), (6, 6), (6, 0)):
        window = 1024 if narrowed else 0
        setting = make_setting(machine(), ModelShape(layers=layers, window=window, narrowed_layers=narrowed))
        found = simulate_batch(Batch([pack], 8, setting), [one._replace(head_ranks=1) for one in variants])
        ms[narrowed] = {one.name: outcome.module_ms for one, outcome in found.items()}
    for method in ("llama3", "per_document"):  # their plans know nothing of masks: only the prices are mixed
        assert ms[5][method] == pytest.approx((ms[0][method] + 5 * ms[6][method]) / 6)
        assert ms[6][method] < ms[0][method]
    setting = make_setting(machine(), model)
    batch = Batch([pack], 8, setting)
    (variant,) = choose_variants(["flashcp"])
    made = batch.plan(variant._replace(head_ranks=1))
    assert made.layers == ((0, 0, 1), (1024, 0, 5))
    assert isinstance(batch.planned(variant._replace(head_ranks=1), kind=batch.kinds[1]), Planned)
    assert batch.planned(variant._replace(head_ranks=1), kind=batch.kinds[1]).plan.masks.window.tolist() == [1024] * 4


@pytest.mark.parametrize(("changes", "said"), [
    ({"mask": "prefix"}, "model.mask='prefix': expected one of causal, full"),
    ({"window": 5}, "model.narrowed_layers=0 with window=5, chunk=0: expected one of the two, or none"),
    ({"window": 5, "chunk": 5, "narrowed_layers": 1}, "narrowed_layers=1 with window=5, chunk=5: expected one"),
    ({"narrowed_layers": 3}, "model.narrowed_layers=3 with window=0, chunk=0: expected one of the two, or none"),
    ({"narrowed_layers": 99, "window": 4}, "model.narrowed_layers=99: expected at most layers=32"),
    ({"narrowed_layers": 1, "window": 4, "mask": "full"}, "narrowed_layers=1 with mask=full: expected causal"),
    ({"window": -1}, "model.window=-1: expected a whole number >= 0"),
])  # fmt: skip
def test_mixes_that_no_model_has_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_setting(machine(), ModelShape(**changes), prefix="model.")  # type: ignore[arg-type]
