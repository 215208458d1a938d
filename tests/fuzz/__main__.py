"""`make fuzz SECONDS=60 ONLY=lengths`: every parser for so long, or those of a group or whose names hold a word; then a
table. The groups: planning, checkpoints, data, command line.

With OUT=FOLDER the table becomes rows there, beside those of other parsers.
Exit code 1 where an input was not parsed as documented. What was found is kept in a folder beside other caches
(`$XDG_CACHE_HOME/flashcp-fuzz`), tried first the next time, and removed with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flashcp.experiments.sweep.results import RESULTS, Number, read_rows, to_row, write_rows
from flashcp.text import table
from tests.checkout import ROOT
from tests.fuzz.parsers import parsers

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcp-fuzz"
GRACE_S = 120.0


def fuzz_in_child(name: str, seconds: float, database: str) -> dict[str, Any]:
    """What `tests.fuzz.child.fuzz` says; that it crashed or hung where it says nothing."""
    command = [sys.executable, "-m", "tests.fuzz.child", name, str(seconds), database]
    lost = {"parser": name, "inputs": 0, "lines": 0, "mib": 0, "input": ""}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        return {**lost, "failure": f"said nothing for {seconds + GRACE_S:.0f} s"}
    if done.returncode:
        return {**lost, "failure": f"ended its process, {done.returncode}: {done.stderr.strip()[-500:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def write(found: list[dict[str, Any]], seconds: float, folder: Path) -> None:
    """Rows of these parsers in place of earlier ones of theirs."""
    names = {one["parser"] for one in found}
    kept = [row for row in read_rows(folder) if row.provider not in names] if (folder / RESULTS).exists() else []
    numbers = [
        Number(one["parser"], metric, unit, None, float(value), None)
        for one in found
        for metric, unit, value in (
            ("inputs", "1", one["inputs"]),
            ("lines", "1", one["lines"]),
            ("memory_growth", "MiB", one["mib"]),
            ("failures", "1", bool(one["failure"])),
        )
    ]
    folder.mkdir(parents=True, exist_ok=True)
    device = f"CPU, {os.cpu_count()} cores"
    write_rows(folder, [*kept, *(to_row(f"{seconds:g} s a parser", number, device) for number in numbers)])


def main(seconds: float, only: str = "", folder: str = "") -> int:
    """Exit code: 0, or 1 where something failed."""
    every = parsers()
    own = [parser for parser in every if parser.group == only] or [parser for parser in every if only in parser.name]
    names = [parser.name for parser in own]
    if not names or not seconds > 0:
        print(
            f"SECONDS={seconds:g} ONLY={only!r}: expected more than 0, and a group or a part of a parser's name",
            file=sys.stderr,
        )
        return 2
    CACHE.mkdir(parents=True, exist_ok=True)
    found = []
    for name in names:
        found.append(fuzz_in_child(name, seconds, str(CACHE)))
        if folder:
            write(found[-1:], seconds, Path(folder))
        print(f"{name}: {found[-1]['inputs']} inputs", file=sys.stderr)
    rows = [
        [
            one["parser"],
            *(f"{one[key]:,}" for key in ("inputs", "lines")),
            str(int(bool(one["failure"]))),
            str(one["mib"]),
        ]
        for one in found
    ]
    print(table(["parser", "inputs", "lines of ours", "new failures", "peak MiB more"], rows))
    for one in filter(lambda one: one["failure"], found):
        print(f"\n{one['parser']}: {one['failure']}\n  {one['input']}")
    return int(any(one["failure"] for one in found))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:]))
