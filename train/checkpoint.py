"""Checkpoints through torch.distributed.checkpoint: written whole or not at all, bound to their model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from flashcp.files import MIB, read_path
from flashcp.limits import Count, Natural, one_of
from flashcp.sharding.values import read_whole, shown
from flashcp.train.checksums import IDENTITY, Checksum, checksum, damage, read_identity, write_identity
from flashcp.train.data.documents import Position
from flashcp.train.data.files_read import ON_CHANGED_DATA, FilesRead
from flashcp.train.lineage import UNFINISHED, Lineage, find_latest
from flashcp.train.ranks import Ranks
from flashcp.train.unpickle import METADATA, DataPlanner, DataReader

ALONE = "torch.distributed is disabled"
"""torch warns so when one rank alone, without a process group, writes or reads a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written: a full disk, a folder that is gone. The message names it and the cause."""


@dataclass
class CheckpointConfig:
    """When a run is kept, and which one goes on: `latest` starts fresh where there is none."""

    every: Natural = 0
    keep: Count = 2
    asynchronous: bool = False
    resume: str = "never"
    on_changed_data: Annotated[str, one_of(ON_CHANGED_DATA)] = "stop"


@dataclass
class Progress:
    """How far a run is: steps done, tokens dropped and carried and records skipped so far, where reading goes on."""

    step: int = 0
    dropped: int = 0
    carried: int = 0
    position: Position = dataclasses.field(default_factory=Position)
    skipped: int = 0


def find_checkpoint(out: Path, resume: str, identity: dict[str, Any], steps: int) -> Path | None:
    """The checkpoint that `checkpoint.resume` names, checked to belong to this run; None: start fresh.

    identity: what must be equal for a resumed run to go on as the uninterrupted one, by section and field.
    steps: of the whole run. Raises ValueError when there is no such checkpoint, when it is another model's, naming
    the fields, and when it has no step left to do.
    """
    if (out / "checkpoints").exists() and not (out / "checkpoints").is_dir():
        raise ValueError(f"out={shown(str(out))}: {out / 'checkpoints'} is a file, expected a directory or nothing")
    latest = find_latest(out) if resume in ("never", "latest") else None
    if resume == "never" and latest:
        raise ValueError(
            f"out={shown(str(out))} already holds {latest.name}: go on with checkpoint.resume=latest, or choose "
            "another out"
        )
    path = latest if resume in ("never", "latest") else read_path(resume, "checkpoint.resume")
    if path is None:
        return None
    if not (path / IDENTITY).is_file():
        expected = "never, latest or a step_* path"
        raise ValueError(f"checkpoint.resume={shown(resume)}: no checkpoint there; expected {expected}")
    try:
        saved = read_identity(path)
        done = read_whole("step", saved["progress"]["step"], least=0)
        differing = [
            f"{section}.{field} is {saved[section].get(field)!r} there and {value!r} here"
            for section, fields in identity.items()
            for field, value in fields.items()
            if saved[section].get(field) != value
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"checkpoint {path}: {IDENTITY} cannot be read: {_reason(error)}") from error
    if differing:
        raise ValueError(f"checkpoint {path} belongs to another run: {'; '.join(differing)}")
    if done >= steps:
        raise ValueError(f"loop.steps={steps}: checkpoint {path} has done {done} steps already, expected more")
    return path


def read_chosen(path: Path) -> dict[str, Any]:
    """What the run of a checkpoint that `find_checkpoint` found had chosen by itself."""
    chosen = read_identity(path).get("chosen", {})
    return chosen if isinstance(chosen, dict) else {}


def save_checkpoint(
    lineage: Lineage,
    keep: int,
    identity: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    read: FilesRead,
    ranks: Ranks,
) -> Path:
    """Write out/checkpoints/step_*. Every rank must call it.

    Raises CheckpointError on every rank when it cannot be written, and ValueError when text that was read has changed
    since; earlier checkpoints stay.
    """
    with one_process_is_fine():
        return write_checkpoint(lineage, keep, identity, state_of(model, optimizer, progress), progress, read, ranks)


def write_checkpoint(
    lineage: Lineage,
    keep: int,
    identity: dict[str, Any],
    state: dict[str, Any],
    progress: Progress,
    read: FilesRead,
    ranks: Ranks,
) -> Path:
    """Write a state that `state_of` made, under another name until it is whole. Every rank must call it.

    Raises CheckpointError on every rank when it cannot be written, and ValueError when text that was read has changed
    since; earlier checkpoints stay.
    """
    documents = read.written(progress.position, ranks)
    path = lineage.place(progress.step)
    unfinished = path.with_name(f"{UNFINISHED}step_{progress.step:08d}")
    found: dict[str, Checksum] = {}
    try:
        if ranks.rank == 0:
            lineage.tidy()
        ranks.barrier()
        dcp.save(state, checkpoint_id=unfinished, process_group=ranks.group)
        own = [*unfinished.glob(f"__{ranks.rank}_*"), *([unfinished / METADATA] if ranks.rank == 0 else [])]
        found, trouble = {file.name: checksum(file) for file in own}, ""
    except (OSError, ValueError, dcp.CheckpointException) as error:
        trouble = _cause(unfinished) or _reason(error)
    said = ranks.gather((found, trouble))
    files = {name: each for found, _ in said for name, each in found.items()}
    trouble = next((trouble for _, trouble in said if trouble), "")
    if ranks.rank == 0 and not trouble:
        own_part = {
            "progress": {"step": progress.step},
            "lineage": lineage.name,
            "files": files,
            "documents": documents,
        }
        try:
            write_identity(unfinished, {**identity, **own_part})
            lineage.publish(unfinished, path, keep)
        except OSError as error:
            trouble = _reason(error)
    if trouble := ranks.gather(trouble)[0]:
        if ranks.rank == 0:
            with suppress(OSError):
                lineage.tidy()  # room for what the log has still to say
        raise CheckpointError(f"checkpoint {path}: cannot be written: {trouble}")
    return path


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    read: FilesRead,
    on_changed_data: str,
    ranks: Ranks,
) -> Progress:
    """Fill model, optimizer and torch's CPU generator in place; the number of ranks may have changed. Every rank must
    call it.

    The optimizer must be new, and the weights without gradients. Raises ValueError on every rank, naming the file, for
    one that is not as it was written, and for a checkpoint that holds more than data; nothing in it is run.
    """
    documents, state = verified(path, ranks)["documents"], state_of(model, optimizer, Progress())
    read_state(path, state)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["rng"])
    step, dropped, carried, skipped = state["counters"].tolist()
    try:
        position = read.go_on(documents, Position(*state["position"].tolist()), on_changed_data, ranks)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    return Progress(step, dropped, carried, position, skipped)


def verified(path: Path, ranks: Ranks) -> dict[str, Any]:
    """What identity.json of a checkpoint says, every file being as it was written. Every rank must call it.

    Raises ValueError on every rank, naming the file that is not.
    """
    try:
        saved = read_identity(path)
        written = {Path(name).name: each for name, each in saved["files"].items()}
        saved["documents"] = [(str(name), size, digest) for name, size, digest in saved["documents"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: {IDENTITY} cannot be read: {_reason(error)}") from error
    if wrong := damage(path, written, ranks):
        raise ValueError(f"checkpoint {path}: {wrong}")
    return saved


def read_state(path: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of a part of what `state_of` made. Raises ValueError for what holds more than data."""
    try:
        reader = DataReader(path)
        reader.read_metadata()  # torch would log a traceback before it raises
        with one_process_is_fine():
            dcp.load(state, storage_reader=reader, planner=DataPlanner())
    except (Exception, dcp.CheckpointException) as error:  # a damaged file fails wherever its bytes lead
        raise ValueError(f"checkpoint {path}: cannot be read: {_reason(error)}") from error


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> dict[str, Any]:
    """Every rank holds the same state, so each tensor is written once; whole numbers travel as tensors."""
    weights, optimizer_state = get_state_dict(model, optimizer)
    return {
        "model": weights,
        "optimizer": optimizer_state,
        "rng": torch.get_rng_state(),
        "position": torch.tensor(dataclasses.astuple(progress.position)),
        "counters": torch.tensor([progress.step, progress.dropped, progress.carried, progress.skipped]),
    }


def _cause(folder: Path) -> str:
    """Why nothing can be written there, as the system says it; empty where something can.

    torch hides the reason: to its writer of archives a full disk is an "unexpected pos".
    """
    try:
        if folder.is_dir():
            (folder / "probe").write_bytes(bytes(MIB))
    except OSError as error:
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    """The first line of what went wrong inside: torch wraps the errors of ranks, with their tracebacks."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")


@contextmanager
def one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ALONE, category=UserWarning)
        yield
