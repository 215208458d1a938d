"""README's first table is what the committed rows of the demo say."""

from __future__ import annotations

import re

from flashcp.experiments.sweep.compare import compare, is_told_apart, speedup_text
from flashcp.experiments.sweep.results import read_rows
from tests.checkout import ROOT

README, DEMO = ROOT / "README.md", ROOT / "experiments/results/demo"
BLOCK = re.compile(r"(?<=<!-- demo -->\n).*?(?=<!-- /demo -->)", re.DOTALL)


def block() -> str:
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


def rewrite() -> None:
    """Bring README up to date with the rows."""
    README.write_text(BLOCK.sub(lambda _: block(), README.read_text(encoding="utf-8")), encoding="utf-8")


def test_the_first_table_is_the_demos() -> None:
    """When the demo's rows change: python -c "from tests.experiments.sweep.test_readme import rewrite; rewrite()"."""
    text = README.read_text(encoding="utf-8")
    assert BLOCK.findall(text) == [block()]
    assert text.index("<!-- demo -->") < text.index("\n|")


def test_the_committed_demo_shows_both_links_and_its_point() -> None:
    comparison = compare(read_rows(DEMO), "llama3")
    assert comparison.kinds == ["measured", "emulated"]
    (slowed,) = comparison.emulated
    ours = next(line for line in comparison.runs if (line.case, line.provider) == (slowed, "flashcp"))
    assert is_told_apart(ours)
    assert ours.speedup > 1
    assert all(line.speedup_p20 is not None for line in comparison.runs)  # all took turns with the baseline
