"""Models of Transformers over ranks: loss and every gradient as of the same documents one by one in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integrations.families import FAMILIES
from tests.integrations.training import alone, differences, over_ranks
from tests.ranks import run_ranks

EXACT = 1e-4
HARD = ["llama", "gemma2", "gpt_oss", "deepseek_v3"]
"""Families that between them have all that attention can be given."""


def check(family: str, ranks: int, limit: float = EXACT, **how: Any) -> None:
    answer = run_ranks(_over_ranks, ranks, family, how)[0]
    wrong = {
        name: error for name, error in differences(answer, alone(family, how.get("groups", 1))).items() if error > limit
    }
    assert not wrong


def _over_ranks(family: str, how: dict[str, Any]) -> Any:
    return over_ranks(family, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(family: str) -> None:
    check(family, 2)


@pytest.mark.parametrize("family", HARD)
def test_four_ranks(family: str) -> None:
    check(family, 4)


@pytest.mark.parametrize("strategy", ["per_document", "contiguous"])
def test_strategies(strategy: str) -> None:
    check("gpt_oss", 2, strategy=strategy)


@pytest.mark.parametrize("family", HARD)
def test_head_ranks(family: str) -> None:
    check(family, 2, head_ranks=2)


@pytest.mark.parametrize("family", HARD)
def test_gradient_checkpointing(family: str) -> None:
    check(family, 2, checkpointing=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_autocast(family: str) -> None:
    check(family, 2, 0.05, bf16=True)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_fsdp(family: str) -> None:
    check(family, 2, fsdp=True, checkpointing=True)


def test_two_windows_under_ddp() -> None:
    check("gpt_oss", 4, groups=2, head_ranks=2)
    check("llama", 4, groups=2)
