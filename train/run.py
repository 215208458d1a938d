"""One training run from its config to its summary: everything is checked before anything is written."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flashcp.options import planner
from flashcp.train.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import read_documents
from flashcp.train.data.loader import Batch, Loader
from flashcp.train.data.sources import Source, open_source
from flashcp.train.data.tokenizer import Tokenizer, load_tokenizer
from flashcp.train.data.windows import pack_documents
from flashcp.train.loop import Trainer
from flashcp.train.model import Decoder, ModelConfig
from flashcp.train.optimizer import build_optimizer
from flashcp.train.ranks import Ranks, launched_rank, world
from flashcp.train.summary import summarise, versions, write_json
from flashcp.train.trace import TRACE, traced
from flashcp.train.tracker import Tracker

__all__ = ["Prepared", "prepare", "run"]


@dataclass(frozen=True)
class Prepared:
    """What a config turned out to name: everything a run needs that is there before ranks start.

    model: with its vocabulary filled in. identity: what a checkpoint must share with the run that resumes it,
    by section and field. checkpoint: the one to resume from, if any.
    """

    source: Source
    tokenizer: Tokenizer
    model: ModelConfig
    identity: dict[str, Any]
    checkpoint: Path | None


def prepare(config: TrainConfig, world_size: int) -> Prepared:
    """Open what the config names; read one document, write nothing, start nothing.

    Raises ValueError, naming value, field and legal values, for what cannot run on `world_size` ranks.
    """
    config.check(world_size)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_token)
    vocab_size = config.model.vocab_size or -(-tokenizer.vocab_size // 64) * 64
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size}: expected 0 or at least the tokenizer's {tokenizer.vocab_size}"
        )
    model = replace(config.model, vocab_size=vocab_size)
    same_data = ("source", "path", "subset", "split", "text_field", "tokenizer", "end_token", "overflow", "longest")
    identity = {
        "model": {name: value for name, value in vars(model).items() if name != "checkpoint_activations"},
        "data": {name: getattr(config.data, name) for name in same_data},
        "run": {"context": config.context},
    }
    checkpoint = find_checkpoint(Path(config.out), config.checkpoint.resume, identity, config.loop.steps)
    source = open_source(config.data)
    next(read_documents(source))
    return Prepared(source, tokenizer, model, identity, checkpoint)


def run(config: TrainConfig) -> dict[str, Any] | None:
    """Train as this process's rank. Returns the summary on rank 0 (also in out/summary.json), None elsewhere.

    Raises ValueError for bad input, before anything is written unless a document goes bad later.
    """
    ready = prepare(config, launched_rank()[1])
    with world(config.loop.device, config.loop.timeout_s) as ranks:
        torch.manual_seed(config.seed)
        cp = config.parallel.operator(config.exchange.name)
        model = Decoder(ready.model, cp, config.seed).to(ranks.device)
        optimizer = build_optimizer(model, config.optimizer)
        progress = load_checkpoint(ready.checkpoint, model, optimizer) if ready.checkpoint else Progress()
        documents = read_documents(ready.source, config.data.epochs, progress.position)
        data = config.data
        windows = pack_documents(
            documents, ready.tokenizer, config.context, data.overflow, progress.position, data.longest
        )
        make_plan = planner(config.sharding, ranks.world_size)
        with Loader(windows, make_plan, config.exchange.name, ranks.rank, config.data.prefetch) as loader:
            batches = _peek(loader, config, progress)
            trainer = Trainer(config.loop, config.optimizer, model, optimizer, cp, batches, progress, ranks)
            return _train(trainer, config, ready.identity, ranks)


def _peek(loader: Loader, config: TrainConfig, progress: Progress) -> Iterator[Batch]:
    """The loader's batches, the first step's made: what is wrong with them shows before a file is written."""
    first = list(itertools.islice(loader, config.loop.accumulation))
    if len(first) < config.loop.accumulation:
        more = f" after step {progress.step}" if progress.step else ""
        raise ValueError(
            f"data.epochs={config.data.epochs}: the documents fill {len(first)} windows of "
            f"context={config.context}{more}, expected at least loop.accumulation={config.loop.accumulation}"
        )
    return itertools.chain(first, loader)


def _train(trainer: Trainer, config: TrainConfig, identity: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
    progress, out = trainer.progress, Path(config.out)
    steps = tqdm(
        trainer.steps(),
        initial=progress.step,
        total=config.loop.steps,
        unit="step",
        disable=ranks.rank != 0 or not config.loop.progress,
    )
    written = dataclasses.asdict(config)
    tracker = Tracker(config.tracker, out, written, progress.step + 1) if ranks.rank == 0 else None
    if tracker:
        (out / "summary.json").unlink(missing_ok=True)  # an earlier run's
        print(f"transport {trainer.cp.transport}: {trainer.cp.transport_reason}", file=sys.stderr)
        shutil.rmtree(out / TRACE, ignore_errors=True)
    summary = None
    try:
        for row in traced(steps, out / TRACE, ranks.rank) if config.profile else steps:
            steps.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            if tracker and not tracker.rows and trainer.cp.receive_bytes:
                mib = trainer.cp.receive_bytes / 2**20
                steps.write(f"receive buffers: {mib:.1f} MiB a rank, backward={trainer.cp.backward}", file=sys.stderr)
            if tracker:
                tracker.log(row)
            if config.checkpoint.every and progress.step % config.checkpoint.every == 0:
                save_checkpoint(
                    out, config.checkpoint.keep, identity, trainer.model, trainer.optimizer, progress, ranks
                )
        if tracker:
            summary = {
                **summarise(tracker.rows),
                "world_size": ranks.world_size,
                "transport": trainer.cp.transport,
                "overlap": trainer.cp.overlap,
                "receive_mib": trainer.cp.receive_bytes / 2**20,
                "versions": versions(ranks.device),
                "config": written,
            }
            write_json(out / "summary.json", summary)
            if config.profile:
                print(f"traces of the ranks: {out / TRACE} (open one in ui.perfetto.dev)", file=sys.stderr)
    finally:
        steps.close()
        if tracker:
            tracker.close(summary)
    return summary
