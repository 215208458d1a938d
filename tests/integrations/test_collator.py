"""The collator: any batch that says where documents begin becomes one pack, of which a rank gets its rows."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import flashcp
from flashcp.integrations.transformers import Collator
from tests.integrations.training import LENGTHS, documents
from tests.ranks import run_ranks

TOKENS = sum(LENGTHS)
IDS = torch.cat([torch.tensor(one["input_ids"]) for one in documents()])
SHIFTED = flashcp.shift_labels(IDS, LENGTHS)


def collate(inner: Any = None, features: Any = None, **options: Any) -> dict[str, Any]:
    return Collator(flashcp.ContextParallel(), inner, **options)(documents() if features is None else features)


def padded(features: list[Any]) -> dict[str, Tensor]:
    """Rows of one length, zeros behind their tokens."""
    longest = max(LENGTHS)
    rows = [torch.tensor(one["input_ids"]) for one in features]
    ids = torch.stack([torch.cat((row, row.new_zeros(longest - len(row)))) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.arange(longest) < torch.tensor(LENGTHS)[:, None]}


def two_rows(features: list[Any]) -> dict[str, Tensor]:
    """Two rows of documents, and a value more a token."""
    positions = torch.cat([torch.arange(length) for length in (37, 5, 1, 21, 64)])
    ids = torch.cat((IDS[:43], IDS[107:], IDS[43:107]))
    return {"input_ids": ids.view(2, 64), "position_ids": positions.view(2, 64), "weights": torch.ones(2, 64)}


FLAT = hf.DataCollatorWithFlattening


@pytest.mark.parametrize(
    "inner",
    [
        None,
        FLAT(),
        FLAT(return_flash_attn_kwargs=True, return_position_ids=False),
        FLAT(return_seq_idx=True, return_position_ids=False),
        FLAT(return_seq_idx=True, return_flash_attn_kwargs=True),
        DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
        DataCollatorForLanguageModeling(pad_token_id=0),
        padded,
    ],
)
def test_collators_of_all_kinds(inner: Any) -> None:
    batch = collate(inner)
    plan = batch.pop("plan")
    assert plan.document_lengths.tolist() == list(LENGTHS)
    assert (batch.pop("num_items_in_batch").item(), batch.pop("use_cache")) == (TOKENS - len(LENGTHS), False)
    order = torch.from_numpy(plan.rows(0))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [IDS[order].tolist()],
        "labels": [SHIFTED[order].tolist()],
        "shift_labels": [SHIFTED[order].tolist()],
        "position_ids": [plan.positions(0).tolist()],
    }


def test_rows_of_a_batch_follow_each_other() -> None:
    batch = collate(two_rows)
    assert batch["plan"].document_lengths.tolist() == [37, 5, 1, 21, 64]
    assert batch["weights"].shape == (1, TOKENS)


def test_the_last_label_of_a_row_is_none_of_the_next() -> None:
    labels = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7, 8, 9]}]
    batch = collate(features=labels)
    assert batch["num_items_in_batch"].item() == 3
    assert dict(zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True)) == {
        5: 6, 6: -100, 7: 8, 8: 9, 9: -100}  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[1, 2]]}, "input_ids is a list: expected a tensor [rows, tokens]"),
        ({"input_ids": torch.ones(1, 4)}, "a batch of input_ids: expected one of position_ids, cu_seq_lens_q, seq_idx"),
        ({"cu_seq_lens_q": [0, 2, 3]}, "cu_seq_lens_q of 3 tokens, input_ids of 4: expected as many"),
        ({"position_ids": torch.tensor([[0, 1, 3, 4]])}, "position_ids[2]=3: expected 2 or 0"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1]]), "cu_seq_lens_q": [0, 4]},
         "cu_seq_lens_q and seq_idx say different lengths of documents"),
        ({"cu_seq_lens_q": [0, 4], "attention_mask": torch.tensor([[1, 1, 1, 0]])},
         "attention_mask has zeros beside cu_seq_lens_q: expected none"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask is [1, 1, 4, 4]: expected [1, 4]"),
        ({"cu_seq_lens_q": [0, 4], "audio": torch.ones(1, 3, 8)},
         "audio is [1, 3, 8]: expected a tensor of a value for each of [1, 4] tokens"),
        ({"input_ids": torch.ones(2, 5), "attention_mask": torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 1]])},
         "attention_mask[1] has zeros between ones: expected padding at the ends of a row"),
        ({"attention_mask": torch.zeros(1, 4)}, "attention_mask is zeros alone: expected a batch with tokens"),
        ({"cu_seq_lens_q": [0, 4], "names": ["a"]}, "names is a list: expected a tensor of a value for each"),
    ],
)  # fmt: skip
def test_batches_that_say_too_little_or_too_much(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        collate(lambda _: {"input_ids": torch.ones(1, 4), **batch})
    assert str(caught.value).startswith(message)


def test_examples_without_tokens_are_named() -> None:
    with pytest.raises(ValueError, match="example 1 of the batch has no tokens: expected one or more"):
        collate(features=[{"input_ids": [5]}, {"input_ids": []}])
    with pytest.raises(ValueError, match="a batch without examples: expected one or more"):
        collate(features=[])


def test_unknown_strategies_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy='zigzag': expected one of contiguous, "):
        collate(strategy="zigzag")
    with pytest.raises(ValueError, match="option 'depth' of strategy 'contiguous': expected no options"):
        collate(strategy="contiguous", depth=2)


def test_other_tokens_are_another_plan() -> None:
    one, same, other = (collate(features=documents(seed))["plan"] for seed in (0, 0, 1))
    assert (one.fingerprint, hash(one)) == (same.fingerprint, hash(same))
    assert one == same != other
    assert one.fingerprint != other.fingerprint
    narrow = one.narrow(window=3)
    assert narrow.fingerprint not in (one.fingerprint, other.narrow(window=3).fingerprint)


@pytest.mark.parametrize("head_ranks", [1, 2])
def test_ranks_share_out_the_pack(head_ranks: int) -> None:
    collators = run_ranks(pickled_collator, 2, head_ranks)
    batches = [pickle.loads(one)(documents()) for one in collators]  # as in a worker: no process group here
    assert len({batch["plan"] for batch in batches}) == 1
    assert sorted(token for batch in batches for token in batch["input_ids"][0].tolist()) == sorted(IDS.tolist())
    assert {batch["num_items_in_batch"].item() for batch in batches} == {TOKENS - len(LENGTHS)}


def pickled_collator(head_ranks: int) -> bytes:
    return pickle.dumps(Collator(flashcp.ContextParallel(head_ranks=head_ranks)))
