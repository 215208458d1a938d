"""Random programs of some ranks, on random schedules of their devices: what every rank gets is what the reference says.

python -m tests.emulation.schedules --count 1000 --seed 0
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import flashcp
from tests.emulation.ranks import Rank, run_emulated
from tests.packs import random_qkv, relative_error

__all__ = ["LIMIT", "Program", "draw_program", "errors_of", "layers", "main", "worst_of_one"]

LIMIT = 1e-5
ONE_ARRIVAL = ("exact", "compacted", "all_gather")  # exchanges whose rows can be waited for inside a kernel
HEADS, KV_HEADS, DIM = 4, 4, 8


class Program(NamedTuple):
    """What all ranks do. discards: share of handles and graphs that are thrown away."""

    ranks: int = 2
    exchange: str = "exact"
    overlap: str = "staged"
    backward: str = "keep"
    stages: int = 2
    steps: int = 1
    layers: int = 2
    ahead: int = 1
    discards: float = 0.0
    most_tokens: int = 40
    queues: int = 0
    head_ranks: int = 1


def draw_program(seed: int) -> Program:
    """Any exchange and overlap that go together, on 2 to 4 ranks."""
    draw = random.Random(seed)
    overlap = draw.choice(("none", "staged", "fused"))
    ranks = draw.choice((2, 2, 2, 3, 4))
    heads = HEADS % ranks == 0  # ulysses shares them out
    others = ("ring", "ulysses") if heads else ("ring",)
    exchange = draw.choice(ONE_ARRIVAL if overlap == "fused" else (*ONE_ARRIVAL, *others))
    return Program(
        ranks, exchange, overlap, draw.choice(("keep", "refetch")), draw.choice((1, 2, 3)), draw.choice((1, 1, 1, 2)),
        draw.choice((1, 1, 2)), draw.choice((0, 1, 2)), draw.choice((0.0, 0.0, 0.3)), draw.choice((12, 20, 40)),
        draw.choice((0, 0, 0, 1)), draw.choice({2: (1, 1, 2), 3: (1,), 4: (1, 2, 2, 4)}[ranks]),
    )  # fmt: skip


def layers(program: Program, seed: int, rank: Rank) -> float:
    """The largest error of all outputs and gradients of one rank; its rows differ from layer to layer."""
    draw, strategies = random.Random(seed), flashcp.strategies()
    cp = rank.operator(
        exchange=program.exchange, overlap=program.overlap, backward=program.backward, stages=program.stages
    )
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    for step in range(program.steps):
        lengths = [draw.randint(1, 12) for _ in range(draw.randint(0, 4))] + [draw.randint(8, program.most_tokens)]
        plan = flashcp.plan(lengths, cp.holders, draw.choice(strategies))
        if draw.random() < 0.15:  # whole documents, of which some ranks may have none
            dealt = [(i, 0, length, i % cp.holders) for i, length in enumerate(lengths)]
            plan = flashcp.ShardingPlan.from_shards(lengths, cp.holders, dealt)
        rows = [_Layer(rank, cp, plan, 1000 * seed + 10 * step + layer) for layer in range(program.layers)]
        handles: list[flashcp.context_parallel.Handle] = []
        kept = []
        for layer in range(program.layers):
            while len(handles) < min(program.layers, layer + 1 + program.ahead):
                handles.append(rows[len(handles)].prefetch())
                if draw.random() < program.discards:
                    handles[-1] = rows[len(handles) - 1].prefetch()  # the first one is forgotten
            out = handles[layer].attention(rows[layer].leaves[0])
            handles[layer] = None  # type: ignore[call-overload]
            if draw.random() < program.discards:
                del out  # a graph that nobody walks back
            else:
                kept.append((layer, out))
        for layer, out in reversed(kept):
            gradients = torch.autograd.grad(out, rows[layer].leaves, out.detach())
            found.append(([out.detach(), *gradients], rows[layer].expected))
        del kept, rows, handles
        if draw.random() < 0.5:
            cp.synchronize()
    cp.synchronize()
    return max((relative_error(rank.device.download(x), y) for pair in found for x, y in zip(*pair, strict=True)),
               default=0.0)  # fmt: skip


class _Layer:
    """q, k, v of one layer on the device; what the reference makes of them: output, gradients of its squares / 2."""

    def __init__(self, rank: Rank, cp: flashcp.ContextParallel, plan: flashcp.ShardingPlan, seed: int) -> None:
        self._cp, self._plan = cp, plan
        *qkv, _ = random_qkv(int(plan.offsets[-1]), HEADS, KV_HEADS, DIM, torch.float32, seed)
        self.leaves = [rank.device.upload(cp.shard(x, plan)).requires_grad_() for x in qkv]
        self.expected = [cp.shard(x, plan) for x in _reference(tuple(plan.document_lengths.tolist()), seed)]

    def prefetch(self) -> flashcp.context_parallel.Handle:
        """Its rows leave."""
        return self._cp.prefetch(*self.leaves[1:], self._plan)


@lru_cache(maxsize=64)
def _reference(lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    """Output and gradients of the whole pack, computed by no device."""
    *qkv, _ = random_qkv(sum(lengths), HEADS, KV_HEADS, DIM, torch.float32, seed)
    with _disable_current_modes():
        whole = [x.double().requires_grad_() for x in qkv]
        out = flashcp.reference_attention(*whole, lengths)
        return [x.detach() for x in (out, *torch.autograd.grad(out, whole, out.detach()))]


def errors_of(program: Program, seed: int) -> list[float]:
    """The largest error of each rank on the schedule of that seed. Raises what the emulation finds."""
    options = {"queues": program.queues, "head_ranks": program.head_ranks}
    return run_emulated(lambda rank: layers(program, seed, rank), program.ranks, seed, **options)


def worst_of_one(seed: int) -> tuple[Program, float]:
    """The program that a seed draws, and the largest error of its ranks."""
    program = draw_program(seed)
    return program, max(errors_of(program, seed))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run so many schedules; print how many, which, the largest error and how long it took. Returns 0, or 1."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m tests.emulation.schedules", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="of schedules (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="that run them (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, least in (("count", 1), ("seed", 0), ("processes", 1)):
        if not least <= getattr(options, name) < 2**31:
            print(f"schedules: {name}={getattr(options, name)}: expected a whole number >= {least}", file=sys.stderr)
            return 2
    began, worst, wrong = time.monotonic(), 0.0, 0
    seeds = range(options.seed, options.seed + options.count)
    with ProcessPoolExecutor(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(tqdm(pool.map(worst_of_one, seeds), total=len(seeds), unit="schedule", file=sys.stderr))
    for seed, (program, error) in zip(seeds, found, strict=True):
        worst = max(worst, error)
        if not error < LIMIT:
            wrong += 1
            print(f"seed {seed}: error {error:.1e}, {program}")
    took = f"{time.monotonic() - began:.0f} s"
    which = f"{options.count} schedules, seeds {seeds.start} to {seeds.stop - 1}"
    print(f"{which}: {wrong} wrong, largest error {worst:.1e}, {took}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
