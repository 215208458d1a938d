"""What can be simulated: every published method as it was published, and every baseline as well as we could do it."""

from __future__ import annotations

from typing import NamedTuple

from flashcp.sharding.methods import METHODS, Method

__all__ = ["BEST_EFFORT", "VARIANTS", "Variant"]

BEST_EFFORT = "_best_effort"


class Variant(NamedTuple):
    """A strategy and an exchange, and whose implementation runs them.

    published: with the copies, the exposed collectives or the kernel a step that the authors' code has; else by our
    kernel, which reads rows where they lie, with no copies and our overlap.
    """

    name: str
    sharding: str
    exchange: str
    published: bool

    @classmethod
    def of(cls, method: Method, published: bool) -> Variant:
        """A method under its own name, or as a best effort."""
        ours = method.name == "flashcp" or "+" in method.name
        name = method.name if published or ours else f"{method.name}{BEST_EFFORT}"
        return cls(name, method.sharding, method.exchange, published and not ours)


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        *(Variant.of(method, published=True) for method in METHODS.values()),
        *(Variant.of(method, published=False) for method in METHODS.values() if method.name != "flashcp"),
    )
}
"""`flashcp` is our implementation already and has no second entry."""
