"""Words that no command line means, and how the command must answer: exit code 2, one line, nothing left behind."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flashcp.experiments.cli.main import main

LONG = "y" * 10_000
LONGEST_LINE = 2100
NUMBERS = ["9223372036854775808", "1e308", "nan", "-1", f"1{'0' * 5000}", "null", LONG, "[]", "{a:1}", "[[1]]", "''"]
KEYS = {
    "plan": ["world_size", "context", "windows", "batch_windows", "head_ranks", "seed"],
    "simulate": [
        "micro_batches",
        "waits",
        "head_ranks",
        "overlap",
        "gradient_wire",
        "cluster_file",
        "kernel",
        "workers",
        "methods",
        "model.query_heads",
        "model.layers",
        "model.ffn_dim",
        "model.window",
        "cluster.attention.forward.tflops",
        "cluster.links.ranks_per_node",
    ],
    "train": [
        "world_size",
        "threads",
        "context",
        "batch_windows",
        "data_parallel",
        "seed",
        "profile",
        "data.longest",
        "data.record_mib",
        "data.epochs",
        "data.prefetch",
        "model.dim",
        "model.heads",
        "model.rope_theta",
        "parallel.timeout_s",
        "parallel.stages",
        "parallel.heap_mib",
        "parallel.head_ranks",
        "parallel.link",
        "optimizer.lr",
        "optimizer.beta1",
        "loop.steps",
        "loop.accumulation",
        "loop.device",
        "checkpoint.every",
        "checkpoint.resume",
        "tracker.wandb",
        "replay",
    ],
    "bench planner": ["context", "windows", "seeds", "world_sizes", "data_sets", "strategies"],
    "bench awkward": ["context", "random_windows", "seed"],
}
"""Keys of which each takes all of NUMBERS, beside words that make what is legal quick."""
QUICK = {
    "plan": ["windows=1", "context=256", "world_size=2"],
    "simulate": ["windows=1", "context=256", "world_size=2"],
    "train": ["world_size=1", "context=64", "out=/proc/nowhere"],
    "bench planner": ["windows=1", "context=64", "out=/proc/nowhere.csv"],
    "bench awkward": ["context=64", "out=/proc/nowhere.csv"],
}
"""What is legal ends at `out`, before anything runs."""
PATHS = [
    "pipe",
    "/dev/zero",
    "folder",
    "/proc/self/mem",
    "p" * 5000,
    "/".join(["p"] * 3000),
    "~/x.txt",
    "~nobody/x.txt",
    "Übung.txt",
    "a(1).txt",
    "a b.txt",
    "a=b.txt",
    "bad\udcff.txt",
    "'a\\0b'",
    "[",
    "{",
    "$x",
    "${x}",
    "a,b",
    "*",
    "",
    ".",
]
PLACES = {
    "plan": [
        "data=lengths data.path",
        "data=text data.path",
        "data=jsonl data.path",
        "data=parquet data.path",
        "figure",
    ],
    "simulate": ["cluster_file", "data=lengths data.path"],
    "train": ["data=text data.path", "data=jsonl data.path", "data=parquet data.path", "checkpoint.resume", "replay"],
}
"""Keys that name a file to read, or to write."""
OTHERS = [
    ["plan", "data={source:pile,x:1}"],
    ["plan", "data={source:nope}"],
    ["plan", "data={}"],
    ["plan", "data=[1]"],
    ["plan", "sharding={name:flashcp,budget:-1}"],
    ["plan", "sharding={name:flashcp,tolerance:x}"],
    ["plan", f"{LONG}=1"],
    ["plan", f"method={LONG}"],
    ["plan", "\x1b[31m=1"],
    ["plan", "a\nb=1"],
    [LONG],
    [""],
    ["plan", "--cfg", "nope"],
    ["plan", "--info", "nope"],
    ["plan", "-cd", "nowhere"],
    ["plan", "-cn", "nope"],
    ["plan", f"--{LONG}"],
    ["plan", "-m", "world_size=1,x", "windows=1", "context=64"],
    ["simulate", "methods=[a,1]"],
    ["plan", "hydra.run.dir=/proc/x"],
    ["plan", "+hydra.x=1"],
    ["train", "hydra/launcher=nope"],
    ["report", LONG],
    ["report", "\0"],
    ["export", "/dev/zero", "out=x"],
    ["export", "\0", "out=x"],
    ["export", LONG, "out=x"],
    ["doctor", "ranks=-1"],
    ["doctor", "ranks=9223372036854775808"],
    ["doctor", f"ranks={LONG}"],
    ["bench", "\0"],
    ["sweep", "experiment=demo", "sweep.name=/"],
    ["sweep", "experiment=demo", "method=llama3,llama3,x"],
    ["plan", "data=lengths", f"data.lengths=[{','.join(['1'] * 500)},0]", "world_size=2"],
    ["plan", "data=lengths", "data.lengths=[9223372036854775808]"],
    ["plan", "data.sigma=1e308", "data=pile"],
    ["plan", "data=pile", "data.sigma=nan"],
    ["plan", "data=pile", "data.long_document_weight=1e308", *QUICK["plan"]],
    ["simulate", *QUICK["simulate"], "workers=9223372036854775808"],
    ["plan", *QUICK["plan"], "method=flashcp", "sharding.granularity=9223372036854775808"],
    *(["plan", *QUICK["plan"], "data=lengths", f"data.path={path}"] for path in ("p" * 5000, "/".join(["p"] * 3000))),
]
"""Lines that once did harm, and others of their kinds."""


def every_line() -> Iterator[list[str]]:
    """A verb, what is quick, and every key with every value."""
    for verb, keys in KEYS.items():
        for key in keys:
            for number in NUMBERS:
                yield [*verb.split(), *QUICK[verb], f"{key}={number}"]
    for verb, places in PLACES.items():
        for place in places:
            for path in PATHS:
                yield [verb, *QUICK[verb], *place.split()[:-1], f"{place.split()[-1]}={path}"]


def refused(line: list[str]) -> str:
    """What is wrong with how the command ends; empty where it is right. What is legal after all may end with 0."""
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("folder").mkdir()
            os.mkfifo("pipe")
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(line)
            left = sorted(str(file) for file in Path().rglob("*") if file.name not in ("folder", "pipe"))
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            os.chdir(before)
    said = err.getvalue()
    if code == 0:
        return ""
    if code != 2 or said.count("\n") != 1 or not said.startswith("flashcp: error: ") or len(said) > LONGEST_LINE:
        return f"exit code {code}, {said.count(chr(10))} lines, {len(said)} characters: {said[:200]!r}"
    said_too = "" if "-m" in line else out.getvalue()  # a job before the bad one
    return f"left behind: {left[:3]}" if left or said_too else ""
