"""Masks, sinks, softcap and layer windows over every strategy and exchange against the float64 reference."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

import flashcp
from flashcp import Mask
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.sharding.plan import ShardingPlan
from tests.packs import random_qkv, relative_error
from tests.ranks import run_cases, run_ranks

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = ((97, 1, 40, 2, 29), (64,), (3, 150, 1, 1, 31))


def masks_of(kind: str, lengths: tuple[int, ...]) -> Mask | list[Mask]:
    """One for all, or one each: of every kind, of awkward sizes, blocks at the very start and end."""
    longest = max(lengths)
    mixed = [Mask("full"), Mask("prefix", 7), Mask("chunk", 5), Mask(), Mask("window", 2)]
    return {
        "causal": Mask(),
        "window 1": Mask("window", 1),
        "window 17": Mask("window", 17),
        "window of all": Mask("window", longest + 1),
        "chunk": Mask("chunk", 16),
        "full": Mask("full"),
        "prefix": Mask("prefix", 13),
        "blocks": [Mask(blocks=[(0, min(5, n)), *([(n - 9, n)] if n > 20 else [])]) for n in lengths],
        "blocks and window": [Mask("window", 6, [(n // 3, n // 2)] if n > 8 else []) for n in lengths],
        "mixed": [mixed[i % 5] for i in range(len(lengths))],
    }[kind]


KINDS = ("causal", "window 1", "window 17", "window of all", "chunk", "full", "prefix", "blocks", "blocks and window",
         "mixed")  # fmt: skip


def errors_on_rank(
    lengths: tuple[int, ...],
    kind: str,
    strategy: str,
    exchange: str,
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    with_sinks: bool = False,
    overlap: str = "auto",
    transport: str = "auto",
    backward: str = "keep",
    head_ranks: int = 1,
    attention: str = "auto",
) -> dict[str, float]:
    """Relative errors of out, log-sum-exp and all gradients of the whole pack, brought together from the ranks."""
    cp = flashcp.ContextParallel(
        exchange=exchange, overlap=overlap, transport=transport, backward=backward, head_ranks=head_ranks, timeout_s=20,
        attention=attention,
    )  # fmt: skip
    plan = flashcp.plan(lengths, cp.holders, strategy, masks=masks_of(kind, lengths))
    q, k, v, grad = random_qkv(sum(lengths), 12, 12 if exchange == "ulysses" else 6, 16, dtype, 5)
    q[::11] *= 12  # spikes: a wrong rescale hides behind small scores
    sinks = torch.linspace(-3, 6, 12).requires_grad_() if with_sinks else None
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    out, lse = cp.attention(*local, plan, window=window, softcap=softcap, sinks=sinks, return_lse=True)
    inputs = [*local, *([sinks] if sinks is not None else [])]
    gradients = torch.autograd.grad(out, inputs, cp.shard(grad, plan))

    whole = [x.double().requires_grad_() for x in (q, k, v)]
    sinks64 = None if sinks is None else sinks.detach().double().requires_grad_()
    masks = masks_of(kind, lengths)
    if window is not None:  # what a layer's window makes of the kinds that are used with one
        each = masks if isinstance(masks, list) else [masks] * len(lengths)
        masks = [Mask("window", min(window, one.size or window), one.blocks) for one in each]
    reference = flashcp.reference_attention(*whole, lengths, masks=masks, softcap=softcap, sinks=sinks64)
    wanted = [*whole, *([sinks64] if sinks64 is not None else [])]
    expected = torch.autograd.grad(reference, wanted, grad.double())
    got = [cp.unshard(x.detach(), plan) for x in (out, *gradients[:3])]
    size = float(grad.norm() * q.abs().max() * v.abs().max())  # of the terms of gradients that cancel: a row alone
    errors = {
        name: relative_error(found, wanted) if wanted.norm() > 1e-9 * size else float(found.norm()) / size
        for name, found, wanted in zip(("out", "q", "k", "v"), got, (reference, *expected), strict=False)
    }
    if sinks is not None:  # each rank has its rows' part, or its heads'
        parts = [torch.zeros(12) for _ in range(cp.world_size)]
        if cp.world_size > 1:
            torch.distributed.all_gather(parts, gradients[3])
        else:
            parts = [gradients[3]]
        errors["sinks"] = relative_error(sum(parts), expected[3])  # type: ignore[arg-type]
    ones = flashcp.reference_attention(whole[0], whole[1], torch.ones_like(whole[2]), lengths, masks=masks,
                                       softcap=softcap, sinks=sinks64)  # fmt: skip
    if sinks is not None:  # a row of ones gives what the sinks leave: 1 - exp(sink - lse)
        share = torch.exp(sinks.detach().double() - cp.unshard(lse, plan).double())
        errors["lse"] = relative_error(1 - share, ones[..., 0])
    return errors


def check(world_size: int, cases: list[tuple]) -> None:
    for case, ranks in zip(cases, run_cases(errors_on_rank, world_size, cases), strict=True):
        for rank, errors in enumerate(ranks):
            assert max(errors.values()) < BOUND[case[4]], f"rank {rank} of {world_size}, {case}: {errors}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_mask_strategy_and_exchange_matches_the_reference(world_size: int) -> None:
    """Each kind with each exchange, and with each strategy; the pairs of those two take turns."""
    cases = []
    for i, (kind, exchange) in enumerate(itertools.product(KINDS, EXCHANGE_CLASSES)):
        strategy = flashcp.strategies()[(i + i // 6) % 6]
        dtype = torch.bfloat16 if i % 4 == 3 else torch.float32
        cases.append((LENGTHS[i % 3], kind, strategy, exchange, dtype))
    check(world_size, cases)


@pytest.mark.parametrize("world_size", [2, 4])
def test_layers_narrow_the_plan(world_size: int) -> None:
    rng = random.Random(world_size)
    cases = []
    for i, (kind, exchange) in enumerate(itertools.product(("causal", "window 17", "blocks"), EXCHANGE_CLASSES)):
        overlap, transport = (("none", "gloo"), ("staged", "shm"), ("auto", "auto"))[i % 3]
        window = rng.choice([1, 5, 33])
        cases.append((LENGTHS[i % 3], kind, flashcp.strategies()[i % 6], exchange, torch.float32, window, None, False,
                      overlap, transport, ("keep", "refetch")[i % 2]))  # fmt: skip
    check(world_size, cases)


@pytest.mark.parametrize(("world_size", "head_ranks"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)])
def test_sinks_and_softcap(world_size: int, head_ranks: int) -> None:
    cases = []
    for i, exchange in enumerate(("exact", "ring", "all_gather", "ulysses") if head_ranks == 1 else ("exact", "ring")):
        for kind, softcap, sinks in (("causal", None, True), ("window 17", 5.0, False), ("mixed", 20.0, True)):
            cases.append((LENGTHS[i % 3], kind, "flashcp", exchange, torch.float32, None, softcap, sinks,
                          "auto", "auto", "keep", head_ranks))  # fmt: skip
    check(world_size, cases)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_varlen_kernel_computes_windows_and_softcap(world_size: int) -> None:
    cases = []
    for i, exchange in enumerate(EXCHANGE_CLASSES):
        for kind, window, softcap in (("window 17", None, None), ("full", None, 9.0), ("causal", 9, 5.0)):
            cases.append((LENGTHS[i % 3], kind, "flashcp", exchange, torch.float32, window, softcap, i % 2 == 0,
                          "auto", "auto", "keep", 1, "varlen"))  # fmt: skip
    check(world_size, cases)


def chunks_by_varlen() -> str:
    """Document 1 has chunks, and rank 0 no row of it."""
    cp = flashcp.ContextParallel(attention="varlen", timeout_s=20)
    plan = ShardingPlan.from_shards([8, 8], 2, [(0, 0, 8, 0), (1, 0, 8, 1)], [Mask(), Mask("chunk", 4)])
    q = torch.zeros(8, 2, 8)
    with pytest.raises(ValueError, match="expected window, full or causal documents") as caught:
        cp.attention(q, q, q, plan)
    return str(caught.value)


def test_what_a_kernel_does_not_compute_is_refused_on_every_rank() -> None:
    for said in run_ranks(chunks_by_varlen, 2):
        assert said == "attention='varlen:sdpa' with chunks: expected window, full or causal documents"


def bytes_of_layers() -> list[tuple[int, int]]:
    """Bytes that left this rank in one pass, and what the route says, layer kind by layer kind."""
    cp = flashcp.ContextParallel(timeout_s=20)
    lengths = (300, 60, 24)
    plan = flashcp.plan(lengths, cp.world_size, layers=[(Mask(), 1), (Mask("window", 16), 5)])
    q, k, v = (cp.shard(torch.randn(sum(lengths), 2, 8), plan) for _ in range(3))
    counted = []
    for window in (None, 16, 1):
        before = cp.sent_bytes
        with torch.no_grad():
            cp.attention(q, k, v, plan, window=window)
        route = plan.route("exact", window=window)
        counted.append((cp.sent_bytes - before, int(route.bytes(2, 2, 8, 4)[cp.rank])))
    return counted


def test_a_window_layer_sends_its_halo_under_the_plan_of_the_mix() -> None:
    sums = [0, 0, 0]
    for counted in run_ranks(bytes_of_layers, 3):
        assert all(sent == said for sent, said in counted), counted
        sums = [total + sent for total, (sent, _) in zip(sums, counted, strict=True)]
    whole, halo, nothing = sums
    assert nothing == 0
    assert 0 < halo < whole / 3


def probe(kind: str, exchange: str, window: int | None) -> list[str]:
    """Rows whose results change when another row does, though they do not see it."""
    cp = flashcp.ContextParallel(exchange=exchange, overlap="none", timeout_s=20)
    lengths = (41, 9, 30)
    plan = flashcp.plan(lengths, cp.world_size, "per_document", masks=masks_of(kind, lengths))
    full = random_qkv(sum(lengths), 2, 2, 8, torch.float32, 4)[:3]
    layer = plan.narrow(window)
    wrong = []

    def out(k: Tensor, v: Tensor) -> Tensor:
        local = [cp.shard(x, plan) for x in (full[0], k, v)]
        return cp.unshard(cp.attention(*local, plan, window=window), plan)

    healthy = out(*full[1:])
    for changed in range(0, sum(lengths), 7):
        document = int(torch.searchsorted(torch.tensor(plan.offsets.copy()), changed, right=True)) - 1
        key = changed - int(plan.offsets[document])
        readers = slice(
            int(plan.offsets[document] + layer.masks.first_reader(document, key)),
            int(plan.offsets[document] + layer.masks.past_reader(document, key)),
        )
        k, v = (x.clone() for x in full[1:])
        k[changed], v[changed] = 9.0, -7.0
        differs = (out(k, v) != healthy).flatten(1).any(dim=1)
        if not differs[readers].all() or differs[: readers.start].any() or differs[readers.stop :].any():
            wrong.append(f"row {changed}, read by {readers}: {torch.nonzero(differs).flatten().tolist()}")
    return wrong


@pytest.mark.parametrize(("kind", "exchange", "window"), [
    ("mixed", "exact", None), ("blocks and window", "all_gather", None), ("causal", "exact", 5), ("full", "ring", None),
])  # fmt: skip
def test_a_row_outside_every_interval_changes_no_bit(kind: str, exchange: str, window: int | None) -> None:
    for wrong in run_ranks(probe, 2, kind, exchange, window):
        assert wrong == []


def refused() -> list[str]:
    cp = flashcp.ContextParallel(timeout_s=20)
    plan = flashcp.plan((8, 8), cp.world_size)
    q = torch.zeros(8, 2, 4, requires_grad=True)
    said = []
    for named in (
        {"window": 0}, {"chunk": 2.5}, {"softcap": 0.0}, {"softcap": float("nan")}, {"softcap": "5"},
        {"sinks": torch.zeros(3)}, {"sinks": [0, 0]}, {"sinks": torch.zeros(2, dtype=torch.long)},
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the messages are compared)
            cp.attention(q, q, q, plan, **named)  # type: ignore[arg-type]
        said.append(str(caught.value))
    out, lse = cp.attention(q, q, q, plan, return_lse=True)
    with pytest.raises(RuntimeError) as caught_later:
        (out.sum() + lse.sum()).backward()
    return [*said, str(caught_later.value)]


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    expected = (
        "window=0: expected a whole number of rows >= 1, or None",
        "chunk=2.5: expected a whole number of rows >= 1, or None",
        "softcap=0.0: expected a positive number, or None",
        "softcap=nan: expected a positive number, or None",
        "softcap='5': expected a positive number, or None",
        "sinks is torch.float32 [3]: expected floating-point [2], one for each query head",
        "sinks is a list: expected floating-point [2], one for each query head",
        "sinks is torch.int64 [2]: expected floating-point [2]",
        "the log-sum-exp of attention has no gradient: expected it detached",
    )
    for said in run_ranks(refused, 2):
        for text, part in zip(said, expected, strict=True):
            assert part in text


def ranks_that_differ(what: str) -> str:
    cp = flashcp.ContextParallel(timeout_s=20)
    plan = flashcp.plan((8, 8), cp.world_size)
    q = torch.zeros(8, 2, 4)
    named = {"window": {"window": 3 + cp.rank}, "softcap": {"softcap": 3.0 + cp.rank},
             "lse": {"return_lse": cp.rank > 0},
             "sinks": {"sinks": torch.zeros(2) if cp.rank else None}}[what]  # fmt: skip
    with pytest.raises(flashcp.comm.errors.ExchangeError) as caught:  # type: ignore[attr-defined]
        cp.attention(q, q, q, plan, **named)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(("what", "named"), [
    ("window", "plan"), ("softcap", "softcap"), ("lse", "log sums"), ("sinks", "sinks"),
])  # fmt: skip
def test_ranks_that_ask_for_different_layers_are_named(what: str, named: str) -> None:
    for said in run_ranks(ranks_that_differ, 2, what):
        assert named in said
