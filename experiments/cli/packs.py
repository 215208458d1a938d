"""Packs to plan for, from any data set: sampled lengths, lengths in a file or a list, documents of text."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flashcp.experiments.cli.schema import DATA, LengthsData, SampledData
from flashcp.files import read_bounded, read_path
from flashcp.schema import read_dataclass
from flashcp.sharding.lengths import length_stream
from flashcp.sharding.packing import Window, pack_lengths
from flashcp.sharding.values import shown
from flashcp.simulator.cost import ModelShape
from flashcp.train.data.documents import read_documents
from flashcp.train.data.sources import DataConfig, open_source
from flashcp.train.data.tokenizer import load_tokenizer
from flashcp.train.data.windows import LONGEST_CONTEXT, encode_documents

LENGTH = re.compile(r"(?=.*[1-9])[0-9]{1,18}")  # that int64 holds
LENGTHS_MIB = 256  # some 40 million lengths
EXPECTED = "of at most 18 digits"


def read_packs(data: Mapping[str, Any], context: int, count: int, seed: int) -> list[np.ndarray]:
    """Document lengths of the first `count` windows of `context` tokens, int64 [documents] each.

    data: the `data` section of a configuration. The last window may hold fewer tokens, where documents end. Says on
    standard error what of a file of lengths the windows leave out, and what of a tokenizer's file does not count.
    Raises ValueError, naming value, field and legal values, for data that cannot be read or packed.
    """
    if not 1 <= context <= LONGEST_CONTEXT:
        raise ValueError(f"context={context}: expected a whole number of tokens >= 1 and <= {LONGEST_CONTEXT}")
    source = data.get("source")
    if source not in DATA:
        raise ValueError(f"data.source={shown(source)}: expected one of {', '.join(DATA)}")
    told = read_dataclass(DATA[source], data, "data")
    lengths, notes = _lengths(told, seed)
    packs = list(itertools.islice(pack_lengths(iter(lengths), context, told.overflow), count))
    if not packs:
        raise ValueError(f"data.source={shown(source)}: no document to pack with these settings of data")
    for note in notes:
        print(note, file=sys.stderr)
    if isinstance(lengths, list):
        _say_left_out(len(lengths), packs)
    return [window.document_lengths for window in packs]


def planned_packs(settings: Mapping[str, Any]) -> list[np.ndarray]:
    """The packs of a configuration, without a short last one that has fewer tokens than ranks."""
    packs = read_packs(settings["data"], settings["context"], settings["windows"], settings["seed"])
    ranks = settings["world_size"]
    if len(packs) > 1 and packs[-1].sum() < min(ranks, packs[0].sum()):
        print(f"left out: a last window of {packs[-1].sum()} tokens, fewer than {ranks} ranks", file=sys.stderr)
        return packs[:-1]
    return packs


def read_model(settings: Mapping[str, Any]) -> ModelShape:
    """The chosen model's heads and layers. Raises ValueError naming value, field and what is legal."""
    return read_dataclass(ModelShape, settings["model"], "model")


def heading(settings: Mapping[str, Any], packs: Sequence[np.ndarray]) -> str:
    """What was planned, in one line."""
    documents = np.mean([len(lengths) for lengths in packs])
    plural = "window" if len(packs) == 1 else "windows"
    batches = f" in batches of {settings['batch_windows']}" if settings["batch_windows"] > 1 else ""
    sizes = sorted({int(lengths.sum()) for lengths in packs})
    size = f"{sizes[0]} to {sizes[-1]}" if sizes[1:] else f"{sizes[0]}"
    return (
        f"{len(packs)} {plural}{batches} of {size} tokens from {settings['data']['source']}, "
        f"{documents:.1f} documents on average, {settings['world_size']} ranks"
    )


def described(settings: Mapping[str, Any], packs: Sequence[np.ndarray]) -> dict[str, Any]:
    """What was planned, as the JSON of a verb says it."""
    told = {key: settings[key] for key in ("world_size", "context", "data", "seed")}
    return {**told, "windows": len(packs), "documents": sum(map(len, packs))}


def _say_left_out(given: int, packs: Sequence[Window]) -> None:
    used, dropped = int(packs[-1].document[-1]) + 1, sum(int(window.dropped) for window in packs)
    tokens = dropped + sum(int(window.document_lengths.sum()) for window in packs)
    said = [f"{given - used} of {given} lengths come after the last window"] if used < given else []
    said += [f"{dropped / tokens:.1%} of the tokens are cut off at ends of windows"] if dropped else []
    if said:
        print(f"left out: {'; '.join(said)}", file=sys.stderr)


def _lengths(
    data: LengthsData | SampledData | DataConfig, seed: int
) -> tuple[list[int] | Iterator[int], Sequence[str]]:
    """Of all documents: those of a file or a list checked before any window is made, others as they are asked for; and
    the tokenizer's notes."""
    if isinstance(data, LengthsData):
        return _listed(data), ()
    if isinstance(data, DataConfig):
        data.check()
        tokenizer = load_tokenizer(data.tokenizer, data.end_token, data.stored_lengths, data.parse_special)
        documents = read_documents(open_source(data), data.epochs or 1, on_bad_record=data.on_bad_record)
        return (len(tokens) for tokens, _ in encode_documents(documents, tokenizer, data.longest)), tokenizer.notes
    if seed < 0:
        raise ValueError(f"seed={seed}: expected a whole number >= 0")
    try:
        weight = data.long_document_weight
        return length_stream(data.source, seed, long_document_weight=weight, sigma=data.sigma), ()
    except ValueError as error:
        raise ValueError(f"data.{error}") from error


def _listed(data: LengthsData) -> list[int]:
    if bool(data.path) == bool(data.lengths):
        either = "data.path=FILE, one length a line, or data.lengths=[70000,40000,21072]"
        raise ValueError(f"data=lengths: expected either {either}")
    for length in data.lengths:
        if not LENGTH.fullmatch(str(length)):
            raise ValueError(f"data.lengths holds {length}: expected whole numbers >= 1 {EXPECTED}")
    if data.lengths:
        return data.lengths
    try:
        content = read_bounded(read_path(data.path, "data.path"), f"data.path={shown(data.path)}", LENGTHS_MIB)
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path={shown(data.path)}: not UTF-8 text; expected one length a line") from error
    told = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    for number, line in told.items():
        if not LENGTH.fullmatch(line):
            raise ValueError(f"{data.path}:{number}: {line[:40]!r}: expected one whole number >= 1 {EXPECTED} a line")
    if not told:
        raise ValueError(f"data.path={shown(data.path)}: no lengths in it; expected one a line")
    return [int(line) for line in told.values()]
