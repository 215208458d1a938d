"""Runs a group of calls in a child process: one that hangs or crashes costs its process, and is named.

`python -m tests.hostile.battery` runs all (`make test` leaves most command lines out), `... planning` one group, and
`... "" FOLDER` (`make hostile`) all, with rows there.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from flashcp.experiments.sweep.results import Number, to_row, write_rows
from tests.checkout import ROOT
from tests.hostile.child import GROUPS

SILENT_S = 60.0
"""A child that says nothing for so long waits for something: processor time has a bound of its own."""
MOST_CRASHES = 20


class Battery(NamedTuple):
    """calls: how many were made. wrong: those that did not end as documented, and how they ended."""

    calls: int
    wrong: dict[str, str]


def run(group: str, every: int = 1) -> Battery:
    """Every so-manieth call of a group. Raises RuntimeError where the good ones already fail."""
    wrong: dict[str, str] = {}
    first, crashes = 0, 0
    while crashes <= MOST_CRASHES:
        last, ended = _run(group, first, every, wrong)
        if ended:
            return Battery(last // every + 1, wrong)
        first, crashes = last + 1, crashes + 1
    raise RuntimeError(f"more than {MOST_CRASHES} calls crashed: {wrong}")


def _run(group: str, first: int, every: int, wrong: dict[str, str]) -> tuple[int, bool]:
    """The number of the last call that was begun, and whether that was the last of all."""
    command = [sys.executable, "-m", "tests.hostile.child", group, str(first), str(every)]
    call, number = "", first - 1
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stderr
        while select.select([child.stdout], [], [], SILENT_S)[0] and (line := child.stdout.readline()):
            told = json.loads(line)
            if "end" in told:
                return number, True
            number, call = told["number"], told.get("call", call)
            if told.get("wrong"):
                wrong[call] = told["wrong"]
        hung = child.poll() is None and not select.select([child.stdout], [], [], 0)[0]
        child.kill()
        said = child.stderr.read().decode(errors="replace")[-2000:]
    if number < first:
        raise RuntimeError(f"{group}: a good call failed: {said}")
    wrong[call] = f"said nothing for {SILENT_S:.0f} s" if hung else f"ended its process, {child.returncode}: {said}"
    return number, False


def main(only: str = "", folder: str = "") -> int:
    """Exit code: 1 where a call did not end as documented."""
    found = {group: run(group) for group in ([only] if only else GROUPS)}
    for group, battery in found.items():
        print(f"{group}: {battery.calls} calls, {len(battery.wrong)} wrong")
        print("".join(f"  {call}: {how}\n" for call, how in battery.wrong.items()), end="")
    if folder:
        numbers = [
            Number(group, metric, "1", None, count, None)
            for group, battery in found.items()
            for metric, count in (("calls", battery.calls), ("wrong", len(battery.wrong)))
        ]
        Path(folder).mkdir(parents=True, exist_ok=True)
        device = f"CPU, {os.cpu_count()} cores"
        write_rows(Path(folder), [to_row("every call", number, device) for number in numbers])
    return int(any(battery.wrong for battery in found.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
