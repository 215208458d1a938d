"""The training loop: one optimizer step from some packs, and the row of numbers that tells how it went."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from flashcp.context_parallel import ContextParallel
from flashcp.limits import Count, Seconds, one_of
from flashcp.train.checkpoint import Progress
from flashcp.train.data.loader import Batch
from flashcp.train.model import Decoder
from flashcp.train.nonfinite import MOST_SKIPPED, ON_NONFINITE, NonFiniteError, are_finite, what_is_not_finite
from flashcp.train.optimizer import FlatGradients, OptimizerConfig, learning_rate
from flashcp.train.ranks import DEVICES, Ranks

PRECISIONS = ("fp32", "bf16")


@dataclass
class LoopConfig:
    """How long and how, as `conf/train.yaml` explains it."""

    steps: Count = 100
    accumulation: Count = 1
    precision: Annotated[str, one_of(PRECISIONS)] = "fp32"
    device: Annotated[str, one_of(DEVICES)] = "auto"
    timeout_s: Seconds = 600.0
    progress: bool = True
    on_nonfinite: Annotated[str, one_of(ON_NONFINITE)] = "stop"

    @property
    def dtype(self) -> torch.dtype:
        """Of Q, K and V."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


@dataclass(eq=False)
class Trainer:
    """Model, optimizer and batches of one rank. `steps()` does the work, one row of metrics a step."""

    config: LoopConfig
    optimizer_config: OptimizerConfig
    model: Decoder
    optimizer: torch.optim.Optimizer
    cp: ContextParallel
    batches: Iterator[Batch]
    progress: Progress
    ranks: Ranks

    def __post_init__(self) -> None:
        self.gradients = FlatGradients(self.model)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train to the last step, or to the last whole group of packs when the documents end before it.

        Yields a row after every step that was taken, equal on all ranks; `progress` is then up to date.
        Raises NonFiniteError on all ranks, before a weight has changed, where the loss or its gradients are not finite;
        with on_nonfinite="skip" for the last of MOST_SKIPPED such steps in a row.
        """
        skipped = 0
        while self.progress.step < self.config.steps:
            started, before = time.perf_counter(), replace(self.progress)
            packs = list(itertools.islice(self.batches, self.config.accumulation))
            if len(packs) < self.config.accumulation:
                return
            loader_ms = 1e3 * (time.perf_counter() - started)
            self.progress.step += 1
            self._tell(f"step {self.progress.step}")
            self.progress.dropped += sum(pack.dropped for pack in packs)
            self.progress.carried += sum(pack.carried for pack in packs)
            self.progress.skipped += sum(pack.skipped for pack in packs)
            self.progress.position = packs[-1].position
            self.cp.stats.reset()
            loss, norm = self.learn(packs)
            if are_finite(loss, norm):
                rate = self._update(norm)
                skipped = 0
                yield self._row(packs, loss, norm, rate, started, loader_ms)
                continue
            skipped += 1
            message = f"step {self.progress.step}: {self.not_finite(packs, loss, norm)}"
            if self.config.on_nonfinite == "stop" or skipped == MOST_SKIPPED:
                raise NonFiniteError(message, before, packs)
            if self.ranks.rank == 0:
                print(f"left out: {message}", file=sys.stderr)

    def learn(self, packs: list[Batch]) -> tuple[float, float]:
        """The loss of some packs over all ranks, and the norm of its gradients, which are then in place."""
        # The denominator counts labels over all ranks and packs, so shares and gradients add up over both.
        labelled = max(1, sum(pack.labelled for pack in packs))
        device = self.ranks.device
        share = torch.zeros((), dtype=torch.float64, device=device)
        self.gradients.zero()
        for pack in packs:
            here = pack.to(device)
            with self._doing("forward"), self._autocast():
                loss = self.model.loss(here.tokens, here.labels, here.position_ids, here.plan)
            with self._doing("backward"):
                (loss / labelled).backward()
            share += loss.detach().double() / labelled
        # Rows that never came are known only now where streams wait for them: before any rank adds up their gradients.
        with self._doing("backward"):
            self.cp.synchronize()
        with self._doing("sum of gradients"):
            self.gradients.sum_over_ranks()
            total, norms = self.ranks.sum(share.item(), self.gradients.norm())  # both wait for the device
        return total, norms / self.ranks.world_size

    @contextmanager
    def _doing(self, phase: str) -> Iterator[None]:
        """What this rank does, for the others; an error takes a note of it along."""
        step = f"step {self.progress.step}"
        self._tell(f"{step}, {phase}")
        try:
            yield
        except Exception as error:
            error.add_note(f"{step}, {phase}")
            raise
        self._tell(step)

    def _tell(self, where: str) -> None:
        if self.ranks.heartbeat:
            self.ranks.heartbeat.doing = f"in {where}"

    def not_finite(self, packs: list[Batch], loss: float, norm: float) -> str:
        """What is not finite in the packs whose gradients are in place. Every rank must call it."""
        with self._autocast():
            where = what_is_not_finite(self.model, self.cp, packs, self.ranks)
        return f"the loss is {loss}, the norm of its gradients {norm}: {where}"

    def _update(self, norm: float) -> float:
        """One step of the optimizer. Returns the learning rate."""
        rate = learning_rate(self.optimizer_config, self.progress.step, self.config.steps)
        self.gradients.clip(norm, self.optimizer_config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # it belongs to the step's time
        return rate

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _row(
        self, packs: list[Batch], loss: float, norm: float, rate: float, started: float, loader_ms: float
    ) -> dict[str, Any]:
        """Times are the slowest rank's; imbalance, critical rows and saving are means over the packs, of all ranks:
        the largest of the replicas', imbalance over the mean work of all, the least saving.

        attention_ms, exposed_exchange_ms, wait_ms: the operator's clock, all layers, forward and backward.
        loader_ms: waiting for batches that should have been ready.
        """
        step_ms = 1e3 * (time.perf_counter() - started)
        planned = [
            value
            for pack in packs
            for value in (
                pack.planned.imbalance * pack.heaviness,
                pack.planned.critical_rows,
                -pack.planned.saving,
                pack.planned.critical_rows_bound,
            )
        ]
        clock = {name: getattr(self.cp.stats, name) for name in ("attention_ms", "exposed_exchange_ms", "wait_ms")}
        own = {"step_ms": step_ms, **clock, "loader_ms": loader_ms}
        digests = [pack.digest for pack in packs]
        largest = self.ranks.max(*own.values(), *planned, *digests, *(-digest for digest in digests))
        self._check_texts(digests, largest[len(own) + len(planned) :])
        times = dict(zip(own, largest, strict=False))
        imbalance, critical, lost, bound = (
            sum(largest[len(own) + i : len(own) + len(planned) : 4]) / len(packs) for i in range(4)
        )
        tokens = sum(pack.size for pack in packs)
        return {
            "step": self.progress.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "labelled_tokens": sum(pack.labelled for pack in packs),
            "documents": sum(pack.documents for pack in packs),
            "dropped_tokens": self.progress.dropped,
            "carried_tokens": self.progress.carried,
            "skipped_records": self.progress.skipped,
            "epoch": self.progress.position.epoch,
            **times,
            "tokens_per_s": 1e3 * tokens / times["step_ms"],
            "imbalance": imbalance,
            "critical_rows": critical,
            "saving": 0.0 - lost,  # not -0.0
            "critical_rows_bound": bound,
        }

    def _check_texts(self, digests: list[int], largest: list[float]) -> None:
        """Raise ValueError on every rank, naming who differs, where ranks packed different tokens.

        digests: of this rank's packs. largest: their maxima over ranks, then those of their negatives.
        """
        if largest[: len(digests)] == [-value for value in largest[len(digests) :]]:
            return
        said = self.ranks.gather(digests)
        most = max(said, key=said.count)
        others, same = (
            [str(rank) for rank, each in enumerate(said) if (each == most) is kept] for kept in (False, True)
        )
        raise ValueError(
            f"step {self.progress.step}: rank {', '.join(others)} read other text than rank {', '.join(same)}; "
            "expected the same files in data.path and the same data.tokenizer on every node, unchanged during a run"
        )
