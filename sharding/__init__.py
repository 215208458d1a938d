"""Documents, plans, strategies, routes and lower bounds: numpy in, numpy out; no torch, no process groups."""

from __future__ import annotations

from flashcp.sharding.mask import Mask
from flashcp.sharding.methods import METHODS, Method
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import Route
from flashcp.sharding.shards import Shard, ShardTable
from flashcp.sharding.strategies import plan, strategies

__all__ = ["METHODS", "Mask", "Method", "Route", "Shard", "ShardTable", "ShardingPlan", "plan", "strategies"]
