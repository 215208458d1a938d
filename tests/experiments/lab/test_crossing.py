"""Bytes that leave nodes: from the routes, against what an operator counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.experiments.lab.cases import Work
from flashcp.experiments.lab.crossing import crossing_bytes, moved_bytes
from flashcp.simulator.cost import AttentionShape
from tests.packs import random_qkv
from tests.ranks import run_cases

SHAPE = AttentionShape(query_heads=4, kv_heads=4, head_dim=8, dtype_bytes=4)
LENGTHS = (90, 20, 7, 11)


def counted(exchange: str, strategy: str, kv_heads: int) -> tuple[int, float]:
    """Bytes that left this rank, as its operator counts them and as the routes say."""
    cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    plan = flashcp.plan(LENGTHS, 4, strategy)
    *qkv, grad = random_qkv(sum(LENGTHS), 4, kv_heads, 8, torch.float32, seed=0)
    q, k, v = (cp.shard(x, plan).requires_grad_() for x in qkv)
    cp.attention(q, k, v, plan).backward(cp.shard(grad, plan))
    return cp.sent_bytes, float(moved_bytes(plan, exchange, SHAPE._replace(kv_heads=kv_heads))[cp.rank].sum())


def test_what_moves_is_what_operators_count() -> None:
    kinds = (("flashcp", 4), ("per_document", 4), ("per_document", 2))  # 2 KV heads: `ulysses` sends each to two ranks
    cases = [(exchange, *kind) for exchange in EXCHANGE_CLASSES for kind in kinds]
    for results in run_cases(counted, 4, cases):
        for sent, said in results:
            assert sent == said > 0


@pytest.mark.parametrize("exchange", EXCHANGE_CLASSES)
def test_all_that_moves_crosses_where_each_rank_is_a_node_and_nothing_where_all_share_one(exchange: str) -> None:
    plan = flashcp.plan(LENGTHS, 4, "per_document")
    moved = moved_bytes(plan, exchange, SHAPE)
    assert crossing_bytes(Work(0, plan, exchange), SHAPE, 1).tolist() == moved.sum(axis=1).tolist()
    assert crossing_bytes(Work(0, plan, exchange), SHAPE, 4).tolist() == [0.0]
    assert (np.diagonal(moved) == 0).all()


def test_of_a_ring_only_the_last_rank_of_a_node_reaches_another() -> None:
    plan = flashcp.plan(LENGTHS, 4, "per_document")
    sent = moved_bytes(plan, "ring", SHAPE).sum(axis=1)
    assert crossing_bytes(Work(0, plan, "ring"), SHAPE, 2).tolist() == sent[[1, 3]].tolist()


@pytest.mark.parametrize("exchange", ["exact", "all_gather", "ring"])
def test_a_holder_on_a_node_sends_as_much_as_a_rank_would(exchange: str) -> None:
    plan = flashcp.plan(LENGTHS, 4, "per_document")
    alone = crossing_bytes(Work(0, plan, exchange), SHAPE, 1)
    assert crossing_bytes(Work(0, plan, exchange, head_ranks=2), SHAPE, 2).tolist() == alone.tolist()
    one_kv_head = SHAPE._replace(kv_heads=1)  # two ranks are sent it each
    twice = 2 * crossing_bytes(Work(0, plan, exchange), one_kv_head, 1)
    assert crossing_bytes(Work(0, plan, exchange, head_ranks=2), one_kv_head, 2).tolist() == twice.tolist()


def test_ranks_fill_their_nodes() -> None:
    with pytest.raises(ValueError, match="ranks_per_node=3"):
        crossing_bytes(Work(0, flashcp.plan(LENGTHS, 4), "exact"), SHAPE, 3)
