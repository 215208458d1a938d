"""Models of Transformers over ranks: loss and every gradient as of the same documents one by one in one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.integrations.covering import every_pair, pairs_of
from tests.integrations.families import FAMILIES
from tests.integrations.training import LENGTHS, PATIENT_S, alone, count_graphs, differences, over_ranks, probe
from tests.ranks import run_ranks

EXACT, ROUNDED = 1e-4, 0.05
HARD = ["llama", "gemma2", "gpt_oss", "deepseek_v3"]
"""Families that between them have all that attention can be given."""


def check(family: str, ranks: int, **how: Any) -> None:
    answer = run_ranks(_over_ranks, ranks, family, how, timeout_s=PATIENT_S)[0]
    given = family, how.get("groups", 1), how.get("lengths", LENGTHS)
    errors, limits = differences(answer, alone(*given)), {}
    if how.get("bf16"):  # in one process too a rounded score sends some tokens to another expert
        limits = {name: ROUNDED + 2 * own for name, own in differences(alone(*given, True), alone(*given)).items()}
    assert {name: error for name, error in errors.items() if error > limits.get(name, EXACT)} == {}


def _over_ranks(family: str, how: dict[str, Any]) -> Any:
    return over_ranks(family, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(family: str) -> None:
    check(family, 2)


@pytest.mark.parametrize("family", HARD)
def test_four_ranks(family: str) -> None:
    check(family, 4)


@pytest.mark.parametrize("family", HARD)
def test_fewer_tokens_than_ranks(family: str) -> None:
    check(family, 4, lengths=(3,))


@pytest.mark.parametrize("head_ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_sees_no_other(family: str, head_ranks: int) -> None:
    for others, own in run_ranks(probe, 2, family, head_ranks):
        assert others == 0.0
        assert own > 1e-3


CHOICES = {
    "family": list(FAMILIES),
    "ranks": [2, 4],
    "groups": [1, 2],  # two on four ranks: data parallel beside context parallel
    "strategy": ["flashcp", "per_document", "contiguous"],
    "head_ranks": [1, 2],
    "checkpointing": [False, True],
    "wrapped": ["", "ddp", "fsdp"],
    "compiled": ["", "aot_eager"],
    "bf16": [False, True],
}


def may_stand_together(case: dict[str, Any]) -> bool:
    """Groups of one rank are no context parallelism; DDP is what sums over groups where FSDP does not."""
    return (case["groups"] == 1 or case["ranks"] == 4) and bool(case["groups"] == 1 or case["wrapped"])


def seconds(case: dict[str, Any]) -> float:
    """About, on two cores."""
    return 3.5 * case["ranks"] if case["compiled"] else 0.2 * case["ranks"]


CASES = every_pair(CHOICES, may_stand_together, seconds)


def test_the_cases_have_every_pair() -> None:
    found = set().union(*map(pairs_of, CASES))
    assert len(CASES) < 60
    for one in ({"groups": 2, "wrapped": "fsdp"}, {"family": "gpt_oss", "compiled": "aot_eager"}):
        assert frozenset(one.items()) in found
    impossible = [{"groups": 2, "ranks": 2}, {"groups": 2, "wrapped": ""}]
    count = sum(len(a) * len(b) for a, b in itertools.combinations(CHOICES.values(), 2))
    assert len(found) == count - len(impossible)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values() if value))
def test_every_pair_of_choices(case: dict[str, Any]) -> None:
    how = dict(case)
    check(how.pop("family"), how.pop("ranks"), **how)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_inductor(family: str) -> None:
    check(family, 2, compiled="inductor")


@pytest.mark.parametrize("family", [*HARD, "llama4"])
def test_layers_that_are_compiled_whole(family: str) -> None:
    check(family, 2, compiled="layers", wrapped="fsdp", checkpointing=True)


def test_a_model_is_compiled_once_for_all_plans() -> None:
    for (one, same, other, last), ends in run_ranks(count_graphs, 2, "gemma2", timeout_s=PATIENT_S):
        assert one == same < other == last  # another length compiles once more, for all lengths
        assert one <= 5
        assert len(ends) == 1  # its masks, and none of its layers
        assert "function `defer`" in ends[0]
