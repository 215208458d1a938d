"""The methods as their authors run them: collectives that nothing hides and copies, or the rings.

The paper's table adds up: copies, attention, all-gather and reduce-scatter follow one another. Half of a method's
copies are counted in the forward and half in the backward. Gradients travel in the model's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.strategies import plan as make_plan
from flashcp.simulator.planned import Module, Planned
from flashcp.simulator.timeline import Timeline

GRADIENT_BYTES = 4


class Extras(NamedTuple):
    """Beside a kernel: bytes read and written for each number of Q, each number of K (V has as many) and each row and
    query head; kernels launched; times the host waits for the device."""

    query: float = 0
    key: float = 0
    lse: float = 0
    launches: float = 0
    syncs: float = 0


class Pass(NamedTuple):
    """One direction's extras: once, and at a step on a rank's own rows, on those of a rank before it, of one behind."""

    once: Extras
    own: Extras
    earlier: Extras
    later: Extras


RING = (
    Pass(Extras(6, launches=1), Extras(6, launches=1), Extras(10, 0, 40, 4), Extras()),
    Pass(Extras(6, 12, launches=3), Extras(6, 12, launches=3), Extras(10, 20, launches=3), Extras()),
)
"""Forward and backward of the contiguous ring; blocks of ranks behind are only handed on."""


def _zigzag(documents: int) -> tuple[Pass, Pass]:
    """Forward and backward of the zigzag, whose masks are made document by document."""
    return (
        Pass(
            once=Extras(8, 0, 0, 3 + 4 * documents, 3 + 4 * documents),
            own=Extras(6, launches=1),
            earlier=Extras(10, 4, 40, 6, 2),
            later=Extras(13, 0, 28, 8, 4),
        ),
        Pass(
            once=Extras(12, 12, 4, 7 + documents, 3 + 2 * documents),
            own=Extras(6, 12, 0, 3),
            earlier=Extras(10, 30, 0, 9, 6),
            later=Extras(13, 20, 0, 5, 2),
        ),
    )


def published(planned: Planned, exchange: str) -> Module:
    return published_ring(planned) if exchange == "ring" else _gathered(planned, exchange)


def _gathered(planned: Planned, exchange: str) -> Module:
    ranks, block = planned.ranks, planned.block_bytes(exchange)
    collective = planned.links.collective_us(block, ranks)
    copies = _copies_us(planned, exchange) / 2
    forward, backward = Timeline(ranks), Timeline(ranks)
    forward.run("exchange", collective)
    forward.run("copies", copies)
    forward.run("attention", planned.whole_us(False))
    backward.run("attention", planned.whole_us(True))
    backward.run("copies", copies)
    backward.meet()
    backward.run("exchange", collective)
    return Module(forward, backward, 2 * collective, ranks * block, ranks * block)


def _copies_us(planned: Planned, exchange: str) -> float:
    """Copies of forward and backward together."""
    costs, shards = planned.machine.published, len(planned.reads.rank)
    if exchange == "compacted":
        passes = costs.compacted_passes
    elif _chunks_of_the_window(planned):
        passes, shards = costs.gathered_passes, 2 * planned.ranks
    else:
        passes = costs.shuffled_passes
    moved = 2 * passes * float(planned.plan.offsets[-1]) * planned.shape.kv_bytes
    return float(planned.copies.us(moved, launches=0)) + shards * costs.shard_us


def _chunks_of_the_window(planned: Planned) -> bool:
    """Whether the plan is `per_sequence`'s, which `wlb_adaptive` may have chosen too."""
    plan = planned.plan
    if plan.strategy != "wlb_adaptive":
        return plan.strategy == "per_sequence"
    return plan == make_plan(plan.document_lengths, plan.world_size, "per_sequence")


def published_ring(planned: Planned) -> Module:
    """`ring` or `ring_zigzag` as ring-flash-attention runs them (0.1.7, with flash-attn 2.6 or newer), step by step.

    KV goes round once forward and once backward, its gradient in fp32 behind it. A rank's messages follow one another
    on one stream, and one starts when both its ends have computed the step before. Steps are merged in fp32 outside the
    kernel. The zigzag picks half a rank's rows by a mask that the host expands: each use waits for the device. What is
    copied was counted in the library's source, its merge compiled into one kernel as torch.jit does.
    """
    ranks, block = planned.ranks, planned.block_bytes("ring")
    home = block * GRADIENT_BYTES / planned.shape.dtype_bytes
    zigzag = planned.plan.strategy == "per_document"
    passes = _zigzag(len(planned.plan.document_lengths)) if zigzag else RING
    hop, hop_home = planned.hop_us(block), planned.hop_us(home)
    forward, backward = _Ring(planned, passes[0], False), _Ring(planned, passes[1], True)
    for step in range(ranks):
        arrived = forward.send(hop) if step + 1 < ranks else 0.0
        forward.compute(step)
        forward.wait(arrived)
    came_home: np.ndarray | float = 0.0
    for step in range(ranks):
        arrived = backward.send(hop) if step + 1 < ranks else 0.0
        backward.compute(step)
        backward.wait(came_home)  # what the ranks behind have added; this one's share comes on top
        backward.add(step)
        backward.wait(arrived)
        came_home = backward.send(hop_home) if ranks > 1 else 0.0
    backward.wait(came_home)
    alone = (2 * (ranks - 1) * float(hop.max()) + ranks * float(hop_home.max())) * (ranks > 1)
    return Module(forward, backward, alone, 0.0, 2 * (block + home))


class _Ring(Timeline):
    """One direction: what ranks compute, and the stream their messages follow one another on."""

    def __init__(self, planned: Planned, extras: Pass, backward: bool) -> None:
        super().__init__(planned.ranks)
        self._planned, self._extras, self._backward = planned, extras, backward
        self._stream = np.zeros(planned.ranks)
        self._copy(extras.once)

    def send(self, hop: np.ndarray) -> np.ndarray:
        """Every rank sends to the next one what it has computed so far. When that has arrived [N]."""
        ready = np.maximum(self.now, self._stream)
        start = np.maximum(ready, np.roll(ready, 1))
        self._stream = start + hop
        self.beside("exchange", start, self._stream)
        return self._stream

    def compute(self, step: int) -> None:
        """Every rank on the block of rank - step, up to the sum of its own results."""
        self.run("attention", self._planned.behind(self._planned.step_us(self._backward), step))
        for extras, ranks in self._of(step):
            self._copy(extras._replace(key=0) if self._backward else extras, ranks)

    def add(self, step: int) -> None:
        """Backward: to the gradient that came round."""
        for extras, ranks in self._of(step):
            self._copy(Extras(key=extras.key), ranks)

    def _of(self, step: int) -> list[tuple[Extras, np.ndarray]]:
        every = np.arange(self._planned.ranks)
        if step == 0:
            return [(self._extras.own, every >= 0)]
        return [(self._extras.earlier, every >= step), (self._extras.later, every < step)]

    def _copy(self, extras: Extras, ranks: np.ndarray | float = 1.0) -> None:
        shape, planned = self._planned.shape, self._planned
        numbers = extras.query * shape.query_heads + extras.key * shape.kv_heads
        moved = planned.plan.tokens * (numbers * shape.head_dim + extras.lse * shape.query_heads)
        us = planned.copies.us(moved, extras.launches) + extras.syncs * planned.machine.published.sync_us
        self.run("copies", us * ranks)
