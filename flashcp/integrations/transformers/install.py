"""Attention of Transformers' models through FlashCP: every keyword is used or refused."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flashcp.context_parallel import ContextParallel
from flashcp.integrations.transformers.deferred import DeferredMask, defer
from flashcp.integrations.transformers.layers import chunk_of
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.values import shown

# Keywords of a model's forward that reach every layer and say nothing to attention under a plan.
_ELSEWHERE = {
    "position_ids",  # rotary embeddings have used them
    "num_items_in_batch",  # the loss
    "shift_labels",  # the loss
    "labels",  # the loss
    "use_cache",  # keys are there already; a cache with older ones is refused by its length
    "output_hidden_states",  # recorded beside attention
    "output_router_logits",  # experts
    "logits_to_keep",  # the head
    "return_dict",  # the model
}


def install(cp: ContextParallel, name: str = "context_parallel") -> str:
    """Register attention over cp's ranks with Transformers, and return the name: `model.set_attn_implementation(name)`,
    or `attn_implementation=name` where a model is made.

    Layers whose model is called with `plan=` (`Collator` puts it into batches) compute through `cp.attention`, others,
    as in `generate`, through sdpa. The same name again replaces what it stood for.
    Raises ValueError for names with `flash`, which Transformers takes for kernel packages.
    """
    if "flash" in name:
        raise ValueError(f"name={name!r}: expected one without 'flash', which Transformers takes for kernel packages")

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        plan: ShardingPlan | None = None,
        **said: Any,
    ) -> tuple[Tensor, None]:
        """query: [1, query heads, rank's tokens, head_dim], key and value: [1, KV heads, ...]; returns [1, tokens,
        query heads, v's head_dim]."""
        if plan is None:
            if cp.world_size > 1 and module.training and torch.is_grad_enabled() and getattr(module, "is_causal", True):
                raise ValueError(
                    f"{type(module).__name__} is trained without a plan: expected plan=... in the model's call, as "
                    "flashcp's Collator gives it, and a model that hands it to its attention"
                )
            return _without_plan(module, query, key, value, attention_mask, said)
        return _under_plan(cp, module, query, key, value, attention_mask, plan, said), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, defer)
    return name


def _under_plan(
    cp: ContextParallel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    plan: ShardingPlan,
    said: dict[str, Any],
) -> Tensor:
    said = dict(said)
    dropout, scaling = said.pop("dropout", 0.0), said.pop("scaling", None)
    window, softcap, sinks = said.pop("sliding_window", None), said.pop("softcap", None), said.pop("s_aux", None)
    is_causal = said.pop("is_causal", None)
    for keyword, given in said.items():
        if given is not None and keyword not in _ELSEWHERE and not (keyword == "output_attentions" and not given):
            raise ValueError(f"{keyword}={shown(given)} beside a plan: expected none, FlashCP does not compute it")
    if not isinstance(plan, ShardingPlan):
        raise ValueError(f"plan is a {type(plan).__name__}: expected a ShardingPlan")
    if dropout:
        raise ValueError(f"dropout={dropout} beside a plan: expected 0 (attention_dropout in the configuration)")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("is_causal=False beside a plan: expected causal layers")
    if len(query) != 1:
        raise ValueError(f"a batch of {len(query)} rows beside a plan: expected one, the pack's")
    chunk = chunk_of(getattr(module, "config", None), getattr(module, "layer_idx", None))
    if isinstance(attention_mask, DeferredMask):
        marked = getattr(plan, "marked", False)
        attention_mask.check(query.shape[2], chunk or window, plan.masks.longest_block, marked)
    elif attention_mask is not None:
        what = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask {what} beside a plan: expected none")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    own, other = v.shape[-1], q.shape[-1]
    if own < other:  # latent attention (MLA): rows of zeros travel along
        v = pad(v, (0, other - own))
    elif own > other:
        q, k = (pad(x, (0, own - other)) for x in (q, k))
    out = cp.attention(q, k, v, plan, scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks)
    return out[None, ..., :own]


def _without_plan(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, said: dict[str, Any]
) -> tuple[Tensor, None]:
    """sdpa, or the model's own eager attention for a softcap and sinks, which sdpa has not."""
    if said.get("softcap") is None and said.get("s_aux") is None:
        mask = attention_mask.boolean if isinstance(attention_mask, DeferredMask) else attention_mask
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **said)
        return out
    mask = attention_mask.additive if isinstance(attention_mask, DeferredMask) else attention_mask
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **said)[0], None
