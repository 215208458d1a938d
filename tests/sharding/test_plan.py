"""Plans: what they refuse, what they keep, what they tell."""

from __future__ import annotations

import json

import numpy as np
import pytest

import flashcp
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import Shard

LENGTHS = [5, 3]
SHARDS = [(0, 0, 2, 0), (0, 2, 5, 1), (1, 0, 2, 0), (1, 2, 3, 1)]


def make() -> ShardingPlan:
    return ShardingPlan.from_shards(LENGTHS, 2, SHARDS)


def test_a_plan_tells_tokens_work_rows_and_positions() -> None:
    plan = make()
    assert plan.tokens.tolist() == [4, 4]
    assert plan.work.tolist() == [3 + 3, 3 + 4 + 5 + 3]
    assert plan.imbalance == 15 * 2 / 21
    assert plan.rows(1).tolist() == [2, 3, 4, 7]
    assert plan.positions(1).tolist() == [2, 3, 4, 2]
    assert plan.shards[1] == Shard(0, 2, 5, 1)
    assert list(plan.shards) == [Shard(*shard) for shard in SHARDS]


def test_touching_pieces_of_one_document_on_one_rank_become_one_shard() -> None:
    plan = ShardingPlan.from_shards([6, 2], 2, [(1, 0, 2, 1), (0, 3, 5, 0), (0, 0, 3, 0), (0, 5, 6, 1)])
    assert list(plan.shards) == [(0, 0, 5, 0), (0, 5, 6, 1), (1, 0, 2, 1)]


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        (SHARDS[:-1], "document 1"),
        (SHARDS[1:], "should start at 0"),
        ([*SHARDS, (0, 1, 2, 1)], "exactly one rank"),
        ([(0, 0, 2, 0), (0, 3, 5, 1), *SHARDS[2:]], "should start at 2"),
        ([*SHARDS[:2], (1, 0, 4, 0)], "should start at 0 and end at 3"),
        ([*SHARDS[:-1], (1, 2, 3, 2)], "rank=2: expected 0 to 1"),
        ([*SHARDS[:-1], (2, 0, 1, 0)], "document=2: expected 0 to 1"),
        ([*SHARDS, (1, 3, 3, 0)], "expected start < stop"),
        ([(0, 0, 5, 0)], "document 1 is on no rank"),
        ([], "on no rank"),
        ([("a", 0, 5, 0)], "whole numbers"),
        ([(0, 0.5, 5.9, 0), *SHARDS[2:]], "whole numbers"),
    ],
)
def test_a_plan_that_does_not_hold_every_row_once_is_refused(shards: list, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ShardingPlan.from_shards(LENGTHS, 2, shards)


def test_json_and_fingerprint_round_trip() -> None:
    plan = flashcp.plan([70, 40, 21], 4, "flashcp_paper")
    again = ShardingPlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.fingerprint == plan.fingerprint
    assert again.strategy == "flashcp_paper"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shards": [[0, 0]], "document_lengths": [1], "world_size": 1}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the JSON of a plan"):
        ShardingPlan.from_json(text)


def test_the_fingerprint_changes_with_any_shard_length_and_world_size() -> None:
    base = json.loads(make().to_json())
    moved = base | {"shards": [[0, 0, 3, 0], [0, 3, 5, 1], [1, 0, 1, 0], [1, 1, 3, 1]]}
    swapped = base | {"shards": [[d, a, b, 1 - rank] for d, a, b, rank in base["shards"]]}
    more_ranks = base | {"world_size": 3}
    plans = [ShardingPlan.from_json(json.dumps(fields)) for fields in (base, moved, swapped, more_ranks)]
    assert len({plan.fingerprint for plan in plans}) == 4
    assert len(set(plans)) == 4


def test_a_plan_cannot_be_changed() -> None:
    plan = make()
    with pytest.raises(AttributeError):
        plan.world_size = 3  # type: ignore[misc]
    sent = plan.route().sent_rows
    for array in (plan.document_lengths, plan.tokens, plan.work, plan.offsets, sent, *plan.table):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_a_plan_prints_as_a_short_table() -> None:
    lines = str(flashcp.plan([1000] * 7, 5)).splitlines()
    assert len(lines) == 2 + 5
    assert "5 ranks" in lines[0]
    assert len(str(flashcp.plan([1000] * 99, 64)).splitlines()) == 2 + 16


@pytest.mark.parametrize(
    ("lengths", "world_size", "says"),
    [
        ([], 1, "at least one"),
        ([3, 0], 1, r"document_lengths\[1\]=0"),
        ([-4], 1, "=-4"),
        ([2.5], 1, "whole numbers"),
        ("abc", 1, "whole numbers"),
        ([[1], [2, 3]], 1, "whole numbers"),
        ([2**40], 1, "at most"),
        ([2**30] * 3, 1, "at most"),
        (5, 1, "whole numbers"),
        ([4], 0, "world_size=0"),
        ([4], True, "world_size=True"),
        ([4], 2.0, "world_size=2.0"),
    ],
)
def test_bad_lengths_and_world_sizes_are_named(lengths: object, world_size: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        flashcp.plan(lengths, world_size)  # type: ignore[arg-type]


def test_unknown_names_and_options_list_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="strategy='nope': expected one of contiguous, per_sequence"):
        flashcp.plan([8], 2, "nope")
    with pytest.raises(ValueError, match="'speed' of strategy 'flashcp_paper': expected target_imbalance"):
        flashcp.plan([8], 2, "flashcp_paper", speed=3)
    with pytest.raises(ValueError, match=r"target_imbalance=0\.5"):
        flashcp.plan([8], 2, "flashcp_paper", target_imbalance=0.5)
    with pytest.raises(ValueError, match="exchange='nope': expected one of exact, compacted"):
        make().route("nope")
    with pytest.raises(ValueError, match="rank=2"):
        make().rows(2)
    with pytest.raises(ValueError, match=r"rank=0\.5"):
        make().rows(0.5)  # type: ignore[arg-type]


def test_lengths_may_come_as_any_iterable_or_array() -> None:
    plans = {flashcp.plan(given, 2) for given in ([5, 3], (5, 3), iter([5, 3]), np.array([5, 3], np.uint16))}
    assert len(plans) == 1
