"""The implementations for a CPU against the reference: values, gradients, memory, layouts."""

from __future__ import annotations

import itertools
import resource

import pytest
import torch

import flashcp
from flashcp.kernels.cpu import CpuAttention
from tests.kernels.one_rank import Rank
from tests.packs import AWKWARD, random_lengths, random_qkv, relative_error

BOTH = pytest.mark.parametrize("attention", ["cpu", "varlen"])


def errors(
    lengths: tuple[int, ...], query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, attention: str
) -> list[float]:
    *qkv, grad = random_qkv(sum(lengths), query_heads, kv_heads, head_dim, dtype, seed=sum(lengths))
    fast = [x.requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out, expected = flashcp.varlen_attention(*fast, lengths, attention), flashcp.reference_attention(*exact, lengths)
    got = torch.autograd.grad(out, fast, grad)
    want = torch.autograd.grad(expected, exact, grad.double())
    return [relative_error(a, b) for a, b in zip((out, *got), (expected, *want), strict=True)]


@BOTH
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("lengths", [*AWKWARD, *map(random_lengths, range(3))], ids=str)
def test_matches_the_reference(lengths: tuple[int, ...], heads: tuple[int, int], attention: str) -> None:
    assert max(errors(lengths, *heads, 16, torch.float32, attention)) < 1e-5
    assert max(errors(lengths, *heads, 80, torch.bfloat16, attention)) < 1e-2
    assert max(errors(lengths, *heads, 16, torch.float16, attention)) < 2e-3


@BOTH
@pytest.mark.timeout(900)  # seconds where nothing else runs, minutes where twenty others do
def test_a_document_of_32k_tokens_fits(attention: str) -> None:
    tokens = 32_768
    q, k, v, grad = random_qkv(tokens, 1, 1, 16, torch.float32, seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = flashcp.varlen_attention(*(x.requires_grad_() for x in (q, k, v)), [tokens], attention)
    out.backward(grad)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 1024, f"{grown_mib:.0f} MiB: a tokens x tokens matrix alone would take 4096"
    last = torch.softmax(q[-1, 0].double() @ k[:, 0].double().T / 4, 0) @ v[:, 0].double()
    assert relative_error(out[-1, 0], last) < 1e-5


@BOTH
def test_any_layout_gives_the_same_numbers(attention: str) -> None:
    lengths = [5, 40, 19]
    q, k, v, grad = random_qkv(64, 4, 2, 16, torch.float32, seed=3)

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = flashcp.varlen_attention(*leaves, lengths, attention)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    strided = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)]
    sliced = [torch.stack((x, x), dim=1)[:, 0] for x in (q, k, v)]
    for other in (strided, sliced):
        assert not other[0].is_contiguous()
        for a, b in zip(run(q, k, v), run(*other), strict=True):
            assert torch.equal(a, b)
    out = flashcp.varlen_attention(q, k.requires_grad_(), v, lengths, attention)
    (expanded,) = torch.autograd.grad(out.sum(), k)  # the gradient of sum() has stride 0 everywhere
    (plain,) = torch.autograd.grad(flashcp.varlen_attention(q, k, v, lengths, attention), k, torch.ones_like(out))
    assert torch.equal(expanded, plain)


@BOTH
def test_two_runs_agree_bit_for_bit(attention: str) -> None:
    case = (1, 127, 129), 4, 2, 16, torch.float32, attention
    assert errors(*case) == errors(*case)


@BOTH
def test_softmax_scale_is_used(attention: str) -> None:
    q, k, v, _ = random_qkv(20, 2, 2, 8, torch.float32, seed=4)
    out = flashcp.varlen_attention(q, k, v, [20], attention, softmax_scale=0.9)
    assert relative_error(out, flashcp.reference_attention(q, k, v, [20], 0.9)) < 1e-5


def test_bad_input_is_named() -> None:
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=r"expected one of torch\.float32, torch\.bfloat16"):
        flashcp.varlen_attention(x.double(), x.double(), x.double(), [4])
    with pytest.raises(ValueError, match="attention='nope': expected one of auto, cpu"):
        flashcp.varlen_attention(x, x, x, [4], attention="nope")
    with pytest.raises(ValueError, match="add up to 3: expected the 4 tokens"):
        flashcp.varlen_attention(x, x, x, [3])
    with pytest.raises(ValueError, match="multiple of KV heads"):
        flashcp.varlen_attention(torch.zeros(4, 3, 8), x, x, [4])


@pytest.mark.parametrize("attention", ["cpu", "varlen"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_row_that_is_no_number_gives_none(attention: str, value: float) -> None:
    q, k, v, grad = random_qkv(12, 2, 2, 8, torch.float32, 0)
    q[2] = value
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flashcp.varlen_attention(*leaves, (5, 7), attention=attention)
    assert out.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [2]
    gradients = torch.autograd.grad(out, leaves, grad)
    assert gradients[0][2].isnan().all()
    assert all(x[5:].isfinite().all() for x in gradients)


def test_gradients_of_received_rows_are_told_source_by_source() -> None:
    """The rank before this one first; what a source's rows have then is final, and rounded once."""
    lengths = [60, 4]
    plan = flashcp.plan(lengths, 4, "per_document")
    *qkv, grad = random_qkv(64, 2, 1, 8, torch.float32, seed=0)
    for exchange, rank in itertools.product(("exact", "all_gather", "ring"), range(4)):
        state = Rank(plan, exchange, rank, qkv, grad)
        inputs = state.q, state.local, state.from_others
        out, lse = CpuAttention().attend(*inputs, state.whole, 0.3)
        told: list[tuple[int | None, torch.Tensor]] = []

        def tell(gradients: torch.Tensor, source: int | None = None, told: list = told) -> None:
            told.append((source, gradients.clone()))

        how = out, lse, state.whole, 0.3, torch.float32
        wide = CpuAttention().gradients(state.grad, *inputs, *how).received
        narrow = CpuAttention().gradients(state.grad, *inputs, *how, tell, torch.bfloat16)
        assert narrow.received.dtype == torch.bfloat16
        assert torch.equal(narrow.received, wide.bfloat16())
        sources = [(rank - i) % 4 for i in (1, 2, 3)]
        assert [source for source, _ in told] == [*(s for s in sources if s in state.whole.sources), None]
        schedule = state.whole
        for source, seen in told[:-1]:
            of_source = schedule.received & (schedule.source == source)
            for place in map(slice, schedule.row_start[of_source], schedule.row_stop[of_source]):
                assert seen[place].count_nonzero()
                assert torch.equal(seen[place], narrow.received[place])
