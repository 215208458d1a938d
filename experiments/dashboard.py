"""The page of a sweep: one HTML file that needs no network, no server and no other file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from flashcp.experiments.comparison import LOSS_TOLERANCE, Comparison, Line
from flashcp.experiments.figure import PARTS, comparison_figure, step_parts
from flashcp.experiments.rows import REFERENCE, RESULTS, Row
from flashcp.experiments.style import PAGE_STYLE

__all__ = ["write_dashboard"]

COLUMNS = {
    "method": "sharding strategy and exchange, by the name they were published under",
    "imbalance": "work of the busiest rank / mean work, mean over windows; 1 is balanced",
    "saving": "1 - KV rows on the critical rank / the all-gather's",
    "attention ms": "attention kernels of one step, forward and backward, slowest rank",
    "exchange ms": "packing, sending and waiting for rows that no attention hides, slowest rank",
    "step ms": "whole optimizer step: median over steps after warm-up, with p20 - p80 below",
    "speedup": "step of the baseline / this step",
    "final loss": "nats a token at the last step",
    "loss difference": f"largest relative difference at any step from one process on the same packs; "
    f"{LOSS_TOLERANCE:.0e} is the limit in fp32",
}


def write_dashboard(
    path: Path, title: str, comparison: Comparison, rows: Sequence[Row], failures: dict[tuple[str, str], str]
) -> None:
    """Write the page whole or not at all."""
    sections = [
        _tiles(comparison),
        _failures(failures),
        *(_case(comparison, case, rows) for case in comparison.cases),
        f'<section class="card"><img alt="step times and losses" src="{_figure(comparison)}"></section>',
        _columns(),
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
    providers = dict.fromkeys(line.provider for line in comparison.lines if line.provider != REFERENCE)
    steps = max((len(line.losses) for line in comparison.lines), default=0)
    kinds, devices = (_several(getattr(row, name) for row in rows) for name in ("kind", "device"))
    return f"{len(providers)} methods, {steps} training steps each, {kinds} on {devices}"


def _tiles(comparison: Comparison) -> str:
    tiles = []
    if means := comparison.mean_speedups():
        best = max(means, key=lambda provider: means[provider])
        what = f"{best}, fastest step over {comparison.baseline}"
        if best == comparison.baseline:
            what = f"no step faster than {comparison.baseline}'s"
        tiles.append((f"{means[best]:.2f}x", what))
    lines = [line for line in comparison.lines if line.provider != REFERENCE]
    if balanced := [line for line in lines if line.imbalance is not None and line.provider == comparison.baseline]:
        tiles.append((f"{balanced[0].imbalance:.2f}", f"imbalance of {comparison.baseline}; 1 is balanced"))
    if saving := max(lines, key=lambda line: line.saving or 0.0, default=None):
        tiles.append((f"{100 * (saving.saving or 0):.0f}%", f"fewer KV rows than an all-gather: {saving.provider}"))
    if worst := comparison.worst_difference:
        agree = (worst.loss_difference or 0.0) <= LOSS_TOLERANCE
        tiles.append(
            (f"{worst.loss_difference:.0e}", f"largest difference of a loss: {'agree' if agree else 'do not agree'}")
        )
    return '<div class="tiles">{}</div>'.format(
        "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles)
    )


def _failures(failures: dict[tuple[str, str], str]) -> str:
    if not failures:
        return ""
    items = (f"<li><b>{escape(f'{case} {name}')}</b> {escape(why)}</li>" for (case, name), why in failures.items())
    return f'<section class="card failed"><h2>Failed</h2><ul>{"".join(items)}</ul></section>'


def _case(comparison: Comparison, case: str, rows: Sequence[Row]) -> str:
    lines = [line for line in comparison.lines if line.case == case]
    longest = max((line.step_ms or 0.0 for line in lines if line.provider != REFERENCE), default=0.0) or 1.0
    spread = {(row.case, row.provider): (row.p20, row.p80) for row in rows if row.metric == "step_ms"}
    heads = [*list(COLUMNS)[:6], "", f"speedup over {comparison.baseline}", *list(COLUMNS)[7:]]
    body = "".join(_row(line, longest, spread.get((line.case, line.provider))) for line in lines)
    legend = "".join(f'<i style="background:{colour}"></i>{part} ' for part, colour in PARTS.items())
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f'<section class="card"><h2>{escape(case)}<span class="legend">{legend}</span></h2>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _row(line: Line, longest: float, spread: tuple[float | None, float | None] | None) -> str:
    single = line.provider == REFERENCE

    def number(value: float | None, form: str, shown: bool = True) -> str:
        return f"<td>{format(value, form) if value is not None and shown else ''}</td>"

    between = f"<small>{spread[0]:.0f} - {spread[1]:.0f}</small>" if spread and None not in spread else ""
    parts = (
        ""
        if single
        else "".join(
            f'<i style="width:{100 * ms / longest:.2f}%;background:{PARTS[part]}" title="{part} {ms:.1f} ms"></i>'
            for part, ms in step_parts(line).items()
        )
    )
    cells = [
        f"<th>{escape(line.provider)}</th>",
        number(line.imbalance, ".3f", not single),
        number(line.saving, ".3f", not single),
        number(line.attention_ms, ".0f"),
        number(line.exposed_exchange_ms, ".1f"),
        f"<td>{line.step_ms:.0f}{between}</td>" if line.step_ms is not None else "<td></td>",
        f'<td class="bar">{parts}</td>',
        number(line.speedup, ".3f"),
        number(line.final_loss, ".4f"),
        number(line.loss_difference, ".0e"),
    ]
    return f"<tr{' class=single' if single else ''}>{''.join(cells)}</tr>"


def _figure(comparison: Comparison) -> str:
    image = io.BytesIO()
    comparison_figure(comparison).savefig(image, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}"


def _columns() -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in COLUMNS.items())
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
