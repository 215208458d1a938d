"""A training run as Hydra sees it, and the domain object it becomes at the door."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore

from flashcp.experiments.cli.options import naming_options
from flashcp.experiments.cli.schema import register
from flashcp.experiments.sweep.results import NO_OVERLAP, REFERENCE
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
        (
            item.name,
            get_type_hints(ParallelConfig)[item.name],
            field(default=item.default, default_factory=item.default_factory),
        )
        for item in dataclasses.fields(ParallelConfig)
        if item.name not in GROUP_FIELDS
    ],
)


@dataclass
class SweepSettings:
    """What only `flashcp sweep` reads. name: of the sweep, and of its directory under outputs/.

    baseline: the method that speedups are over; `none`: the sweep's lines are levels of overlap (`parallel.overlap`),
    compared with overlap `none` on each case. reference: also run every job's packs on one process and compare
    the losses. rerun: run what results.csv already holds again. turns: runs of one case that differ in the method take
    turns, step by step, on the same ranks; false: one after another, for models of which memory holds only one.
    """

    name: str = "sweep"
    baseline: str = "llama3"
    reference: bool = True
    rerun: bool = False
    turns: bool = True


@dataclass
class RunSettings:
    """`flashcp train` and `flashcp sweep`. threads: of each rank. out: directory, empty: below outputs/."""

    world_size: int = 2
    threads: int = 1
    context: int = 4096
    seed: int = 0
    profile: bool = False
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
    """One training run: what `launch` starts.

    case: the work that providers are compared on, in short. provider: the method, as tables name it, or the overlap
    where levels of overlap are compared on one method.
    threads: of each rank.
    """

    case: str
    provider: str
    world_size: int
    threads: int
    config: TrainConfig

    @property
    def digest(self) -> str:
        """8 hex digits of everything that decides the run's numbers: two equal ones need no second run."""
        config = dataclasses.asdict(self.config)
        for name in ("out", "tracker", "checkpoint"):
            del config[name]
        del config["loop"]["progress"]
        decides = {"world_size": self.world_size, "threads": self.threads, "config": config}
        return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=4).hexdigest()

    def alone(self) -> Run:
        """The same packs trained on by one process."""
        parallel = dataclasses.replace(
            self.config.parallel,
            sharding="contiguous",
            sharding_options={},
            exchange="exact",
            overlap="auto",
            transport="auto",
        )
        config = dataclasses.replace(self.config, parallel=parallel)
        case = self.case.replace(f"-n{self.world_size}", "-n1", 1)
        return Run(case, REFERENCE, 1, self.threads, config)

    def placed(self, folder: str, group: str, tags: Sequence[str]) -> Run:
        """The same run writing to a folder, tracked under a group with a name of its own."""
        tracker = self.config.tracker
        tracker = dataclasses.replace(
            tracker,
            group=tracker.group or group,
            name=tracker.name or f"{self.provider}-{self.case}",
            tags=[*tracker.tags, *tags],
        )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, out=folder, tracker=tracker))


def read_run(settings: Mapping[str, Any], label: str = "") -> Run:
    """A run from a composed configuration. label: added to its case.

    Raises ValueError naming value, field and legal values.
    """
    sections = dict(settings)
    world_size, threads, method = (sections.pop(name) for name in ("world_size", "threads", "method"))
    sharding, exchange = (dict(sections.pop(name)) for name in ("sharding", "exchange"))
    of_overlap = sections.pop("sweep")["baseline"] == NO_OVERLAP
    for name, value in (("world_size", world_size), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected a whole number >= 1")
    if sections["data"]["source"] not in SOURCES:
        open_source(DataConfig(source=sections["data"]["source"]))  # says why it cannot be trained on
    parallel = {"sharding": sharding.pop("name"), "sharding_options": sharding, "exchange": exchange["name"]}
    sections["parallel"] = {**sections["parallel"], **parallel}
    config = TrainConfig.from_dict({**sections, "out": sections["out"] or "outputs"})
    with naming_options(config.parallel.sharding_options):
        config.check(world_size)
    dataclasses.replace(config.parallel, transport="auto").operator()  # it knows its legal values
    tokens = config.context
    short = f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
    case, provider = f"{config.data.source}-c{short}-n{world_size}", _provider(method, config.parallel)
    if of_overlap:
        throttle = config.parallel.throttle_gbps
        case = f"{case}-{provider}" + (f"-{throttle:g}gbps" if throttle else "")
        provider = config.parallel.overlap
    return Run(case + label, provider, world_size, threads, config)


def _provider(method: str, parallel: ParallelConfig) -> str:
    """The published name of strategy and exchange, else both their names."""
    pair = (parallel.sharding, parallel.exchange)
    if method in METHODS and METHODS[method][1:] == pair:
        return method
    return next((name for name, published in METHODS.items() if published[1:] == pair), "+".join(pair))
