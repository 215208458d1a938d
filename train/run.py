"""A training run from its config to its summary: everything is checked before anything is written.

Compared one after another, a load that comes in the middle makes one method look slow. So runs can take turns, step by
step: a step of one is compared with the step of the other beside it.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flashcp.sharding.values import shown
from flashcp.train.checkpoint import Progress, find_checkpoint, load_checkpoint
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import read_documents
from flashcp.train.data.files_read import FilesRead
from flashcp.train.data.loader import Batch, Loader, Share
from flashcp.train.data.same_files import check_same_files
from flashcp.train.data.sources import DataConfig, Source, open_source
from flashcp.train.data.tokenizer import Tokenizer, load_tokenizer
from flashcp.train.data.windows import pack_documents
from flashcp.train.head_ranks import head_ranks_of
from flashcp.train.lineage import Lineage
from flashcp.train.link import SlowedLink, slowed_link
from flashcp.train.lock import only_writer
from flashcp.train.loop import Trainer
from flashcp.train.model import Decoder
from flashcp.train.model_config import ModelConfig
from flashcp.train.nonfinite import NonFiniteError
from flashcp.train.optimizer import build_optimizer
from flashcp.train.ranks import Ranks, launched_rank, world
from flashcp.train.replay import keep
from flashcp.train.saving import Saver
from flashcp.train.summary import spread, summarise, versions, write_json
from flashcp.train.trace import TRACE, traced
from flashcp.train.tracker import Tracker

FREE_TO_CHANGE = ("checkpoint_activations", "loss_rows")
"""Of the model: what a resumed run may have otherwise than its checkpoint."""
SHARED = (
    *("context", "batch_windows", "seed", "parallel.link"),
    *("loop.steps", "loop.accumulation", "loop.device", "loop.timeout_s"),
)


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
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer, data.end_token, data.stored_lengths, data.parse_special)
    vocab_size = config.model.vocab_size or -(-tokenizer.vocab_size // 64) * 64
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size}: expected 0 or at least the tokenizer's {tokenizer.vocab_size}"
        )
    model = replace(config.model, vocab_size=vocab_size)
    same_data = (
        *("source", "path", "subset", "split", "text_field", "overflow", "longest"),
        *("tokenizer", "end_token", "stored_lengths", "parse_special"),
    )
    identity = {
        "model": {name: value for name, value in vars(model).items() if name not in FREE_TO_CHANGE},
        "data": {name: getattr(data, name) for name in same_data} | {"tokenizer_sha256": tokenizer.digest},
        "run": {"context": config.context},
    }
    checkpoint = find_checkpoint(Path(config.out), config.checkpoint.resume, identity, config.loop.steps)
    source = open_source(data)
    next(read_documents(source, on_bad_record=data.on_bad_record))
    return Prepared(source, tokenizer, model, identity, checkpoint)


def run(config: TrainConfig) -> dict[str, Any] | None:
    """Train as this process's rank. Returns the summary on rank 0 (also in out/summary.json), None elsewhere.

    Raises ValueError for bad input, before anything is written unless a document goes bad later.
    """
    (summary,) = run_in_turns([config])
    return summary


def run_in_turns(configs: Sequence[TrainConfig]) -> list[dict[str, Any] | None]:
    """Train every configuration on the same ranks and packs, a step of each in turn: what else the machine does meets
    all. Summaries as `run` makes them, with `turns`: when the first turn began (seconds since 1970) and how many runs
    took turns.

    Each keeps weights, optimizer and communication of its own: memory is that of all together.
    Raises ValueError for bad input, and for configurations that cannot share their turns.
    """
    _check_turns(configs)
    ready = [prepare(config, launched_rank()[1]) for config in configs]
    loop = configs[0].loop
    silent_s = max(config.parallel.timeout_s for config in configs)
    with world(loop.device, loop.timeout_s, silent_s) as ranks, ExitStack() as stack:
        for one in ready:
            check_same_files(one.source.parts, ranks)
        link = slowed_link(configs[0], ready[0].source, ready[0].tokenizer, ranks)  # one rate for all
        pairs = zip(configs, ready, strict=True)
        runs = [stack.enter_context(_training(config, one, ranks, link)) for config, one in pairs]
        for note in ready[0].tokenizer.notes if ranks.rank == 0 else ():
            print(note, file=sys.stderr)
        turns = {"begun": time.time(), "runs": len(runs)}
        steps = [run.steps() for run in runs]
        turn, going = 0, True
        while going:
            rows = [next(steps[number], None) for number in order_of_turn(turn, len(runs))]
            going, turn = None not in rows, turn + 1  # the same documents: all end in the same turn
        return [run.finish(turns=turns) if len(runs) > 1 else run.finish() for run in runs]


def order_of_turn(turn: int, count: int) -> list[int]:
    """Who goes first changes, and every other turn runs backwards: nobody always follows the same one.

    3 runs: 0 1 2, then 0 2 1, then 1 2 0, then 1 0 2, ...
    """
    first = turn // 2 % count
    order = [(first + place) % count for place in range(count)]
    return order if turn % 2 == 0 else [order[0], *order[:0:-1]]


def _check_turns(configs: Sequence[TrainConfig]) -> None:
    if not configs:
        raise ValueError("no configuration to train")
    for key in (*SHARED, *(f"data.{field.name}" for field in fields(DataConfig))):
        section, _, name = key.rpartition(".")
        values = {str(getattr(getattr(config, section) if section else config, name)) for config in configs}
        if len(values) > 1:
            raise ValueError(f"{key}={', '.join(sorted(values))}: expected one value for runs that take turns")
    folders = [config.out for config in configs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"out={shown(folder)}: expected a folder for each of the runs that take turns")
    if len(configs) > 1 and any(config.profile for config in configs):
        raise ValueError("profile=True: expected False for runs that take turns, which would be in its trace")


@contextmanager
def _training(config: TrainConfig, ready: Prepared, ranks: Ranks, link: SlowedLink | None) -> Iterator[Training]:
    """A run that is ready for its first step, and closed at the end whatever happens."""
    torch.manual_seed(config.seed)
    replica = ranks.replica(config.data_parallel)
    head_ranks, chosen = head_ranks_of(config, ready.source, ready.tokenizer, ready.checkpoint, ranks)
    parallel = replace(config.parallel, head_ranks=head_ranks)
    cp = parallel.operator(config.exchange.name, link.gbps if link else 0.0, replica.group)
    model = Decoder(ready.model, cp, config.seed).to(ranks.device)
    optimizer = build_optimizer(model, config.optimizer)
    read, progress = FilesRead(ready.source), Progress()
    if ready.checkpoint:
        go_on = config.checkpoint.on_changed_data
        progress = load_checkpoint(ready.checkpoint, model, optimizer, read, go_on, ranks)
    data = config.data
    documents = read_documents(ready.source, data.epochs, progress.position, data.on_bad_record)
    windows = pack_documents(documents, ready.tokenizer, config.context, data.overflow, progress.position, data.longest)
    make_plan = config.planner(cp.holders, cp.head_ranks)
    if config.parallel.cluster and ranks.rank == 0:
        by = "chosen by predicted time there" if config.plans_by_time else "the same on any cluster"
        print(
            f"parallel.cluster={config.parallel.cluster}: plans of sharding={config.sharding['name']} are {by}",
            file=sys.stderr,
        )
    share = Share(config.exchange.name, replica.rank, replica.index, replica.count, cp.head_ranks)
    with Loader(windows, make_plan, share, data.prefetch, config.batch_windows, data.plan_workers) as loader:
        batches = _peek(loader, config, progress)
        trainer = Trainer(config.loop, config.optimizer, model, optimizer, cp, batches, progress, ranks)
        lineage = Lineage(Path(config.out), ready.checkpoint)
        identity = {**ready.identity, **chosen}
        saver = Saver(config.checkpoint, lineage, identity, model, optimizer, read, ranks, config.loop.timeout_s)
        with (
            only_writer(lineage.out, ranks),
            closing(Training(config, trainer, saver, link)) as one,
        ):
            yield one


def _peek(loader: Loader, config: TrainConfig, progress: Progress) -> Iterator[Batch]:
    """The loader's batches, the first step's made: what is wrong with them shows before a file is written."""
    first = list(itertools.islice(loader, config.loop.accumulation))
    if len(first) < config.loop.accumulation:
        more = f" after step {progress.step}" if progress.step else ""
        raise ValueError(
            f"data.epochs={config.data.epochs}: the documents fill {len(first)} batches of "
            f"batch_windows={config.batch_windows} windows of context={config.context}{more}, expected at least "
            f"loop.accumulation={config.loop.accumulation}"
        )
    return itertools.chain(first, loader)


@dataclass
class Training:
    """One run under way on this rank, and what it writes down (rank 0)."""

    config: TrainConfig
    trainer: Trainer
    saver: Saver
    link: SlowedLink | None
    tracker: Tracker | None = None
    summary: dict[str, Any] | None = None

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train to the end, the row of every step written down before it is yielded."""
        config, trainer, progress = self.config, self.trainer, self.trainer.progress
        cp, out, is_first = trainer.cp, Path(config.out), trainer.ranks.rank == 0
        shown = {"initial": progress.step, "total": config.loop.steps, "unit": "step"}
        steps = tqdm(trainer.steps(), **shown, disable=not (is_first and config.loop.progress))
        if is_first:
            self.saver.lineage.begin()
            self.tracker = Tracker(config.tracker, out, asdict(config), progress.step + 1)
            (out / "summary.json").unlink(missing_ok=True)  # an earlier run's
            print(f"transport {cp.transport}: {cp.transport_reason}", file=sys.stderr)
            shutil.rmtree(out / TRACE, ignore_errors=True)
        with steps, self._kept():
            for row in traced(steps, out / TRACE, trainer.ranks.rank) if config.profile else steps:
                steps.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                if self.tracker:
                    if not self.tracker.rows and cp.receive_bytes:
                        mib = f"{cp.receive_bytes / 2**20:.1f} MiB"
                        steps.write(f"receive buffers: {mib} a rank, backward={cp.backward}", file=sys.stderr)
                    self.tracker.log(row)
                self.saver.after_step(progress)
                yield row
        self.saver.wait()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """A step that ends the run because it is not finite is kept, to be repeated."""
        try:
            yield
        except NonFiniteError as error:
            kept = keep(self.config, self.trainer, self.saver, error)
            raise FloatingPointError(f"{error}; {kept}") from error

    def finish(self, **more: Any) -> dict[str, Any] | None:
        """Write summary.json, with `more` in it, and return it; None on the other ranks."""
        if self.tracker is None:
            return None
        cp, ranks, out = self.trainer.cp, self.trainer.ranks, Path(self.config.out)
        throttled = f"rows leave at {cp.throttle_gbps:g} GB/s" if cp.throttle_gbps else ""
        self.summary = {
            **summarise(self.tracker.rows),
            "world_size": ranks.world_size,
            "transport": cp.transport,
            "overlap": cp.overlap,
            "head_ranks": cp.head_ranks,
            "receive_mib": cp.receive_bytes / 2**20,
            "throttle_gbps": cp.throttle_gbps,
            "emulated": str(self.link or throttled),  # what the times are no measurement of
            "versions": versions(ranks.device),
            **({"checkpoint_ms": spread(self.saver.held_ms)} if self.saver.held_ms else {}),
            **more,
            "config": asdict(self.config),
        }
        write_json(out / "summary.json", self.summary)
        if skipped := self.trainer.progress.skipped:
            print(f"{skipped} bad records were skipped (data.on_bad_record=skip)", file=sys.stderr)
        if self.config.profile:
            print(f"traces of the ranks: {out / TRACE} (open one in ui.perfetto.dev)", file=sys.stderr)
        return self.summary

    def close(self) -> None:
        """Close the record, as of a failed run unless `finish` was called; a checkpoint under way is done first."""
        self.saver.close()
        if self.tracker:
            self.tracker.close(self.summary)
            self.tracker = None
