"""`flashcp doctor`: what is installed here, what `auto` would take and why, and a self-test on the ranks it runs on.

    flashcp doctor ranks=2
    torchrun --nproc-per-node=8 -m flashcp.experiments.cli.doctor --json

Hydra is not needed. Launched ranks test each other, over all hosts that the launcher started them on.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.fabrics.memory import FOLDER
from flashcp.comm.nvshmem import is_available
from flashcp.experiments.bench.harness import exact_results, relative_error
from flashcp.experiments.cli import AS_JSON, show
from flashcp.experiments.sweep.results import commit, versions_text
from flashcp.kernels.selection import attention_name
from flashcp.kernels.varlen import KERNELS
from flashcp.train.ranks import Ranks, exit_code, world
from flashcp.train.summary import versions

WORDS = "[ranks=N]"
LENGTHS = (37, 1, 90)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative errors of outputs and gradients that pass, by what a CPU and a GPU compute in."""
MOST_RANKS, TIMEOUT_S = 64, 60.0
MIB = 1 << 20
NO_GPU = "there is no GPU here, and Triton's kernels need one"
IN_PLACE = "our kernels compute a rank's share in place, those behind the varlen door copy rows before"


def main(words: Sequence[str]) -> int:
    """Exit code: 0; 1 where the self-test fails. Raises ValueError for words that are not `ranks=N`."""
    count = _ranks(words)
    if "RANK" in os.environ or count == 1:
        failed: list[str] = []
        return exit_code(lambda: failed.extend(_examine())) or int(bool(failed))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    said = ["--json"] if AS_JSON.get() else []
    ranks = [sys.executable, *launcher, "-m", "flashcp.experiments.cli.doctor", *said]
    return 1 if subprocess.run(ranks, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode else 0


def _ranks(words: Sequence[str]) -> int:
    """How many ranks to start. Raises ValueError for other words and numbers."""
    count = "1"
    for word in words:
        key, _, count = word.partition("=")
        if key != "ranks" or not count.isdecimal() or not 1 <= int(count) <= MOST_RANKS:
            raise ValueError(f"{word!r}: expected ranks=N, a whole number >= 1 and <= {MOST_RANKS}")
    return int(count)


def _examine() -> list[str]:
    """As one rank: rank 0 shows all. Returns exchanges that failed on any rank."""
    with world("auto", TIMEOUT_S) as ranks:
        tests = {exchange: self_test(exchange, ranks) for exchange in EXCHANGE_CLASSES}
        seen = ranks.gather({**rank_facts(ranks), "self_test": tests})
        failed = [name for facts in seen for name, one in facts["self_test"].items() if not one["passed"]]
        if ranks.rank == 0:
            facts = {**machine_facts(ranks), "ranks": seen, "healthy": not failed}
            show(facts, as_text(facts))
        return failed


def self_test(exchange: str, ranks: Ranks) -> dict[str, Any]:
    """Attention, forward and backward, over an exchange against the float64 reference: the largest relative error, or
    what failed; and what carried the rows and why."""
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    try:
        with flashcp.ContextParallel(exchange=exchange, timeout_s=TIMEOUT_S) as cp:
            error = _error(cp, dtype, ranks.device)
            carried = {"transport": cp.transport, "why": cp.transport_reason}
    except Exception as problem:  # whatever is wrong here, the other exchanges are still tried
        return {"passed": False, "failed": f"{type(problem).__name__}: {problem}"}
    return {"passed": error < BOUNDS[dtype], "error": error, **carried}


def _error(cp: flashcp.ContextParallel, dtype: torch.dtype, device: torch.device) -> float:
    plan, draw = flashcp.plan(LENGTHS, cp.world_size, "per_document"), torch.Generator().manual_seed(0)
    heads = (2 * cp.world_size, cp.world_size, cp.world_size, 2 * cp.world_size)
    q, k, v, grad = (torch.randn(sum(LENGTHS), count, 64, generator=draw).to(dtype) for count in heads)
    local = [cp.shard(x.to(device), plan).requires_grad_() for x in (q, k, v)]
    out = cp.attention(local[0], local[1], local[2], plan)
    found = (out, *torch.autograd.grad(out, local, cp.shard(grad.to(device), plan)))
    got = [cp.unshard(x.detach(), plan).cpu() for x in found]
    cp.synchronize()
    return max(map(relative_error, got, exact_results((q, k, v), grad, LENGTHS)))


def rank_facts(ranks: Ranks) -> dict[str, Any]:
    """Where this rank is, and what it has for itself."""
    shm = shutil.disk_usage(FOLDER) if FOLDER.is_dir() else None
    return {
        "host": socket.gethostname(),
        "device": str(ranks.device),
        "shm_mib": {"free": shm.free // MIB, "total": shm.total // MIB} if shm else None,
    }


def machine_facts(ranks: Ranks) -> dict[str, Any]:
    """Of rank 0's host: versions, GPUs and which reach which, NVSHMEM, other people's kernels, what `auto` computes."""
    gpus, device = range(torch.cuda.device_count()), ranks.device
    return {
        "versions": {**versions(device), "commit": commit(), "system": platform.platform()},
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
        "peer_access": [pair for pair in itertools.permutations(gpus, 2) if torch.cuda.can_device_access_peer(*pair)],
        "nvshmem": is_available(),
        "varlen": {name: kernel.is_available(device) for name, kernel in KERNELS.items()},
        "attention": attention_name("auto", device),
        "attention_why": IN_PLACE if device.type == "cuda" else NO_GPU,
    }


def as_text(facts: dict[str, Any]) -> str:
    """One line a fact."""
    gpus, peers, ranks = facts["gpus"], facts["peer_access"], facts["ranks"]
    reached = f"{len(peers)} of {len(gpus) * (len(gpus) - 1)} ordered pairs reach each other's memory"
    there = [name for name, found in facts["varlen"].items() if found]
    missing = [name for name, found in facts["varlen"].items() if not found]
    tests = ranks[0]["self_test"]
    carried = next((one for one in tests.values() if "transport" in one), {"transport": "none", "why": "all failed"})
    lines = [
        f"versions    {versions_text(facts['versions'])}",
        f"GPUs        {', '.join(gpus)}; {reached}" if gpus else "GPUs        none",
        f"NVSHMEM     {'there' if facts['nvshmem'] else 'not there'}",
        f"varlen      {', '.join(there) or 'none'}; not for this device: {', '.join(missing) or 'none'}",
        f"attention   auto takes {facts['attention']}: {facts['attention_why']}",
        f"transport   auto takes {carried['transport']}: {carried['why']}",
    ]
    for rank, one in enumerate(ranks):
        shm = one["shm_mib"]
        memory = f"{shm['free']} of {shm['total']} MiB free in {FOLDER}" if shm else f"no {FOLDER}"
        lines.append(f"rank {rank:<6} {one['host']}, {one['device']}, {memory}")
    for exchange in tests:
        worst = [one["self_test"][exchange] for one in ranks]
        failed = [test.get("failed", f"error {test.get('error')}") for test in worst if not test["passed"]]
        said = f"FAILED: {failed[0]}" if failed else f"relative error {max(test['error'] for test in worst):.1e}"
        lines.append(f"self-test   {exchange}: {said}")
    if len(ranks) == 1:
        lines.append("one rank exchanges nothing: `flashcp doctor ranks=2` starts two")
    return "\n".join(lines)


if __name__ == "__main__":
    given = sys.argv[1:]
    AS_JSON.set("--json" in given)
    try:
        sys.exit(main([word for word in given if word != "--json"]))
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
