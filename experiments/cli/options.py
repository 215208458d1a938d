"""The options of a strategy, as the command line calls them."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager

__all__ = ["naming_options"]


@contextmanager
def naming_options(options: Container[str]) -> Iterator[None]:
    """A ValueError about one of a strategy's `options` names it as a key of the group `sharding`."""
    try:
        yield
    except ValueError as error:
        if str(error).partition("=")[0] in options:
            raise ValueError(f"sharding.{error}") from error
        raise
