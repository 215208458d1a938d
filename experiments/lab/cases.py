"""What a lab run measures: its nodes, the link that they stand for, the windows, the methods, what crosses nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, NamedTuple

import numpy as np

from flashcp.clusters import clusters
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.experiments.lab.machine import share_of
from flashcp.experiments.lab.nodes import MOST_NODES, Link
from flashcp.experiments.sweep.results import Number, Row, to_row
from flashcp.limits import Count, Natural, Seconds, Seed, one_of
from flashcp.sharding.exchanges import EXCHANGES, traffic
from flashcp.sharding.holders import members_heads
from flashcp.sharding.lengths import LENGTH_DATA, windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import wire_bytes
from flashcp.sharding.strategies import plan
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.members import member_shape
from flashcp.simulator.summary import BASELINE
from flashcp.simulator.variants import Variant, choose_variants
from flashcp.train.parallel import FREE

METHODS = (
    "llama3",
    "per_document",
    "ring",
    "ring_zigzag",
    "ulysses",
    "flashcp_paper",
    "flashcp_paper+exact",
    "flashcp",
)
ONE_PLAN = "one plan: "
"""Before the name of a method that plans the windows of all replicas together, over all ranks."""
MOST_TOKENS = 1 << 30
"""Of a window before it shrinks: every rank samples it."""
RATED = (2048, 1024, 512, 256, 128, 64, 64)
"""Documents that the rate of attention is measured on."""


class Work(NamedTuple):
    """What one group of ranks does under one method in one turn: consecutive ranks from `first` on, `head_ranks` for
    each of the plan."""

    first: int
    plan: ShardingPlan
    exchange: str
    head_ranks: int = 1

    @property
    def ranks(self) -> int:
        return self.plan.world_size * self.head_ranks


@dataclass
class LabBench:
    """methods: names, or pairs SHARDING+EXCHANGE; `:h2` after one sets its head ranks, else they are 1. faults: those
    of them that meet faults on links afterwards. one_plan: methods that plan the windows of all replicas together too.

    nodes, ranks_per_node, cores: of the lab; the ranks share the cores equally. link: free, or a cluster file whose
    bytes an operation between nodes the lab's links get. link_share: of that rate. delay_us: of a link. replicas:
    groups of ranks with a window each. data_set, context, shrink, windows, seed: windows of context x shrink tokens are
    sampled, and their lengths divided by shrink. query_heads, kv_heads, head_dim: of attention, in fp32. turns: how
    often each window is timed. train_steps: whole steps of a small model under each method afterwards; 0: none.
    """

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    faults: list[str] = field(default_factory=list)
    one_plan: list[str] = field(default_factory=list)
    nodes: Count = 4
    ranks_per_node: Count = 2
    cores: float = 1.9
    link: str = "h100-ib-400g"
    link_share: float = 1.0
    delay_us: float = 0.0
    replicas: Count = 1
    data_set: Annotated[str, one_of(LENGTH_DATA)] = "pile"
    context: int = 16384
    shrink: Count = 8
    windows: Count = 10
    seed: Seed = 0
    query_heads: Count = 8
    kv_heads: Count = 8
    head_dim: Count = 32
    turns: Count = 1
    train_steps: Natural = 0
    timeout_s: Seconds = 120.0

    def check(self) -> None:
        """Raise ValueError, naming values and fields, for those that do not go together.

        The range of each value alone was checked when it was read."""
        if self.train_steps and (self.train_steps < 2 or self.replicas > 1):
            raise ValueError(
                f"train_steps={self.train_steps} with replicas={self.replicas}: expected 0, or 2 and more (the first "
                "warms up) with replicas=1"
            )
        if self.link != FREE and self.link not in clusters():
            raise ValueError(f"link={self.link!r}: expected one of {FREE}, {', '.join(clusters())}")
        if not 0.001 <= self.link_share <= 1000 or (self.link == FREE and self.link_share != 1):
            raise ValueError(
                f"link_share={self.link_share:g} with link={self.link}: expected 0.001 to 1000; 1 where free"
            )
        Link(1.0, self.delay_us)  # checks it
        if self.nodes > MOST_NODES:
            raise ValueError(f"nodes={self.nodes}: expected at most {MOST_NODES}")
        if self.world_size < 2:
            raise ValueError(f"nodes={self.nodes} with ranks_per_node={self.ranks_per_node}: expected 2 ranks or more")
        if self.nodes % self.replicas:
            raise ValueError(f"replicas={self.replicas}: expected a divisor of nodes={self.nodes}, for none shares one")
        share_of(self.cores, self.world_size)
        if not self.world_size <= self.context <= MOST_TOKENS // self.shrink:
            raise ValueError(
                f"context={self.context} with shrink={self.shrink}: expected at least one token a rank, "
                f"{self.world_size}, and at most {MOST_TOKENS} tokens before they shrink"
            )
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads={self.query_heads}: expected a multiple of kv_heads={self.kv_heads}")
        if BASELINE not in self.methods:
            raise ValueError(
                f"methods={self.methods}: expected {BASELINE} among them, which the others are compared with"
            )
        for method in self.faults:
            if method not in self.methods:
                raise ValueError(f"faults holds {method!r}: expected some of methods={self.methods}")
        if self.one_plan and self.replicas < 2:
            raise ValueError(f"one_plan={self.one_plan} with replicas={self.replicas}: expected 2 replicas or more")
        self._check_methods("methods", self.world_size // self.replicas)
        self._check_methods("one_plan", self.world_size)

    def _check_methods(self, key: str, ranks: int) -> None:
        for name in getattr(self, key):
            try:
                (method,) = choose_variants([name])
            except ValueError as error:
                raise ValueError(str(error).replace("methods", key, 1)) from error
            self._check_method(key, method, ranks)

    def _check_method(self, key: str, method: Variant, ranks: int) -> None:
        """Raise ValueError, naming key and method, for one that these ranks cannot run as its name says."""
        heads, splits = max(1, method.head_ranks), EXCHANGE_CLASSES[method.exchange].splits_heads
        wanted = ""
        others = any(change[0] != "h" for change in method.name.split(":")[1:])
        if method.implementation == "best effort" or others:
            wanted = "a method that ranks run here; of what may follow its name only :h"
        elif splits and heads > 1:
            wanted = "no :h, for its ranks share out all heads already"
        elif self.ranks_per_node % heads:
            wanted = f"head ranks that divide ranks_per_node={self.ranks_per_node}"
        if wanted:
            raise ValueError(f"{key}: {method.name!r}: expected {wanted}")
        try:
            members_heads(self.query_heads, self.kv_heads, ranks if splits else heads)
        except ValueError as error:
            raise ValueError(f"{key}: {method.name!r}: {error}") from error

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.query_heads, self.kv_heads, self.head_dim, 4)

    @property
    def case(self) -> str:
        """The work in short."""
        heads = f"{self.query_heads}:{self.kv_heads}x{self.head_dim}"
        replicas = f" replicas={self.replicas}" if self.replicas > 1 else ""
        nodes = f"{self.nodes}x{self.ranks_per_node}"
        link = self.link if self.link_share == 1 else f"{self.link_share:g}x{self.link}"
        return f"{nodes} {link} {self.data_set} {self.context}/{self.shrink} {heads}{replicas}"

    def row(self, number: Number, kind: str) -> Row:
        """A number with what it must carry."""
        device = f"CPU, {os.cpu_count()} cores; {self.cores / self.world_size:.3g} of a core a rank"
        return to_row(self.case, number, device, kind)

    @cached_property
    def batches(self) -> list[list[np.ndarray]]:
        """Document lengths, int64, of each replica's window, batch after batch."""
        sampled = windows(self.data_set, self.context * self.shrink, self.windows * self.replicas, self.seed)
        small = [shrunk(lengths, self.shrink) for lengths in sampled]
        return [small[first : first + self.replicas] for first in range(0, len(small), self.replicas)]

    def work(self, batch: list[np.ndarray]) -> dict[str, list[Work]]:
        """By method, what each replica does with its window."""
        ranks = self.world_size // self.replicas
        found = {}
        for method in choose_variants(self.methods):
            found[method.name] = [
                self._work(method, lengths, ranks * replica, ranks) for replica, lengths in enumerate(batch)
            ]
        for method in choose_variants(self.one_plan) if self.one_plan else ():
            found[ONE_PLAN + method.name] = [self._work(method, np.concatenate(batch), 0, self.world_size)]
        return found

    def _work(self, method: Variant, lengths: np.ndarray, first: int, ranks: int) -> Work:
        """A method that leaves its head ranks open has one here."""
        heads = max(1, method.head_ranks)
        return Work(first, plan(lengths, ranks // heads, method.sharding), method.exchange, heads)


def shrunk(lengths: np.ndarray, divisor: int) -> np.ndarray:
    """Lengths in the same proportions whose sum is divided, int64; documents too short to keep a token are left out.

    The boundaries between documents are divided, so that no error adds up.
    """
    ends = np.cumsum(lengths) // divisor
    small = np.diff(ends, prepend=0)
    return small[small > 0]


# --- how many bytes of K and V, and of their gradients, leave each node: what the routes say


def crossing_bytes(work: Work, shape: AttentionShape, ranks_per_node: int) -> np.ndarray:
    """Bytes that leave each node while one attention runs forward and backward, float64 [nodes].

    Over gloo, whose sends, receives and all-to-all go straight from rank to rank, and whose all-gather goes round:
    every rank hands N - 1 blocks to the next one. Headers of messages are not counted.

    Consecutive ranks share a node, and so do those of a holder: each of them moves its share of the heads. Raises
    ValueError where ranks do not fill nodes, nor holders them.
    """
    plan, heads = work.plan, work.head_ranks
    if work.ranks % ranks_per_node or ranks_per_node % heads:
        raise ValueError(
            f"world_size={work.ranks} with head_ranks={heads}: expected a multiple of ranks_per_node={ranks_per_node}, "
            "and a divisor of it"
        )
    moved = heads * moved_bytes(plan, work.exchange, member_shape(shape, heads))
    node = np.arange(plan.world_size) * heads // ranks_per_node
    between = np.where(node[:, None] != node[None, :], moved, 0.0)
    return np.bincount(node, between.sum(axis=1))


def moved_bytes(plan: ShardingPlan, exchange: str, shape: AttentionShape) -> np.ndarray:
    """Bytes from rank to rank, both passes together, float64 [source, destination]."""
    back = shape._replace(dtype_bytes=wire_bytes(shape.dtype_bytes, "auto", EXCHANGES[exchange].roundings))
    ranks, others = plan.world_size, ~np.eye(plan.world_size, dtype=bool)
    following = np.roll(np.eye(ranks), 1, axis=1)
    if exchange == "ulysses":
        member = member_shape(shape, ranks)
        there = plan.tokens[:, None] * (member.query_bytes / 2 + member.kv_bytes) * others  # Q, K and V
        home = plan.tokens[None, :] * (member.query_bytes / 2) * others
        return 2.0 * (there + home)  # the backward's are the mirror: of O one way, of Q, K and V the other
    if exchange == "ring":
        route = plan.route(exchange)
        return following * (route.sent_rows * shape.kv_bytes + route.received_rows * back.kv_bytes)[:, None]
    if exchange == "exact":
        rows = traffic(plan)
        return rows * float(shape.kv_bytes) + rows.T * float(back.kv_bytes)
    block = plan.route(exchange).block_rows
    return block * ((ranks - 1) * shape.kv_bytes * following + back.kv_bytes * others)
