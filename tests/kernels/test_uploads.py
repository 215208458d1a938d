"""Arrays on their way to a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashcp.kernels.uploads import Uploaded, to_device


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(5)
    assert to_device(array, torch.device("cpu")).numpy() is not array
    assert np.shares_memory(to_device(array, torch.device("cpu")).numpy(), array)
    assert Uploaded(array, torch.device("cpu")).here().tolist() == [0, 1, 2, 3, 4]
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization")
def test_the_host_waits_for_no_copy() -> None:
    device = torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10_000_000)
        kept = Uploaded(np.arange(1 << 16), device)
        tensor = to_device(torch.arange(1 << 16), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(kept.here(), tensor)


@pytest.mark.gpu
def test_another_stream_reads_what_has_landed() -> None:
    device = torch.device("cuda")
    first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)
    torch.empty(1 << 16, dtype=torch.int64, device=device).fill_(-1)  # what the copy's memory may hold
    with torch.cuda.stream(first):
        torch.cuda._sleep(100_000_000)
        kept = Uploaded(np.arange(1 << 16), device)
    with torch.cuda.stream(second):
        seen = kept.here().clone()
    torch.cuda.synchronize(device)
    assert torch.equal(seen.cpu(), torch.arange(1 << 16))
