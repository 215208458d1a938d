"""Kernels of this machine: timed where they are right, refused where they are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcp
from flashcp.experiments.bench.kernel_times import KernelTimer, RankSchedule, rank_schedule
from flashcp.kernels.cpu import CpuAttention
from flashcp.kernels.interface import Gradients
from flashcp.simulator.cost import AttentionShape

SHAPE = AttentionShape(4, 4, 16, 4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_of_this_machine_are_timed(device: str) -> None:
    timer = KernelTimer(torch.device(device))
    timer.check(SHAPE)
    timer.check(SHAPE._replace(dtype_bytes=2))
    lengths = (64, 2048) if device == "cpu" else (256, 65_536)
    short, long = (timer.times(_share([length] * 2), SHAPE) for length in lengths)
    assert min(short) > 0
    assert all(more > 2 * less for less, more in zip(short, long, strict=True))


def _share(lengths: list[int]) -> RankSchedule:
    one = rank_schedule(flashcp.plan(lengths, 2, "per_document"), 1)
    assert one is not None
    return one


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_a_wrong_kernel_is_not_timed(factor: float) -> None:
    class Wrong(CpuAttention):
        """Forgets a factor in the backward, or returns no numbers."""

        def gradients(self, *inputs: Any) -> Gradients:
            found = super().gradients(*inputs)
            return found._replace(q=factor * found.q)

    timer = KernelTimer(torch.device("cpu"))
    object.__setattr__(timer, "kernel", Wrong())
    with pytest.raises(RuntimeError, match="a wrong kernel is not timed"):
        timer.check(SHAPE)
