"""The forward on Hopper, run there: the values of the reference, wherever its rows come from and lie beside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.kernels import hopper
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
def launched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch could be."""
    if architecture(torch.device("cuda")) != "sm_90":
        pytest.skip("needs Hopper")
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
