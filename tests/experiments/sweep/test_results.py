"""What every kept number carries."""

from __future__ import annotations

import subprocess

import pytest

from flashcp.experiments.sweep.results import commit
from tests.checkout import ROOT


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout of git")
def test_the_commit_is_that_of_the_checkout() -> None:
    head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert commit().removesuffix("+changes") == head.stdout.strip()
