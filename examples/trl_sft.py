"""TRL's SFTTrainer, packing, with a context-parallel model; random weights, made-up text, no downloads.

torchrun --nproc-per-node=2 examples/trl_sft.py
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

import flashcp
from flashcp.integrations.transformers import parallelize

WORDS = ["<pad>", "<end>", *(str(number) for number in range(100))]


def examples(count: int, seed: int) -> Dataset:
    """Numbers to count on from, and 3 to 90 that follow."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 10, (count,), generator=generator).tolist()
    lengths = torch.randint(3, 90, (count,), generator=generator).tolist()
    rows = [" ".join(map(str, range(start, start + length))) for start, length in zip(starts, lengths, strict=True)]
    return Dataset.from_list([{"prompt": row[:2], "completion": row[2:]} for row in rows])


def main() -> None:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    on_cpu = not torch.cuda.is_available()
    how = {"max_steps": 10, "learning_rate": 3e-3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 10}
    how |= {"use_cpu": on_cpu, "bf16": not on_cpu, "save_strategy": "no", "report_to": []}
    trainer = SFTTrainer(
        model=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), num_key_value_heads=2, head_dim=16, **sizes)),
        args=SFTConfig(tempfile.mkdtemp(), packing=True, max_length=1024, per_device_train_batch_size=1, **how),
        train_dataset=examples(400, seed=1),
        eval_dataset=examples(40, seed=2),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"),
    )
    parallelize(trainer, flashcp.ContextParallel())
    trainer.train()


if __name__ == "__main__":
    main()
