"""How long rows take from rank to rank, within a rank's memory, and through a matrix product: measured here."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["copy_us", "gemm_tflops", "link_us", "median_us", "own_clock"]

TIMEOUT = timedelta(seconds=120)


def median_us(
    work: Callable[[], object],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median time of a piece of work, after once to warm up."""
    times = []
    for _ in range(repeats + 1):
        _finish(device)
        started = clock()
        work()
        _finish(device)
        times.append(1e6 * (clock() - started))
    return float(np.median(times[1:]))


def own_clock(device: torch.device, threads: int) -> Callable[[], float]:
    """One thread's work by its own time, which others on the machine do not lengthen; else the wall's."""
    return time.thread_time if device.type == "cpu" and threads == 1 else time.perf_counter


def copy_us(
    sizes: Sequence[int], row_bytes: int, repeats: int, device: torch.device, clock: Callable[[], float]
) -> list[float]:
    """Time to gather `sizes` bytes of rows by an index, as rows are packed before they leave."""
    times = []
    for size in sizes:
        rows = max(1, size // row_bytes)
        memory = torch.randn(rows, row_bytes // 4, device=device)
        index = torch.randperm(rows, device=device)
        times.append(median_us(lambda memory=memory, index=index: memory[index], repeats, device, clock))  # type: ignore[misc]
    return times


def gemm_tflops(
    rows: int, width: int, dtype: torch.dtype, repeats: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """10^12 operations a second of a square weight times `rows` rows."""
    left, right = (torch.randn(count, width, device=device).to(dtype) for count in (rows, width))
    return 2 * rows * width * width / (1e6 * median_us(lambda: left @ right, repeats, device, clock))


def link_us(sizes: Sequence[int], repeats: int, cuda: bool) -> list[float]:
    """Time until each of two ranks of this machine has `sizes` bytes of the other: gloo, or NCCL on two GPUs."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        there, here = context.Pipe()
        arguments = (str(Path(folder) / "store"), tuple(sizes), repeats, cuda)
        ranks = [context.Process(target=_rank, args=(rank, *arguments, there), daemon=True) for rank in range(2)]
        for rank in ranks:
            rank.start()
        try:
            if not here.poll(TIMEOUT.total_seconds() * 2):
                raise TimeoutError("two ranks of this machine did not answer each other")
            times: list[float] = here.recv()
        finally:
            for rank in ranks:
                rank.join(5)
                rank.kill()
    return times


def _rank(rank: int, store: str, sizes: Sequence[int], repeats: int, cuda: bool, answer: object) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=TIMEOUT)
    times = []
    for size in sizes:
        rows, into = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        sent = [0, size] if rank == 0 else [size, 0]

        def exchange(into: torch.Tensor = into, rows: torch.Tensor = rows, sent: list[int] = sent) -> None:
            dist.all_to_all_single(into, rows, sent, sent)

        times.append(median_us(exchange, repeats, device))
    if rank == 0:
        answer.send(times)  # type: ignore[attr-defined]
    dist.barrier()
    dist.destroy_process_group()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
