"""What a caller chooses, checked at the door: ranks, heads and layers, overlap, methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

import numpy as np

from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.strategies import STRATEGIES
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.planned import Setting
from flashcp.simulator.step import ModelShape
from flashcp.simulator.variants import GIVEN_PLAN, VARIANTS, Variant

__all__ = ["OVERLAPS", "choose_variants", "make_setting", "read_ranks"]

OVERLAPS = ("auto", "none", "staged", "fused")
GRADIENT_BYTES = (2, 4)
MOST_RANKS = 1024


def read_ranks(world_size: object) -> int:
    """Raises ValueError for a number of ranks that is not simulated."""
    if not isinstance(world_size, int | np.integer) or not 1 <= world_size <= MOST_RANKS:
        raise ValueError(f"world_size={world_size!r}: expected a whole number >= 1 and <= {MOST_RANKS}")
    return int(world_size)


def make_setting(
    machine: Machine, model: ModelShape, overlap: str = "auto", gradient_bytes: int = 4, prefix: str = ""
) -> Setting:
    """Where and how plans run. prefix: of the model's fields in messages.

    Raises ValueError naming value, field and what is legal.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap={overlap!r}: expected one of {', '.join(OVERLAPS)}")
    if gradient_bytes not in GRADIENT_BYTES:
        raise ValueError(f"gradient_bytes={gradient_bytes!r}: expected one of {', '.join(map(str, GRADIENT_BYTES))}")
    for name, number in asdict(model).items():
        least = 0 if name == "ffn_dim" else 1
        if not isinstance(number, int | np.integer) or number < least:
            raise ValueError(f"{prefix}{name}={number!r}: expected a whole number >= {least}")
    if model.query_heads % model.kv_heads:
        raise ValueError(
            f"{prefix}query_heads={model.query_heads}: expected a multiple of {prefix}kv_heads={model.kv_heads}"
        )
    shape = AttentionShape(model.query_heads, model.kv_heads, model.head_dim, model.dtype_bytes)
    # As in `ContextParallel`: `fused` is taken by name alone until a GPU has shown that it is faster.
    return Setting(machine, shape, "staged" if overlap == "auto" else overlap, gradient_bytes)


def choose_variants(names: Iterable[str], given_plan: bool = False) -> list[Variant]:
    """Methods by name, and pairs SHARDING+EXCHANGE under our implementation; all methods where none is named.

    given_plan: the caller has made the plans: `plan+EXCHANGE` is a pair too, `plan` is short for `plan+exact`, and
    that one stands first where none is named. Raises ValueError for other names.
    """
    chosen = [_variant(name, given_plan) for name in dict.fromkeys(names)]
    return chosen or [*([_variant(GIVEN_PLAN, True)] if given_plan else []), *VARIANTS.values()]


def _variant(name: str, given_plan: bool) -> Variant:
    strategy, plus, exchange = str(name).partition("+")
    if given_plan and name == GIVEN_PLAN:
        return Variant(GIVEN_PLAN, GIVEN_PLAN, "exact")
    known = [*STRATEGIES, GIVEN_PLAN] if given_plan else [*STRATEGIES]
    if name not in VARIANTS and not (plus and strategy in known and exchange in EXCHANGES):
        also = f"{GIVEN_PLAN}, " if given_plan else ""
        raise ValueError(f"methods: {name!r}: expected one of {also}{', '.join(VARIANTS)}, or a pair SHARDING+EXCHANGE")
    return VARIANTS.get(name) or Variant(name, strategy, exchange)
