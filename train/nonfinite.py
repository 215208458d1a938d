"""What is not finite in a step whose loss or gradients are not: documents, the first layer, parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from flashcp.context_parallel import ContextParallel
from flashcp.sharding.holders import rows_of_rank
from flashcp.train.checkpoint import Progress
from flashcp.train.data.loader import Batch
from flashcp.train.data.windows import NO_LABEL
from flashcp.train.model import Decoder
from flashcp.train.ranks import Ranks

ON_NONFINITE = ("stop", "skip")
MOST_SKIPPED = 10
"""Steps in a row that `skip` leaves out: after as many the weights are at fault, and no batch is."""
SHOWN = 3


class NonFiniteError(FloatingPointError):
    """A step that no weight has taken part in. before: how far the run was; packs: what the step was to learn from."""

    def __init__(self, message: str, before: Progress, packs: Sequence[Batch]) -> None:
        super().__init__(message)
        self.before, self.packs = before, packs


def what_is_not_finite(model: Decoder, cp: ContextParallel, packs: Sequence[Batch], ranks: Ranks) -> str:
    """In words, from the gradients as they are and a forward of its own, under the caller's autocast. Every rank must
    call it."""
    found: list[tuple[int, int, int]] = []
    first = ""
    for number, pack in enumerate(packs):
        here = pack.to(ranks.device)
        with torch.no_grad(), _first_output(model) as seen:
            losses = model(here.tokens, here.position_ids, here.plan, here.labels, "none")
        first = first or next(iter(seen), "")
        wrong = (~losses.isfinite() & here.labels.ne(NO_LABEL)).cpu().numpy()
        lengths = pack.plan.document_lengths
        rows = rows_of_rank(pack.plan, cp.rank, cp.head_ranks)[wrong]
        documents = np.unique(np.searchsorted(np.cumsum(lengths), rows, side="right"))
        found += [(number, pack.first_document + one, int(lengths[one])) for one in documents.tolist()]
    said = ranks.gather((found, first))
    parts = []
    for rank, (_, name) in enumerate(said):
        if name:
            parts.append(f"on rank {rank} first in the output of {name}")
    if named := sorted({one for each, _ in said for one in each}):
        names = [_document(*one, packs=len(packs)) for one in named]
        parts.append(f"in the loss of {_some(names)}")
    else:
        parts.append("computed once more, every document's loss is finite")
    gradients = [name for name, one in model.named_parameters() if one.grad is not None and not _is_finite(one.grad)]
    if gradients:
        parts.append(f"in the gradients of {_some(gradients)}")
    return "; ".join(parts)


def are_finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


@contextmanager
def _first_output(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose output is not finite, in the order in which they end."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, given: object, output: object) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not all(_is_finite(x) for x in outputs if isinstance(x, Tensor)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _document(pack: int, document: int, tokens: int, *, packs: int) -> str:
    return f"document {document}" + (f" of pack {pack}" if packs > 1 else "") + f" ({tokens} tokens)"


def _some(names: Sequence[str]) -> str:
    """The first few."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
