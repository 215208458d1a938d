"""The ranks of a lab, started as those of real nodes are: one torchrun a node, with the address of the first."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flashcp.experiments.cli.launch import Outcome, side_by_side
from flashcp.experiments.lab.nodes import Node

PORT = 29511


def run_on_nodes(
    nodes: Sequence[Node], ranks_per_node: int, arguments: Sequence[str], log: Path, watch: Callable[[], None]
) -> Outcome:
    """Run `python ARGUMENTS` as every rank of every node, to their end; what they say goes to `log`.

    watch: called a few times a second while they work, and once after.
    """
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    commands = [node.command(_torchrun(node, nodes, ranks_per_node, arguments)) for node in nodes]
    return side_by_side(commands, variables, log, watch)


def _torchrun(node: Node, nodes: Sequence[Node], ranks_per_node: int, arguments: Sequence[str]) -> list[str]:
    where = [f"--nnodes={len(nodes)}", f"--nproc-per-node={ranks_per_node}", f"--node-rank={node.index}"]
    where += [f"--master-addr={nodes[0].address}", f"--master-port={PORT}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--no-python"]
    return [*torchrun, *node.quotas.enter, sys.executable, *arguments]
