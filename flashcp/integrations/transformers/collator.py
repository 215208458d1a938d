"""From a data collator's batch to this rank's rows of it, and the plan; in DataLoader workers, without a group."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcp.context_parallel import ContextParallel
from flashcp.integrations.transformers.images import block_masks, own_images
from flashcp.integrations.transformers.layers import layers_of
from flashcp.lengths import lengths_of, shift_labels
from flashcp.sharding import ShardingPlan, plan
from flashcp.sharding.holders import positions_of_rank, rows_of_rank
from flashcp.sharding.strategies import STRATEGIES
from flashcp.sharding.values import check_choice

IGNORE = -100
_SAID_BY_THE_PLAN = ("position_ids", "cu_seq_lens_q", "seq_idx", "attention_mask")
_DROPPED = {*_SAID_BY_THE_PLAN, "cu_seq_lens_k", "max_length_q", "max_length_k"}


@dataclass(frozen=True, eq=False, repr=False)
class WindowPlan(ShardingPlan):
    """A plan that also stands for the tokens of its window: ranks that were given other tokens, in documents of the
    same lengths, hold another plan, and hear of it in their first attention.

    marked: its blocks are those that an input marks, none where it marks none."""

    window: int = 0
    marked: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """The plan's, and the window's checksum in it."""
        return f"{int(super().fingerprint, 16) ^ self.window:016x}"

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.window == getattr(other, "window", 0)

    __hash__ = ShardingPlan.__hash__


class Collator:
    """Around a data collator: its batch as one pack, of which this rank's rows are returned.

    inner: yields input_ids [rows, tokens] and one of position_ids, cu_seq_lens_q, seq_idx (DataCollatorWithFlattening,
    TRL's with padding_free), or an attention_mask, of which each row is a document and zeros are left out. None: every
    example is a document, its input_ids and, where it has them, labels.
    strategy, options: as for `flashcp.plan`. config: of the model; the plan then balances its mix of layers. blocks:
    name of an input; runs of tokens for which it is 1 see each other, as Gemma 3's images do (`token_type_ids`).

    Returns input_ids, position_ids, labels, shift_labels and other inputs of a value a token, all [1, rank's tokens];
    plan; num_items_in_batch, how many labels the whole window has, int64 []; use_cache, False. Labels are shifted
    inside documents already, under both names: the last row of a document has none. pixel_values, of all images in the
    order of the pack, stay whole, for a model with `take_own_features`.
    Raises ValueError for batches that do not say where documents begin, and inputs that are not of a value a token.
    """

    def __init__(
        self,
        cp: ContextParallel,
        inner: Callable[[list[Any]], Any] | None = None,
        strategy: str = "flashcp",
        *,
        config: Any | None = None,
        blocks: str | None = None,
        **options: Any,
    ) -> None:
        check_choice("strategy", strategy, STRATEGIES)
        self.rank, self.holders, self.head_ranks = cp.rank, cp.holders, cp.head_ranks
        self.inner, self.strategy, self.options = inner or _flatten, strategy, options
        self.layers = None if config is None else layers_of(config)
        self.image, self.blocks = getattr(config, "image_token_id", None), blocks

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = dict(self.inner(features))
        pixels = batch.pop("pixel_values", None)
        tokens = batch.get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise ValueError(f"input_ids is {_kind(tokens)}: expected a tensor [rows, tokens] from the inner collator")
        kept = _kept(batch)
        lengths = _read_lengths(batch, kept)
        packed = {name: _pack(name, value, kept) for name, value in batch.items() if name not in _DROPPED}
        packed.setdefault("labels", packed["input_ids"])
        packed["labels"] = packed["shift_labels"] = shift_labels(packed["labels"], lengths, IGNORE)
        if (missing := self.holders * self.head_ranks - int(lengths.sum())) > 0:
            lengths, packed = np.append(lengths, missing), {k: _lengthen(k, x, missing) for k, x in packed.items()}
        made = self._plan(lengths, packed)
        rows = torch.from_numpy(rows_of_rank(made, self.rank, self.head_ranks))
        positions = torch.from_numpy(positions_of_rank(made, self.rank, self.head_ranks))
        mine: dict[str, Any] = {name: value.index_select(0, rows)[None] for name, value in packed.items()}
        mine |= {"position_ids": positions[None], "plan": made, "use_cache": False}
        if pixels is not None:
            mine |= own_images(packed["input_ids"], rows, pixels, self.image)
        return mine | {"num_items_in_batch": packed["labels"].ne(IGNORE).sum()}

    def _plan(self, lengths: np.ndarray, packed: dict[str, Tensor]) -> WindowPlan:
        options = {"layers": self.layers, **self.options}
        if self.blocks is not None:
            options["masks"] = block_masks(packed[self.blocks].numpy(), lengths)
        made = plan(lengths, self.holders, self.strategy, **options)
        window = zlib.crc32(packed["input_ids"].contiguous().numpy().tobytes())
        window = zlib.crc32(packed["labels"].contiguous().numpy().tobytes(), window)
        said = {field.name: getattr(made, field.name) for field in fields(made) if field.init}
        return WindowPlan(**said, window=window, marked=self.blocks is not None)


def _flatten(features: list[Any]) -> dict[str, Tensor]:
    """Examples one after the other. Raises ValueError for none, and for one without tokens."""
    if not features:
        raise ValueError("a batch without examples: expected one or more")
    ids, labels = (
        [torch.as_tensor(one.get(name, one["input_ids"])) for one in features] for name in ("input_ids", "labels")
    )
    lengths = torch.tensor([len(one) for one in ids])
    if not lengths.all():
        raise ValueError(f"example {int(lengths.argmin())} of the batch has no tokens: expected one or more")
    return {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None],
            "cu_seq_lens_q": torch.cat((torch.zeros_like(lengths[:1]), lengths.cumsum(0)))}  # fmt: skip


def _lengthen(name: str, x: Tensor, rows: int) -> Tensor:
    """A document more, without labels: Transformers' models cannot compute on a rank that has no rows."""
    return torch.cat((x, x.new_full((rows, *x.shape[1:]), IGNORE if "labels" in name else 0)))


def _kept(batch: dict[str, Any]) -> Tensor:
    """Which tokens are no padding, bool [rows, tokens]."""
    mask, shape = batch.get("attention_mask"), batch["input_ids"].shape
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != shape:
        raise ValueError(f"attention_mask is {_kind(mask)}: expected {list(shape)}, as input_ids have")
    return mask.bool()


def _read_lengths(batch: dict[str, Any], kept: Tensor) -> np.ndarray:
    """Lengths of the documents. Raises ValueError where two inputs say different ones."""
    said = {name: batch[name] for name in _SAID_BY_THE_PLAN if batch.get(name) is not None}
    found: dict[str, np.ndarray] = {}
    for name, value in said.items():
        if name == "cu_seq_lens_q":
            found[name] = lengths_of(cu_seqlens=value)
        elif name != "attention_mask":
            found[name] = lengths_of(**{name: value})
    if not found and "attention_mask" in said:
        return _runs(kept)
    if not found:
        raise ValueError(f"a batch of {', '.join(batch)}: expected one of {', '.join(_SAID_BY_THE_PLAN)} too, which "
                         "say where documents begin")  # fmt: skip
    (first, lengths), *others = found.items()
    for name, other in others:
        if not np.array_equal(lengths, other):
            raise ValueError(f"{first} and {name} say different lengths of documents: expected the same")
    if not kept.all():
        raise ValueError(f"attention_mask has zeros beside {first}: expected none")
    if lengths.sum() != kept.numel():
        raise ValueError(f"{first} of {lengths.sum()} tokens, input_ids of {kept.numel()}: expected as many")
    return lengths


def _runs(kept: Tensor) -> np.ndarray:
    """Lengths of rows of which padding is left out at their ends. Raises ValueError where it is anywhere else."""
    begins = kept & ~torch.nn.functional.pad(kept, (1, 0))[:, :-1]
    if (runs := begins.sum(1)).gt(1).any():
        raise ValueError(
            f"attention_mask[{int(runs.argmax())}] has zeros between ones: expected padding at the ends of a row, for "
            "tokens on both sides would become neighbours"
        )
    if not kept.any():
        raise ValueError("attention_mask is zeros alone: expected a batch with tokens that are no padding")
    return kept.sum(1)[kept.any(1)].numpy()


def _pack(name: str, value: Any, kept: Tensor) -> Tensor:
    """The tokens' values one after the other, [tokens, ...]."""
    if not isinstance(value, Tensor) or value.shape[:2] != kept.shape:
        raise ValueError(
            f"{name} is {_kind(value)}: expected a tensor of a value for each of {list(kept.shape)} tokens"
        )
    return value[kept]


def _kind(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
