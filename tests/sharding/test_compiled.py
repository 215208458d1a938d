"""Compiled loops: what is kept on disk is not used when the file of a helper has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOP = "from helper import step\n\ndef loop(x):\n    return step(x)\n"
MAIN = """
import sys
from helper import step
from loop import loop
from flashcp.sharding.compiled import compiled_twins
run = compiled_twins([loop], [step])[0]
print(run(1), sum(run.stats.cache_hits.values()))
"""


def test_a_changed_helper_is_compiled_anew(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    (tmp_path / "main.py").write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}

    def printed(factor: int) -> str:
        (tmp_path / "helper.py").write_text(f"def step(x):\n    return {factor} * x\n")
        command = [sys.executable, "-B", "main.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert [printed(2), printed(3), printed(3)] == ["2 0", "3 0", "3 1"]
