"""The process that measures: cases come in, numbers go out as they are found, and it may hang or die at any of them."""

from __future__ import annotations

import gc
import os
import signal
import threading
import traceback
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from flashcp.experiments.campaign.part import Turn, load
from flashcp.experiments.sweep.results import Failure, check_device, reason

__all__ = ["Begun", "Done", "Hello", "Lost", "Task", "serve"]


class Hello(NamedTuple):
    """Ready. device: its name."""

    device: str


class Task(NamedTuple):
    """A case to measure; see `Turn`."""

    label: str
    left_out: frozenset[str]
    seconds: float


class Begun(NamedTuple):
    """It is this provider's turn."""

    provider: str


class Done(NamedTuple):
    """The case is over."""


class Lost(NamedTuple):
    """The device takes no more work from this process, which ends."""

    reason: str


def serve(module: str, folder: Path, small: bool, line: Connection) -> None:
    """Measure what comes along the line, until nothing does."""
    os.setpgrp()  # so that all that it starts can be ended with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    part = load(module)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    line.send(Hello(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"))
    while (task := line.recv()) is not None:
        provider = [""]

        def begin(name: str, provider: list[str] = provider) -> None:
            provider[0] = name
            line.send(Begun(name))

        try:
            for found in part.measure(task.label, Turn(device, folder, task.seconds, small, task.left_out, begin)):
                line.send(found)
        except Exception as failure:
            traceback.print_exc()
            line.send(Failure(provider[0], reason(failure)))
        gc.collect()
        try:
            check_device(device)
        except RuntimeError as lost:
            line.send(Lost(reason(lost)))
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()
        line.send(Done())


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)
