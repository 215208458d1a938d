"""A machine as the simulator knows it: the sections of `conf/cluster/*.yaml`, frozen."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from flashcp.simulator.cost import AttentionCost, CopyCost, Links

__all__ = ["Machine", "PublishedCopies", "check_machine", "parameters"]

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


def check_machine(machine: Machine, name: str = "cluster") -> None:
    """Raise ValueError, naming value, field and what is legal, for parameters that make no machine."""
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
