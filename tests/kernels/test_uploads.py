"""Arrays on their way to a device."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from flashcp.kernels.uploads import Uploaded, to_device
from tests.checkout import ROOT, python_files


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(5)
    assert to_device(array, torch.device("cpu")).numpy() is not array
    assert np.shares_memory(to_device(array, torch.device("cpu")).numpy(), array)
    assert Uploaded(array, torch.device("cpu")).here().tolist() == [0, 1, 2, 3, 4]
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


def host_tensors_sent(tree: ast.AST) -> Iterator[int]:
    """Lines where a tensor that is made on the host is copied to a device, or indexes another one, as it lies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cuda"):
            inside = node.func.value
        elif isinstance(node, ast.Subscript):
            inside = node.slice
        else:
            continue
        calls = (part.func for part in ast.walk(inside) if isinstance(part, ast.Call))
        if any(isinstance(call, ast.Attribute) and call.attr in ("from_numpy", "tensor") for call in calls):
            yield node.lineno


@pytest.mark.parametrize("room", ["comm", "flashcp", "train"])
def test_there_is_one_way_to_a_device(room: str) -> None:
    files = [name for name in python_files() if name.startswith(f"{room}/")]
    found = [f"{name}:{line}" for name in files for line in host_tensors_sent(ast.parse((ROOT / name).read_text()))]
    assert files
    assert found == [], "the host waits there for the device: flashcp.kernels.uploads"


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.from_numpy(a).to(d)",
        "y[torch.from_numpy(a)] = 1",
        "torch.tensor([1]).cuda()",
        "q[torch.cat([torch.tensor(a)])]",
    ],
)
def test_what_the_host_would_wait_for_is_seen(line: str) -> None:
    assert list(host_tensors_sent(ast.parse(line))) == [1]


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
