"""A training run as Hydra sees it, and the domain object it becomes at the door."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore

from flashcp.experiments.rows import REFERENCE
from flashcp.experiments.schema import register
from flashcp.sharding.methods import METHODS
from flashcp.train.checkpoint import CheckpointConfig
from flashcp.train.config import TrainConfig
from flashcp.train.data.sources import SOURCES, DataConfig, open_source
from flashcp.train.loop import LoopConfig
from flashcp.train.model import ModelConfig
from flashcp.train.optimizer import OptimizerConfig
from flashcp.train.parallel import ParallelConfig
from flashcp.train.tracker import TrackerConfig

__all__ = ["Run", "RunSettings", "SweepSettings", "read_run", "register_run"]


GROUP_FIELDS = ("sharding", "sharding_options", "exchange")  # of ParallelConfig: set by the groups

ParallelSettings: Any = dataclasses.make_dataclass(
    "ParallelSettings",
    [
        (item.name, item.type, field(default=item.default))
        for item in dataclasses.fields(ParallelConfig)
        if item.name not in GROUP_FIELDS
    ],
)


@dataclass
class SweepSettings:
    """What only `flashcp sweep` reads. name: of the sweep, and of its directory under outputs/.

    baseline: the method that speedups are over. reference: also run every job's packs on one process and compare
    the losses. rerun: run what results.csv already holds again.
    """

    name: str = "sweep"
    baseline: str = "llama3"
    reference: bool = True
    rerun: bool = False


@dataclass
class RunSettings:
    """`flashcp train` and `flashcp sweep`. threads: of each rank. out: directory, empty: below outputs/."""

    world_size: int = 2
    threads: int = 1
    context: int = 4096
    seed: int = 0
    out: str = ""
    method: str = ""
    data: Any = None
    sharding: Any = None
    exchange: Any = None
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sweep: SweepSettings = field(default_factory=SweepSettings)


@cache
def register_run() -> None:
    """Put the schema of a training run into the ConfigStore, once."""
    register()
    ConfigStore.instance().store(name="run_schema", node=RunSettings)


@dataclass(frozen=True)
class Run:
    """One training run: what `launch` starts. provider: the method, as tables name it. threads: of each rank."""

    provider: str
    world_size: int
    threads: int
    config: TrainConfig

    @property
    def case(self) -> str:
        """The work that providers are compared on, in short."""
        return f"{self.config.data.source}-c{short_tokens(self.config.context)}-n{self.world_size}"

    @property
    def digest(self) -> str:
        """8 hex digits of everything that decides the run's numbers: two equal ones need no second run."""
        config = dataclasses.asdict(self.config)
        for name in ("out", "tracker", "checkpoint"):
            del config[name]
        del config["loop"]["progress"]
        decides = {"world_size": self.world_size, "threads": self.threads, "config": config}
        return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=4).hexdigest()

    @property
    def reference(self) -> Run:
        """The same training on one process, on as many cores."""
        parallel = dataclasses.replace(
            self.config.parallel, sharding="contiguous", sharding_options={}, exchange="exact", overlap="auto"
        )
        config = dataclasses.replace(self.config, parallel=parallel)
        return Run(REFERENCE, 1, self.threads * self.world_size, config)


def read_run(settings: Mapping[str, Any], out: str) -> Run:
    """A run from a composed configuration. Raises ValueError naming value, field and legal values."""
    sections = dict(settings)
    world_size, threads, method = (sections.pop(name) for name in ("world_size", "threads", "method"))
    sharding, exchange = (dict(sections.pop(name)) for name in ("sharding", "exchange"))
    sweep = sections.pop("sweep")
    for name, value in (("world_size", world_size), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected a whole number >= 1")
    if sections["data"]["source"] not in SOURCES:
        open_source(DataConfig(source=sections["data"]["source"]))  # says why it cannot be trained on
    parallel = {"sharding": sharding.pop("name"), "sharding_options": sharding, "exchange": exchange["name"]}
    sections["parallel"] = {**sections["parallel"], **parallel}
    config = TrainConfig.from_dict({**sections, "out": out})
    run = Run(_provider(method, config.parallel), world_size, threads, config)
    tracker = config.tracker
    config.tracker = dataclasses.replace(
        tracker,
        group=tracker.group or sweep["name"],
        name=tracker.name or f"{run.provider}-n{world_size}-c{short_tokens(config.context)}",
    )
    return run


def _provider(method: str, parallel: ParallelConfig) -> str:
    """The published name of strategy and exchange, else both their names; options that are set follow."""
    pair = (parallel.sharding, parallel.exchange)
    if method in METHODS and METHODS[method][1:] == pair:
        return method
    return next((name for name, published in METHODS.items() if published[1:] == pair), "+".join(pair))


def short_tokens(tokens: int) -> str:
    """8192 -> 8k; what is no multiple of 1024 as it is."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def labels(overrides: Sequence[str]) -> str:
    """The overrides of a job that its case and provider do not show yet, as a suffix."""
    shown = {"method", "data", "context", "world_size", "experiment", "out"}
    return "".join(f"-{override}" for override in overrides if override.split("=")[0] not in shown)
