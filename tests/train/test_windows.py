"""Documents to packs: labels, cuts, counts, and going on after any window."""

from __future__ import annotations

import numpy as np
import pytest

from flashcp.sharding.packing import OVERFLOWS
from flashcp.train.data.documents import Position, read_documents
from flashcp.train.data.tokenizer import BytesTokenizer
from flashcp.train.data.windows import NO_LABEL, TokenWindow, encode_documents, pack_documents
from tests.train.test_documents import Parts

END = BytesTokenizer.END


def windows(source: Parts, context: int, overflow: str, start: Position | None = None) -> list[TokenWindow]:
    documents = read_documents(source, 2, start)
    return list(pack_documents(documents, BytesTokenizer(), context, overflow, start))


def test_labels_are_the_next_token_of_the_same_document() -> None:
    (window, *_) = windows(Parts(["abc", "de", "fghi"]), 10, "truncate")
    a, b, c, d, e, f, g, h = b"abcdefgh"
    assert window.tokens.tolist() == [a, b, c, END, d, e, END, f, g, h]
    none = NO_LABEL
    # the last of each document has no label: not the next document's first token, nor, at the cut, the i
    assert window.labels.tolist() == [b, c, END, none, e, END, none, g, h, none]
    assert window.document_lengths.tolist() == [4, 3, 3]
    assert (window.labelled, window.dropped, window.carried) == (7, 2, 0)


def test_a_carried_document_is_unlabelled_at_the_cut_and_goes_on() -> None:
    first, second, *_ = windows(Parts(["abcdefgh"]), 6, "carry")
    a, b, c, d, e, f, g, h = b"abcdefgh"
    assert first.tokens.tolist() == [a, b, c, d, e, f]
    assert first.labels.tolist() == [b, c, d, e, f, NO_LABEL]
    assert second.tokens.tolist() == [g, h, END, a, b, c]
    assert second.labels.tolist() == [h, END, NO_LABEL, b, c, NO_LABEL]
    assert (first.carried, first.dropped) == (0, 0)
    assert (second.carried, second.dropped) == (3, 0)


def test_counts_account_for_every_token() -> None:
    source = Parts(["x" * length for length in (1, 30, 7, 64, 2, 19)])
    total = 2 * sum(len(text) + 1 for text in source.texts[0])
    truncated = windows(source, 16, "truncate")
    carried = windows(source, 16, "carry")
    assert len(carried) == total // 16
    assert sum(window.carried for window in carried) > 0
    held = sum(len(window.tokens) for window in truncated)
    lost = total - held - sum(window.dropped for window in truncated)
    assert 0 <= lost < 16  # only the last window, not full, is left out


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_reading_goes_on_after_any_window(overflow: str) -> None:
    source = Parts(["x" * 50, "", "yz"], ["a" * 7, "b" * 23, "c" * 14])
    whole = windows(source, 16, overflow)
    for number, window in enumerate(whole):
        again = windows(source, 16, overflow, start=window.position)
        rest = whole[number + 1 :]
        assert len(again) == len(rest)
        for here, there in zip(again, rest, strict=True):
            np.testing.assert_array_equal(here.tokens, there.tokens)
            np.testing.assert_array_equal(here.labels, there.labels)
            np.testing.assert_array_equal(here.document_lengths, there.document_lengths)
            assert (here.position, here.dropped, here.carried) == (
                there.position,
                there.dropped,
                there.carried,
            )


def test_resuming_tokenises_nothing_twice_but_the_document_carried() -> None:
    source = Parts(["x" * 5, "y" * 40, "z" * 9])
    seen: list[str] = []

    class Counting(BytesTokenizer):
        def encode(self, text: str) -> np.ndarray:
            seen.append(text[0])
            return super().encode(text)

    first = next(pack_documents(read_documents(source, 1), Counting(), 16, "carry"))
    assert seen == ["x", "y"]
    seen.clear()
    list(pack_documents(read_documents(source, 1, first.position), Counting(), 16, "carry", first.position))
    assert seen == ["y", "z"]


def test_documents_longer_than_asked_for_are_left_out() -> None:
    source = Parts(["abcdefgh", "ab", "cde", "abcdefghi", "f"])
    kept = encode_documents(read_documents(source, 1), BytesTokenizer(), longest=4)  # with the end mark
    assert [document.text for _, document in kept] == ["ab", "cde", "f"]
    everything = encode_documents(read_documents(source, 1), BytesTokenizer())
    assert len(list(everything)) == 5
    with pytest.raises(ValueError, match=r"data\.longest=1: no document has between 1 and 1"):
        list(encode_documents(read_documents(source, 0), BytesTokenizer(), longest=1))
