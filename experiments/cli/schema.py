"""What `conf/` may say: its groups, and the dataclasses that its files for plan, simulate and simulations become.

`conf/` holds every key with its default; a test holds the two against each other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any

from flashcp.clusters import read_machine
from flashcp.limits import Count, one_of
from flashcp.options import read_sharding
from flashcp.schema import read_dataclass
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.lengths import LENGTH_DATA, SIGMA
from flashcp.sharding.methods import METHODS
from flashcp.sharding.packing import OVERFLOWS
from flashcp.sharding.strategies import STRATEGIES
from flashcp.simulator.cost import ModelShape
from flashcp.simulator.variants import PLAN_BY
from flashcp.train.data.sources import SOURCES, DataConfig


def committed(group: str) -> tuple[str, ...]:
    """Names of the files of a group in `conf/`."""
    files = (resources.files("flashcp.conf") / group).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


_REGISTERED = (*SOURCES, "lengths", *LENGTH_DATA)
GROUPS = {
    "method": tuple(METHODS),
    "sharding": tuple(STRATEGIES),
    "exchange": tuple(EXCHANGES),
    "data": (*_REGISTERED, *(name for name in committed("data") if name not in _REGISTERED)),
    "cluster": committed("cluster"),
    "model": committed("model"),
}
"""Groups and their legal values; a configuration has those it names (`experiment` is the sweeps' own)."""


Overflow = Annotated[str, one_of(OVERFLOWS)]


@dataclass
class LengthsData:
    """Document lengths without text: `path` holds one a line, or `lengths` lists them."""

    source: str = "lengths"
    path: str = ""
    lengths: list[int] = field(default_factory=list)
    overflow: Overflow = "truncate"


@dataclass
class SampledData:
    """Document lengths drawn from a published distribution (`flashcp.sharding.lengths`)."""

    source: str
    long_document_weight: float = 1.0
    sigma: float = SIGMA
    overflow: Overflow = "truncate"


DATA: dict[str, type[Any]] = {
    **dict.fromkeys(SOURCES, DataConfig),
    "lengths": LengthsData,
    **dict.fromkeys(LENGTH_DATA, SampledData),
}
"""What the section `data` becomes, by its source."""


@dataclass
class PlanSettings:
    """`conf/plan.yaml`."""

    world_size: int = 8
    context: int = 131_072
    windows: Count = 100
    batch_windows: Count = 1
    head_ranks: Count = 1
    seed: int = 0
    figure: str = ""
    method: str = ""
    data: Any = None
    sharding: Any = None
    exchange: Any = None
    model: Any = None


@dataclass
class SimulateSettings(PlanSettings):
    """`conf/simulate.yaml`."""

    micro_batches: int = 1
    waits: str = "micro_batch"
    head_ranks: Any = "auto"
    overlap: str = "auto"
    gradient_wire: str = "auto"
    plan_by: Annotated[str, one_of(PLAN_BY)] = "time"
    cluster_file: str = ""
    kernel: Annotated[str, one_of(("modelled", "measured"))] = "modelled"
    workers: int = 1
    methods: list[str] = field(default_factory=list)
    cluster: Any = None
    model: ModelShape = field(default_factory=ModelShape)


@dataclass
class SolverSettings:
    """The exact solver beside the strategies (`flashcp.sharding.solver`)."""

    granule: int = 0
    limit_s: float = 20.0


@dataclass
class SimulationsSettings(SimulateSettings):
    """`conf/simulations.yaml`: a sweep that simulates."""

    name: str = "simulations"
    head_ranks: Any = 1
    plan_by: Annotated[str, one_of(PLAN_BY)] = "rows"
    out: str = ""
    metrics: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    solver: SolverSettings = field(default_factory=SolverSettings)


SETTINGS: dict[str, type[PlanSettings]] = {
    "plan": PlanSettings,
    "simulate": SimulateSettings,
    "simulations": SimulationsSettings,
}


def typed(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values of `conf/NAME.yaml`, one of SETTINGS, with the types that they must have.

    Raises ValueError naming key, value and what is legal.
    """
    settings = dataclasses.asdict(read_dataclass(SETTINGS[name], values))
    data = settings["data"]
    if isinstance(data, dict) and (kind := DATA.get(data.get("source", ""))):
        settings["data"] = dataclasses.asdict(read_dataclass(kind, data, "data"))
    if settings["sharding"]:
        settings["sharding"] = read_sharding(settings["sharding"])
    if settings.get("cluster"):
        settings["cluster"] = dataclasses.asdict(read_machine(settings["cluster"]))
    return settings
