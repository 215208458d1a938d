"""The page of a sweep: one HTML file that needs no network, no server and no other file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from flashcp.experiments.sweep.columns import STEP, Column, columns
from flashcp.experiments.sweep.comparison import LOSS_TOLERANCE, Comparison, Line
from flashcp.experiments.sweep.figure import PARTS, comparison_figure, step_parts
from flashcp.experiments.sweep.rows import RESULTS, Row
from flashcp.experiments.sweep.style import PAGE_STYLE

__all__ = ["write_dashboard"]


def write_dashboard(
    path: Path, title: str, comparison: Comparison, rows: Sequence[Row], failures: dict[tuple[str, str], str]
) -> None:
    """Write the page whole or not at all."""
    sections = [
        _tiles(comparison),
        _failures(failures),
        *(_case(comparison, case, rows) for case in comparison.cases),
        f'<section class="card"><img alt="step times and losses" src="{_figure(comparison)}"></section>',
        _columns(comparison),
        _provenance(rows),
    ]
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FlashCP: {escape(title)}</title>
<style>{PAGE_STYLE}</style>
</head>
<body>
<main>
<header><p class="brand">FlashCP</p><h1>{escape(title)}</h1>
<p class="lead">{escape(_lead(comparison, rows))}</p></header>
{"".join(sections)}
</main>
</body>
</html>
"""
    unfinished = path.with_name(f"unfinished_{path.name}")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)


def _lead(comparison: Comparison, rows: Sequence[Row]) -> str:
    providers = dict.fromkeys(line.provider for line in comparison.lines if not line.is_single)
    counts = sorted({len(line.losses) for line in comparison.lines})
    steps = f"{counts[0]} to {counts[-1]}" if counts[1:] else "".join(map(str, counts))
    kinds, devices = (_several(getattr(row, name) for row in rows) for name in ("kind", "device"))
    what = "levels of overlap" if comparison.of_overlap else "methods"
    return f"{len(providers)} {what}, {steps} training steps each, {kinds} on {devices}"


def _tiles(comparison: Comparison) -> str:
    tiles = []
    means = comparison.mean_speedups()
    if means and not comparison.of_overlap:  # whose cases are of several implementations of attention
        best = max(means, key=lambda provider: means[provider])
        what = f"{best}, fastest step over {comparison.baseline}"
        if best == comparison.baseline:
            what = f"no step faster than {comparison.baseline}'s"
        tiles.append((f"{means[best]:.2f}x", what))
    tiles += _hidden(comparison) if comparison.of_overlap else _rows_and_balance(comparison)
    if worst := comparison.worst_difference:
        agree = (worst.loss_difference or 0.0) <= LOSS_TOLERANCE
        tiles.append(
            (f"{worst.loss_difference:.0e}", f"largest difference of a loss: {'agree' if agree else 'do not agree'}")
        )
    return '<div class="tiles">{}</div>'.format(
        "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles)
    )


def _hidden(comparison: Comparison) -> list[tuple[str, str]]:
    """The most that was hidden, a tile a case, where it was measured well enough."""
    tiles = []
    for case in comparison.cases:
        lines = [line for line in comparison.lines if line.case == case and line.hidden and line.is_hidden_told]
        if best := max(lines, key=lambda line: line.hidden or 0.0, default=None):
            share = f"{100 * min(1.0, best.hidden or 0.0):.0f}%"
            tiles.append((share, f"of the exchange hidden by {best.provider}: {case}"))
    return tiles


def _rows_and_balance(comparison: Comparison) -> list[tuple[str, str]]:
    """Balance of the baseline, and the most rows saved."""
    tiles = []
    lines = [line for line in comparison.lines if not line.is_single]
    if balanced := [line for line in lines if line.imbalance is not None and line.provider == comparison.baseline]:
        tiles.append((f"{balanced[0].imbalance:.2f}", f"imbalance of {comparison.baseline}; 1 is balanced"))
    if saving := max(lines, key=lambda line: line.saving or 0.0, default=None):
        tiles.append((f"{100 * (saving.saving or 0):.0f}%", f"fewer KV rows than an all-gather: {saving.provider}"))
    return tiles


def _failures(failures: dict[tuple[str, str], str]) -> str:
    if not failures:
        return ""
    items = (f"<li><b>{escape(f'{case} {name}')}</b> {escape(why)}</li>" for (case, name), why in failures.items())
    return f'<section class="card failed"><h2>Failed</h2><ul>{"".join(items)}</ul></section>'


def _case(comparison: Comparison, case: str, rows: Sequence[Row]) -> str:
    lines = [line for line in comparison.lines if line.case == case]
    longest = max((line.step_ms or 0.0 for line in lines if not line.is_single), default=0.0) or 1.0
    spread = {(row.case, row.provider): (row.p20, row.p80) for row in rows if row.metric == "step_ms"}
    chosen = columns(comparison)
    heads = ["overlap" if comparison.of_overlap else "method"]
    for column in chosen:
        heads += [column.title, ""] if column == STEP else [column.title]
    body = "".join(_row(line, chosen, longest, spread.get((line.case, line.provider))) for line in lines)
    legend = "".join(f'<i style="background:{colour}"></i>{part} ' for part, colour in PARTS.items())
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f'<section class="card"><h2>{escape(case)}<span class="legend">{legend}</span></h2>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _row(line: Line, chosen: Sequence[Column], longest: float, spread: tuple[float | None, float | None] | None) -> str:
    between = f"<small>{spread[0]:.0f} - {spread[1]:.0f}</small>" if spread and None not in spread else ""
    parts = (
        ""
        if line.is_single
        else "".join(
            f'<i style="width:{100 * ms / longest:.2f}%;background:{PARTS[part]}" title="{part} {ms:.1f} ms"></i>'
            for part, ms in step_parts(line).items()
        )
    )
    cells = [f"<th>{escape(line.provider)}</th>"]
    for column in chosen:
        if column == STEP:
            cells += [f"<td>{column.cell(line)}{between}</td>", f'<td class="bar">{parts}</td>']
        else:
            cells.append(f"<td>{column.cell(line)}</td>")
    return f"<tr{' class=single' if line.is_single else ''}>{''.join(cells)}</tr>"


def _figure(comparison: Comparison) -> str:
    image = io.BytesIO()
    comparison_figure(comparison).savefig(image, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}"


def _columns(comparison: Comparison) -> str:
    told = columns(comparison)
    items = "".join(f"<dt>{escape(column.title)}</dt><dd>{escape(column.says)}</dd>" for column in told)
    return f'<section class="card"><h2>What the columns say</h2><dl>{items}</dl></section>'


def _provenance(rows: Sequence[Row]) -> str:
    facts = {
        "numbers": _several(row.kind for row in rows),
        "device": _several(row.device for row in rows),
        "versions": _several(row.versions for row in rows),
        "commit": _several(row.commit for row in rows),
        "date": " to ".join(dict.fromkeys((min(row.date for row in rows), max(row.date for row in rows)))),
        "rows": f"{len(rows)} in {RESULTS} beside this page; `flashcp report DIRECTORY` makes the page from them",
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<section class="card"><h2>Where the numbers come from</h2><dl>{items}</dl></section>'


def _several(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))
