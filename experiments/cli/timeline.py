"""The picture of a trace: what carries rows and what computes on them, rank by rank, through one attention call.

`flashcp train profile=true` draws it; `python -m flashcp.experiments.cli.timeline DIR` draws that of a run's directory.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from flashcp.experiments.plots import legend_below, styled
from flashcp.train.trace import TRACE

MOST_RANKS = 8  # in one picture
PASSES = (("send rows", "forward"), ("backward", "backward"))  # first and last part of a call's
KINDS = {
    "transfer": (r"send .+ to rank \d+|gloo:all_(to_all|gather)", "#e07a5f"),
    "packing, adding": (r"(attention \d+, )?send [a-z ]+|gradients home", "#f2c9bb"),
    "local tiles": (r"(gradients of )?local tiles", "#2f6690"),
    "remote tiles": (r"(gradients of )?remote tiles.*", "#81b1d6"),
    "local and remote tiles": (r"(gradients of )?all tiles.*", "#4d86b3"),
    "wait": (r"wait .*|headers", "#f4d35e"),
}
"""Kinds of ranges: what their names look like, and their colours. Later ones may lie inside earlier ones."""


class Range(NamedTuple):
    """A named range of a trace; times in ms of a clock that all ranks of a machine share."""

    name: str
    start: float
    stop: float


@styled
def draw_timeline(out: Path) -> Path | None:
    """Draw out/timeline.png from a run's traces and summary.json: the attention call in the middle of the trace.

    None where no attention call lies in the traces of all ranks with both its passes.
    """
    files = sorted((out / TRACE).glob("rank*.json.gz"), key=lambda file: int(re.sub(r"\D", "", file.name)))
    ranks = [read_ranges(file) for file in files[:MOST_RANKS]]
    calls = sorted(set.intersection(*map(_calls, ranks))) if ranks else []
    if not calls:
        return None
    call = calls[len(calls) // 2]
    summary = json.loads((out / "summary.json").read_text())
    figure = timeline_figure(ranks, call)
    figure.suptitle(
        f"{summary['config']['exchange']['name']} over {summary['transport']}, overlap {summary['overlap']}: "
        f"attention call {call} of the run, profiled ({summary['versions']['device']})"
    )
    picture = out / "timeline.png"
    figure.savefig(picture)
    return picture


@styled
def timeline_figure(ranks: Sequence[Sequence[Range]], call: int) -> Figure:
    """Two panels, the forward and the backward pass of a call that all ranks made. Two lines a rank: its transfers, and
    below them what its attention does meanwhile."""
    figure = Figure(figsize=(13.5, 1.6 + 0.8 * len(ranks)))
    panels = figure.subplots(1, 2, sharey=True)
    drawn = [_draw_pass(axes, ranks, call, *ends) for axes, ends in zip(panels, PASSES, strict=True)]
    lines = [f"rank {rank} {line}" for rank in range(len(ranks)) for line in ("transfers", "computes")]
    panels[0].set_yticks(range(len(lines)), lines)
    panels[0].invert_yaxis()
    legend_below(figure, {name: colour for name, (_, colour) in KINDS.items() if name in set.union(*drawn)})
    return figure


def read_ranges(path: Path) -> list[Range]:
    """The named ranges of one rank's trace."""
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    zero = trace["baseTimeNanoseconds"] / 1e6
    named = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    return [Range(one["name"], zero + one["ts"] / 1e3, zero + (one["ts"] + one["dur"]) / 1e3) for one in named]


def kind(name: str) -> str:
    """Which of `KINDS` a range is; empty for none."""
    return next((each for each, (pattern, _) in KINDS.items() if re.fullmatch(pattern, name)), "")


def _calls(ranges: Sequence[Range]) -> set[int]:
    """Attention calls whose both passes are there."""
    names = {each.name for each in ranges}
    numbers = {int(found[1]) for name in names if (found := re.match(r"attention (\d+),", name))}
    return {call for call in numbers if _names(call, "send rows", "forward", "backward") <= names}


def _names(call: int, *parts: str) -> set[str]:
    return {f"attention {call}, {part}" for part in parts}


def _draw_pass(axes: Any, ranks: Sequence[Sequence[Range]], call: int, first: str, last: str) -> set[str]:
    """Every rank's ranges from the first part of the call to the last. Returns the kinds that there were."""
    own = [[each for each in ranges if each.name in _names(call, first, last)] for ranges in ranks]
    begin, end = min(each.start for parts in own for each in parts), max(each.stop for parts in own for each in parts)
    drawn = set()
    for rank, (ranges, parts) in enumerate(zip(ranks, own, strict=True)):
        first_start, last_stop = min(part.start for part in parts), max(part.stop for part in parts)
        for name, start, stop in ranges:
            which = kind(name)
            if not which or not first_start <= start < last_stop:
                continue
            drawn.add(which)
            line, left, width = 2 * rank + (which != "transfer"), start - begin, min(stop, end) - start
            order = 2 + list(KINDS).index(which)
            axes.barh(line, width, left=left, height=0.8, color=KINDS[which][1], zorder=order)
            whom = re.search(r"(?:to|from|of) (?:rank )?(\d[\d, ]*)", name)
            if whom and width > 0.06 * (end - begin):
                text = f"{'to' if which == 'transfer' else 'from'} {whom[1]}"
                axes.text(left + width / 2, line, text, ha="center", va="center", fontsize=8, zorder=9)
    for rank in range(1, len(ranks)):
        axes.axhline(2 * rank - 0.5, color="#9aa5b1", lw=0.8)
    axes.set(xlim=(0, end - begin), xlabel="ms", title=f"{last} pass")
    axes.grid(visible=False)
    return drawn


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "summary.json").is_file():
        sys.exit("expected one argument: the directory of a finished run")
    print(draw_timeline(Path(sys.argv[1])) or f"no whole attention call in {sys.argv[1]}/{TRACE}")
