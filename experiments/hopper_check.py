"""The Hopper candidate in a process of its own: what fails or hangs there costs the benchmark a line and a minute.

`python -m flashcp.experiments.hopper_check` computes the cases of the attention benchmark with the portable kernels and
with `hopper_forward.py`, prints the labels of those that agree and ends at the first that does not. The receive buffer
goes on behind its last row as NaN. Which waits and arrivals a launch makes follows from the tables alone, so a case
that came through once is launched again with the same ones.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import cache

import torch

from flashcp.experiments.attention_cases import Case, Tensors, all_cases, make_tensors
from flashcp.experiments.attention_peers import Forward, ours
from flashcp.kernels.cpu import KV

__all__ = ["candidate", "main", "passed"]

LIMIT_S = 60.0


def candidate(case: Case, x: Tensors) -> Forward:
    """The candidate on a case, forward only."""
    from flashcp.experiments.hopper_forward import prepare

    q, k, v, received = (y.detach() for y in (x.q, x.k, x.v, x.received))
    forward = prepare(q, KV(k, v), KV(*received.unbind(1)), case.schedule, case.head_dim**-0.5)
    return lambda: forward()[0]


@cache
def passed(limit_s: float = LIMIT_S) -> frozenset[str]:
    """Labels of the cases that came through; none, and a line on standard error, where the process did not answer."""
    command = [sys.executable, "-m", "flashcp.experiments.hopper_check"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            print(f"gluon left out: no answer within {limit_s:g} s", file=sys.stderr)
            return frozenset()
        if code < 0:
            print(f"gluon left out: its process ended by signal {-code}", file=sys.stderr)
        said.seek(0)
        return frozenset(said.read().split())


def main() -> int:
    """Check case by case. Returns 0, or 1 with a line on standard error."""
    from flashcp.experiments.bench_attention import checked_output, reason

    for case in all_cases():
        try:
            x = make_tensors(case, torch.bfloat16, torch.device("cuda"))
            behind = torch.full((128, *x.received.shape[1:]), torch.nan, dtype=x.received.dtype, device="cuda")
            longer = replace(x, received=torch.cat((x.received.detach(), behind)))
            checked_output(candidate(case, longer), x, ours(case, x)().detach())
        except Exception as failure:
            print(f"gluon left out from {case.label} on: {reason(failure)}", file=sys.stderr)
            return 1
        print(case.label, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
