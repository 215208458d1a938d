"""The public doors of FlashCP, each with arguments that are good: whoever calls replaces one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

import flashcp
from flashcp import clusters
from flashcp.kernels.tuning import Blocks, Tuning
from flashcp.schema import read_dataclass
from flashcp.sharding.lengths import sample_lengths, windows
from flashcp.sharding.packing import pack_lengths
from flashcp.simulator.cost import ModelShape
from flashcp.simulator.machine import check_machine, parameters
from flashcp.train.config import TrainConfig

LENGTHS = [4, 3]
STRATEGY_OPTIONS = {
    "flashcp": {
        "tolerance": 1.02,
        "budget": 20,
        "total_weight": 0.1,
        "granularity": 1,
        "max_split": 2,
        "multicast": False,
    },
    "flashcp_paper": {"target_imbalance": 1.05, "leaves": "tail"},
}


class Door(NamedTuple):
    """A function and good arguments by name. fixed: those that stay as they are. own: what an iterator of the caller's
    raises comes through as it is."""

    name: str
    call: Callable[..., Any]
    good: dict[str, Any]
    fixed: Mapping[str, Any] = MappingProxyType({})
    own: str = ""


def _plan(ranks: int = 2) -> flashcp.ShardingPlan:
    return flashcp.plan(LENGTHS, ranks, "contiguous")


def _rows(heads: int = 2, dim: int = 4) -> torch.Tensor:
    return torch.ones(7, heads, dim)


def planning() -> Iterator[Door]:
    plan, causal = _plan(), flashcp.Mask()
    packs = {"document_lengths": LENGTHS, "world_size": 2, "masks": causal, "layers": [(causal, 1)]}
    yield Door("plan", flashcp.plan, packs | {"strategy": "flashcp"})
    for strategy, options in STRATEGY_OPTIONS.items():
        yield Door(f"plan {strategy}", flashcp.plan, options, {"document_lengths": LENGTHS, "world_size": 2,
                                                               "strategy": strategy})  # fmt: skip
    yield Door("time of a cost", lambda time: flashcp.plan(LENGTHS, 2, cost=lambda plan: time), {"time": 1.0})
    yield Door("Mask window", flashcp.Mask, {"kind": "window", "size": 2, "blocks": [(0, 2)]})
    yield Door("Mask", flashcp.Mask, {"kind": "causal", "size": None, "blocks": []})
    yield Door("from_shards", flashcp.ShardingPlan.from_shards,
               packs | {"shards": [(0, 0, 4, 0), (1, 0, 3, 1)]})  # fmt: skip
    yield Door("ShardingPlan", flashcp.ShardingPlan, {"document_lengths": np.array(LENGTHS), "world_size": 2,
                                                      "table": plan.table, "workload": plan.workload})  # fmt: skip
    yield Door("from_json", flashcp.ShardingPlan.from_json, {"text": plan.to_json()})
    yield Door("route", plan.route, {"exchange": "exact", "window": 2, "chunk": None})
    yield Door("narrow", plan.narrow, {"window": None, "chunk": 2})
    yield Door("over_layers", plan.over_layers, {"exchange": "exact", "head_ranks": 1})
    for method in (plan.rows, plan.positions, plan.local, plan.check_rank):
        yield Door(method.__name__, method, {"rank": 0})
    yield Door("plan ==", plan.__eq__, {"other": plan})
    for exchange in ("exact", "compacted", "all_gather", "ring", "ulysses"):
        route = plan.route(exchange)
        yield Door(f"{exchange} received", route.received, {"rank": 0})
        yield Door(f"{exchange} sent", route.sent, {"rank": 0})
        yield Door(f"{exchange} segments", route.segments, {"source": 0, "destination": 1})
        heads = {"query_heads": 2, "kv_heads": 2, "head_dim": 4, "dtype_bytes": 2}
        yield Door(f"{exchange} bytes", partial(_not_negative, route.bytes),
                   heads | {"backward": True, "gradient_wire": "fp32"})  # fmt: skip
    yield Door("lengths_of position_ids", flashcp.lengths_of, {"position_ids": [0, 1, 0]})
    yield Door("lengths_of cu_seqlens", flashcp.lengths_of, {"cu_seqlens": [0, 2, 3]})
    yield Door("lengths_of seq_idx", flashcp.lengths_of, {"seq_idx": [0, 0, 1]})
    yield Door("sample_lengths", sample_lengths, {"name": "pile", "count": 3, "seed": 0, "long_document_weight": 1.0,
                                                  "sigma": 1.0})  # fmt: skip
    sampled = {"name": "wlb_llm", "context": 64, "count": 2, "seed": 0, "overflow": "carry"}
    yield Door("windows", lambda **given: list(islice(windows(**given), 2)), sampled)
    packing = {"lengths": LENGTHS, "context": 4, "overflow": "carry", "first_start": 0, "keep_last": True}
    yield Door("pack_lengths", lambda **given: list(islice(pack_lengths(**given), 2)), packing, own="lengths")


def _not_negative(call: Callable[..., np.ndarray], **given: Any) -> None:
    assert (call(**given) >= 0).all()


def simulating() -> Iterator[Door]:
    heads = {"query_heads": 4, "kv_heads": 4, "head_dim": 16, "dtype_bytes": 2}
    yield Door("simulate", flashcp.simulate, heads | {
        "packs": [LENGTHS, [5, 2]], "world_size": 2, "cluster": "h100-nvlink", "methods": ["flashcp"],
        "overlap": "auto", "gradient_wire": "auto", "head_ranks": "auto", "batch_windows": 1, "micro_batches": 1,
        "plan_by": "rows", "waits": "step", "layers": 2, "ffn_dim": 0, "mask": "causal", "workers": 1})  # fmt: skip
    yield Door("simulate plans", flashcp.simulate, {"packs": _plan(), "world_size": None, "methods": "plan"})
    yield Door("predicted_time", flashcp.predicted_time, heads | {
        "cluster": "h100-nvlink", "exchange": "exact", "overlap": "none", "gradient_wire": "fp32",
        "head_ranks": 2})  # fmt: skip
    yield Door("choose", flashcp.choose, heads | {
        "batches": [LENGTHS], "world_size": 2, "cluster": "h100-nvlink", "gradient_wire": "auto",
        "strategy": "flashcp", "exchange": "exact", "data_parallel": 1, "overlap": "none"})  # fmt: skip
    simulation = flashcp.simulate(LENGTHS, 2, methods="flashcp")
    yield Door("Simulation column", simulation.column, {"name": "module_ms"})
    yield Door("read_cluster", clusters.read_cluster, {"name": "h100-nvlink"})
    yield Door("read_cluster_file", clusters.read_cluster_file, {"path": "conf/cluster/h100-nvlink.yaml"})
    yield Door("read_machine", clusters.read_machine, {"values": dataclasses.asdict(simulation.machine)})
    for name, number in parameters(simulation.machine).items():
        yield Door(f"check_machine {name}", partial(_machine, simulation.machine, name), {"value": number})
    for section in ("attention", "copies", "links", "published"):
        replaced = partial(dataclasses.replace, simulation.machine)
        yield Door(f"check_machine {section}", lambda made=replaced, **given: check_machine(made(**given)),
                   {section: getattr(simulation.machine, section)})  # fmt: skip
    yield Door("ModelShape", lambda **given: read_dataclass(ModelShape, given, "model"), heads | {"layers": 2})


def _machine(machine: Any, name: str, value: Any) -> None:
    """A machine with one number replaced, by its dotted name, checked."""
    sections, _, last = name.rpartition(".")
    chain = [machine]
    for section in filter(None, sections.split(".")):
        chain.append(getattr(chain[-1], section))
    made = dataclasses.replace(chain[-1], **{last: value})
    for owner, section in zip(chain[-2::-1], sections.split(".")[::-1], strict=False):
        made = dataclasses.replace(owner, **{section: made})
    check_machine(made)


def attending() -> Iterator[Door]:
    qkv = {"q": _rows(), "k": _rows(), "v": _rows()}
    scores = {"softmax_scale": 0.5, "softcap": 2.0, "sinks": torch.zeros(2)}
    packs = {"document_lengths": LENGTHS, "masks": flashcp.Mask()}
    yield Door("varlen_attention", flashcp.varlen_attention,
               qkv | scores | packs | {"attention": "auto", "tuning": None, "return_lse": False})  # fmt: skip
    yield Door("reference_attention", flashcp.reference_attention, qkv | scores | packs)
    yield Door("shift_labels", flashcp.shift_labels, {"labels": torch.arange(7), "document_lengths": LENGTHS,
                                                      "ignore": -100})  # fmt: skip
    yield Door("Blocks", Blocks, {"block_m": 16, "block_n": 16, "warps": 1, "stages": 1, "precision": "ieee"})
    yield Door("Tuning", Tuning, {"forward": None, "backward_kv": None, "backward_q": None, "deterministic": True})
    yield Door("Blocks from_text", Blocks.from_text, {"text": "16x16x1x1"})
    yield Door("Tuning from_text", Tuning.from_text, {"text": "forward=16x16x1x1"})


def joined() -> Iterator[Door]:
    """`ContextParallel` of one rank alone."""
    yield Door("TransportOptions", flashcp.TransportOptions, {"heap_mib": 1.0, "region_mib": 1.0, "throttle_gbps": 0.0})
    yield Door("ContextParallel", flashcp.ContextParallel, {
        "group": None, "exchange": "exact", "overlap": "auto", "attention": "auto", "transport": "auto",
        "backward": "keep", "timeout_s": 60.0, "tuning": None, "stages": 2, "options": None, "head_ranks": 1,
        "gradient_wire": "auto", "verify_rows": False})  # fmt: skip
    cp, plan = flashcp.ContextParallel(), _plan(1)
    layer = {"plan": plan, "window": None, "chunk": None}
    qkv = {"q": _rows(), "k": _rows(), "v": _rows()}
    scores = {"softmax_scale": 0.5, "softcap": 2.0, "sinks": torch.zeros(2), "return_lse": True}
    received = {"received_k": torch.empty(0, 2, 4), "received_v": torch.empty(0, 2, 4)}
    yield Door("cp.attention", cp.attention, qkv | layer | scores)
    yield Door("cp.attend", cp.attend, qkv | received | layer | scores)
    yield Door("cp.prefetch", lambda **given: cp.prefetch(**given).attention(_rows()),
               {"k": _rows(), "v": _rows()} | layer)  # fmt: skip
    yield Door("Handle.attention", lambda **given: cp.prefetch(_rows(), _rows(), plan).attention(**given),
               {"q": _rows()} | scores)  # fmt: skip
    yield Door("cp.gather", cp.gather, {"x": _rows()} | layer)
    yield Door("cp.prefetch_gather", lambda **given: cp.prefetch_gather(**given).rows(), {"x": _rows()} | layer)
    yield Door("cp.reshard", cp.reshard, {"x": _rows(), "before": plan, "after": flashcp.plan([7], 1, "contiguous")})
    yield Door("cp.prefetch_reshard", lambda **given: cp.prefetch_reshard(**given).rows(),
               {"x": _rows(), "before": plan, "after": plan})  # fmt: skip
    yield Door("cp.shard", cp.shard, {"x": _rows(), "plan": plan, "dim": 0})
    yield Door("cp.unshard", cp.unshard, {"local": _rows(), "plan": plan, "dim": 0})
    yield Door("cp.position_ids", cp.position_ids, {"plan": plan, "device": None})
    yield Door("cp.sum_gradients", cp.sum_gradients, {"model": torch.nn.Linear(1, 1)})


def training() -> Iterator[Door]:
    """The configuration of a training run as mappings give it, checked for one rank."""
    whole = dataclasses.asdict(TrainConfig())
    for field, value in whole.items():
        yield Door(f"TrainConfig {field}", _checked, {field: value})
        for inner, deeper in value.items() if isinstance(value, dict) else ():
            call = partial(lambda section, **given: _checked(**{section: {**whole[section], **given}}), field)
            yield Door(f"TrainConfig {field}.{inner}", call, {inner: deeper})
    for name, options in STRATEGY_OPTIONS.items():
        for option in options:
            call = partial(lambda name, **given: _checked(sharding={"name": name, **given}), name)
            yield Door(f"TrainConfig sharding={name} {option}", call, {option: options[option]})
    yield Door("TrainConfig.from_dict", TrainConfig.from_dict, {"values": whole})
    yield Door("TrainConfig.check", TrainConfig().check, {"world_size": 1})


def _checked(**values: Any) -> None:
    TrainConfig.from_dict(values).check(1)


DOORS = {
    "planning": planning,
    "simulating": simulating,
    "attending": attending,
    "joined": joined,
    "training": training,
}
