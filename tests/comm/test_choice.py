"""Which transport `auto` takes: hosts are told apart as a launcher tells them apart."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch.distributed as dist

import flashcp
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
