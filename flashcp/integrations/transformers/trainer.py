"""Trainer, and what is derived from it (TRL's SFTTrainer), over ranks: one call before `train`."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor
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
    model.set_attn_implementation(install(cp))
    trainer.data_collator = Collator(cp, trainer.data_collator, strategy, config=model.config, **options)
    accelerator.dataloader_config.dispatch_batches = False  # else rank 0 reads iterable data sets and cuts its rows up
    accelerator.state.parallelism_config = batches
    accelerator.state.device_mesh = batches.get_device_mesh(accelerator.device.type)
    trainer.compute_loss = partial(_count_labels, trainer.compute_loss, args.world_size // cp.world_size)
    _keep_whole_groups(accelerator, cp.world_size)
    trainer.gather_function = accelerator.gather_for_metrics


def _count_labels(compute_loss: Any, groups: int, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
    """TRL evaluates without a count of labels: each rank's mean would be over its own ones."""
    if len(rest) < 2 and named.get("num_items_in_batch") is None:
        named["num_items_in_batch"] = inputs["num_items_in_batch"] * groups
    return compute_loss(model, inputs, *rest, **named)


def _keep_whole_groups(accelerator: Accelerator, ranks: int) -> None:
    """Of the last batch Accelerate keeps as many values as the data set had rows left, the first of all that ranks
    gave. With context parallelism a row's value has a part on each rank of its group: all of them are kept."""
    gather = accelerator.gather_for_metrics

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        state = accelerator.gradient_state
        if use_gather_object or not state.end_of_dataloader or state.remainder <= 0:
            return gather(input_data, use_gather_object)
        rows = state.remainder

        def keep(x: Tensor) -> Tensor:
            """Of x [groups * ranks * values, ...] as many values of each rank as rows of its group are left."""
            of_ranks = x.unflatten(0, (-1, ranks, len(x) // accelerator.num_processes))
            return of_ranks.transpose(1, 2).flatten(0, 1)[:rows].flatten(0, 1)

        return recursively_apply(keep, accelerator.gather(input_data))

    accelerator.gather_for_metrics = gather_for_metrics
