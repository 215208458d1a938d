"""What a rank of the lab does: it measures rates, is checked, counts bytes and takes times.

First every method's output and gradients are compared with the float64 reference, on a small pack, and every method
runs once to warm up. Then comes window after window, in turns in which all methods run one after the other: each is
timed, and the bytes on the links are counted. Rank 0 writes what was found, a record a line.

torchrun starts it as `python -m flashcp.experiments.lab.rank STEP SETTINGS.json OUT.jsonl`. The step `rate` measures
how fast the ranks attend, all at once; `run` is what the lab is for; any other is the name of a method that meets
faults.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

import flashcp
from flashcp.comm.errors import ExchangeError
from flashcp.context_parallel import ContextParallel
from flashcp.experiments.bench.harness import relative_error
from flashcp.experiments.folders import write_whole
from flashcp.experiments.lab.cases import RATED, LabBench, Work, crossing_bytes
from flashcp.experiments.lab.faults import CALLS, CUT, LOOK_S, STATES, noticed, question
from flashcp.experiments.lab.machine import TAKEN, Others
from flashcp.experiments.lab.nodes import sent_bytes
from flashcp.schema import read_dataclass
from flashcp.sharding.strategies import plan
from flashcp.train.link import attention_operations
from flashcp.train.ranks import Ranks, exit_code, world
from flashcp.train.run import order_of_turn

SMALL = (1, 60, 300, 129, 20, 2)
"""Documents of the gate."""
ROUNDS = 11
MESSAGE_BYTES = 1 << 20
NO_NODE_GBPS = 100.0
"""Inside nodes of a rank each."""
WORST = 1e-5
"""The largest relative error against float64 of what is timed."""


class LabRank:
    """operators: of each group of ranks that this one is in, each exchange and number of head ranks."""

    def __init__(self, bench: LabBench, ranks: Ranks, file: TextIO) -> None:
        self.bench, self.ranks, self.file = bench, ranks, file
        self.operators: dict[tuple[int, int, str, int], ContextParallel] = {}
        # A group has a time-out of its own, half an hour where none is given: until then a rank that lost its peers
        # cannot end, for gloo's threads still wait for them.
        timeout = timedelta(seconds=bench.timeout_s)
        sizes = {bench.world_size // bench.replicas, bench.world_size}
        self.groups = {
            (first, size): dist.new_group(list(range(first, first + size)), timeout=timeout)
            for size in sorted(sizes)
            for first in range(0, bench.world_size, size)
        }

    def rate(self) -> None:
        """Write what the links are scaled by and the simulator asks for: a `Rates`, field by field.

        All are taken in turns: what disturbs some rounds disturbs no median.
        """
        bench, others = self.bench, Others(self.ranks)
        one_row = self.function([Work(0, plan([self.ranks.world_size], self.ranks.world_size, "contiguous"), "exact")])
        whole = Work(0, plan([bench.context], self.ranks.world_size, "contiguous"), "all_gather")
        functions = self._alone(), one_row, self._message(), self._gather(whole)
        for function in functions:
            function()
        rounds = [[self.timed(function) for function in functions] for _ in range(ROUNDS)]
        attend_ms, row_ms, send_ms, gather_ms = map(statistics.median, zip(*rounds, strict=True))
        blocks = 2 * (self.ranks.world_size - 1)  # that a rank hands on and gets
        moved = blocks * whole.plan.route("all_gather").block_rows * bench.shape.kv_bytes
        self.write(
            tflops=attention_operations(RATED, bench.query_heads, bench.head_dim) / (1e9 * attend_ms),
            latency_us=1e3 * row_ms / 2,
            node_gbps=MESSAGE_BYTES / (1e6 * send_ms) if bench.ranks_per_node > 1 else NO_NODE_GBPS,
            socket_gbps=moved / (1e6 * max(gather_ms - row_ms / 2, 0.1 * gather_ms)),
        )
        self.write(**{TAKEN: others.taken(bench.cores)})

    def _alone(self) -> Callable[[], None]:
        """Attention over a pack that every rank has to itself, forward and backward."""
        q, k, v, grad = self._draw(sum(RATED), self.bench.seed)

        def attend() -> None:
            torch.autograd.grad(flashcp.varlen_attention(q, k, v, RATED), (q, k, v), grad)

        return attend

    def _message(self) -> Callable[[], None]:
        """From rank 0 to rank 1 of its node; nothing where nodes have a rank each."""
        message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)

        def send() -> None:
            if self.bench.ranks_per_node > 1 and self.ranks.rank == 0:
                dist.send(message, 1)
            elif self.bench.ranks_per_node > 1 and self.ranks.rank == 1:
                dist.recv(message, 0)

        return send

    def _gather(self, work: Work) -> Callable[[], None]:
        """An all-gather of K and V, beside which nothing is computed."""
        cp, shape = self._operator(work), self.bench.shape
        rows = torch.zeros(len(cp.position_ids(work.plan)), shape.kv_bytes // shape.dtype_bytes)

        def gather() -> None:
            cp.gather(rows, work.plan)

        return gather

    def gate(self) -> None:
        """Raises RuntimeError on all ranks where a method is wrong."""
        q, k, v, grad = self._draw(sum(SMALL), self.bench.seed)
        inputs = q, k, v
        reference = flashcp.reference_attention(q, k, v, SMALL)
        wanted = [reference, *torch.autograd.grad(reference, inputs, grad.double())]
        for method, works in self.bench.work(self.bench.batches[0]).items():
            work, cp = self._mine(works)
            small = plan(SMALL, work.plan.world_size, work.plan.strategy)
            a, b, c = local = tuple(cp.shard(x.detach(), small).requires_grad_() for x in inputs)
            out = cp.attention(a, b, c, small)
            found = [out, *torch.autograd.grad(out, local, cp.shard(grad, small))]
            error = max(relative_error(one, cp.shard(other, small)) for one, other in zip(found, wanted, strict=True))
            (worst,) = self.ranks.max(error)
            if not worst <= WORST:
                raise RuntimeError(f"{method}: relative error {worst:.1e}: what is wrong is not timed")
            self.write(gate=method, error=worst, transport=cp.transport)

    def measure(self) -> None:
        """Write, for each batch, method and turn, the slowest rank's ms and the bytes that left each node."""
        turn, others = 0, Others(self.ranks)
        for index, batch in enumerate(self.bench.batches):
            works = self.bench.work(batch)
            run = {method: self.function(each) for method, each in works.items()}
            routes = {method: self._routed(each) for method, each in works.items()}
            if not turn:
                for function in run.values():
                    function()
            names = list(run)
            for _ in range(self.bench.turns):
                for method in (names[place] for place in order_of_turn(turn, len(names))):
                    before = self._sent()
                    ms = self.timed(run[method])
                    sent = [late - early for early, late in zip(before, self._sent(), strict=True)]
                    self.write(
                        batch=index, turn=turn, method=method, ms=ms, sent_bytes=sent, route_bytes=routes[method]
                    )
                turn += 1
        self.write(**{TAKEN: others.taken(self.bench.cores)})

    def meet_faults(self, method: str, records: Path) -> None:
        """Time a few calls in every state of the links, then compute until the cut is noticed.

        Raises RuntimeError where the cut goes unnoticed.
        """
        function = self.function(self.bench.work(self.bench.batches[0])[method])
        function()
        for state in STATES:
            self._ask(records, state)
            ms = statistics.median(self.timed(function) for _ in range(CALLS))
            self.write(method=method, state=state, ms=ms)
        self.ranks.barrier()
        if self.ranks.rank == 0:
            write_whole(question(records), CUT)
        deadline = time.monotonic() + 10 * self.bench.timeout_s
        while time.monotonic() < deadline:
            try:
                function()
            except ExchangeError as error:
                seen = {"rank": self.ranks.rank, "at": time.time(), "said": str(error)}
                write_whole(noticed(records, self.bench.world_size)[self.ranks.rank], json.dumps(seen))
                return
        raise RuntimeError(f"{method}: a node was cut off and no error came in {10 * self.bench.timeout_s:g} s")

    def _ask(self, records: Path, state: str) -> None:
        """Wait until the lab has made the state."""
        if self.ranks.rank == 0:
            asked = question(records)
            write_whole(asked, state)  # or the lab may read an empty one, and answer it
            deadline = time.monotonic() + self.bench.timeout_s
            while asked.exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the lab did not make the links {state} in {self.bench.timeout_s:g} s")
                time.sleep(LOOK_S)
        self.ranks.barrier()

    def _routed(self, works: Sequence[Work]) -> list[float]:
        """Bytes that leave each node, by the plans' routes."""
        shape, per_node = self.bench.shape, self.bench.ranks_per_node
        routes = [0.0] * self.bench.nodes
        for work in works:
            first = work.first // per_node
            for node, count in enumerate(crossing_bytes(work, shape, per_node)):
                routes[first + node] += float(count)
        return routes

    def function(self, works: Sequence[Work]) -> Callable[[], None]:
        """This rank's part: attention forward and backward."""
        work, cp = self._mine(works)
        q, k, v, grad = self._draw(len(cp.position_ids(work.plan)), self.bench.seed + 1 + self.ranks.rank)

        def function() -> None:
            out = cp.attention(q, k, v, work.plan)
            torch.autograd.grad(out, (q, k, v), grad)

        return function

    def _draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v, which want gradients, and the gradient of the output: [rows, heads, D]."""
        shape, random = self.bench.shape, torch.Generator().manual_seed(seed)
        q, k, v, grad = (
            torch.randn(rows, heads, shape.head_dim, generator=random)
            for heads in (shape.query_heads, shape.kv_heads, shape.kv_heads, shape.query_heads)
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad

    def _mine(self, works: Sequence[Work]) -> tuple[Work, ContextParallel]:
        """The work of this rank's group, and its operator."""
        mine = next(work for work in works if 0 <= self.ranks.rank - work.first < work.ranks)
        return mine, self._operator(mine)

    def _operator(self, work: Work) -> ContextParallel:
        key = work.first, work.ranks, work.exchange, work.head_ranks
        if key not in self.operators:
            self.operators[key] = ContextParallel(
                self.groups[key[:2]],
                exchange=work.exchange,
                timeout_s=self.bench.timeout_s,
                head_ranks=work.head_ranks,
            )
        return self.operators[key]

    def timed(self, function: Callable[[], object]) -> float:
        """Milliseconds of the slowest rank; all begin together."""
        self.ranks.barrier()
        started = time.perf_counter()
        function()
        return self.ranks.max(1e3 * (time.perf_counter() - started))[0]

    def _sent(self) -> list[int]:
        """What has left each node so far, headers counted; rank 0 alone asks."""
        return [sent_bytes(node) for node in range(self.bench.nodes)] if self.ranks.rank == 0 else []

    def write(self, **record: Any) -> None:
        if self.ranks.rank == 0:
            print(json.dumps(record), file=self.file, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a rank. Returns 0; 2 for bad input; else 1."""
    step, settings, out = sys.argv[1:] if arguments is None else arguments
    bench = read_dataclass(LabBench, json.loads(Path(settings).read_text()))
    return exit_code(lambda: _run(step, bench, Path(out)))


def _run(step: str, bench: LabBench, out: Path) -> None:
    with world("cpu", bench.timeout_s) as ranks, out.open("a" if ranks.rank == 0 else "r") as file:
        lab = LabRank(bench, ranks, file)
        if step == "rate":
            lab.rate()
        elif step == "run":
            lab.gate()
            lab.measure()
        else:
            lab.meet_faults(step, out)


if __name__ == "__main__":
    sys.exit(main())
