"""A process of its own for one group of calls: it says each before it makes it, and then how it ended.

`python -m tests.hostile.child planning 0 1`: from the first call on, every one. Each may take SECONDS of processor time
and grow by MOST_BYTES; warnings are errors.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.hostile.command_line import OTHERS, every_line, refused
from tests.hostile.doors import DOORS, Door
from tests.hostile.values import HOSTILE, VALUES

SECONDS = 5.0
MOST_BYTES = 1 << 30
LONGEST_MESSAGE = 400
ENDLESS = "its first item without end"
COMMAND_LINE = "command line"
LINES: dict[str, Callable[[], Iterable[list[str]]]] = {COMMAND_LINE: every_line, "named lines": lambda: OTHERS}
GROUPS = (*DOORS, *LINES)


class TooLong(BaseException):
    """A call took more than SECONDS of processor time."""


class Call(NamedTuple):
    """make: how it ends, empty where as documented."""

    name: str
    make: Callable[[], str]


def calls(group: str) -> Iterator[Call]:
    """Every door, parameter and value of a group, or every line of bad words."""
    if group in LINES:
        for line in LINES[group]():
            yield Call(f"flashcp {' '.join(line)}"[:200], partial(refused, line))
        return
    for door in DOORS[group]():
        for parameter, good in door.good.items():
            has_items = isinstance(good, list) and good
            values = {**VALUES, ENDLESS: partial(itertools.repeat, good[0])} if has_items else VALUES
            for name, value in values.items():
                yield Call(f"{door.name}({parameter}={name})", partial(outcome, door, parameter, value))


def outcome(door: Door, parameter: str, value: Callable[[], Any]) -> str:
    """What is wrong with how a call ends; empty where as documented."""
    try:
        door.call(**{**door.fixed, **door.good, parameter: value()})
    except ValueError as error:
        text = str(error)
        said = text.partition(": expected one of ")[0]  # a list of names may be longer
        if len(text.splitlines()) != 1 or len(said) > LONGEST_MESSAGE:
            return f"ValueError of {len(text.splitlines())} lines and {len(text)} characters: {text[:150]!r}"
    except Exception as error:
        if not (parameter == door.own and str(error) == HOSTILE):
            return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return ""


def timed(call: Call, seconds: float = SECONDS) -> str:
    """How a call ends, or that it took too long. What never comes back to Python is for the parent to notice."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return call.make()
    except TooLong:
        return f"took more than {seconds} s"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def bound(group: str) -> None:
    """Make every good call once, so that what is loaded late is there, and set the bound on memory."""
    for door in DOORS[group]() if group in DOORS else ():
        door.call(**door.fixed, **door.good)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, resource.RLIM_INFINITY))


def main(group: str, first: int, every: int) -> None:
    told = os.dup(1)  # a command may write to standard output

    def say(**what: Any) -> None:
        os.write(told, f"{json.dumps(what)}\n".encode())

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    bound(group)
    for number, call in enumerate(calls(group)):
        if number < first or number % every:
            continue
        say(number=number, call=call.name)
        say(number=number, wrong=timed(call))
    say(end=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
