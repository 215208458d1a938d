"""What a model's configuration says of its layers: how far each looks back, and how it takes positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashcp.sharding.mask import Mask, count_layers
from flashcp.sharding.plan import ShardingPlan

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


def check_positions(config: Any, plan: ShardingPlan, head_ranks: int = 1) -> None:
    """Raise ValueError where a model takes more from positions than each row's own, and the plan is long enough to
    show it: a rank would take it from its own rows."""
    config = config.get_text_config()
    longest = int(plan.document_lengths.max())
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            most = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        elif "dynamic" in kind:
            most = config.max_position_embeddings
        else:
            continue
        if longest > most:
            raise ValueError(
                f"a document of {longest} tokens, rope_type={kind!r}: expected no more than {most}, for behind them "
                "angles are of the longest document, and a rank sees its own rows"
            )
    if getattr(config, "attn_temperature_tuning", False) and not all(config.no_rope_layers):
        rows = max(len(plan.rows(holder)) for holder in range(plan.world_size))
        if max(longest, -(-rows // head_ranks)) >= config.floor_scale:
            raise ValueError(
                f"attn_temperature_tuning with a document of {longest} tokens, {rows} rows on a rank: expected fewer "
                f"than floor_scale={config.floor_scale}, for the model counts a rank's rows and not positions"
            )


def _ropes(said: Any) -> Iterator[dict[str, Any]]:
    """All that is said of rotary embeddings, for each type of layers where it is not the same for all."""
    if isinstance(said, dict):
        yield said
        for one in said.values():
            yield from _ropes(one)
