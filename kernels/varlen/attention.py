"""Attention by a varlen kernel of somebody else's: `AttentionKernel` over any `VarlenKernel`.

Shapes: T local rows, R received rows, Q query rows and N key rows of one call, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from flashcp.kernels.cpu import merge
from flashcp.kernels.interface import KV, AttentionKernel, Gradients, OnReceived, WaitFlags
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.uploads import Uploaded
from flashcp.kernels.varlen.base import Sequences, VarlenKernel, aligned
from flashcp.kernels.varlen.calls import Call, Rows, varlen_calls
from flashcp.sharding.masks import Masks


class VarlenAttention(AttentionKernel):
    """Attention by the calls of `varlen_calls`. Their tables are built once and live as long as the schedule does.

    Partial outputs and gradients come from the kernel in the model's dtype; what several calls contribute to the same
    row is merged and added in fp32, in a fixed order.
    gathered_bytes: what all calls so far have copied so that rows lie one behind the other, and as the kernel wants.
    """

    def __init__(self, kernel: VarlenKernel) -> None:
        self.kernel = kernel
        self.gathered_bytes = 0
        self._prepared: WeakKeyDictionary[Schedule, dict[torch.device, list[_Prepared]]] = WeakKeyDictionary()

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
        self._check(q, softcap)
        for call in self._calls(schedule, q.device):
            part, part_lse = self._run(call, q, (local, received)[call.received], scale, softcap)
            call.queries.merge(out, lse, part, part_lse)

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
        """Where one call computes all rows its results are taken as they are.

        Raises ValueError when rows are still on their way: such a kernel does not wait.
        """
        if flags is not None:
            raise ValueError(f"attention='varlen:{self.kernel.name}': expected all rows before the call, not flags")
        self._check(q, softcap)
        calls = self._calls(schedule, q.device)
        if len(calls) == 1 and calls[0].queries.are_all(len(q)):
            out, lse = self._run(calls[0], q, (local, received)[calls[0].received], scale, softcap)
            return out.contiguous(), lse.contiguous()
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        self.merge_into(out, lse, q, local, received, schedule, scale, softcap)
        return out.to(q.dtype), lse

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
        """Raises ValueError where the kernel has no backward."""
        self._check(q, softcap)
        if reason := self.kernel.no_backward():
            raise ValueError(f"attention='varlen:{self.kernel.name}' has no gradients: {reason}")
        grad_received = q.new_zeros((len(received.k), 2, *received.k.shape[1:]), dtype=torch.float32)
        grad_q, grad_k, grad_v = _Total(q), _Total(local.k), _Total(local.v)
        back_k, back_v = (_Total(x, total) for x, total in zip(received, grad_received.unbind(1), strict=True))
        calls = self._calls(schedule, q.device)
        for in_received, totals in ((True, (back_k, back_v)), (False, (grad_k, grad_v))):
            for call in (call for call in calls if call.received == in_received):
                grad_rows, q_rows, out_rows, lse_rows = self._take(call.queries, grad_out, q, out, lse)
                k_rows, v_rows = self._take(call.keys, *(received if in_received else local))
                tensors = grad_rows, q_rows, k_rows, v_rows, out_rows, lse_rows
                part, *parts = self.kernel.backward(*tensors, call.sequences, scale, softcap)
                grad_q.add(call.queries, part)
                for total, part in zip(totals, parts, strict=True):
                    total.add(call.keys, part)
            if in_received:
                grad_received = grad_received.to(received_dtype)
                if on_received is not None:
                    on_received(grad_received)
        dtype = local_dtype or local.k.dtype
        return Gradients(grad_q.read(q.dtype), KV(grad_k.read(dtype), grad_v.read(dtype)), grad_received)

    def _check(self, q: Tensor, softcap: float) -> None:
        if softcap and not self.kernel.has_softcap():
            raise ValueError(f"attention='varlen:{self.kernel.name}' with softcap={softcap}: expected none")
        self.kernel.check(q)

    def check_masks(self, masks: Masks) -> None:
        whole = masks.block_stop - masks.block_start == masks.length[masks.block_document]  # `full`
        windows = "window, " if self.kernel.has_windows() else ""
        if masks.chunk.any() or not whole.all() or (masks.window.any() and not windows):
            kinds = {"chunks": masks.chunk, "prefixes or blocks": ~whole, "windows": masks.window}
            given = next(name for name, there in kinds.items() if there.any())
            raise ValueError(
                f"attention='varlen:{self.kernel.name}' with {given}: expected {windows}full or causal documents"
            )

    def _calls(self, schedule: Schedule, device: torch.device) -> list[_Prepared]:
        if schedule.seen is not None:
            self.check_masks(schedule.seen.masks)
        kept = self._prepared.setdefault(schedule, {})
        if device not in kept:
            kept[device] = [_Prepared(call, device) for call in varlen_calls(schedule)]
        return kept[device]

    def _run(self, call: _Prepared, q: Tensor, buffer: KV, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        (queries,) = self._take(call.queries, q)
        k, v = self._take(call.keys, *buffer)
        out, lse = self.kernel.forward(queries, k, v, call.sequences, scale, softcap)
        if lse.shape != queries.shape[:2] or lse.dtype != torch.float32:
            raise RuntimeError(
                f"attention='varlen:{self.kernel.name}' gave a log-sum-exp {lse.dtype} {list(lse.shape)}: expected "
                f"torch.float32 {list(queries.shape[:2])}"
            )
        return out, lse

    def _take(self, rows: _Placed, *tensors: Tensor) -> list[Tensor]:
        """The rows of each tensor, as the kernel wants them to lie; copies are counted."""
        taken = []
        for x in tensors:
            where_they_lie = rows.of(x)
            part = aligned(where_they_lie, self.kernel.alignment_bytes) if x.dim() == 3 else where_they_lie
            if rows.as_slice is None or part is not where_they_lie:
                self.gathered_bytes += part.numel() * part.element_size()
            taken.append(part)
        return taken


class _Placed:
    """Rows of a call on the device: a slice where they lie one behind the other, else an index."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.as_slice = rows.as_slice
        self._turns: list[tuple[Uploaded | None, Uploaded]] = []
        if self.as_slice is None:
            for places, belongs in rows.turns:
                where = None if places is None else Uploaded(places, device)
                self._turns.append((where, Uploaded(belongs, device)))
            self._index = self._turns[0][1] if len(self._turns) == 1 else Uploaded(rows.index, device)

    def of(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._index.here()) if self.as_slice is None else x[self.as_slice]

    def are_all(self, rows: int) -> bool:
        return self.as_slice == slice(0, rows)

    def merge(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """Merge a part's results into fp32 out and lse. The rows come once each."""
        mine, mine_lse = self.of(out), self.of(lse)
        merge(mine, mine_lse, part, part_lse)
        if self.as_slice is None:
            out.index_copy_(0, self._index.here(), mine)
            lse.index_copy_(0, self._index.here(), mine_lse)

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """Add a part to fp32 rows, turn after turn: within one every row comes once, so that the order is fixed."""
        if self.as_slice is not None:
            total[self.as_slice] += part
        for places, belongs in self._turns:
            some = part if places is None else part.index_select(0, places.here())
            total.index_add_(0, belongs.here(), some.float())


class _Prepared:
    """A call with its tables on the device."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self.received = call.received
        self.queries = _Placed(call.queries, device)
        self.keys = _Placed(call.keys, device)
        self._queries = Uploaded(_cumulative(call.query_lengths), device)
        self._keys = self._queries if call.causal else Uploaded(_cumulative(call.key_lengths), device)
        self._rest = int(call.query_lengths.max()), int(call.key_lengths.max()), call.causal, call.left

    @property
    def sequences(self) -> Sequences:
        return Sequences(self._queries.here(), self._keys.here(), *self._rest)


class _Total:
    """The sum of what calls contribute to the gradient of x, in fp32; a single part that fills it is taken as it is."""

    def __init__(self, x: Tensor, total: Tensor | None = None) -> None:
        self._x, self._total = x, total

    def add(self, rows: _Placed, part: Tensor) -> None:
        if self._total is None and rows.are_all(len(self._x)):
            self._total = part
            return
        if self._total is None:
            self._total = torch.zeros_like(self._x, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._total = self._total.float()
        rows.add_to(self._total, part)

    def read(self, dtype: torch.dtype) -> Tensor:
        if self._total is None:
            return torch.zeros_like(self._x, dtype=dtype, memory_format=torch.contiguous_format)
        return self._total.to(dtype).contiguous()


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
