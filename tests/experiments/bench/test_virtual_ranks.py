"""Virtual ranks: the exchange inside one process gives what the reference does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flashcp
from flashcp.experiments.bench.virtual import VirtualRanks, check_connections, main
from flashcp.experiments.sweep.results import read_rows
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
            assert relative_error(result.cpu(), expected[index]) < (1e-5 if device == "cpu" else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", ["none", "staged", "fused"])
@pytest.mark.parametrize("exchange", ["exact", "compacted", "all_gather"])
@pytest.mark.parametrize("backward", ["keep", "refetch"])
def test_gradients_of_every_rank_on_a_gpu(exchange: str, overlap: str, backward: str) -> None:
    ranks = VirtualRanks(3, torch.device("cuda"), exchange, overlap, backward=backward, timeout_s=60)
    plan = flashcp.plan(LENGTHS, 3, "per_document")
    *qkv, grad = random_qkv(sum(LENGTHS), 4, 2, 64, torch.bfloat16, 0)
    rows = [torch.from_numpy(plan.rows(rank)) for rank in range(3)]
    leaves = [[x[index].cuda().requires_grad_() for index in rows] for x in qkv]
    outs = ranks.forward(plan, *leaves)
    flat = [x for group in leaves for x in group]
    found = torch.autograd.grad(outs, flat, [grad[index].cuda() for index in rows])
    ranks.synchronize()
    whole = [x.double().requires_grad_() for x in qkv]
    wanted = torch.autograd.grad(flashcp.reference_attention(*whole, LENGTHS), whole, grad.double())
    for value, exact in zip(found, [x[index] for x in wanted for index in rows], strict=True):
        assert relative_error(value.cpu(), exact) < 1e-2


def test_regions_are_used_again() -> None:
    ranks = VirtualRanks(2, torch.device("cpu"))
    plan = flashcp.plan(LENGTHS, 2, "per_document")
    q, k, v = (
        [x[torch.from_numpy(plan.rows(rank))] for rank in range(2)]
        for x in random_qkv(sum(LENGTHS), 4, 2, 32, torch.float32, 0)[:3]
    )
    with torch.no_grad():
        for _ in range(12):
            ranks.forward(plan, q, k, v)
    assert ranks.regions == 2
    for _ in range(12):
        ranks.forward(plan, q, k, [x.clone().requires_grad_() for x in v])  # graphs that nobody walks back
    assert ranks.regions <= 4


def test_who_only_sends_leaves_nothing_behind() -> None:
    ranks = VirtualRanks(2, torch.device("cpu"))
    plan = flashcp.plan(LENGTHS, 2, "per_document")
    qkv = random_qkv(sum(LENGTHS), 4, 2, 32, torch.float32, 0)[:3]
    q, k, v = ([x[torch.from_numpy(plan.rows(rank))] for rank in range(2)] for x in qkv)
    with torch.no_grad():
        for _ in range(12):
            (out,) = ranks.forward(plan, q, k, v, attending=[1])
    assert ranks.regions <= 4
    expected = flashcp.reference_attention(*qkv, LENGTHS)[torch.from_numpy(plan.rows(1))]
    assert relative_error(out, expected) < 1e-5


def test_ranks_in_one_process_need_a_hardware_queue_a_stream() -> None:
    with pytest.raises(ValueError, match=r"3 ranks .* 13 streams .* set CUDA_DEVICE_MAX_CONNECTIONS=32"):
        check_connections(3, {})
    check_connections(2, {})
    check_connections(3, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"})


def test_the_bench_compares_levels_with_the_bound(tmp_path: Path) -> None:
    assert main(["--tokens", "512", "--heads", "2", "--head_dim", "32", "--out", str(tmp_path)]) == 0
    found = {row.metric: row.median for row in read_rows(tmp_path)}
    assert found["transfer_ms"] == pytest.approx(max(0.0, found["none_ms"] - found["compute_ms"]))
    bound = max(found["compute_ms"], found["transfer_ms"])
    assert found["staged_over_bound"] == pytest.approx(found["staged_ms"] / bound)
