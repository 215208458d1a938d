"""What a caller chooses: legal values come through, others are refused in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashcp.clusters import read_cluster
from flashcp.simulator.cost import AttentionShape, ModelShape
from flashcp.simulator.variants import (
    VARIANTS,
    Step,
    Variant,
    choose_variants,
    make_setting,
    read_head_ranks,
    read_ranks,
    read_step,
    that_share_heads,
)

MACHINE = read_cluster("h100-nvlink")


def test_auto_is_staged_until_a_gpu_has_shown_that_fused_is_faster() -> None:
    assert make_setting(MACHINE, ModelShape()).overlap == "staged"
    assert make_setting(MACHINE, ModelShape(), "fused", "model") == replace(
        make_setting(MACHINE, ModelShape()), overlap="fused", gradient_wire="model"
    )
    assert make_setting(MACHINE, ModelShape(16, 4, 64, 4)).shape == AttentionShape(16, 4, 64, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overlap": "full"}, "overlap='full': expected one of auto, none, staged, fused"),
        ({"gradient_wire": "bf16"}, "gradient_wire='bf16': expected one of auto, model, fp32"),
        ({"model": ModelShape(query_heads=0)}, "m.query_heads=0: expected a whole number >= 1"),
        ({"model": ModelShape(head_dim=1.5)}, "m.head_dim=1.5: expected a whole number >= 1"),  # type: ignore[arg-type]
        ({"model": ModelShape(ffn_dim=-1)}, r"m.ffn_dim=-1: expected a whole number >= 0 and < 2\*\*31"),
        ({"model": ModelShape(kv_heads=5)}, "m.query_heads=32: expected a multiple of m.kv_heads=5"),
    ],
)
def test_what_makes_no_setting(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_setting(**{"machine": MACHINE, "model": ModelShape(), "prefix": "m.", **given})


@pytest.mark.parametrize("ranks", [0, 1025, 2.0, "8", None])
def test_what_is_no_number_of_ranks(ranks: object) -> None:
    with pytest.raises(ValueError, match=rf"^world_size={ranks!r}: expected a whole number >= 1 and <= 1024$"):
        read_ranks(ranks)


def test_methods_pairs_and_plans_by_name() -> None:
    assert choose_variants([]) == list(VARIANTS.values())
    assert choose_variants(["llama3", "flashcp+ring", "llama3"]) == [
        VARIANTS["llama3"],
        Variant("flashcp+ring", "flashcp", "ring", "ours"),
    ]
    plan = Variant("plan", "plan", "exact", "ours")
    assert choose_variants([], given_plan=True) == [plan, *VARIANTS.values()]
    assert choose_variants(["plan+ring", "plan"], given_plan=True) == [Variant("plan+ring", "plan", "ring"), plan]


@pytest.mark.parametrize("name", ["llama4", "flashcp+", "+exact", "flashcp+rings", "plan", "plan+exact", 3])
def test_a_method_that_there_is_not(name: Any) -> None:
    with pytest.raises(ValueError, match=rf"^methods: {name!r}: expected one of llama3, ".replace("+", r"\+")):
        choose_variants([name])


@pytest.mark.parametrize("name", ["flashcp:", "flashcp:h01", "flashcp:h", "flashcp:w3", "flashcp:x2", "llama3:d-1"])
def test_a_change_that_there_is_not(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^methods: {name!r}: expected one of llama3, .*; :h8, :d2 or :w2 may follow$"
    ):
        choose_variants([name])


def test_head_ranks_replicas_and_the_wire_follow_a_name() -> None:
    changed, plan = choose_variants(["flashcp:h8:d2:w2", "plan:w2"], given_plan=True, given_heads=4)
    assert changed == VARIANTS["flashcp"]._replace(
        name="flashcp:h8:d2:w2", head_ranks=8, data_parallel=2, gradient_bytes=2
    )
    assert plan == Variant("plan:w2", "plan", "exact", "ours", head_ranks=4, gradient_bytes=2)


def test_heads_that_ranks_cannot_share_out() -> None:
    setting = make_setting(MACHINE, ModelShape(8, 4))
    both = [VARIANTS["ulysses"], VARIANTS["ring"]]
    assert that_share_heads(both, setting, 8) == (both, "")  # a KV head for two of the eight
    why = "ulysses, for query_heads=8, kv_heads=4 cannot be shared out among 16 ranks"
    assert that_share_heads(both, setting, 16) == (both[1:], why)
    assert that_share_heads(both, setting, 16, Step(2)) == (both, "")  # two replicas of 8
    assert that_share_heads(both[1:], setting, 16) == (both[1:], "")
    with pytest.raises(
        ValueError, match=r"^ulysses: x.query_heads=8, x.kv_heads=4 cannot be shared out among 16 ranks$"
    ):
        that_share_heads(both[:1], setting, 16, prefix="x.")
    with pytest.raises(ValueError, match=r"^head_ranks=3: expected one of 1, 2, 4, 8, or auto$"):
        that_share_heads(both, setting, 16, head_ranks=3)
    with pytest.raises(ValueError, match=r"^methods: 'flashcp:d3': expected a divisor of batch_windows=4 after d$"):
        that_share_heads(choose_variants(["flashcp:d3"]), setting, 16, Step(4))


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "two", None])
def test_what_is_no_number_of_head_ranks_or_windows(value: object) -> None:
    with pytest.raises(ValueError, match=rf"^head_ranks={value!r}: expected auto or a whole number >= 1$"):
        read_head_ranks(value)
    with pytest.raises(ValueError, match=rf"^batch_windows={value!r}: expected a whole number >= 1$"):
        read_step(value, 1, "step", 8)
    with pytest.raises(ValueError, match=rf"^micro_batches={value!r}: expected a whole number >= 1$"):
        read_step(1, value, "step", 8)


def test_what_makes_no_step() -> None:
    assert read_step(2, 3, "step", 8) == Step(2, 3, "step")
    with pytest.raises(ValueError, match=r"^batch_windows=3: expected a divisor of world_size=8$"):
        read_step(3, 1, "step", 8)
    with pytest.raises(ValueError, match=r"^waits='layer': expected one of micro_batch, step$"):
        read_step(1, 1, "layer", 8)
