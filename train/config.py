"""The configuration of one training run: each section's dataclass lives beside the code that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashcp.files import read_bounded
from flashcp.limits import Count, Seed
from flashcp.options import planner, read_sharding
from flashcp.predicted import CHOOSING, predicted_time
from flashcp.schema import read_dataclass
from flashcp.sharding.documents import read_world_size
from flashcp.sharding.plan import ShardingPlan
from flashcp.train.checkpoint import CheckpointConfig
from flashcp.train.checksums import parse_json
from flashcp.train.data.sources import DataConfig
from flashcp.train.data.windows import LONGEST_CONTEXT
from flashcp.train.loop import LoopConfig
from flashcp.train.model_config import ModelConfig
from flashcp.train.optimizer import OptimizerConfig
from flashcp.train.parallel import ExchangeConfig, ParallelConfig
from flashcp.train.tracker import TrackerConfig


@dataclass
class TrainConfig:
    """One run, as `conf/train.yaml` explains it. out: its directory. sharding: a strategy's `name`, and its options.

    batch_windows: windows of a pack of all ranks; data_parallel: groups of ranks that share them out, each with a plan
    of its own. 1 plans the batch over all ranks.
    """

    out: str = "runs/train"
    context: int = 4096
    batch_windows: Count = 1
    data_parallel: Count = 1
    seed: Seed = 0
    profile: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sharding: dict[str, Any] = field(default_factory=lambda: {"name": "flashcp"})
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From a plain mapping (or an OmegaConf one). Raises ValueError for unknown keys and wrong types."""
        return read_dataclass(cls, values)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """From a JSON file. Raises ValueError when it is missing, not JSON, or not a config."""
        content = read_bounded(Path(path), f"config {path}", most_mib=16)
        try:
            values = parse_json(content)
        except ValueError as error:
            raise ValueError(f"config {path}: not JSON ({error})") from error
        return cls.from_dict(values)

    def check(self, world_size: int) -> None:
        """Raise ValueError, naming value, field and legal values, for what `world_size` ranks cannot run.

        The range of each value alone was checked when it was read.
        """
        world_size = read_world_size(world_size)
        if not self.out:
            raise ValueError("out is empty: expected a directory to write to")
        if world_size % self.data_parallel:
            raise ValueError(f"data_parallel={self.data_parallel}: expected a divisor of world_size={world_size}")
        if self.batch_windows % self.data_parallel:
            raise ValueError(
                f"batch_windows={self.batch_windows}: expected a multiple of data_parallel={self.data_parallel}"
            )
        ranks, windows = world_size // self.data_parallel, self.batch_windows // self.data_parallel
        if not 2 <= self.context <= LONGEST_CONTEXT:  # a token alone has no next token to predict
            raise ValueError(f"context={self.context}: expected a whole number from 2 to {LONGEST_CONTEXT}")
        if self.context * windows > LONGEST_CONTEXT:
            raise ValueError(
                f"batch_windows={self.batch_windows}: one plan for {self.context * windows} tokens, expected at most "
                f"{LONGEST_CONTEXT}"
            )
        if self.profile and self.loop.steps < 2:
            raise ValueError(f"profile=true with loop.steps={self.loop.steps}: expected at least 2, for one warms up")
        self.data.check()
        self.model.check()
        self.parallel.check_heads(ranks, self.model.heads, self.model.kv_heads, self.exchange)
        self.parallel.check()
        if self.model.latent and (self.exchange.name == "ulysses" or self.parallel.head_ranks != 1):
            raise ValueError(
                f"model.latent={self.model.latent} with exchange={self.exchange.name} and parallel.head_ranks="
                f"{self.parallel.head_ranks}: expected another exchange and 1"
            )
        planner(read_sharding(self.sharding), ranks)(np.array([ranks]))  # checks the options by using them

    @property
    def plans_by_time(self) -> bool:
        """Whether plans are chosen by predicted time: other strategies and `ulysses` leave no choice."""
        named = bool(self.parallel.cluster) and self.exchange.name in CHOOSING
        return named and self.sharding["name"] == "flashcp"

    def planner(self, holders: int, head_ranks: int) -> Callable[[np.ndarray], ShardingPlan]:
        """Document lengths of a pack -> its plan, chosen by predicted time on `parallel.cluster` where there is one.

        holders, head_ranks: the operator's.
        """
        parallel, model, cost = self.parallel, self.model, None
        if self.plans_by_time:
            cost = predicted_time(
                parallel.cluster,
                self.exchange.name,
                model.heads,
                model.kv_heads,
                model.dim // model.heads,
                dtype_bytes=self.loop.dtype.itemsize,
                overlap=parallel.overlap,
                gradient_wire=parallel.gradient_wire,
                head_ranks=head_ranks,
            )
        return planner(self.sharding, holders, model.mix(), cost)
