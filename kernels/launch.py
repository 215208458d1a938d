"""The Triton implementation of attention: the interface of `kernels/cpu.py`, one launch a pass over all ranges.

Shapes: T local rows, R received rows, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from flashcp.kernels.arrivals import Arrivals
from flashcp.kernels.backward_kv import backward_kv_kernel
from flashcp.kernels.backward_q import backward_q_kernel
from flashcp.kernels.backward_rows import ROWS, backward_rows_kernel
from flashcp.kernels.cpu import KV, Gradients
from flashcp.kernels.forward import forward_kernel
from flashcp.kernels.one_sided import spins
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.tiles import key_tiles, query_tiles
from flashcp.kernels.tuning import Blocks, Pass, Tuning, architecture, choose, padded
from flashcp.kernels.uploads import to_device

__all__ = ["TritonAttention"]

_LOG2E = 1.4426950408889634


class _Prepared(NamedTuple):
    """What a launch needs beside the tensors: block shapes, the tile tables on the device, rows that tiles cover, and
    which tile is the first one after those of the first kind: tiles that wait for nobody (query tiles), of received
    rows (key tiles)."""

    blocks: Blocks
    tables: tuple[Tensor, Tensor, Tensor]
    local_rows: int
    received_rows: int
    second_kind: int

    def tiles(self, start: int, stop: int) -> _Prepared:
        """Some of the tiles alone."""
        table, ranges, reach = self.tables
        return self._replace(tables=(table[start:stop], ranges, reach))


class TritonAttention:
    """Attention by the kernels of this folder. tuning: block shapes that replace the table's (`kernels/tuning.py`).

    The tables of a schedule are built once per pass and live as long as the schedule does.
    """

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.tuning = tuning or Tuning()
        self._prepared: WeakKeyDictionary[Schedule, dict[tuple[object, ...], _Prepared]] = WeakKeyDictionary()

    def forward(
        self, q: Tensor, local: KV, received: KV, schedule: Schedule, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """See `kernels/cpu.py`."""
        prepared = self._prepare(Pass.FORWARD, schedule, q)
        self._forward(prepared, q, local, received, scale, out, lse, merge=True)

    def attend(
        self, q: Tensor, local: KV, received: KV, schedule: Schedule, scale: float, arrivals: Arrivals | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `kernels/cpu.py`. One launch (more if `arrivals` caps it), nothing in memory but the results."""
        prepared = self._prepare(Pass.FORWARD, schedule, q, by_source=arrivals is not None)
        out = _empty(q.shape, q.dtype, q.device, prepared.local_rows == len(q))
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for launch in _launches(prepared, q.shape[1], arrivals):
            self._forward(launch, q, local, received, scale, out, lse, merge=False, arrivals=arrivals)
        return out, lse

    def gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        out: Tensor,
        lse: Tensor,
        schedule: Schedule,
        scale: float,
        local_dtype: torch.dtype | None = None,
        leave: Callable[[Tensor], None] | None = None,
    ) -> Gradients:
        """See `kernels/cpu.py`. Three launches whatever the schedule, four when `leave` is to be called."""
        log_sum, delta = _row_terms(out, grad_out, lse, scale)
        inputs = (q, *local, *received, grad_out, log_sum, delta)
        strides = (*_strides(q, *local, *received, grad_out), log_sum.stride(0))

        keys = self._prepare(Pass.BACKWARD_KV, schedule, q)
        dtype = local_dtype or local.k.dtype
        grad_local = KV(*(_empty(x.shape, dtype, q.device, keys.local_rows == len(x)) for x in local))
        shape = (len(received.k), 2, *received.k.shape[1:])
        back = _empty(shape, torch.float32, q.device, keys.received_rows == shape[0])
        outputs = (*grad_local, *back.unbind(1))

        def scatter(part: _Prepared) -> None:
            arguments = (*inputs, *outputs, *part.tables, scale * _LOG2E, *strides, *_strides(*outputs))
            _launch(backward_kv_kernel, part, q, local, local.k.shape[1], arguments)

        if leave is None:
            scatter(keys)
        else:
            scatter(keys.tiles(0, keys.second_kind))
            leave(back)
            scatter(keys.tiles(keys.second_kind, len(keys.tables[0])))

        queries = self._prepare(Pass.BACKWARD_Q, schedule, q)
        grad_q = _empty(q.shape, q.dtype, q.device, queries.local_rows == len(q))
        arguments = (*inputs, grad_q, *queries.tables, scale * _LOG2E, *strides, *_strides(grad_q))
        _launch(backward_q_kernel, queries, q, local, q.shape[1], arguments)
        return Gradients(grad_q, grad_local, back)

    def _forward(
        self,
        prepared: _Prepared,
        q: Tensor,
        local: KV,
        received: KV,
        scale: float,
        out: Tensor,
        lse: Tensor,
        merge: bool,
        arrivals: Arrivals | None = None,
    ) -> None:
        tensors = (q, *local, *received, out, lse, *prepared.tables)
        strides = (*_strides(q, *local, *received, out), lse.stride(0))
        waits = (None, 0, None, 0) if arrivals is None else (*arrivals[:3], spins(q.device, arrivals.timeout_s))
        arguments = (*tensors, scale * _LOG2E, *strides, *waits)
        _launch(forward_kernel, prepared, q, local, q.shape[1], arguments, MERGE=merge, FUSED=arrivals is not None)

    def _prepare(self, which: Pass, schedule: Schedule, q: Tensor, by_source: bool = False) -> _Prepared:
        kept = self._prepared.setdefault(schedule, {})
        key = (which, by_source, len(q), q.shape[2], q.dtype, q.device)
        if key not in kept:
            blocks = self.tuning.of(which) or choose(which, architecture(q.device), q.shape[2], q.dtype, schedule)
            make = key_tiles if which is Pass.BACKWARD_KV else partial(query_tiles, by_source=by_source)
            tiles = make(schedule, len(q), blocks.tile_rows(which))
            table, ranges, reach = (to_device(x, q.device) for x in (tiles.table, tiles.ranges, tiles.reach))
            second_kind = int(tiles.table[:, 0].sum()) if which is Pass.BACKWARD_KV else tiles.ready
            kept[key] = _Prepared(blocks, (table, ranges, reach), *tiles.rows, second_kind)
        return kept[key]


def _launches(prepared: _Prepared, heads: int, arrivals: Arrivals | None) -> Iterator[_Prepared]:
    """All tiles at once, or those that wait for nobody first and behind them as many of the others as may wait."""
    if arrivals is None or arrivals.programs is None:
        yield prepared
        return
    count = len(prepared.tables[0])
    for start, stop in pairwise([0, *range(prepared.second_kind, count, max(1, arrivals.programs // heads)), count]):
        yield prepared.tiles(start, stop)


def _row_terms(out: Tensor, grad_out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """log_sum and delta of `backward_rows_kernel`, [2, H, T padded]; padded, for new lengths to compile nothing new."""
    rows, heads, head_dim = out.shape
    blocks = triton.cdiv(rows, ROWS)
    terms = torch.empty((2, heads, blocks * ROWS), dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        if blocks:
            backward_rows_kernel[(blocks, heads)](
                out, grad_out, lse, *terms, scale, rows, *_strides(out, grad_out), lse.stride(0), blocks * ROWS,
                HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=ROWS,
            )  # fmt: skip
    return terms


def _launch(
    kernel: Any,
    prepared: _Prepared,
    q: Tensor,
    local: KV,
    heads: int,
    arguments: tuple[object, ...],
    **constants: bool,
) -> None:
    """One program per tile and head. Tiles run fastest: programs side by side find one head's KV in the cache."""
    tiles, blocks, head_dim = len(prepared.tables[0]), prepared.blocks, q.shape[2]
    if tiles == 0:
        return
    with torch.cuda.device_of(q):
        kernel[(tiles, heads)](
            *arguments, GROUP=q.shape[1] // local.k.shape[1], HEAD_DIM=head_dim, BLOCK_D=padded(head_dim),
            BLOCK_M=blocks.block_m, BLOCK_N=blocks.block_n, PRECISION=blocks.precision, **constants,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, filled: bool) -> Tensor:
    """A tensor for results; zeros where the tiles do not fill all of it."""
    return (torch.empty if filled else torch.zeros)(tuple(shape), dtype=dtype, device=device)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])
