"""Launches of the one-sided kernels: rows between this rank's tensors and the symmetric heaps, signals, waits.

A rank's flags for one purpose are int32 [N] somewhere in its heap, one for each rank that raises it. All launches are
ordered by the current stream, and none makes the host wait.

Shapes: T rows of a tensor, S rows that travel, N ranks, H heads, D head_dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashcp.kernels.arrivals import Arrivals
from flashcp.kernels.one_sided import get_rows_kernel, put_rows_kernel, signal_kernel, wait_kernel
from flashcp.kernels.tuning import padded
from flashcp.sharding.documents import expand_ranges

__all__ = ["BLOCK_ROWS", "WARPS", "Moves", "Region", "get", "make_moves", "put", "signal", "spins", "wait"]

BLOCK_ROWS, WARPS = 32, 4  # of a program that moves rows
_LONGEST = 2**31 - 1


class Moves(NamedTuple):
    """Which rows travel, on the device, all int32.

    rows [S]: where they come from, local rows for a put, rows of the source's region for a get. blocks [B, 4]: (the
    other rank, first and past-last entry of `rows`, first row where they land); taken in this order. expected [N]:
    blocks that are counted until a rank is signalled.
    """

    rows: Tensor
    blocks: Tensor
    expected: Tensor


class Region(NamedTuple):
    """Where rows lie in the heaps. bases: int64 [N], on the device. rank: this one. offset: bytes from a heap's base to
    the first row, a multiple of 16, the same on every rank. row: elements from row to row."""

    bases: Tensor
    rank: int
    offset: int
    row: int


def make_moves(
    rows: np.ndarray,
    rank: np.ndarray,
    count: np.ndarray,
    at: np.ndarray,
    world_size: int,
    device: torch.device,
    tensors: int = 1,
) -> Moves:
    """Rows piece by piece: the next count[i] of `rows` go to, or come from, rank[i] and land from row at[i] on.

    tensors: launches over these moves that make up one signal (2 where keys and values leave apart).
    """
    first = np.cumsum(count) - count
    blocks = -(-count // BLOCK_ROWS)
    piece = np.repeat(np.arange(len(count)), blocks)
    skipped = BLOCK_ROWS * expand_ranges(np.zeros_like(blocks), blocks)
    start = first[piece] + skipped
    stop = np.minimum(start + BLOCK_ROWS, (first + count)[piece])
    table = np.stack((rank[piece], start, stop, at[piece] + skipped), axis=1)
    expected = tensors * np.bincount(rank[piece], minlength=world_size)
    return Moves(*(torch.from_numpy(x.astype(np.int32)).to(device) for x in (rows, table, expected)))


def put(
    x: Tensor,
    moves: Moves,
    into: Region,
    signals: int,
    epoch: int,
    clear: Arrivals,
    done: Tensor,
    programs: int | None = None,
) -> None:
    """Rows of x [T, H, D], consecutive along D, into the regions of other ranks, H * D elements on end each, and then a
    signal to each.

    signals: offset in bytes of the flags that say "rows have come", raised to `epoch` on every rank that gets any, when
    all of its rows are there. clear: flags of this rank that say "you may write here"; a rank's region is written when
    its flag is at `clear.epoch`. done: int32 [N], zeros, for launches that do not overlap to count in; worth nothing
    after a time-out. programs: how many run at a time, to leave room beside them; None: as many as there are blocks.
    """
    _move(put_rows_kernel, x, moves, into, (signals,), epoch, clear, done, programs)


def get(
    x: Tensor,
    moves: Moves,
    source: Region,
    signals: int,
    arrived: int,
    epoch: int,
    ready: Arrivals,
    done: Tensor,
    programs: int | None = None,
) -> None:
    """Rows of other ranks' regions into x [T, H, D], and then two signals for each rank that rows came from.

    ready: flags of this rank that say "my rows are there"; a rank's are read when its flag is at `ready.epoch`. When
    all of a rank's rows are in x, this rank's own flag for it at `arrived` is raised to `epoch`, and at `signals`, on
    that rank, the one that says "I have read". The rest is as in `put`.
    """
    _move(get_rows_kernel, x, moves, source, (signals, arrived), epoch, ready, done, programs)


def signal(ranks: Tensor, bases: Tensor, rank: int, signals: int, epoch: int) -> None:
    """Raise this rank's flag at `signals` on ranks [n], int32, when all launched before on this stream is done."""
    if len(ranks):
        with torch.cuda.device_of(ranks):
            signal_kernel[(len(ranks),)](bases, ranks, signals, rank, epoch, num_warps=WARPS)


def wait(sources: Tensor, arrivals: Arrivals) -> None:
    """Let nothing launched after this on the stream begin before the rows of sources [n], int32, are here."""
    with torch.cuda.device_of(sources):
        _wait(sources, arrivals, spins(sources.device, arrivals.timeout_s))


def spins(device: torch.device, timeout_s: float) -> int:
    """How often a waiting kernel looks at a flag in so many seconds. Measured in the first call, which makes the host
    wait for the device."""
    return min(_LONGEST, max(1, round(timeout_s * _spins_per_s(device))))


def _move(
    kernel: Any,
    x: Tensor,
    moves: Moves,
    region: Region,
    signals: Sequence[int],
    epoch: int,
    waits: Arrivals,
    done: Tensor,
    programs: int | None,
) -> None:
    blocks, (_, heads, head_dim) = len(moves.blocks), x.shape
    if blocks == 0:
        return
    with torch.cuda.device_of(x):
        kernel[(min(blocks, programs or blocks),)](
            x, moves.rows, moves.blocks, blocks, moves.expected, done, region.bases, region.offset, region.row,
            *signals, region.rank, epoch, *waits[:3], spins(x.device, waits.timeout_s), heads, *x.stride()[:2],
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_ROWS=BLOCK_ROWS, num_warps=WARPS,
        )  # fmt: skip


def _wait(sources: Tensor, arrivals: Arrivals, looks: int) -> None:
    wait_kernel[(1,)](arrivals.flags, sources, len(sources), *arrivals[1:3], looks, num_warps=WARPS)


@lru_cache
def _spins_per_s(device: torch.device) -> float:
    """Looks a second at a flag that never rises: the fastest of three waits of 10 ms and more.

    Under the interpreter a second is one of this process's own: beside busy neighbours time-outs last longer, not less.
    """
    source, flag = torch.zeros((2, 1), dtype=torch.int32, device=device)
    looks, rates = 1, list[float]()
    while len(rates) < 3:
        arrivals = Arrivals(flag, 1, torch.zeros_like(flag), 0.0)
        start = _now(device)
        _wait(source, arrivals, looks)
        took = _now(device) - start
        if took < 0.01:
            looks *= 4
        else:
            rates.append(looks / took)
    return max(rates)


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
