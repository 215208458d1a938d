"""The checkout as git sees it: its root, and every file that is tracked or would be."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def _names() -> tuple[str, ...]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return tuple(sorted({name for name in names if name}))


def checkout_files() -> list[str]:
    """Paths relative to ROOT, each file once: ignored files and links are left out."""
    return [name for name in _names() if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def checkout_links() -> list[str]:
    """Paths of symbolic links relative to ROOT."""
    return [name for name in _names() if (ROOT / name).is_symlink()]


def python_files() -> list[str]:
    return [name for name in checkout_files() if name.endswith(".py")]
