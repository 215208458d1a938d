"""The section `sharding` of a configuration: a strategy's `name`, and its keyword options."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from flashcp.schema import read_options
from flashcp.sharding.mask import Mask
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import STRATEGIES, plan
from flashcp.sharding.strategies.flashcp import Cost
from flashcp.sharding.values import check_choice


def read_sharding(sharding: Mapping[str, Any]) -> dict[str, Any]:
    """The same section, each option with the strategy's type. Raises ValueError naming key, value and what is legal."""
    name = sharding.get("name")
    check_choice("sharding.name", name, STRATEGIES)
    options = {key: value for key, value in sharding.items() if key != "name"}
    return {"name": name, **read_options(STRATEGIES[str(name)], options, "sharding", but=["workload"])}


def planner(
    sharding: Mapping[str, Any],
    world_size: int,
    layers: Sequence[tuple[Mask, int]] | None = None,
    cost: Cost | None = None,
) -> Callable[[np.ndarray], ShardingPlan]:
    """Document lengths of a pack -> its plan: what the loader calls ahead of each step. It can be pickled if cost can.

    cost: what the strategy `flashcp` chooses by; None for the others, which have no choice.
    """
    made = dict(sharding)
    if cost is not None:
        made["cost"] = cost
    return partial(_make_plan, made, world_size, layers)


def _make_plan(
    sharding: Mapping[str, Any],
    world_size: int,
    layers: Sequence[tuple[Mask, int]] | None,
    document_lengths: np.ndarray,
) -> ShardingPlan:
    options = {key: value for key, value in sharding.items() if key != "name"}
    with naming_options(options):
        return plan(document_lengths, world_size, sharding["name"], layers=layers, **options)


@contextmanager
def naming_options(options: Container[str]) -> Iterator[None]:
    """A ValueError about one of a strategy's `options` names it as a key of the section `sharding`."""
    try:
        yield
    except ValueError as error:
        if str(error).partition("=")[0] in options:
            raise ValueError(f"sharding.{error}") from error
        raise
