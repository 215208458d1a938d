"""`flashcp bench calibrate`: the parameters of the machine this runs on, as a file like those of `conf/cluster/`.

Attention is timed on random ranks' schedules of random packs: half of them fit the parameters, the other half says how
far predictions are from measurements. Copies, the link between two ranks and matrix products are timed besides.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flashcp.experiments.bench.calibration.attention import fit_attention, random_schedule, random_shape, time_attention
from flashcp.experiments.bench.calibration.fit import fit_line
from flashcp.experiments.bench.calibration.links import copy_us, layer_tflops, link_us
from flashcp.experiments.bench.calibration.times import DIRECTIONS, SPLITS, TimeRow, errors, write_times
from flashcp.experiments.bench.cluster_text import cluster_text
from flashcp.experiments.bench.kernel_times import KernelTimer
from flashcp.experiments.bench.planner import provenance
from flashcp.experiments.bench.timing import own_clock
from flashcp.simulator.cost import AttentionShape, CopyCost, Link, Links
from flashcp.simulator.machine import Machine, PublishedCopies

__all__ = ["BESIDE", "CalibrateBench", "Calibration", "bench_calibrate", "calibration_table", "write_calibration"]

PUBLISHED = PublishedCopies(
    gathered_passes=8.0, shuffled_passes=11.0, compacted_passes=10.0, shard_us=8.0, sync_us=40.0
)
BESIDE = (".csv", ".png")
"""Suffixes of what is written beside the machine: the times and their picture."""


@dataclass
class CalibrateBench:
    """schedules: how many ranks' schedules fit the parameters, and as many check them. contexts: of their packs.

    The shape is that of the model that will be simulated; threads are of a rank. dtype: fp32 or bf16.
    """

    schedules: int = 200
    repeats: int = 5
    contexts: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192])
    world_sizes: list[int] = field(default_factory=lambda: [2, 4, 8])
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: str = "fp32"
    threads: int = 1
    seed: int = 0


class Calibration(NamedTuple):
    """The machine that was found and every schedule beside its prediction."""

    machine: Machine
    times: list[TimeRow]


def bench_calibrate(bench: CalibrateBench) -> Iterator[Calibration]:
    """Measure everything. Raises ValueError for settings that describe no measurement."""
    _check(bench)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(bench.threads)
    dtype = torch.float32 if bench.dtype == "fp32" else torch.bfloat16
    shape = AttentionShape(bench.query_heads, bench.kv_heads, bench.head_dim, dtype.itemsize)
    random = np.random.default_rng(bench.seed)
    schedules = [random_schedule(bench.contexts, bench.world_sizes, random) for _ in range(2 * bench.schedules)]
    clock = own_clock(device, bench.threads)
    timer = KernelTimer(device, bench.repeats, clock)
    timer.check(shape)
    shapes = [random_shape(shape, random) for _ in schedules]
    forward, backward = time_attention(schedules, shapes, timer)
    attention, predicted = fit_attention(schedules, shapes, (forward, backward), bench.schedules)
    copied_bytes = [shape.kv_bytes * 4**power for power in range(3, 9)]
    copied = copy_us(copied_bytes, shape.kv_bytes, bench.repeats, device, clock)
    copy_slope, copy_start = fit_line([2 * size for size in copied_bytes], copied)  # read and written
    copies = CopyCost(1e-3 / copy_slope, copy_start)
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
        gemm_tflops=layer_tflops(shape, max(bench.contexts) // 2, bench.repeats, device, clock),
        published=PUBLISHED,
        provenance=_provenance(bench, device, linked),
    )
    carried = provenance()
    times = []
    for index, one in enumerate(schedules):
        split = "fit" if index < bench.schedules else "check"
        for direction, measured, ours in (
            ("forward", forward[index], predicted[0][index]),
            ("backward", backward[index], predicted[1][index]),
        ):
            size = (shapes[index].query_heads, one.query_rows, one.schedule.pairs, len(one.schedule.source))
            times.append(TimeRow(index, split, direction, *size, measured, ours, *carried))
    yield Calibration(machine, times)


def _check(bench: CalibrateBench) -> None:
    for name, least in (("schedules", 10), ("repeats", 1), ("threads", 1), ("seed", 0)):
        if getattr(bench, name) < least:
            raise ValueError(f"{name}={getattr(bench, name)}: expected a whole number >= {least}")
    if bench.dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype={bench.dtype!r}: expected fp32 or bf16")
    for name in ("contexts", "world_sizes"):
        if not getattr(bench, name) or min(getattr(bench, name)) < 1:
            raise ValueError(f"{name}={getattr(bench, name)}: expected whole numbers >= 1")
    if 2 * min(bench.world_sizes) > min(bench.contexts):  # random packs are shorter, their lengths rounded down
        raise ValueError(
            f"world_sizes={bench.world_sizes}: expected one that is at most half of each of contexts={bench.contexts}"
        )
    if bench.head_dim < 2 or bench.head_dim % 2:
        raise ValueError(f"head_dim={bench.head_dim}: expected an even number >= 2")
    if bench.kv_heads < 1 or bench.query_heads % bench.kv_heads or bench.query_heads < 1:
        raise ValueError(f"query_heads={bench.query_heads}: expected a multiple of kv_heads={bench.kv_heads}")


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
    for direction, kernel in zip(DIRECTIONS, (machine.attention.forward, machine.attention.backward), strict=True):
        lines.append(f"{direction:<9} {_told(kernel)}")
    lines.append(f"{'tiles':<9} {' x '.join(map(str, machine.attention.tiles))} rows")
    lines.append(f"{'copies':<9} {_told(machine.copies)}")
    lines.append(f"{'link':<9} {_told(machine.links.node)}")
    return "\n".join([*lines, f"matrix products {machine.gemm_tflops:.4g} TFLOP/s"])


def _told(section: Any) -> str:
    """Every parameter of a section with its number."""
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
