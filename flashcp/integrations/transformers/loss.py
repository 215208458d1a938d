"""A Trainer's loss over ranks: a sum over labels that are shifted already, divided by the whole window's count."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from flashcp.integrations.transformers.collator import IGNORE

_SFT = ("trl.trainer.sft_trainer", "SFTTrainer")
_EXPECTED = (
    "expected a compute_loss_func, which takes labels that are shifted already, and divides the sum over them by "
    "num_items_in_batch"
)
KINDS = 8
"""Labels that are tried, until one has a loss."""
ROUNDING, ROUNDING_OF_16_BITS = 1e-5, 1e-2
"""By which twice the half of a loss may differ from it: sums may be added up in any order."""


def check_loss(trainer: Trainer, model: Any) -> None:
    """Raise ValueError where ranks' losses would not add up to the window's: a model whose loss does not take shifted
    labels, without a compute_loss_func, and a `compute_loss` that was put into the trainer itself."""
    if "compute_loss" in vars(trainer):
        raise ValueError(
            f"trainer.compute_loss was replaced: {_EXPECTED}; or a subclass whose compute_loss calls super()"
        )
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


def count_over_ranks(trainer: Trainer, groups: int) -> None:
    """Let Trainer's loss (SFTTrainer's, where it is one) be told of all ranks' labels.

    The trainer becomes one of a subclass. In the order of its classes ours comes right before the one whose loss is
    known, so a `compute_loss` that calls super() finds it there, whatever it hands on. One that does not call it, or
    leaves out what it gives, raises ValueError in its first step: it would count neither labels nor ranks.
    """
    own = type(trainer)
    known: Any = next(each for each in own.__mro__ if each is Trainer or (each.__module__, each.__name__) == _SFT)
    given: list[Tensor] = []

    class Counted(known):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            made = _count_labels(self, super().compute_loss, groups, model, inputs, *rest, **named)
            if own is not known:
                given[:] = [_loss_of(made)]
            return made

    made: Any = Counted if own is known else _watched(own, Counted, given)
    made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__
    trainer.__class__ = made


def _watched(own: Any, counted: Any, given: list[Tensor]) -> type:
    """own, whose super() is counted; given: the loss that this gave last."""
    done = False

    class Watched(own, counted):
        def compute_loss(self, *inputs: Any, **named: Any) -> Any:
            nonlocal done
            given.clear()
            made = super().compute_loss(*inputs, **named)
            if not given:
                raise ValueError(f"{own.__name__}.compute_loss does not call super().compute_loss: {_EXPECTED}")
            if not done and given[0].grad_fn is not None:
                done = True
                if not _follows(_loss_of(made), given[0]):
                    raise ValueError(
                        f"{own.__name__}.compute_loss leaves out the loss of super().compute_loss: {_EXPECTED}"
                    )
            given.clear()
            return made

    return Watched


def _loss_of(made: Any) -> Tensor:
    loss: Tensor = made[0] if isinstance(made, tuple) else made
    return loss


def _follows(loss: Tensor, from_loss: Tensor) -> bool:
    """Whether a loss was computed from another, as its graph says."""
    if loss is from_loss:
        return True
    ahead, seen = [loss.grad_fn], set[Any]()
    while ahead:
        node = ahead.pop()
        if node is from_loss.grad_fn:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    return False


def tried(loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A compute_loss_func that is called some times more for the first labels it gets, without gradients: nothing else
    tells of a mean over a rank's labels, or of labels that it shifts once more.

    Raises ValueError for both, in that first step.
    """
    done = False

    @wraps(loss_of)
    def compute(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        nonlocal done
        loss = loss_of(outputs, labels, num_items_in_batch=num_items_in_batch)
        if not done and labels is not None and num_items_in_batch is not None and bool((labels != IGNORE).any()):
            done = True
            with torch.no_grad():
                _try(loss_of, outputs, labels, num_items_in_batch, loss.detach())
        return loss

    return compute


def _try(loss_of: Callable[..., Tensor], outputs: Any, labels: Tensor, count: Any, loss: Tensor) -> None:
    if not loss.isfinite():
        return  # a model's own fault
    half = loss_of(outputs, labels, num_items_in_batch=2 * count)
    rounding = ROUNDING_OF_16_BITS if loss.dtype in (torch.bfloat16, torch.float16) else ROUNDING
    if not torch.isclose(2 * half, loss, rtol=rounding, atol=0):
        raise ValueError(
            f"compute_loss_func gave {float(loss):.4g} for num_items_in_batch={int(count)}, and {float(half):.4g} for "
            f"twice as many: {_EXPECTED}. A mean over a rank's rows is not the window's, alone or in a part"
        )
    known = labels[labels != IGNORE].unique()
    known = known[:: max(1, len(known) // KINDS)]  # weights of some may be 0
    of_first = (loss_of(outputs, _first_alone(labels, int(kind)), num_items_in_batch=count) for kind in (*known, 0, 1))
    if not any(bool(one.isfinite() & (one != 0)) for one in of_first):  # a model may be sure of one label, not of all
        raise ValueError(f"compute_loss_func leaves out the label of a rank's first row: {_EXPECTED}")


def _first_alone(labels: Tensor, label: int) -> Tensor:
    """labels [1, tokens] of which the first is this one, and all others do not count."""
    alone = torch.full_like(labels, IGNORE)
    alone[..., 0] = label
    return alone


def _count_labels(
    trainer: Trainer, compute_loss: Any, groups: int, model: Any, inputs: Any, *rest: Any, **named: Any
) -> Any:
    """Trainer gives no count of labels to models with `accepts_loss_kwargs=False`, TRL none in evaluation: each rank's
    mean would be over its own ones. The mean of such a batch is its own, whatever is accumulated."""
    if named.get("num_items_in_batch", *rest[1:]) is not None:
        return compute_loss(model, inputs, *rest, **named)
    rest = rest[:1]
    named["num_items_in_batch"] = inputs["num_items_in_batch"] * groups
    counted = {"model_accepts_loss_kwargs": True, "current_gradient_accumulation_steps": 1}
    before = {name: getattr(trainer, name, None) for name in counted}
    try:
        vars(trainer).update(counted)
        return compute_loss(model, inputs, *rest, **named)
    finally:
        vars(trainer).update(before)
