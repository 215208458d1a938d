"""What is fuzzed: parsers by name, good input for each, and how to call it."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import flashcp
from flashcp.clusters import read_cluster_file
from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.packs import read_packs
from flashcp.experiments.sweep.results import RESULTS, read_rows
from flashcp.kernels.tuning import Tuning
from flashcp.train.checkpoint import Progress, find_checkpoint, read_state, save_checkpoint, state_of, verified
from flashcp.train.checksums import write_identity
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import read_documents
from flashcp.train.data.files_read import FilesRead
from flashcp.train.data.sources import DataConfig, Files, open_source, whole_text
from flashcp.train.data.tokenizer import load_tokenizer
from flashcp.train.lineage import LATEST, Lineage, find_latest
from flashcp.train.ranks import Ranks
from flashcp.train.replay import KeptStep
from flashcp.train.tracker import Tracker, TrackerConfig
from tests.checkout import ROOT

ALONE = Ranks(0, 1, torch.device("cpu"))
IDENTITY = {"model": {"dim": 8}, "data": {"path": "x"}, "run": {"context": 64}}


class Parser(NamedTuple):
    """seeds: good content. parse: raises ValueError, in one line, for what is none. file: what it is written to below a
    folder that parse is given; empty: parse takes the bytes themselves. group: of parsers of one part of the house."""

    name: str
    seeds: list[bytes]
    parse: Callable[..., object]
    file: str = ""
    group: str = ""


def parsers() -> list[Parser]:
    """All of them."""
    lengths = [b"5\n7\n3\n", b"\xef\xbb\xbf12\n\n 7 \n"]
    clusters = [*(ROOT / "conf/cluster").glob("*.yaml"), *(ROOT / "experiments/results/lab").glob("*/machine.yaml")]
    lines = [b'{"text": "a"}\n{"text": "b\\u00e9"}\n', b'{"text": ""}\n\n{"text": "c", "n": [1, {"a": null}]}\n']
    overrides = [b"world_size=8", b"data={source:pile,sigma:1.5}", b"data.lengths=[1,2,3]", b"method=llama3",
                 b"figure='a b.png'", b"sharding={name:flashcp,tolerance:1.1}", b"model=gemma3-27b"]  # fmt: skip
    plans, config = [plan.to_json().encode() for plan in _plans()], json.dumps(_config()).encode()
    identity = json.dumps({**IDENTITY, "progress": {"step": 1}, "files": {}, "documents": [["x", 1, "ab"]]}).encode()
    metrics = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    table = (ROOT / "experiments/results/lab/4x2_pile/results.csv").read_bytes().splitlines(keepends=True)
    checkpoint = _checkpoint()
    groups = {
        "planning": [
            Parser("plan", plans, _plan),
            Parser("lengths", lengths, _lengths, "lengths.txt"),
            Parser("cluster, machine.yaml", [file.read_bytes() for file in clusters], _cluster, "cluster.yaml"),
            Parser("block shapes", [b"forward=128x64x8x3xieee,backward_q=64x64x4x2", b"deterministic=false"], _tuning),
            Parser("results.csv", [b"".join(table[:8])], read_rows, RESULTS),
        ],
        "checkpoints": [
            Parser("identity.json", [identity], _identity, "identity.json"),
            Parser("signed identity", [identity], _signed, "given.json"),
            Parser(
                "latest.json", [b'{"checkpoint": "checkpoints/step_1", "lineage": "01234567"}'], find_latest, LATEST
            ),
            Parser("metadata of a checkpoint", [checkpoint["metadata"]], _metadata, "step/.metadata"),
            Parser("weights of a checkpoint", [checkpoint["weights"]], _weights, "step/__0_0.distcp"),
            Parser("step.json", [b'{"world_size": 2, "found": "nan"}'], _step, "step.json"),
            Parser("windows.json", [b'[{"tokens": [1, 2], "document_lengths": [2]}]'], _windows, "windows.json"),
            Parser("metrics.jsonl", [metrics], _metrics, "metrics.jsonl"),
        ],
        "data": [
            Parser("text", [b"Ein Text.\r\n", "Übung \U0001f600".encode()], partial(_documents, "text"), "a.txt"),
            Parser("parquet", _parquet(), partial(_documents, "parquet"), "a.parquet"),
            Parser("tokenizer", [_tokenizer()], _tokens, "tokenizer.json"),
            *(
                Parser(f"JSON lines{suffix}", packed, partial(_documents, "jsonl"), f"a.jsonl{suffix}")
                for suffix, packed in _packed(lines).items()
            ),
        ],
        "command line": [
            Parser("configuration of a run", [config], _run_config, "config.json"),
            Parser("overrides", overrides, _overrides),
        ],
    }
    return [parser._replace(group=group) for group, found in groups.items() for parser in found]


def call(parser: Parser, content: bytes, folder: Path) -> None:
    """Parse. Raises what is no ValueError, and AssertionError for one whose message is not one short line."""
    given: Any = content
    if parser.file:
        (folder / parser.file).parent.mkdir(exist_ok=True)
        (folder / parser.file).write_bytes(content)
        given = folder
    try:
        with redirect_stderr(io.StringIO()):
            parser.parse(given)
    except ValueError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, f"{parser.name}: a message of several lines: {text[:300]!r}"
        assert len(text.partition(": expected one of ")[0]) <= 600, f"{parser.name}: a long message: {text[:300]!r}"


def _plans() -> list[flashcp.ShardingPlan]:
    masks = [flashcp.Mask("window", 2), flashcp.Mask("causal", blocks=[(0, 2)])]
    layers = [(flashcp.Mask(), 1), (flashcp.Mask("window", 3), 2)]
    return [flashcp.plan([5, 3], 2, "contiguous"), flashcp.plan([5, 3], 2, masks=masks, layers=layers)]


def _config() -> dict[str, Any]:
    return {"out": "x", "context": 64, "sharding": {"name": "flashcp"}, "model": {"dim": 16}, "optimizer": {"lr": 1e-3}}


def _plan(content: bytes) -> None:
    plan = flashcp.ShardingPlan.from_json(content.decode("utf-8", "replace"))
    assert flashcp.ShardingPlan.from_json(plan.to_json()) == plan


def _lengths(folder: Path) -> None:
    read_packs({"source": "lengths", "path": str(folder / "lengths.txt")}, 64, 10, 0)


def _cluster(folder: Path) -> None:
    read_cluster_file(str(folder / "cluster.yaml"))


def _run_config(folder: Path) -> None:
    TrainConfig.from_file(folder / "config.json").check(1)


def _identity(folder: Path) -> None:
    find_checkpoint(folder, str(folder), IDENTITY, 10)
    verified(folder, ALONE)


def _signed(folder: Path) -> None:
    """Identity that somebody wrote on purpose: its checksum is right."""
    try:
        told = json.loads((folder / "given.json").read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(told, dict):
        try:
            write_identity(folder, told)
        except RecursionError:
            return
        _identity(folder)


@cache
def _checkpoint() -> dict[str, bytes]:
    """The files of a small checkpoint."""
    with tempfile.TemporaryDirectory() as place:
        model, optimizer = _model()
        read = FilesRead(Files([], partial(whole_text, 1)))
        path = save_checkpoint(Lineage(Path(place)), 1, IDENTITY, model, optimizer, Progress(), read, ALONE)
        return {"metadata": (path / ".metadata").read_bytes(), "weights": (path / "__0_0.distcp").read_bytes()}


def _model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters())


def _metadata(folder: Path) -> None:
    (folder / "step/__0_0.distcp").write_bytes(_checkpoint()["weights"])
    read_state(folder / "step", state_of(*_model(), Progress()))


def _weights(folder: Path) -> None:
    (folder / "step/.metadata").write_bytes(_checkpoint()["metadata"])
    read_state(folder / "step", state_of(*_model(), Progress()))


def _step(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(_config()))
    KeptStep.read(folder)


def _windows(folder: Path) -> None:
    (folder / "step.json").write_text('{"world_size": 2, "found": "nan"}')
    (folder / "config.json").write_text(json.dumps(_config() | {"model": {"vocab_size": 9}}))
    KeptStep.read(folder).windows()


def _metrics(folder: Path) -> None:
    Tracker(TrackerConfig(wandb="disabled"), folder, {}, first_step=2).close()


def _documents(source: str, folder: Path) -> None:
    (file,) = folder.glob("a.*")
    for skip in ("stop", "skip"):
        data = DataConfig(source=source, path=str(file), record_mib=1)
        sum(len(document.text) for document in read_documents(open_source(data), epochs=1, on_bad_record=skip))


def _parquet() -> list[bytes]:
    import pyarrow as arrow
    import pyarrow.parquet

    seeds = []
    for compression in ("none", "zstd"):
        buffer = io.BytesIO()
        table = arrow.table({"text": ["a", "b" * 50, None], "n": [1, 2, 3]})
        pyarrow.parquet.write_table(table, buffer, compression=compression)
        seeds.append(buffer.getvalue())
    return seeds


def _tokenizer() -> bytes:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made.to_str().encode()


def _tokens(folder: Path) -> None:
    load_tokenizer(str(folder / "tokenizer.json")).encode("a b c é")


def _overrides(content: bytes) -> None:
    compose("plan", [content.decode("utf-8", "surrogateescape")])


def _tuning(content: bytes) -> None:
    Tuning.from_text(content.decode("latin-1"))


def _packed(lines: list[bytes]) -> dict[str, list[bytes]]:
    """JSON lines as they are and compressed, a bomb among them: 32 MiB of zeros in a few bytes."""
    import bz2
    import gzip
    import lzma

    import zstandard

    bomb = bytes(32 << 20)
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    return {"": lines, **{suffix: [*map(pack, lines), pack(bomb)] for suffix, pack in packers.items()}}
