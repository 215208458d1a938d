"""`flashcp.simulate`: what packs, or plans of them, would cost on a cluster, before anyone rents it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashcp.clusters import clusters, read_cluster
from flashcp.sharding.documents import read_document_lengths
from flashcp.sharding.mask import Mask, read_layers
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.values import check_choice, holds_items, read_list, shown
from flashcp.simulator.cost import ModelShape
from flashcp.simulator.machine import Machine, check_machine
from flashcp.simulator.pack import Pack
from flashcp.simulator.summary import BASELINE, Summary, recommendation, simulate_methods
from flashcp.simulator.variants import (
    PLAN_BY,
    choose_variants,
    make_setting,
    read_head_ranks,
    read_ranks,
    read_step,
    that_share_heads,
)
from flashcp.text import table


@dataclass(frozen=True)
class Simulation:
    """A table: one `Summary` a method, in the order of `methods`. `print` shows it.

    machine: what was simulated. windows: packs that the numbers are means over. left_out: methods that these heads do
    not allow, and why; empty where there are none. batch_windows: of a batch. model: whose layer it is.
    """

    methods: tuple[Summary, ...]
    machine: Machine
    world_size: int
    windows: int
    left_out: str = ""
    batch_windows: int = 1
    model: ModelShape = field(default_factory=ModelShape)

    @property
    def names(self) -> tuple[str, ...]:
        """The methods' names: the rows of the table."""
        return tuple(one.name for one in self.methods)

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a `Summary`: what `column` takes."""
        return Summary._fields

    @property
    def recommendation(self) -> str:
        """Which method to take, in a sentence."""
        return recommendation(self.methods)

    def column(self, name: str) -> dict[str, float | str]:
        """One field of every method, by the methods' names. Raises ValueError for a field that there is not."""
        if not isinstance(name, str) or name not in self.columns:
            raise ValueError(f"column {shown(name)}: expected one of {', '.join(self.columns)}")
        return {one.name: getattr(one, name) for one in self.methods}

    def __getitem__(self, method: str) -> Summary:
        """A method's numbers. Raises KeyError for a method that was not simulated."""
        if method not in self.names:
            raise KeyError(f"method {method!r}: expected one of {', '.join(self.names)}")
        return self.methods[self.names.index(method)]

    def __iter__(self) -> Iterator[Summary]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def __str__(self) -> str:
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        head = f"{windows}, {self.world_size} ranks; simulated on {self.machine.name}; {self.model}"
        if self.batch_windows > 1:
            head = head.replace(",", f" in batches of {self.batch_windows},", 1)
        left_out = f"; left out: {self.left_out}" if self.left_out else ""
        return f"{head}{left_out}\n{summary_table(self.methods)}"


def simulate(
    packs: object,
    world_size: int | None = None,
    *,
    cluster: str | Machine = "h100-nvlink",
    methods: str | Iterable[str] = (),
    overlap: str = "auto",
    gradient_wire: str = "auto",
    head_ranks: int | str = "auto",
    plan_by: str = "time",
    batch_windows: int = 1,
    micro_batches: int = 1,
    waits: str = "micro_batch",
    query_heads: int = 32,
    kv_heads: int = 32,
    head_dim: int = 128,
    dtype_bytes: int = 2,
    layers: int | Sequence[tuple[Mask, int]] = 32,
    ffn_dim: int = 0,
    mask: str = "causal",
    workers: int = 1,
) -> Simulation:
    """Simulate an attention layer, forward and backward, under each method; nothing is run and nothing measured.

    packs: document lengths of one pack, or of each of several; or a plan, or several plans of as many ranks.
    world_size: ranks; plans know their own, head_ranks times which are simulated.
    cluster: a name of `conf/cluster/`, or a `flashcp.simulator.machine.Machine` (see `flashcp.clusters`).
    methods: names of methods (`llama3`, `llama3_best_effort`, `flashcp`, ...) and pairs `SHARDING+EXCHANGE`, which
        are priced as our implementation runs them; none: all methods. Plans are compared with them under the name
        `plan`, or `plan+EXCHANGE`. After a name, `:h8` sets its head ranks, `:d2` the replicas that share a batch, and
        `:w2` the bytes of a number of a KV gradient on its wire: `flashcp:h8:w2`.
    overlap: of our implementation and of best efforts: `auto`, `none`, `staged` or `fused`.
    gradient_wire: what KV gradients travel in in our implementation, as for `flashcp.ContextParallel`.
    head_ranks: of methods that choose them (`flashcp`, `usp`, ...): a number, or `auto`, the fastest.
    plan_by: what chooses plans of the strategy `flashcp`: predicted `time` on this cluster, or, as where no cluster is
        named, `rows` and balance.
    batch_windows: of the packs that are one batch. Today's practice gives each a replica of world_size / batch_windows
        ranks, and the slowest counts; `flashcp` and pairs make one plan for all ranks.
    micro_batches: batches of a step. waits: for the slowest replica, every `micro_batch` (FSDP) or every `step` (DDP).
    query_heads, kv_heads, head_dim, dtype_bytes: of one attention layer.
    layers, ffn_dim: of the model, for `step_ms` and for buffers; ffn_dim 0: 8/3 of the width. Layers may be a mix of
        causal ones and of one kind with a window or chunk, as `flashcp.plan` takes it: numbers of a layer are then
        means. mask: of all documents, `causal` or `full`. Plans bring masks and layers of their own.
    workers: processes that share the packs.

    Returns a table with a row for each method. Times are milliseconds, speedups over `llama3` as published.
    Raises ValueError naming value, field and what is legal.
    """
    heads = read_head_ranks(head_ranks)
    check_choice("plan_by", plan_by, PLAN_BY)
    read, ranks = _read_packs(packs, world_size, heads or 1)
    machine = read_cluster_or_machine(cluster)
    model = ModelShape(
        query_heads, kv_heads, head_dim, dtype_bytes, ffn_dim=ffn_dim, mask=mask, name="", **_read_mix(layers)
    )
    setting = make_setting(machine, model, overlap, gradient_wire)
    step, given = read_step(batch_windows, micro_batches, waits, ranks), isinstance(read[0], ShardingPlan)
    if given and step.windows > 1:
        raise ValueError(f"batch_windows={batch_windows} with plans: expected 1, a plan holds its whole batch")
    chosen = choose_variants(methods, given, heads or 1)
    variants, left_out = that_share_heads(chosen, setting, ranks, step, heads)
    told: dict[str, Any] = {"step": step, "head_ranks": heads, "plan_by": plan_by, "workers": workers}
    summaries = simulate_methods(read, variants, ranks, setting, model, **told)
    return Simulation(tuple(summaries), machine, ranks, len(read), left_out, step.batch_windows, model)


def read_cluster_or_machine(cluster: object) -> Machine:
    """A Machine by its cluster's name, or itself. Raises ValueError, naming what is legal, for anything else."""
    if isinstance(cluster, Machine):
        check_machine(cluster)
        return cluster
    if isinstance(cluster, str):
        return read_cluster(cluster)
    raise ValueError(f"cluster={shown(cluster)}: expected one of {', '.join(clusters())}, or a Machine")


def _read_mix(layers: object) -> dict[str, int]:
    """Layers as fields of a ModelShape. Raises ValueError for a mix of more than one kind beside causal ones."""
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        return {"layers": layers}  # type: ignore[dict-item]  # checked with the model's other numbers
    kinds = read_layers(layers)
    narrowed = [kind for kind in kinds if kind.window or kind.chunk]
    if len(narrowed) > 1:
        expected = "causal layers and one kind of others; simulate a plan for more"
        raise ValueError(f"layers={shown(layers)}: expected {expected}")
    fields = {"layers": sum(kind.layers for kind in kinds)}
    for kind in narrowed:
        fields |= {"window": kind.window, "chunk": kind.chunk, "narrowed_layers": kind.layers}
    return fields


def _read_packs(packs: object, world_size: int | None, heads: int) -> tuple[list[Pack], int]:
    """Plans or document lengths, and the ranks they are for. heads: ranks that a plan's holder has."""
    expected = "document lengths of a pack or of several, or plans"
    given = [packs] if isinstance(packs, ShardingPlan) else read_list("packs", packs, expected)
    if not given:
        raise ValueError(f"packs={shown(packs)}: expected {expected}")
    if not isinstance(given[0], ShardingPlan):
        ranks = read_ranks(world_size)
        many = given if holds_items(given[0]) else [given]
        return [read_document_lengths(pack) for pack in many], ranks  # type: ignore[arg-type]
    plans = [plan for plan in given if isinstance(plan, ShardingPlan)]
    if len(plans) < len(given):
        other = next(pack for pack in given if not isinstance(pack, ShardingPlan))
        raise ValueError(f"packs holds a plan and {shown(other)}: expected plans alone, or document lengths alone")
    told_ranks = None if world_size is None else read_ranks(world_size)
    sizes = {plan.world_size * heads for plan in plans} | ({told_ranks} if told_ranks else set())
    if len(sizes) > 1:
        told = "" if world_size is None else f"world_size={world_size!r} with "
        found = ", ".join(map(str, sorted({plan.world_size * heads for plan in plans})))
        raise ValueError(f"{told}plans for {found} ranks: expected one number of ranks")
    return list(plans), read_ranks(plans[0].world_size * heads)


def summary_table(summaries: Sequence[Summary]) -> str:
    """The numbers people ask for first, one line a method."""
    columns = {
        "method": "{name}",
        "imbalance": "{imbalance:.3f}",
        "saving": "{saving:.3f}",
        "attention ms": "{attention_ms:.2f}",
        "copies": "{copies_ms:.2f}",
        "exposed": "{exposed_exchange_ms:.2f}",
        "module ms": "{module_ms:.2f}",
        "p50": "{module_ms_p50:.2f}",
        "p95": "{module_ms_p95:.2f}",
        f"speedup over {BASELINE}": "{speedup:.2f}",
        "step ms": "{step_ms:.0f}",
        "KV GiB": "{kv_gib:.1f}",
        "replicas": "{data_parallel}",
        "head ranks": "{head_ranks}",
    }
    numbers = [{**one._asdict(), "kv_gib": one.kv_buffer_mib / 1024} for one in summaries]
    return table(list(columns), [[text.format(**one) for text in columns.values()] for one in numbers])
