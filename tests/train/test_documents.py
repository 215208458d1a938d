"""The stream of documents: epochs, empty documents, and going on from any position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from flashcp.train.data.documents import Position, read_documents


class Parts:
    """A source in memory."""

    def __init__(self, *parts: list[str]) -> None:
        self.texts = parts
        self.parts = [f"part {number}" for number in range(len(parts))]

    def read(self, part: int, skip: int) -> Iterator[str]:
        yield from self.texts[part][skip:]


SOURCE = Parts(["a", "", "b"], [], ["c"])


def test_epochs_repeat_the_documents_that_are_not_empty() -> None:
    assert [document.text for document in read_documents(SOURCE, epochs=2)] == list("abcabc")
    endless = read_documents(SOURCE)
    assert [document.text for document in itertools.islice(endless, 100)] == list("abc" * 34)[:100]


def test_reading_goes_on_after_any_document() -> None:
    documents = list(read_documents(SOURCE, epochs=2))
    for number, document in enumerate(documents):
        again = list(read_documents(SOURCE, epochs=2, start=document.after))
        assert again == documents[number + 1 :]
        same = list(read_documents(SOURCE, epochs=2, start=document.position))
        assert same == documents[number:]


def test_positions_are_the_records_places() -> None:
    places = [document.position for document in read_documents(SOURCE, epochs=1)]
    assert places == [Position(0, 0, 0), Position(0, 0, 2), Position(0, 2, 0)]


def test_a_source_without_documents_is_an_error_and_not_an_endless_loop() -> None:
    with pytest.raises(ValueError, match=r"part 0: no document that is not empty in 2 part"):
        next(read_documents(Parts(["", ""], [])))
