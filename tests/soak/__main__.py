"""What a long job does, two thousand times over, on every rank: does anything grow, is everything still right?

    python -m torch.distributed.run --standalone --nproc-per-node=4 -m tests.soak 2000 FOLDER       (`make soak`)

Every step draws a pack, masks, strategy, exchange, transport, head ranks and overlap, the same on all ranks, and runs
forward and backward. Operators live for some steps and are closed. Every tenth step is run once more, which has to give
the same bits, and compared with the float64 reference. Rank 0 writes results.csv and soak.png, and says what grew; the
exit code is then 1.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from tqdm import tqdm

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.experiments.sweep.results import Number, to_row, write_rows
from tests.flashcp.test_masks import KINDS, masks_of
from tests.packs import random_qkv, relative_error

OPERATORS = 6
BOUND = 1e-5
COMPARED, SAMPLES = 10, 100
MAY_GROW = {"rss_mib": 1.1, "descriptors": 1.25, "threads": 1.25, "shared_memory": 1.25}
"""The most of the second half over the most of the second quarter; the first quarter fills caches. Some operators have
more threads and descriptors than those of another: a leak would add some at every one of hundreds of ends."""


class Choice(NamedTuple):
    """What an operator is made with."""

    exchange: str
    transport: str
    head_ranks: int
    overlap: str
    backward: str
    gradient_wire: str


class Sample(NamedTuple):
    """Of one rank. shared_memory: entries of /dev/shm that are mapped here."""

    step: int
    rank: int
    rss_mib: float
    descriptors: int
    threads: int
    shared_memory: int


def draw_choice(draw: random.Random, ranks: int) -> Choice:
    exchange, transport = draw.choice(list(EXCHANGE_CLASSES)), draw.choice(("shm", "gloo"))
    head_ranks = draw.choice([count for count in (1, 2, 4) if ranks % count == 0])
    waits = transport == "shm" and exchange in ("exact", "compacted", "all_gather")
    overlap = draw.choice(("none", "staged", *["fused"] * waits))
    return Choice(
        exchange, transport, head_ranks, overlap, draw.choice(("keep", "refetch")), draw.choice(("model", "fp32"))
    )


def run_step(step: int, draw: random.Random, operators: dict[Choice, flashcp.ContextParallel]) -> float:
    """One forward and backward; its largest relative error where it is compared, else 0.

    Raises AssertionError where it is run once more, with other bits.
    """
    choice = draw_choice(draw, dist.get_world_size())
    if choice not in operators:
        if len(operators) == OPERATORS:
            operators.pop(draw.choice(list(operators))).close()
        operators[choice] = flashcp.ContextParallel(**choice._asdict(), timeout_s=60)
    cp = operators[choice]
    lengths = tuple(draw.choice((1, 2, 17, 64, draw.randrange(1, 200))) for _ in range(draw.randrange(1, 7)))
    masks, strategy = masks_of(draw.choice(KINDS), (*lengths, 8)[: len(lengths)]), draw.choice(flashcp.strategies())
    plan = flashcp.plan(lengths, cp.holders, strategy, masks=masks)
    q, k, v, grad = random_qkv(sum(lengths), 16, 16 if choice.exchange == "ulysses" else 4, 8, torch.float32, step)
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    prefetch = draw.random() < 0.5

    def run() -> list[torch.Tensor]:
        out = cp.prefetch(*local[1:], plan).attention(local[0]) if prefetch else cp.attention(*local, plan)
        return [out, *torch.autograd.grad(out, local, cp.shard(grad, plan))]

    found = run()
    if step % COMPARED:
        return 0.0
    assert all(map(torch.equal, found, run())), f"step {step}: other bits the second time"
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    reference = flashcp.reference_attention(*whole, lengths, masks=masks)
    expected = (reference, *torch.autograd.grad(reference, whole, grad.double()))
    size = float(grad.norm() * q.abs().max() * v.abs().max())  # of the terms of gradients that cancel: a row alone
    got = [cp.unshard(x.detach(), plan) for x in found]
    return max(
        relative_error(one, wanted.detach()) if wanted.norm() > 1e-9 * size else float(one.norm()) / size
        for one, wanted in zip(got, expected, strict=True)
    )


def sample(step: int) -> Sample:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line}  # their names are gone: ... (deleted)
    rss_mib = int(status["VmRSS"].split()[0]) / 1024
    return Sample(step, dist.get_rank(), rss_mib, len(os.listdir("/proc/self/fd")), int(status["Threads"]), len(mapped))


def what_grew(samples: Iterable[Sample]) -> list[str]:
    """A line for each quantity of each rank that grew."""
    found, every = [], sorted(samples)
    for rank in sorted({one.rank for one in every}):
        own = [one for one in every if one.rank == rank]
        early, late = own[len(own) // 4 : len(own) // 2], own[len(own) // 2 :]
        for name, ratio in MAY_GROW.items():
            before, after = (max(getattr(one, name) for one in some) for some in (early, late))
            if after > ratio * before:
                found.append(f"rank {rank}: {name} grew from {before:.0f} to {after:.0f}")
    return found


def main(steps: int, folder: Path) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    operators: dict[Choice, flashcp.ContextParallel] = {}
    samples: list[Sample] = []
    worst, begun = 0.0, time.perf_counter()
    for step in tqdm(range(1, steps + 1), unit="step", disable=dist.get_rank() > 0):
        worst = max(worst, run_step(step, random.Random(step), operators))
        if worst > BOUND:
            raise AssertionError(f"step {step}: relative error {worst:.1e}")
        if step % max(1, steps // SAMPLES) == 0:
            samples.append(sample(step))
    for cp in operators.values():
        cp.close()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (samples, worst))
    dist.destroy_process_group()
    every = [Sample(*one) for some, _ in told for one in some]
    grew = what_grew(every)
    if int(os.environ["RANK"]) == 0:
        case = f"{steps} steps on {len(told)} processes"
        numbers = [Number("soak", "largest_error", "1", None, max(error for _, error in told), None)]
        numbers.append(Number("soak", "same_to_the_bit", "1", None, steps // COMPARED, None))
        numbers.append(Number("soak", "seconds", "s", None, time.perf_counter() - begun, None))
        for name in MAY_GROW:
            for when, step in (("first", every[0].step), ("last", every[-1].step)):
                found = sorted(getattr(one, name) for one in every if one.step == step)
                numbers.append(Number("soak", f"{name}_{when}", "", found[0], statistics.median(found), found[-1]))
        print("\n".join(f"{one.metric}: {one.median:.4g}" for one in numbers))
        print("\n".join(grew) or "nothing grew")
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder, [to_row(case, one, f"CPU, {os.cpu_count()} cores") for one in numbers])
        draw(every, folder / "soak.png")
    return 1 if grew else 0


def draw(samples: Sequence[Sample], place: Path) -> None:
    """What each rank held, over the steps."""
    figure, axes = plt.subplots(len(MAY_GROW), sharex=True, figsize=(8, 9))
    for axis, name in zip(axes, MAY_GROW, strict=True):
        for rank in sorted({one.rank for one in samples}):
            own = [one for one in samples if one.rank == rank]
            axis.plot([one.step for one in own], [getattr(one, name) for one in own], label=f"rank {rank}")
        axis.set_ylabel(name.replace("_", " "))
        axis.set_ylim(bottom=0)
    axes[0].legend(ncols=4)
    axes[-1].set_xlabel("step")
    figure.savefig(place, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
