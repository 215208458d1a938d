"""A plan with its prices: who reads how many rows from whom, and what every read costs on a machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from flashcp.sharding.exchanges import traffic
from flashcp.sharding.mask import CAUSAL, LayerKind, Mask
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import wire_bytes
from flashcp.simulator.cost import AttentionCost, AttentionShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.members import member_links, member_shape
from flashcp.simulator.reads import plan_reads
from flashcp.simulator.timeline import Timeline

MERGE_BYTES = 12
"""Per number of O: a kernel's result, the fp32 sum read and written."""


@dataclass(frozen=True)
class Setting:
    """Where and how a plan runs. overlap: of our implementation, `none`, `staged` or `fused`. gradient_wire: what our
    gradients of K and V travel in (`flashcp.sharding.route`). head_ranks: of a holder; the plan's ranks are holders,
    see `flashcp.simulator.heads`. mask: of all documents. layers: the model's mix, whose mean is a layer's time; ():
    each layer is like the mask."""

    machine: Machine
    shape: AttentionShape = field(default_factory=AttentionShape)
    overlap: str = "staged"
    gradient_wire: str = "auto"
    head_ranks: int = 1
    mask: Mask = CAUSAL
    layers: tuple[LayerKind, ...] = ()

    def wire_bytes(self, roundings: int) -> int:
        """Of a number of those gradients."""
        return wire_bytes(self.shape.dtype_bytes, self.gradient_wire, roundings)


class Module(NamedTuple):
    """One attention layer's forward and backward. exchange_us: of both, with nothing beside them.

    kept_bytes: KV from other ranks that a rank keeps from forward to backward; working_bytes: buffers of KV and of its
    gradients that live during one layer's pass only. The most of any rank.
    """

    forward: Timeline
    backward: Timeline
    exchange_us: float
    kept_bytes: float
    working_bytes: float


class Planned:
    """A plan under a setting; times in us, of the forward or the backward. Its arrays are not to be written to.

    With head ranks: of one member of each holder, which has its heads and its ports. shape, links: the member's.
    overlap: the setting's, but a holder alone has nothing to wait for.
    """

    def __init__(self, plan: ShardingPlan, setting: Setting) -> None:
        self.plan, self.setting = plan, setting
        self.ranks = plan.world_size
        self.machine, self.shape = setting.machine, member_shape(setting.shape, setting.head_ranks)
        self.cost, self.copies = self.machine.attention, self.machine.copies
        self.links = member_links(self.machine.links, setting.head_ranks)
        self.overlap = "none" if self.ranks == 1 else setting.overlap
        self.reads = plan_reads(plan, self.cost.tiles)
        self._holds = (np.arange(self.ranks)[:, None] == self.reads.rank).astype(np.float64)
        self.own_us, self.read_us, self.source_us = map(cache, (self._own_us, self._read_us, self._source_us))
        self.whole_us, self.step_us, self.remote_us = map(cache, (self._whole_us, self._step_us, self._remote_us))

    def by_rank(self, values: np.ndarray) -> np.ndarray:
        """Sum over the shards of each rank, [S] -> [N], [S, M] -> [N, M]."""
        return self._holds @ values

    def _own_us(self, backward: bool) -> np.ndarray:
        """Each shard's queries on its own rows, with its Q in and its O out [S]."""
        query_us = self.cost.query_us(self.reads.rows, self.shape, backward)
        return self.cost.read_us(self.reads.own, self.shape, backward) + query_us

    def _read_us(self, backward: bool) -> np.ndarray:
        """Each shard's queries on other rows that they see, by the rank that holds them [S, N]."""
        return self.cost.read_us(self.reads.by_owner, self.shape, backward)

    def _source_us(self, backward: bool) -> np.ndarray:
        """Each rank's queries on the rows of each other rank and on earlier ones of its own [N, N]."""
        return self.by_rank(self.read_us(backward))

    def first_us(self, backward: bool) -> np.ndarray:
        """Each rank's queries on the rows of others, as the first part of a launch [N]."""
        return self._others_us(backward) + self.cost.launch_us(backward)

    def local_us(self, backward: bool) -> np.ndarray:
        """Each rank's queries on its own rows, as a part of a launch [N]."""
        return self.by_rank(self.own_us(backward)) + np.diagonal(self.source_us(backward))

    def _others_us(self, backward: bool) -> np.ndarray:
        source_us = self.source_us(backward)
        return source_us.sum(axis=1) - np.diagonal(source_us)

    def _whole_us(self, backward: bool) -> np.ndarray:
        """One kernel over everything a rank reads, all of it in document order [N]."""
        return self.priced(self.cost, backward)

    def _step_us(self, backward: bool) -> np.ndarray:
        """A kernel of its own on the rows of each rank [N, N] (reader, owner); 0 where nothing is read."""
        steps = self._kernels_us(self.source_us(backward), self.reading_rows, backward)
        np.fill_diagonal(steps, self.local_us(backward) + self.cost.launch_us(backward))
        return steps

    def _remote_us(self, backward: bool) -> np.ndarray:
        """A kernel of its own on all rows of others [N]; 0 where nothing is read."""
        return self._kernels_us(self._others_us(backward), self.remote_rows, backward)

    def _kernels_us(self, reads_us: np.ndarray, rows: np.ndarray, backward: bool) -> np.ndarray:
        """Kernels of their own that make these reads for so many query rows; 0 where there are none."""
        return reads_us + self.cost.query_us(rows, self.shape, backward) + (rows > 0) * self.cost.launch_us(backward)

    def priced(self, cost: AttentionCost, backward: bool) -> np.ndarray:
        """What one kernel over everything would cost under other prices for the same tiles [N]."""
        reads = (cost.read_us(features, self.shape, backward) for features in (self.reads.together, self.reads.own))
        query = cost.query_us(self.reads.rows, self.shape, backward)
        return self.by_rank(sum(reads) + query) + cost.launch_us(backward)

    def behind(self, values: np.ndarray, step: int) -> np.ndarray:
        """Of [reader, owner], each reader's value for the rank that is `step` before it in the ring [N]."""
        every = np.arange(self.ranks)
        return values[every, every - step]

    def merge_us(self, rows: np.ndarray) -> np.ndarray:
        """What a forward kernel adds that leaves its results in an fp32 sum, for so many query rows."""
        numbers = rows * (self.shape.query_heads * self.shape.head_dim)
        return self.copies.us(numbers * MERGE_BYTES, launches=0)

    def sum_us(self, moved: np.ndarray | float, wire: int, launches: np.ndarray | float = 1) -> np.ndarray:
        """Gradients of `wire` bytes a number added to an fp32 sum: they are read, it is read and written."""
        return self.copies.us(np.asarray(moved) * (wire + 8) / wire, 0) + self.copies.launch_us * np.asarray(launches)

    def hop_us(self, block: float) -> np.ndarray:
        """A block from each rank's predecessor over their one link [N]."""
        rate, latency = self.links.neighbour(self.ranks)
        return block / rate + latency

    def block_bytes(self, exchange: str) -> float:
        """K and V in one rank's block of an exchange that moves blocks: padded, or for a ring the largest."""
        return float(self.plan.route(exchange).block_rows) * self.shape.kv_bytes

    @cached_property
    def traffic(self) -> np.ndarray:
        """Rows that the exact exchange carries from source to destination, int64 [N, N]."""
        return traffic(self.plan)

    @cached_property
    def reading_rows(self) -> np.ndarray:
        """Rows of each rank's shards that read any row of each rank, [N, N]."""
        return self.by_rank((self.reads.others > 0) * self.reads.rows[:, None])

    @cached_property
    def remote_rows(self) -> np.ndarray:
        """Rows of each rank's shards that read any row of another rank [N]."""
        reads = self.reads
        others = reads.others.sum(axis=1) > reads.others[np.arange(len(reads.rank)), reads.rank]
        return self.by_rank(others * reads.rows)
