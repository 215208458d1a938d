"""Which implementation runs where, and what is said when none can."""

from __future__ import annotations

import pytest
import torch

import flashcp
from flashcp.kernels.cpu import CpuAttention
from flashcp.kernels.selection import ATTENTION, attention_name, select_attention, waits_inside
from flashcp.kernels.tuning import Blocks, Tuning
from tests.interpreter import interpreted
from tests.packs import random_qkv

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_is_triton_on_a_gpu_and_cpu_elsewhere() -> None:
    assert attention_name("auto", GPU) == "triton"
    assert attention_name("auto", CPU) == "cpu"
    assert select_attention("auto", CPU) is select_attention("cpu", CPU)
    assert isinstance(select_attention("cpu", CPU), CpuAttention)


def test_names_and_devices_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="attention='flash': expected one of auto, cpu, triton"):
        select_attention("flash", CPU)
    with pytest.raises(ValueError, match="attention='cpu' on a cuda tensor: expected CPU tensors"):
        select_attention("cpu", GPU)
    with pytest.raises(ValueError, match="attention='triton' on a meta tensor: expected a GPU"):
        select_attention("triton", torch.device("meta"))


def test_varlen_is_the_kernel_that_is_installed() -> None:
    assert select_attention("varlen", CPU) is select_attention("varlen:sdpa", CPU)  # its tables outlive a call
    assert attention_name("varlen", GPU) == "varlen"  # never what auto stands for, on any device
    with pytest.raises(
        ValueError, match="expected one of auto, cpu, triton, varlen, varlen:flash_attention_3, varlen:f"
    ):
        select_attention("varlen:mine", CPU)
    legal = "on a cpu tensor: expected one of varlen, varlen:sdpa, which are installed for it"
    for name in ("flash_attention_3", "flash_attention_4", "torch_flash", "cudnn"):
        with pytest.raises(ValueError, match=f"attention='varlen:{name}' {legal}"):
            select_attention(f"varlen:{name}", CPU)
    with pytest.raises(ValueError, match=r"'varlen' on a meta tensor: expected one of flash_attention_3, .* installed"):
        select_attention("varlen", torch.device("meta"))


def test_other_people_s_kernels_do_not_wait() -> None:
    assert [name for name in ATTENTION if waits_inside(name)] == ["cpu", "triton"]


def test_triton_on_a_cpu_says_how_to_turn_the_interpreter_on() -> None:
    x = torch.zeros(4, 2, 16)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set before Python starts"):
        flashcp.varlen_attention(x, x, x, [4], attention="triton")


def with_the_interpreter() -> tuple[float, bool]:
    q, k, v, _ = random_qkv(20, 2, 1, 16, torch.float32, seed=0)
    found = flashcp.varlen_attention(q, k, v, [13, 7], attention="triton", tuning=Tuning(forward=Blocks(16, 16, 4, 1)))
    same = select_attention("triton", CPU) is select_attention("triton", CPU)  # its tables outlive a call
    return (found - flashcp.varlen_attention(q, k, v, [13, 7], attention="cpu")).abs().max().item(), same


def test_triton_on_a_cpu_runs_when_it_is_on() -> None:
    difference, same = interpreted(with_the_interpreter)
    assert difference < 1e-5
    assert same
