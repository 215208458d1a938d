"""Hugging Face's Trainer with a context-parallel model; random weights, made-up documents, no downloads.

torchrun --nproc-per-node=2 examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import flashcp
from flashcp.integrations.transformers import parallelize


def documents(count: int, seed: int) -> Dataset:
    """Of 5 to 400 tokens, in which every token but the first follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 400, (count,), generator=generator)
    starts = torch.randint(0, 256, (count,), generator=generator)
    ids = [(start + 3 * torch.arange(length)) % 256 for start, length in zip(starts, lengths, strict=True)]
    return Dataset.from_dict({"input_ids": [one.tolist() for one in ids]})


def main() -> None:
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        max_steps=10,
        learning_rate=3e-3,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=10,
        dataloader_num_workers=1,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    trainer = Trainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)),
        args=args,
        data_collator=DataCollatorWithFlattening(),
        train_dataset=documents(200, seed=1),
        eval_dataset=documents(20, seed=2),
    )
    cp = flashcp.ContextParallel()
    parallelize(trainer, cp)
    trainer.train()


if __name__ == "__main__":
    main()
