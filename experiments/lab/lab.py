"""`flashcp bench lab`: attention under every method on an emulated cluster, predicted first and then measured.

The lab is built, its rates are measured, its links get the rates of a cluster's, the simulator says what will come, the
ranks run, and everything is taken down. Rows, table and picture tell predicted and measured times side by side.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashcp.experiments.bench.calibration import cluster_text
from flashcp.experiments.cli.launch import BAD_INPUT, RanksFailedError
from flashcp.experiments.folders import check_file
from flashcp.experiments.lab.alone import LabError
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.faults import Answering, CutSeen, cuts_seen
from flashcp.experiments.lab.kernels import time_kernels
from flashcp.experiments.lab.nodes import Node, built_nodes
from flashcp.experiments.lab.predict import lab_machine, predict
from flashcp.experiments.lab.rows import fault_rows, lab_rows, training_rows
from flashcp.experiments.lab.scale import OPEN, Rates, Scale
from flashcp.experiments.lab.start import run_on_nodes
from flashcp.experiments.lab.tables import lab_table
from flashcp.experiments.lab.training import train_alone, train_configs, training_numbers, write_configs
from flashcp.experiments.sweep.results import REFERENCE, RESULTS, Row, write_rows

__all__ = ["bench_lab", "lab_table"]

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
    rows = lab_rows(bench, scale, predicted, _read(records))
    if training:
        train_alone(training[REFERENCE])
        rows += training_rows(bench, scale, training_numbers(training))
    rows += fault_rows(bench, scale, cuts, _read(records))
    write_rows(folder, rows)
    from flashcp.experiments.lab.picture import draw_lab  # late: matplotlib

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
        arguments = ["-m", "flashcp.experiments.lab.step", step, *map(str, self.files)]
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


def _read(records: Path) -> list[dict[str, Any]]:
    """The records that are whole."""
    lines = records.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
