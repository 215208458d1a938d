"""From a batch of torchtitan's data loader to this rank's rows of it, and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashcp.context_parallel import ContextParallel
from flashcp.integrations.torchtitan.attention import Planned
from flashcp.lengths import lengths_of
from flashcp.sharding import Mask, ShardingPlan, plan


@dataclass(frozen=True, eq=False)
class Sharing:
    """Batches [rows, tokens] become one pack each, shared out among the ranks of cp.

    strategy: of `flashcp.plan`. layers: the model's mix of layers, which the plan balances; None: all are causal.
    """

    cp: ContextParallel
    strategy: str
    layers: Sequence[tuple[Mask, int]] | None

    def plan(self, batch: dict[str, Any]) -> ShardingPlan:
        """For documents that begin where `positions` are 0, and end with their row.

        Raises ValueError for batches without positions, and with inputs that nobody would share out.
        """
        positions = batch.get("positions")
        if positions is None or set(batch) != {"input", "positions"}:
            raise ValueError(f"a batch of {', '.join(batch)}: expected input and positions, a value a token, no more")
        return plan(lengths_of(position_ids=positions), self.cp.holders, self.strategy, layers=self.layers)

    def shard(
        self, batch: dict[str, Any], labels: Tensor, made: ShardingPlan | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """This rank's inputs and labels [1, rank's tokens], and what the model is handed beside them."""
        made = made or self.plan(batch)
        inputs, targets, positions = (
            self.cp.shard(x.flatten(), made)[None] for x in (batch["input"], labels, batch["positions"])
        )
        return inputs, targets, {"positions": positions, "attention_masks": Planned(self.cp, made)}
