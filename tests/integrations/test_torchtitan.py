"""torchtitan over ranks: losses and gradient norms of its Trainer as in one process under its own masks."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchtitan")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torchtitan imports
    from tests.integrations.titan import STEPS, Logs, train
from tests.ranks import run_ranks

LLAMA = "llama3_debugmodel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("outputs"))


@cache
def alone(folder: str, name: str) -> tuple[Logs, list[float]]:
    """One process of torchtitan's Trainer."""
    return run_ranks(train, 1, folder, name, "dense", timeout_s=170)[0]


def test_llama(folder: str) -> None:
    print(alone(folder, LLAMA))
    print(run_ranks(train, 2, folder, LLAMA, "flex", 2, timeout_s=170))
