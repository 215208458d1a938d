"""Attention on a CPU: a schedule step by step (`kernels/cpu_steps.py`), each by torch's own tiled operator.

No tokens x tokens matrix is ever made. Inputs are widened to fp32 range by range; partial outputs of the ranges are
merged in fp32 by their log-sum-exp, so the result does not depend on how finely a document is cut.

Shapes: T local rows, R received rows, H query heads, K KV heads, G = H / K query heads a KV head, D head_dim; B short
documents of L rows, padded.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from flashcp.kernels.cpu_operator import Visible, attend_on_cpu, gradients_on_cpu
from flashcp.kernels.cpu_steps import Batch, Seen, Tile, steps
from flashcp.kernels.interface import KV, AttentionKernel, Gradients, OnReceived, WaitFlags
from flashcp.kernels.schedule import Schedule


class CpuAttention(AttentionKernel):
    """See the module."""

    own_v_dim = True

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
        out = q.new_zeros((*q.shape[:2], local.v.shape[2]), dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        if flags is None:
            self.merge_into(out, lse, q, local, received, schedule, scale, softcap)
        else:
            self.merge_into(out, lse, q, local, received, schedule.part(~schedule.received), scale, softcap)
            for source in np.unique(schedule.source[schedule.received]).tolist():
                flags.wait(source)
                part = schedule.part(schedule.received & (schedule.source == source))
                self.merge_into(out, lse, q, local, received, part, scale, softcap)
        return out.to(q.dtype), lse

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
        group = q.shape[1] // local.k.shape[1]
        how = scale, softcap, _all_numbers(*local, *received)
        for step in steps(schedule, holds_scores=softcap > 0):
            if isinstance(step, Batch):
                batch = _Padded(step)
                k, v = (batch.shared(x, group) for x in local)
                parts = attend_on_cpu(batch.of(q), k, v, batch.mask, *how)
                rows, found = batch.rows, [batch.to_rows(x) for x in parts]
                mine = out[rows], lse[rows]
                merge(*mine, found[0], found[1])
                if isinstance(rows, Tensor):
                    out[rows], lse[rows] = mine
                continue
            q_part = by_kv_head(q[step.rows], group)
            for in_received, keys, seen in step.pieces:
                k_part, v_part = (shared(x[keys], group) for x in (received if in_received else local))
                part, part_lse = attend_on_cpu(q_part, k_part, v_part, _mask(seen, k_part), *how)
                merge(out[step.rows], lse[step.rows], to_rows(part), to_rows(part_lse))

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
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, *local))
        grad_received = q.new_zeros((len(received.k), 2, *received.k.shape[1:]), dtype=torch.float32)
        leaving = grad_received.to(received_dtype)
        group = q.shape[1] // local.k.shape[1]
        numbers = _all_numbers(grad_out, q, *local, *received, out, lse.masked_fill(lse == -torch.inf, 0.0))
        how = scale, softcap, numbers

        def add_batch(step: Batch) -> None:
            batch = _Padded(step)
            k, v = (batch.shared(x, group) for x in local)
            lse_part = batch.of(lse[..., None])[..., 0]
            tensors = batch.of(grad_out), batch.of(q), k, v, batch.of(out), lse_part
            of_q, *of_kv = gradients_on_cpu(*tensors, batch.mask, *how)
            grad_q[batch.rows] += batch.to_rows(of_q)
            for total, part in zip((grad_k, grad_v), of_kv, strict=True):
                total[batch.rows] += batch.to_rows(reduce(part, "b (k g) l d -> b k l d", "sum", g=group))

        def add_tile(tile: Tile, keys: KV, grad_keys: KV) -> None:
            rows = tile.rows
            q_part, out_part, grad_part = (by_kv_head(x[rows], group) for x in (q, out, grad_out))
            lse_part = rearrange(lse[rows], "t (k g) -> g k t", g=group)
            for _, place, seen in tile.pieces:
                k_part, v_part = (shared(x[place], group) for x in keys)
                tensors = grad_part, q_part, k_part, v_part, out_part, lse_part
                of_q, *of_kv = gradients_on_cpu(*tensors, _mask(seen, k_part), *how)
                grad_q[rows] += to_rows(of_q)
                for total, part in zip(grad_keys, of_kv, strict=True):
                    total[place] += rearrange(part.sum(0), "k t d -> t k d")

        def add_ranges(chosen: np.ndarray, keys: KV, grad_keys: KV) -> None:
            for step in steps(schedule.part(chosen), holds_scores=softcap > 0):
                if isinstance(step, Batch):
                    add_batch(step)
                elif step.pieces:
                    add_tile(step, keys, grad_keys)

        for source in _nearest_first(schedule):
            chosen = schedule.received & (schedule.source == source)
            add_ranges(chosen, received, KV(*grad_received.unbind(1)))
            rows = slice(int(schedule.row_start[chosen].min()), int(schedule.row_stop[chosen].max()))
            leaving[rows] = grad_received[rows]
            if on_received is not None:
                on_received(leaving, source)
        if on_received is not None:
            on_received(leaving)
        add_ranges(~schedule.received, local, KV(grad_k, grad_v))
        dtype = local_dtype or local.k.dtype
        return Gradients(grad_q.to(q.dtype), KV(grad_k.to(dtype), grad_v.to(dtype)), leaving)


class _Padded:
    """A batch of short documents at work: rows that pad are zeros, which nobody reads and whose gradients are zero."""

    def __init__(self, batch: Batch) -> None:
        self._shape = batch.shards, batch.length
        rows = batch.rows
        one_behind_the_other = len(rows) == rows[-1] - rows[0] + 1 and (np.diff(rows) == 1).all()
        self.rows = slice(int(rows[0]), int(rows[-1]) + 1) if one_behind_the_other else torch.from_numpy(rows)
        full = len(rows) == batch.shards * batch.length
        self._places = None if full else torch.from_numpy(batch.places)
        self.mask: bool | Visible = True
        if batch.seen is not None:
            lowest, past = (torch.from_numpy(x)[:, None] for x in batch.seen)
            self.mask = Visible.between(lowest, past, batch.length)

    def of(self, x: Tensor) -> Tensor:
        """[T, heads, D] -> fp32 [B, heads, L, D]."""
        rows = x[self.rows].float()
        if self._places is not None:
            spread = rows.new_zeros((self._shape[0] * self._shape[1], *rows.shape[1:]))
            spread[self._places] = rows
            rows = spread
        return rows.unflatten(0, self._shape).transpose(1, 2)

    def shared(self, x: Tensor, group: int) -> Tensor:
        """[T, K, D] -> fp32 [B, H, L, D]."""
        x = self.of(x)
        return x if group == 1 else repeat(x, "b k l d -> b (k g) l d", g=group)

    def to_rows(self, x: Tensor) -> Tensor:
        """[B, heads, L, ...] -> [R, heads, ...]."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return rows if self._places is None else rows[self._places]


def _mask(seen: bool | Seen, k: Tensor) -> bool | Visible:
    """What the rows of a tile see of k [..., n, D]."""
    return seen if isinstance(seen, bool) else _visible(seen.lowest.tobytes(), seen.past.tobytes(), k.shape[-2])


@lru_cache(maxsize=2)  # a window has two edges, the same in every tile
def _visible(lowest: bytes, past: bytes, keys: int) -> Visible:
    first, end = (torch.from_numpy(np.frombuffer(x, dtype=np.int64).copy()) for x in (lowest, past))
    return Visible.between(first, end, keys)


def _all_numbers(*tensors: Tensor) -> bool:
    """Whether there is no NaN and no infinity. False also where a sum is too long for fp32, which does no harm."""
    return all(bool(x.sum(dtype=torch.float32).isfinite()) for x in tensors)


def by_kv_head(x: Tensor, group: int) -> Tensor:
    """[t, H, D] -> fp32 [G, K, t, D]: the query heads of a KV head become the batch."""
    return rearrange(x, "t (k g) d -> g k t d", g=group).float()


def shared(x: Tensor, group: int) -> Tensor:
    """[t, K, D] -> fp32 [G, K, t, D], one copy of the rows seen by the whole group."""
    return x.transpose(0, 1).float().expand(group, -1, -1, -1)


def to_rows(x: Tensor) -> Tensor:
    """[G, K, t, ...] -> [t, H, ...]."""
    return rearrange(x, "g k t ... -> t (k g) ...")


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention of the same rows over further keys, part [t, H, D] and part_lse [t, H], into fp32 out and lse."""
    merged = torch.logaddexp(lse, part_lse)
    base = merged.masked_fill(merged == -torch.inf, 0.0)  # rows that have read nothing yet
    out.mul_(torch.exp(lse - base)[..., None]).add_(part * torch.exp(part_lse - base)[..., None])
    lse.copy_(merged)


def _nearest_first(schedule: Schedule) -> list[int]:
    """The sources, the rank before this one first and the next one last: no rank is everybody's first."""
    own = int(schedule.source[~schedule.received].max(initial=0))
    return sorted(schedule.sources, key=lambda source: (source > own, -source))
