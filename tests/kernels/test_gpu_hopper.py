"""The kernels for Hopper, run there: the values of the reference, wherever their rows come from and lie beside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.kernels import hopper, hopper_backward
from flashcp.kernels.interface import KV
from flashcp.kernels.launch import TritonAttention
from flashcp.kernels.schedule import whole_pack_schedule
from flashcp.kernels.tuning import Blocks, Tuning, architecture
from tests.kernels.one_rank import Rank
from tests.packs import random_qkv, relative_error

pytestmark = pytest.mark.gpu
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
LENGTHS = (3000, 50, 20, 40, 30, 60, 30, 700, 1, 1290, 7)
"""Long ones, cut between ranks, and short ones that share tiles, some of them across the middle of one."""
SPOILT = (3, 4, 5)
"""Documents that share tiles: in the second half of one, in the first half of the next, across its middle."""


@pytest.fixture
def on_hopper() -> None:
    if architecture(torch.device("cuda")) != "sm_90":
        pytest.skip("needs Hopper")


@pytest.fixture
def launched(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch could be."""
    found: list[bool] = []
    launch = hopper.launch_hopper_forward

    def counted(*arguments: object, **named: object) -> bool:
        found.append(launch(*arguments, **named))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(hopper, "launch_hopper_forward", counted)
    return found


def pack(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return random_qkv(sum(LENGTHS), *heads, head_dim, dtype, seed=2)


@pytest.mark.parametrize("how", ["one launch", "part after part"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("strategy", ["per_document", "flashcp"])
def test_every_rank_gets_the_references_rows(
    strategy: str, head_dim: int, dtype: torch.dtype, heads: tuple[int, int], how: str, launched: list[bool]
) -> None:
    *qkv, grad = pack(heads, head_dim, dtype)
    expected = flashcp.reference_attention(*(x.cuda().double() for x in qkv), LENGTHS).cpu()
    plan = flashcp.plan(LENGTHS, 3, strategy)
    kernel, scale = TritonAttention(), head_dim**-0.5
    for rank in range(3):
        state = Rank(plan, "exact", rank, qkv, grad)
        q, local = state.q.contiguous().cuda(), KV(*(x.contiguous().cuda() for x in state.local))
        received = KV(*state.buffer.cuda().unbind(1))
        if how == "one launch":
            out, lse = kernel.attend(q, local, received, state.whole, scale)
        else:
            out = torch.zeros(q.shape, device="cuda")
            lse = torch.full(q.shape[:2], -torch.inf, device="cuda")
            for part in state.parts:
                kernel.merge_into(out, lse, q, local, received, part, scale)
        assert relative_error(out.cpu(), expected[state.rows]) < LIMIT[dtype]
        portable = TritonAttention(Tuning(forward=Blocks(128, 64, 8, 3)))
        torch.testing.assert_close(lse, portable.attend(q, local, received, state.whole, scale)[1], rtol=0, atol=1e-4)
    assert launched
    assert all(launched)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", "kv")
@pytest.mark.parametrize("document", SPOILT)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nan_stays_in_its_document(
    head_dim: int, document: int, name: str, value: float, merge: bool, launched: list[bool]
) -> None:
    """merge: two times the same, onto what is there: a row done once too often has a third."""
    kernel, schedule = TritonAttention(), whole_pack_schedule(np.array(LENGTHS))
    start = sum(LENGTHS[:document])
    q, *healthy = (x.cuda() for x in pack((4, 2), head_dim, torch.bfloat16)[:3])
    spoilt = [x.clone() for x in healthy]
    spoilt["kv".index(name)][start + 2, 1, 5] = value

    def attend(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        inputs = q, KV(k, v), KV(k[:0], v[:0]), schedule, head_dim**-0.5
        if not merge:
            return kernel.attend(*inputs)
        out, lse = torch.zeros(q.shape, device="cuda"), torch.full(q.shape[:2], -torch.inf, device="cuda")
        for _ in range(2):
            kernel.merge_into(out, lse, *inputs)
        return out, lse

    (out, lse), (wanted, wanted_lse) = attend(*spoilt), attend(*healthy)
    seen = torch.zeros(q.shape[:2], dtype=torch.bool, device="cuda")
    # By the second KV head's query heads: K from its row on, V by all of the document, for 0 times it is no number.
    seen[start + 2 * (name == "k") : start + LENGTHS[document], 2:] = True
    if value != value:
        assert out[seen].isnan().any(-1).all()
    torch.testing.assert_close(out[~seen], wanted[~seen], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse[~seen], wanted_lse[~seen], rtol=0, atol=1e-4)
    if merge:
        once = TritonAttention().attend(q, KV(*healthy), KV(*(x[:0] for x in healthy)), schedule, head_dim**-0.5)[1]
        torch.testing.assert_close(wanted_lse, once + math.log(2), rtol=0, atol=1e-4)
    assert all(launched)


def test_what_it_does_not_take_is_computed_all_the_same(launched: list[bool]) -> None:
    q, k, v = (x.cuda() for x in pack((4, 2), 64, torch.bfloat16)[:3])
    schedule, scale = whole_pack_schedule(np.array(LENGTHS)), 64**-0.5
    expected = TritonAttention().attend(q, KV(k, v), KV(k[:0], v[:0]), schedule, scale)[0]
    odd = torch.cat((k, k[..., :1]), -1)[..., :64]  # rows 130 bytes apart
    out = TritonAttention().attend(q, KV(odd, v), KV(k[:0], v[:0]), schedule, scale)[0]
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    by_head = k.transpose(0, 1).contiguous().transpose(0, 1)  # a head's rows one behind the other
    out = TritonAttention().attend(q, KV(by_head, v), KV(k[:0], v[:0]), schedule, scale)[0]
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    assert launched == [True, False, False]
    asked = TritonAttention(Tuning(forward=Blocks(128, 64, 8, 3)))
    out = asked.attend(q, KV(k, v), KV(k[:0], v[:0]), schedule, scale)[0]
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    assert len(launched) == 3


@pytest.fixture
def in_any_order(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles each launch of the one backward kernel had."""
    found: list[int] = []
    launch = hopper_backward.launch_hopper_backward

    def counted(*arguments: Any) -> None:
        found.append(len(arguments[7][0]))
        launch(*arguments)

    monkeypatch.setattr(hopper_backward, "launch_hopper_backward", counted)
    return found


ANY_ORDER = Tuning(deterministic=False)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("strategy", ["per_document", "flashcp"])
def test_every_rank_gets_the_references_gradients(
    strategy: str, head_dim: int, dtype: torch.dtype, heads: tuple[int, int], parts: bool, in_any_order: list[int]
) -> None:
    """parts: received rows' gradients leave first, and local ones stay in fp32."""
    *qkv, grad = pack(heads, head_dim, dtype)
    leaves = [x.cuda().double().requires_grad_() for x in qkv]
    expected = flashcp.reference_attention(*leaves, LENGTHS)
    wanted = [x.cpu() for x in torch.autograd.grad(expected, leaves, grad.cuda().double())]
    plan, kernel, scale = flashcp.plan(LENGTHS, 3, strategy), TritonAttention(ANY_ORDER), head_dim**-0.5
    total = [torch.zeros(x.shape, dtype=torch.float64) for x in wanted]
    for rank in range(3):
        state = Rank(plan, "exact", rank, qkv, grad)
        q, local = state.q.contiguous().cuda(), KV(*(x.contiguous().cuda() for x in state.local))
        received, grad_out = KV(*state.buffer.cuda().unbind(1)), state.grad.contiguous().cuda()
        out, lse = kernel.attend(q, local, received, state.whole, scale)
        inputs = grad_out, q, local, received, out, lse, state.whole, scale
        left: list[Tensor] = []
        how = (torch.float32, lambda rows, left=left: left.append(rows.clone())) if parts else ()
        found, again = (kernel.gradients(*inputs, *how) for _ in range(2))
        for first, second in zip((*found.local, found.received), (*again.local, again.received), strict=True):
            assert torch.equal(first.nan_to_num(), second.nan_to_num())
        if parts:
            assert torch.equal(left[0].nan_to_num(), found.received.nan_to_num())
        total[0][state.rows] += found.q.cpu()
        for i, of in enumerate((0, 1)):
            total[1 + i][state.rows] += found.local[of].cpu()
            total[1 + i].index_add_(0, state.sent, found.received[state.slots, of].double().cpu())
    for value, reference in zip(total, wanted, strict=True):
        assert relative_error(value, reference) < LIMIT[dtype]
    assert len(in_any_order) == 3 * 2 * (1 + parts)
    assert max(in_any_order) > 0


@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("document", [0, 4, 5, 7])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nan_stays_in_its_documents_gradients(head_dim: int, document: int, name: str, in_any_order: list[int]) -> None:
    """Beside a document with a NaN dK and dV are the same to the bit, and dQ but for the order of its sums."""
    kernel, schedule = TritonAttention(ANY_ORDER), whole_pack_schedule(np.array(LENGTHS))
    start = sum(LENGTHS[:document])
    rows = slice(start, start + LENGTHS[document])
    healthy = [x.cuda() for x in pack((4, 2), head_dim, torch.bfloat16)]
    spoilt = [x.clone() for x in healthy]
    spoilt[("q", "k", "v", "grad").index(name)][start + 2, 1, 5] = torch.nan

    def gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = q, KV(k, v), KV(k[:0], v[:0])
        out, lse = kernel.attend(*inputs, schedule, head_dim**-0.5)
        found = kernel.gradients(grad, *inputs, out, lse, schedule, head_dim**-0.5)
        return found.q, *found.local

    others = torch.ones(sum(LENGTHS), dtype=torch.bool, device="cuda")
    others[rows] = False
    for of, value, expected in zip("qkv", gradients(*spoilt), gradients(*healthy), strict=True):
        assert value[rows].isnan().any() != (of == name == "v")  # dV does not depend on V
        torch.testing.assert_close(value[others], expected[others], rtol=1e-2, atol=1e-3)
    assert in_any_order


def test_long_documents_have_the_gradients_of_the_portable_kernels_in_every_head(in_any_order: list[int]) -> None:
    lengths, scale = (16_384, 70, 8_000), 128**-0.5
    schedule = whole_pack_schedule(np.array(lengths))
    q, k, v, grad = (x.cuda() for x in random_qkv(sum(lengths), 8, 8, 128, torch.bfloat16, seed=3))
    inputs = q, KV(k, v), KV(k[:0], v[:0])
    out, lse = TritonAttention().attend(*inputs, schedule, scale)
    rows = grad, *inputs, out, lse, schedule, scale
    found, portable = (TritonAttention(tuning).gradients(*rows) for tuning in (ANY_ORDER, Tuning()))
    pairs = zip((found.q, *found.local), (portable.q, *portable.local), strict=True)
    for name, (value, expected) in zip("qkv", pairs, strict=True):
        for head in range(8):
            assert not expected[:, head].isnan().any(), (name, head)
            assert relative_error(value[:, head], expected[:, head]) < 5e-3, (name, head)
    assert in_any_order


def test_gradients_that_it_cannot_read_are_computed_all_the_same(in_any_order: list[int]) -> None:
    q, k, v = (x.cuda().requires_grad_() for x in pack((4, 2), 64, torch.bfloat16)[:3])
    out = flashcp.varlen_attention(q, k, v, LENGTHS, tuning=ANY_ORDER)
    expected = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    assert len(in_any_order) == 1
    found = torch.autograd.grad(out.sum(), (q, k, v))  # a gradient of one number, expanded
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=2e-2, atol=2e-2)
