"""Documents to packs: tokens, labels and the lengths of the documents in one window, before any sharding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashcp.sharding.packing import pack_lengths
from flashcp.train.data.documents import Document, Position
from flashcp.train.data.tokenizer import Tokenizer

NO_LABEL = -100
"""Label of a token that predicts nothing (torch's ignore_index)."""
LONGEST_CONTEXT = 2**31 - 1
"""Tokens of the longest window: kernels count rows in 32 bits."""


@dataclass(frozen=True)
class TokenWindow:
    """One pack of `context` tokens; every document in it is one contiguous piece.

    tokens, labels: int64 [context]. The label of a token is the token after it in the same piece; a piece's
    last token has none, also where a document was cut at the window's end.
    document_lengths: int64 [documents]. position: where reading goes on after this window.
    dropped, carried: tokens of the last document left out, tokens that continue an earlier window's document.
    skipped: bad records passed over on the way to the last document.
    """

    tokens: np.ndarray
    labels: np.ndarray
    document_lengths: np.ndarray
    position: Position
    dropped: int
    carried: int
    skipped: int = 0

    @property
    def labelled(self) -> int:
        """Tokens that have a label."""
        return int((self.labels != NO_LABEL).sum())


def labels_of(tokens: np.ndarray, document_lengths: np.ndarray) -> np.ndarray:
    """Each token's next one in the same piece, NO_LABEL for a piece's last."""
    labels = np.roll(tokens, -1)
    labels[np.cumsum(document_lengths) - 1] = NO_LABEL
    return labels


def join_windows(windows: Sequence[TokenWindow]) -> TokenWindow:
    """Consecutive windows behind each other as one: documents stay cut where the windows end."""
    tokens, labels, lengths = (
        np.concatenate([getattr(window, name) for window in windows])
        for name in ("tokens", "labels", "document_lengths")
    )
    counts = (sum(getattr(window, name) for window in windows) for name in ("dropped", "carried", "skipped"))
    return TokenWindow(tokens, labels, lengths, windows[-1].position, *counts)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, longest: int = 0
) -> Iterator[tuple[np.ndarray, Document]]:
    """Each document with its tokens, int64; those without tokens are left out, and those with more than `longest`.

    longest: 0 keeps all. Raises ValueError when a whole reading of the documents leaves none.
    """
    kept, first_epoch, skipped = False, None, 0
    for document in documents:
        first_epoch = document.position.epoch if first_epoch is None else first_epoch
        if not kept and document.position.epoch > first_epoch + 1:  # the first reading may have begun midway
            raise ValueError(f"data.longest={longest}: no document has between 1 and {longest} tokens")
        tokens = tokenizer.encode(document.text)
        skipped += document.skipped
        if len(tokens) and (not longest or len(tokens) <= longest):
            kept = True
            yield tokens, document._replace(skipped=skipped)
            skipped = 0


def pack_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    context: int,
    overflow: str,
    start: Position | None = None,
    longest: int = 0,
) -> Iterator[TokenWindow]:
    """Full windows; the last one, when the documents end before it is full, is left out.

    start: the position of the first document; its `token` says where inside it to begin (`overflow="carry"`).
    longest: see encode_documents.
    """
    held: dict[int, tuple[np.ndarray, Document]] = {}
    skipped = 0

    def lengths() -> Iterator[int]:
        for number, encoded in enumerate(encode_documents(documents, tokenizer, longest)):
            nonlocal skipped
            held[number], skipped = encoded, skipped + encoded[1].skipped
            yield len(encoded[0])

    first_start = start.token if start else 0
    for window in pack_lengths(lengths(), context, overflow, first_start=first_start, keep_last=False):
        pieces = list(zip(window.document.tolist(), window.start.tolist(), window.stop.tolist(), strict=True))
        tokens = np.concatenate([held[document][0][begin:end] for document, begin, end in pieces])
        last, _, end = pieces[-1]
        last_tokens, document = held[last]
        if overflow == "carry" and end < len(last_tokens):
            position = replace(document.position, token=end)
            held = {last: held[last]}
        else:
            position = document.after
            held = {}
        labels = labels_of(tokens, window.document_lengths)
        yield TokenWindow(tokens, labels, window.document_lengths, position, window.dropped, window.carried, skipped)
        skipped = 0
