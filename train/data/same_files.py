"""Whether all ranks are about to read the same files: found before a step, and named by file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from flashcp.comm.header import named, ranks_by
from flashcp.train.data.files_read import size_of
from flashcp.train.ranks import Ranks


def check_same_files(parts: Sequence[str], ranks: Ranks) -> None:
    """Raise ValueError on every rank, naming the first file that some ranks have not, or have in another size.

    parts: of this rank's source, in their order. Names count below the folder that all are in: nodes may have it at
    different places. Every rank must call it.
    """
    folder = os.path.commonpath([os.path.dirname(part) for part in parts])
    sizes = {os.path.relpath(part, folder or "."): size_of(part) for part in parts}
    digest = hashlib.sha256(repr(list(sizes.items())).encode()).hexdigest()
    if len(set(ranks.gather(digest))) == 1:
        return
    every = ranks.gather(sizes)
    for name in sorted(set().union(*every)):
        found = [_said(one[name]) if name in one else "no such file" for one in every]
        if len(set(found)) > 1:
            said = "; ".join(f"{value} on {named(some)}" for value, some in ranks_by(found))
            raise ValueError(f"{name}: {said}; expected the same files in data.path on every node")


def _said(size: int | None) -> str:
    return "no file" if size is None else f"{size} bytes"
