"""FlashCP: context parallelism on packed documents.

The public names are loaded when they are first used: planning and simulating never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashcp.version import __version__ as __version__

if TYPE_CHECKING:
    from flashcp.attention import varlen_attention as varlen_attention
    from flashcp.choice import choose as choose
    from flashcp.comm.choice import TransportOptions as TransportOptions
    from flashcp.context_parallel import ContextParallel as ContextParallel
    from flashcp.kernels.reference import reference_attention as reference_attention
    from flashcp.lengths import lengths_of as lengths_of
    from flashcp.lengths import shift_labels as shift_labels
    from flashcp.predicted import predicted_time as predicted_time
    from flashcp.sharding import Mask as Mask
    from flashcp.sharding import Shard as Shard
    from flashcp.sharding import ShardingPlan as ShardingPlan
    from flashcp.sharding import plan as plan
    from flashcp.sharding import strategies as strategies
    from flashcp.simulation import simulate as simulate

_HOME = {
    "ContextParallel": "flashcp.context_parallel",
    "Mask": "flashcp.sharding",
    "Shard": "flashcp.sharding",
    "ShardingPlan": "flashcp.sharding",
    "TransportOptions": "flashcp.comm.choice",
    "choose": "flashcp.choice",
    "lengths_of": "flashcp.lengths",
    "plan": "flashcp.sharding",
    "predicted_time": "flashcp.predicted",
    "reference_attention": "flashcp.kernels.reference",
    "shift_labels": "flashcp.lengths",
    "simulate": "flashcp.simulation",
    "strategies": "flashcp.sharding",
    "varlen_attention": "flashcp.attention",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'flashcp' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
