"""Which transport `auto` takes: hosts are told apart as a launcher tells them apart. Settings that differ are named."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import pytest
import torch.distributed as dist

import flashcp
from flashcp import context_parallel
from tests.flashcp.test_agreement import message
from tests.ranks import run_ranks


def transport_between(hosts: Sequence[str]) -> str:
    """Ranks of one machine that have the host names of several, as in containers and namespaces."""
    real, host = socket.gethostname, hosts[dist.get_rank()]
    socket.gethostname = lambda: host
    try:
        return flashcp.ContextParallel(timeout_s=20).transport
    finally:
        socket.gethostname = real


def test_ranks_of_one_host_share_memory() -> None:
    assert run_ranks(transport_between, 2, ["node", "node"]) == ["shm", "shm"]


def test_ranks_of_several_hosts_do_not_though_the_kernel_would_let_them() -> None:
    assert run_ranks(transport_between, 3, ["node-0", "node-1", "node-1"]) == ["gloo"] * 3


def refused(field: str, values: Sequence[object]) -> str:
    mine = values[dist.get_rank()]
    if field == "version of flashcp":
        with patch.object(context_parallel, "__version__", mine):
            return message(ValueError, flashcp.ContextParallel)
    settings = {"options": flashcp.TransportOptions(heap_mib=mine)} if field == "heap_mib" else {field: mine}
    return message(ValueError, partial(flashcp.ContextParallel, **settings, timeout_s=20))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("transport", ("shm", "gloo", "gloo")),
        ("heap_mib", (64, 64, 128)),
        ("head_ranks", (1, 3, 3)),
        ("version of flashcp", ("0.1.0", "0.0.9", "0.1.0")),
    ],
)
def test_settings_that_differ_are_named_on_all_ranks(field: str, values: tuple[object, ...]) -> None:
    wanted = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
    assert run_ranks(refused, 3, field, values) == [f"{field} is {wanted}: expected one value on all ranks"] * 3
