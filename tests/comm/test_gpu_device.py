"""A GPU's streams wait, copy and write by themselves: what the CUDA fabric relies on."""

from __future__ import annotations

import time

import pytest
import torch

from flashcp.comm.fabrics.cuda_device import CudaDevice

pytestmark = pytest.mark.gpu


def device() -> CudaDevice:
    return CudaDevice(torch.device("cuda", 0), timeout_s=1.0)


def test_rows_come_behind_a_wait_and_before_their_flag() -> None:
    gpu = device()
    words, rows = gpu.zeros(8).view(torch.int32), torch.randn(1 << 20, device="cuda")
    into = torch.zeros_like(rows)
    torch.cuda.synchronize()
    puts, other = gpu.new_stream("puts"), gpu.new_stream("other")
    gpu.wait_value(words[0:1], 3, puts)
    gpu.copy(into.view(torch.uint8), rows.view(torch.uint8), puts)
    gpu.write_value(words[1:2], 7, puts)
    sent = gpu.record(puts)
    gpu.write_value(words[0:1], 2, other)
    other.synchronize()
    time.sleep(0.05)
    assert not sent.query()  # 2 is less than 3
    gpu.write_value(words[0:1], 4, other)
    gpu.synchronize()
    assert torch.equal(into, rows)
    assert words.tolist() == [4, 7]


def test_nothing_needs_an_sm() -> None:
    """Rows and flags pass while kernels that wait for a long time hold the compute stream and the device."""
    gpu = device()
    word, rows = gpu.zeros(4).view(torch.int32), torch.randn(1 << 20, device="cuda")
    into = torch.zeros_like(rows)
    big = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    puts = gpu.new_stream("puts")
    for _ in range(20):
        big = big @ big * 1e-4
    busy = gpu.record(gpu.current_stream())
    gpu.copy(into.view(torch.uint8), rows.view(torch.uint8), puts)
    gpu.write_value(word, 1, puts)
    puts.synchronize()
    assert not busy.query()
    torch.cuda.synchronize()
    assert torch.equal(into, rows)


def test_a_wait_for_ever_is_noticed() -> None:
    gpu = device()
    word = gpu.zeros(4).view(torch.int32)
    torch.cuda.synchronize()
    stream, rescue = gpu.new_stream("waits"), gpu.new_stream("rescue")
    before = gpu.record(stream)
    gpu.wait_value(word, 1, stream)
    late: list[float] = []
    began = time.monotonic()

    def bark() -> None:
        late.append(time.monotonic() - began)
        gpu.write_value(word, 1, rescue)

    gpu.watch(before, gpu.record(stream), bark)
    gpu.synchronize()
    assert len(late) == 1
    assert 0.9 < late[0] < 5


def test_a_delay_is_about_as_long_as_it_says() -> None:
    """Never much shorter; longer where other tests copy beside it."""
    gpu = device()
    rows = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    stream = gpu.new_stream("puts")
    gpu.delay(rows, 20.0, stream)  # measures first
    gpu.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    gpu.delay(rows, 20.0, stream)
    stop.record(stream)
    gpu.synchronize()
    wanted_ms = rows.nbytes / 20e6
    assert 0.7 * wanted_ms < start.elapsed_time(stop) < 20 * wanted_ms
