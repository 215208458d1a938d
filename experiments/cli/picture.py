"""Pictures of plans: who holds which rows, who computes what, and how even that is; one plan, or methods beside each
other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flashcp.experiments.plots import INK, PALETTE, TIME_COLOURS, save, styled
from flashcp.sharding.plan import ShardingPlan

OUTLINE = 256  # steps of a shard's edges under masks
LEGEND_RANKS = 16  # more ranks than this are told apart by their order alone


@styled
def draw_plan(
    plan: ShardingPlan, exchange: str, path: Path, head_ranks: int = 1, window_ends: Sequence[int] = ()
) -> Path:
    """Write the picture in the format of the path's suffix, PNG where there is none. Returns the file written.

    head_ranks: of a holder; the plan's ranks are holders where it is not 1, and so are the picture's. window_ends: rows
    of the pack at which a window ends, but for the last.

    Raises ValueError when it cannot be written.

    Left: the causal pairs of the pack, coloured by the rank that computes them (for `ulysses`, which splits heads,
    by the rank that holds the query). Right: the rows each rank holds; its work, and the rows it sends and receives.
    Where layers differ, work is the sum over them, and rows and saving are means.
    """
    figure = Figure(figsize=(13, 6.2))
    whose = "rank" if head_ranks == 1 else f"holder of {head_ranks}"
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.25), height_ratios=(1.4, 1.0))
    below = grid[1, 1].subgridspec(1, 2)
    _draw_pairs(figure.add_subplot(grid[:, 0]), plan, whose, window_ends)
    _draw_rows(figure.add_subplot(grid[0, 1]), plan, whose, window_ends)
    work = figure.add_subplot(below[0])
    work.bar(range(plan.world_size), plan.work * plan.world_size / plan.work.sum(), color=_colours(plan))
    work.axhline(1, color=INK, lw=1, ls=(0, (4, 3)))
    work.set(xlabel=whose, title="work / mean")
    _draw_traffic(figure.add_subplot(below[1]), plan, exchange, whose)
    imbalance, _, saving = plan.over_layers(exchange, head_ranks)
    figure.suptitle(
        f"{plan.strategy}, {exchange}: {len(plan.document_lengths)} documents, {plan.offsets[-1]} tokens, "
        f"{plan.world_size * head_ranks} ranks; imbalance {imbalance:.3f}, "
        f"saving {saving:.3f}"
    )
    return _save(figure, path)


@styled
def draw_methods(
    plans: Mapping[str, tuple[ShardingPlan, str]], path: Path, head_ranks: int = 1, window_ends: Sequence[int] = ()
) -> Path:
    """Write one picture of several methods on the same pack, each a plan and its exchange, side by side; head_ranks and
    window_ends as `draw_plan` has them.

    Above: who computes what. Below: the KV rows that each rank receives, all to one scale; where layers differ, means
    over them. Returns the file written.
    Raises ValueError when it cannot be written.
    """
    whose = "rank" if head_ranks == 1 else f"holder of {head_ranks}"
    columns = min(len(plans), 4)
    lines = -(-len(plans) // columns)
    figure = Figure(figsize=(4.1 * columns, 5.4 * lines))
    grid = figure.add_gridspec(2 * lines, columns, height_ratios=(3.4, 1.0) * lines)
    most = max(_rows(plan, exchange)[1].max() for plan, exchange in plans.values())
    for number, (name, (plan, exchange)) in enumerate(plans.items()):
        line, column = divmod(number, columns)
        above, below = (figure.add_subplot(grid[2 * line + half, column]) for half in (0, 1))
        _draw_pairs(above, plan, whose, window_ends)
        imbalance = plan.over_layers(exchange)[0]
        above.set_title(f"{name}: busiest {whose.split()[0]} {imbalance:.2f} x the mean")
        received = _rows(plan, exchange)[1]
        below.bar(range(len(received)), received, color=_colours(plan))
        title = f"KV rows received{_of_layers(plan)}: {received.sum():,.0f}"
        below.set(ylim=(0, 1.1 * max(1, most)), xlabel=whose, title=title)
    return _save(figure, path)


def _draw_pairs(axes: Any, plan: ShardingPlan, whose: str, window_ends: Sequence[int]) -> None:
    """A shard's pairs: its queries down, the keys that each sees across. Of a causal document they are a trapezoid.

    Of layers that differ, those that see more are drawn paler, behind the others.
    """
    colours, size = _colours(plan), int(plan.offsets[-1])
    kinds = sorted((kind for kind, _ in plan.of_kinds), key=lambda kind: -int(kind.work.sum()))
    for kind, strength in zip(kinds, np.linspace(1, 0.35, len(kinds))[::-1], strict=True):
        axes.add_collection(
            PolyCollection(_corners(kind), facecolors=colours[plan.table.rank], linewidths=0, alpha=strength)
        )
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", title="who computes what")
    paler = "" if len(kinds) == 1 else "; pale: some layers"
    axes.set(xlabel=f"key (row of the pack){paler}", ylabel="query (row of the pack)")
    if plan.world_size <= LEGEND_RANKS:
        named = [Patch(color=c, label=f"{whose.split()[0]} {rank}") for rank, c in enumerate(colours)]
        axes.legend(handles=named, loc="upper right")
    for end in window_ends:
        axes.axhline(end, color=INK, lw=0.8, ls=(0, (4, 3)))


def _corners(plan: ShardingPlan) -> list[np.ndarray]:
    """Corners (key, query) of what each shard computes."""
    document, start, stop, _ = plan.table
    if not plan.masks.is_causal:
        return [_outline(plan, *shard) for shard in zip(document, start, stop, strict=True)]
    first = plan.offsets[document]
    begin, end = first + start, first + stop
    return list(np.stack([first, begin, begin, begin, end, end, first, end], axis=1).reshape(-1, 4, 2))


def _outline(plan: ShardingPlan, document: int, start: int, stop: int) -> np.ndarray:
    """Corners (key, query) of the keys that rows of a shard see, down one edge and up the other."""
    rows = np.unique(np.linspace(start, stop, min(stop - start, OUTLINE) + 1).astype(np.int64))
    every, below = np.repeat(rows, 2)[1:-1], np.repeat(rows[:-1], 2)  # each step of the edges has two corners
    of = np.full(len(below), document)
    first = int(plan.offsets[document])
    left, right = (first + seen(of, below) for seen in (plan.masks.lowest, plan.masks.past))
    down, up = np.stack([left, first + every], axis=1), np.stack([right, first + every], axis=1)
    return np.concatenate([down, up[::-1]])


def _draw_rows(axes: Any, plan: ShardingPlan, whose: str, window_ends: Sequence[int]) -> None:
    for rank, colour in enumerate(_colours(plan)):
        mine = plan.local(rank)
        places = plan.offsets[mine.document] + mine.start
        bars = list(zip(places.tolist(), (mine.stop - mine.start).tolist(), strict=True))
        axes.broken_barh(bars, (rank - 0.36, 0.72), facecolors=colour, linewidth=0)
    for edge in plan.offsets[1:-1]:
        axes.axvline(edge, color=INK, lw=0.5, alpha=0.35)
    axes.set(xlim=(0, int(plan.offsets[-1])), ylim=(plan.world_size - 0.4, -0.6), title="who holds what")
    for end in window_ends:
        axes.axvline(end, color=INK, lw=1, ls=(0, (4, 3)))
    dashed = ", dashed: windows" if window_ends else ""
    axes.set(xlabel=f"row of the pack; lines: where documents meet{dashed}", ylabel=whose)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _rows(plan: ShardingPlan, exchange: str) -> np.ndarray:
    """Rows that each rank sends and receives, [2, world_size]: means over the layers."""
    routes, layers = zip(*((one.route(exchange), count) for one, count in plan.of_kinds), strict=True)
    return np.average([(route.sent_rows, route.received_rows) for route in routes], axis=0, weights=layers)


def _of_layers(plan: ShardingPlan) -> str:
    return ", layers' mean" if len(plan.of_kinds) > 1 else ""


def _draw_traffic(axes: Any, plan: ShardingPlan, exchange: str, whose: str) -> None:
    sent, received = _rows(plan, exchange)
    ranks = np.arange(len(sent))
    axes.bar(ranks - 0.2, sent, width=0.4, color=TIME_COLOURS["exchange"], label="sent")
    axes.bar(ranks + 0.2, received, width=0.4, color=TIME_COLOURS["rest"], label="received")
    axes.set(xlabel=whose, title=f"KV rows{_of_layers(plan)}", ylim=(0, 1.25 * max(1, sent.max(), received.max())))
    axes.legend(loc="upper right", ncols=2)


def _colours(plan: ShardingPlan) -> np.ndarray:
    """The colour of each rank."""
    return np.resize(PALETTE, plan.world_size)


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(visible=False)
    if path.is_dir():
        raise ValueError(f"figure={str(path)!r}: cannot be written (it is a directory); expected a file")
    if not path.parent.is_dir():
        raise ValueError(f"figure={str(path)!r}: cannot be written (there is no directory {str(path.parent)!r})")
    return save(figure, path if path.suffix else path.with_name(f"{path.name}.png"))
