"""Head ranks: every strategy and exchange between holders of several ranks against the float64 reference, and what
users rely on beside the numbers."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.sharding.route import GRADIENT_WIRES
from tests.packs import AWKWARD, random_lengths, random_qkv, relative_error
from tests.ranks import run_cases, run_ranks

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = ((1, 2), (1, 3), (2, 2), (1, 4), (3, 2), (2, 3))
"""Holders and head ranks; `test_context_parallel.py` has those of one rank."""
KINDS = ("mha", "above", "equal", "below")
"""Of KV heads, compared with head ranks."""
LENGTHS = (50, 7, 1, 70)


class Case(NamedTuple):
    """One call on all ranks. prefetch: K and V leave before there are queries."""

    shape: tuple[int, int]
    strategy: str
    exchange: str
    kind: str
    dtype: torch.dtype
    overlap: str
    backward: str
    transport: str
    prefetch: bool
    gradient_wire: str
    lengths: tuple[int, ...] = LENGTHS

    @property
    def heads(self) -> tuple[int, int]:
        """Query and KV heads. `ulysses` between holders shares out what is left for a rank once more: KV heads as many
        as head ranks are then sent to several holders."""
        holders, ranks = self.shape
        least = ranks * (holders if self.exchange == "ulysses" else 1)
        kv_heads = {"mha": 4 * least, "above": 2 * least, "equal": ranks, "below": max(1, ranks // 2)}
        return 4 * least, kv_heads[self.kind]


def covering() -> list[Case]:
    """Every strategy with every exchange on every shape; the other settings are drawn, so that any two meet."""
    draw, cases = random.Random(1), []
    for shape, strategy, exchange in itertools.product(SHAPES, flashcp.strategies(), EXCHANGE_CLASSES):
        apart = shape[0] > 1  # else no rows travel between holders
        transport = draw.choice(("shm", "gloo", "shm+gloo", "gloo+shm") if apart else ("shm", "gloo"))
        waits = not apart or (transport.endswith("shm") and exchange in ("exact", "compacted", "all_gather"))
        settings = (KINDS, list(BOUND), ("none", "staged", *["fused"] * waits), ("keep", "refetch"), (True, False))
        kind, dtype, overlap, backward, prefetch = map(draw.choice, settings)
        wire = GRADIENT_WIRES[len(cases) % 3]
        lengths = draw.choice((*AWKWARD, random_lengths(len(cases), 12)))
        how = kind, dtype, overlap, backward, transport, prefetch, wire
        cases.append(Case(shape, strategy, exchange, *how, lengths))
    return cases


def test_any_two_settings_meet_in_a_case() -> None:
    cases = covering()
    for one, other in itertools.combinations(Case._fields[:-1], 2):
        seen = {(getattr(case, one), getattr(case, other)) for case in cases}
        every = set(itertools.product({a for a, _ in seen}, {b for _, b in seen}))
        never = {pair for pair in every if not _fits(dict(zip((one, other), pair, strict=True)))}
        assert every - seen == never, (one, other)


def _fits(settings: dict[str, object]) -> bool:
    """Whether two settings go together: two transports want two holders, `fused` one between them that it waits on."""
    (holders, _), transport = settings.get("shape", (0, 0)), str(settings.get("transport", ""))  # type: ignore[misc]
    return not (holders == 1 and "+" in transport) and (settings.get("overlap"), transport) != ("fused", "shm+gloo")


def errors_on_rank(case: Case) -> float:
    """The largest relative error of out and of all gradients of the whole pack, brought together from the ranks."""
    cp = flashcp.ContextParallel(
        exchange=case.exchange,
        overlap=case.overlap,
        backward=case.backward,
        transport=case.transport,
        head_ranks=case.shape[1],
        gradient_wire=case.gradient_wire,
        timeout_s=20,
    )
    assert (cp.holders, cp.head_ranks, cp.transport) == (*case.shape, _both(case))
    plan = flashcp.plan(case.lengths, cp.holders, case.strategy)
    q, k, v, grad = random_qkv(sum(case.lengths), *case.heads, 8, case.dtype, seed=len(case.lengths))
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    out = cp.prefetch(*local[1:], plan).attention(local[0]) if case.prefetch else cp.attention(*local, plan)
    assert out.dtype == case.dtype
    gradients = torch.autograd.grad(out, local, cp.shard(grad, plan))
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    reference = flashcp.reference_attention(*whole, case.lengths)
    expected = (reference, *torch.autograd.grad(reference, whole, grad.double()))
    got = [cp.unshard(x.detach(), plan) for x in (out, *gradients)]
    cp.synchronize()
    return max(map(relative_error, got, expected))


def _both(case: Case) -> str:
    """The name of the transports of both levels."""
    return case.transport if case.shape[0] == 1 or "+" in case.transport else f"{case.transport}+{case.transport}"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_every_strategy_and_exchange_matches_the_reference(shape: tuple[int, int]) -> None:
    cases = [case for case in covering() if case.shape == shape]
    assert len(cases) == len(flashcp.strategies()) * len(EXCHANGE_CLASSES)
    for case, errors in zip(
        cases, run_cases(errors_on_rank, shape[0] * shape[1], [(case,) for case in cases]), strict=True
    ):
        assert max(errors) < BOUND[case.dtype], (case, errors)


CALLS = [*itertools.product(EXCHANGE_CLASSES, ("shm", "gloo")), ("exact", "shm+gloo"), ("ring", "gloo+shm")]


def sharded(cp: flashcp.ContextParallel, plan: flashcp.ShardingPlan, seed: int = 0) -> list[torch.Tensor]:
    """This rank's rows of q, k, v and of the gradient of the output."""
    *qkv, grad = random_qkv(int(plan.offsets[-1]), 8, 4, 8, torch.float32, seed)
    return [*(cp.shard(x, plan).requires_grad_() for x in qkv), cp.shard(grad, plan)]


def probe(exchange: str, transport: str) -> tuple[list[int], bool]:
    """Change one token of document 0: changed rows of output and gradients, its own and those of the others. And
    whether two runs are equal bit for bit."""
    cp = flashcp.ContextParallel(exchange=exchange, transport=transport, head_ranks=2, timeout_s=20)
    plan = flashcp.plan(LENGTHS, cp.holders, "per_document")

    def run(change: float) -> list[torch.Tensor]:
        *qkv, grad = random_qkv(sum(LENGTHS), 8, 4, 8, torch.float32, seed=0)
        for x in qkv:
            x[3] += change
        local = [cp.shard(x, plan).requires_grad_() for x in qkv]
        out = cp.attention(*local, plan)
        gradients = torch.autograd.grad(out, local, cp.shard(grad, plan))
        return [cp.unshard(x.detach(), plan) for x in (out, *gradients)]

    before, after, again = run(0.0), run(1.0), run(0.0)
    changed = [(a != b).flatten(1).any(1) for a, b in zip(before, after, strict=True)]
    counts = [int(x[: LENGTHS[0]].sum()) for x in changed] + [int(x[LENGTHS[0] :].sum()) for x in changed]
    return counts, all(map(torch.equal, before, again))


def test_no_document_sees_another_and_runs_repeat_bit_for_bit() -> None:
    for case, ranks in zip(CALLS, run_cases(probe, 4, CALLS), strict=True):
        for counts, same in ranks:
            assert min(counts[:4]) > 0, case  # the probe does change its own document
            assert counts[4:] == [0, 0, 0, 0], case
            assert same, case


def used_in_every_way(exchange: str, transport: str) -> None:
    """Handles thrown away and used, graphs thrown away, computed again and walked back twice, no gradients at all."""
    cp = flashcp.ContextParallel(exchange=exchange, transport=transport, head_ranks=2, timeout_s=20)
    plan = flashcp.plan(LENGTHS, cp.holders, "per_document")
    q, k, v, grad = sharded(cp, plan)
    leaves = (q, k, v)
    out = cp.attention(*leaves, plan)
    expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    ahead = [cp.prefetch(k, v, plan) for _ in range(3)]
    del ahead[1]
    others = sharded(cp, plan, seed=1)
    cp.attention(*others[:3], plan)  # a graph that nobody walks back
    assert torch.equal(ahead[0].attention(q), out)
    assert torch.equal(ahead[1].attention(q), out)
    with pytest.raises(RuntimeError, match="prefetch again"):
        ahead[0].attention(q)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(cp.attention(*leaves, plan), out)
    again = checkpoint(lambda *x: cp.attention(*x, plan), *leaves, use_reentrant=False)
    for graph in (again, out):
        assert all(map(torch.equal, torch.autograd.grad(graph, leaves, grad), expected))
    cp.synchronize()


def test_handles_and_graphs_may_be_thrown_away_and_used_again() -> None:
    run_cases(used_in_every_way, 4, CALLS)


def layers_and_steps(exchange: str, transport: str) -> float:
    """The largest error over steps of layers whose rows all differ: a row of another layer or step would show."""
    cp = flashcp.ContextParallel(exchange=exchange, transport=transport, head_ranks=2, timeout_s=20)
    worst = 0.0
    for step in range(2):
        lengths = random_lengths(step, 20)
        plan = flashcp.plan(lengths, cp.holders, "per_document")
        rows = [sharded(cp, plan, seed=10 * step + layer) for layer in range(4)]
        graphs = [cp.attention(*leaves[:3], plan) for leaves in rows]
        for layer in reversed(range(len(rows))):
            *whole, grad = random_qkv(sum(lengths), 8, 4, 8, torch.float32, seed=10 * step + layer)
            whole = [x.double().requires_grad_() for x in whole]
            reference = flashcp.reference_attention(*whole, lengths)
            wanted = [reference, *torch.autograd.grad(reference, whole, grad.double())]
            leaves = rows[layer]
            found = [graphs[layer], *torch.autograd.grad(graphs[layer], leaves[:3], leaves[3])]
            pairs = zip(found, wanted, strict=True)
            worst = max(worst, *(relative_error(a.detach(), cp.shard(b.detach(), plan)) for a, b in pairs))
    return worst


def test_layers_and_steps_leave_no_stale_row() -> None:
    assert max(max(errors) for errors in run_cases(layers_and_steps, 4, CALLS)) < 1e-5


def buffers_after_steps(backward: str) -> list[int]:
    """Bytes of all receive buffers after each step of three layers and a call without gradients."""
    cp = flashcp.ContextParallel(transport="shm", head_ranks=2, backward=backward, timeout_s=20)
    plan, sizes = flashcp.plan([4000], cp.holders), []
    for _ in range(5):
        layers = [sharded(cp, plan, seed=layer) for layer in range(3)]
        graphs = [cp.attention(*leaves[:3], plan) for leaves in layers]
        while graphs:
            *leaves, grad = layers[len(graphs) - 1]
            torch.autograd.grad(graphs.pop(), leaves, grad)
        with torch.no_grad():
            cp.attention(*leaves, plan)
        sizes.append(cp.receive_bytes)
    return sizes


def test_q_k_and_v_wait_in_their_inboxes_unless_buffers_are_to_be_small() -> None:
    """Those of three layers, not of one at a time; inboxes of a step that is over are taken again."""
    (keep, *_), (refetch, *_) = (run_ranks(buffers_after_steps, 2, backward) for backward in ("keep", "refetch"))
    assert len(set(keep[1:])) == 1, keep
    assert len(set(refetch[1:])) == 1, refetch
    assert keep[-1] > 2 * refetch[-1], (keep, refetch)


def rows_go_where_they_are_said_to(holders: int) -> None:
    cp = flashcp.ContextParallel(head_ranks=dist.get_world_size() // holders, timeout_s=20)
    assert (cp.world_size, cp.holders, cp.rank) == (dist.get_world_size(), holders, dist.get_rank())
    plan = flashcp.plan(LENGTHS, cp.holders, "per_document")
    full = torch.randn(3, sum(LENGTHS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(cp.unshard(cp.shard(full, plan, dim=1), plan, dim=1), full)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    assert torch.equal(cp.position_ids(plan), cp.shard(positions, plan))
    # Every rank weighs the copies of a row with rank + 1: the adjoint is their sum.
    local = cp.shard(full, plan, dim=1).requires_grad_()
    (gradient,) = torch.autograd.grad(cp.unshard(local, plan, dim=1), local, full * (cp.rank + 1))
    assert torch.allclose(gradient, local.detach() * sum(range(1, cp.world_size + 1)))
    rows = [cp.shard(torch.arange(sum(LENGTHS)), plan)]
    own = cp.rank % cp.head_ranks
    of_holder = torch.from_numpy(plan.rows(cp.rank // cp.head_ranks))
    cuts = [len(of_holder) * place // cp.head_ranks for place in (own, own + 1)]
    assert torch.equal(rows[0], of_holder[cuts[0] : cuts[1]])


def test_shard_unshard_and_positions() -> None:
    for ranks, holders in ((2, 1), (4, 2), (6, 3), (6, 2)):
        run_ranks(rows_go_where_they_are_said_to, ranks, holders)


def few_rows(exchange: str, shards: list[tuple[int, int, int, int]]) -> None:
    cp = flashcp.ContextParallel(exchange=exchange, head_ranks=2, timeout_s=20)
    lengths = [shards[-1][2]]
    plan = flashcp.ShardingPlan.from_shards(lengths, 2, shards)
    *qkv, grad = random_qkv(lengths[0], 4, 4, 8, torch.float32, seed=0)
    local = [cp.shard(x, plan).requires_grad_() for x in qkv]
    out = cp.attention(*local, plan)
    out.backward(cp.shard(grad, plan))
    full = flashcp.reference_attention(*qkv, lengths)
    assert torch.allclose(cp.unshard(out.detach(), plan).double(), full, atol=1e-5)


def test_ranks_and_holders_without_rows_take_part() -> None:
    plans = ([(0, 0, 10, 0)], [(0, 0, 1, 0), (0, 1, 2, 1)])
    run_cases(few_rows, 4, list(itertools.product(EXCHANGE_CLASSES, plans)))


def over_a_mesh(shape: tuple[int, int]) -> tuple[int, int, int]:
    cp = flashcp.ContextParallel(init_device_mesh("cpu", shape), timeout_s=20)
    plan = flashcp.plan(LENGTHS, cp.holders)
    q, k, v, _ = sharded(cp, plan)
    *qkv, _ = random_qkv(sum(LENGTHS), 8, 4, 8, torch.float32, 0)
    full = flashcp.reference_attention(*qkv, LENGTHS)
    assert torch.allclose(cp.unshard(cp.attention(q, k, v, plan), plan).double(), full, atol=1e-5)
    with pytest.raises(ValueError, match=f"head_ranks=7 with a mesh of {shape[0]} x {shape[1]}: expected {shape[1]}"):
        flashcp.ContextParallel(init_device_mesh("cpu", shape), head_ranks=7)
    return cp.rank, cp.holders, cp.head_ranks


def test_a_mesh_of_holders_and_head_ranks_stands_for_both() -> None:
    for shape in ((2, 2), (4, 1), (1, 4)):
        assert run_ranks(over_a_mesh, 4, shape) == [(rank, *shape) for rank in range(4)]


def what_does_not_fit() -> list[str]:
    said = []

    def note(call, *args, **named) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(ValueError, match="expect") as raised:
            call(*args, **named)
        said.append(str(raised.value))

    note(flashcp.ContextParallel, head_ranks=3)
    note(flashcp.ContextParallel, head_ranks=0)
    note(flashcp.ContextParallel, head_ranks=2, transport="shm+nope")
    note(flashcp.ContextParallel, head_ranks=1, transport="shm+gloo")
    note(flashcp.ContextParallel, head_ranks=2, transport="shm+nccl")
    cp = flashcp.ContextParallel(head_ranks=2, timeout_s=20)
    plan = flashcp.plan(LENGTHS, 2)
    rows = len(cp.position_ids(plan))
    x = torch.zeros(rows, 6, 8)
    note(cp.attention, x, x, x, flashcp.plan(LENGTHS, 4))
    note(cp.attention, x[:, :3], x[:, :3], x[:, :3], plan)
    note(cp.attention, x, x[:, :3], x[:, :3], plan)
    note(cp.attention, x[1:], x[1:], x[1:], plan)
    return said


def over_one_dim() -> tuple[int, int, int]:
    whole = init_device_mesh("cpu", (1, 4, 1), mesh_dim_names=("dp", "cp", "tp"))
    with flashcp.ContextParallel(whole["cp"], head_ranks=2, timeout_s=20) as cp:
        plan = flashcp.plan(LENGTHS, cp.holders)
        q, k, v, _ = sharded(cp, plan)
        *qkv, _ = random_qkv(sum(LENGTHS), 8, 4, 8, torch.float32, 0)
        full = flashcp.reference_attention(*qkv, LENGTHS)
        assert torch.allclose(cp.unshard(cp.attention(q, k, v, plan), plan).double(), full, atol=1e-5)
    wrong = {"a mesh of 1 x 4 x 1": whole, "'cp'": "cp", "3": 3, "-100": dist.GroupMember.NON_GROUP_MEMBER}
    outside = DeviceMesh("cpu", [0, 1, 2])
    for said, group in (wrong | {"a mesh of 3": outside} if cp.rank == 3 else wrong).items():
        expected = f"group={said}: expected a torch.distributed group or a mesh of one or two dims that this rank is a "
        with pytest.raises(ValueError, match=expected):
            flashcp.ContextParallel(group)
    return cp.rank, cp.holders, cp.head_ranks


def test_a_mesh_of_one_dim_stands_for_its_group_and_no_other_kind_of_group_does() -> None:
    assert run_ranks(over_one_dim, 4) == [(rank, 2, 2) for rank in range(4)]


def test_what_does_not_fit_is_said_in_one_line() -> None:
    expected = (
        "head_ranks=3 with 4 ranks: expected a number that divides them",
        "head_ranks=0: expected a whole number >= 1",
        "transport='shm+nope': expected one of auto, none, shm, gloo",
        "transport='shm+gloo': expected one name, for rows travel on one level",
        "transport='nccl' over gloo on one host: expected one of auto, shm, gloo",
        "plan for 4 ranks: expected one for 2 holders of 2 ranks",
        "query_heads=3, kv_heads=3: cannot be shared out among 2 ranks; expected multiples of 2, or",
        "query_heads=6, kv_heads=3: cannot be shared out among 2 ranks",
        "rows: expected 3",
    )
    for said in run_ranks(what_does_not_fit, 4):
        for text, part in zip(said, expected, strict=True):
            assert part in text
            assert "\n" not in text
