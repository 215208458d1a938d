"""kill -9 at random moments: of a rank, of `flashcp`, of torchrun.

    python -m tests.soak.kills 20 FOLDER          (`make kills`)

Each of the three is killed so many times. All processes have to be gone within 15 s and nothing may be left in
/dev/shm. The same command then goes on from the latest checkpoint: its losses have to be, to the bit, those of a run
that nobody disturbed. Every second run saves beside its training. Rows go to results.csv; exit code 1 where one failed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from flashcp.experiments.bench.harness import spread
from flashcp.experiments.sweep.results import Number, to_row, write_rows
from flashcp.train.lineage import find_latest
from tests.checkout import ROOT
from tests.processes import Job, flashcp_train, parent_of, under_way

STEPS, EVERY, RANKS, ATTEMPTS = 60, 7, 2, 5
KILLED = ("rank", "flashcp", "torchrun")
MEMORY = Path("/dev/shm")


class Kill(NamedTuple):
    """step: the last that was written down. gone_s: until no process was left. resumed: the checkpoint, if there was
    one. same: losses to the bit."""

    killed: str
    asynchronous: bool
    step: int
    gone_s: float
    left_in_memory: int
    resumed: str
    same: bool


def command(out: Path, asynchronous: bool) -> list[str]:
    kept = [f"checkpoint.every={EVERY}", "checkpoint.resume=latest", f"checkpoint.asynchronous={asynchronous}"]
    return flashcp_train(f"loop.steps={STEPS}", "loop.accumulation=1", *kept, f"out={out}")


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def kill(job: Job, killed: str, draw: random.Random) -> bool:
    """Whether it was still there to be killed."""
    ranks = job.ranks()
    try:
        process = job.launcher.pid
        if killed == "rank":
            process = draw.choice([ranks[0], ranks[1]])
        if killed == "torchrun":
            process = parent_of(ranks[0])
        os.kill(process, signal.SIGKILL)
    except (KeyError, OSError):
        return False
    return len(ranks) == RANKS


def kill_once(
    killed: str, asynchronous: bool, draw: random.Random, folder: Path, whole: list[tuple[int, float]]
) -> Kill:
    """Of a run that was under way; one that had come to its end by then is run again."""
    for attempt in range(ATTEMPTS):
        here = folder / str(attempt)
        here.mkdir()
        words, before = command(here / "run", asynchronous), set(MEMORY.iterdir())
        with under_way(words, here, steps=draw.randrange(1, STEPS - 20)) as job:
            time.sleep(draw.random() * 0.3)
            was_there = kill(job, killed, draw)
            gone_s = job.gone(60.0)
        if was_there:
            break
        assert (job.launcher.returncode, job.steps()) == (0, STEPS), f"a run ended by itself: {job.log.read_text()}"
    else:
        raise AssertionError(f"{ATTEMPTS} runs ended before they could be killed")
    step, left = job.steps(), len(set(MEMORY.iterdir()) - before)
    latest = find_latest(here / "run")
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    return Kill(killed, asynchronous, step, gone_s, left, latest.name if latest else "", losses(here) == whole)


def main(count: int, folder: Path, seed: int = 0) -> int:
    draw, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as place:
        undisturbed = Path(place) / "whole"
        undisturbed.mkdir()
        subprocess.run(command(undisturbed / "run", False), cwd=ROOT, check=True, capture_output=True, timeout=120)
        whole = losses(undisturbed)
        assert len(whole) == STEPS
        for number in tqdm(range(len(KILLED) * count), unit="kill"):
            here = Path(place) / str(number)
            here.mkdir()
            found.append(kill_once(KILLED[number % len(KILLED)], number // 3 % 2 == 1, draw, here, whole))
    numbers = []
    for killed in KILLED:
        own = [one for one in found if one.killed == killed]
        numbers += [
            Number(killed, "kills", "1", None, len(own), None),
            Number(killed, "gone_s", "s", *spread(np.array([one.gone_s for one in own]))),
            Number(killed, "gone_s_most", "s", None, max(one.gone_s for one in own), None),
            Number(killed, "resumed_to_the_bit", "1", None, sum(one.same for one in own), None),
            Number(killed, "left_in_memory", "1", None, sum(one.left_in_memory for one in own), None),
        ]
        print(", ".join(f"{one.metric} {one.median:.3g}" for one in numbers[-5:]), f"({killed})")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, [to_row(f"{STEPS} steps on 2 ranks", one, f"CPU, {os.cpu_count()} cores") for one in numbers])
    bad = [one for one in found if one.gone_s > 15.0 or one.left_in_memory or not one.same]
    print("\n".join(map(str, bad)) or "nothing left, every resumed run equal to the bit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
