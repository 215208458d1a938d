"""`flashcp sweep experiment=NAME` for the sweeps of `conf/simulation/`: simulations, their rows, what they show."""

from __future__ import annotations

import datetime
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from hydra.core.hydra_config import HydraConfig

import flashcp
from flashcp.experiments.cli.compose import Job, Multirun, run_app
from flashcp.experiments.cli.packs import read_packs
from flashcp.experiments.cli.schema import committed
from flashcp.experiments.cli.simulate import check_cluster_file, chosen_machine, read_setting, simulate, step_of
from flashcp.experiments.paper.beyond import measured_rows
from flashcp.experiments.paper.figures import FIGURES, publish_figure
from flashcp.experiments.paper.published import SOLVED, solve_packs
from flashcp.experiments.sweep.report import show_rows
from flashcp.experiments.sweep.results import WINDOWS, Row, commit, digest, read_rows, unit, write_rows
from flashcp.simulation import summary_table
from flashcp.simulator.summary import Summary

CONFIG = "simulations"
METRICS = tuple(name for name, kind in get_type_hints(Summary).items() if kind in (int, float))


def is_simulation(overrides: Sequence[str]) -> bool:
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
        """Raise ValueError naming value, field and what is legal, for what `simulate` does not know too."""
        settings = job.settings
        check_cluster_file(settings, job.overrides)
        read_setting(settings)
        name, legal = settings["name"], SOLVED if settings["solver"]["granule"] else METRICS
        if name != Path(name).name or name in ("", ".."):
            raise ValueError(f"name={name!r}: expected the name of a folder below outputs/")
        if settings["figure"]:
            raise ValueError(f"figure={settings['figure']!r}: a sweep draws its own beside its rows; expected none")
        for metric in settings["metrics"]:
            if metric not in legal:
                raise ValueError(f"metrics: {metric!r}: expected one of {', '.join(legal)}")

    def run(self, jobs: Sequence[Job], alone: bool = False) -> None:
        """Rows of a job that runs alone wait in a folder of its own for the report."""
        for number, job in enumerate(jobs, start=1):
            rows = _simulated(job.settings, f"{number}/{len(jobs)}")
            if alone:
                place = self.out / "jobs" / f"{HydraConfig.get().job.num:04d}"
                place.mkdir(parents=True, exist_ok=True)
                write_rows(place, rows)
            else:
                self.rows += rows

    def report(self) -> None:
        rows, text = self.rows + [row for place in sorted(self.out.glob("jobs/*")) for row in read_rows(place)], ""
        write_rows(self.out, rows)
        if self.name in FIGURES:
            try:
                text = publish_figure(self.name, rows, self.out)
            except ValueError as error:  # the sweep was narrowed: its rows are worth keeping
                print(f"no figure: {' '.join(str(error).split())}", file=sys.stderr)
        show_rows(rows, text)
        print(f"wrote {self.out}", file=sys.stderr)


def _simulated(settings: Mapping[str, Any], number: str) -> list[Row]:
    """The rows of one job. number: which of how many, for the bar."""
    case = case_name(settings)
    numbers: dict[str, dict[str, float]]
    if settings["solver"]["granule"]:
        packs = read_packs(settings["data"], settings["context"], settings["windows"], settings["seed"])
        numbers = solve_packs(packs, settings["world_size"], **settings["solver"], label=f"{number} {case}")
        device, kind = platform.machine(), "simulated"
    else:
        found = simulate(settings, label=f"{number} {case}")
        packs, kind = found.packs, found.kind
        print(f"{case}\n{summary_table(found.summaries)}\n", file=sys.stderr)
        numbers = {one.name: {metric: getattr(one, metric) for metric in METRICS} for one in found.summaries}
        device = "; ".join(filter(None, (found.device, f"simulated {found.setting.machine.name}")))
    versions = f"flashcp {flashcp.__version__}, numpy {np.__version__}, python {platform.python_version()}"
    carried = (device, versions, commit(), datetime.date.today().isoformat(), kind, digest(settings))
    wanted = (*settings["metrics"], WINDOWS)
    return [
        Row(case, name, metric, unit(metric), None, None, value, None, *carried)
        for name, metrics in numbers.items()
        for metric, value in {**metrics, WINDOWS: float(len(packs))}.items()
        if metric in wanted or not settings["metrics"]
    ]


def case_name(settings: Mapping[str, Any]) -> str:
    """The work of a job, in short: lengths, window, ranks, heads, batch where it has several windows, cluster, overlap
    where one is chosen."""
    data, model, context = settings["data"], settings["model"], settings["context"]
    name = data["source"]
    if len(set(lengths := data.get("lengths") or [])) == 1:
        name = f"{len(lengths)}x{lengths[0]}"
    elif lengths or data.get("path"):
        name += f".{digest(lengths or data['path'], 3)}"
    if data.get("long_document_weight", 1) != 1:
        name += f"-w{data['long_document_weight']:g}"
    size = f"{context // 1024}k" if context % 1024 == 0 else str(context)
    heads = ":".join(dict.fromkeys((str(model["query_heads"]), str(model["kv_heads"]))))
    mask = "" if model["mask"] == "causal" else f"-{model['mask']}"
    if model["narrowed_layers"]:
        mask += f"-w{model['window']}.{model['chunk']}x{model['narrowed_layers']}.{model['layers']}"
    step = step_of(settings)
    batch = f"-b{step.batch_windows}" if step.windows > 1 else ""
    batch += f"x{step.micro_batches}.{step.waits}" if step.micro_batches > 1 else ""
    overlap = "" if settings["overlap"] == "auto" else f"-{settings['overlap']}"
    return f"{name}-c{size}-n{settings['world_size']}-h{heads}{mask}{batch}-{chosen_machine(settings).name}{overlap}"
