"""A training run as `conf/train.yaml` describes it, and the runs of a sweep made from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashcp.experiments.sweep.results import NO_OVERLAP, REFERENCE
from flashcp.limits import Count
from flashcp.options import read_sharding
from flashcp.schema import read_dataclass
from flashcp.sharding.methods import METHODS
from flashcp.train.config import TrainConfig
from flashcp.train.data.sources import SOURCES, DataConfig, open_source
from flashcp.train.parallel import ExchangeConfig

__all__ = ["Run", "RunSettings", "SweepSettings", "read_run"]


@dataclass
class SweepSettings:
    """What only `flashcp sweep` reads."""

    name: str = "sweep"
    baseline: str = "llama3"
    reference: bool = True
    rerun: bool = False
    turns: bool = True


@dataclass
class RunSettings(TrainConfig):
    """`conf/train.yaml`: what the ranks read, and what starts them."""

    out: str = ""
    world_size: Count = 2
    threads: Count = 1
    method: str = ""
    sweep: SweepSettings = field(default_factory=SweepSettings)

    @property
    def of_ranks(self) -> TrainConfig:
        """The part that every rank reads."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(TrainConfig)}
        return TrainConfig(**{**fields, "out": self.out or "outputs", "sharding": read_sharding(self.sharding)})

    @property
    def provider(self) -> str:
        """The published name of strategy and exchange, else both their names."""
        pair = (self.sharding["name"], self.exchange.name)
        if self.method in METHODS and METHODS[self.method][1:] == pair:
            return self.method
        return next((name for name, published in METHODS.items() if published[1:] == pair), "+".join(pair))


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
        parallel = dataclasses.replace(self.config.parallel, overlap="auto", transport="auto")
        one = dataclasses.replace(
            self.config, sharding={"name": "contiguous"}, exchange=ExchangeConfig("exact"), parallel=parallel
        )
        case = self.case.replace(f"-n{self.world_size}", "-n1", 1)
        return Run(case, REFERENCE, 1, self.threads, one)

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


def read_run(values: Mapping[str, Any], label: str = "") -> Run:
    """A run from a composed `conf/train.yaml`. label: added to its case.

    Raises ValueError naming value, field and legal values.
    """
    if values["data"].get("source") not in SOURCES:
        open_source(DataConfig(source=values["data"].get("source")))  # says why it cannot be trained on
    settings = read_dataclass(RunSettings, values)
    config = settings.of_ranks
    config.check(settings.world_size)
    dataclasses.replace(config.parallel, transport="auto").operator(config.exchange.name)  # it knows its legal values
    tokens = config.context
    short = f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
    case, provider = f"{config.data.source}-c{short}-n{settings.world_size}", settings.provider
    if settings.sweep.baseline == NO_OVERLAP:
        throttle = config.parallel.throttle_gbps
        case = f"{case}-{provider}" + (f"-{throttle:g}gbps" if throttle else "")
        provider = config.parallel.overlap
    return Run(case + label, provider, settings.world_size, settings.threads, config)
