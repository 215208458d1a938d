"""Trainer, and what is derived from it (TRL's SFTTrainer), over ranks: one call before `train`."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from transformers import Trainer

from flashcp.context_parallel import ContextParallel
from flashcp.integrations.transformers.accelerate import SameBatches
from flashcp.integrations.transformers.collator import Collator
from flashcp.integrations.transformers.install import install
from flashcp.sharding.values import shown


def parallelize(trainer: Trainer, cp: ContextParallel, strategy: str = "flashcp", **options: Any) -> None:
    """Let a trainer's model attend over cp's ranks, each of which gets its rows of the same batches.

    Call it before `train` and `evaluate`. The collator must say where documents begin, as `Collator` asks. strategy,
    options: as for `flashcp.plan`. Losses, gradients and gradient norms are those of one process with the group's
    batches; further groups of cp.world_size ranks are data parallel.
    Raises ValueError for arguments under which they are not, and where ranks of cp do not follow each other.
    """
    args, accelerator = trainer.args, trainer.accelerator
    dealt = args.accelerator_config
    for field, value, legal, why in (
        (
            "average_tokens_across_devices",
            args.average_tokens_across_devices,
            True,
            "a window's labels are on all ranks",
        ),
        ("label_smoothing_factor", args.label_smoothing_factor, 0.0, "it would shift labels once more"),
        ("neftune_noise_alpha", args.neftune_noise_alpha, None, "a rank's rows would set how strong the noise is"),
        ("n_gpu", args.n_gpu, 1 if args.n_gpu else 0, "one process a GPU"),
        ("accelerator_config.split_batches", dealt.split_batches, False, "each group reads batches of its own"),
        (
            "accelerator_config.dispatch_batches",
            dealt.dispatch_batches or False,
            False,
            "ranks read batches themselves",
        ),
        ("parallelism_config", accelerator.parallelism_config, None, "flashcp sets it"),
    ):
        if isinstance(value, SameBatches):
            raise ValueError(
                "parallelize was called with these TrainingArguments before: make new ones for each Trainer"
            )
        if value != legal:
            raise ValueError(f"{field}={shown(value)} with context parallelism: expected {legal}, for {why}")
    batches = SameBatches(cp)
    model = accelerator.unwrap_model(trainer.model)
    name = install(cp)
    _check_loss(trainer, model)
    model.set_attn_implementation(name)
    trainer.data_collator = Collator(cp, trainer.data_collator, strategy, config=model.config, **options)
    accelerator.state.parallelism_config = batches
    accelerator.state.device_mesh = batches.get_device_mesh(accelerator.device.type)
    trainer.compute_loss = partial(_count_labels, trainer, trainer.compute_loss, args.world_size // cp.world_size)
    batches.fit(accelerator)
    trainer.gather_function = accelerator.gather_for_metrics
    make = trainer.call_model_init

    def call_model_init(trial: Any = None) -> Any:
        made = make(trial)
        made.set_attn_implementation(name)
        return made

    trainer.call_model_init = call_model_init


def _check_loss(trainer: Trainer, model: Any) -> None:
    """Labels are shifted before they are cut up: a loss must take them as `shift_labels`, and the count of them."""
    if trainer.compute_loss_func is not None:
        return
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    forwards = [vars(each)["forward"] for each in type(model).__mro__ if "forward" in vars(each)]
    own = not any("loss_function" in inspect.unwrap(each).__code__.co_names for each in forwards)
    if own or "shift_labels" not in inspect.signature(model.loss_function).parameters:
        loss = "a loss of its own" if own else model.loss_function.__name__
        raise ValueError(
            f"{type(model).__name__} has {loss}: expected the loss of causal language models, which takes labels that "
            "are shifted already, or a compute_loss_func that does"
        )


def _count_labels(
    trainer: Trainer, compute_loss: Any, groups: int, model: Any, inputs: Any, *rest: Any, **named: Any
) -> Any:
    """Trainer gives no count of labels to models with `accepts_loss_kwargs=False`, TRL none in evaluation: each rank's
    mean would be over its own ones. The mean of such a batch is its own, whatever is accumulated."""
    if len(rest) > 1 or named.get("num_items_in_batch") is not None:
        return compute_loss(model, inputs, *rest, **named)
    named["num_items_in_batch"] = inputs["num_items_in_batch"] * groups
    counted = {"model_accepts_loss_kwargs": True, "current_gradient_accumulation_steps": 1}
    before = {name: getattr(trainer, name, None) for name in counted}
    try:
        vars(trainer).update(counted)
        return compute_loss(model, inputs, *rest, **named)
    finally:
        vars(trainer).update(before)
