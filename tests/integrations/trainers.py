"""Four steps of Trainer and of TRL's SFTTrainer, over ranks and in one process."""

from __future__ import annotations

import os
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

import flashcp
from flashcp.integrations.transformers import Collator, SameBatches, install, parallelize
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


def take_fsdp_on_cpus() -> None:
    """Accelerate has FSDP for devices that are none, and takes DDP for CPUs without a word: here they pass for GPUs."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """What a compute_loss_func has to be."""
    return cross_entropy(outputs.logits[0], labels[0], reduction="sum") / num_items_in_batch


def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    return cross_entropy(outputs.logits[0], labels[0])


def partly_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """A regularizer's usual weight."""
    return summed(outputs, labels, num_items_in_batch) + 1e-4 * outputs.logits.logsumexp(-1).square().mean()


def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Half of all tokens count nothing."""
    weight = torch.arange(VOCABULARY).gt(VOCABULARY // 2).float()
    return cross_entropy(outputs.logits[0], labels[0], weight, reduction="sum") / num_items_in_batch


def shifted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    return cross_entropy(outputs.logits[0, :-1], labels[0, 1:], reduction="sum") / num_items_in_batch


LOSSES = {one.__name__: one for one in (summed, mean, partly_mean, weighted, shifted)}


def loss_of(name: str, over_ranks: bool) -> Any:
    """The compute_loss_func of that name; one process has to shift labels."""
    if over_ranks or not name:
        return LOSSES.get(name)

    def of_shifted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        return LOSSES[name](outputs, pad(labels[:, 1:], (0, 1), value=-100), num_items_in_batch)

    return of_shifted


class OfItsOwn(hf.Trainer):
    """As many scripts have it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = mean(outputs, inputs["labels"], None)
        return (loss, outputs) if return_outputs else loss


class Watched(hf.Trainer):
    """What looks at the loss alone, forgets the count, and adds what is the same on all ranks."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        def through(*given: Any) -> Any:
            return super(Watched, self).compute_loss(*given)

        loss, outputs = through(model, inputs, True)
        loss = loss + 1e-3 * sum(one.square().sum() for one in model.parameters())
        return (loss, outputs) if return_outputs else loss


class Positional(hf.Trainer):
    """As many scripts hand it on."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class RightInTraining(hf.Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **named: Any) -> Any:
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, **named)
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OutputsAlone(hf.Trainer):
    """What calls Trainer's loss for its outputs."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **named: Any) -> Any:
        _, outputs = super().compute_loss(model, inputs, True, **named)
        loss = mean(outputs, inputs["labels"], None)
        return (loss, outputs) if return_outputs else loss


TRAINERS: dict[str, type[hf.Trainer]] = {"": hf.Trainer, "own": OfItsOwn, "watched": Watched, "outputs": OutputsAlone,
    "positional": Positional, "in training": RightInTraining}  # fmt: skip


def run_trainer(folder: str, family: str, over_ranks: bool, groups: int, changes: dict[str, Any]) -> Logs:
    """What Trainer logs."""
    join_accelerate()
    how: dict[str, Any] = {"per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS, "max_steps": STEPS,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2,
        "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": STEPS}  # fmt: skip
    changes = dict(changes)
    documents = data().to_iterable_dataset() if changes.pop("streamed", False) else data()
    resume = changes.pop("resume", False)
    say = {
        name: changes.pop(name, "")
        for name in (
            "of_a_mean",
            "made_anew",
            "classifies",
            "own_loss",
            "replaced",
            "evaluated",
            "loss_of",
            "overridden",
        )
    }
    model = make_model(family, "sdpa")
    if say["classifies"]:
        model = hf.LlamaForTokenClassification(model.config)
    if say["own_loss"]:
        model = hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=VOCABULARY, emb_dim=32, n_layers=2, n_heads=4))
    if say["of_a_mean"]:
        model.accepts_loss_kwargs = False  # type: ignore[assignment]
    args = hf.TrainingArguments(output_dir=folder, **{**how, **changes})
    if args.fsdp and over_ranks:
        take_fsdp_on_cpus()
    trainer = TRAINERS[say["overridden"]](
        None if say["made_anew"] else model,
        args,
        compute_loss_func=loss_of(say["loss_of"], over_ranks),
        data_collator=hf.DataCollatorWithFlattening(),
        train_dataset=documents,
        eval_dataset=data(7),
        model_init=(lambda: without_cache(make_model(family, "sdpa"))) if say["made_anew"] else None,
    )
    if over_ranks:
        parallelize(trainer, flashcp.ContextParallel(my_group(groups)))
    if say["replaced"]:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    if say["evaluated"]:
        trainer.evaluate()
        if say["evaluated"] != "first":
            return []
    trainer.train(resume_from_checkpoint=resume)
    assert not (args.fsdp and over_ranks) or isinstance(trainer.model_wrapped, FSDPModule)
    logs: Logs = trainer.state.log_history
    return logs


def without_cache(model: Any) -> Any:
    """With one, of a model that is made anew, Transformers 5.24 lets documents of a pack see each other."""
    model.config.use_cache = False
    return model


def refusals(folder: str) -> list[str]:
    """Of what is no trainer, no ContextParallel, and of a trainer that has trained."""
    join_accelerate()
    args = hf.TrainingArguments(output_dir=folder, use_cpu=True, report_to=[])
    trainer, cp = hf.Trainer(make_model("llama", "sdpa"), args), flashcp.ContextParallel()
    said = []
    wrong = (cp, trainer), (trainer.model, cp), (trainer, "flashcp"), (trainer, flashcp.ContextParallel)
    for given in (*wrong, (trainer, cp)):
        trainer.state.global_step = 3
        try:
            parallelize(*given)  # type: ignore[arg-type]
        except ValueError as error:
            said.append(str(error))
    return said


def announced(folder: str) -> str:
    """What parallelize writes on stderr."""
    join_accelerate()
    trainer = hf.Trainer(make_model("llama", "sdpa"), hf.TrainingArguments(folder, use_cpu=True, report_to=[]))
    with redirect_stderr(StringIO()) as text:
        parallelize(trainer, flashcp.ContextParallel(), "per_document")
    return text.getvalue()


def parallelize_twice(folder: str) -> None:
    join_accelerate()
    args = hf.TrainingArguments(output_dir=folder, use_cpu=True, report_to=[])
    trainer = hf.Trainer(make_model("llama", "sdpa"), args, data_collator=hf.DataCollatorWithFlattening())
    for _ in range(2):
        parallelize(trainer, flashcp.ContextParallel())


def run_sft(folder: str, family: str, over_ranks: bool, changes: dict[str, Any]) -> Logs:
    """What TRL's SFTTrainer logs, packing as it does."""
    join_accelerate()
    how: dict[str, Any] = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "max_steps": STEPS,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
        "learning_rate": 1e-2, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": STEPS, "packing": True,
        "max_length": 64, "activation_checkpointing": False}  # fmt: skip
    changes = dict(changes)
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"]) if changes.pop("lora", False) else None
    trainer = SFTTrainer(
        make_model(family, "sdpa"),
        SFTConfig(output_dir=folder, **{**how, **changes}),
        train_dataset=data(),
        eval_dataset=data(15),
        processing_class=tokenizer(),
        peft_config=adapters,
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


def predict(folder: str, over_ranks: bool) -> list[tuple[int, float]]:
    """The label of every row that has one, and the logit it got, in order of both."""
    join_accelerate()
    args = hf.TrainingArguments(folder, per_device_eval_batch_size=ROWS, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = hf.Trainer(make_model("qwen3", "sdpa"), args, data_collator=hf.DataCollatorWithFlattening())
    if over_ranks:
        parallelize(trainer, flashcp.ContextParallel())
    given = trainer.predict(data(7))
    logits, labels = (given.predictions, given.label_ids) if over_ranks else (
        given.predictions[:, :-1], given.label_ids[:, 1:])  # fmt: skip
    kept = labels != -100
    of_labels = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return sorted(zip(labels[kept].tolist(), of_labels[kept].tolist(), strict=True))


def run_loop(over_ranks: bool, how: str = "") -> tuple[list[float], list[float]]:
    """A loop of one's own under Accelerate, the last batch smaller: losses of its windows, and norms of the parameters
    it ends with. how: sharded, streamed, dispatched, or replaced, where the model attends otherwise."""
    join_accelerate()
    if how == "sharded":
        take_fsdp_on_cpus()
    cp = flashcp.ContextParallel()
    model: Any = make_model("mistral_window", install(cp))
    batches = SameBatches(cp) if over_ranks else None
    fsdp = FullyShardedDataParallelPlugin(2, auto_wrap_policy="transformer_based_wrap") if how == "sharded" else None
    dealt = DataLoaderConfiguration(dispatch_batches=how == "dispatched" or None)
    accelerator = Accelerator(cpu=True, parallelism_config=batches, fsdp_plugin=fsdp, dataloader_config=dealt)
    examples = data(STEPS * ROWS - 2)
    given: Any = examples.to_iterable_dataset() if how == "streamed" else examples.to_list()
    loader = DataLoader(given, ROWS, collate_fn=Collator(cp, config=model.config))
    ready = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    if how == "replaced":
        model.set_attn_implementation("sdpa")
    losses = []
    for batch in ready[2]:
        loss = ready[0](**batch).loss
        accelerator.backward(loss * cp.world_size)  # Accelerate takes the mean over ranks, this is a sum
        ready[1].step()
        ready[1].zero_grad()
        losses.append(accelerator.gather_for_metrics(loss.detach()[None]).sum().item())
    assert how != "sharded" or isinstance(ready[0], FSDPModule)
    norms = [parameter.norm() for parameter in ready[0].parameters()]
    return losses, [float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for norm in norms]


def scheduled(groups: int) -> list[float]:
    """Rates of five steps under a prepared scheduler, which falls to 0 in eight."""
    join_accelerate()
    accelerator = Accelerator(cpu=True, parallelism_config=SameBatches(flashcp.ContextParallel(my_group(groups))))
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
    short = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD(model.parameters()), 1.0, total_steps=4)
    model, optimizer, falling, short = accelerator.prepare(model, optimizer, falling, short)
    rates = []
    for _ in range(5):
        rates += falling.get_last_lr()
        optimizer.step()
        falling.step()
        short.step()
    return rates
