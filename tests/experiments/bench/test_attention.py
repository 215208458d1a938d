"""The attention campaign where there is no GPU: its gate, its cases, its masks, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flashcp.experiments.bench.attention import attention_table, measure_case, useful_share
from flashcp.experiments.bench.attention_cases import (
    OURS,
    Case,
    Tensors,
    all_cases,
    exact_share,
    make_tensors,
)
from flashcp.experiments.bench.attention_peers import PEERS, Forward
from flashcp.experiments.plots import draw_rates
from flashcp.experiments.sweep.results import Failure, Number, to_row
from flashcp.kernels.reference import reference_attention
from flashcp.kernels.schedule import build_schedule, whole_pack_schedule
from flashcp.kernels.tuning import Blocks, Pass
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan
from tests.packs import relative_error

CPU = torch.device("cpu")
LENGTHS = (60, 1, 300, 129, 20)


def small(lengths: tuple[int, ...] = LENGTHS) -> Case:
    return Case("small", whole_pack_schedule(np.array(lengths)), sum(lengths), 0, lengths, 4, 2, 16)


def share() -> Case:
    split = plan(LENGTHS, 3, "per_document")
    local, received = split.local(1), split.route("exact").received(1)
    schedule = build_schedule(local, local=local, received=received)
    return Case("share", schedule, int(split.tokens[1]), int((received.stop - received.start).sum()), None, 4, 2, 16)


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
NONE_HERE = "attention is measured on a GPU, and torch sees none here"


@no_gpu
def test_without_a_gpu_it_says_so_in_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("bench", "attention", "out=here", "cases=pile", "minutes=1") == NONE_HERE
    assert list(tmp_path.iterdir()) == []


def test_it_refuses_what_leaves_nothing_to_measure(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused("bench", "attention", "minutes=0") == "minutes=0.0: expected a number > 0"
    assert refused("bench", "attention", "minutes=nan") == "minutes=nan: expected a number > 0"
    assert refused("bench", "attention", "zz=1") == "zz: no such override; expected one of minutes, cases, out"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert refused("bench", "attention", "cases=nope").startswith(
        "cases='nope': expected a part of one of ceilings, one_16k_32x32"
    )


def test_figures_of_both_passes(tmp_path: Path) -> None:
    numbers = [Number(OURS, f"{which}_tflops", "TFLOP/s", 1, 2, 3) for which in ("forward", "backward")]
    draw_rates([to_row("case", number, "a device") for number in numbers], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backward.png", "forward.png"]


def test_the_table_has_a_line_a_case() -> None:
    numbers = [Number(OURS, "relative_error", "1", None, 0.001, None)]
    numbers += [Number(OURS, f"{which}_tflops", "TFLOP/s", 1, n, 3) for which, n in (("forward", 2), ("backward", 4))]
    rows = [to_row(case, number, "a device") for case in ("first", "second") for number in numbers]
    rows.append(to_row("ceilings", Number("copy", "copy_gbps", "GB/s", 1, 2.4, 3), "a device"))
    assert [line.split() for line in attention_table(rows).splitlines()] == [
        *([case, "error", "1.0e-03", OURS, "2/4"] for case in ("first", "second")),
        ["ceilings", "copy", "2", "GB/s"],
    ]


def test_the_gate_agrees_with_the_reference() -> None:
    case = small()
    x = make_tensors(case, torch.float32, CPU)
    wanted = reference_attention(x.q, x.k, x.v, LENGTHS)
    grads = torch.autograd.grad(wanted, (x.q, x.k, x.v), x.grad.double())
    found = exact_share(case, x, kv_head=1, block=50)
    assert relative_error(found["out"], wanted[:, 2:]) < 1e-12
    for name, grad in zip(("q", "k", "v"), (grads[0][:, 2:], grads[1][:, 1], grads[2][:, 1]), strict=True):
        assert relative_error(found[name], grad) < 1e-6  # autograd rounds to fp32


@pytest.mark.parametrize("case", [small(), share()], ids=["pack", "share"])
def test_every_provider_is_checked_then_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(case: Case, x: Tensors) -> Forward:
        calls = iter(range(3))

        def forward() -> Tensor:
            if next(calls, None) is None:
                raise MemoryError("out of memory")
            return ours()

        ours = PEERS[OURS](case, x)
        return forward

    def raises(case: Case, x: Tensors) -> Forward:
        raise RuntimeError("no kernel\nfor it")

    def of(change: Callable[[Tensor], Tensor]) -> Callable[[Case, Tensors], Forward]:
        def make(case: Case, x: Tensors) -> Forward:
            forward = PEERS[OURS](case, x)
            return lambda: change(forward())

        return make

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            raise NotImplementedError("forward only")

    others = {
        "absent": lambda case, x: None,
        "raises": raises,
        "wrong": of(lambda out: 1.05 * out),
        "nan": of(lambda out: out * float("nan")),
        "gradient": of(lambda out: out + 0.1 * (out - out.detach())),
        "no_backward": of(NoBackward.apply),
        "no_grad": of(Tensor.detach),
        "late": late,
        "left_out": raises,
    }
    monkeypatch.setattr("flashcp.experiments.bench.attention.PEERS", {**others, OURS: PEERS[OURS]})
    begun: list[str] = []
    found = list(measure_case(case, CPU, {"left_out"}, begun.append, share_s=1e-9))
    failures = {one.provider: one.reason for one in found if isinstance(one, Failure)}
    wrong = "a wrong kernel is not timed"
    assert failures.pop("wrong").endswith(wrong)
    assert failures.pop("nan") == f"relative error inf: {wrong}"
    assert failures.pop("gradient").startswith("backward: relative error")
    assert failures == {
        "raises": "no kernel for it",
        "no_backward": "backward: forward only",
        "late": "timing late/forward: out of memory",
    }
    timed = {(one.provider, one.metric) for one in found if isinstance(one, Number) and one.unit == "ms"}
    forward_only = {(name, "forward_ms") for name in ("gradient", "no_backward", "no_grad")}
    ours = {(OURS, f"{which}_ms") for which in ("forward", "backward", "forward_no_grad")}
    assert timed == forward_only | ours
    assert begun == [*(name for name in others if name != "left_out"), OURS, OURS, ""]
    (error,) = (one.median for one in found if isinstance(one, Number) and one[:2] == (OURS, "relative_error"))
    assert error < 1e-5


def test_a_wrong_kernel_of_ours_costs_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {OURS: lambda case, x: lambda: x.q * 0, "peer": PEERS[OURS]}
    monkeypatch.setattr("flashcp.experiments.bench.attention.PEERS", peers)
    found = list(measure_case(small(), CPU, share_s=1e-9))
    assert [one.provider for one in found if isinstance(one, Failure)] == [OURS]
    assert {one.provider for one in found if isinstance(one, Number)} == {"peer"}


def test_flex_is_compiled_anew_for_every_case_and_never_left_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # a CPU's flex has no backward
    # Not by `setattr`, which would leave torch without the setting.
    limited = torch._dynamo.config.patch(recompile_limit=1)
    many = [(Case("x", whole_pack_schedule(np.array([n])), n, 0, (n,), 2, 2, 16)) for n in (100, 200, 300)]

    def run(case: Case) -> None:
        x = make_tensors(case, torch.float32, CPU)
        wanted = reference_attention(x.q, x.k, x.v, case.lengths)
        with torch.no_grad():
            detached = replace(x, **{name: getattr(x, name).detach() for name in ("q", "k", "v")})
            assert relative_error(PEERS["flex"](case, detached)(), wanted) < 1e-5

    with limited:
        for case in many:
            run(case)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    with limited, pytest.raises(Exception, match=r"recompile_limit|fullgraph=True"):
        run(many[0])


def test_flex_gets_the_mask_of_the_documents() -> None:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    for lengths in (LENGTHS, (256, 128), (1000,)):
        case = small(lengths)
        forward = PEERS["flex"](case, make_tensors(case, torch.float32, CPU))
        cells = dict(zip(forward.__code__.co_freevars, (c.cell_contents for c in forward.__closure__), strict=True))
        mask: BlockMask = cells["mask"]
        wanted = create_block_mask(mask.mask_mod, None, None, case.rows, case.rows, device="cpu")
        assert torch.equal(mask.kv_num_blocks, wanted.kv_num_blocks)
        assert torch.equal(mask.full_kv_num_blocks, wanted.full_kv_num_blocks)
        assert torch.equal(mask.to_dense(), wanted.to_dense())


def test_cases_cover_the_lengths_and_the_shares() -> None:
    cases = list(all_cases())
    assert {(case.query_heads, case.kv_heads) for case in cases} == {(32, 32), (32, 8)}
    names = [case.name for case in cases]
    assert {"one_4k", "one_128k", "16x8k", "4096x32", "wlb_llm", "rank_of_8_per_document"} <= set(names)
    pairs = {case.name: case.schedule.pairs for case in cases}
    for name in names:
        if name.startswith("as_one_document_"):
            assert pairs[name] == pytest.approx(pairs[name.removeprefix("as_one_document_")], rel=1e-3)


def test_useful_share_counts_the_blocks_of_the_kernels() -> None:
    # two documents, 64 x 64: three blocks for the first, the second's row shares no tile with it
    assert useful_share(small((128, 1)).schedule, 129, Pass.FORWARD, Blocks(64, 64, 4, 1)) == (8256 + 1) / (4 * 64**2)
    # the keys of a document of 100 in two tiles of 64: read by 4 and 2 blocks of 32 queries, the last ones cut short
    assert useful_share(small((100,)).schedule, 100, Pass.BACKWARD_KV, Blocks(32, 64, 4, 1)) == 5050 / (6 * 32 * 64)
    # queries 30..60 behind a prefix of 30 that was received: one tile, two blocks of 16 + two of its own rows
    split = ShardingPlan.from_shards([60], 2, [(0, 0, 30, 0), (0, 30, 60, 1)])
    local, received = split.local(1), split.route("exact").received(1)
    schedule = build_schedule(local, local=local, received=received)
    for which, blocks in ((Pass.FORWARD, Blocks(64, 16, 4, 1)), (Pass.BACKWARD_Q, Blocks(64, 16, 4, 1))):
        assert useful_share(schedule, 30, which, blocks) == (30 * 30 + 465) / (4 * 16 * 64)


def test_peers_leave_what_they_do_not_do() -> None:
    x = make_tensors(share(), torch.float32, CPU)
    assert [name for name, make in PEERS.items() if make(share(), x) is not None] == [OURS]
    x = make_tensors(small(), torch.float32, CPU)
    assert PEERS["cudnn"](small(), x) is None
    assert PEERS["fa3"](small(), x) is None
    with pytest.raises(NotImplementedError, match="_cudnn_attention_forward"):  # there on a GPU alone
        PEERS["cudnn_varlen"](small(), x)()
