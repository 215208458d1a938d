"""A plan's predicted time, and plans that are chosen by it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import flashcp
from flashcp.clusters import read_cluster
from flashcp.predicted import CHOOSING
from flashcp.sharding.mask import Mask
from flashcp.simulator.cost import ModelShape
from flashcp.simulator.summary import simulate_methods
from flashcp.simulator.variants import Step, choose_variants, make_setting

SHORT = [3000, 500, 100]
"""On 4 ranks of h100-nvlink the plan of fewest rows is 1.16 times as slow as flashcp_paper's: its pieces are short."""


@pytest.mark.parametrize("exchange", CHOOSING)
@pytest.mark.parametrize("head_ranks", [1, 2])
def test_predicted_time_is_the_simulators(exchange: str, head_ranks: int) -> None:
    plan = flashcp.plan([4000, 900, 300, 72], 4)
    told = {"query_heads": 16, "kv_heads": 4, "head_dim": 64, "overlap": "none", "gradient_wire": "fp32"}
    table = flashcp.simulate(plan, cluster="h100-ib-400g", methods=f"plan+{exchange}", head_ranks=head_ranks, **told)
    predicted = flashcp.predicted_time("h100-ib-400g", exchange, head_ranks=head_ranks, **told)
    assert predicted(plan) == pytest.approx(table.methods[0].module_ms, rel=1e-12)
    assert pickle.loads(pickle.dumps(predicted))(plan) == predicted(plan)


def test_predicted_time_is_the_mean_over_layers() -> None:
    lengths, narrow = [4000, 900, 300, 72], Mask("window", 256)
    mix = flashcp.plan(lengths, 4, layers=[(Mask(), 1), (narrow, 3)])
    predicted = flashcp.predicted_time()
    alone = predicted(mix.narrow()), predicted(mix.narrow(256))
    assert predicted(mix) == pytest.approx((alone[0] + 3 * alone[1]) / 4, rel=1e-12)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"cluster": "moon"}, r"^cluster='moon': expected one of "),
        ({"exchange": "mail"}, r"^exchange='mail': expected one of "),
        ({"exchange": "ulysses"}, r"^exchange='ulysses': expected one of exact, compacted, all_gather, ring$"),
        ({"overlap": "some"}, r"^overlap='some': expected one of "),
        ({"head_ranks": 0}, r"^head_ranks=0: expected "),
        ({"head_ranks": 5}, r"^query_heads=32, kv_heads=8: cannot be shared out among 5 ranks"),
        ({"head_dim": -1}, r"^head_dim=-1: expected "),
    ],
)
def test_what_no_time_can_be_predicted_for(told: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flashcp.predicted_time(**told)  # type: ignore[arg-type]


def test_the_function_in_place_of_what_it_returns_is_named() -> None:
    with pytest.raises(ValueError, match=r"^cost=flashcp.predicted_time: expected what it returns, "):
        flashcp.plan(SHORT, 4, cost=flashcp.predicted_time)  # type: ignore[arg-type]
    assert repr(flashcp.predicted_time("h100-nvlink", head_ranks=2)) == (
        "PredictedTime(h100-nvlink, exact, 32 query and 8 KV heads of 128, head_ranks=2)"
    )


def test_simulate_plans_by_time_and_by_rows() -> None:
    told = {"cluster": "h100-nvlink", "kv_heads": 8, "methods": ["flashcp", "flashcp:h1", "flashcp_paper+exact"]}
    timed, rows = (flashcp.simulate(SHORT, 4, plan_by=one, **told) for one in ("time", "rows"))  # type: ignore[arg-type]
    member = rows["flashcp_paper+exact"]
    assert timed["flashcp_paper+exact"] == member
    assert rows["flashcp:h1"].module_ms > 1.1 * member.module_ms
    assert timed["flashcp:h1"].module_ms <= 1.001 * member.module_ms
    assert timed["flashcp"].module_ms <= timed["flashcp:h1"].module_ms
    assert (rows["flashcp"].head_ranks, timed["flashcp"].head_ranks) == (4, 1)
    with pytest.raises(ValueError, match=r"^plan_by='luck': expected one of time, rows$"):
        flashcp.simulate(SHORT, 4, plan_by="luck")


def test_each_exchange_has_the_plan_that_is_fastest_for_it() -> None:
    pairs = [f"flashcp+{exchange}" for exchange in ("exact", "all_gather", "ring")]
    windows = [SHORT, [5000, 60, 70, 80, 90], [64] * 9, [9000, 4000, 3000, 384]]
    timed, rows = (
        [flashcp.simulate(one, 4, kv_heads=8, methods=pairs, plan_by=by) for one in windows] for by in ("time", "rows")
    )
    for pair in pairs:
        gains = [one[pair].module_ms / other[pair].module_ms for one, other in zip(timed, rows, strict=True)]
        assert max(gains) <= 1.001
        assert min(gains) < 0.99


def test_a_batch_is_planned_by_time_where_it_is_planned_together() -> None:
    windows = [np.array(SHORT), np.array([5000, 60, 70, 80, 90])]
    setting = make_setting(read_cluster("h100-nvlink"), ModelShape(32, 8))
    variants = choose_variants(["flashcp:h1", "flashcp:h1:d2", "flashcp_paper+exact"])
    rows, timed = (
        simulate_methods(windows, variants, 8, setting, ModelShape(32, 8), step=Step(2), plan_by=by)
        for by in ("rows", "time")
    )
    assert [one.name for one in timed] == [one.name for one in rows]
    assert all(one.module_ms <= 1.001 * other.module_ms for one, other in zip(timed, rows, strict=True))
    assert timed[1].module_ms < 0.99 * rows[1].module_ms
