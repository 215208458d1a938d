"""What can be simulated: every published method as it was published, and at its best."""

from __future__ import annotations

from typing import NamedTuple

from flashcp.sharding.methods import METHODS, Method

__all__ = ["BEST_EFFORT", "IMPLEMENTATIONS", "VARIANTS", "Variant"]

BEST_EFFORT = "_best_effort"
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
