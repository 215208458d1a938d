"""What a caller chooses: legal values come through, others are refused in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashcp.clusters import read_cluster
from flashcp.simulator.cost import AttentionShape, ModelShape
from flashcp.simulator.variants import (
    VARIANTS,
    Variant,
    choose_variants,
    make_setting,
    read_ranks,
    without_ulysses,
)

MACHINE = read_cluster("h100-nvlink")


def test_auto_is_staged_until_a_gpu_has_shown_that_fused_is_faster() -> None:
    assert make_setting(MACHINE, ModelShape()).overlap == "staged"
    assert make_setting(MACHINE, ModelShape(), "fused", 2) == replace(
        make_setting(MACHINE, ModelShape()), overlap="fused", gradient_bytes=2
    )
    assert make_setting(MACHINE, ModelShape(16, 4, 64, 4)).shape == AttentionShape(16, 4, 64, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overlap": "full"}, "overlap='full': expected one of auto, none, staged, fused"),
        ({"gradient_bytes": 8}, "gradient_bytes=8: expected one of 2, 4"),
        ({"model": ModelShape(query_heads=0)}, "m.query_heads=0: expected a whole number >= 1"),
        ({"model": ModelShape(head_dim=1.5)}, "m.head_dim=1.5: expected a whole number >= 1"),  # type: ignore[arg-type]
        ({"model": ModelShape(ffn_dim=-1)}, "m.ffn_dim=-1: expected a whole number >= 0"),
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


def test_ulysses_wants_heads_for_every_rank() -> None:
    shape = AttentionShape(8, 4)
    both = [VARIANTS["ulysses"], VARIANTS["ring"]]
    assert without_ulysses(both, shape, 4) == (both, "")
    assert without_ulysses(both, shape, 8) == (
        [VARIANTS["ring"]],
        "query_heads=8, kv_heads=4 are no multiples of 8 ranks",
    )
    assert without_ulysses(both[1:], shape, 8) == (both[1:], "")
    with pytest.raises(ValueError, match=r"^ulysses: x.query_heads=8, x.kv_heads=4 are no multiples of 8 ranks$"):
        without_ulysses(both[:1], shape, 8, "x.")
