"""Packs to plan for, from any data set: sampled lengths, lengths in a file or a list, documents of text."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashcp.experiments.cli.schema import LengthsData, SampledData
from flashcp.schema import read_dataclass
from flashcp.sharding.lengths import LENGTH_DATA, length_stream
from flashcp.sharding.packing import OVERFLOWS, Window, pack_lengths
from flashcp.train.data.documents import read_documents
from flashcp.train.data.sources import SOURCES, DataConfig, open_source
from flashcp.train.data.tokenizer import load_tokenizer
from flashcp.train.data.windows import LONGEST_CONTEXT, encode_documents

__all__ = ["read_packs"]

LEGAL = (*SOURCES, "lengths", *LENGTH_DATA)

DIGITS = 18
"""Of a length that int64 holds."""


def read_packs(data: Mapping[str, Any], context: int, count: int, seed: int) -> list[np.ndarray]:
    """Document lengths of the first `count` windows of `context` tokens, int64 [documents] each.

    data: the `data` section of a configuration. The last window may hold fewer tokens, where documents end. Says on
    standard error what of a file of lengths the windows leave out.
    Raises ValueError, naming value, field and legal values, for data that cannot be read or packed.
    """
    if not 1 <= context <= LONGEST_CONTEXT:
        raise ValueError(f"context={context}: expected a whole number of tokens >= 1 and <= {LONGEST_CONTEXT}")
    if count < 1:
        raise ValueError(f"windows={count}: expected a whole number >= 1")
    source = data.get("source")
    if source in LENGTH_DATA:
        sampled = read_dataclass(SampledData, data, "data")
        overflow, lengths = sampled.overflow, _sampled(sampled, seed)
    elif source == "lengths":
        listed = read_dataclass(LengthsData, data, "data")
        given = _listed(listed)
        overflow, lengths = listed.overflow, iter(given)
    elif source in SOURCES:
        text = read_dataclass(DataConfig, data, "data")
        text.check()
        overflow, lengths = text.overflow, _tokenised(text)
    else:
        raise ValueError(f"data.source={source!r}: expected one of {', '.join(LEGAL)}")
    if overflow not in OVERFLOWS:
        raise ValueError(f"data.overflow={overflow!r}: expected one of {', '.join(OVERFLOWS)}")
    packs = list(itertools.islice(pack_lengths(lengths, context, overflow), count))
    if not packs:
        raise ValueError(f"data.source={source!r}: no document to pack with these settings of data")
    if source == "lengths":
        _say_left_out(len(given), packs)
    return [window.document_lengths for window in packs]


def _say_left_out(given: int, packs: Sequence[Window]) -> None:
    used = int(packs[-1].document[-1]) + 1
    dropped, kept = (sum(int(count) for count in counts) for counts in zip(*map(_tokens, packs), strict=True))
    said = [f"{given - used} of {given} lengths come after the last window"] if used < given else []
    said += [f"{dropped / (dropped + kept):.1%} of the tokens are cut off at ends of windows"] if dropped else []
    if said:
        print(f"left out: {'; '.join(said)}", file=sys.stderr)


def _tokens(window: Window) -> tuple[int, int]:
    return window.dropped, int(window.document_lengths.sum())


def _sampled(data: SampledData, seed: int) -> Iterator[int]:
    if seed < 0:
        raise ValueError(f"seed={seed}: expected a whole number >= 0")
    try:
        return length_stream(data.source, seed, long_document_weight=data.long_document_weight, sigma=data.sigma)
    except ValueError as error:
        raise ValueError(f"data.{error}") from error


def _listed(data: LengthsData) -> list[int]:
    """Every length, checked before any window is made."""
    if bool(data.path) == bool(data.lengths):
        raise ValueError(
            "data=lengths: expected either data.path=FILE, one length a line, or data.lengths=[70000,40000,21072]"
        )
    if data.lengths:
        for length in data.lengths:
            if not 1 <= length < 10**DIGITS:
                raise ValueError(f"data.lengths holds {length}: expected whole numbers >= 1 of at most {DIGITS} digits")
        return data.lengths
    try:
        lines = Path(data.path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"data.path={data.path!r}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path={data.path!r}: not UTF-8 text; expected one length a line") from error
    lengths = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line:
            if not line.isascii() or not line.isdigit() or len(line) > DIGITS or int(line) < 1:
                raise ValueError(
                    f"{data.path}:{number}: {line[:40]!r}: expected one whole number >= 1 of at most {DIGITS} digits a "
                    "line"
                )
            lengths.append(int(line))
    if not lengths:
        raise ValueError(f"data.path={data.path!r}: no lengths in it; expected one a line")
    return lengths


def _tokenised(data: DataConfig) -> Iterator[int]:
    """Tokens of the documents of a text source, read as they are asked for."""
    tokenizer = load_tokenizer(data.tokenizer, data.end_token)
    documents = read_documents(open_source(data), epochs=data.epochs or 1)
    return (len(tokens) for tokens, _ in encode_documents(documents, tokenizer, data.longest))
