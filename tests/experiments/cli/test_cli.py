"""The command line: help, JSON on standard output alone, and one line for every kind of bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcp.experiments.cli import VERBS
from flashcp.experiments.cli.main import main

PLAN_REFUSED = [
    ("method=nope", "method=nope: expected one of llama3, per_document, ring"),
    ("sharding=nope", "sharding=nope: expected one of contiguous, per_sequence"),
    ("exchange=nope", "exchange=nope: expected one of exact, compacted"),
    ("data=nope", "data=nope: expected one of stdlib, text, jsonl"),
    ("data.source=nope", "data.source='nope': expected one of stdlib, text, jsonl"),
    ("sharding={name:nope}", "sharding.name='nope': expected one of contiguous"),
    ("wrld_size=2", "wrld_size: no such override; expected one of world_size, context"),
    ("loop.steps=3", "loop.steps: no such override; expected one of world_size, context"),
    ("method=llama3 sharding.depth=3", "sharding.depth: no such override; expected one of name"),
    ("data=lengths data.x=3", "data.x: no such override; expected one of source, path, lengths, overflow"),
    ("+x=1", "'+x=1' is not an override: expected KEY=VALUE"),
    ("~method", "'~method' is not an override: expected KEY=VALUE"),
    ("method", "'method' is not an override: expected KEY=VALUE"),
    ("method==", "method==: expected one of llama3"),
    ("world_size=(2", "world_size='(2': expected a whole number"),
    ("wörld_size=2", "'wörld_size=2' is not an override: expected KEY=VALUE"),
    ("method=llama3,ring", "method=llama3,ring: expected one value"),
    ("world_size=0", "world_size=0: expected a whole number >= 1"),
    ("world_size=-2", "world_size=-2: expected a whole number >= 1"),
    ("world_size=two", "world_size='two': expected a whole number"),
    ("world_size=2.5", "world_size=2.5: expected a whole number"),
    ("context=0", "context=0: expected a whole number of tokens >= 1"),
    ("windows=0", "windows=0: expected a whole number >= 1"),
    ("seed=-1", "seed=-1: expected a whole number >= 0"),
    ("data.overflow=nope", "data.overflow='nope': expected one of truncate, carry"),
    ("data.long_document_weight=-1", "data.long_document_weight=-1.0: expected a number > 0"),
    ("data=lengths", "data=lengths: expected either data.path=FILE"),
    ("data=lengths data.path=missing", "data.path='missing': cannot be read (No such file or directory)"),
    ("data=lengths data.lengths=[0,5]", "data.lengths holds 0: expected whole numbers >= 1"),
    (
        f"data=lengths data.lengths=[{10**30}]",
        f"data.lengths[0]={10**30}: expected a whole number that 64 bits hold",
    ),
    ("data=lengths data.lengths=5", "data.lengths=5: expected a list, written [a,b]"),
    ("data=lengths data.lengths=[a]", "data.lengths[0]='a': expected a whole number"),
    ("data=text data.path=missing", "data.path='missing': no such file or directory"),
    ("windows=1 figure=no/x.png", "figure='no/x.png': cannot be written"),
    ("method=flashcp_paper figure=no/x.png", "figure='no/x.png': cannot be written"),
    ("method=flashcp_paper sharding.target_imbalance=0.5", "sharding.target_imbalance=0.5: expected a number >= 1"),
    ("data=null", "data=null: expected one of stdlib, text"),
    ("method=5", "method=5: expected one of llama3"),
    ("context=2147483648", "context=2147483648: expected a whole number of tokens >= 1 and <= 2147483647"),
    ("method=llama3 windows=1 figure=.", "figure='.': cannot be written (it is a directory)"),
]
TRAIN_REFUSED = [
    ("method=nope", "method=nope: expected one of llama3"),
    ("experiment=nope", "experiment=nope: expected one of demo"),
    ("data=pile", "data.source='pile' holds document lengths and no text"),
    ("data=text", "data.path is empty: expected a file, a directory or a glob"),
    ("data=jsonl data.path=missing", "data.path='missing': no such file or directory"),
    ("world_size=0", "world_size=0: expected a whole number >= 1"),
    ("threads=0", "threads=0: expected a whole number >= 1"),
    ("context=1", "context=1: expected a whole number from 2 to "),
    (
        "method=ulysses world_size=3",
        "exchange='ulysses' with model.heads=8, kv_heads=4: cannot be shared out among 3 ranks",
    ),
    ("model.heads=3", "model.dim=256: expected an even multiple of model.heads=3"),
    ("loop.steps=0", "loop.steps=0: expected a whole number >= 1"),
    ("profile=true loop.steps=1", "profile=true with loop.steps=1: expected at least 2"),
    ("profile=maybe", "profile='maybe': expected true or false"),
    ("loop.precision=fp8", "loop.precision='fp8': expected one of fp32, bf16"),
    ("loop.stepz=1", "loop.stepz: no such override; expected one of steps, accumulation"),
    ("context=1 world_size=1", "context=1: expected a whole number from 2 to 2147483647"),
    ("context=2147483648", "context=2147483648: expected a whole number from 2 to 2147483647"),
    ("seed=-1", "seed=-1: expected a whole number >= 0"),
    ("method=null", "method=null: expected one of llama3"),
    ("cluster=h100-nvlink", "cluster: no such override; expected parallel.cluster, or one of world_size"),
    ("heads=4", "heads: no such override; expected model.heads, or one of "),
    ("parallel.sharding=ring", "parallel.sharding: no such override; expected sharding, or one of overlap"),
    ("parallel={zz:1}", "parallel.zz: no such override; expected one of overlap"),
    ("parallel.timeout_s=inf", "parallel.timeout_s=inf: expected seconds > 0"),
    ("loop.timeout_s=inf", "loop.timeout_s=inf: expected seconds > 0"),
    ("data=stdlib data.path=foo", "data.path='foo': data=stdlib reads Python's own files and takes no path"),
    ("out=/proc/foo", "out='/proc/foo': cannot be written (No such file or directory)"),
    ("method=flashcp_paper sharding.target_imbalance=0", "sharding.target_imbalance=0.0: expected a number >= 1"),
    ("parallel.overlap=nope", "parallel.overlap='nope': expected one of auto, none, staged"),
    ("parallel.tuning.forward=128x64", "parallel.tuning.forward: '128x64': expected QUERY_ROWSxKEY_ROWSxWARPS"),
    ("parallel.tuning.forward=48x64x4x2", "parallel.tuning.forward: block_m=48: expected one of 16, 32"),
    ("parallel.tuning.backward_kv=64x64x3x1", "parallel.tuning.backward_kv: warps=3: expected one of 1, 2"),
    ("parallel.tuning.backward_q=64x64x4x2xtf32", "parallel.tuning.backward_q: precision='tf32'"),
    ("parallel.tuning.backward=64x64x4x2", "parallel.tuning.backward: no such override; expected one of forward"),
    ("parallel.tuning=64x64x4x2", "parallel.tuning='64x64x4x2': expected a mapping"),
    ("checkpoint.resume=nowhere", "checkpoint.resume='nowhere': no checkpoint there"),
    ("tracker.wandb=nope", "tracker.wandb='nope': expected one of offline, online, disabled"),
    ("data.tokenizer=no.json", "data.tokenizer='no.json': cannot be read"),
]
SWEEP_REFUSED = [
    ("experiment=nope", "experiment=nope: expected one of demo, overlap, beyond_paper, demo_hybrid, demo_predicted"),
    (
        "experiment=paper_fig3,paper_fig6",
        "experiment=paper_fig3: expected flashcp sweep experiment=paper_fig3, one sweep",
    ),
    ("experiment=paper_fig3 methods=flashcp", "methods='flashcp': expected a list, written [a,b]"),
    ("experiment=demo loop.stepz=1", "loop.stepz: no such override; expected one of steps"),
    ("experiment=demo method=llama3,nope", "method=nope: expected one of llama3"),
    ("out=/proc/foo", "out='/proc/foo': cannot be written (No such file or directory)"),
    ("experiment=demo context=1", "context=1: expected a whole number from 2 to "),
    ("experiment=demo sweep.name=../../x", "sweep.name='../../x': expected the name of a folder below outputs/"),
    ("experiment=demo sweep.baseline=nope", "sweep.baseline='nope': expected one of llama3"),
    ("method=llama3,ulysses world_size=3", "exchange='ulysses'"),
]
REPORT_REFUSED = [
    ("", "0 directories given: expected one that holds results.csv"),
    ("nowhere", "nowhere: no such directory; expected one that holds results.csv"),
    (".", ".: no results.csv in it; expected the directory of a sweep"),
    (". x=1", "x: no such override; expected baseline"),
]
BENCH_REFUSED = [
    ("", "bench '': expected one of planner, awkward, attention, exchange"),
    ("nope", "bench 'nope': expected one of planner, awkward, attention, exchange"),
    ("planner windows=x", "windows='x': expected a whole number"),
    ("planner nope=1", "nope: no such override; expected one of data_sets"),
    ("planner out=here", "out='here': expected a file *.csv"),
    ("planner data_sets=[nope]", "data set 'nope': expected one of wlb_llm, pile, redpajama"),
]
REFUSED = [
    pytest.param(verb, words, message, id=f"{verb} {words}")
    for verb, table in (
        ("plan", PLAN_REFUSED),
        ("train", TRAIN_REFUSED),
        ("sweep", SWEEP_REFUSED),
        ("report", REPORT_REFUSED),
        ("bench", BENCH_REFUSED),
    )
    for words, message in table
]


@pytest.mark.parametrize("name", ["planner", "paper_fit", "calibrate"])
def test_out_of_a_benchmark_that_cannot_be_written_is_one_line(
    refused: Callable[..., str], tmp_path: Path, name: str
) -> None:
    suffix = ".csv" if name == "planner" else ".yaml"
    (tmp_path / f"folder{suffix}").mkdir()
    for out in (f"folder{suffix}", f"{'x' * 300}{suffix}", f"/proc/x{suffix}"):
        assert "cannot be written" in refused("bench", name, f"out={out}")


@pytest.mark.parametrize(("verb", "words", "message"), REFUSED)
def test_bad_input_is_one_line(refused: Callable[..., str], verb: str, words: str, message: str) -> None:
    assert refused(verb, *words.split()).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5\n-3\n", "lengths.txt:2: '-3'"),
        ("5\n0\n", "lengths.txt:2: '0'"),
        (
            "5\n" + "7" * 5000,
            "lengths.txt:2: '7777777777777777777777777777777777777777': expected one whole number >= 1 of",
        ),
        ("x\n", "lengths.txt:1: 'x'"),
        ("", "data.path="),
    ],
)
def test_bad_file_of_lengths_is_one_line(refused: Callable[..., str], tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "lengths.txt").write_text(line)
    assert refused("plan", "data=lengths", "data.path=lengths.txt").startswith(message)


@pytest.mark.parametrize("key", ["data=lengths data.path", "cluster_file"])
@pytest.mark.parametrize(("path", "what"), [("/dev/zero", "a device"), ("pipe", "a pipe")])
def test_a_file_without_end_is_one_line(
    refused: Callable[..., str], tmp_path: Path, key: str, path: str, what: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    message = f"{key.split()[-1]}={path!r}: {what}, expected a file"
    assert refused("simulate", *f"{key}={path}".split()).startswith(message)


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_out_that_is_a_file_is_one_line(
    refused: Callable[..., str], tmp_path: Path, tiny: list[str], verb: str
) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in ("taken", "taken/below"):
        assert refused(verb, *tiny, f"out={out}").endswith("taken is not a directory that may be written to")


def test_unknown_verb_and_option(refused: Callable[..., str]) -> None:
    assert refused("plam") == f"'plam': no such verb; expected one of {', '.join(VERBS)}"
    assert refused("plan", "--jsn").startswith("--jsn: no such option; expected --help, --json")


def test_bad_line_of_json_found_by_the_ranks_leaves_nothing(
    refused: Callable[..., str], tmp_path: Path, tiny: list[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "hello world"}\n{"text": \n')
    message = refused("train", *tiny, "world_size=1", "data=jsonl", "data.path=bad.jsonl")
    assert message.startswith("bad.jsonl:2: not a line of JSON")


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [verb for verb in VERBS if f"\n  {verb} " not in shown] == []
    assert main([]) == 2


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: flashcp {verb} ")
    if verb in ("plan", "train", "sweep"):
        assert "llama3, per_document, ring" in shown
        assert "\n  world_size: " in shown
    if verb == "simulate":
        assert re.search(r"\n  kernel: modelled  # modelled, or measured: ", shown)
        assert re.search(r"\n  ffn_dim: 0  # of the MLP; 0: 8/3 of the width", shown)
        assert "KV GiB, the most of any window" in " ".join(shown.split())
    if verb == "bench":
        assert "planner, awkward, mixes, attention or exchange" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_in_a_fresh_process(verb: str) -> None:
    code = "import sys; from flashcp.experiments.cli.main import main; sys.exit(main(sys.argv[1:]))"
    shown = subprocess.run([sys.executable, "-c", code, verb, "--help"], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: flashcp {verb} ")


def test_help_is_quick_and_plan_leaves_torch_alone() -> None:
    code = "import sys; from flashcp.experiments.cli.main import main; main(sys.argv[1:])"
    heavy = "assert not {'torch', 'matplotlib', 'wandb'} & set(sys.modules), sorted(sys.modules)"
    quick = f"{code}; {heavy}; assert not {{'numpy', 'hydra'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", quick, "--help"], check=True)
    subprocess.run([sys.executable, "-c", f"{code}; {heavy}", "plan", "windows=2"], check=True, capture_output=True)


def test_json_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "windows=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == 2
