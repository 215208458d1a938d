"""What holds for every file of the checkout: its length, and that it names no path of one machine."""

from __future__ import annotations

import re

import pytest

from tests.checkout import ROOT, checkout_files, python_files

LONGEST = 500
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:farm|home|root|Users|work)/\w")


def test_no_file_is_too_long() -> None:
    lengths = {name: (ROOT / name).read_text().count("\n") for name in python_files()}
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for name in checkout_files():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{name}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert not found


@pytest.mark.parametrize("before", ["", "'", "path=", "file://"])
@pytest.mark.parametrize("folder", ["home", "root", "Users"])
def test_a_path_of_one_machine_is_seen(before: str, folder: str) -> None:
    assert MACHINE_PATH.search(f"{before}/{folder}/jo")


@pytest.mark.parametrize("text", ["a/home/jo", "./work/x", "/usr/lib", "train/root/x"])
def test_other_paths_are_let_by(text: str) -> None:
    assert not MACHINE_PATH.search(text)
