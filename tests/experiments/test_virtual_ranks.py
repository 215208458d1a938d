"""Virtual ranks: the exchange inside one process gives what the reference does."""

from __future__ import annotations

import pytest
import torch

import flashcp
from flashcp.experiments.virtual_ranks import VirtualRanks
from tests.packs import random_qkv, relative_error

LENGTHS = (300, 41, 7, 120)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("overlap", ["none", "staged", "fused"])
@pytest.mark.parametrize("exchange", ["exact", "all_gather"])
def test_every_rank_gets_the_references_rows(device: str, overlap: str, exchange: str) -> None:
    ranks = VirtualRanks(3, torch.device(device), exchange, overlap, throttle_gbps=0.05)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for seed, strategy in enumerate(("per_document", "flashcp", "per_sequence")):
        plan = flashcp.plan(LENGTHS, 3, strategy)
        q, k, v = (x.to(device) for x in random_qkv(sum(LENGTHS), 4, 2, 32, dtype, seed)[:3])
        rows = [torch.from_numpy(plan.rows(rank)) for rank in range(3)]
        results = ranks.forward(plan, *([x[index] for index in rows] for x in (q, k, v)), 32**-0.5)
        expected = flashcp.reference_attention(*(x.cpu() for x in (q, k, v)), LENGTHS)
        for index, result in zip(rows, results, strict=True):
            assert relative_error(result.out.cpu(), expected[index]) < (1e-5 if device == "cpu" else 1e-2)
