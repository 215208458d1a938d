"""Trainer, and what is derived from it (TRL's SFTTrainer), over ranks: one call before `train`."""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer

from flashcp.context_parallel import ContextParallel
from flashcp.integrations.transformers.accelerate import SameBatches
from flashcp.integrations.transformers.collator import Collator
from flashcp.integrations.transformers.install import install
from flashcp.integrations.transformers.loss import check_loss, count_over_ranks, tried
from flashcp.sharding.values import shown


def parallelize(trainer: Trainer, cp: ContextParallel, strategy: str = "flashcp", **options: Any) -> None:
    """Let a trainer's model attend over cp's ranks, each of which gets its rows of the same batches.

    Call it before `train` and `evaluate`. The collator must say where documents begin, as `Collator` asks. strategy,
    options: as for `flashcp.plan`. Losses, gradients and gradient norms are those of one process with the group's
    batches; further groups of cp.world_size ranks are data parallel. The first rank says so on stderr. A
    `compute_loss_func` is tried on its first labels (`loss.tried`).
    Raises ValueError for arguments and losses under which they are not, where ranks of cp do not follow each other, for
    a trainer that has trained already, and for anything but a trainer and a ContextParallel.
    """
    _check_given(trainer, cp)
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
    check_loss(trainer, model)
    model.set_attn_implementation(name)
    trainer.data_collator = Collator(cp, trainer.data_collator, strategy, config=model.config, **options)
    accelerator.state.parallelism_config = batches
    accelerator.state.device_mesh = batches.get_device_mesh(accelerator.device.type)
    count_over_ranks(trainer, args.world_size // cp.world_size)
    if trainer.compute_loss_func is not None:
        trainer.compute_loss_func = tried(trainer.compute_loss_func)
    batches.fit(accelerator)
    trainer.gather_function = accelerator.gather_for_metrics
    make = trainer.call_model_init

    def call_model_init(trial: Any = None) -> Any:
        made = make(trial)
        made.set_attn_implementation(name)
        return made

    trainer.call_model_init = call_model_init
    if args.process_index == 0:
        groups = args.world_size // cp.world_size
        print(f"FlashCP: {cp}, {groups} group{'s' * (groups > 1)} of ranks, strategy={strategy}", file=sys.stderr)


def _check_given(trainer: Any, cp: Any) -> None:
    if not isinstance(trainer, Trainer):
        raise ValueError(
            f"trainer is a {type(trainer).__name__}: expected a Trainer, and cp after it; a model without one takes "
            "set_attn_implementation(install(cp))"
        )
    if not isinstance(cp, ContextParallel):
        given = "the class ContextParallel" if cp is ContextParallel else f"a {type(cp).__name__}"
        raise ValueError(f"cp is {given}: expected what ContextParallel() returns")
    if trainer.state.global_step:
        raise ValueError(f"the trainer is at step {trainer.state.global_step}: expected parallelize before train")
