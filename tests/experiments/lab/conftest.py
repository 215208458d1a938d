"""Tests of the lab take turns, also between test processes: one lab at a time. They skip where none can be built."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from flashcp.experiments.lab.machine import LabError
from flashcp.experiments.lab.nodes import Link, built_nodes


@cache
def _missing() -> str:
    try:
        with built_nodes(1, 1, Link(0.1), 1.0):
            return ""
    except LabError as error:
        return str(error)


@pytest.fixture
def turn() -> Iterator[None]:
    with Path(tempfile.gettempdir(), "flashcp-lab-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if reason := _missing():
            pytest.skip(reason)
        yield
