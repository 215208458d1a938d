"""What a model's configuration says of its layers: how far each looks back."""

from __future__ import annotations

from typing import Any

from flashcp.sharding.mask import Mask, count_layers

_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def chunk_of(config: Any, layer: int | None) -> int | None:
    """Rows of a chunk of that layer; attention is not told. Raises ValueError for layers that are no attention."""
    types = getattr(config, "layer_types", None)
    if not types or layer is None:
        return None
    for one in types:
        if one not in _TYPES:
            raise ValueError(f"layer_types holds {one!r}: expected {', '.join(_TYPES)}; others do not see other ranks")
    return int(config.attention_chunk_size) if types[layer] == "chunked_attention" else None


def layers_of(config: Any) -> list[tuple[Mask, int]] | None:
    """The layer mix of a Transformers model, as `flashcp.plan(layers=)` takes it; None where all layers are causal.

    Raises ValueError for layers that are no attention.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        config.num_hidden_layers
    )
    masks = []
    for layer, kind in enumerate(types):
        chunk = chunk_of(config, layer)
        if chunk:
            masks.append(Mask("chunk", chunk))
        else:
            masks.append(Mask("window", window) if kind == "sliding_attention" and window else Mask())
    return count_layers(masks)
