"""A step that was not finite, kept with the weights before it and computed once more.

    OUT/nonfinite/step_00000007/checkpoints/step_00000006   weights, optimizer and place in the documents before it
    OUT/nonfinite/step_00000007/config.json                 the run's, and what it had chosen by itself
    OUT/nonfinite/step_00000007/windows.json                the tokens that it was to learn from
    OUT/nonfinite/step_00000007/step.json                   how many ranks there were, and what was found

`python -m flashcp.train.replay FOLDER` is a rank of `flashcp train replay=FOLDER`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch.distributed.checkpoint.state_dict import set_state_dict

from flashcp.files import read_bounded
from flashcp.sharding.values import read_whole
from flashcp.train.checkpoint import CheckpointError, Progress, read_state, save_checkpoint, state_of, verified
from flashcp.train.checksums import parse_json
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import Position
from flashcp.train.data.loader import Loader, Share
from flashcp.train.data.windows import TokenWindow, labels_of
from flashcp.train.lineage import Lineage, find_latest, free_name
from flashcp.train.loop import Trainer
from flashcp.train.model import Decoder
from flashcp.train.nonfinite import NonFiniteError, are_finite
from flashcp.train.optimizer import build_optimizer
from flashcp.train.ranks import exit_code, launched_rank, world
from flashcp.train.saving import Saver
from flashcp.train.summary import write_json

MOST_MIB = 1024
"""Of the tokens of a step that is read back."""


def keep(config: TrainConfig, trainer: Trainer, saver: Saver, error: NonFiniteError) -> str:
    """Write the step that ended a run. Returns what can be done with it, or why it could not be written. Every rank
    must call it."""
    ranks, out = trainer.ranks, Path(config.out)
    place = free_name(out / "nonfinite" / f"step_{error.before.step + 1:08d}")
    try:
        kept = save_checkpoint(
            Lineage(place), 1, saver.identity, trainer.model, trainer.optimizer, error.before, saver.read, ranks
        )
        if ranks.rank == 0:
            vocabulary = trainer.model.embedding.num_embeddings
            parallel = replace(config.parallel, head_ranks=trainer.cp.head_ranks)
            told = replace(config, model=replace(config.model, vocab_size=vocabulary), parallel=parallel)
            write_json(place / "config.json", asdict(told))
            windows = [
                {"document_lengths": window.document_lengths.tolist(), "tokens": window.tokens.tolist()}
                for pack in error.packs
                for window in pack.windows
            ]
            (place / "windows.json").write_text(json.dumps(windows), encoding="utf-8")
            write_json(place / "step.json", {"world_size": ranks.world_size, "found": str(error)})
    except (CheckpointError, OSError) as trouble:
        return f"it was not kept: {trouble}"
    again, on = f"`flashcp train replay={place}`", f"checkpoint.resume={kept} loop.on_nonfinite=skip"
    return f"{again} computes it once more, {on} goes on after it"


@dataclass(frozen=True)
class KeptStep:
    """What `keep` wrote: the folder, the run's configuration, how many ranks there were, what they found."""

    folder: Path
    config: TrainConfig
    world_size: int
    found: str

    @classmethod
    def read(cls, folder: Path) -> KeptStep:
        """Raises ValueError, naming the folder, for one that `keep` did not write."""
        try:
            told = parse_json(read_bounded(folder / "step.json", "step.json", most_mib=1))
            world_size, found = read_whole("world_size", told["world_size"]), str(told["found"])
            config = TrainConfig.from_file(folder / "config.json")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"replay={str(folder)!r}: no step that a run kept there: {error}") from error
        return cls(folder, config, world_size, found)

    def windows(self) -> list[TokenWindow]:
        """Raises ValueError as `read` does."""
        try:
            told = parse_json(read_bounded(self.folder / "windows.json", "windows.json", MOST_MIB))
            found = [[np.array(one[name], dtype=np.int64) for name in ("tokens", "document_lengths")] for one in told]
            if any(len(tokens) != lengths.sum() or lengths.min() < 1 for tokens, lengths in found):
                raise ValueError("documents and tokens do not go together")
            if any(tokens.min() < 0 or tokens.max() >= self.config.model.vocab_size for tokens, _ in found):
                raise ValueError(f"tokens beyond a vocabulary of {self.config.model.vocab_size}")
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"replay={str(self.folder)!r}: windows.json cannot be read: {error}") from error
        return [TokenWindow(tokens, labels_of(tokens, lengths), lengths, Position(), 0, 0) for tokens, lengths in found]


def replay(folder: Path) -> str:
    """Compute a kept step once more, as this process's rank, and say what came out. No weight is changed.

    Raises ValueError for a folder that is not as a run left it.
    """
    step = KeptStep.read(folder)
    config, windows, path = step.config, step.windows(), find_latest(folder)
    if path is None:
        raise ValueError(f"replay={str(folder)!r}: the weights before the step are gone")
    with world(config.loop.device, config.loop.timeout_s) as ranks:
        config.check(ranks.world_size)
        replica = ranks.replica(config.data_parallel)
        cp = config.parallel.operator(config.exchange.name, 0.0, replica.group)
        model = Decoder(config.model, cp, config.seed).to(ranks.device)
        optimizer = build_optimizer(model, config.optimizer)
        verified(path, ranks)
        state = state_of(model, optimizer, Progress())
        read_state(path, state)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        share = Share(config.exchange.name, replica.rank, replica.index, replica.count, cp.head_ranks)
        make_plan = config.planner(cp.holders, cp.head_ranks)
        with Loader(windows, make_plan, share, batch_windows=config.batch_windows) as loader:
            packs = list(loader)
        trainer = Trainer(config.loop, config.optimizer, model, optimizer, cp, iter(()), Progress(), ranks)
        loss, norm = trainer.learn(packs)
        if are_finite(loss, norm):
            return f"finite: the loss is {loss:.6g}, the norm of its gradients {norm:.6g}"
        return trainer.not_finite(packs, loss, norm)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, whatever comes out; 2 for bad input (one line, no traceback); 1 when a rank fails."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    return exit_code(lambda: _say(replay(Path(folder))))


def _say(found: str) -> None:
    if launched_rank()[0] == 0:
        print(found, flush=True)


if __name__ == "__main__":
    sys.exit(main())
