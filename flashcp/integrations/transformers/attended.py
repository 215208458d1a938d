"""That a model under a plan did attend over ranks: nothing else tells, for many models swallow keywords."""

from __future__ import annotations

from typing import Any

from torch import nn

from flashcp.context_parallel import ContextParallel
from flashcp.integrations.transformers.layers import check_positions
from flashcp.untraced import untraced


def check_attention(model: nn.Module, cp: ContextParallel) -> None:
    """Let every call of a model with `plan=` raise ValueError where its layers did not all attend through cp, where it
    would take other positions than documents have, and where it adds an auxiliary loss once a rank.

    `parallelize` and `SameBatches` see to it; a loop without them calls this once. model: of Transformers, inside of
    whatever wraps it.
    """
    config: Any = next((one.config for one in model.modules() if hasattr(one, "config")), None)
    if not hasattr(config, "get_text_config"):
        return
    before = 0

    @untraced
    def enter(_: nn.Module, given: Any, said: dict[str, Any]) -> None:
        nonlocal before
        if said.get("plan") is not None:
            check_positions(config, said["plan"], cp.head_ranks)
            _check_auxiliary_loss(config.get_text_config(), said)
        before = cp.calls

    @untraced
    def leave(_: nn.Module, given: Any, said: dict[str, Any], output: Any) -> None:
        calls, layers = cp.calls - before, getattr(config.get_text_config(), "num_hidden_layers", 1)
        if said.get("plan") is not None and calls < layers:
            raise ValueError(
                f"the model did not attend through FlashCP: {calls} of {layers} layers did, its attention is "
                f"{config._attn_implementation!r}; expected install(cp), and a model that hands plan= to its attention"
            )

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, with_kwargs=True)


def _check_auxiliary_loss(config: Any, said: dict[str, Any]) -> None:
    """TRL takes the auxiliary loss out of the model (`fused_lm_head`) and its mean over ranks."""
    asked = said.get("output_router_logits")
    asked = getattr(config, "output_router_logits", False) if asked is None else asked
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if asked and coefficient and said.get("labels") is not None and not said.get("fused_lm_head"):
        raise ValueError(
            f"output_router_logits with router_aux_loss_coef={coefficient}: expected 0, for the model adds it on each "
            "rank, and the ranks' losses add up; TRL's SFTTrainer takes its mean"
        )
