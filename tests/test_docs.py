"""The pages: the site builds, no link leads nowhere, every command that they show composes, every example computes."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.main import VERBS
from flashcp.experiments.cli.schema import committed
from tests.checkout import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# a folder of one's own, and sweeps that no training verb composes
OTHERS = {"--config-dir", "experiment=lab", *(f"experiment={name}" for name in committed("simulation"))}
ROOMS = "comm|conf|docs|examples|flashcp|kernels|sharding|simulator|tests|train|experiments"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(page: Path) -> list[list[str]]:
    """Command lines of a page's shell blocks, as words, without their comments."""
    blocks = [block for kind, block in BLOCK.findall(page.read_text()) if kind in ("", "bash", "sh", "console")]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(flashcp|make) ", line)]


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert built.stderr == ""
    assert built.returncode == 0
    api = (tmp_path / "docs/api.html").read_text()
    assert "Attention inside each document, under the plan’s masks, over all ranks, differentiable." in api


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_on_a_page_is_one(page: Path) -> None:
    for program, *words in commands(page):
        if program == "make":
            assert {word for word in words if re.fullmatch(r"[a-z-]+", word)} <= TARGETS, words
            continue
        verb, *rest = words
        assert verb in VERBS, words
        overrides = [word for word in rest if "=" in word and not word.startswith(("-", "hydra"))]
        if verb == "bench":
            compose(f"bench/{rest[0]}", overrides)
        elif verb in ("plan", "simulate", "sweep", "train") and not OTHERS & {*rest}:
            one_value = [re.sub(r"(=[^\[{,]*),.*", r"\1", word) for word in overrides]
            compose("train" if verb == "sweep" else verb, one_value)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_examples_of_a_page_compute(page: Path) -> None:
    examples = "\n".join(
        block for kind, block in BLOCK.findall(page.read_text()) if kind == "python" and ">>> " in block
    )
    test = doctest.DocTestParser().get_doctest(examples, {}, page.name, str(page), 0)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_pages_have_commands_and_examples() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30
    assert sum(">>> " in page.read_text() for page in PAGES) >= 2


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_their_names_are_where_a_page_says(page: Path) -> None:
    text = page.read_text()
    named = {one for one in re.findall(rf"`((?:{ROOMS})/[\w./-]+)`", text) if "NAME" not in one}
    missing = sorted(one for one in named if not (ROOT / one).exists())
    assert page.name == "CHANGELOG.md" or not missing
    for file, words in re.findall(r"`([\w/]+\.py)`(?: or `[\w/]+\.py`)? \((`[\w.]+`(?:, `[\w.]+`)*)\)", text):
        source = (ROOT / file).read_text()
        for name in re.split(r"[.,` ]+", words.strip("`")):
            assert re.search(rf"^\s*(?:def |class )?{name}\b", source, re.MULTILINE), f"{file} has no {name}"
