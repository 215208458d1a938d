"""What can be simulated: every published method as it was published, and at its best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashcp.sharding.methods import METHODS, Method
from flashcp.simulator.cost import AttentionShape

__all__ = ["BEST_EFFORT", "GIVEN_PLAN", "IMPLEMENTATIONS", "VARIANTS", "Variant", "without_ulysses"]

BEST_EFFORT = "_best_effort"
GIVEN_PLAN = "plan"
"""The strategy of a plan that the caller made."""
IMPLEMENTATIONS = ("published", "best effort", "ours")


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


def _of(method: Method) -> list[Variant]:
    if method.name == "flashcp":
        return [Variant(*method)]
    published = Variant(*method, "published")
    return [published, published._replace(name=f"{method.name}{BEST_EFFORT}", implementation="best effort")]


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in sorted(
        (one for method in METHODS.values() for one in _of(method)), key=lambda v: BEST_EFFORT in v.name
    )
}
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
