"""When checkpoints are written: at once, or beside the steps that follow (`checkpoint.asynchronous`).

`torch.distributed.checkpoint.async_save` is done when torch's own files are. A checkpoint here is done when all ranks
have read them back for their checksums, and `latest` means it. So the whole of `write_checkpoint` runs in a thread:
from a copy of the state in CPU memory that torch's stager makes, over a gloo group of its own.
"""

from __future__ import annotations

import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from flashcp.train.checkpoint import ALONE, CheckpointConfig, Progress, save_checkpoint, state_of, write_checkpoint
from flashcp.train.data.files_read import FilesRead
from flashcp.train.lineage import Lineage
from flashcp.train.ranks import Ranks


class Saver:
    """Writes a run's checkpoints. Every rank makes one and calls the same methods.

    held_ms: how long the run stood still for each checkpoint. A checkpoint that cannot be written is a CheckpointError
    of all ranks after the same step (ValueError: text that was read has changed), as soon as the last has heard of it.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        lineage: Lineage,
        identity: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        read: FilesRead,
        ranks: Ranks,
        timeout_s: float,
    ) -> None:
        self.config, self.lineage, self.identity = config, lineage, identity
        self.model, self.optimizer, self.read, self.ranks = model, optimizer, read, ranks
        self.held_ms: list[float] = []
        self._pending: Future[Path] | None = None
        if config.every and config.asynchronous:
            self._beside = ranks.beside(timeout_s)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="flashcp-checkpoint")
            copies = ("use_shared_memory", "use_async_staging", "use_non_blocking_copy")
            pinned = ranks.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(use_pinned_memory=pinned, **dict.fromkeys(copies, False)))
            # Here and for good: catching warnings in the thread would change the filters of all threads.
            warnings.filterwarnings("ignore", message=ALONE, category=UserWarning)

    def after_step(self, progress: Progress) -> None:
        """Write a checkpoint if one is due, or begin to. Raises CheckpointError, also for one that was begun before."""
        if self._pending and self.ranks.max(not self._pending.done()) == [0.0]:
            self.wait()
        if not self.config.every or progress.step % self.config.every:
            return
        started, given = time.perf_counter(), (self.lineage, self.config.keep, self.identity)
        if self.config.asynchronous:
            self.wait()
            state, now = self._stager.stage(state_of(self.model, self.optimizer, progress)), replace(progress)
            assert isinstance(state, dict)  # a Future where the stager itself is asynchronous
            self._pending = self._thread.submit(write_checkpoint, *given, state, now, self.read, self._beside)
        else:
            save_checkpoint(*given, self.model, self.optimizer, progress, self.read, self.ranks)
        self.held_ms.append(1e3 * (time.perf_counter() - started))

    def wait(self) -> None:
        """Until the checkpoint under way is whole. Raises CheckpointError when it cannot be written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Wait once more: a run that failed keeps the checkpoint it had begun."""
        try:
            self.wait()
        except Exception as error:  # something else ends the run already
            print(error, file=sys.stderr)
        if self.config.every and self.config.asynchronous:
            self._thread.shutdown()
            self._stager.close()
