"""`parallel.head_ranks=auto`: the number of head ranks that the simulator finds fastest, once, before the first step.

Rank 0 chooses and tells the others: all have one number, whatever machines they are. A run that goes on from a
checkpoint has the checkpoint's, unless something that the choice depends on has changed since.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from flashcp.choice import Choice, choose
from flashcp.sharding.values import read_whole
from flashcp.train.checkpoint import read_chosen
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import read_documents
from flashcp.train.data.sources import Source
from flashcp.train.data.tokenizer import Tokenizer
from flashcp.train.data.windows import pack_documents
from flashcp.train.parallel import AUTO
from flashcp.train.ranks import Ranks

BATCHES = 4
"""First batches that the choice is for, fewer where the documents end before."""


def head_ranks_of(
    config: TrainConfig, source: Source, tokenizer: Tokenizer, checkpoint: Path | None, ranks: Ranks
) -> tuple[int, dict[str, Any]]:
    """The run's number of head ranks, and what a checkpoint keeps of its choice; nothing where the config has a number.

    All ranks call this together. Raises ValueError where nothing can be chosen.
    """
    if config.parallel.head_ranks != AUTO:
        return config.parallel.head_ranks, {}
    asked = {
        "world_size": ranks.world_size,
        **{name: getattr(config, name) for name in ("batch_windows", "data_parallel")},
        **{name: getattr(config.parallel, name) for name in ("cluster", "overlap", "gradient_wire")},
        "sharding": config.sharding["name"],
        "exchange": config.exchange.name,
        "precision": config.loop.precision,
    }

    def decide() -> int:
        kept = read_chosen(checkpoint) if checkpoint else {}
        if kept.items() >= asked.items():
            print(f"head_ranks={kept['head_ranks']}, as chosen for {checkpoint}", file=sys.stderr, flush=True)
            return read_whole("head_ranks", kept["head_ranks"])
        choice = _choose(config, source, tokenizer, ranks.world_size)
        print(f"parallel.head_ranks=auto, simulated: {choice}", file=sys.stderr, flush=True)
        return choice.head_ranks

    chosen = ranks.told(decide)
    return chosen, {"chosen": {"head_ranks": chosen, **asked}}


def _choose(config: TrainConfig, source: Source, tokenizer: Tokenizer, world_size: int) -> Choice:
    """The choice for the first batches."""
    data, model, count = config.data, config.model, config.batch_windows
    documents = read_documents(source, data.epochs, on_bad_record=data.on_bad_record)
    windows = pack_documents(documents, tokenizer, config.context, data.overflow, longest=data.longest)
    lengths = [window.document_lengths for window in itertools.islice(windows, BATCHES * count)]
    if len(lengths) < count:
        raise ValueError(
            f"data.epochs={data.epochs}: the documents fill {len(lengths)} windows of context={config.context}, "
            f"expected at least batch_windows={count}"
        )
    return choose(
        [lengths[first : first + count] for first in range(0, len(lengths) - count + 1, count)],
        world_size,
        config.parallel.cluster,
        model.heads,
        model.kv_heads,
        model.dim // model.heads,
        dtype_bytes=config.loop.dtype.itemsize,
        strategy=config.sharding["name"],
        exchange=config.exchange.name,
        gradient_wire=config.parallel.gradient_wire,
        data_parallel=config.data_parallel,
        overlap="staged" if config.parallel.overlap == "auto" else config.parallel.overlap,
    )
