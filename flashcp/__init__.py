"""FlashCP: context parallelism on packed documents.

The public names are loaded when they are first used: planning and simulating never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashcp.attention import varlen_attention
    from flashcp.comm.choice import TransportOptions
    from flashcp.context_parallel import ContextParallel
    from flashcp.kernels.reference import reference_attention
    from flashcp.sharding import Shard, ShardingPlan, plan, strategies
    from flashcp.simulation import simulate

__version__ = "0.1.0"

__all__ = [
    "ContextParallel",
    "Shard",
    "ShardingPlan",
    "TransportOptions",
    "plan",
    "reference_attention",
    "simulate",
    "strategies",
    "varlen_attention",
]

_HOME = {
    "ContextParallel": "flashcp.context_parallel",
    "Shard": "flashcp.sharding",
    "ShardingPlan": "flashcp.sharding",
    "TransportOptions": "flashcp.comm.choice",
    "plan": "flashcp.sharding",
    "reference_attention": "flashcp.kernels.reference",
    "simulate": "flashcp.simulation",
    "strategies": "flashcp.sharding",
    "varlen_attention": "flashcp.attention",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'flashcp' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
