"""A machine as the simulator knows it: the sections of `conf/cluster/*.yaml`, frozen and checked."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashcp.sharding.cost import AttentionCost, CopyCost, Links
from flashcp.train.schema import read_dataclass

__all__ = ["Machine", "PublishedCopies", "machine_schema", "parameters", "read_machine"]

LARGEST = 1_000_000
"""Of a whole number: ranks of a node, rows of a tile."""


@dataclass(frozen=True)
class PublishedCopies:
    """What the published implementations copy besides attention.

    A pass reads and writes K and V of the whole window once; passes count forward and backward together. gathered:
    `llama3`'s, which puts 2N chunks in order. shuffled: `per_document`'s, which does so for every document.
    compacted: `flashcp_paper`'s. shard_us: launches for one shard, forward and backward. sync_us: the rings' host
    waiting once for its device.
    """

    gathered_passes: float
    shuffled_passes: float
    compacted_passes: float
    shard_us: float
    sync_us: float


@dataclass(frozen=True)
class Machine:
    """Parameters of one kind of rank and what joins them. provenance: for each parameter, or the section it is in,
    whether we measured it (commit, date), fitted it to the paper, or read it off a datasheet."""

    name: str
    attention: AttentionCost
    copies: CopyCost
    links: Links
    gemm_tflops: float
    published: PublishedCopies
    provenance: dict[str, str] = field(default_factory=dict)


def read_machine(values: Mapping[str, Any], name: str = "cluster", file: str = "") -> Machine:
    """A machine from a configuration's section, or from a file's. Raises ValueError naming value, field and what is
    legal."""
    try:
        machine = read_dataclass(Machine, values, name)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{name}{f'={file!r}' if file else ''}: {_missing(Machine, values)} is missing") from error
    for key, value in parameters(machine).items():
        if isinstance(value, int):
            if not 1 <= value <= LARGEST:
                raise ValueError(f"{name}.{key}={value}: expected a whole number >= 1 and <= {LARGEST}")
            continue
        optional = key.endswith(("_us", "merge_gbps"))
        if value < 0 or (value == 0 and not optional) or not math.isfinite(value):
            raise ValueError(f"{name}.{key}={value}: expected a number {'>= 0' if optional else '> 0'}")
    if machine.attention.tile_queries % machine.attention.tile_keys:
        raise ValueError(
            f"{name}.attention.tile_keys={machine.attention.tile_keys}: expected a divisor of "
            f"tile_queries={machine.attention.tile_queries}"
        )
    return machine


def _missing(section: Any, values: Mapping[str, Any]) -> str:
    """The dotted name of the first field that has neither a value nor a default."""
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        kind, value = hints[item.name], values.get(item.name)
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            return item.name
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping) and (inner := _missing(kind, value)):
            return f"{item.name}.{inner}"
    return ""


def parameters(section: Any, prefix: str = "") -> dict[str, float]:
    """Every number of a machine, by its dotted name."""
    found: dict[str, float] = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            found |= parameters(value, f"{prefix}{item.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{item.name}"] = value
    return found


def machine_schema() -> type[Any]:
    """`Machine` as Hydra can compose it: the same fields in dataclasses that are not frozen."""
    return _thawed(Machine)


def _thawed(kind: type[Any]) -> type[Any]:
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
