"""A part of the campaign whose cases fail in every way that a GPU has been seen to fail in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from flashcp.experiments.campaign import watch
from flashcp.experiments.campaign.part import Case, Part, Turn
from flashcp.experiments.sweep.results import Failure, Number

LABELS = ("good", "raises", "hangs", "dies", "lost", "one_hangs", "two_die", "last")


def cases(small: bool) -> list[Case]:
    return [Case(label, 0.1, 3.0 if "hang" in label else 30.0) for label in LABELS]


def no_more_work(device: torch.device) -> None:
    raise RuntimeError("the GPU takes no more work from this process")


def measure(label: str, turn: Turn) -> Iterator[Number | Failure]:
    yield Number("before", "time_ms", "ms", 1.0, 2.0, 3.0)
    if label == "raises":
        raise ValueError("no such\nkernel")
    if label == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (turn.folder / "child").write_text(str(child.pid))
        time.sleep(600)
    if label == "dies":
        os.kill(os.getpid(), 11)
    if label == "lost" and "a" not in turn.left_out:
        watch.check_device = no_more_work  # of this process, as of one whose GPU met an illegal address
        turn.begin("a")
        raise RuntimeError("illegal address")
    if label in ("one_hangs", "two_die"):
        for provider in ("a", "b", "c", "d"):
            if provider in turn.left_out:
                continue
            turn.begin(provider)
            if label == "one_hangs" and provider == "b":
                time.sleep(600)
            if label == "two_die" and provider in ("a", "c"):
                os._exit(3)
            yield Number(provider, "time_ms", "ms", None, 1.0, None)
            if provider == "d":
                yield Failure("d", "too slow")


PART = Part("trouble", 1.0, lambda small: cases(small), measure, "made up")
