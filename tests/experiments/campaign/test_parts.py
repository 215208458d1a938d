"""What the parts measure, in small on a CPU, and what the dry run finds without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcp.experiments.bench import attention, tune_attention
from flashcp.experiments.bench.tune_attention import Kernel
from flashcp.experiments.campaign import __main__ as command
from flashcp.experiments.campaign import correct, part
from flashcp.experiments.campaign.part import PARTS, Turn, counters, load
from flashcp.experiments.sweep.results import Failure, Number
from flashcp.kernels.ahead import TARGETS, Build
from flashcp.kernels.tuning import HEAD_DIMS
from flashcp.sharding.methods import METHODS
from flashcp.simulator.variants import HEADS, VARIANTS

METRICS = ("registers", "alone_ms", "shipped_ms", "candidate_ms")


@pytest.fixture
def turn(tmp_path: Path) -> Turn:
    return Turn(torch.device("cpu"), tmp_path, 60.0, small=True)


@pytest.mark.parametrize("name", PARTS)
def test_cases_have_names_of_their_own_and_limits(name: str) -> None:
    one = load(PARTS[name])
    for small in (True, False):
        cases = one.cases(small)
        assert len({case.label for case in cases}) == len(cases) > 0
        assert all(0 < case.expected_s <= case.limit_s for case in cases)
    assert one.minutes > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes it with kernels that a CPU has not")
def test_the_kernels_are_compared_with_float64(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(correct.measure("float64_head_dim_16", turn))
    assert [one.provider for one in found] == [
        f"flashcp_{case}_{dtype}" for case in ("pack", "share") for dtype in ("bfloat16", "float16", "float32")
    ]
    assert all(isinstance(one, Number) and one.median < 1e-2 for one in found)
    ours = correct.PEERS[correct.OURS]
    wrong = {correct.OURS: lambda case, x: lambda: 1.02 * ours(case, x)()}
    monkeypatch.setattr(correct, "PEERS", wrong)
    found = list(correct.measure("float64_head_dim_16", turn))
    assert all(isinstance(one, Failure) and one.reason.startswith("relative error 2") for one in found)


def test_a_file_of_tests_is_rows_and_reasons(turn: Turn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test_made_up.py"
    file.write_text(
        f"import pytest\npytestmark = pytest.{correct.MARK}\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'wrong number'\n"
        "@pytest.mark.parametrize('x', [1, 2])\ndef test_broken(x, nothing): pass\n"
        "def test_left_out(): pytest.skip('no')\n"
    )
    monkeypatch.setattr(correct, "ROOT", tmp_path)  # the checkout's own tests/conftest.py would skip them all
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    found = list(correct.measure("test_made_up.py", turn))
    assert [(one.provider, one.metric, one.median) for one in found if isinstance(one, Number)] == [
        ("pytest", "passed", 1.0),
        ("pytest", "skipped", 1.0),
    ]
    failures = {one.provider: one.reason for one in found if isinstance(one, Failure)}
    assert set(failures) == {"test_bad", "test_broken[1]", "test_broken[2]"}
    assert "wrong number" in failures["test_bad"]
    assert "test_bad" in (tmp_path / "test_made_up.log").read_text()
    file.write_text("import nothing_of_that_name\n")
    assert any(isinstance(one, Failure) for one in correct.measure("test_made_up.py", turn))


def test_test_files_are_found_by_their_mark() -> None:
    found = correct.test_files()
    assert found[:2] == list(correct.FILES)[:2]
    assert "tests/kernels/test_gpu_attention.py" in found
    assert "tests/sharding/test_plan.py" not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be timed")
def test_a_machine_has_ceilings(turn: Turn) -> None:
    found = {one.metric: one for one in attention.measure("ceilings", turn) if isinstance(one, Number)}
    assert set(found) == {"copy_ms", "copy_gbps", "matmul_ms", "matmul_tflops"}
    ms, rate = found["matmul_ms"], found["matmul_tflops"]
    assert rate.median == pytest.approx(2 * 256**3 / ms.median / 1e9)
    assert rate.p20 <= rate.median <= rate.p80
    copied = 4 * (1 << 20)  # fp16, read and written
    assert found["copy_gbps"].median == pytest.approx(copied / found["copy_ms"].median / 1e6)


def test_flex_is_compiled_in_a_few_cases_of_its_own(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(attention, "measure_case", lambda case, device, left_out, *_: seen.append(left_out) or [])
    large = Turn(turn.device, turn.folder, 60.0, left_out=frozenset({"fa3"}))
    for label in ("pile_32x32", "pile_32x32_flex"):
        list(attention.measure(label, large))
    assert seen == [{"fa3", "flex"}, attention.PEERS.keys() - {"flex", "flashcp"}]


def test_published_figures_come_first() -> None:
    labels = [case.label for case in attention.cases(small=False)]
    assert labels[:3] == ["ceilings", "one_16k_32x32", "pile_32x32"]
    assert labels.index("rank_of_8_flashcp_paper_32x32") < labels.index("one_16k_32x8")
    assert labels.index("rank_of_8_flashcp_paper_32x32") < labels.index("pile_32x32_flex") < labels.index("pile_32x8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be timed")
def test_the_best_candidates_take_turns_with_the_shipped_one(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for sm_90, computed by the CPU, which takes no block shapes."""
    for case in tune_attention.cases(small=True):
        found = [one for one in tune_attention.measure(case.label, turn) if isinstance(one, Number)]
        names = {metric: [one.provider for one in found if one.metric == metric] for metric in METRICS}
        assert len(names["registers"]) > 1
        shipped, *others = names["alone_ms"]  # as many as there was time for
        assert names["shipped_ms"] == [shipped]
        assert names["registers"] == [shipped, *others]
        assert set(names["candidate_ms"]) == set(others)
    monkeypatch.setattr(tune_attention, "relative_error", lambda value, other: 0.1)
    wrong = list(tune_attention.measure("32_forward_long", turn))
    assert {one.metric for one in wrong if isinstance(one, Number)} == {"registers"}
    assert all("a wrong kernel is not timed" in one.reason for one in wrong if isinstance(one, Failure))
    assert any(isinstance(one, Failure) for one in wrong)
    labels = [case.label for case in tune_attention.cases(small=False)]
    assert {int(label.split("_")[0]) for label in labels} == set(HEAD_DIMS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be timed")
def test_every_method_has_a_layer(turn: Turn) -> None:
    begun: list[str] = []
    told = replace(turn, begin=begun.append)
    found = [one for one in load(PARTS["hybrid"]).measure("wlb_llm_window_0", told) if isinstance(one, Number)]
    assert not begun  # methods share their kernels: what hangs is nobody's
    with_heads = {name for name, one in VARIANTS.items() if not one.head_ranks and name not in METHODS}
    assert with_heads == {f"{name}{how}" for name in HEADS for how in ("", "_best_effort")}
    assert {one.provider for one in found} == set(VARIANTS) - with_heads  # a rank's kernels have all heads
    assert all(one.median > 0 for one in found if one.metric == "module_ms")
    assert {one.unit for one in found if one.metric.endswith("_ms")} == {"ms"}


def test_counters_are_read_from_a_tools_table() -> None:
    text = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","forward_kernel(int, float *)","GPU Speed Of Light Throughput","Duration","us","1,234.50"
"0","12","forward_kernel(int, float *)","Launch Statistics","Function Cache Configuration","","CachePreferNone"
"1","12","backward_q_kernel","Launch Statistics","Registers Per Thread","register/thread","255"
"""
    assert list(counters(text)) == [
        Number("forward_kernel", "Duration", "us", None, 1234.5, None),
        Number("backward_q_kernel", "Registers Per Thread", "register/thread", None, 255.0, None),
    ]
    assert list(counters("==ERROR== no permission")) == []


def test_tools_run_where_they_are(turn: Turn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(correct.measure(part.SANITIZER, turn)) == list(attention.measure(part.NCU, turn)) == []
    assert capsys.readouterr().err.splitlines() == [
        f"{tool}: not on the PATH, nothing measured" for tool in (part.SANITIZER, part.NCU)
    ]
    assert part.case_of(part.SANITIZER).expected_s < 1
    tool = tmp_path / part.SANITIZER  # runs the command that follows its own three options and adds a summary
    tool.write_text('#!/bin/sh\nshift 4\n"$@" || exit 1\necho "========= ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    assert part.case_of(part.SANITIZER).expected_s > 1
    assert [one.median for one in correct.measure(part.SANITIZER, turn) if isinstance(one, Number)] == [0.0]
    assert "0 errors" in (tmp_path / f"{part.SANITIZER}.txt").read_text()
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 3 errors"\nexit 9\n')
    assert list(correct.measure(part.SANITIZER, turn)) == [Failure(part.SANITIZER, "========= ERROR SUMMARY: 3 errors")]


def test_a_dry_run_lists_and_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    def few(kernel: Kernel) -> bool:
        return kernel.name.startswith("sm_90 64 bfloat16 forward") or "64 bfloat16 candidate group 1" in kernel.name

    assert command.dry_run(["attention", "overlap"], 1, chosen=few) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "pile_32x32" for line in lines)
    assert lines[-1].endswith("kernels: 0 do not compile, 0 unfit")
    assert int(lines[-1].split()[0]) >= 5  # long, short, both under context parallelism, candidate


def test_a_dry_run_says_what_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "kernels", lambda: iter([Kernel("bad", "sm_90", True, True, refused)]))
    assert command.dry_run([], 1) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  bad: does not compile: too large",
        "1 kernels: 1 do not compile, 0 unfit",
    ]


def refused() -> Build:
    raise RuntimeError("too large")


def test_a_dry_run_knows_every_kernel() -> None:
    names = [kernel.name for kernel in command.kernels()]
    assert len(set(names)) == len(names)
    assert command.ARCH in TARGETS
    for word in ("parallel", "fused", "hopper", "backward_rows", "backward_q"):
        assert any(word in name for name in names), word
