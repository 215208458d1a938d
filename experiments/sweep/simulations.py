"""`flashcp sweep experiment=NAME` for the sweeps of `conf/simulation/`: simulations, their rows, what they show."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from hydra.core.hydra_config import HydraConfig

import flashcp
from flashcp.experiments.cli.compose import Job, run_app
from flashcp.experiments.cli.packs import read_packs
from flashcp.experiments.cli.schema import committed
from flashcp.experiments.cli.simulate import simulate
from flashcp.experiments.cli.simulate_choices import check_cluster_file, chosen_machine, read_setting
from flashcp.experiments.cli.verbs import AS_JSON
from flashcp.experiments.paper.beyond import measured_rows
from flashcp.experiments.paper.figures import FIGURES, publish_figure
from flashcp.experiments.paper.published import SOLVED, solve_packs
from flashcp.experiments.provenance import commit
from flashcp.experiments.sweep.multirun import Multirun
from flashcp.experiments.sweep.results import WINDOWS, Row, read_rows, write_rows
from flashcp.simulation import summary_table
from flashcp.simulator.summary import Summary

__all__ = ["Simulations", "case_name", "is_simulation", "main"]

CONFIG = "simulations"
METRICS = tuple(name for name, kind in get_type_hints(Summary).items() if kind is float)
UNITS = {"mib": "MiB", "ms": "ms", "rows": "rows", "saving": "share", "imbalance": "max/mean", "max": "max/mean"}


def is_simulation(overrides: Sequence[str]) -> bool:
    """Whether the sweep that is named simulates."""
    return bool({f"experiment={name}" for name in committed("simulation")} & set(overrides))


def main(words: Sequence[str]) -> int:
    """Run every job, write the rows, draw what belongs to them, say how far the paper is."""
    named = [word.replace("experiment=", "simulation=", 1) for word in words]
    return run_app(Multirun.run_job, CONFIG, ["hydra.mode=MULTIRUN", *named])


class Simulations(Multirun):
    """The jobs of a sweep that simulates, and the figure of their rows."""

    config = CONFIG

    def start(self, settings: dict[str, Any]) -> None:
        self.name, self.rows = settings["name"], measured_rows(settings["measured"])
        shutil.rmtree(self.out / "jobs", ignore_errors=True)

    def check(self, job: Job) -> None:
        check_cluster_file(job.settings, job.overrides)
        read_setting(job.settings)
        _check(job.settings)

    def run_alone(self, job: Job) -> None:
        place = self.out / "jobs" / f"{HydraConfig.get().job.num:04d}"
        place.mkdir(parents=True, exist_ok=True)
        write_rows(place, _run(job, case_name(job.settings)))

    def run_all(self) -> None:
        for number, job in enumerate(self.jobs, start=1):
            self.rows += _run(job, f"{number}/{len(self.jobs)}")

    def report(self) -> None:
        """Write all rows and draw their figure."""
        rows = self.rows + [row for place in sorted(self.out.glob("jobs/*")) for row in read_rows(place)]
        write_rows(self.out, rows)
        if self.name in FIGURES:
            try:
                text = publish_figure(self.name, rows, self.out)
                print(text, file=sys.stderr if AS_JSON.get() else sys.stdout)
            except ValueError as error:  # the sweep was narrowed: its rows are worth keeping
                print(f"no figure: {' '.join(str(error).split())}", file=sys.stderr)
        if AS_JSON.get():
            print(json.dumps({"rows": [vars(row) for row in rows]}, indent=1))
        print(f"wrote {self.out}", file=sys.stderr)


def _check(settings: Mapping[str, Any]) -> None:
    """What `simulate` does not know. Raises ValueError naming value, field and what is legal."""
    name, legal = settings["name"], SOLVED if settings["solver"]["granule"] else METRICS
    if name != Path(name).name or name in ("", ".."):
        raise ValueError(f"name={name!r}: expected the name of a folder below outputs/")
    if settings["figure"]:
        raise ValueError(f"figure={settings['figure']!r}: a sweep draws its own beside its rows; expected none")
    for metric in settings["metrics"]:
        if metric not in legal:
            raise ValueError(f"metrics: {metric!r}: expected one of {', '.join(legal)}")


def _run(job: Job, number: str) -> list[Row]:
    settings = job.settings
    case = case_name(settings)
    if settings["solver"]["granule"]:
        packs = read_packs(settings["data"], settings["context"], settings["windows"], settings["seed"])
        numbers = solve_packs(packs, settings["world_size"], **settings["solver"], label=f"{number} {case}")
        device, kind = platform.machine(), "simulated"
    else:
        found = simulate(settings, label=f"{number} {case}")
        packs = found.packs
        print(f"{case}\n{summary_table(found.summaries)}\n", file=sys.stderr)
        numbers = {one.name: _numbers(one) for one in found.summaries}
        device, kind = f"simulated {found.setting.machine.name}", found.kernels.kind
        if found.kernels.device:
            device = f"{found.kernels.device}; {device}"
    numbers = {name: {**metrics, WINDOWS: float(len(packs))} for name, metrics in numbers.items()}
    versions = f"flashcp {flashcp.__version__}, numpy {np.__version__}, python {platform.python_version()}"
    carried = (device, versions, commit(), datetime.date.today().isoformat(), kind, _digest(settings, 4), "")
    return [
        Row(case, name, metric, UNITS.get(metric.rsplit("_", 1)[-1], "ratio"), None, None, value, None, *carried)
        for name, metrics in numbers.items()
        for metric, value in metrics.items()
        if metric in (*settings["metrics"], WINDOWS) or not settings["metrics"]
    ]


def _numbers(one: Summary) -> dict[str, float]:
    return {metric: getattr(one, metric) for metric in METRICS}


def case_name(settings: Mapping[str, Any]) -> str:
    """The work of a job, in short: lengths, window, ranks, heads, cluster, overlap where one is chosen."""
    data, model = settings["data"], settings["model"]
    name = data["source"]
    if len(set(lengths := data.get("lengths") or [])) == 1:
        name = f"{len(lengths)}x{lengths[0]}"
    elif lengths or data.get("path"):
        name += f".{_digest(lengths or data['path'], 3)}"
    if data.get("long_document_weight", 1) != 1:
        name += f"-w{data['long_document_weight']:g}"
    context = settings["context"]
    size = f"{context // 1024}k" if context % 1024 == 0 else str(context)
    heads = str(model["query_heads"])
    if model["kv_heads"] != model["query_heads"]:
        heads += f":{model['kv_heads']}"
    cluster = chosen_machine(settings).name
    overlap = "" if settings["overlap"] == "auto" else f"-{settings['overlap']}"
    return f"{name}-c{size}-n{settings['world_size']}-h{heads}-{cluster}{overlap}"


def _digest(value: Any, size: int) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=size).hexdigest()
