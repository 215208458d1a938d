"""What can be simulated, and what a caller chooses of it, checked at the door: ranks, heads, overlap, methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from flashcp.sharding.documents import check_choice
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.methods import METHODS
from flashcp.sharding.strategies import STRATEGIES
from flashcp.simulator.cost import AttentionShape, ModelShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.planned import Setting

MOST_RANKS = 1024
GIVEN_PLAN = "plan"
"""The strategy of a plan that the caller made."""


class Variant(NamedTuple):
    """A strategy and an exchange, and who runs them.

    implementation: `published`: with the copies, the exposed collectives or the kernel a step that the authors' code
    has. `best effort`: what could be made of the method at most. `ours`: the code of this project.
    """

    name: str
    sharding: str
    exchange: str
    implementation: str = "ours"

    @property
    def published(self) -> bool:
        """Whether the authors' code runs it."""
        return self.implementation == "published"


_METHODS = [Variant(*method, "ours" if method.name == "flashcp" else "published") for method in METHODS.values()]
_BEST_EFFORTS = [
    variant._replace(name=f"{variant.name}_best_effort", implementation="best effort")
    for variant in _METHODS
    if variant.published
]
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (*_METHODS, *_BEST_EFFORTS)}
"""By name: the methods, then the best efforts. `flashcp` is ours; so is every pair SHARDING+EXCHANGE."""


def without_ulysses(
    variants: Sequence[Variant], shape: AttentionShape, ranks: int, prefix: str = ""
) -> tuple[list[Variant], str]:
    """The variants whose heads these ranks can share out, and why others are left out, empty where none is.

    prefix: of the fields in that text. Raises ValueError where none is left.
    """
    kept = [variant for variant in variants if variant.exchange != "ulysses"]
    if len(kept) == len(variants) or not (shape.query_heads % ranks or shape.kv_heads % ranks):
        return list(variants), ""
    heads = f"{prefix}query_heads={shape.query_heads}, {prefix}kv_heads={shape.kv_heads}"
    why = f"{heads} are no multiples of {ranks} ranks"
    if not kept:
        raise ValueError(f"{variants[0].name}: {why}")
    return kept, why


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
    check_choice("overlap", overlap, ("auto", "none", "staged", "fused"))
    check_choice("gradient_bytes", gradient_bytes, (2, 4))
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
