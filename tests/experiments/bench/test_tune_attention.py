"""The search for block shapes: what it compiles, and what it calls unfit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashcp.experiments.bench import tune_attention
from flashcp.experiments.bench.tune_attention import Kernel, compiled, fit, main, shipped, tuned
from flashcp.kernels.ahead import TARGETS, Build
from flashcp.kernels.tuning import DTYPES, HEAD_DIMS, SHARED_BYTES, Blocks, Pass

GOOD = Build(200, 0, 60_000, 24, 0, 0, 16)


def test_the_matrix_holds_every_kernel_once() -> None:
    names = [kernel.name for kernel in shipped()]
    assert len(set(names)) == len(names)
    for arch in TARGETS:
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                mine = [name for name in names if name.startswith(f"{arch} {head_dim} {dtype} ")]
                assert {name.split()[3] for name in mine} == {*(which.value for which in Pass), "backward_rows"}
                assert any(name.endswith(" group 4") for name in mine)


@pytest.mark.parametrize(
    ("found", "dtype", "wanted"),
    [
        (GOOD, "float16", True),
        (replace(GOOD, spilled_bytes=16), "float16", False),
        (replace(GOOD, spilled_bytes=16), "float32", True),
        (replace(GOOD, wgmma=0), "float16", False),
        (replace(GOOD, wgmma=0, mma=8), "float16", True),
        (replace(GOOD, wgmma=0), "float32", True),
        (replace(GOOD, shared_bytes=SHARED_BYTES["sm_90"] + 1), "float32", False),
    ],
)
def test_fit(found: Build, dtype: str, wanted: bool) -> None:
    assert fit(found, tuned(Pass.FORWARD, "sm_90", 64, dtype, Blocks(64, 64, 4, 2))) == wanted


def test_the_kernel_before_the_gradients_may_not_spill_in_any_dtype() -> None:
    for kernel in shipped():
        if " backward_rows " in kernel.name:
            assert fit(replace(GOOD, wgmma=0), kernel)
            assert not fit(replace(GOOD, spilled_bytes=4), kernel)


def test_a_kernel_that_does_not_compile_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = [Kernel(name, "sm_90", True, True, work) for name, work in (("good", _good), ("bad", _bad))]
    assert compiled(kernels, 1) == [True, False]
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=1) == ["bad", "does not compile: too large"]


def test_a_wrong_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a GPU, with made-up kernels: the second one's gradients are off, the third one's are no numbers."""
    x = torch.randn(8)
    made = {"first": (x, x), "off": (x, 1.1 * x), "nan": (x * torch.nan, x), "other": (x, 1.001 * x)}
    timed: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_attention, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune_attention, "compiled", lambda kernels, processes: [True] * len(kernels))
    monkeypatch.setattr(tune_attention, "timed_work", lambda *_: {name: (lambda y=y: y) for name, y in made.items()})
    monkeypatch.setattr(tune_attention, "in_turns_ms", lambda work, *_: timed.extend(work) or {})
    assert main([]) == 0
    assert timed == ["first", "other"] * len(tune_attention.PACKS)
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith("a wrong kernel is not timed")]
    assert [line.split()[0] for line in said] == ["off", "nan"] * len(tune_attention.PACKS)


def _good() -> Build:
    return GOOD


def _bad() -> Build:
    raise RuntimeError("too large\nfor anything")
