"""The checkout as git sees it: its root, and every file that is tracked or would be."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def checkout_files() -> tuple[str, ...]:
    """Paths relative to ROOT, ignored files left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return tuple(sorted({name for name in names if name and (ROOT / name).is_file()}))


def python_files() -> list[str]:
    return [name for name in checkout_files() if name.endswith(".py")]
