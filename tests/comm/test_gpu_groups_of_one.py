"""NCCL and NVSHMEM on one GPU, in a group of one rank that sends to itself: real calls, and nobody to wait for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.errors import ExchangeTimeoutError
from flashcp.comm.nvshmem import Nvshmem
from flashcp.comm.transport import OutgoingRows
from flashcp.comm.two_sided import TwoSided
from flashcp.comm.waits import StreamWaits

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
LONG = 2_000_000_000  # cycles: about a second


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[torch.device]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield torch.device("cuda", 0)
    torch.cuda.synchronize()
    dist.destroy_process_group()


class Asked:
    """A real event that is asked again and again."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event, self.times = event, 0

    def query(self) -> bool:
        self._event.query()
        self.times += 1
        return False


def transports(device: torch.device, name: str, timeout_s: float) -> TwoSided:
    if name == "nccl":
        return TwoSided(None, timeout_s)
    from torch.distributed import _symmetric_memory as symmetric

    if not symmetric.is_nvshmem_available():
        pytest.skip("this torch has no NVSHMEM")
    try:
        return Nvshmem(None, timeout_s, device)
    except RuntimeError as error:
        if "global_ranks.size() > 1" not in str(error):
            raise
        pytest.skip("this torch gives a group of one rank no memory over NVSHMEM")


def exchanged(transport: TwoSided, rows: Tensor) -> list[Tensor]:
    """The rows as each operation brings them back."""
    count, found = len(rows), []
    for send in (
        lambda inbox: transport.all_to_all(OutgoingRows(rows), [count], inbox, [count], [0]),
        lambda inbox: transport.all_gather(OutgoingRows(rows), inbox),
        lambda inbox: transport.shift(OutgoingRows(rows), inbox, 0, slice(0, count), 0),
    ):
        inbox = transport.inbox(count, count, tuple(rows.shape[1:]), rows)
        send(inbox).wait()
        found.append(inbox.rows)
    return found


@pytest.mark.parametrize("name", ["nccl", "nvshmem"])
def test_rows_come_and_the_host_does_not_wait(alone: torch.device, name: str) -> None:
    transport = transports(alone, name, 20.0)
    assert isinstance(transport.waits, StreamWaits)
    rows = torch.randn(1000, 2, 4, 64, device=alone)
    exchanged(transport, rows)  # communicators and buffers are made
    transport.synchronize()
    torch.cuda._sleep(LONG)
    began = time.monotonic()
    found = exchanged(transport, rows)
    took = time.monotonic() - began
    assert not torch.cuda.current_stream().query(), "the device was to be behind"
    assert took < 0.25
    transport.synchronize()
    assert all(torch.equal(part, rows) for part in found)


def test_rows_that_come_late_are_an_error(alone: torch.device) -> None:
    transport = TwoSided(None, 0.2)
    rows = torch.randn(1000, 64, device=alone)
    exchanged(transport, rows)
    transport.synchronize()
    inbox = transport.inbox(1000, 1000, (64,), rows)
    with torch.cuda.stream(torch.cuda.Stream(alone)):
        torch.cuda._sleep(2 * LONG)
        transfer = transport.all_gather(OutgoingRows(rows), inbox)
    transfer.wait()
    with pytest.raises(ExchangeTimeoutError, match=r"^rank 0 waited 0\.2 s for rows of another rank, on its GPU$"):
        transport.synchronize()
    with pytest.raises(ExchangeTimeoutError):
        transport.all_gather(OutgoingRows(rows), inbox)


def test_a_graph_can_be_captured_beside_the_watchdog(alone: torch.device) -> None:
    transport = TwoSided(None, 1.0)
    rows = torch.randn(1000, 64, device=alone)
    inbox = transport.inbox(1000, 1000, (64,), rows)
    warm_up = torch.cuda.Stream(alone)
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            transport.all_gather(OutgoingRows(rows), inbox).wait()
    torch.cuda.current_stream().wait_stream(warm_up)
    asked = Asked(torch.cuda.current_stream().record_event())
    transport.waits._watchdog.watch(None, asked, lambda: None)  # type: ignore[attr-defined]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = asked.times
        transport.all_gather(OutgoingRows(rows), inbox).wait()
        time.sleep(0.5)
        assert asked.times > before, "the watchdog was to look meanwhile"
    inbox.rows.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(inbox.rows, rows)
