"""The inner attention of torchtitan's decoders: keys and values of other ranks come as the plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor
from torchtitan.models.gpt_oss.model import Attention as GptOssAttention
from torchtitan.protocols.module import Module

from flashcp.context_parallel import ContextParallel
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.values import shown


@dataclass(frozen=True, eq=False)
class Planned:
    """What a model is handed as `attention_masks`, which every block forwards: the plan of its batch, and the ranks."""

    cp: ContextParallel
    plan: ShardingPlan


class FlashCPAttention(Module):
    """Attention inside documents over the ranks of a `Planned`; in the place of FlexAttention and VarlenAttention.

    It has no state, so one compiled block serves all plans. Shapes as torchtitan writes them: B batch, always 1, L this
    rank's tokens, N heads, H head_dim.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        window: int | None = None
        """Keys that a row sees at most, its own included. None: all of its document before it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.window = config.window

    def parallelize(self, parallel_dims: Any) -> None:
        """DTensors, whose heads tensor parallelism has shared out, become plain tensors. Where they are plain already
        torchtitan would gather the keys and values of all ranks: that is left out."""
        if parallel_dims.spmd_backend == "partial_dtensor":
            super().parallelize(parallel_dims)

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Planned,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[..., Tensor] | None = None,
        **said: Any,
    ) -> Tensor:
        """[1, L, N, H], in q's dtype. enable_gqa is said by the numbers of heads. out_transform: gpt-oss's sinks.

        Raises ValueError for what FlashCP does not compute.
        """
        if not isinstance(attention_masks, Planned):
            given = type(attention_masks).__name__
            raise ValueError(f"attention_masks is {given}: expected a Planned, as flashcp's Trainer gives it")
        for keyword, given in said.items():
            if given is not None:
                raise ValueError(f"{keyword}={shown(given)}: expected none, FlashCP does not compute it")
        if len(q_BLNH) != 1:
            raise ValueError(f"a batch of {len(q_BLNH)} rows: expected one, the pack's")
        q, k, v = q_BLNH[0], k_BLNH[0], v_BLNH[0]
        sinks = None if out_transform is None else _sinks(out_transform)
        out = attention_masks.cp.attention(q, k, v, attention_masks.plan, scale, window=self.window, sinks=sinks)
        return out[None]


def _sinks(out_transform: Callable[..., Tensor]) -> Tensor:
    """gpt-oss scales outputs by its sinks through the log-sum-exp, which has no gradient here; in the softmax they do
    the same."""
    if not isinstance(out_transform, MethodType) or not isinstance(out_transform.__self__, GptOssAttention):
        raise ValueError(f"out_transform={shown(out_transform)}: expected none, or that of gpt-oss's sinks")
    sinks: Tensor = out_transform.__self__.sinks
    return sinks
