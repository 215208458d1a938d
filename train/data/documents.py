"""The documents of a source as one stream that can be taken up again at any record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from flashcp.train.data.sources import Source


@dataclass(frozen=True)
class Position:
    """Where reading goes on: the next document's epoch, part and record, and the token of it to begin at.

    Four whole numbers are the loader's whole state: a resumed run opens the part, skips the records before
    (unparsed where the format allows) and tokenises nothing twice but a document carried between windows.
    """

    epoch: int = 0
    part: int = 0
    record: int = 0
    token: int = 0


class Document(NamedTuple):
    """A text, where it is, and where the next one is. skipped: bad records since the document before."""

    text: str
    position: Position
    after: Position
    skipped: int = 0


def read_documents(
    source: Source, epochs: int = 0, start: Position | None = None, on_bad_record: str = "stop"
) -> Iterator[Document]:
    """Every document that is not empty, in the source's order, `epochs` times over (0: without end).

    on_bad_record: `stop` raises the source's ValueError; `skip` passes over the record and counts it.
    Raises ValueError when a whole epoch has no document.
    """
    skipped = 0
    place = start or Position()
    while not epochs or place.epoch < epochs:
        found = place.part > 0 or place.record > 0
        while place.part < len(source.parts):
            bad: list[ValueError] = []
            more = (bad.append,) if on_bad_record == "skip" else ()
            for text in source.read(place.part, place.record, *more):
                here = replace(place, record=place.record + len(bad), token=0)
                place, skipped = replace(here, record=here.record + 1), skipped + len(bad)
                bad.clear()
                if text:
                    found = True
                    yield Document(text, here, place, skipped)
                    skipped = 0
            skipped += len(bad)
            place = Position(place.epoch, place.part + 1)
        if not found:
            raise ValueError(f"{source.parts[0]}: no document that is not empty in {len(source.parts)} part(s)")
        place = Position(place.epoch + 1)
