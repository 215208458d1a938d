"""The operator under torch.compile, checkpointing and autocast: one graph for all plans, the eager numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flashcp
from flashcp.call import Begun
from flashcp.operator import Kept, attention, prefetch
from flashcp.sharding.numbered import known
from tests.packs import relative_error
from tests.ranks import run_cases

TOKENS, DIM, HEADS, KV_HEADS = 96, 32, 4, 2


class Block(nn.Module):
    """A decoder block: attention, after which a gated MLP."""

    def __init__(self, cp: flashcp.ContextParallel, prefetches: bool = False, **options: Any) -> None:
        super().__init__()
        self.cp, self.prefetches, self.options = cp, prefetches, options
        self.norm, self.wo = nn.RMSNorm(DIM), nn.Linear(DIM, DIM)
        self.qkv = nn.Linear(DIM, DIM * (HEADS + 2 * KV_HEADS) // HEADS)
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, plan: flashcp.ShardingPlan) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (-1, DIM // HEADS)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        if self.prefetches:
            out = self.cp.prefetch(k, v, plan, **self.options).attention(q)
        else:
            out = self.cp.attention(q, k, v, plan, **self.options)
        x = x + self.wo(out.flatten(1))
        gate, up = self.up(x).chunk(2, dim=-1)
        return x + self.down(torch.nn.functional.silu(gate) * up)


def rows(cp: flashcp.ContextParallel, plan: flashcp.ShardingPlan) -> Tensor:
    whole = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(3))
    return cp.shard(whole, plan)


def plans(cp: flashcp.ContextParallel, count: int) -> list[flashcp.ShardingPlan]:
    rng, names = np.random.default_rng(0), ("flashcp", "per_document", "per_sequence", "contiguous")
    cuts = [np.unique(rng.integers(1, TOKENS, n)) for n in range(count)]
    packs = [np.diff([0, *cut, TOKENS]) for cut in cuts]
    return [flashcp.plan(lengths, cp.holders, names[n % 4]) for n, lengths in enumerate(packs)]


def values(step: Any, block: Block, x: Tensor, plan: flashcp.ShardingPlan) -> list[Tensor]:
    """Output and gradients of the input and every parameter."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    out = step(x, plan)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in (x, *block.parameters()))]


def of_compiled(backend: str, exchange: str, head_ranks: int, prefetches: bool, options: dict[str, Any]) -> list[float]:
    """How often a block was compiled for 20 plans, and how far its values lie from the eager block's."""
    torch._dynamo.reset()
    cp = flashcp.ContextParallel(exchange=exchange, head_ranks=head_ranks, timeout_s=60)
    torch.manual_seed(0)
    block = Block(cp, prefetches, **options)
    counter = CompileCounterWithBackend(backend)
    fast = torch.compile(block, fullgraph=True, backend=counter)
    worst = 0.0
    for plan in plans(cp, 20):
        x = rows(cp, plan)
        for a, b in zip(values(fast, block, x, plan), values(block, block, x, plan), strict=True):
            worst = max(worst, relative_error(a, b))
    return [counter.frame_count, worst]


CASES = [
    ("exact", 1, False, {}),
    ("exact", 1, True, {"window": 20}),
    ("all_gather", 1, False, {"return_lse": False, "softcap": 5.0}),
    ("ring", 1, True, {}),
    ("ulysses", 1, False, {}),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_twenty_plans_are_one_graph_with_the_eager_values(ranks: int) -> None:
    cases = [("aot_eager", *case) for case in (CASES[:2] if ranks == 4 else CASES)]
    if ranks > 1:
        cases += [("aot_eager", "exact", 2, False, {}), ("aot_eager", "exact", 2, True, {})]
    if ranks == 2:
        cases.append(("inductor", *CASES[0]))
    for case, found in zip(cases, run_cases(of_compiled, ranks, cases, timeout_s=300), strict=True):
        for compiled, worst in found:
            assert compiled == 1, case
            assert worst < 1e-5, case


def save_attention(ctx: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    saved = operator in {prefetch, attention}
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(kind: str, compiles: bool, exchange: str, head_ranks: int, prefetches: bool) -> list[float]:
    """How far a checkpointed block's values lie from the plain block's, and attention calls that it made."""
    torch._dynamo.reset()
    cp = flashcp.ContextParallel(exchange=exchange, head_ranks=head_ranks, timeout_s=60)
    torch.manual_seed(0)
    block = Block(cp, prefetches)
    how: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, save_attention)

    def step(x: Tensor, plan: flashcp.ShardingPlan) -> Tensor:
        return checkpoint(block, x, plan, **how)

    worst, calls = 0.0, 0
    fast = torch.compile(step, fullgraph=True, backend="aot_eager") if compiles else step
    for plan in plans(cp, 3):
        x = rows(cp, plan)
        wanted = values(block, block, x, plan)
        before = cp._calls
        for a, b in zip(values(fast, block, x, plan), wanted, strict=True):
            worst = max(worst, relative_error(a, b))
        calls = cp._calls - before
    return [worst, calls]


CHECKPOINTS = [
    (kind, compiles, *case)
    for kind, compiles in [
        ("reentrant", False),
        ("whole", False),
        ("whole", True),
        ("selective", False),
        ("selective", True),
    ]
    for case in [("exact", 1, False), ("ring", 1, True), ("all_gather", 2, True)]
]


def test_checkpointing_repeats_attention_or_keeps_it() -> None:
    for case, found in zip(CHECKPOINTS, run_cases(checkpointed, 2, CHECKPOINTS, timeout_s=120), strict=True):
        for worst, calls in found:
            assert worst < 1e-5, case
            assert calls == (1 if case[0] == "selective" else 2), case


def under_autocast(compiles: bool) -> tuple[str, float]:
    torch._dynamo.reset()
    cp = flashcp.ContextParallel(timeout_s=60)
    torch.manual_seed(0)
    block = Block(cp)
    (plan,) = plans(cp, 1)
    wanted = values(block, block, rows(cp, plan), plan)
    step = torch.compile(block, fullgraph=True, backend="aot_eager") if compiles else block
    with torch.autocast("cpu", torch.bfloat16):
        q = torch.randn(int(plan.tokens[cp.rank]), HEADS, 8)
        dtype = cp.attention(q, q, q.bfloat16(), plan).dtype
        found = values(step, block, rows(cp, plan), plan)
    return str(dtype), max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def test_autocast_casts_what_attention_is_given() -> None:
    for found in run_cases(under_autocast, 2, [(False,), (True,)]):
        for dtype, worst in found:
            assert dtype == "torch.bfloat16"
            assert 1e-5 < worst < 0.03


def kept_alive(compiles: bool) -> list[int]:
    """Objects known by number, of calls and of what waits, after each of three steps."""
    torch._dynamo.reset()
    cp = flashcp.ContextParallel(timeout_s=60)
    block = Block(cp, prefetches=True)
    step = torch.compile(block, fullgraph=True, backend="aot_eager") if compiles else block
    alive = []
    for plan in plans(cp, 3):
        values(step, block, rows(cp, plan), plan)
        alive.append(sum(isinstance(thing, Begun | Kept) for thing in known().values()))
    return alive


def test_nothing_outlives_its_step() -> None:
    for found in run_cases(kept_alive, 2, [(False,), (True,)]):
        assert found == [[0, 0, 0]] * 2


class Stack(nn.Module):
    """Two blocks, computed again in the backward."""

    def __init__(self, cp: flashcp.ContextParallel) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(cp, prefetches) for prefetches in (False, True))

    def forward(self, x: Tensor, plan: flashcp.ShardingPlan) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, plan, use_reentrant=False)
        return x


def sharded(exchange: str, head_ranks: int) -> float:
    """How far gradients of blocks that FSDP shards, torch.compile compiles and checkpointing repeats lie from those of
    the plain ones, summed over ranks."""
    torch._dynamo.reset()
    cp = flashcp.ContextParallel(exchange=exchange, head_ranks=head_ranks, timeout_s=60)
    torch.manual_seed(0)
    plain = Stack(cp)
    fast = Stack(cp)
    fast.load_state_dict(plain.state_dict())
    for block in fast.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
        fully_shard(block)
    fully_shard(fast)
    cp.prepare(fast)
    worst = 0.0
    for plan in plans(cp, 3):
        for model in (plain, fast):
            model.zero_grad()
            model(rows(cp, plan), plan).square().sum().backward()
        cp.sum_gradients(plain)
        for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
            worst = max(worst, relative_error(a.grad.full_tensor(), b.grad))
    return worst


def test_fsdp_compilation_and_checkpointing_at_once() -> None:
    cases = [("exact", 1), ("all_gather", 2)]
    for case, found in zip(cases, run_cases(sharded, 2, cases, timeout_s=120), strict=True):
        assert max(found) < 1e-5, case
