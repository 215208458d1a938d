"""The door for other people's kernels, with the CPU's kernel behind it: ranks of real plans, parts, NaN, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcp
from flashcp import Mask
from flashcp.kernels import varlen
from flashcp.kernels.cpu import CpuAttention
from flashcp.kernels.interface import KV, Gradients, WaitFlags
from flashcp.kernels.schedule import whole_pack_schedule
from flashcp.kernels.varlen.attention import VarlenAttention
from flashcp.kernels.varlen.base import Sequences, VarlenKernel
from flashcp.kernels.varlen.sdpa import Sdpa
from flashcp.sharding.masks import read_masks
from flashcp.sharding.plan import ShardingPlan
from tests.kernels.one_rank import Rank
from tests.packs import AWKWARD, random_lengths, random_qkv, relative_error

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EXCHANGES = ["exact", "compacted", "all_gather", "sources", "ulysses"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operators: threads that wait for each other make them ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Run = Callable[..., tuple[Tensor, Tensor, KV, Tensor]]


def whole_pack(
    lengths: tuple[int, ...],
    strategy: str,
    exchange: str,
    run: Run,
    tensors: tuple[Tensor, ...],
    ranks: int = 3,
    masks: list[Mask] | None = None,
    **options: Any,
) -> list[Tensor]:
    """Output and gradients of a whole pack in float64, put together from all its ranks."""
    plan = flashcp.plan(lengths, ranks, strategy, masks=masks)
    *qkv, grad = tensors
    kernel, scale = VarlenAttention(Sdpa()), qkv[0].shape[2] ** -0.5
    out, grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float64) for x in (qkv[0], *qkv))
    for rank in range(1 if exchange == "ulysses" else ranks):
        state = Rank(plan, exchange, rank, qkv, grad)
        part, part_q, local, back = run(state, kernel, scale, **options)
        out[state.rows], grad_q[state.rows] = part.double(), part_q.double()
        for total, own, others in zip((grad_k, grad_v), local, back.unbind(1), strict=True):
            total.index_add_(0, state.rows, own.double())
            total.index_add_(0, state.sent, others[state.slots].double())
    return [out, grad_q, grad_k, grad_v]


@pytest.mark.parametrize("run", [Rank.one_launch, Rank.staged])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("strategy", flashcp.strategies())
def test_matches_the_reference(strategy: str, exchange: str, run: Run) -> None:
    for i, lengths in enumerate((AWKWARD[3], random_lengths(5), (100, 1))):
        heads, dtype = ((4, 2), (2, 2), (3, 1))[i], list(LIMIT)[i]
        tensors = random_qkv(sum(lengths), *heads, 16, dtype, seed=i)
        exact = [x.double().requires_grad_() for x in tensors[:3]]
        expected = flashcp.reference_attention(*exact, lengths)
        wanted = (expected, *torch.autograd.grad(expected, exact, tensors[3].double()))
        found = whole_pack(lengths, strategy, exchange, run, tensors)
        assert max(map(relative_error, found, wanted)) < LIMIT[dtype], (lengths, dtype)


@pytest.mark.parametrize("run", [Rank.one_launch, Rank.staged])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("strategy", flashcp.strategies())
def test_windows_full_documents_and_softcap_match_the_reference(strategy: str, exchange: str, run: Run) -> None:
    for i, lengths in enumerate((AWKWARD[3], random_lengths(5), (100, 1))):
        dtype = list(LIMIT)[i]
        window = (5, 40, 33)[i]
        masks = [(Mask("window", window), Mask("full"), Mask())[at % 3] for at in range(len(lengths))]
        softcap = (3.0, None, 8.0)[i]
        q, k, v, grad = random_qkv(sum(lengths), 4, 2, 16, dtype, seed=i)
        q[::11] *= 6
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        expected = flashcp.reference_attention(*exact, lengths, masks=masks, softcap=softcap)
        wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
        options = {"masks": masks, "softcap": softcap or 0.0}
        found = whole_pack(lengths, strategy, exchange, run, (q, k, v, grad), **options)  # type: ignore[arg-type]
        assert max(map(relative_error, found, wanted)) < LIMIT[dtype], (lengths, dtype)


@pytest.mark.parametrize("strategy", flashcp.strategies())
def test_any_part_of_a_schedule(strategy: str) -> None:
    """Shards that do not tile the local tensor, shards that read nothing, prefixes without the own rows."""
    rng = np.random.default_rng(0)
    for seed in range(3):
        lengths = random_lengths(seed, 20)
        masks = [(Mask(), Mask("window", 9), Mask("full"))[i % 3 if seed else 0] for i in range(len(lengths))]
        plan = flashcp.plan(lengths, 3, strategy, masks=masks)
        *qkv, grad = random_qkv(sum(lengths), 4, 2, 8, torch.float32, seed)
        for rank in range(3):
            state = Rank(plan, "all_gather", rank, qkv, grad)
            schedule = state.whole.part(rng.random(len(state.whole.source)) < 0.6)
            tensors = state.q, state.local, state.from_others
            found, lse = VarlenAttention(Sdpa()).attend(*tensors, schedule, 0.3)
            wanted, wanted_lse = CpuAttention().attend(*tensors, schedule, 0.3)
            assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
            assert torch.allclose(lse, wanted_lse, atol=1e-5)
            assert torch.allclose(found, wanted, atol=1e-5)
            arguments = state.grad, *tensors, wanted, wanted_lse, schedule, 0.3
            found_all, wanted_all = (
                flat(kernel.gradients(*arguments)) for kernel in (VarlenAttention(Sdpa()), CpuAttention())
            )
            for a, b in zip(found_all, wanted_all, strict=True):
                assert torch.allclose(a, b, atol=1e-5)


def flat(gradients: Gradients) -> list[Tensor]:
    return [gradients.q, *gradients.local, gradients.received]


def once(state: Rank, kernel: VarlenAttention, scale: float) -> tuple[Tensor, Tensor, KV, Tensor]:
    """`Rank.one_launch` without its comparison of two runs: NaN is not equal to itself."""
    inputs = state.q, state.local, state.from_others
    out, lse = kernel.attend(*inputs, state.whole, scale)
    return out, *kernel.gradients(state.grad, *inputs, out, lse, state.whole, scale)


def part_by_part(state: Rank, kernel: VarlenAttention, scale: float) -> tuple[Tensor, Tensor, KV, Tensor]:
    """`Rank.staged` likewise."""
    inputs = state.q, state.local, state.from_others
    out, lse = torch.zeros(state.q.shape), torch.full(state.q.shape[:2], -torch.inf)
    for part in state.parts:
        kernel.merge_into(out, lse, *inputs, part, scale)
    return out, *kernel.gradients(state.grad, *inputs, out, lse, state.whole, scale)


@pytest.mark.parametrize("run", [once, part_by_part])
@pytest.mark.parametrize("exchange", ["exact", "all_gather", "sources", "ulysses"])
@pytest.mark.parametrize("strategy", ["contiguous", "per_document", "flashcp"])
def test_nan_stays_in_its_document(strategy: str, exchange: str, run: Run) -> None:
    """Not a bit of another document changes, in outputs or gradients."""
    lengths = (13, 70, 5, 40)
    first, stop = 13, 83
    tensors = random_qkv(sum(lengths), 4, 2, 8, torch.float32, seed=0)
    clean = whole_pack(lengths, strategy, exchange, run, tensors)
    for spoilt, value in itertools.product(range(4), (torch.nan, torch.inf)):
        changed = tuple(x.clone() for x in tensors)
        changed[spoilt][first + 30] = value
        after = whole_pack(lengths, strategy, exchange, run, changed)
        assert not all(x[first:stop].isfinite().all() for x in after)
        for a, b in zip(clean, after, strict=True):
            assert torch.equal(a[:first], b[:first])
            assert torch.equal(a[stop:], b[stop:])


def test_what_is_copied_is_counted() -> None:
    """Whole documents: nothing. Otherwise rows that do not lie one behind the other, once a call."""
    q, k, v, grad = random_qkv(60, 4, 2, 8, torch.float32, seed=0)
    attention, nothing = VarlenAttention(Sdpa()), KV(k[:0], v[:0])
    schedule = whole_pack_schedule(np.array([20, 40]))
    out, lse = attention.attend(q, KV(k, v), nothing, schedule, 0.3)
    attention.gradients(grad, q, KV(k, v), nothing, out, lse, schedule, 0.3)
    assert attention.gathered_bytes == 0

    plan = flashcp.plan([60, 30], 3, "per_document")  # two shards of each document, which read the same rows
    state = Rank(plan, "exact", 1, [x.repeat(2, 1, 1)[:90] for x in (q, k, v)], grad.repeat(2, 1, 1)[:90])
    attention.attend(state.q, state.local, state.from_others, state.whole, 0.3)
    # Local: the later shards [40, 50) and [20, 25) read [10, 20) and [5, 10). Received: all four shards, which tile the
    # tensor, read [0, 10) twice, [20, 40) once and so on; each key row is K and V, 2 heads of 8 numbers of 4 bytes.
    row = 8 * 4
    queries, local = (10 + 5) * 4 * row, (10 + 5) * 2 * 2 * row
    received = (10 + 30 + 5 + 15) * 2 * 2 * row
    assert attention.gathered_bytes == queries + local + received


def test_received_gradients_leave_before_local_ones_are_computed() -> None:
    plan = ShardingPlan.from_shards([40, 24], 2, [(0, 0, 32, 0), (0, 32, 40, 1), (1, 0, 20, 1), (1, 20, 24, 0)])
    *qkv, grad = random_qkv(64, 2, 1, 8, torch.float32, seed=0)
    state = Rank(plan, "exact", 1, qkv, grad)
    order: list[str] = []

    class Told(Sdpa):
        def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            order.append(f"{len(arguments[2])} keys")
            return super().backward(*arguments)

    attention, inputs = VarlenAttention(Told()), (state.q, state.local, state.from_others)
    out, lse = attention.attend(*inputs, state.whole, 0.3)
    state_of = state.grad, *inputs, out, lse, state.whole, 0.3
    attention.gradients(*state_of, torch.float32, lambda rows, source=None: order.append("gradients leave"))
    assert order == ["32 keys", "gradients leave", "28 keys"]  # others', then its own


class Particular(Sdpa):
    """A kernel whose loads are vectors of 16 bytes, and no two rows in one place."""

    alignment_bytes = 16

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        for x in (q, k, v):
            assert x.data_ptr() % 16 == 0
            assert all(stride and stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
        return super().forward(q, k, v, seqs, scale)


def test_rows_lie_as_the_kernel_wants_them() -> None:
    q, k, v, _ = random_qkv(20, 4, 2, 8, torch.bfloat16, seed=0)
    schedule = whole_pack_schedule(np.array([5, 15]))
    wanted = VarlenAttention(Sdpa()).attend(q, KV(k, v), KV(k[:0], v[:0]), schedule, 0.3)
    halves = torch.stack((k, v), dim=1)  # as rows are received: nothing to copy
    odd = torch.cat((q, q[..., :1]), dim=-1)[..., :8]
    shifted = torch.cat((q.flatten()[:1], q.flatten()))[1:].view_as(q)
    for tensor, copied in ((q, 0), (odd, q.nbytes), (shifted, q.nbytes)):
        attention = VarlenAttention(Particular())
        found = attention.attend(tensor, KV(halves[:, 0], halves[:, 1]), KV(k[:0], v[:0]), schedule, 0.3)
        assert all(map(torch.equal, found, wanted))
        assert attention.gathered_bytes == copied
    one_head = k[:, :1].expand_as(k)
    attention = VarlenAttention(Particular())
    attention.attend(q, KV(one_head, v), KV(k[:0], v[:0]), schedule, 0.3)
    assert attention.gathered_bytes == k.nbytes


def test_one_call_s_results_are_taken_as_they_are() -> None:
    """No fp32 copy, no merge: the kernel's own bits."""
    q, k, v, _ = random_qkv(60, 4, 2, 8, torch.bfloat16, seed=0)
    lengths = torch.tensor([0, 20, 60], dtype=torch.int32)
    out, lse = Sdpa().forward(q, k, v, Sequences(lengths, lengths, 40, 40, True), 0.3)
    schedule = whole_pack_schedule(np.array([20, 40]))
    found, found_lse = VarlenAttention(Sdpa()).attend(q, KV(k, v), KV(k[:0], v[:0]), schedule, 0.3)
    assert torch.equal(out, found)
    assert torch.equal(lse, found_lse)


class ForwardOnly(VarlenKernel):
    """A kernel as somebody would add it: one that has no backward."""

    name = "forward_only"
    dtypes = (torch.float32,)

    def is_available(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return Sdpa().forward(q, k, v, seqs, scale)


class PaddedSums(ForwardOnly):
    """A log-sum-exp by heads first, as flash kernels have it."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, seqs, scale)
        return out, lse.t()


def test_what_a_kernel_cannot_do_is_one_line() -> None:
    q, k, v, grad = random_qkv(20, 4, 2, 8, torch.float32, seed=0)
    schedule, nothing = whole_pack_schedule(np.array([20])), KV(k[:0], v[:0])
    attention = VarlenAttention(ForwardOnly())
    out, lse = attention.attend(q, KV(k, v), nothing, schedule, 0.3)
    with pytest.raises(ValueError, match="attention='varlen:forward_only' has no gradients: it computes none"):
        attention.gradients(grad, q, KV(k, v), nothing, out, lse, schedule, 0.3)
    with pytest.raises(ValueError, match=r"q is torch\.float16: .*'varlen:forward_only' expects torch\.float32$"):
        attention.attend(q.half(), KV(k.half(), v.half()), nothing, schedule, 0.3)
    with pytest.raises(ValueError, match=r"head_dim=6: .* expects a multiple of 8 up to 256$"):
        attention.attend(q[..., :6], KV(k[..., :6], v[..., :6]), nothing, schedule, 0.3)
    flags = WaitFlags(torch.zeros(1, dtype=torch.int32), 0, torch.zeros(1, dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match="expected all rows before the call, not flags"):
        attention.attend(q, KV(k, v), nothing, schedule, 0.3, flags)
    with pytest.raises(ValueError, match=r"attention='varlen:forward_only' with softcap=2.0: expected none$"):
        attention.attend(q, KV(k, v), nothing, schedule, 0.3, softcap=2.0)
    for kind, said in (("window", "windows"), ("chunk", "chunks"), ("prefix", "prefixes or blocks")):
        masked = whole_pack_schedule(np.array([20]), read_masks(Mask(kind, 3), np.array([20])))
        with pytest.raises(ValueError, match=f"forward_only' with {said}: expected full or causal documents$"):
            attention.attend(q, KV(k, v), nothing, masked, 0.3)
    full = whole_pack_schedule(np.array([20]), read_masks(Mask("full"), np.array([20])))
    assert relative_error(
        attention.attend(q, KV(k, v), nothing, full, 8**-0.5)[0],
        flashcp.reference_attention(q, k, v, [20], masks=Mask("full")),
    ) < 1e-5  # fmt: skip
    with pytest.raises(RuntimeError, match=r"gave a log-sum-exp torch\.float32 \[4, 20\]: expected .* \[20, 4\]"):
        VarlenAttention(PaddedSums()).attend(q, KV(k, v), nothing, schedule, 0.3)


def test_varlen_takes_the_first_that_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "KERNELS", {"forward_only": ForwardOnly(), **varlen.KERNELS})
    here = torch.device("cpu")
    assert varlen.select_varlen("varlen", here).kernel.name == "sdpa"
    assert varlen.select_varlen("varlen:forward_only", here).kernel.name == "forward_only"
    monkeypatch.delitem(varlen.KERNELS, "sdpa")
    assert varlen.select_varlen("varlen", here).kernel.name == "forward_only"
