"""Ranks that are processes sharing one GPU: rows through torch's symmetric memory, values and gradients."""

from __future__ import annotations

import os

import pytest
import torch

import flashcp
from tests.packs import random_qkv, relative_error
from tests.ranks import run_cases

LENGTHS = (300, 41, 7, 120)


def errors_on_rank(exchange: str, overlap: str, backward: str) -> list[float]:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(0)
    cp = flashcp.ContextParallel(
        exchange=exchange, overlap=overlap, backward=backward, transport="cuda_symmetric", timeout_s=100
    )
    worst = []
    for seed, strategy in enumerate(("per_document", "flashcp", "per_sequence")):
        plan = flashcp.plan(LENGTHS, cp.world_size, strategy)
        *qkv, grad = random_qkv(sum(LENGTHS), 4, 2, 64, torch.bfloat16, seed)
        local = [cp.shard(x, plan).cuda().requires_grad_() for x in qkv]
        out = cp.attention(*local, plan)
        gradients = torch.autograd.grad(out, local, cp.shard(grad, plan).cuda())
        whole = [x.double().requires_grad_() for x in qkv]
        reference = flashcp.reference_attention(*whole, LENGTHS)
        expected = (reference, *torch.autograd.grad(reference, whole, grad.double()))
        worst += [
            relative_error(x.detach().cpu(), cp.shard(y.detach(), plan))
            for x, y in zip((out, *gradients), expected, strict=True)
        ]
    return worst


CASES = [
    (exchange, overlap, backward)
    for exchange in ("exact", "compacted", "ring")
    for overlap in ("none", "staged", "fused")
    for backward in ("keep", "refetch")
    if (exchange, overlap) != ("ring", "fused")
]


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_processes_on_one_gpu_match_the_reference() -> None:
    """In one group: torch's symmetric memory knows groups by name, and later default groups have the first one's."""
    for case, ranks in zip(CASES, run_cases(errors_on_rank, 2, CASES, timeout_s=120), strict=True):
        assert max(max(errors) for errors in ranks) < 1e-2, case
