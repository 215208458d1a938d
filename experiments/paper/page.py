"""The page of the paper's figures, from the rows beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flashcp.experiments.bench.calibration.figure import draw_calibration
from flashcp.experiments.bench.calibration.times import DIRECTIONS, errors, read_times
from flashcp.experiments.paper.cells import Cell, Numbers, farthest, verdict
from flashcp.experiments.paper.figures import FIGURES, publish_figure
from flashcp.experiments.paper.notes import NOTES, prose
from flashcp.experiments.sweep.rows import RESULTS, WINDOWS, Row, read_rows

__all__ = ["PAGE", "paper_folders", "write_paper_page"]

PAGE = "PAPER_RESULTS.md"


def paper_folders(folder: Path) -> dict[str, Path]:
    """Directories below that hold rows of a figure, by the figure's name."""
    found = {}
    for name in FIGURES:
        place = folder / name
        if (place / RESULTS).is_file():
            found[name] = place
    return found


def write_paper_page(folder: Path, page: Path) -> Path:
    """Draw every figure again and write the page. Raises ValueError where no figure has rows."""
    places = paper_folders(folder)
    if not places:
        raise ValueError(f"{folder}: no rows of {', '.join(FIGURES)} below it")
    rows = {name: read_rows(place) for name, place in places.items()}
    parts = [_head(rows)]
    for name, place in places.items():
        publish_figure(name, rows[name], place)
        parts.append(_section(name, Numbers(rows[name]), os.path.relpath(place, page.parent)))
    parts += [_calibration(file, page.parent) for file in sorted((folder / "calibration").glob("*.csv"))]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _head(rows: dict[str, list[Row]]) -> str:
    about = prose("""
        Made by `flashcp report` from the rows of `make paper`: the simulator (`flashcp simulate`) prices plans on an
        H100 whose parameters were fitted to one column of the paper's breakdown table; `conf/cluster/h100-nvlink.yaml`
        names the source of each. A number counts as reproduced within 15%, an average speedup within 0.15; ratios
        between methods and the collectives' times are judged, other times are context. Where effects are smaller than
        15% that says little, so the distances are there too. *Held out* are those judged to which nothing was fitted.
        *flashcp_paper* is the paper's heuristic with its own exchange, *flashcp* this project's.
    """)
    lines = ["# The paper's figures, simulated", "", about, ""]
    lines += ["| figure | reproduced | held out | farthest | windows a case | rows |", "|---|---|---|---|---|---|"]
    for name, each in rows.items():
        cells = [cell for cell in FIGURES[name].cells(Numbers(each)) if cell.judged]
        counts = sorted({int(row.median) for row in each if row.metric == WINDOWS})
        shown = [
            name,
            _within(cells),
            _within([cell for cell in cells if not cell.fitted]),
            str(farthest(cells)) if cells else "",
            " to ".join(f"{count:,}" for count in dict.fromkeys((*counts[:1], *counts[-1:]))),
            "; ".join(dict.fromkeys(map(_provenance, each))),
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _within(cells: Sequence[Cell]) -> str:
    return f"{sum(cell.within for cell in cells)} of {len(cells)}" if cells else ""


def _provenance(row: Row) -> str:
    return f"{row.kind}, {row.versions}, commit {row.commit}, {row.date[:10]}"


def _section(name: str, numbers: Numbers, folder: str) -> str:
    cells = FIGURES[name].cells(numbers)
    lines = [f"## {name}: {FIGURES[name].title}", "", f"![{name}]({folder}/{name}.png)", ""]
    if cells:
        lines += [
            f"| | {FIGURES[name].theirs} | ours | apart |",
            "|---|---|---|---|",
            *map(_line, cells),
            "",
            verdict(cells) + ".",
            "",
        ]
    return "\n".join([*lines, NOTES[name](numbers)])


def _line(cell: Cell) -> str:
    apart = f"**{cell.apart}**" if cell.judged and not cell.within else cell.apart
    return f"| {cell.what} | {cell.paper:.3g} | {cell.ours:.3g} | {apart}{'' if cell.judged else ' (context)'} |"


def _calibration(file: Path, here: Path) -> str:
    """Predicted attention beside measured one, of schedules that fitted nothing."""
    times = read_times(file)
    picture = file.with_suffix(".png")
    draw_calibration(times, picture)
    one = times[0]
    about = prose(f"""
        `flashcp bench calibrate` timed attention on random ranks' schedules (one of six strategies, 2 to 8 ranks, 1 to
        24 documents): half of them fitted the parameters of `cluster={file.stem}`, the other half is shown. Measured:
        {one.device}, {one.versions}, commit {one.commit}, {one.date}; a thread's own time.
    """)
    lines = [f"## calibration: {file.stem}", "", f"![{file.stem}]({os.path.relpath(picture, here)})", "", about, ""]
    lines += ["| | schedules | median error | p95 |", "|---|---|---|---|"]
    for direction in DIRECTIONS:
        found = errors(times, direction, "check")
        lines.append(f"| {direction} | {found.schedules} | {found.median:.1%} | {found.p95:.1%} |")
    return "\n".join(lines)
