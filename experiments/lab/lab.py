"""`flashcp bench lab`: attention under every method on an emulated cluster, predicted first and then measured.

The lab is built, its rates are measured, its links get the rates of a cluster's, the simulator says what will come, the
ranks run, and everything is taken down. Rows, table and picture tell predicted and measured times side by side.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashcp.experiments.bench.calibration import cluster_text
from flashcp.experiments.bench.harness import spread
from flashcp.experiments.cli.launch import BAD_INPUT, Outcome, RanksFailedError, side_by_side
from flashcp.experiments.folders import check_file
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.faults import Answering, CutSeen, cuts_seen, fault_rows
from flashcp.experiments.lab.machine import TAKEN, LabError
from flashcp.experiments.lab.nodes import Node, built_nodes
from flashcp.experiments.lab.page import draw_lab, lab_table
from flashcp.experiments.lab.predict import OPEN, Rates, Scale, lab_machine, predict, time_kernels
from flashcp.experiments.lab.training import train_alone, train_configs, training_rows, write_configs
from flashcp.experiments.sweep.results import REFERENCE, RESULTS, Number, Row, write_rows
from flashcp.simulator.summary import BASELINE

__all__ = ["bench_lab", "lab_table"]

PORT = 29511
MACHINE = "machine.yaml"
WRITTEN = ("settings.json", "records.jsonl", MACHINE, "predicted.json", RESULTS, "lab.png")
"""Files of `out`, beside what the ranks of each step said."""


def bench_lab(bench: LabBench, out: str) -> tuple[list[Row], Path]:
    """Build, predict, measure, take down. Returns the rows and their directory.

    Raises ValueError for bad input, RanksFailedError where no lab can be built or a rank fails. Before the lab stands
    nothing is written.
    """
    bench.check()
    folder = Path(out)
    for name in WRITTEN:
        check_file(folder / name)
    settings, records = folder / "settings.json", folder / "records.jsonl"
    if bench.train_steps:
        for config in train_configs(bench, folder / "train").values():
            config.check(bench.world_size)
    try:
        link = dataclasses.replace(OPEN, delay_us=bench.delay_us)
        with built_nodes(bench.nodes, bench.ranks_per_node, link, bench.cores) as nodes:
            folder.mkdir(parents=True, exist_ok=True)
            settings.write_text(json.dumps(dataclasses.asdict(bench)))
            records.write_text("")
            ranks = _Ranks(bench, nodes, settings, records)
            print(f"{bench.case}: timing attention", file=sys.stderr)
            whole = time_kernels(bench)
            print("measuring the ranks' rates", file=sys.stderr)
            ranks.run("rate")
            scale = Scale.of(bench, Rates(**_read(records)[0]))
            print(f"emulated: {scale}", file=sys.stderr)
            for node in nodes:
                node.shape(scale.link_gbps)
            machine = lab_machine(scale, whole)
            (folder / MACHINE).write_text(cluster_text(machine, f"{bench.case}, as flashcp bench lab found it"))
            predicted = predict(scale, machine)
            (folder / "predicted.json").write_text(json.dumps(predicted, indent=1))
            print(f"predicted: {folder / 'predicted.json'}; now measuring", file=sys.stderr)
            ranks.run("run")
            training = write_configs(bench, folder / "train") if bench.train_steps else {}
            ranks.train([config for name, config in training.items() if name != REFERENCE])
            cuts = {method: ranks.cut(method, scale.link_gbps) for method in bench.faults}
    except LabError as error:
        raise RanksFailedError(str(error)) from error
    rows, kind = lab_rows(bench, scale, predicted, _read(records)), f"emulated: {scale}"
    if training:
        train_alone(training[REFERENCE])
        rows += training_rows(bench, kind, training)
    rows += fault_rows(bench, kind, cuts, _read(records))
    write_rows(folder, rows)
    draw_lab(rows, folder / "lab.png")
    return rows, folder


class _Ranks:
    """Starts the ranks of every node for one step after another."""

    def __init__(self, bench: LabBench, nodes: Sequence[Node], settings: Path, records: Path) -> None:
        self.bench, self.nodes, self.files = bench, nodes, [settings.absolute(), records.absolute()]

    def train(self, configs: Sequence[Path]) -> None:
        """Train every configuration, a step of each in turn. Raises as `run` does."""
        if configs:
            print("training", file=sys.stderr)
            self._start(["-m", "flashcp.train", *map(str, configs)], "train", lambda: None)

    def cut(self, method: str, link_gbps: float) -> list[CutSeen]:
        """Let a method meet the faults. Raises as `run` does."""
        answering = Answering(self.nodes, link_gbps, self.bench.world_size, self.files[1])
        self.run(method, answering)
        return cuts_seen(self.bench, self.files[1], answering.cut_at)

    def run(self, step: str, watch: Callable[[], None] | None = None) -> None:
        """Raises ValueError for bad input that the ranks find, RanksFailedError where one fails."""
        arguments = ["-m", "flashcp.experiments.lab.rank", step, *map(str, self.files)]
        self._start(arguments, step, watch or self._watch(step))

    def _start(self, arguments: Sequence[str], step: str, watch: Callable[[], None]) -> None:
        log = self.files[0].with_name(f"{step}.log")
        outcome = run_on_nodes(self.nodes, self.bench.ranks_per_node, arguments, log, watch)
        if outcome.code:
            raise ValueError(outcome.error) if outcome.code == BAD_INPUT else RanksFailedError(outcome.error)

    def _watch(self, step: str) -> Callable[[], None]:
        """A bar over what is timed."""
        if step == "rate":
            return lambda: None
        from tqdm import tqdm

        methods = len(self.bench.methods) + len(self.bench.one_plan)
        bar = tqdm(total=methods * self.bench.windows * self.bench.turns, unit="run", file=sys.stderr)

        def look() -> None:
            done = sum("turn" in record for record in _read(self.files[1]))
            if done > bar.n:
                bar.update(done - bar.n)

        return look


def run_on_nodes(
    nodes: Sequence[Node], ranks_per_node: int, arguments: Sequence[str], log: Path, watch: Callable[[], None]
) -> Outcome:
    """Run `python ARGUMENTS` as every rank of every node, to their end; what they say goes to `log`.

    watch: called a few times a second while they work, and once after.
    """
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    commands = [node.command(_torchrun(node, nodes, ranks_per_node, arguments)) for node in nodes]
    return side_by_side(commands, variables, log, watch)


def _torchrun(node: Node, nodes: Sequence[Node], ranks_per_node: int, arguments: Sequence[str]) -> list[str]:
    where = [f"--nnodes={len(nodes)}", f"--nproc-per-node={ranks_per_node}", f"--node-rank={node.index}"]
    where += [f"--master-addr={nodes[0].address}", f"--master-port={PORT}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--no-python"]
    return [*torchrun, *node.quotas.enter, sys.executable, *arguments]


def _read(records: Path) -> list[dict[str, Any]]:
    """The records that are whole."""
    lines = records.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


# --- what the ranks wrote, as rows: predicted and measured side by side


@dataclass(frozen=True)
class _Measured:
    """What ranks wrote of one method, turn after turn. ms: [turns]. sent, routed: bytes [turns, nodes]."""

    ms: np.ndarray
    sent: np.ndarray
    routed: np.ndarray


def measured(records: Sequence[dict[str, Any]]) -> dict[str, _Measured]:
    """By method, in the order of the records."""
    timed = sorted((record for record in records if "turn" in record), key=lambda record: record["turn"])
    found = {}
    for method in dict.fromkeys(record["method"] for record in records if "turn" in record):
        mine = [record for record in timed if record["method"] == method]
        found[method] = _Measured(
            *(np.array([one[key] for one in mine]) for key in ("ms", "sent_bytes", "route_bytes"))
        )
    return found


def lab_rows(
    bench: LabBench, scale: Scale, predicted: dict[str, list[float]], records: Sequence[dict[str, Any]]
) -> list[Row]:
    """Every number with what it must carry.

    module_ms: of the slowest rank, forward and backward, over windows and turns. speedup: the ratio to the baseline
    within a turn. predicted_ms, predicted_speedup: the simulator's, over windows. link_mb: that left all nodes, headers
    counted; route_mb: what the plans say.
    """
    kind = f"emulated: {scale}"

    def row(provider: str, metric: str, unit: str, numbers: tuple[float | None, float, float | None], kind: str) -> Row:
        return bench.row(Number(provider, metric, unit, *numbers), kind)

    found = measured(records)
    transports = {record["gate"]: record["transport"] for record in records if "gate" in record}
    rows = [
        row("lab", "link_gbps", "GB/s", (None, scale.link_gbps, None), kind),
        row("lab", "attention_tflops", "TFLOP/s", (None, scale.rates.tflops, None), kind),
        row("lab", TAKEN, "cores", (None, max(record[TAKEN] for record in records if TAKEN in record), None), kind),
        row("lab", "latency_us", "us", (None, scale.rates.latency_us, None), kind),
        row("lab", "socket_gbps", "GB/s", (None, scale.rates.socket_gbps, None), kind),
    ]
    base, base_predicted = found[BASELINE].ms, np.array(predicted[BASELINE])
    for method, numbers in found.items():
        over = f"{kind}; over {transports[method]}"
        ms = np.array(predicted[method])
        rows += [
            row(method, "module_ms", "ms", spread(numbers.ms), over),
            row(method, "speedup", "x", spread(base / numbers.ms), over),
            row(method, "predicted_ms", "ms", spread(ms), "simulated"),
            row(method, "predicted_speedup", "x", spread(base_predicted / ms), "simulated"),
            row(method, "link_mb", "MB", (None, float(numbers.sent.sum()) / 1e6, None), over),
            row(method, "route_mb", "MB", (None, float(numbers.routed.sum()) / 1e6, None), over),
        ]
    return rows
