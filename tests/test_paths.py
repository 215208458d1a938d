"""Paths that a user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashcp.files import read_path


def test_home_is_expanded_and_what_is_not_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_path("~/x.txt", "out") == tmp_path / "x.txt"
    assert read_path("Übung (1).txt", "out") == Path("Übung (1).txt")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("p" * 5000, r"^out='p+\.\.\.: File name too long$"),
        ("a\0b", r"^out='a\\x00b': .*null"),
        ("~nobody-has-this-name/x", r"^out='~nobody-has-this-name/x': Could not determine home directory"),
    ],
)
def test_what_no_file_can_have_is_one_line(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_path(path, "out")
