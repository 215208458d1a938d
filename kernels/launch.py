"""The Triton implementation of attention: one launch a pass over all ranges.

Shapes: T local rows, R received rows, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
from torch import Tensor

from flashcp.kernels.backward_kv import backward_kv_kernel
from flashcp.kernels.backward_q import backward_q_kernel
from flashcp.kernels.backward_rows import ROWS, backward_rows_kernel
from flashcp.kernels.forward import forward_kernel
from flashcp.kernels.interface import KV, AttentionKernel, Gradients, OnReceived, WaitFlags
from flashcp.kernels.intervals import interval_key_tiles, interval_query_tiles
from flashcp.kernels.one_sided import spins
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.tiles import Tiles, key_tiles, query_tiles
from flashcp.kernels.tuning import HEAD_DIMS, HOPPER_GAIN, Blocks, Pass, Tuning, architecture, choose, tile_heads
from flashcp.kernels.uploads import Uploaded, to_device

_LOG2E = 1.4426950408889634


MARGIN = 2
"""Multiprocessors that a kernel which waits for rows leaves free. Copy engines and stream memory operations, which
bring and announce the rows, need none; copies within one device may be kernels, and so may what others do beside us."""
HOPPER_ROWS = 128
"""Query rows of a tile of the forward on Hopper."""
PROGRAMS_PER_SM = {8: 1, 4: 2}
"""By warps: the kernels take up to 255 registers a thread, of the 65,536 that a multiprocessor has."""
_INTERPRETED = 3  # programs of a small grid under the interpreter, which runs them one after another


class _Prepared(NamedTuple):
    """What a launch needs beside the tensors: block shapes, query heads of a query tile, the tile tables on the device,
    whether they are those of a schedule with masks,
    local and received rows that tiles cover, how many tiles are of the first kind, which waits for nobody (query tiles)
    or is of received rows (key tiles), whether several documents share a tile of the other kind or, of query tiles, of
    any, whether the kernel is Hopper's own, and what came to the device last, for other streams to wait for."""

    blocks: Blocks
    heads: int
    tables: tuple[Tensor, Tensor, Tensor]
    intervals: bool
    rows: tuple[int, int]
    first_kind: int
    shared: bool
    on_hopper: bool
    uploaded: Uploaded

    def parts(self) -> tuple[_Prepared, _Prepared]:
        """Key tiles of received rows, which no documents share, and those of local rows."""
        table, ranges, reach = self.tables
        received, local = table[: self.first_kind], table[self.first_kind :]
        return (
            self._replace(tables=(received, ranges, reach), shared=False),
            self._replace(tables=(local, ranges, reach), first_kind=0),
        )


class TritonAttention(AttentionKernel):
    """Attention by the kernels of this folder. tuning: block shapes that replace the table's (`kernels/tuning.py`).
    asked: whether the user named it, else masks, softcap and values of another head_dim are refused on a GPU: they were
    compiled for GPUs and never ran on one.

    The tables of a schedule are built once per pass and live as long as the schedule does.
    """

    own_v_dim = True

    def __init__(self, tuning: Tuning | None = None, asked: bool = True) -> None:
        self.tuning, self.asked = tuning or Tuning(), asked
        self._prepared: WeakKeyDictionary[Schedule, dict[tuple[object, ...], _Prepared]] = WeakKeyDictionary()
        self._halves: WeakKeyDictionary[Schedule, tuple[Schedule | None, Schedule | None]] = WeakKeyDictionary()

    def merge_into(
        self,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        softcap: float = 0.0,
    ) -> None:
        prepared = self._prepare(Pass.FORWARD, schedule, q, local, softcap)
        self._forward(prepared, q, local, received, _numbers(scale, softcap), out, lse, merge=True)

    def attend(
        self,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        flags: WaitFlags | None = None,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """One launch for all ranges, nothing in memory but the results."""
        prepared = self._prepare(Pass.FORWARD, schedule, q, local, softcap, by_source=flags is not None)
        out = _empty((*q.shape[:2], local.v.shape[2]), q.dtype, q.device, prepared.rows[0] == len(q))
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        self._forward(prepared, q, local, received, _numbers(scale, softcap), out, lse, merge=False, flags=flags)
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
        on_received: OnReceived | None = None,
        received_dtype: torch.dtype = torch.float32,
        softcap: float = 0.0,
    ) -> Gradients:
        """Three launches whatever the schedule, four with `on_received`, and one more behind each over tiles that
        documents share. In any order on Hopper: one, two with `on_received`, and the former for short documents."""
        in_any_order, rest = self._split(schedule, q, local, received, grad_out, softcap)
        kinds = [(part, any_order) for part, any_order in ((in_any_order, True), (rest, False)) if part is not None]
        keys = [
            self._prepare(Pass.BACKWARD_KV, part, q, local, softcap, any_order=any_order) for part, any_order in kinds
        ]
        row_terms = _row_terms(out, grad_out, lse, schedule.seen is not None)
        scales = _numbers(scale, softcap)
        inputs = (q, *local, *received, grad_out, *row_terms)
        strides = (*_strides(q, *local, *received, grad_out), row_terms.stride(1))

        dtype, device = local_dtype or local.k.dtype, q.device
        filled = [sum(prepared.rows[place] for prepared in keys) for place in (0, 1)]
        grad_local = KV(*(_empty(x.shape, dtype, device, filled[0] == len(x)) for x in local))
        dims = [x.shape[2] for x in received]
        shape = (len(received.k), 2, received.k.shape[1], max(dims))
        grad_received = _empty(shape, received_dtype, device, filled[1] == shape[0] and dims[0] == dims[1])
        outputs = (*grad_local, *grad_received.unbind(1))
        sums_q = None if in_any_order is None else torch.zeros(q.shape, dtype=torch.float32, device=device)

        def of_keys(prepared: _Prepared) -> None:
            if prepared.on_hopper:
                from flashcp.kernels.hopper_backward import launch_hopper_backward

                assert sums_q is not None
                prepared.uploaded.here()
                with torch.cuda.device_of(q):
                    launch_hopper_backward(
                        q, local, received, grad_out, row_terms, sums_q, outputs, prepared.tables, scale * _LOG2E
                    )
            else:
                numbers = (*scales, *strides, *_strides(*outputs))
                _launch(backward_kv_kernel, prepared, q, local, local.k.shape[1], (*inputs, *outputs), numbers)

        if on_received is None:
            for prepared in keys:
                of_keys(prepared)
        else:
            for prepared in keys:
                of_keys(prepared.parts()[0])
            on_received(grad_received)
            for prepared in keys:
                of_keys(prepared.parts()[1])

        queries = None if rest is None else self._prepare(Pass.BACKWARD_Q, rest, q, local, softcap)
        if sums_q is not None:
            grad_q = sums_q.mul_(scale).to(q.dtype)  # the rows of short documents are written next
        else:
            grad_q = _empty(q.shape, q.dtype, device, queries is None or queries.rows[0] == len(q))
        if queries is not None:
            numbers = (*scales, *strides, *_strides(grad_q))
            _launch(backward_q_kernel, queries, q, local, q.shape[1], (*inputs, grad_q), numbers)
        return Gradients(grad_q, grad_local, grad_received)

    def _split(
        self, schedule: Schedule, q: Tensor, local: KV, received: KV, grad_out: Tensor, softcap: float
    ) -> tuple[Schedule | None, Schedule | None]:
        """What Hopper's one backward kernel computes, and what the two portable ones do: short documents, several of
        which share a tile there, or all of it."""
        tuning = self.tuning
        portable = tuning.deterministic or tuning.backward_kv or tuning.backward_q
        if portable or not _is_hopper(q, local, schedule, softcap):
            return None, schedule
        from flashcp.kernels.hopper_backward import BLOCK_N, takes

        if not takes(q, local, received, grad_out):
            return None, schedule
        if schedule not in self._halves:
            lone = schedule.lone(BLOCK_N // 2)
            parts = [schedule.take(which) if which.any() else None for which in (~lone, lone)]
            self._halves[schedule] = parts[0], parts[1]
        return self._halves[schedule]

    def _forward(
        self,
        prepared: _Prepared,
        q: Tensor,
        local: KV,
        received: KV,
        scales: tuple[float, float | None],
        out: Tensor,
        lse: Tensor,
        merge: bool,
        flags: WaitFlags | None = None,
    ) -> None:
        tensors, strides = (q, *local, *received, out, lse), (*_strides(q, *local, *received, out), lse.stride(0))
        waits = None if flags is None else (*flags[:3], spins(q.device, flags.timeout_s))
        first = None
        if prepared.on_hopper:
            from flashcp.kernels.hopper import launch_hopper_forward

            first = partial(
                launch_hopper_forward, q, local, received, out, lse, prepared.tables, scale=scales[0], merge=merge
            )
        numbers = (*scales, *strides)
        _launch(forward_kernel, prepared, q, local, q.shape[1], tensors, numbers, waits, first, MERGE=merge)

    def _prepare(
        self,
        which: Pass,
        schedule: Schedule,
        q: Tensor,
        local: KV,
        softcap: float,
        by_source: bool = False,
        any_order: bool = False,
    ) -> _Prepared:
        """any_order: for the one backward kernel on Hopper."""
        if q.device.type == "cpu" and q.dtype is torch.bfloat16:
            raise ValueError(
                "q is torch.bfloat16 on the CPU, where Triton's interpreter computes it wrongly: expected "
                "torch.float32 or torch.float16, or attention='cpu'"
            )
        intervals = schedule.seen is not None
        if not self.asked and q.device.type != "cpu" and not _is_plain(q, local, schedule, softcap):
            raise ValueError(
                "attention='auto' with masks, softcap, another head_dim of v or one beyond 256 on a GPU, where they "
                "never ran: expected attention='triton'"
            )
        kept = self._prepared.setdefault(schedule, {})
        group = q.shape[1] // local.k.shape[1]
        kind = which, softcap != 0, by_source, any_order
        key = (*kind, len(q), group, q.shape[2], local.v.shape[2], q.dtype, q.device)
        if key not in kept:
            blocks, heads, on_hopper = self._shape(which, schedule, q, local, softcap, by_source, any_order)
            if which is not Pass.BACKWARD_KV:
                make_queries = interval_query_tiles if intervals else query_tiles
                tiles = make_queries(schedule, len(q), blocks.tile_rows(which) // heads, by_source)
            elif intervals:
                tiles = interval_key_tiles(schedule, len(q), blocks.tile_rows(which))
            else:
                tiles = key_tiles(schedule, len(q), blocks.tile_rows(which), share=not any_order)
            table, ranges = (to_device(x, q.device) for x in (tiles.table, tiles.ranges))
            uploaded = Uploaded(tiles.reach, q.device)  # the last: what waits for it waits for all
            first_kind = int(np.count_nonzero(tiles.table[:, 0])) if which is Pass.BACKWARD_KV else tiles.ready
            on_hopper = on_hopper and _no_empty_tiles(tiles)
            assert on_hopper or not any_order, "keys that no query reads: dQ would lack what the other kernel adds"
            kept[key] = _Prepared(
                blocks,
                heads,
                (table, ranges, uploaded.here()),
                intervals,
                tiles.rows,
                first_kind,
                tiles.shared,
                on_hopper,
                uploaded,
            )
        return kept[key]

    def _shape(
        self,
        which: Pass,
        schedule: Schedule,
        q: Tensor,
        local: KV,
        softcap: float,
        by_source: bool,
        any_order: bool,
    ) -> tuple[Blocks, int, bool]:
        """Block shapes, heads of a query tile, and whether a kernel of Hopper's own may take them."""
        if any_order:
            from flashcp.kernels.hopper_backward import BLOCK_M, BLOCK_N

            return Blocks(BLOCK_M, BLOCK_N, 4, 2), 1, True
        forward = which is Pass.FORWARD and not by_source and self.tuning.forward is None
        forward = forward and _is_hopper(q, local, schedule, softcap)
        gain = HOPPER_GAIN if forward else 1.0
        group, head_dim = q.shape[1] // local.k.shape[1], max(q.shape[2], local.v.shape[2])
        blocks = self.tuning.of(which) or choose(
            which, architecture(q.device), head_dim, q.dtype, schedule, group, gain
        )
        heads = tile_heads(which, blocks, schedule, group, gain if blocks.block_m == HOPPER_ROWS else 1.0)
        return blocks, heads, forward and heads == 1 and blocks.block_m == HOPPER_ROWS


def _is_plain(q: Tensor, local: KV, schedule: Schedule, softcap: float) -> bool:
    """Whether documents are causal, without softcap and of one head_dim that is not too wide: what ran on GPUs, and
    what Hopper knows."""
    return schedule.seen is None and not softcap and local.v.shape[2] == q.shape[2] <= HEAD_DIMS[-1]


def _is_hopper(q: Tensor, local: KV, schedule: Schedule, softcap: float) -> bool:
    return _is_plain(q, local, schedule, softcap) and architecture(q.device) == "sm_90" and _hopper_takes(q)


def _numbers(scale: float, softcap: float) -> tuple[float, float | None]:
    """`scale` and `soften` as the kernels take them: scores are powers of two, tanh is made of one (`squash`)."""
    return (softcap * _LOG2E, 2.0 * _LOG2E * scale / softcap) if softcap else (scale * _LOG2E, None)


def _hopper_takes(q: Tensor) -> bool:
    """Whether the kernels on Hopper were made for such queries, and triton has what they are written in."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[2] not in (64, 128):
        return False
    try:
        from flashcp.kernels import hopper  # noqa: F401  (Gluon is imported where there is a Hopper)
    except (ImportError, AttributeError) as error:  # Gluon is experimental: names come and go
        warnings.warn(
            f"the portable forward runs on this Hopper, for triton's Gluon has changed: {error}", stacklevel=2
        )
        return False
    return True


def _no_empty_tiles(tiles: Tiles) -> bool:
    """Whether each tile reads a row: on Hopper one of no blocks would wait for its first for ever."""
    ranges_there = (tiles.table[:, 3] < tiles.table[:, 4]).all()
    return bool(ranges_there and (tiles.ranges[:, 1] < tiles.ranges[:, 2]).all())


def _row_terms(out: Tensor, grad_out: Tensor, lse: Tensor, intervals: bool) -> Tensor:
    """What `backward_rows_kernel` makes, [2, H, T padded]; padded, for new lengths to compile nothing new."""
    rows, heads, head_dim = out.shape
    blocks = triton.cdiv(rows, ROWS)
    terms = torch.empty((2, heads, blocks * ROWS), dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        if blocks:
            backward_rows_kernel[(blocks, heads)](
                out, grad_out, lse, *terms, rows, *_strides(out, grad_out), lse.stride(0), blocks * ROWS,
                HEAD_DIM=head_dim, BLOCK_M=ROWS, INTERVALS=intervals,
            )  # fmt: skip
    return terms


def _launch(
    kernel: Any,
    prepared: _Prepared,
    q: Tensor,
    local: KV,
    heads: int,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float | None, ...],
    waits: tuple[Any, ...] | None = None,
    first: Callable[[Tensor], bool] | None = None,
    **constants: bool,
) -> None:
    """One program per tile and its heads. Tiles run fastest: programs side by side find one head's KV in the cache.

    Where programs wait, as many as fit beside each other share the tiles, and some of the device stays free.
    first: a launch in the place of the first one, if it returns that it could; it notes tiles in what it is given.
    """
    tiles, blocks = len(prepared.tables[0]), prepared.blocks
    if tiles == 0:
        return
    # Where no documents share a tile nothing is noted, and any int32 will do.
    mixed = q.new_zeros(1 + tiles * heads, dtype=torch.int32) if prepared.shared else prepared.tables[1]
    programs = tiles, heads // prepared.heads
    few = (min(tiles * programs[1], _room(q.device, blocks.warps)),)
    forward = kernel is forward_kernel

    def start(grid: tuple[int, ...], waits: tuple[Any, ...] | None, apart: bool) -> None:
        counts = (tiles, prepared.first_kind, heads, *(waits or (None, 0, None, 0))) if forward else (tiles, heads)
        fused = {"FUSED": waits is not None} if forward else {}
        together = {} if kernel is backward_kv_kernel else {"TILE_HEADS": prepared.heads}
        kernel[grid](
            *tensors, *prepared.tables, mixed, *numbers, *counts, GROUP=q.shape[1] // local.k.shape[1],
            HEAD_DIM=q.shape[2], V_DIM=local.v.shape[2], BLOCK_M=blocks.block_m, BLOCK_N=blocks.block_n,
            PRECISION=blocks.precision, APART=apart, INTERVALS=prepared.intervals, **fused, **together, **constants,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        prepared.uploaded.here()
        if first is None or not first(mixed):
            start(programs if waits is None else few, waits, False)
        if prepared.shared:
            start(few, None, True)


def _room(device: torch.device, warps: int) -> int:
    """Programs that run at the same time and leave `MARGIN` multiprocessors free."""
    if device.type == "cpu":
        return _INTERPRETED
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, processors - MARGIN) * PROGRAMS_PER_SM.get(warps, 1)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, filled: bool) -> Tensor:
    """A tensor for results; zeros where the tiles do not fill all of it."""
    return (torch.empty if filled else torch.zeros)(tuple(shape), dtype=dtype, device=device)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])
