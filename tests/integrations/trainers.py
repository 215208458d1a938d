"""Four steps of Trainer and of TRL's SFTTrainer, over ranks and in one process."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from trl import SFTConfig, SFTTrainer

import flashcp
from flashcp.integrations.transformers import parallelize
from tests.integrations.families import VOCABULARY, make_model
from tests.integrations.training import my_group

STEPS, ROWS = 4, 3

Logs = list[dict[str, float]]


def data(rows: int = 2 * STEPS * ROWS) -> Dataset:
    """Documents of 3 to 40 random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 41, (rows,), generator=generator).tolist()
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids})


def join_accelerate() -> None:
    """Accelerate reads the ranks from the environment, once for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        os.environ.pop(name, None)
    if dist.is_initialized() and dist.get_world_size() > 1:
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(zip(names, (rank, size, rank, size, "localhost", "1"), strict=True))


def run_trainer(folder: str, family: str, over_ranks: bool, groups: int, changes: dict[str, Any]) -> Logs:
    """What Trainer logs."""
    join_accelerate()
    how: dict[str, Any] = {"per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS, "max_steps": STEPS,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2,
        "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": STEPS}  # fmt: skip
    args = hf.TrainingArguments(output_dir=folder, **{**how, **changes})
    trainer = hf.Trainer(
        make_model(family, "sdpa"),
        args,
        data_collator=hf.DataCollatorWithFlattening(),
        train_dataset=data(),
        eval_dataset=data(7),
    )
    if over_ranks:
        parallelize(trainer, flashcp.ContextParallel(my_group(groups)))
    trainer.train()
    logs: Logs = trainer.state.log_history
    return logs


def run_sft(folder: str, family: str, over_ranks: bool, changes: dict[str, Any]) -> Logs:
    """What TRL's SFTTrainer logs, packing as it does."""
    join_accelerate()
    how: dict[str, Any] = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "max_steps": STEPS,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
        "learning_rate": 1e-2, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": STEPS, "packing": True,
        "max_length": 64, "gradient_checkpointing": False}  # fmt: skip
    trainer = SFTTrainer(
        make_model(family, "sdpa"),
        SFTConfig(output_dir=folder, **{**how, **changes}),
        train_dataset=data(),
        eval_dataset=data(15),
        processing_class=tokenizer(),
    )
    if over_ranks:
        parallelize(trainer, flashcp.ContextParallel())
    trainer.train()
    logs: Logs = trainer.state.log_history
    return logs


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A word for each token."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w2", pad_token="w0")
