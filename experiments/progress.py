"""A bar on standard error where tqdm is installed; without it the work goes on unseen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


def bar(items: Iterable[Item], **options: Any) -> Iterable[Item]:
    """The items, one after another. options: tqdm's."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return items
    return tqdm(items, **options)
