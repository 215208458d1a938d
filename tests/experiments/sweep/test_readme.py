"""README's first table is what the committed rows of the lab say, that of docs/training.md what the demo's say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashcp.experiments.lab.page import lines
from flashcp.experiments.sweep.compare import compare, is_told_apart, speedup_text
from flashcp.experiments.sweep.results import read_rows
from tests.checkout import ROOT

README, TRAINING = ROOT / "README.md", ROOT / "docs/training.md"
LAB, DEMO = ROOT / "experiments/results/lab/4x2_pile", ROOT / "experiments/results/demo"
BLOCK = re.compile(r"(?<=-->\n).*?(?=<!-- /(?:lab|demo) -->)", re.DOTALL)


def lab_block() -> str:
    """The lab's table, its scale in one sentence, and where its numbers come from."""
    rows = read_rows(LAB)
    made = [
        "| method | attention, ms | speedup over `llama3` | predicted before | MB between nodes |",
        "|---|--:|--:|--:|--:|",
    ]
    for line in lines(rows):
        made.append(f"| `{line.method}` | {line.ms:.0f} | {line.text} | {line.predicted:.2f} | {line.link_mb:.0f} |")
    one = rows[0]
    told = f"{one.kind[0].upper()}{one.kind[1:]}. {one.device}, {one.versions}, commit {one.commit}, {one.date[:10]}."
    return "\n".join([*made, "", told, ""])


def demo_block() -> str:
    """The table of the slowed case, and where its numbers come from."""
    rows = read_rows(DEMO)
    comparison = compare(rows, "llama3")
    ((case, how),) = comparison.emulated.items()
    lines = ["| method | imbalance | rows saved | ms a step | speedup over `llama3` |", "|---|--:|--:|--:|--:|"]
    for line in comparison.runs:
        if line.case == case:
            numbers = f"{line.imbalance:.2f} | {line.saving:.2f} | {line.step_ms:.0f} | {speedup_text(line)}"
            lines.append(f"| `{line.provider}` | {numbers} |")
    one = next(row for row in rows if row.case == case)
    told = f"Emulated: {how}. {one.device}, {one.versions}, commit {one.commit}, {one.date[:10]}."
    return "\n".join([*lines, "", told, ""])


BLOCKS = {README: ("lab", lab_block), TRAINING: ("demo", demo_block)}


def rewrite() -> None:
    """Bring both pages up to date with the rows."""
    for page, (_, block) in BLOCKS.items():
        page.write_text(BLOCK.sub(lambda _, block=block: block(), page.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize("page", BLOCKS, ids=lambda page: page.name)
def test_a_table_is_what_its_rows_say(page: Path) -> None:
    """When rows change: python -c "from tests.experiments.sweep.test_readme import rewrite; rewrite()"."""
    (name, block), text = BLOCKS[page], page.read_text(encoding="utf-8")
    assert [found[0] for found in BLOCK.finditer(text)] == [block()]
    if page == README:  # what a newcomer sees first
        assert text.index(f"<!-- {name} -->") < text.index("\n|")


def test_the_committed_demo_shows_both_links_and_its_point() -> None:
    comparison = compare(read_rows(DEMO), "llama3")
    assert comparison.kinds == ["measured", "emulated"]
    (slowed,) = comparison.emulated
    ours = next(line for line in comparison.runs if (line.case, line.provider) == (slowed, "flashcp"))
    assert is_told_apart(ours)
    assert ours.speedup > 1
    assert all(line.speedup_p20 is not None for line in comparison.runs)  # all took turns with the baseline
