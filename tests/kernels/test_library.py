"""The operators: torch.compile once for many plans, checkpointing, fake tensors, gradients, errors. On the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import flashcp
from flashcp import Mask
from flashcp.kernels.library import attention, dynamic, mask_tensor, schedule_tensor, whole_pack
from flashcp.kernels.schedule import Schedule, build_schedule, whole_pack_schedule
from flashcp.sharding.masks import read_masks
from tests.packs import random_lengths, random_qkv, relative_error

TOKENS = 96
SCALE = 0.25
BOTH = pytest.mark.parametrize("implementation", ["cpu", "varlen"])


def packs(count: int) -> list[list[int]]:
    """Ways to fill a window, of very different numbers of documents."""
    rng = np.random.default_rng(0)
    cuts = [np.unique(rng.integers(1, TOKENS, n)) for n in range(count)]
    return [np.diff([0, *cut, TOKENS]).tolist() for cut in cuts]


def whole_inputs(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    *qkv, grad = random_qkv(sum(lengths), 4, 2, 16, torch.float32, seed=len(lengths))
    return [x.requires_grad_() for x in qkv], grad


def compiled(fn: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    """The function compiled in one graph, and the counter of how often it was."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(fn, fullgraph=True, backend=counter), counter


@BOTH
def test_twenty_packs_compile_once(implementation: str) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return flashcp.varlen_attention(2 * q, k, v, lengths, implementation).sin()

    fast, counter = compiled(layer)
    for lengths in packs(20):
        qkv, grad = whole_inputs(lengths)
        out = fast(*qkv, dynamic(torch.tensor(lengths)))
        wanted = flashcp.reference_attention(2 * qkv[0], *qkv[1:], lengths).sin()
        assert relative_error(out, wanted) < 1e-5
        for a, b in zip(
            torch.autograd.grad(out, qkv, grad), torch.autograd.grad(wanted, qkv, grad.double()), strict=True
        ):
            assert relative_error(a, b) < 1e-5
    assert counter.frame_count == 1


@BOTH
def test_twenty_plans_compile_once(implementation: str) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, received: Tensor, schedule: Tensor) -> Tensor:
        return attention(q, k, v, received, schedule, SCALE, implementation)[0] + 1

    fast, counter = compiled(layer)
    received_rows = set()
    for i, lengths in enumerate(packs(20)):
        plan = flashcp.plan(lengths, 3, ("per_document", "per_sequence", "contiguous")[i % 3])
        rank = i // 3 % 3
        local, received = plan.local(rank), plan.route("exact").received(rank)
        schedule = build_schedule(local, local=local, received=received)
        rows = int((received.stop - received.start).sum())
        received_rows.add(rows)
        q, k, v, grad = random_qkv(int(plan.tokens[rank]), 4, 2, 16, torch.float32, seed=i)
        others = torch.randn(rows, 2, 2, 16)
        leaves = [x.requires_grad_() for x in (q, k, v, others)]
        marked = dynamic(others.detach()).requires_grad_()
        out = fast(q, k, v, marked, schedule_tensor(schedule))
        wanted = attention(*leaves, torch.from_numpy(schedule.array), SCALE, implementation)[0] + 1
        assert torch.equal(out, wanted)
        for a, b in zip(
            torch.autograd.grad(out, [q, k, v, marked], grad), torch.autograd.grad(wanted, leaves, grad), strict=True
        ):
            assert torch.equal(a, b)
    assert {0} < received_rows  # none is a number like any other
    assert counter.frame_count == 1


def test_a_list_of_lengths_compiles() -> None:
    qkv, _ = whole_inputs([50, 46])
    fast, _ = compiled(lambda q, k, v: flashcp.varlen_attention(q, k, v, [50, 46]))
    assert torch.equal(fast(*qkv), flashcp.varlen_attention(*qkv, [50, 46]))


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same(reentrant: bool, implementation: str) -> None:
    lengths = [50, 46]
    qkv, grad = whole_inputs(lengths)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashcp.varlen_attention(q.tanh(), k, v, lengths, implementation)

    plain = torch.autograd.grad(layer(*qkv), qkv, grad)
    for x in qkv:
        x.grad = None
    checkpoint(layer, *qkv, use_reentrant=reentrant).backward(grad)
    for a, x in zip(plain, qkv, strict=True):
        assert torch.equal(a, x.grad)


@BOTH
def test_the_operators_keep_torchs_rules(implementation: str) -> None:
    lengths = [30, 10]
    q, k, v, _ = random_qkv(40, 2, 1, 16, torch.float32, seed=0)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    empty = torch.zeros(0, 2, 1, 16)
    schedule = torch.from_numpy(whole_pack_schedule(np.array(lengths)).array)
    torch.library.opcheck(torch.ops.flashcp.attention, (*inputs, empty, schedule, SCALE, implementation))
    torch.library.opcheck(torch.ops.flashcp.whole_pack, (torch.tensor(lengths), 40))


def test_whole_pack_is_the_schedule_of_the_lengths() -> None:
    for seed in range(5):
        lengths = np.array(random_lengths(seed))
        made = Schedule.from_array(whole_pack(torch.from_numpy(lengths), int(lengths.sum())).numpy())
        wanted = whole_pack_schedule(lengths)
        assert made.seen is None
        for name in [name for name in Schedule.__dataclass_fields__ if name != "seen"]:
            assert np.array_equal(getattr(made, name), getattr(wanted, name))
            assert getattr(made, name).dtype == getattr(wanted, name).dtype


@BOTH
def test_lse_is_the_log_of_the_sum(implementation: str) -> None:
    q, k, v, _ = random_qkv(40, 2, 1, 16, torch.float32, seed=0)
    schedule = torch.from_numpy(whole_pack_schedule(np.array([40])).array)
    out, lse = attention(q.requires_grad_(), k, v, torch.zeros(0, 2, 1, 16), schedule, SCALE, implementation)
    assert out.requires_grad
    assert not lse.requires_grad
    scores = SCALE * torch.einsum("qhd,kd->qhk", q, k[:, 0])
    for row in (0, 7, 39):
        assert torch.allclose(lse[row], scores[row, :, : row + 1].logsumexp(-1), atol=1e-5)


def test_a_schedule_that_does_not_fit_is_named() -> None:
    q, k, v, _ = random_qkv(40, 2, 1, 16, torch.float32, seed=0)
    schedule = torch.from_numpy(whole_pack_schedule(np.array([41])).array)
    with pytest.raises(ValueError, match=r"schedule reaches row 40 of q: expected rows below 40"):
        attention(q, k, v, torch.zeros(0, 2, 1, 16), schedule, SCALE)
    with pytest.raises(ValueError, match="add up to 41: expected the 40 tokens"):
        flashcp.varlen_attention(q, k, v, torch.tensor([41]))
    with pytest.raises(ValueError, match="expected a dense one of whole numbers"):
        flashcp.varlen_attention(q, k, v, torch.tensor([40.0]))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"v": torch.zeros(3, 2, 16)}, "expected equal tokens"),
        ({"k": torch.zeros(7, 1, 16)}, "expected equal tokens and head_dim, and k and v of as many heads"),
        ({"q": torch.zeros(7, 3, 16)}, "expected query heads to be a multiple of KV heads"),
        ({"received": torch.zeros(0, 2, 4, 16)}, r"received is torch.float32 \[0, 2, 4, 16\]: expected"),
        ({"received": torch.zeros(0, 2, 16)}, "received is"),
        ({"schedule": torch.zeros(0, dtype=torch.int64)}, "expected what `schedule_tensor` gives"),
        ({"softmax_scale": -1.0}, "softmax_scale=-1.0: expected a positive number"),
        (dict.fromkeys(("q", "k", "v"), torch.zeros(7, 2, 16, dtype=torch.float64)), "expected one of"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(changed: dict[str, object], said: str) -> None:
    fitting: dict[str, object] = dict.fromkeys(("q", "k", "v"), torch.zeros(7, 2, 16))
    fitting |= {"received": torch.zeros(0, 2, 2, 16), "schedule": whole_pack(torch.tensor([3, 4]), 7)}
    with pytest.raises(ValueError, match=said):
        attention(**{**fitting, "softmax_scale": SCALE, "implementation": "cpu", **changed})  # type: ignore[arg-type]


SEEN = [Mask("window", 7), Mask("prefix", 5), Mask(blocks=[(3, 20)])]


def test_masks_softcap_and_sinks_compile_and_lengths_stay_dynamic() -> None:
    """Masks are constants of the graph, given as an argument or not."""
    sinks = torch.randn(4, requires_grad=True)

    def layer(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Mask | list[Mask]) -> Tensor:
        return flashcp.varlen_attention(2 * q, k, v, lengths, "cpu", masks=mask, softcap=5.0, sinks=sinks).sin()

    fast, counter = compiled(layer)
    for lengths in ([96], [50, 46], [30, 40, 26]):
        qkv, grad = whole_inputs(lengths)
        for mask in SEEN:
            out = fast(*qkv, dynamic(torch.tensor(lengths)), mask)
            wanted = flashcp.reference_attention(
                2 * qkv[0], *qkv[1:], lengths, masks=mask, softcap=5.0, sinks=sinks
            ).sin()
            assert relative_error(out, wanted) < 1e-5
            leaves = [*qkv, sinks]
            found = torch.autograd.grad(out, leaves, grad)
            assert all(
                relative_error(a, b) < 1e-5
                for a, b in zip(found, torch.autograd.grad(wanted, leaves, grad.double()), strict=True)
            )
    assert counter.frame_count <= len(SEEN)
    qkv, _ = whole_inputs([50, 46])
    each = [Mask("full"), Mask("window", 3)]
    wanted = flashcp.reference_attention(2 * qkv[0], *qkv[1:], [50, 46], masks=each, softcap=5.0, sinks=sinks).sin()
    assert relative_error(fast(*qkv, dynamic(torch.tensor([50, 46])), each), wanted) < 1e-5


def test_operators_with_masks_softcap_and_sinks_keep_torchs_rules() -> None:
    q, k, v, _ = random_qkv(40, 2, 1, 16, torch.float32, seed=0)
    inputs = [x.requires_grad_() for x in (q, k, v[..., :8])]
    lengths, masks = torch.tensor([30, 10]), mask_tensor(SEEN[:2])
    schedule = whole_pack(lengths, 40, masks)
    rest = torch.zeros(0, 2, 1, 16), schedule, SCALE, "cpu", "", 3.0, torch.randn(2).requires_grad_()
    torch.library.opcheck(torch.ops.flashcp.attention, (*inputs, *rest))
    torch.library.opcheck(torch.ops.flashcp.whole_pack, (lengths, 40, masks))


def test_whole_pack_reads_masks_back() -> None:
    lengths = np.array([30, 40, 26])
    for masks in (*SEEN, SEEN, [Mask(), Mask("chunk", 4), Mask("window", 3, [(0, 2), (5, 9)])], Mask("full"), Mask()):
        made = whole_pack(torch.from_numpy(lengths), 96, mask_tensor(masks)).numpy()
        assert np.array_equal(made, whole_pack_schedule(lengths, read_masks(masks, lengths)).array)


def test_a_gradient_for_the_log_sum_exp_raises() -> None:
    qkv, grad = whole_inputs([50, 46])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flashcp.varlen_attention(q, k, v, [50, 46], masks=Mask("window", 9), return_lse=True)

    fast, _ = compiled(layer)  # type: ignore[arg-type]
    for run in (layer, fast):
        out, lse = run(*qkv)
        assert relative_error(out, flashcp.reference_attention(*qkv, [50, 46], masks=Mask("window", 9))) < 1e-5
        torch.autograd.grad(out, qkv, grad)
        for loss in (lambda o, s: s.sum(), lambda o, s: o.mean() + s.square().mean()):
            with pytest.raises(RuntimeError, match="a gradient arrived for the log-sum-exp, which carries none"):
                torch.autograd.grad(loss(*run(*qkv)), qkv)
        out, lse = run(*qkv)
        ours = torch.autograd.grad(out * lse.detach()[..., None], qkv, grad)
        assert all(x.isfinite().all() for x in ours)
    scores = 0.25 * torch.einsum("qhd,khd->qhk", qkv[0], qkv[1].repeat_interleave(2, 1))
    assert torch.allclose(lse[60], scores[60, :, 52:61].logsumexp(-1), atol=1e-5)
