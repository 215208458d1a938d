"""A trace of a few steps: what every thread of a rank does when, one file a rank in Chrome's format.

https://ui.perfetto.dev and chrome://tracing open it. The ranges that `flashcp.comm.clock.span` names lie on the track
of the thread that they ran on: attention and waits on the rank's own, transfers on that of the thread that puts rows.
"""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, schedule

from flashcp.comm.fabrics.shm import PUTS

TRACE = "trace"  # the folder below a run's
STEPS = 3
"""Steps that a trace shows, after one that warms up."""

Row = TypeVar("Row")


def traced(steps: Iterable[Row], folder: Path, rank: int) -> Iterator[Row]:
    """The same steps; the second to the fourth are profiled and written to folder/rankR.json.gz, times in us.

    Fewer steps leave a trace of what there was. Profiled steps take longer than others.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=STEPS, repeat=1),
        on_trace_ready=lambda profiler: _write(profiler, folder / f"rank{rank}.json.gz", rank),
        experimental_config=_ExperimentalConfig(profile_all_threads=True),
    ) as profiler:
        for row in steps:
            yield row
            profiler.step()


def _write(profiler: profile, path: Path, rank: int) -> None:
    """Write the trace, with the names of the rank and of its threads that torch does not know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished_{path.stem}")
    profiler.export_chrome_trace(str(unfinished))
    trace = json.loads(unfinished.read_text())
    threads = {thread.native_id: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().native_id
    threads[main] = "model and attention"
    events = trace["traceEvents"]
    # A thread that puts rows ends when it has none for a while, and its name with it.
    threads.update({e["tid"]: PUTS for e in events if e.get("cat") == "user_annotation" and e["tid"] not in threads})
    here = threads.keys() & {e.get("tid") for e in events}
    # Messages under way are put on the track of who asked, across its ranges; viewers drop what does not nest.
    dropped = {("gloo:send", main), ("gloo:recv", main), *(("thread_name", tid) for tid in here)}
    events = trace["traceEvents"] = [e for e in events if (e["name"], e.get("tid")) not in dropped]
    for event in events:
        if event["name"] == "process_name" and event["pid"] == os.getpid():
            event["args"]["name"] = f"rank {rank}"
    for tid in here:
        events.append(
            {"ph": "M", "name": "thread_name", "pid": os.getpid(), "tid": tid, "args": {"name": threads[tid]}}
        )
    with gzip.open(path, "wt") as file:
        json.dump(trace, file)
    unfinished.unlink()
