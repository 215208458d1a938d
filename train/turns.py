"""Several runs that take turns, step by step, on the same ranks and packs: what else the machine does meets all.

Compared one after another, a load that comes in the middle makes one method look slow. In turns, each with weights of
its own, a step of one is compared with the step of the other beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from flashcp.train.config import TrainConfig
from flashcp.train.data.sources import DataConfig
from flashcp.train.measured_link import slowed_link
from flashcp.train.ranks import launched_rank, world
from flashcp.train.run import prepare, training

__all__ = ["order_of_turn", "run_in_turns"]

SHARED = ("context", "seed", "parallel.link", "loop.steps", "loop.accumulation", "loop.device", "loop.timeout_s")


def run_in_turns(configs: Sequence[TrainConfig]) -> list[dict[str, Any] | None]:
    """Train every configuration as this process's rank, a step of each in turn. Summaries as `flashcp.train.run` makes
    them, with `turns`: when the first turn began (seconds since 1970) and how many runs took turns.

    Each keeps weights, optimizer and communication of its own: memory is that of all together.
    Raises ValueError for bad input, and for configurations that cannot share their turns.
    """
    _check(configs)
    ready = [prepare(config, launched_rank()[1]) for config in configs]
    loop = configs[0].loop
    with world(loop.device, loop.timeout_s) as ranks, ExitStack() as stack:
        link = slowed_link(configs[0], ready[0].source, ready[0].tokenizer, ranks)  # one rate for all
        pairs = zip(configs, ready, strict=True)
        runs = [stack.enter_context(training(config, one, ranks, link)) for config, one in pairs]
        begun = time.time()
        steps = [run.steps() for run in runs]
        turn, going = 0, True
        while going:
            rows = [next(steps[number], None) for number in order_of_turn(turn, len(runs))]
            going, turn = None not in rows, turn + 1  # the same documents: all end in the same turn
        return [run.finish(turns={"begun": begun, "runs": len(runs)}) for run in runs]


def order_of_turn(turn: int, count: int) -> list[int]:
    """Who goes first changes, and every other turn runs backwards: nobody always follows the same one.

    3 runs: 0 1 2, then 0 2 1, then 1 2 0, then 1 0 2, ...
    """
    first = turn // 2 % count
    order = [(first + place) % count for place in range(count)]
    return order if turn % 2 == 0 else [order[0], *order[:0:-1]]


def _check(configs: Sequence[TrainConfig]) -> None:
    if not configs:
        raise ValueError("no configuration to train")
    for key in (*SHARED, *(f"data.{field.name}" for field in fields(DataConfig))):
        section, _, name = key.rpartition(".")
        values = {str(getattr(getattr(config, section) if section else config, name)) for config in configs}
        if len(values) > 1:
            raise ValueError(f"{key}={', '.join(sorted(values))}: expected one value for runs that take turns")
    folders = [config.out for config in configs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"out={folder!r}: expected a folder for each of the runs that take turns")
    for config in configs:
        if config.profile:
            raise ValueError("profile=True: expected False for runs that take turns, which would be in its trace")
