"""The timelines of a method on a plan, and a plan's predicted time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.best_effort import best_effort
from flashcp.simulator.heads import COPIES, share_heads
from flashcp.simulator.ours import ours
from flashcp.simulator.planned import Module, Planned, Setting
from flashcp.simulator.published import published
from flashcp.simulator.variants import Variant

RUN = {"published": published, "best effort": best_effort, "ours": ours}


def simulate_module(planned: Planned, variant: Variant) -> Module:
    """The timelines of a method."""
    if variant.exchange == "ulysses" or planned.ranks == planned.setting.head_ranks == 1:
        # One kernel: whose it is makes no difference. Of ours, ulysses orders rows.
        copies = COPIES["best effort" if variant.implementation == "best effort" else "published"]
        return share_heads(planned, best_effort(planned, "exact"), copies)
    inner = RUN[variant.implementation](planned, variant.exchange)
    return share_heads(planned, inner, COPIES[variant.implementation])


@dataclass(frozen=True)
class PredictedTime:
    """Of plans: the module's milliseconds, forward and backward, as `variant` runs it where `setting` says; the mean
    over a plan's layers. A `cost` for the strategy `flashcp`, on as many holders as the plan has ranks."""

    setting: Setting
    variant: Variant

    def __repr__(self) -> str:
        heads, machine = self.setting.shape, self.setting.machine.name
        of = f"{heads.query_heads} query and {heads.kv_heads} KV heads of {heads.head_dim}"
        return f"PredictedTime({machine}, {self.variant.exchange}, {of}, head_ranks={self.variant.head_ranks})"

    def __call__(self, plan: ShardingPlan) -> float:
        variant = self.variant
        setting = replace(
            self.setting, head_ranks=variant.head_ranks, gradient_wire=variant.wire(self.setting.gradient_wire)
        )
        total_ms, layers = 0.0, 0
        for narrowed, count in plan.of_kinds:
            module = simulate_module(Planned(narrowed, setting), variant)
            total_ms += count * sum(float(one.now.max()) for one in (module.forward, module.backward)) / 1e3
            layers += count
        return total_ms / layers
