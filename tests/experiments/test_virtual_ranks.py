"""Virtual ranks: the exchange inside one process gives what the reference does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flashcp
from flashcp.experiments.bench_virtual import main
from flashcp.experiments.rows import read_rows
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


def test_the_bench_compares_levels_with_the_bound(tmp_path: Path) -> None:
    assert main(["--tokens", "512", "--heads", "2", "--head_dim", "32", "--out", str(tmp_path)]) == 0
    found = {row.metric: row.median for row in read_rows(tmp_path)}
    assert found["transfer_ms"] == pytest.approx(found["local_tiles_ms"])
    bound = max(found["compute_ms"], found["transfer_ms"])
    assert found["staged_over_bound"] == pytest.approx(found["staged_ms"] / bound)
