"""The attention campaign where there is no GPU: its gate, its cases, its masks, and what it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flashcp.experiments.attention_cases import Case, all_cases, exact_share, make_tensors, useful_share
from flashcp.experiments.attention_peers import OURS, PEERS
from flashcp.experiments.bench import keys as bench_keys
from flashcp.experiments.bench_attention import (
    LARGEST_ERROR,
    Number,
    attention_table,
    draw,
    in_turns,
    main,
    own_error,
    to_row,
)
from flashcp.experiments.usage import config_keys
from flashcp.kernels.reference import reference_attention
from flashcp.kernels.schedule import build_schedule, whole_pack_schedule
from flashcp.kernels.tuning import Blocks, Pass
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan
from tests.checkout import ROOT
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
def test_without_a_gpu_it_says_so_in_one_line(
    refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("bench", "attention", "out=here", "cases=pile", "minutes=1") == NONE_HERE
    assert main(["--out", str(tmp_path / "here")]) == 2
    assert capsys.readouterr().err == f"bench_attention: {NONE_HERE}\n"
    assert list(tmp_path.iterdir()) == []


def test_it_refuses_what_leaves_nothing_to_measure(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused("bench", "attention", "minutes=0") == "minutes=0.0: expected a number > 0"
    assert refused("bench", "attention", "minutes=nan") == "minutes=nan: expected a number > 0"
    assert refused("bench", "attention", "zz=1") == "zz: no such override; expected one of minutes, cases, out"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert refused("bench", "attention", "cases=nope").startswith(
        "cases='nope': expected a part of one of one_4k_32x32"
    )


def test_both_ways_to_start_it_take_the_same_keys(capsys: pytest.CaptureFixture[str]) -> None:
    keys = dict(config_keys(bench_keys(["attention"])))
    assert keys == {"minutes": "8.0", "cases": "", "out": ""}
    assert main([f"--{key}={value}" for key, value in (keys | {"minutes": "0"}).items()]) == 2
    assert capsys.readouterr().err == "bench_attention: minutes=0.0: expected a number > 0\n"


def test_it_runs_where_hydra_omegaconf_and_wandb_are_not() -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'wandb'))); "
        "from flashcp.experiments.bench_attention import main; main(['--minutes', '0'])"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == "bench_attention: minutes=0.0: expected a number > 0\n"


def test_the_table_has_a_line_a_case() -> None:
    numbers = [Number(OURS, "relative_error", "1", None, 0.001, None)]
    numbers += [Number(OURS, f"{which}_tflops", "TFLOP/s", 1, n, 3) for which, n in (("forward", 2), ("backward", 4))]
    rows = [to_row(case, number, "a device") for case in ("first", "second") for number in numbers]
    assert [line.split() for line in attention_table(rows).splitlines()] == [
        [case, "error", "1.0e-03", OURS, "2/4"] for case in ("first", "second")
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
def test_the_gate_lets_a_right_kernel_by_and_stops_a_wrong_one(case: Case) -> None:
    x = make_tensors(case, torch.float32, CPU)
    forward = PEERS[OURS](case, x)
    assert forward is not None
    assert own_error(case, x, forward) < 1e-5
    assert own_error(case, x, lambda: 1.05 * forward()) > LARGEST_ERROR
    assert own_error(case, x, lambda: forward() * float("nan")) == float("inf")


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


@pytest.mark.gpu
def test_timing_and_figures(tmp_path: Path) -> None:
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device)
    times = in_turns({"small": lambda: x @ x, "large": lambda: [x @ x for _ in range(20)]}, device)
    assert 0 < times["small"][0] <= times["small"][1] <= times["small"][2] < times["large"][1]
    numbers = [Number(OURS, f"{which}_tflops", "TFLOP/s", 1, 2, 3) for which in ("forward", "backward")]
    draw(tmp_path, [to_row("case", number, torch.cuda.get_device_name()) for number in numbers])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backward.png", "forward.png"]
