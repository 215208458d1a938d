"""What can be simulated, and what a caller chooses of it, checked at the door: ranks, heads, overlap, methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from flashcp.sharding.documents import MOST_TOKENS
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.mask import MOST_LAYERS, read_layers
from flashcp.sharding.methods import METHODS
from flashcp.sharding.route import GRADIENT_WIRES, read_heads, wire_bytes
from flashcp.sharding.strategies import STRATEGIES
from flashcp.sharding.values import check_choice, read_list, read_whole, shown
from flashcp.simulator.cost import AttentionShape, ModelShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.members import legal_head_ranks
from flashcp.simulator.planned import Setting
from flashcp.simulator.rivals import RIVALS

MOST_RANKS = 1024
MOST_METHODS = 10_000
MOST_WINDOWS = 2**31 - 1
WAITS = ("micro_batch", "step")
PLAN_BY = ("time", "rows")
CHANGE = re.compile("(h|d|w(?=[24]$))(0|[1-9][0-9]{0,3})")
CHANGES = {"h": "head_ranks", "d": "data_parallel", "w": "gradient_bytes"}
WIRES = {2: "model", 4: "fp32"}
GIVEN_PLAN = "plan"
"""The strategy of a plan that the caller made."""


class Step(NamedTuple):
    """What all ranks of a job do in a step: `micro_batches` times a batch of `batch_windows` windows.

    waits: for the slowest replica, after every `micro_batch` (FSDP) or once a `step` (DDP).
    """

    batch_windows: int = 1
    micro_batches: int = 1
    waits: str = "micro_batch"

    @property
    def windows(self) -> int:
        return self.batch_windows * self.micro_batches


WINDOW = Step()
"""A window by itself."""


class Variant(NamedTuple):
    """A strategy and an exchange, and who runs them.

    implementation: `published`: with the copies, the exposed collectives or the kernel a step that the authors' code
    has. `best effort`: what could be made of the method at most. `ours`: the code of this project.
    head_ranks: of a holder (`flashcp.simulator.heads`); 0: as many as make it fastest. data_parallel: replicas that
    share a batch's windows evenly; 0: a replica for each window, which is today's practice; 1: one plan for all.
    gradient_bytes: of a number of a KV gradient on the wire, 2 (the model's) or 4; 0: as the setting says. dealt:
    windows go to replicas by work. timed: of the plans that the strategy `flashcp` compares, the one predicted to be
    fastest.
    """

    name: str
    sharding: str
    exchange: str
    implementation: str = "ours"
    head_ranks: int = 1
    data_parallel: int = 1
    gradient_bytes: int = 0
    dealt: bool = False
    timed: bool = False

    @property
    def published(self) -> bool:
        """Whether the authors' code runs it."""
        return self.implementation == "published"

    def wire(self, told: str) -> str:
        """What KV gradients travel in, where `told` is what the setting says; nobody but us sends more than the model's
        dtype."""
        return WIRES.get(self.gradient_bytes, told) if self.implementation == "ours" else WIRES[2]

    def wire_bytes(self, setting: Setting) -> int:
        """Bytes of a number of a KV gradient between holders."""
        return wire_bytes(
            setting.shape.dtype_bytes, self.wire(setting.gradient_wire), EXCHANGES[self.exchange].roundings
        )

    def planned_by(self, plan_by: str) -> Variant:
        """The method with plans chosen by predicted `time`, where its strategy can, or by `rows` and balance."""
        return self._replace(timed=plan_by == "time" and self.sharding == "flashcp")

    def trials(self, setting: Setting, ranks: int, step: Step, head_ranks: int = 0) -> list[Variant]:
        """The method with each number of head ranks that it may have; none where ranks cannot share out heads so.

        head_ranks: of methods that take the fastest; 0: any.
        """
        replica = ranks // (self.data_parallel or step.batch_windows)
        legal = legal_head_ranks(setting.shape, setting.machine.links, replica)
        wanted = replica if self.exchange == "ulysses" else self.head_ranks or head_ranks
        return [self._replace(head_ranks=h) for h in legal if wanted in (0, h)]


HEADS = {
    "usp": ("contiguous", "ring"),
    "usp_zigzag": ("per_document", "ring"),
    "a2a_all_gather": ("per_document", "all_gather"),
}
"""Published methods with head ranks, each with the h that makes it fastest. usp: DeepSpeed-Ulysses within and ring
attention across (USP, arXiv 2405.07719; LoongTrain's 2D attention, arXiv 2406.18485, whose double ring and whose
placements of the two groups are left out), usp_zigzag with the zigzag of each document. a2a_all_gather: Megatron's
hierarchical context parallelism with its all-gather across (Transformer Engine has `a2a+p2p` and `all_gather`)."""
_METHODS = [
    *(
        Variant(*method, "published", data_parallel=0, dealt=method.name == "wlb_adaptive")
        for method in METHODS.values()
        if method.name != "flashcp"
    ),
    *(Variant(name, *pair, "published", head_ranks=0, data_parallel=0) for name, pair in HEADS.items()),
    Variant(*METHODS["flashcp"], head_ranks=0),
]
_BEST_EFFORTS = [
    variant._replace(name=f"{variant.name}_best_effort", implementation="best effort")
    for variant in _METHODS
    if variant.published
]
# FCP (arXiv 2605.08524) packs blocks: no way to cut is better than our planner's, which may cut anywhere.
_OF_BATCHES = [
    Variant(f"{name}_best_effort", sharding, "exact", "best effort")
    for name, sharding in {**{name: name for name in RIVALS}, "block_placement": "flashcp"}.items()
]
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (*_METHODS, *_BEST_EFFORTS, *_OF_BATCHES)}
"""By name: the methods, then the best efforts, last those that plan a batch (`flashcp.simulator.rivals`). `flashcp` is
ours; so is every pair SHARDING+EXCHANGE."""


def that_share_heads(
    variants: Sequence[Variant],
    setting: Setting,
    ranks: int,
    step: Step = WINDOW,
    head_ranks: int = 0,
    prefix: str = "",
) -> tuple[list[Variant], str]:
    """The variants whose heads these ranks can share out, and who is left out and why, empty where nobody is.

    prefix: of the fields in that text. Raises ValueError where none is left, and for head ranks or replicas that were
    asked for and cannot be.
    """
    legal = legal_head_ranks(setting.shape, setting.machine.links, ranks)
    if head_ranks and head_ranks not in legal:
        raise ValueError(f"head_ranks={head_ranks}: expected one of {', '.join(map(str, legal))}, or auto")
    for one in variants:
        if one.data_parallel and step.batch_windows % one.data_parallel:
            raise ValueError(f"methods: {one.name!r}: expected a divisor of batch_windows={step.batch_windows} after d")
    kept = [one for one in variants if one.trials(setting, ranks, step, head_ranks)]
    left = dict.fromkeys(one.name.removesuffix("_best_effort") for one in variants if one not in kept)
    if not left:
        return kept, ""
    shape, told = setting.shape, f", head_ranks={head_ranks}" if head_ranks else ""
    heads = f"{prefix}query_heads={shape.query_heads}, {prefix}kv_heads={shape.kv_heads}{told}"
    if not kept:
        raise ValueError(f"{', '.join(left)}: {heads} cannot be shared out among {ranks} ranks")
    return kept, f"{', '.join(left)}, for {heads} cannot be shared out among {ranks} ranks"


def read_head_ranks(head_ranks: object) -> int:
    """0 for `auto`. Raises ValueError for what is no number of them."""
    if isinstance(head_ranks, str) and head_ranks == "auto":
        return 0
    return read_whole("head_ranks", head_ranks, most=MOST_RANKS, expected="auto or a whole number >= 1")


def read_step(batch_windows: object, micro_batches: object, waits: str, ranks: int) -> Step:
    """Raises ValueError, naming value, field and what is legal, for what makes no step."""
    check_choice("waits", waits, WAITS)
    step = Step(
        read_whole("batch_windows", batch_windows, most=MOST_WINDOWS, expected="a whole number >= 1"),
        read_whole("micro_batches", micro_batches, most=MOST_WINDOWS, expected="a whole number >= 1"),
        waits,
    )
    if ranks % step.batch_windows:
        raise ValueError(f"batch_windows={shown(batch_windows)}: expected a divisor of world_size={ranks}")
    return step


def read_ranks(world_size: object) -> int:
    """Raises ValueError for a number of ranks that is not simulated."""
    return read_whole("world_size", world_size, most=MOST_RANKS)


def make_setting(
    machine: Machine, model: ModelShape, overlap: str = "auto", gradient_wire: str = "auto", prefix: str = ""
) -> Setting:
    """Where and how plans run. prefix: of the model's fields in messages.

    Raises ValueError naming value, field and what is legal.
    """
    check_choice("overlap", overlap, ("auto", "none", "staged", "fused"))
    check_choice("gradient_wire", gradient_wire, GRADIENT_WIRES)
    shape = AttentionShape(*read_heads(model.query_heads, model.kv_heads, model.head_dim, model.dtype_bytes, prefix))
    read_whole(f"{prefix}layers", model.layers, most=MOST_LAYERS)
    for name in ("ffn_dim", "width", "window", "chunk", "narrowed_layers"):
        read_whole(f"{prefix}{name}", getattr(model, name), 0, MOST_TOKENS, "a whole number >= 0 and < 2**31")
    try:
        mask, layers = model.mix()
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error
    # As in `ContextParallel`: `fused` is taken by name alone until a GPU has shown that it is faster.
    way = "staged" if overlap == "auto" else overlap
    return Setting(machine, shape, way, gradient_wire, mask=mask, layers=read_layers(layers))


def choose_variants(names: str | Iterable[str], given_plan: bool = False, given_heads: int = 1) -> list[Variant]:
    """Methods by name, and pairs SHARDING+EXCHANGE under our implementation; all methods where none is named.

    After a name `:h8`, `:d2` and `:w2` set head_ranks, data_parallel and gradient_bytes. given_plan: the caller has
    made the plans: `plan+EXCHANGE` is a pair too, `plan` is short for `plan+exact`, and that one stands first where
    none is named. given_heads: head ranks of the given plans' holders. Raises ValueError for other names.
    """
    listed = read_list("methods", [names] if isinstance(names, str) else names, "names of methods", MOST_METHODS)
    chosen = list(dict.fromkeys(_variant(name, given_plan, given_heads) for name in listed))
    return chosen or [*([_variant(GIVEN_PLAN, True, given_heads)] if given_plan else []), *VARIANTS.values()]


def _variant(name: object, given_plan: bool, given_heads: int) -> Variant:
    method, *changes = name.split(":") if isinstance(name, str) else [""]
    strategy, plus, exchange = method.partition("+")
    if given_plan and method == GIVEN_PLAN:
        plus, exchange = "+", "exact"
    known, found = [*STRATEGIES, GIVEN_PLAN] if given_plan else [*STRATEGIES], [*map(CHANGE.fullmatch, changes)]
    if (method not in VARIANTS and not (plus and strategy in known and exchange in EXCHANGES)) or not all(found):
        also = f"{GIVEN_PLAN}, " if given_plan else ""
        expected = f"{also}{', '.join(VARIANTS)}, or a pair SHARDING+EXCHANGE; :h8, :d2 or :w2 may follow"
        raise ValueError(f"methods: {shown(name)}: expected one of {expected}")
    heads = given_heads if strategy == GIVEN_PLAN else 1
    variant = VARIANTS.get(method) or Variant(str(name), strategy, exchange, head_ranks=heads)
    changed: dict[str, Any] = {CHANGES[change[1]]: int(change[2]) for change in found if change}
    return variant._replace(name=str(name), **changed)
