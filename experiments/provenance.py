"""What every kept number carries: commit and versions."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

RESULTS = "experiments/results"


@cache
def commit() -> str:
    """Short hash of the checkout this runs from, `+changes` when files differ from it; `none` outside one.

    Results do not count: writing them is what a run is for.
    """
    head = _git("rev-parse", "--short=10", "HEAD")
    if not head:
        return "none"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude,top){RESULTS}")
    return f"{head}+changes" if changed else head


def versions_text(versions: Mapping[str, str]) -> str:
    """`flashcp 0.1.0, torch 2.13.0, ...` of a summary's versions."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("device", "date"))


def _git(*arguments: str) -> str:
    """Output of git in this file's checkout; empty where there is no git, or a git that knows nothing of it."""
    here = Path(__file__).resolve().parent
    try:
        if not (here.parent / "pyproject.toml").is_file():
            return ""
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
