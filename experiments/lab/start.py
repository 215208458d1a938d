"""The ranks of a lab, started as those of real nodes are: one torchrun a node, with the address of the first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flashcp.experiments.cli.launch import Outcome, diagnose
from flashcp.experiments.lab.nodes import Node

PORT = 29511
PATIENCE_S = 10.0
"""How long other nodes may go on when one has failed: time to name it."""


def run_on_nodes(
    nodes: Sequence[Node], ranks_per_node: int, arguments: Sequence[str], log: Path, watch: Callable[[], None]
) -> Outcome:
    """Run `python ARGUMENTS` as every rank of every node, to their end; what they say goes to `log`.

    watch: called a few times a second while they work, and once after.
    """
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as written:
        processes = [
            subprocess.Popen(
                node.command(_torchrun(node, nodes, ranks_per_node, arguments)),
                env=variables,
                stdout=written,
                stderr=subprocess.STDOUT,
            )
            for node in nodes
        ]
        try:
            failed_at = 0.0
            while any(process.poll() is None for process in processes):
                watch()
                time.sleep(0.2)
                failed = any(process.poll() for process in processes)
                failed_at = failed_at or failed * time.monotonic()
                if failed and time.monotonic() > failed_at + PATIENCE_S:
                    break
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
    watch()
    code = next((process.returncode for process in processes if process.returncode), 0)
    return diagnose(log, code) if code else Outcome(0, "")


def _torchrun(node: Node, nodes: Sequence[Node], ranks_per_node: int, arguments: Sequence[str]) -> list[str]:
    where = [f"--nnodes={len(nodes)}", f"--nproc-per-node={ranks_per_node}", f"--node-rank={node.index}"]
    where += [f"--master-addr={nodes[0].address}", f"--master-port={PORT}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--no-python"]
    return [*torchrun, *node.quotas.enter, sys.executable, *arguments]
