"""torchtitan's llama3 debug model over ranks, packed documents and context parallelism together; made-up text.

torchrun --nproc-per-node=2 examples/torchtitan_llama3.py
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.tools.logging import init_logger

from flashcp.integrations.torchtitan import Trainer, with_flashcp


def write_assets(folder: Path) -> None:
    """A tokenizer of 2,048 words, and documents of 5 to 300 of them, each word following from the one before."""
    words = {"<s>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, 2048)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    generator = torch.Generator().manual_seed(0)
    lengths, starts = (torch.randint(5, 300, (400,), generator=generator).tolist() for _ in range(2))
    texts = [
        " ".join(f"w{2 + (start + 3 * word) % 256}" for word in range(length))
        for length, start in zip(lengths, starts, strict=True)
    ]
    (folder / "text").mkdir()
    (folder / "text" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def main() -> None:
    if os.environ["RANK"] == "0":
        init_logger()
    with tempfile.TemporaryDirectory() as folder:
        write_assets(Path(folder))
        config = llama3_debugmodel()
        config.hf_assets_path, config.dataloader.dataset_path = folder, f"{folder}/text"
        config.training.local_batch_size, config.training.seq_len, config.training.steps = 2, 512, 12
        config.dump_folder, config.checkpoint.enable, config.metrics.log_freq = folder, False, 3
        config.parallelism.context_parallel_degree = 2

        trainer: Trainer = with_flashcp(config).build()
        trainer.train()
        trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
