"""The forward on Hopper where there is no GPU: what the compiler makes of it, and what it takes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.nvidia.compiler import get_ptxas

from flashcp.kernels import hopper
from flashcp.kernels.ahead import compile_hopper, read
from flashcp.kernels.launch import HOPPER_ROWS
from flashcp.kernels.tuning import SHARED_BYTES, TABLE, Pass


@pytest.mark.parametrize(
    ("head_dim", "dtype", "group", "merge"),
    [
        (128, "bfloat16", 1, False),
        (128, "bfloat16", 1, True),
        (64, "bfloat16", 1, True),
        (128, "float16", 1, False),
        (128, "bfloat16", 4, False),
    ],
)
def test_it_compiles_to_what_it_is_meant_to_be(
    head_dim: int, dtype: str, group: int, merge: bool, tmp_path: Path
) -> None:
    kernel = compile_hopper(head_dim, dtype, group, merge)
    found = read(kernel, "sm_90")
    # Two warpgroups, each the products of the first block, of the loop (two) and of the last, of 16 deep.
    assert found.wgmma == 2 * 2 * (head_dim + hopper.BLOCK_N) // 16
    assert found.mma == 0
    assert found.spilled_bytes <= 8  # where documents share a tile, not in the loop: see below
    assert 0 < found.shared_bytes <= SHARED_BYTES["sm_90"]
    ptx = kernel.asm["ptx"]
    assert "cp.async.bulk.tensor" in ptx
    assert set(re.findall(r"setmaxnreg\.inc\S* *\t*(\d+)", ptx)) >= {"232"}
    # Products in flight are worth nothing where the assembler waits for each: it says so in a remark.
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "kernel.ptx"]
    remarks = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in remarks
    # The softmax stands between the products' start and the wait for the second, in both warpgroups.
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"), "--dump-sass", "kernel.cubin"]
    listing = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    beside = re.findall(r"DEPBAR\.LE gsb0, 0x1 (.*?)DEPBAR\.LE gsb0, 0x0 ", listing, re.DOTALL)
    assert len(beside) == 2
    assert all(text.count("MUFU.EX2") >= hopper.BLOCK_N // 2 for text in beside)
    assert not re.search(r"\b(LDL|STL)\b", "".join(beside))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_second_launch_walks_the_same_tiles(head_dim: int) -> None:
    assert TABLE["sm_90", head_dim, 2, Pass.FORWARD][0].block_m == HOPPER_ROWS
