"""What a configuration may hold: plain dataclasses in Hydra's ConfigStore, groups made from the registries.

A new strategy, exchange, method or data set is a legal group value as soon as its registry names it; the keyword
options of a strategy are the fields of its `sharding` group.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from hydra.core.config_store import ConfigStore

from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.lengths import LENGTH_DATA, SIGMA
from flashcp.sharding.methods import METHODS
from flashcp.sharding.strategies import STRATEGIES
from flashcp.simulator.machine import Machine
from flashcp.simulator.step import ModelShape
from flashcp.train.data.sources import SOURCES, DataConfig

__all__ = [
    "GROUPS",
    "LengthsData",
    "PlanSettings",
    "SampledData",
    "SimulateSettings",
    "committed",
    "group_members",
    "register",
]


def committed(group: str) -> tuple[str, ...]:
    """Names of the files of a group in `conf/`."""
    files = (resources.files("flashcp.conf") / group).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


GROUPS = {
    "method": tuple(METHODS),
    "sharding": tuple(STRATEGIES),
    "exchange": tuple(EXCHANGES),
    "data": (*SOURCES, "lengths", *LENGTH_DATA, *committed("data")),
    "cluster": committed("cluster"),
}
"""Groups and their legal values; a configuration has those it names (`experiment` is the sweeps' own)."""


@dataclass
class LengthsData:
    """Document lengths without text: `path` holds one a line, or `lengths` lists them."""

    source: str = "lengths"
    path: str = ""
    lengths: list[int] = field(default_factory=list)
    overflow: str = "truncate"


@dataclass
class SampledData:
    """Document lengths drawn from a published distribution (`flashcp.sharding.lengths`)."""

    source: str
    long_document_weight: float = 1.0
    sigma: float = SIGMA
    overflow: str = "truncate"


@dataclass
class Choice:
    """One member of a group that has no options."""

    name: str


@dataclass
class PlanSettings:
    """`flashcp plan`. windows: packs that the numbers are means over. figure: a picture of the first plan."""

    world_size: int = 8
    context: int = 131_072
    windows: int = 100
    seed: int = 0
    figure: str = ""
    method: str = ""
    data: Any = None
    sharding: Any = None
    exchange: Any = None


@dataclass
class SimulateSettings:
    """`flashcp simulate`. methods: names to simulate, best efforts and pairs SHARDING+EXCHANGE among them; empty: all,
    or the pair that is chosen.

    overlap: of our kernel and the best efforts. gradient_bytes: of a number of a KV gradient on our wire.
    cluster_file: a file like those of conf/cluster, instead of one. figure: a picture of the first window's timelines.
    kernel: `modelled`, or `measured`: every rank's attention is run on the one device at hand, the exchange modelled.
    workers: processes.
    """

    world_size: int = 8
    context: int = 131_072
    windows: int = 100
    seed: int = 0
    overlap: str = "auto"
    gradient_bytes: int = 4
    cluster_file: str = ""
    figure: str = ""
    kernel: str = "modelled"
    workers: int = 1
    methods: list[str] = field(default_factory=list)
    method: str = ""
    data: Any = None
    sharding: Any = None
    exchange: Any = None
    cluster: Any = None
    model: ModelShape = field(default_factory=ModelShape)


@dataclass
class SolverSettings:
    """The exact solver beside the strategies (`flashcp.sharding.solver`). granule 0: none. limit_s: of one window."""

    granule: int = 0
    limit_s: float = 20.0


@dataclass
class SimulationsSettings(SimulateSettings):
    """`flashcp sweep experiment=NAME` for the sweeps that simulate. name: of the directory below outputs/.

    out: directory, empty: outputs/NAME. metrics: that become rows, empty: all. measured: directories of sweeps whose
    times stand beside the simulated ones.
    """

    name: str = "simulations"
    out: str = ""
    metrics: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    solver: SolverSettings = field(default_factory=SolverSettings)


@cache
def register() -> None:
    """Put the schemas into the ConfigStore, once."""
    store = ConfigStore.instance().store
    for group, members in group_members().items():
        for name, node in members.items():
            store(group=group, name=name, node=node)
    for method in METHODS.values():
        parts = [{"override /sharding": method.sharding}, {"override /exchange": method.exchange}]
        store(group="method", name=method.name, package="_global_", node={"defaults": parts, "method": method.name})
    store(group="cluster", name="cluster_schema", node=_thawed(Machine))
    store(name="plan_schema", node=PlanSettings)
    store(name="simulate_schema", node=SimulateSettings)
    store(name="simulations_schema", node=SimulationsSettings)


def group_members() -> dict[str, dict[str, Any]]:
    """The groups whose members are sections: for each its members, a dataclass object with its defaults each."""
    text = {name: DataConfig(source=name) for name in SOURCES}
    sampled = {name: SampledData(name) for name in LENGTH_DATA}
    return {
        "sharding": {name: _sharding(name, function) for name, function in STRATEGIES.items()},
        "exchange": {name: Choice(name) for name in EXCHANGES},
        "data": {**text, "lengths": LengthsData(), **sampled},
    }


def _sharding(name: str, function: Any) -> Any:
    """An object with the strategy's name and the defaults of its keyword options.

    Options that take a function (a cost model) are for Python callers and have no key.
    """
    hints = typing.get_type_hints(function)
    options = [
        (option.name, hints.get(option.name, Any), field(default=option.default))
        for option in list(inspect.signature(function).parameters.values())[2:]
        if not _takes_function(hints.get(option.name, Any))
    ]
    return dataclasses.make_dataclass("Sharding", [("name", str, field(default=name)), *options])()


def _takes_function(hint: Any) -> bool:
    return any(part is Callable or typing.get_origin(part) is Callable for part in (hint, *typing.get_args(hint)))


def _thawed(kind: type[Any]) -> type[Any]:
    """A frozen dataclass as Hydra can compose it: the same fields in dataclasses that are not frozen."""
    hints = typing.get_type_hints(kind)
    columns = []
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            inner = _thawed(typing.cast(type[Any], hint))
            columns.append((item.name, inner, field(default_factory=inner)))
        elif item.default_factory is not dataclasses.MISSING:
            columns.append((item.name, hint, field(default_factory=item.default_factory)))
        else:
            default = "???" if item.default is dataclasses.MISSING else item.default
            columns.append((item.name, hint, field(default=default)))
    return dataclasses.make_dataclass(kind.__name__, columns)
