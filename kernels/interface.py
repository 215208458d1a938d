"""What an implementation of attention offers, and the words it shares with its callers.

Two doors lead to an implementation, both PyTorch operators that torch.compile, checkpointing and FSDP know. Inputs of
`kernels/library.py` are plain tensors that are all there. `flashcp/operator.py` is for context parallelism: its forward
and backward send rows, wait for other ranks and compute tiles in between.

Shapes: T local rows, R received rows, H query heads, K KV heads, D head_dim (of v another one where a kernel can).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashcp.kernels.schedule import Schedule
from flashcp.sharding.masks import Masks

_NAP_S = 2e-5


class KV(NamedTuple):
    """Keys and values of one buffer, or their gradients: [rows, K, D] each."""

    k: Tensor
    v: Tensor


class Gradients(NamedTuple):
    """Gradients of all inputs of attention: of q [T, H, D], of the local keys and values, of the receive buffer
    [R, 2, K, D], for they are added elsewhere."""

    q: Tensor
    local: KV
    received: Tensor


class OnReceived(Protocol):
    """Is told when gradients of received rows are complete: those of one source, or, without a source, of all. The last
    call is one without. gradients: of the receive buffer, [R, 2, K, D], the same tensor each time."""

    def __call__(self, gradients: Tensor, source: int | None = None) -> None: ...


class WaitFlags(NamedTuple):
    """Flags that other ranks raise behind their rows, and how long to wait for them.

    flags: int32 [N]; rows of rank r are here when flags[r] >= epoch, and epochs only grow. An epoch of 0 waits for
    nothing. stuck: int32 [1], 0; source + 1 of the first that did not come within timeout_s. From then on nobody waits
    any more, results mean nothing, and whoever launched the work raises an error that names the source.
    """

    flags: Tensor
    epoch: int
    stuck: Tensor
    timeout_s: float

    def wait(self, source: int) -> None:
        """Wait on the host, flags and stuck in CPU memory: what `wait_until` does on the device."""
        deadline = time.monotonic() + self.timeout_s
        flags, stuck = self.flags.numpy(), self.stuck.numpy()
        while flags[source] < self.epoch and not stuck[0]:
            if time.monotonic() > deadline:
                stuck[0] = source + 1
            time.sleep(_NAP_S)


class AttentionKernel(ABC):
    """An implementation. q: [T, H, D]. local, received: keys and values of the local tensor, [T, K, D] each, and of the
    receive buffer, [R, K, D] each. schedule: the ranges of both that each query shard reads. scale: of the scores.
    softcap: scaled scores s become softcap * tanh(s / softcap); 0: none.

    own_v_dim: whether v's head_dim may differ from that of q and k; outputs then have v's.
    """

    own_v_dim = False

    def check_masks(self, masks: Masks) -> None:  # noqa: B027 (most have nothing to say)
        """Raises ValueError, on every rank alike, for masks of a pack that it does not compute."""

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        flags: WaitFlags | None = None,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Attention over all of a schedule's ranges at once: out [T, H, D] in q's dtype, log-sum-exp fp32 [T, H].

        Rows that read nothing get zeros and -inf. flags: received rows are still on their way; local ranges are
        computed first, and a received one when its source's flag is up.
        """

    @abstractmethod
    def merge_into(
        self,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        softcap: float = 0.0,
    ) -> None:
        """Merge what the schedule's ranges contribute into `out` and `lse`, part after part.

        out: fp32 [T, H, D], zeros before the first part. lse: fp32 [T, H], -inf before the first part. A row whose
        ranges are all empty keeps what it has.
        """

    @abstractmethod
    def gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        out: Tensor,
        lse: Tensor,
        schedule: Schedule,
        scale: float,
        local_dtype: torch.dtype | None = None,
        on_received: OnReceived | None = None,
        received_dtype: torch.dtype = torch.float32,
        softcap: float = 0.0,
    ) -> Gradients:
        """Gradients of `attend`: q's in its dtype, local ones in local_dtype (None: the inputs'), those of received
        rows in received_dtype, summed in fp32 and rounded once.

        out, lse: the merged result over *all* ranges of the forward pass; with it each range's gradient stands alone.
        on_received: called as soon as gradients of received rows are complete, before those of local rows are computed.
        Source by source where a source can be finished before the next one is begun and that costs nothing: on a CPU.
        A GPU's launch over all sources has one last wave of programs, and one launch a source would have a last wave
        each, so there they are complete together.
        """
