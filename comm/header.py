"""A header: what a rank says of its next exchange, in numbers of one size; and what the numbers are called in words."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Hashable, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch

from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.route import GRADIENT_WIRES

UNSHARD, RESHARD = -1, -2
"""In place of an exchange."""
_Value = TypeVar("_Value", bound=Hashable)
_FLAGS = ("sinks", "log_sums", "gradients", "refetch", "gathers", "verify_rows")


class Step(IntEnum):
    """The moments at which ranks compare notes: those of one call, and the end of all so far."""

    BEGIN = 0
    ATTENTION = 1
    BACKWARD = 2
    SYNCHRONIZE = 3

    @property
    def word(self) -> str:
        """As users know it."""
        return ("forward", "forward (attention)", "backward", "synchronize")[self]


class Header(NamedTuple):
    """What a rank is about to do, one int64 each.

    failed: 1 when it stopped with an error of its own; 2 when it did not come, as others say of it; negative
    when rows of a rank came to it, in a call, that are not those that were sent (`Handshake.note`). step: which
    exchange of the call, a `Step`. plan: as this layer narrows it. query_heads and what follows from scores: 0 while
    only KV leaves. exchange, dtype, scale, softcap, gradient_wire: codes (below). sinks: whether there are any.
    log_sums: whether they are returned. gathers: whether rows of any kind travel, for nobody's queries yet.
    verify_rows: whether checksums travel beside rows.
    oldest, oldest_inside: the oldest inbox between holders and inside the holder that the rank still reads; they are
    passed on, not compared.
    """

    failed: int = 0
    call: int = 0
    step: int = 0
    plan: int = 0
    exchange: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    row_bytes: int = 0
    dtype: int = 0
    scale: int = 0
    softcap: int = 0
    sinks: int = 0
    log_sums: int = 0
    gradients: int = 0
    refetch: int = 0
    gradient_wire: int = 0
    gathers: int = 0
    verify_rows: int = 0
    oldest: int = 0
    oldest_inside: int = 0


COMPARED = Header._fields[: Header._fields.index("oldest")]


def exchange_code(name: str) -> int:
    """Of an exchange."""
    return list(EXCHANGES).index(name)


def wire_code(name: str) -> int:
    """Of a `gradient_wire`."""
    return GRADIENT_WIRES.index(name)


def dtype_code(dtype: torch.dtype) -> int:
    """The same number for the same dtype on every rank."""
    return zlib.crc32(str(dtype).encode())


def float_code(number: float) -> int:
    """The int64 of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


_NAMES = {
    "exchange": dict(enumerate(EXCHANGES)),
    "gradient_wire": dict(enumerate(GRADIENT_WIRES)),
    "dtype": {dtype_code(one): str(one) for one in vars(torch).values() if isinstance(one, torch.dtype)},
}


def disagreement(headers: Sequence[Sequence[int]], call: int) -> str:
    """What ranks disagree on, with all values: the first thing that their headers differ in; empty where in nothing.

    call: at which the rank is that says so.
    """
    columns = dict(zip(COMPARED, zip(*headers, strict=True), strict=False))
    places = list(zip(columns["call"], columns["step"], strict=True))
    if len(set(places)) > 1:
        return _apart(places)
    operations = list(map(_operation, columns["exchange"], columns["gathers"]))
    for field, values in {"operation": operations, **columns}.items():
        if len(set(values)) > 1:
            what = "plan or the layer's window or chunk" if field == "plan" else field.replace("_", " ")
            said = "; ".join(f"{named(ranks)} {_said(field, value)}" for value, ranks in ranks_by(values))
            asked = ": did all ranks get the same documents?" if field == "plan" else ""
            return f"ranks disagree on {what} (call {call}): {said}{asked}"
    return ""


def named(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def ranks_by(values: Sequence[_Value]) -> list[tuple[_Value, list[int]]]:
    """Each value with the ranks that have it, the rarest first."""
    rarest = sorted(set(values), key=lambda value: (values.count(value), values.index(value)))
    return [(each, [rank for rank, value in enumerate(values) if value == each]) for each in rarest]


def _apart(places: Sequence[tuple[int, int]]) -> str:
    """places: of each rank, its call and the step of it."""
    said = "; ".join(
        f"{named(ranks)} {'are' if len(ranks) > 1 else 'is'} at call {call}, {Step(step).word}"
        for (call, step), ranks in ranks_by(places)
    )
    ahead = [rank for rank, (_, step) in enumerate(places) if step != Step.BACKWARD]
    if 0 < len(ahead) < len(places):
        return f"{said}: did {named(ahead)} skip {'their' if len(ahead) > 1 else 'its'} backward?"
    return f"{said}: expected calls in the same order on all ranks"


def _operation(exchange: int, gathers: int) -> str:
    """What ranks call: those that call different things differ in all the rest too."""
    return {UNSHARD: "unshard", RESHARD: "reshard"}.get(exchange, "gather" if gathers else "attention")


def _said(field: str, value: int | str) -> str:
    """A compared value as a user knows it."""
    if isinstance(value, str):
        return value
    if field in _FLAGS:
        return "yes" if value else "no"
    if field == "plan":
        return f"{value % (1 << 64):016x}"
    if field in ("scale", "softcap"):
        return repr(struct.unpack("<d", struct.pack("<q", value))[0])
    if field == "query_heads":
        return str(value or "none yet")
    return _NAMES.get(field, {}).get(value, str(value))
