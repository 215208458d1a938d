"""A mask that is made only where it is needed: under a plan nobody reads [rows, rows] of booleans."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers.masking_utils import eager_mask, sdpa_mask

# Functions of `transformers.masking_utils` whose masks documents, windows and chunks say too.
_KNOWN = {
    "causal_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "chunked_overlay.<locals>.inner_mask",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
    "and_masks.<locals>.and_mask",
    "or_masks.<locals>.or_mask",
}
_BLOCKS = "blockwise_overlay.<locals>.inner_mask"


class DeferredMask:
    """What Transformers asks a mask function for, under the names of `transformers.masking_utils.sdpa_mask`."""

    ndim = 4  # Transformers then hands it on as it is

    def __init__(self, **asked: Any) -> None:
        self.asked = asked

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As the mask's would be."""
        return self.asked["batch_size"], 1, self.asked["q_length"], self.asked["kv_length"]

    @cached_property
    def boolean(self) -> Tensor | None:
        """What sdpa takes: None where it masks by itself."""
        return sdpa_mask(**self.asked)

    @cached_property
    def additive(self) -> Tensor | None:
        """What eager attention takes."""
        return eager_mask(**self.asked)

    def check(self, tokens: int, back: int | None, with_blocks: bool) -> None:
        """Raise ValueError where it masks anything else than a plan does for a layer that looks so far `back`."""
        _, _, _, kv_length = self.shape
        if kv_length != tokens:
            raise ValueError(f"attention over {kv_length} keys, {tokens} rows and a plan: expected no cache, no prefix")
        padding = self.asked.get("attention_mask")
        if padding is not None and not padding.all():
            raise ValueError("attention_mask has zeros beside a plan: expected none; Collator leaves padding out")
        asked = self.asked.get("local_size")
        if asked != back:
            raise ValueError(f"the layer's mask looks {asked} rows back, its attention {back}: expected the same")
        for name in _names(self.asked["mask_function"]):
            if name not in _KNOWN and not (name == _BLOCKS and with_blocks):
                hint = (
                    "blocks in the plan's masks" if name == _BLOCKS else "causal, windows, chunks and packed documents"
                )
                raise ValueError(f"mask function {name} beside a plan: expected {hint}")


def defer(**asked: Any) -> Any:
    """The mask function that is registered."""
    given = asked.get("attention_mask")
    return given if isinstance(given, DeferredMask) else DeferredMask(**asked)


def _names(function: Any) -> Iterator[str]:
    """Of a mask function and of those that it is made of."""
    yield getattr(function, "__qualname__", type(function).__name__)
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for one in held if isinstance(held, tuple | list) else (held,):
            if callable(one):
                yield from _names(one)
