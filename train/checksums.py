"""What a checkpoint's files hold: sizes and SHA-256 digests, and the identity.json that keeps them.

A digest tells damage from what was written. It does not tell who wrote it: `train/unpickle.py` is for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashcp.files import check_regular, read_bounded
from flashcp.train.ranks import Ranks

IDENTITY = "identity.json"
IDENTITY_MIB = 64
Checksum = list[Any]  # [bytes, hexadecimal digest], as JSON has it


def checksum(file: Path) -> Checksum:
    """Size and digest of a file. Raises ValueError for what is no regular file, OSError as reading does."""
    check_regular(file, str(file))
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        return [content.tell(), digest]


def damage(folder: Path, files: Mapping[str, Checksum], ranks: Ranks) -> str:
    """What is wrong with the first file that is not as it was; empty when all are. The ranks share out the reading and
    hear the same; every rank must call it.

    files: their checksums by name. folder: that relative names are below.
    """
    said = {}
    for name in list(files)[ranks.rank :: ranks.world_size]:
        try:
            said[name] = _difference(folder / name, name, files[name])
        except OSError as error:
            said[name] = f"{name}: cannot be read ({error.strerror})"
        except ValueError as error:
            said[name] = str(error)
    heard = {name: wrong for each in ranks.gather(said) for name, wrong in each.items() if wrong}
    return next((heard[name] for name in files if name in heard), "")


def _difference(file: Path, name: str, written: Checksum) -> str:
    check_regular(file, name)
    size, digest = written
    found = file.stat().st_size
    if found != size:
        return f"{name}: {found} bytes, expected {size}"
    return "" if checksum(file)[1] == digest else f"{name}: other content (another SHA-256)"


def write_identity(folder: Path, content: Mapping[str, Any]) -> None:
    """Write identity.json, with a checksum of its own."""
    whole = {**content, "checksum": _digest(content)}
    (folder / IDENTITY).write_text(json.dumps(whole, indent=1), encoding="utf-8")


def read_identity(folder: Path) -> dict[str, Any]:
    """What identity.json holds. Raises ValueError when it cannot be read or is damaged."""
    content = parse_json(read_bounded(folder / IDENTITY, IDENTITY, IDENTITY_MIB))
    if content.pop("checksum", None) != _digest(content):
        raise ValueError("its checksum differs")
    return content


def parse_json(text: bytes) -> Any:
    """Raises ValueError for what is no JSON, too deep for Python among it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("not JSON (too deep)") from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
