"""Whether the kernels are right on this GPU: against float64 here, and by the tests for a GPU where pytest is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch

from flashcp.experiments.bench.attention_cases import OURS, exact_share, make_tensors, pack, share
from flashcp.experiments.bench.attention_cases import Case as AttentionCase
from flashcp.experiments.bench.attention_peers import PEERS
from flashcp.experiments.bench.harness import relative_error
from flashcp.experiments.campaign.part import SANITIZER, Case, Part, Turn, case_of, under
from flashcp.experiments.sweep.results import Failure, Number, check_device, reason
from flashcp.kernels.tuning import HEAD_DIMS
from flashcp.sharding.strategies import plan

ROOT = Path(__file__).resolve().parents[2]
EXACT = "float64_head_dim_"
LENGTHS = (300, 1, 41, 7, 129)
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
MARK = "mark.gpu"
FILES = {
    "tests/comm/test_gpu_symmetric.py": 20,
    "tests/experiments/bench/test_virtual_ranks.py": 20,
    "tests/kernels/test_gpu_hopper.py": 120,
    "tests/kernels/test_gpu_attention.py": 330,
}
"""The first of the test files, by value, and about how many seconds each takes, compiling, most of it; the others that
have tests for a GPU follow."""
TEST_S, FILE_S = 100, 420
WORKERS = 8  # one compiles while another computes


def cases(small: bool) -> list[Case]:
    """Head dims against float64, test files, one call under compute-sanitizer."""
    dims, files = ([16], test_files()[:1]) if small else (sorted(HEAD_DIMS, key=lambda dim: dim != 128), test_files())
    found = [Case(f"{EXACT}{head_dim}", 30, 90) for head_dim in dims]
    return [*found, *(Case(file, FILES.get(file, 20), FILE_S) for file in files), case_of(SANITIZER)]


def measure(label: str, turn: Turn) -> Iterator[Number | Failure]:
    """Errors, or how many tests passed and which did not."""
    if label == SANITIZER:
        yield from under(SANITIZER, turn)
    elif label.startswith(EXACT):
        yield from against_float64(int(label.removeprefix(EXACT)), turn)
    else:
        yield from run_tests(label, turn)


PART = Part("values and gradients against float64, and the tests for a GPU", 3.0, cases, measure)


def against_float64(head_dim: int, turn: Turn) -> Iterator[Number | Failure]:
    """The largest error of the output and the gradients over all KV heads, of a pack and of a rank's share of it."""
    for case in _cases(head_dim):
        for dtype, limit in LIMITS.items():
            name = f"{OURS}_{case.name}_{str(dtype).removeprefix('torch.')}"
            if name in turn.left_out:
                continue
            turn.begin(name)
            try:
                error = largest_error(case, dtype, turn.device)
                if not error <= limit:
                    raise RuntimeError(f"relative error {error:.2e}: expected <= {limit:g}")
                yield Number(name, "relative_error", "1", None, error, None)
            except Exception as failure:
                check_device(turn.device)
                yield Failure(name, reason(failure))


def largest_error(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> float:
    """Of the output and every gradient, next to float64."""
    x = make_tensors(case, dtype, device)
    forward = PEERS[OURS](case, x)
    assert forward is not None  # ours does every case
    out = forward()
    found = (out, *torch.autograd.grad(out, x.leaves, x.grad))
    shares = [exact_share(case, x, head) for head in range(case.kv_heads)]
    wanted = {name: torch.stack([share[name] for share in shares], -2) for name in ("k", "v", "received")}
    wanted |= {name: torch.cat([share[name] for share in shares], 1) for name in ("out", "q")}
    names = ("out", "q", "k", "v", "received")
    return max(relative_error(value.detach(), wanted[name]) for name, value in zip(names, found, strict=False))


def run_tests(file: str, turn: Turn) -> Iterator[Number | Failure]:
    """A test file's tests for a GPU: how many passed and were skipped; every other one is a failure with its reason.

    What they print is kept beside the rows where one fails.
    """
    if not find_spec("pytest"):
        yield Failure("pytest", "pytest is not installed")
        return
    report, log = turn.folder / "tests.xml", turn.folder / f"{Path(file).stem}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", file, "--junitxml", str(report.resolve())]
    command += ["-p", "no:benchmark"]  # it warns beside xdist, and here a warning is an error
    if find_spec("pytest_timeout"):
        command += ["--timeout", str(TEST_S), "--timeout-method", "thread"]
    if find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    with log.open("w", encoding="utf-8") as said:
        code = subprocess.run(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT).returncode
    if not report.is_file():
        last = [line for line in log.read_text("utf-8").splitlines() if line.strip()][-1:]
        yield Failure("pytest", f"code {code}: {last[0] if last else 'nothing said'}")
        return
    found = list(outcomes(report))
    report.unlink()
    yield from found
    if not any(isinstance(one, Failure) for one in found):
        log.unlink()


def outcomes(report: Path) -> Iterator[Number | Failure]:
    """What a report in JUnit's form holds."""
    counts = {"passed": 0, "skipped": 0}
    for test in ElementTree.parse(report).iter("testcase"):
        wrong = next(iter(test.findall("failure") + test.findall("error")), None)
        if wrong is not None:
            yield Failure(f"{test.get('name')}", (wrong.get("message") or "no reason given").strip())
        else:
            counts["passed" if test.find("skipped") is None else "skipped"] += 1
    for name, count in counts.items():
        yield Number("pytest", name, "tests", None, float(count), None)


def test_files() -> list[str]:
    """Test files of this checkout that hold tests for a GPU; none where there is no checkout."""
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in file.read_text("utf-8")]
    first = list(FILES)
    found = [str(file.relative_to(ROOT)) for file in files]
    return sorted(found, key=lambda file: first.index(file) if file in first else len(first))


@cache
def _cases(head_dim: int) -> tuple[AttentionCase, AttentionCase]:
    split = plan(LENGTHS, 3, "per_document")
    return pack("pack", LENGTHS, (4, 2), head_dim), share("share", split, 1, (4, 2), head_dim)
