"""A rank that dies or fails inside a step: the last line of each rank says in which step, and in which half of it."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from flashcp.comm.exchanges.exact import Exact
from flashcp.train.ranks import exit_code
from tests.faults import strike
from tests.ranks import run_ranks
from tests.train.test_run import small, train


def last_line(config: dict[str, Any], kind: str, phase: str) -> str:
    """What a rank says at its end, where rank 1 comes to harm in the third step. The model has two layers."""
    real, calls = getattr(Exact, phase), 0

    def harmed(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5 and dist.get_rank() == 1:
            strike(kind)
        return real(*given)

    said = io.StringIO()
    with patch.object(Exact, phase, harmed), redirect_stderr(said):
        assert exit_code(lambda: train(config)) == 1
    return said.getvalue().splitlines()[-1]


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize(("kind", "phase"), [("raise", "backward"), ("raise", "forward"), ("kill", "backward")])
def test_the_last_line_names_step_and_phase(kind: str, phase: str, transport: str, tmp_path: Path) -> None:
    config = small(tmp_path / "run", loop={"accumulation": 1}, parallel={"transport": transport, "timeout_s": 3.0})
    lost = [1] if kind == "kill" else []
    first, other = run_ranks(last_line, 2, config, kind, phase, lost=lost)
    assert re.fullmatch(rf"error: rank 0 of 2: step 3, {phase}: Exchange\w*: rank 0 .*\brank 1\b.*", first), first
    assert kind == "kill" or other == f"error: rank 1 of 2: step 3, {phase}: Mishap: on purpose"
