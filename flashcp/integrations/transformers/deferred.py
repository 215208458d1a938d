"""A mask that is made only where it is needed: under a plan nobody reads [rows, rows] of booleans.

torch.compile cannot look into functions. So what a mask is made of is read when it is asked for, outside of compiled
code: that ends one graph a kind of mask and forward, and none a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers.masking_utils import eager_mask, sdpa_mask

from flashcp.untraced import untraced

# Functions of `transformers.masking_utils` whose masks documents, windows and chunks say too.
_KNOWN = {
    "causal_mask_function",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
    "and_masks.<locals>.and_mask",
    "or_masks.<locals>.or_mask",
}
# ... and where they keep how far back a row looks.
_BACK = {
    "sliding_window_overlay.<locals>.inner_mask": "sliding_window",
    "chunked_overlay.<locals>.inner_mask": "chunk_size",
}
_OWN = "this model's attention is its own, or changes its mask: expected a model that hands both to attn_implementation"
_BLOCKS = "blockwise_overlay.<locals>.inner_mask"


class DeferredMask:
    """What Transformers asks a mask function for, under the names of `transformers.masking_utils.sdpa_mask`.

    back: how far a row looks back, None: as far as there is. blocks: whether it has blocks. unknown: the name of a part
    that is neither, empty where there is none.
    """

    ndim = 4  # Transformers then hands it on as it is

    def __init__(self, **asked: Any) -> None:
        self.asked = asked
        self.back: int | None = None
        self.blocks, self.unknown = False, ""
        for part in _parts(asked["mask_function"]):
            name = _name(part)
            if name in _BACK:
                cells = dict(zip(part.__code__.co_freevars, part.__closure__, strict=True))
                self.back = cells[_BACK[name]].cell_contents
            elif name == _BLOCKS:
                self.blocks = True
            elif name not in _KNOWN:
                self.unknown = self.unknown or name

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

    def __getitem__(self, index: Any) -> DeferredMask:
        """Itself, where all of it is asked for (Gemma 4 where layers share KV)."""
        for one, size in zip(index if isinstance(index, tuple) else (index,), self.shape, strict=False):
            if not isinstance(one, slice) or one.indices(size) != (0, size, 1):
                raise ValueError(_OWN)
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{_OWN} (.{name})")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, given: Any = (), said: Any = None) -> Any:
        raise ValueError(_OWN)

    def check(self, tokens: int, back: int | None, longest_block: int, marked: bool) -> None:
        """Raise ValueError where it masks anything else than a plan does for a layer that looks so far `back`.
        longest_block: rows of the plan's longest block, 0: it has none; marked: where something else would mark it."""
        _, _, _, kv_length = self.shape
        if kv_length != tokens:
            raise ValueError(f"attention over {kv_length} keys, {tokens} rows and a plan: expected no cache, no prefix")
        padding = self.asked.get("attention_mask")
        if padding is not None and not padding.all():
            raise ValueError("attention_mask has zeros beside a plan: expected none; Collator leaves padding out")
        if self.blocks and not longest_block and not marked:
            raise ValueError(f"mask function {_BLOCKS} beside a plan: expected blocks in the plan's masks")
        if self.unknown:
            raise ValueError(f"mask function {self.unknown} beside a plan: expected causal, windows, chunks and packed")
        if self.back != back:
            raise ValueError(f"the layer's mask looks {self.back} rows back, its attention {back}: expected the same")
        if back is not None and back < longest_block:  # Transformers lets its rows look no further back in it
            raise ValueError(f"a block of {longest_block} rows in a layer that looks {back} back: expected no more")


@untraced
def defer(**asked: Any) -> Any:
    """The mask function that is registered."""
    given = asked.get("attention_mask")
    return given if isinstance(given, DeferredMask) else DeferredMask(**asked)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _parts(function: Any) -> Iterator[Any]:
    """A mask function and those that it is made of."""
    yield function
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for one in held if isinstance(held, tuple | list) else (held,):
            if callable(one):
                yield from _parts(one)
