"""A machine as the simulator knows it: the sections of `conf/cluster/*.yaml`, frozen."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flashcp.sharding.values import read_number, read_whole, shown
from flashcp.simulator.cost import AttentionCost, CopyCost, Links

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
    provenance: dict[str, str] = field(default_factory=dict, repr=False)


def check_machine(machine: Machine, name: str = "cluster") -> None:
    """Raise ValueError, naming value, field and what is legal, for parameters that make no machine."""
    for key, kind, value in _fields(machine, f"{name}."):
        if kind is int:
            read_whole(key, value, most=LARGEST)
        elif kind is float and key.endswith(("_us", "merge_gbps")):
            read_number(key, value, lambda number: 0 <= number < math.inf, "a number >= 0")
        elif kind is float:
            read_number(key, value, lambda number: 0 < number < math.inf, "a number > 0")
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(value, kind):
            raise ValueError(f"{key}={shown(value)}: expected a {kind.__name__}")
    tiles = machine.attention
    if tiles.tile_queries % tiles.tile_keys:
        raise ValueError(
            f"{name}.attention.tile_keys={tiles.tile_keys}: expected a divisor of tile_queries={tiles.tile_queries}"
        )


def _fields(section: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, type and value of every field; of a section before those in it."""
    hints = typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        yield f"{prefix}{item.name}", hints[item.name], value
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{item.name}.")


def parameters(machine: Machine) -> dict[str, float]:
    """Every number of a machine, by its dotted name."""
    return {key: value for key, kind, value in _fields(machine, "") if kind in (int, float)}
