"""What surrounds the kernels on Hopper, without one: launches are played, notes of halves at random included."""

from __future__ import annotations

import builtins
import math
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.kernels import launch
from flashcp.kernels.interface import KV
from flashcp.kernels.launch import TritonAttention, _hopper_takes
from flashcp.kernels.schedule import whole_pack_schedule
from flashcp.kernels.tuning import HOPPER_GAIN, TABLE, Blocks, Pass, Tuning, choose, tile_heads
from tests.interpreter import interpreted

PACKS = ((50, 20, 40, 30, 60, 30), (64, 64, 10, 3, 50, 1, 100, 4, 30), (40, 40, 40, 1, 1, 1, 1, 1, 130))
HEAD_DIM = 64


class Played:
    """The exact result for every half of a tile, but for halves of shared tiles that are noted and not stored."""

    def __init__(self, out: Tensor, lse: Tensor, refuses: bool) -> None:
        self.out, self.lse, self.refuses = out, lse, refuses
        self.random, self.notes = np.random.default_rng(0), set[int]()

    def __call__(
        self, q: Tensor, local: KV, received: KV, out: Tensor, lse: Tensor, tables: Sequence[Tensor], mixed: Tensor,
        scale: float, merge: bool,
    ) -> bool:  # fmt: skip
        if self.refuses:
            return False
        heads = q.shape[1]
        for index, (_, row, stop, _, _) in enumerate(tables[0].tolist()):
            shared = int(tables[2][stop - 1]) > row
            for head in range(heads):
                for half in range(2):
                    rows = slice(row + 64 * half, min(row + 64 * half + 64, stop))
                    if shared and self.random.random() < 0.5:
                        mixed[0] = 1
                        mixed[1 + index * heads + head] |= 2 << half
                        self.notes.add(int(mixed[1 + index * heads + head]))
                    elif rows.start < rows.stop:
                        self.store(out[rows, head], lse[rows, head], self.out[rows, head], self.lse[rows, head], merge)
        return True

    @staticmethod
    def store(out: Tensor, lse: Tensor, own: Tensor, own_lse: Tensor, merge: bool) -> None:
        before = lse.double() if merge else torch.full_like(own_lse, -torch.inf)
        both = torch.logaddexp(before, own_lse)
        kept = out.double().nan_to_num() * (before - both).exp()[:, None]
        out.copy_(kept + own * (own_lse - both).exp()[:, None])
        lse.copy_(both)


def worst(refuses: bool) -> tuple[float, set[int]]:
    """The largest error of output and log-sum-exp, computed once and merged twice, and what was noted."""
    worst, notes = 0.0, set[int]()
    for lengths in PACKS:
        random = torch.Generator().manual_seed(1)
        q = torch.randn(sum(lengths), 2, HEAD_DIM, generator=random).half()
        kv = KV(*(torch.randn(sum(lengths), 1, HEAD_DIM, generator=random).half() for _ in range(2)))
        inputs = q, kv, KV(*(x[:0] for x in kv)), whole_pack_schedule(np.array(lengths)), HEAD_DIM**-0.5
        exact = flashcp.reference_attention(q.double(), *(x.double() for x in kv), lengths)
        lse = exact_lse(q, kv.k, lengths)
        played = Played(exact, lse, refuses)
        with (
            mock.patch("flashcp.kernels.hopper.launch_hopper_forward", played),
            mock.patch.object(launch, "architecture", return_value="sm_90"),
            mock.patch.object(launch, "choose", return_value=Blocks(128, 128, 8, 2)),
        ):
            kernel = TritonAttention()
            once = kernel.attend(*inputs)
            twice = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
            for _ in range(2):
                kernel.merge_into(*twice, *inputs)
        notes |= played.notes
        for (found, found_lse), times in ((once, 1), (twice, 2)):
            worst = max(worst, float((found.double() - exact).abs().max()))
            worst = max(worst, float((found_lse.double() - lse - math.log(times)).abs().max()))
    return worst, notes


def exact_lse(q: Tensor, k: Tensor, lengths: Sequence[int]) -> Tensor:
    """Log-sum-exp [T, H] in float64; one KV head."""
    found, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        scores = torch.einsum("qhd,kd->hqk", q[rows].double(), k[rows, 0].double()) * HEAD_DIM**-0.5
        future = ~torch.ones(length, length, dtype=torch.bool).tril()
        found.append(scores.masked_fill(future, -torch.inf).logsumexp(-1).T)
        start += length
    return torch.cat(found)


@pytest.mark.parametrize("refuses", [False, True])
def test_noted_halves_are_done_again_and_no_others(refuses: bool) -> None:
    error, notes = interpreted(worst, refuses)
    assert error < 2e-3
    assert notes == (set() if refuses else {2, 4, 6})


def test_without_gluon_the_portable_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 128, dtype=torch.bfloat16)
    assert _hopper_takes(q)
    assert not _hopper_takes(q[..., :80])
    assert not _hopper_takes(q.float())
    real = builtins.__import__

    def without(name: str, globals: Mapping[str, object] | None = None, *rest: Any) -> Any:
        if name == "flashcp.kernels" and rest and "hopper" in (rest[1] or ()):
            raise ImportError("cannot import name 'tma'")
        return real(name, globals, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.warns(UserWarning, match="the portable forward runs on this Hopper, .*: cannot import name 'tma'"):
        assert not _hopper_takes(q)


def test_a_faster_kernel_is_left_for_short_documents_alone() -> None:
    long, short = TABLE["sm_90", 128, 2, Pass.FORWARD]

    def chosen(length: int, gain: float) -> Blocks:
        schedule = whole_pack_schedule(np.full(4096 // length, length))
        return choose(Pass.FORWARD, "sm_90", 128, torch.bfloat16, schedule, 1, gain)

    assert [chosen(length, 1.0) for length in (4096, 128, 32)] == [long, short, short]
    assert [chosen(length, HOPPER_GAIN) for length in (4096, 128, 32)] == [long, long, short]
    packed = whole_pack_schedule(np.array([300, 200, 100] * 8))
    assert tile_heads(Pass.FORWARD, long, packed, 4) == 4
    assert tile_heads(Pass.FORWARD, long, packed, 4, HOPPER_GAIN) == 1


class PlayedBackward:
    """dK and dV of each tile of keys and what they give to dQ, from exact gradients of the scores [H, T, T]."""

    def __init__(self, q: Tensor, kv: KV, grad: Tensor, lengths: Sequence[int]) -> None:
        q, k, v, grad = (x.double().transpose(0, 1) for x in (q, *kv, grad))
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        seen = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1)
        pull = weights * (grad @ v.mT - (grad * (weights @ v)).sum(-1, keepdim=True))  # [H, T, T]
        self.pull, self.q, self.k = pull, q, k
        self.dv = (weights.mT @ grad).sum(0)
        self.tiles = 0

    def __call__(
        self, q: Tensor, local: KV, received: KV, grad_out: Tensor, row_terms: Tensor, sums_q: Tensor,
        outputs: Sequence[Tensor], tables: Sequence[Tensor], scale: float,
    ) -> None:  # fmt: skip
        assert scale == pytest.approx(HEAD_DIM**-0.5 / math.log(2))
        for index, row, stop, *_ in tables[0].tolist():
            assert index == 0, "a tile of received rows where there are none"
            keys = slice(row, stop)
            sums_q += (self.pull[:, :, keys] @ self.k[:, keys]).transpose(0, 1)
            outputs[0][keys, 0] = ((self.pull[:, :, keys].mT @ self.q).sum(0) * HEAD_DIM**-0.5).to(outputs[0].dtype)
            outputs[1][keys, 0] = self.dv[keys].to(outputs[1].dtype)
            self.tiles += 1


def worst_gradient(parts: bool) -> tuple[float, list[int]]:
    """The largest error of gradients where Hopper's kernel has the long documents, and its tiles of each pack."""
    worst, tiles = 0.0, list[int]()
    for lengths in (*PACKS, (300, 20, 30, 65), (10, 20)):
        random = torch.Generator().manual_seed(2)
        shapes = (2, 1, 1, 2)
        q, k, v, grad = (torch.randn(sum(lengths), n, HEAD_DIM, generator=random).half() for n in shapes)
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        exact = torch.autograd.grad(flashcp.reference_attention(*leaves, lengths), leaves, grad.double())
        inputs = q, KV(k, v), KV(k[:0], v[:0])
        schedule, scale = whole_pack_schedule(np.array(lengths)), HEAD_DIM**-0.5
        out, lse = TritonAttention().attend(*inputs, schedule, scale)
        played, left = PlayedBackward(q, KV(k, v), grad, lengths), list[Tensor]()
        with (
            mock.patch("flashcp.kernels.hopper_backward.launch_hopper_backward", played),
            mock.patch.object(launch, "_is_hopper", return_value=True),
        ):
            kernel = TritonAttention(Tuning(deterministic=False))
            how = (torch.float32, lambda rows, left=left: left.append(rows)) if parts else ()
            found = kernel.gradients(grad, *inputs, out, lse, schedule, scale, *how)
        assert len(left) == parts
        worst = max(
            worst, *(float((a.double() - b).abs().max()) for a, b in zip((found.q, *found.local), exact, strict=True))
        )
        tiles.append(played.tiles)
    return worst, tiles


@pytest.mark.parametrize("parts", [False, True])
def test_long_documents_go_to_the_one_backward_kernel_and_lone_short_ones_do_not(parts: bool) -> None:
    error, tiles = interpreted(worst_gradient, parts)
    assert error < 1e-2
    assert tiles == [0, 1, 2, 4, 0]  # of 128 rows: none, 100, 130, 300 and 65 tokens, none
