"""The Hopper candidate where there is no GPU: what the compiler makes of it, and what it refuses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from flashcp.kernels.ahead import read

pytest.importorskip("triton.experimental.gluon", reason="this triton has no Gluon")

from triton.backends.nvidia.compiler import get_ptxas

from flashcp.experiments.bench import hopper_check, hopper_forward
from flashcp.experiments.bench.attention_cases import all_cases
from flashcp.experiments.campaign.dry_run import compile_candidate
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import whole_pack_schedule
from flashcp.kernels.tuning import SHARED_BYTES, architecture


@pytest.mark.parametrize(
    ("head_dim", "dtype", "group"),
    [(128, torch.bfloat16, 1), (64, torch.bfloat16, 1), (128, torch.float16, 1), (128, torch.bfloat16, 4)],
    ids=str,
)
def test_it_compiles_to_what_it_is_meant_to_be(head_dim: int, dtype: torch.dtype, group: int, tmp_path: Path) -> None:
    kernel = compile_candidate(head_dim, str(dtype).removeprefix("torch."), group)
    found = read(kernel, "sm_90")
    # Two warpgroups, each the products of the first block, of the loop (two) and of the last, of 16 deep.
    assert found.wgmma == 2 * 2 * (head_dim + hopper_forward.BLOCK_N) // 16
    assert found.mma == 0
    assert found.spilled_bytes == 0
    assert 0 < found.shared_bytes <= SHARED_BYTES["sm_90"]
    ptx = kernel.asm["ptx"]
    assert "cp.async.bulk.tensor" in ptx
    assert set(re.findall(r"setmaxnreg\.inc\S* *\t*(\d+)", ptx)) >= {"232"}
    # Products in flight are worth nothing where the assembler waits for each: it says so in a remark.
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "kernel.ptx"]
    remarks = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores" in remarks
    assert "serialized" not in remarks
    # The softmax stands between the products' start and the wait for the second, in both warpgroups.
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"), "--dump-sass", "kernel.cubin"]
    listing = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    beside = re.findall(r"DEPBAR\.LE gsb0, 0x1 (.*?)DEPBAR\.LE gsb0, 0x0 ", listing, re.DOTALL)
    assert len(beside) == 2
    assert all(text.count("MUFU.EX2") >= hopper_forward.BLOCK_N // 2 for text in beside)


def test_it_refuses_what_it_was_not_made_for() -> None:
    schedule = whole_pack_schedule([5])
    for x in (torch.zeros(5, 1, 80, dtype=torch.float16), torch.zeros(5, 1, 64)):
        with pytest.raises(ValueError, match="expected bfloat16 or float16, and 64 or 128"):
            hopper_forward.prepare(x, KV(x, x), KV(x[:0], x[:0]), schedule, 1.0)


@pytest.mark.gpu
def test_every_case_comes_through() -> None:
    if architecture(torch.device("cuda")) != "sm_90":
        pytest.skip("needs Hopper")
    assert hopper_check.passed() == {case.label for case in all_cases()}
