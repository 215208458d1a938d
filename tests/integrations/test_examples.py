"""The examples run as their first lines say, on two ranks without a network, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT

pytest.importorskip("trl")

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    text = (ROOT / "examples" / name).read_text()
    assert text.count("\n") < 60
    assert f"torchrun --nproc-per-node=2 examples/{name}" in text
    torchrun = Path(sys.executable).parent / "torchrun"
    ran = subprocess.run(
        [torchrun, "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
         ROOT / "examples" / name],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"(?<!_)loss'?: +'?([\d.]+)", ran.stdout)]
    assert len(losses) == 5
    assert losses[-1] < 0.8 * losses[0]
