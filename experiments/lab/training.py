"""Whole training steps in a lab: a small model under every method in turns, against the same run on one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from flashcp.experiments.bench.harness import spread
from flashcp.experiments.cli.launch import RanksFailedError, start_ranks
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.sweep.compare import relative_difference
from flashcp.experiments.sweep.results import REFERENCE, Number, Row
from flashcp.simulator.summary import BASELINE
from flashcp.simulator.variants import choose_variants
from flashcp.train.config import TrainConfig
from flashcp.train.loop import LoopConfig
from flashcp.train.model_config import ModelConfig
from flashcp.train.parallel import ExchangeConfig, ParallelConfig
from flashcp.train.summary import write_json

LAYERS = 2


def train_configs(bench: LabBench, folder: Path) -> dict[str, TrainConfig]:
    """A configuration a method, and one for a process alone, which write below the folder."""
    model = ModelConfig(
        dim=bench.query_heads * bench.head_dim, layers=LAYERS, heads=bench.query_heads, kv_heads=bench.kv_heads
    )
    configs = {}
    for method in [*choose_variants(bench.methods), None]:
        name = method.name if method else REFERENCE
        config = TrainConfig(
            out=str((folder / name).absolute()),
            context=bench.context,
            seed=bench.seed,
            model=model,
            parallel=ParallelConfig(timeout_s=bench.timeout_s, head_ranks=max(1, method.head_ranks if method else 1)),
            loop=LoopConfig(steps=bench.train_steps, device="cpu", timeout_s=bench.timeout_s, progress=False),
        )
        if method:
            config.sharding, config.exchange = {"name": method.sharding}, ExchangeConfig(method.exchange)
        configs[name] = config
    return configs


def write_configs(bench: LabBench, folder: Path) -> dict[str, Path]:
    """Each configuration in a file beside where its run writes."""
    files = {}
    for name, config in train_configs(bench, folder).items():
        files[name] = Path(config.out) / "config.json"
        files[name].parent.mkdir(parents=True, exist_ok=True)
        write_json(files[name], dataclasses.asdict(config))
    return files


def train_alone(config: Path) -> None:
    """Run it as one process of this machine. Raises RanksFailedError where it fails."""
    outcome = start_ranks(["-m", "flashcp.train", str(config)], 1, 1, config.with_name("ranks.log"), watch=lambda: None)
    if outcome.code:
        raise RanksFailedError(f"{REFERENCE}: {outcome.error}")


def training_rows(bench: LabBench, kind: str, files: dict[str, Path]) -> list[Row]:
    """train_step_ms and train_speedup: over the steps after the first, which warms up. loss_difference: the largest
    relative one of any step to the process alone."""
    found = {name: json.loads(file.with_name("summary.json").read_text()) for name, file in files.items()}
    times = {name: np.array(one["step_times_ms"][1:]) for name, one in found.items()}
    numbers = []
    for name in (name for name in found if name != REFERENCE):
        pairs = zip(found[name]["losses"], found[REFERENCE]["losses"], strict=True)
        difference = max(relative_difference(*pair) for pair in pairs)
        numbers += [
            Number(name, "train_step_ms", "ms", *spread(times[name])),
            Number(name, "train_speedup", "x", *spread(times[BASELINE] / times[name])),
            Number(name, "loss_difference", "share", None, difference, None),
        ]
    return [bench.row(number, f"{kind}; {bench.train_steps} steps of a small model") for number in numbers]
