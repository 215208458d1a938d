"""/dev/shm without room under transport='auto': every rank hears which one found none, and what helps; it does help."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

import flashcp
from flashcp.comm.errors import HeapError
from tests.flashcp.test_agreement import TODAY, attention, message
from tests.ranks import run_ranks

FULL = (
    "no shared memory in /dev/shm; transport='gloo' needs none, a container gets more by its --shm-size "
    "(No space left on device) (call 1)"
)


def without_room(where: tuple[int, ...]) -> tuple[str, str, int]:
    """On some ranks. What a call says, what `auto` took, and how many rows there are over what is advised."""
    real, plan = os.posix_fallocate, flashcp.plan(TODAY, 2, "per_document")

    def allocate(*given: Any) -> None:
        if dist.get_rank() in where:
            raise OSError(28, "No space left on device")
        real(*given)

    with patch("os.posix_fallocate", allocate):
        cp = flashcp.ContextParallel(transport="auto", timeout_s=20)
        said = message(HeapError, attention, cp, plan)
        advised = flashcp.ContextParallel(transport="gloo", timeout_s=20)
        return said, cp.transport, len(attention(advised, plan))


@pytest.mark.parametrize(("where", "first"), [((1,), 1), ((0, 1), 0)], ids=["one rank", "all ranks"])
def test_all_ranks_name_the_rank_without_room_and_what_helps(where: tuple[int, ...], first: int) -> None:
    for said, transport, rows in run_ranks(without_room, 2, where):
        assert transport == "shm"
        assert said == f"rank {first}: {FULL}"
        assert rows > 0
