"""Which files a run reads, and what those held that it has read: a resumed run goes on with the same documents."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from flashcp.train.checksums import Checksum, checksum, damage
from flashcp.train.data.documents import Position
from flashcp.train.data.sources import Source
from flashcp.train.ranks import Ranks

ON_CHANGED_DATA = ("stop", "go_on")
Written = Sequence[tuple[str, int | None, str | None]]  # name, bytes, digest of a part; None: no file, or not read yet


class FilesRead:
    """A source's parts in their order. A checkpoint keeps their names, sizes and, of those read so far, digests."""

    def __init__(self, source: Source) -> None:
        self._source, self._parts = source, list(source.parts)
        self._known: dict[str, Checksum] = {}

    def written(self, position: Position, ranks: Ranks) -> Written:
        """What a checkpoint keeps when reading has come to `position`. Files are read again once, shared out over the
        ranks; every rank must call it.

        Raises ValueError on every rank, naming the file, where a digest would be of other bytes than a run has read.
        """
        read = list(enumerate(self._parts))[: None if position.epoch else position.part + 1]
        new = [(part, name) for part, name in read if name not in self._known and Path(name).is_file()]
        mine: dict[str, Checksum] = {}
        changed = ""
        for part, name in new[ranks.rank :: ranks.world_size]:
            with suppress(OSError, ValueError):  # gone since it was read: a resumed run will say so
                mine[name] = checksum(Path(name))
            changed = changed or self._source.changed(part)  # now: what was digested is what it was compared with
        said = ranks.gather((mine, changed))
        if changes := [change for _, change in said if change]:
            raise ValueError(changes[0])
        for found, _ in said:
            self._known.update(found)
        unread = {name: [size_of(name), None] for name in self._parts if name not in self._known}
        return [(name, *(self._known.get(name) or unread[name])) for name in self._parts]

    def go_on(self, written: Written, position: Position, on_change: str, ranks: Ranks) -> Position:
        """Where a resumed run goes on reading. Every rank must call it.

        Raises ValueError on every rank, naming the file, where files were added, removed or changed and `on_change` is
        stop; where it is go_on, if the file that was being read is among them.
        """
        digests = {name: [size, digest] for name, size, digest in written if digest is not None}
        for part in (part for part, name in enumerate(self._parts) if name in digests):
            self._source.changed(part)  # from before they are digested on, no file may change
        changes = [change for change in ranks.gather(self._change(written)) if change]  # a node may have other files
        change = changes[0] if changes else damage(Path(), digests, ranks)
        if not change:
            self._known.update(digests)
            return position
        if on_change == "stop":
            raise ValueError(f"the documents changed: {change}; checkpoint.on_changed_data=go_on goes on all the same")
        name = written[position.part][0] if position.part < len(written) else "the last file"
        being_read = {name: digests[name]} if name in digests else {}
        lost = f"{name}: gone" if name not in self._parts else damage(Path(), being_read, ranks)
        if lost:
            raise ValueError(f"{lost}: it was being read, so reading cannot go on there")
        if ranks.rank == 0:
            print(f"the documents changed since the checkpoint ({change}); reading goes on in {name}", file=sys.stderr)
        return replace(position, part=self._parts.index(name))

    def _change(self, written: Written) -> str:
        names = [name for name, _, _ in written]
        before, here = set(names), set(self._parts)
        if added := [name for name in self._parts if name not in before]:
            return f"{added[0]}: a new file"
        if gone := [name for name in names if name not in here]:
            return f"{gone[0]}: gone"
        if names != self._parts:
            return (
                f"{next(a for a, b in zip(self._parts, names, strict=True) if a != b)}: at another place in the order"
            )
        resized = [name for name, size, digest in written if digest is None and size != size_of(name)]
        return f"{resized[0]}: of another size" if resized else ""


def size_of(name: str) -> int | None:
    """Bytes of a file; None for what is none."""
    return Path(name).stat().st_size if Path(name).is_file() else None
