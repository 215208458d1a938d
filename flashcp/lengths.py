"""Document lengths out of what data loaders hand over, and labels shifted inside documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flashcp.sharding.documents import read_document_lengths
from flashcp.sharding.values import read_whole, shown

if TYPE_CHECKING:
    from torch import Tensor, dtype

Numbers = Any
"""A tensor on any device, an array or nested lists of whole numbers."""


def lengths_of(
    *, position_ids: Numbers | None = None, cu_seqlens: Numbers | None = None, seq_idx: Numbers | None = None
) -> np.ndarray:
    """Tokens of each document of a pack, in pack order, int64 [documents]: what `flashcp.plan` takes.

    Out of one of: position_ids [tokens] or [rows, tokens], which begin each document with 0 and grow by 1; cu_seqlens
    [documents + 1] (FlashAttention's, `cu_seq_lens_q`), the row where each document begins, and the pack's size;
    seq_idx [tokens] or [rows, tokens], the number of each token's document, which never falls. Rows of a batch follow
    each other in the pack, and a document ends with its row. On a GPU the numbers are copied to the host.
    Raises ValueError unless exactly one is given, and for numbers that no pack has.
    """
    given = {"position_ids": position_ids, "cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
    named = [name for name, numbers in given.items() if numbers is not None]
    if len(named) != 1:
        raise ValueError(f"lengths_of({', '.join(named)}): expected one of {', '.join(given)}")
    name = named[0]
    numbers = _read(name, given[name])
    if name == "cu_seqlens":
        return _from_offsets(numbers)
    return _from_starts(_position_starts(numbers) if name == "position_ids" else _index_starts(numbers))


def shift_labels(labels: Tensor, document_lengths: Iterable[int] | np.ndarray, ignore: int = -100) -> Tensor:
    """The label of each row's next row, and `ignore` for the last row of each document.

    labels: a whole pack's [..., tokens], the label of a row being its own token, as Transformers' collators give them.
    Raises ValueError unless the documents have as many tokens, and for an `ignore` that the labels cannot hold.
    """
    import torch

    ends = np.cumsum(read_document_lengths(document_lengths)) - 1
    dense = isinstance(labels, torch.Tensor) and labels.layout is torch.strided
    if not dense or labels.dim() < 1 or labels.shape[-1] != ends[-1] + 1:
        said = list(labels.shape) if dense else f"is a {type(labels).__name__}"
        raise ValueError(f"labels {said}: expected [..., {ends[-1] + 1}], the tokens of all documents")
    holds = torch.int64 if labels.dtype.is_floating_point or labels.dtype.is_complex else labels.dtype
    ignore = read_whole("ignore", ignore, *_ends(holds))
    shifted = labels.roll(-1, dims=-1)
    shifted[..., ends.tolist()] = ignore
    return shifted


def _ends(dtype: dtype) -> tuple[int, int]:
    """The least and the most whole number."""
    import torch

    return (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _read(name: str, numbers: Numbers) -> np.ndarray:
    """int64 [rows, tokens], or [documents + 1] of cu_seqlens."""
    try:
        array = np.asarray(numbers.detach().cpu() if hasattr(numbers, "detach") else numbers)
    except Exception as error:  # of a tensor without data, or of the caller's own object
        raise ValueError(f"{name}={shown(numbers)}: expected whole numbers") from error
    legal, shape = ((1,), "[documents + 1]") if name == "cu_seqlens" else ((1, 2), "[tokens] or [rows, tokens]")
    if array.ndim not in legal or not array.size:
        raise ValueError(f"{name} has shape {array.shape}: expected {shape}")
    if array.dtype.kind not in "iu":
        first = shown(array.flat[0])
        raise ValueError(f"{name} holds {array.dtype} (first value {first}): expected whole numbers")
    array = array.astype(np.int64)
    return array if name == "cu_seqlens" else np.atleast_2d(array)


def _position_starts(positions: np.ndarray) -> np.ndarray:
    """Whether a document begins, bool [rows, tokens]."""
    starts = positions == 0
    expected = np.pad(positions[:, :-1] + 1, ((0, 0), (1, 0)))
    _refuse(
        "position_ids",
        positions,
        ~starts & (positions != expected),
        expected,
        " or 0, where a document begins (of a whole pack, not of a rank's rows)",
    )
    return starts


def _index_starts(index: np.ndarray) -> np.ndarray:
    """The same, where the document's number changes."""
    before = np.pad(index[:, :-1], ((0, 0), (1, 0)), mode="edge")
    before[:, 0] = index[:, 0]
    _refuse("seq_idx", index, index < before, before, " or more, of a later document")
    starts = index != before
    starts[:, 0] = True
    return starts


def _refuse(name: str, numbers: np.ndarray, wrong: np.ndarray, expected: np.ndarray, else_: str) -> None:
    """Raise ValueError for the first wrong number."""
    if wrong.any():
        row, at = (int(place[0]) for place in np.nonzero(wrong))
        where: Sequence[int] = (row, at) if len(numbers) > 1 else (at,)
        place = ", ".join(map(str, where))
        raise ValueError(f"{name}[{place}]={numbers[row, at]}: expected {expected[row, at]}{else_ if at else ''}")


def _from_starts(starts: np.ndarray) -> np.ndarray:
    return np.diff(np.flatnonzero(starts), append=starts.size).astype(np.int64)


def _from_offsets(offsets: np.ndarray) -> np.ndarray:
    lengths = np.diff(offsets)
    if offsets[0] != 0 or not lengths.size or lengths.min() < 1:
        raise ValueError(f"cu_seqlens={shown(offsets.tolist())}: expected whole numbers that begin with 0 and grow")
    return lengths
