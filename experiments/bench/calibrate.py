"""`flashcp bench calibrate`: the parameters of the machine this runs on, as a file like those of `conf/cluster/`.

Attention is timed on random ranks' schedules of random packs: half of them fit the parameters, the other half says how
far predictions are from measurements. Copies, the link between two ranks and matrix products are timed besides.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn

from flashcp.context_parallel import ContextParallel
from flashcp.experiments.bench.calibration import (
    DIRECTIONS,
    SPLITS,
    TimeRow,
    cluster_text,
    errors,
    fit_attention,
    fit_line,
    write_times,
)
from flashcp.experiments.bench.exchange_times import exchanged, ranks_max
from flashcp.experiments.bench.harness import Clock, in_turns, median_us, provenance
from flashcp.experiments.bench.kernel_times import DTYPES, KernelTimer, RankSchedule, rank_schedule
from flashcp.experiments.cli import bar
from flashcp.limits import Count, Limit, Natural
from flashcp.schema import read_dataclass
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan, strategies
from flashcp.simulator.cost import AttentionShape, CopyCost, Link, Links, layer_flops
from flashcp.simulator.machine import Machine, PublishedCopies
from flashcp.train.attention import Rotary
from flashcp.train.model import Block
from flashcp.train.model_config import ModelConfig
from flashcp.train.ranks import Ranks

PUBLISHED = PublishedCopies(
    gathered_passes=8.0, shuffled_passes=11.0, compacted_passes=10.0, shard_us=8.0, sync_us=40.0
)
BESIDE = (".csv", ".png")
"""Suffixes of what is written beside the machine: the times and their picture."""
SHARES = (1, 2, 4, 8)
"""Of the heads: 1 / that many, as ranks that split heads compute."""
TIMEOUT_S = 120.0
ROUNDS = 20  # of each repeat over the link: messages are short, and two processes' turns vary
LINK_HEAD_DIM = 16
Counts = Annotated[list[int], Limit(lambda value: value and min(value) >= 1, "whole numbers >= 1")]


@dataclass
class CalibrateBench:
    """schedules: how many ranks' schedules fit the parameters, and as many check them. contexts: of their packs.

    The shape is that of the model that will be simulated; threads are of a rank.
    """

    schedules: Annotated[int, Limit(lambda value: value >= 10, "a whole number >= 10")] = 200
    repeats: Count = 5
    contexts: Counts = field(default_factory=lambda: [1024, 2048, 4096, 8192])
    world_sizes: Counts = field(default_factory=lambda: [2, 4, 8])
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: Annotated[int, Limit(lambda value: value >= 2 and value % 2 == 0, "an even number >= 2")] = 16
    dtype: Annotated[str, Limit(lambda value: value in ("fp32", "bf16"), "fp32 or bf16")] = "fp32"
    threads: Count = 1
    seed: Natural = 0

    def check(self) -> None:
        """Raise ValueError for settings that describe no measurement."""
        read_dataclass(CalibrateBench, vars(self))
        if 2 * min(self.world_sizes) > min(self.contexts):  # random packs are shorter, their lengths rounded down
            raise ValueError(
                f"world_sizes={self.world_sizes}: expected one that is at most half of each of contexts={self.contexts}"
            )
        if self.kv_heads < 1 or self.query_heads % self.kv_heads or self.query_heads < 1:
            raise ValueError(f"query_heads={self.query_heads}: expected a multiple of kv_heads={self.kv_heads}")


class Calibration(NamedTuple):
    """The machine that was found and every schedule beside its prediction."""

    machine: Machine
    times: list[TimeRow]


def bench_calibrate(bench: CalibrateBench) -> Iterator[Calibration]:
    """Measure everything. Raises ValueError for settings that describe no measurement."""
    bench.check()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(bench.threads)
    shape = AttentionShape(bench.query_heads, bench.kv_heads, bench.head_dim, {"bf16": 2, "fp32": 4}[bench.dtype])
    random = np.random.default_rng(bench.seed)
    schedules = [random_schedule(bench.contexts, bench.world_sizes, random) for _ in range(2 * bench.schedules)]
    timer = KernelTimer(device, bench.repeats)
    timer.check(shape)
    shapes = [random_shape(shape, random) for _ in schedules]
    measured = attention_us(timer, schedules, shapes)
    attention, predicted = fit_attention(schedules, shapes, measured, bench.schedules)
    copies = copy_cost(shape, bench.repeats, device)
    ranks_here = torch.cuda.device_count() if cuda else 2
    link = Link(gbps=50.0, latency_us=5.0)
    linked = ranks_here > 1
    if linked:
        sizes = np.array([2**power for power in range(14, 25, 2)])
        packing = copies.us(5 * sizes, launches=0)  # a block is cleared and written first; the simulator counts that
        slope, start = fit_line(sizes.tolist(), (link_us(sizes.tolist(), bench.repeats, cuda) - packing).tolist())
        link = Link(1e-3 / slope, start)
    machine = Machine(
        name="this_machine",
        attention=attention,
        copies=copies,
        links=Links(ranks_here if linked else 8, link, link),
        gemm_tflops=layer_tflops(shape, max(bench.contexts) // 2, bench.repeats, device),
        published=PUBLISHED,
        provenance=_provenance(bench, device, linked),
    )
    carried = provenance()
    times = []
    for index, (one, some) in enumerate(zip(schedules, shapes, strict=True)):
        split = SPLITS[index >= bench.schedules]
        size = (some.query_heads, one.query_rows, one.schedule.pairs, len(one.schedule.source))
        for direction, us, ours in zip(DIRECTIONS, measured, predicted, strict=True):
            times.append(TimeRow(index, split, direction, *size, us[index], ours[index], *carried))
    yield Calibration(machine, times)


def random_schedule(contexts: Sequence[int], world_sizes: Sequence[int], random: np.random.Generator) -> RankSchedule:
    """A rank of a random plan of a random pack: one to 24 documents of very different lengths."""
    context = int(random.choice(contexts))
    weights = random.lognormal(0.0, 1.5, int(random.integers(1, 25)))
    lengths = np.maximum(1, (context * weights / weights.sum()).astype(np.int64))
    ranks = int(random.choice([ranks for ranks in world_sizes if ranks <= lengths.sum()]))
    made = plan(lengths, ranks, str(random.choice(strategies())))
    one = rank_schedule(made, int(random.integers(ranks)))
    assert one is not None  # every rank reads its own rows
    return one


def random_shape(shape: AttentionShape, random: np.random.Generator) -> AttentionShape:
    """All heads, or the share of them that one of several ranks has."""
    ranks = int(random.choice([ranks for ranks in SHARES if shape.kv_heads % ranks == 0]))
    return shape._replace(query_heads=shape.query_heads // ranks, kv_heads=shape.kv_heads // ranks)


def attention_us(
    timer: KernelTimer, schedules: Sequence[RankSchedule], shapes: Sequence[AttentionShape]
) -> list[list[float]]:
    """Times of each schedule at its shape: forward, and backward."""
    pairs = bar(zip(schedules, shapes, strict=True), total=len(schedules), unit="schedule", desc="attention", delay=2.0)
    return cast(list[list[float]], np.array([timer.times(one, some) for one, some in pairs]).T.tolist())


def copy_cost(shape: AttentionShape, repeats: int, device: torch.device) -> CopyCost:
    """What copies of rows of K and V cost."""
    sizes = [shape.kv_bytes * 4**power for power in range(3, 9)]
    slope, start = fit_line([2 * size for size in sizes], copy_us(sizes, shape.kv_bytes, repeats, device))
    return CopyCost(1e-3 / slope, start)  # what is copied is read and written


def copy_us(sizes: Sequence[int], row_bytes: int, repeats: int, device: torch.device) -> list[float]:
    """Time to gather `sizes` bytes, whole rows each, by an index, as rows are packed before they leave."""
    times = []
    for size in sizes:
        rows = size // row_bytes
        memory = torch.randn(rows, row_bytes // 4, device=device)
        index = torch.randperm(rows, device=device)
        times.append(median_us(partial(memory.__getitem__, index), repeats, device))
    return times


def layer_tflops(
    shape: AttentionShape, rows: int, repeats: int, device: torch.device, clock: Clock | None = None
) -> float:
    """10^12 operations of matrix products a second that a decoder layer reaches, all but its attention counted in."""
    dim = shape.query_heads * shape.head_dim
    model = ModelConfig(dim=dim, heads=shape.query_heads, kv_heads=shape.kv_heads)
    dtype = DTYPES[shape.dtype_bytes]
    block = Block(model, cast(Any, _NoAttention()), 0).to(device, dtype)
    x = torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True)
    rotary = Rotary(shape.head_dim, model.rope_theta).to(device)(torch.arange(rows, device=device))
    one = plan([rows], 1)
    us = median_us(lambda: block(x, rotary, one).backward(x.detach()), repeats, device, clock)
    return layer_flops(shape, 0, rows) / (1e6 * us)


class _NoAttention:
    """Leaves queries as they are: what a layer takes without its attention."""

    def prefetch(
        self, k: Tensor, v: Tensor, plan: ShardingPlan, *, window: int | None = None, chunk: int | None = None
    ) -> _NoAttention:
        """Both are part of the output, so that their gradients are computed."""
        self._share = (k.sum() + v.sum()) * 0
        return self

    def attention(self, q: Tensor, *, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        return q + self._share


def link_us(sizes: Sequence[int], repeats: int, cuda: bool) -> np.ndarray:
    """Time until each of two ranks of this machine has `sizes` bytes of K and V of the other, as an exchange moves
    them: over shared memory, or NCCL on two GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, (Path(folder), sizes, repeats, cuda), nprocs=2, daemon=True)
        except ProcessException as error:
            raise RuntimeError("one of two ranks of this machine ended before it had measured the link") from error
        return np.load(Path(folder) / "us.npy")


def _rank(rank: int, folder: Path, sizes: Sequence[int], repeats: int, cuda: bool) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, timeout = f"file://{folder / 'store'}", timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("nccl" if cuda else "gloo", store, timeout, world_size=2, rank=rank)
    cp = ContextParallel(exchange="all_gather", timeout_s=TIMEOUT_S)
    ranks, work = Ranks(rank, 2, device), {}
    for size in sizes:  # one document in two halves, and a rank's K and V of it: `size` bytes together
        rows = max(1, size // (2 * 4 * LINK_HEAD_DIM))
        halves = ShardingPlan.from_shards([2 * rows], 2, [(0, 0, rows, 0), (0, rows, 2 * rows, 1)])
        k, v = (torch.zeros(rows, 1, LINK_HEAD_DIM, device=device) for _ in range(2))
        work[size] = partial(exchanged, cp, halves, k, v)
    times = in_turns(work, ranks, rounds=ROUNDS * repeats)
    medians = [1e3 * float(np.median(ranks_max(ranks, times[size]))) for size in sizes]
    if rank == 0:
        np.save(folder / "us.npy", medians)
    dist.barrier()
    dist.destroy_process_group()


def _provenance(bench: CalibrateBench, device: torch.device, linked: bool) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    _, versions, commit, date = provenance()
    measured = f"measured: {name}, torch {torch.__version__}, {versions}, commit {commit}, {date}"
    kernel = f"{measured}; {bench.query_heads} query heads, {bench.kv_heads} KV heads, head_dim {bench.head_dim}, "
    node = "assumption: one machine"
    if device.type == "cuda":
        node = "the GPUs of this machine" if linked else "assumption: nodes of eight GPUs"
    return {
        "attention": f"{kernel}{bench.dtype}, {bench.threads} threads, {bench.schedules} random schedules; what the "
        "fit could not tell from other parameters stands at a bound (1e6 GB/s, masked 0.01)",
        "copies": measured,
        "links": f"{measured}, two ranks of this machine" if linked else "assumption: nothing to measure on one GPU",
        "links.ranks_per_node": node,
        "gemm_tflops": measured,
        "published": "assumption: rounded from h100-nvlink, fitted to the paper there",
    }


def calibration_table(found: list[Calibration]) -> str:
    """Errors and parameters."""
    (calibration,) = found
    lines = []
    for direction in DIRECTIONS:
        for split in SPLITS:
            median, p95, count = errors(calibration.times, direction, split)
            lines.append(f"{direction:<9} {split:<6} {count:>4} schedules  error median {median:.1%}  p95 {p95:.1%}")
    machine = calibration.machine
    tiles = f"{' x '.join(map(str, machine.attention.tiles))} rows"
    sections = {"forward": machine.attention.forward, "backward": machine.attention.backward, "tiles": tiles}
    for name, section in (sections | {"copies": machine.copies, "link": machine.links.node}).items():
        lines.append(f"{name:<9} {section if isinstance(section, str) else _told(section)}")
    return "\n".join([*lines, f"matrix products {machine.gemm_tflops:.4g} TFLOP/s"])


def _told(section: Any) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in asdict(section).items())


def write_calibration(path: Path, found: list[Calibration]) -> None:
    """The machine as YAML; beside it every time as CSV, and the picture of both where matplotlib is installed."""
    (calibration,) = found
    machine = replace(calibration.machine, name=path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = f"flashcp simulate cluster={path.stem}; made by flashcp bench calibrate"
    path.write_text(cluster_text(machine, about), encoding="utf-8")
    rows, picture = map(path.with_suffix, BESIDE)
    write_times(rows, calibration.times)
    try:
        from flashcp.experiments.plots import draw_calibration
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return
    draw_calibration(calibration.times, picture)
