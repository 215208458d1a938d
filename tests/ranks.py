"""Run a function on N ranks of a gloo group, in worker processes that stay alive between calls.

    from tests.ranks import run_cases, run_ranks

    def total(value):                       # a top-level function; rank and size from torch.distributed
        x = torch.tensor(value + dist.get_rank())
        dist.all_reduce(x)
        return x.item()

    run_ranks(total, 2, 10)                 # [21, 21]: one result per rank
    run_cases(total, 2, [(10,), (20,)])     # [[21, 21], [41, 41]]: one group, one list per case

Importing torch costs seconds, so workers start once per test session (and pytest-xdist worker); each call
makes a fresh default process group. A failing rank ends the call with its traceback; ranks that then say
nothing are stopped, and the next call starts new ones in their place.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

START_S = 120.0  # a new worker imports torch on a busy machine
JOIN_S = 30.0  # ranks that wait for each other to form a group need milliseconds
GRACE_S = 5.0  # after one rank failed: time for the others to notice and tell


class RankError(AssertionError):
    """A rank raised, died or stayed silent; the message names it and carries its traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    lost: Collection[int] | None = None,
    fresh: bool = False,
) -> list[Any]:
    """`fn(*args)` on every rank of a fresh gloo group -> its results in rank order.

    fresh: in new processes, which end afterwards, for what a process does once.
    lost: ranks that are to die or stop on the way. Their result is None, their processes are ended when the others have
    answered. Not None: `fn` breaks its group, whose ranks do not come together once more at the end.
    Raises RankError when another rank raises, dies, or is silent for timeout_s.
    """
    pool = Pool() if fresh else _POOL
    try:
        return pool.run(fn, world_size, [args], timeout_s, lost)[0]
    finally:
        if fresh:
            pool.close()


def run_cases(
    fn: Callable[..., Any], world_size: int, cases: Iterable[Sequence[Any]], timeout_s: float = 60.0
) -> list[list[Any]]:
    """`fn(*case)` for each case in turn on every rank of one group -> per case its results in rank order.

    Stops at the first failing case. timeout_s bounds the time between two answers, not the sum.
    """
    return _POOL.run(fn, world_size, list(cases), timeout_s)


class _NoGroupError(RankError):
    """The ranks did not find each other: none of the caller's code has run."""


class _Worker:
    def __init__(self, context: multiprocessing.context.SpawnContext) -> None:
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Pool:
    """Workers by rank; a call on N ranks uses the first N. They start in the environment of that call."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        cases: list[Sequence[Any]],
        timeout_s: float,
        lost: Collection[int] | None = None,
    ) -> list[list[Any]]:
        calls = [pickle.dumps((fn, case)) for case in cases]  # what cannot be pickled fails in the caller
        try:
            return self._run(world_size, calls, timeout_s, lost)
        except _NoGroupError as error:
            # Seen once in some ten thousand groups: all ranks stay inside gloo's constructor. New processes go on.
            print(f"a second try, with new workers: {error}", file=sys.stderr)
            return self._run(world_size, calls, timeout_s, lost)

    def _run(
        self, world_size: int, calls: list[bytes], timeout_s: float, lost: Collection[int] | None
    ) -> list[list[Any]]:
        self._start(world_size)
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(self.workers[:world_size]):
                worker.pipe.send((folder, rank, world_size, timeout_s, calls, lost is None))
            return self._collect(world_size, len(calls), timeout_s, Path(folder), lost or ())

    def _start(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        fresh = [_Worker(context) for _ in range(world_size - len(self.workers))]
        self.workers += fresh
        for worker in fresh:
            if not worker.pipe.poll(START_S) or worker.pipe.recv() != "ready":
                self._drop([worker])
                raise RankError(f"a worker process did not start within {START_S:.0f} s")

    def _collect(
        self, world_size: int, case_count: int, timeout_s: float, folder: Path, lost: Collection[int]
    ) -> list[list[Any]]:
        workers = self.workers[:world_size]
        rank_of = {worker.pipe: rank for rank, worker in enumerate(workers)}
        results: list[list[Any]] = [[None] * world_size for _ in range(case_count)]
        answers = [0] * world_size
        joined: set[int] = set()
        failures: list[str] = []
        deadline = time.monotonic() + JOIN_S
        while rank_of and (ready := wait(list(rank_of), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = rank_of[pipe]
                kind, value = _receive(workers[rank])
                if kind == "joined":
                    joined.add(rank)
                if kind == "result":
                    results[answers[rank]][rank] = value
                    answers[rank] += 1
                if kind in ("joined", "result") and not failures:
                    deadline = time.monotonic() + timeout_s
                if kind == "raised" or (kind == "died" and rank not in lost):
                    failures.append(f"rank {rank} of {world_size} {kind} in case {answers[rank]}{value}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                if kind in ("done", "died"):
                    del rank_of[pipe]
            if lost and all(count == case_count for rank, count in enumerate(answers) if rank not in lost):
                for rank in lost:  # else the others would wait for it at the end
                    workers[rank].process.kill()
        error: type[RankError] = RankError
        if not joined and not failures:
            error = _NoGroupError
            failures = [f"rank {rank} joined no group\n{_stack(folder, rank)}" for rank in rank_of.values()]
        elif rank_of and not failures:
            # A rank with all its answers only waits in the closing barrier for the ones to blame.
            late = [rank for rank in rank_of.values() if answers[rank] < case_count] or list(rank_of.values())
            failures = [
                f"rank {rank} of {world_size} gave no answer to case {answers[rank]} in {timeout_s:g} s"
                f"\n{_stack(folder, rank)}"
                for rank in late
            ]
        dead = [worker for worker in workers if not worker.process.is_alive()]
        self._drop([*dead, *(workers[rank] for rank in rank_of.values())])
        if failures:
            raise error("\n".join(failures))
        return results

    def close(self) -> None:
        """End all workers."""
        self._drop(self.workers)

    def _drop(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.stop()
        self.workers = [worker for worker in self.workers if worker not in workers]


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        kind, value = pickle.loads(worker.pipe.recv_bytes())
    except EOFError:
        worker.process.join()
        return "died", f": exit code {worker.process.exitcode}"
    return kind, value


def _stack(folder: Path, rank: int) -> str:
    """Where a silent rank stood when its time was over (written by faulthandler in the worker)."""
    file = folder / f"stack{rank}"
    return file.read_text() if file.exists() else ""


def _serve(pipe: Connection) -> None:
    """The life of one worker process: one group and a list of cases per message."""
    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        try:
            folder, rank, world_size, timeout_s, calls, whole = pipe.recv()
        except EOFError:  # the test session is over
            return
        with open(f"{folder}/stack{rank}", "w") as stack:

            def watch(timeout_s: float = timeout_s, stack: TextIO = stack) -> None:
                # A little early, so that it is on disk when the parent looks.
                faulthandler.dump_traceback_later(0.9 * timeout_s, file=stack)

            try:
                watch(JOIN_S)
                # Twice the time-out: the parent's clock decides, and names the ranks.
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(f"{folder}/store", world_size),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=2 * timeout_s),
                )
                pipe.send_bytes(pickle.dumps(("joined", None)))
                for call in calls:
                    watch()
                    fn, case = pickle.loads(call)
                    pipe.send_bytes(pickle.dumps(("result", fn(*case))))
                watch()
                with suppress(RuntimeError):  # a test may have broken its group on purpose
                    if whole:
                        dist.barrier()  # nobody closes its sockets while another still reads
            except BaseException:
                pipe.send_bytes(pickle.dumps(("raised", f":\n{traceback.format_exc()}")))
            if dist.is_initialized():
                dist.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()
        # Only now may the parent remove the folder: the store still opens its file while it is taken down.
        pipe.send_bytes(pickle.dumps(("done", None)))


_POOL = Pool()
