"""torchtitan over ranks: losses and gradient norms of its Trainer as in one process under its own masks."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest

from tests.ranks import run_cases, run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torchtitan imports
    from tests.integrations.titan import STEPS, Run, train

LLAMA = "llama3_debugmodel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("outputs"))


@cache
def alone(folder: str, name: str) -> Run:
    """One process of torchtitan's Trainer."""
    return run_ranks(train, 1, folder, name, "dense", timeout_s=170)[0]


def same(run: Run, reference: Run) -> None:
    assert len(run.logs) == STEPS
    for step, (found, wanted) in enumerate(zip(run.logs, reference.logs, strict=True)):
        assert found == pytest.approx(wanted, rel=1e-4), step
    assert run.validation == pytest.approx(reference.validation, rel=1e-4)


def test_two_ranks(folder: str) -> None:
    cases: list[tuple[Any, ...]] = [
        (LLAMA, "flex", 2),
        (LLAMA, "varlen", 2, "full", "", {}, {"strategy": "per_document", "exchange": "ring"}),
        (LLAMA, "flex", 2, "selective", "", {}, {"head_ranks": 2}),
        (LLAMA, "flex", 2, "", "aot_eager"),
        (LLAMA, "flex", 2, "full", "aot_eager"),
        (LLAMA, "flex", 2, "selective", "inductor"),
        ("qwen3_debugmodel", "flex", 2),
        ("gpt_oss_debugmodel", "flex", 2),
        ("gpt_oss_debugmodel", "varlen", 2, "selective", "aot_eager"),
    ]
    import os
    if os.environ.get("CASES"): cases=[cases[int(i)] for i in os.environ["CASES"].split(",")]
    import time; t=time.time()
    from tests.packs import relative_error
    for case in cases:
        try:
            (found,) = run_cases(train, 2, [(folder, *case)], timeout_s=170)
            f=found[0]; w=alone(folder, case[0])
            print("CASE", case, f.calls, f.graphs, time.time()-t, flush=True)
            print("CASE", f.logs, w.logs, f.validation, w.validation)
            e={n: relative_error(f.gradients[n], w.gradients[n]) for n in w.gradients}
            print("CASE", max(e, key=e.get), max(e.values()))
        except BaseException as e: print("CASE", case, str(e)[-1800:], time.time()-t, flush=True)
        t=time.time()
