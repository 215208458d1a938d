"""What somebody else's varlen attention kernel must offer to run under our plans: one class, in a file of its own.

Shapes: Q query rows, N key rows, S sequences, H query heads, K KV heads (H is a multiple), D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Sequences that lie one behind the other: sequence i is the rows cu_seqlens_q[i] : cu_seqlens_q[i + 1] of q and
    the rows cu_seqlens_k[i] : cu_seqlens_k[i + 1] of k and v. None is empty, and all rows belong to one.

    cu_seqlens_q, cu_seqlens_k: int32 [S + 1], on the device of q. max_seqlen_q, max_seqlen_k: rows of the longest.
    causal: query row i of a sequence reads its keys 0 to i; then the keys are as many as the queries. Otherwise every
    query row reads all of its sequence's keys.
    left: row i of m reads none of the n keys before i + n - m - left, as FlashAttention counts, from a sequence's ends;
    -1: no limit. Every row reads a key.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    left: int = -1


class VarlenKernel(ABC):
    """A varlen kernel. q: [Q, H, D], k, v: [N, K, D], of one dtype, elements along D consecutive.

    name: what stands behind `varlen:`. dtypes, head_dim_multiple, longest_head_dim: what it computes. alignment_bytes:
    rows and heads of all tensors begin at multiples of it; their strides are any such.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    head_dim_multiple: int = 8
    longest_head_dim: int = 256
    alignment_bytes: int = 16

    @abstractmethod
    def is_available(self, device: torch.device) -> bool:
        """Whether it is installed and runs on the device."""

    def no_backward(self) -> str:
        """Why there are no gradients; empty where there are. A kernel of the forward pass leaves `backward` out."""
        return "" if type(self).backward is not VarlenKernel.backward else "it computes none"

    def has_windows(self) -> bool:
        """Whether it computes `Sequences.left`; else it is never given one."""
        return False

    def has_softcap(self) -> bool:
        """Whether scores s become softcap * tanh(s / softcap), forward and backward; else it is never given one."""
        return False

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Output [Q, H, D] in q's dtype and natural log-sum-exp of the scaled scores, fp32 [Q, H]. softcap: 0: none."""

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences,
        scale: float, softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, for weights exp(scores - lse); the same bits in every run if the kernel offers that.

        grad_out, out: [Q, H, D] in q's dtype, of all that the rows read, here and in other calls. lse: fp32 [Q, H] of
        all of it too. That is what makes the gradient of each call a part of the whole one, to be added to the others.
        """
        raise NotImplementedError

    def check(self, q: Tensor) -> None:
        """Raises ValueError for a dtype or a head_dim that the kernel does not compute."""
        if q.dtype not in self.dtypes:
            legal = " or ".join(map(str, self.dtypes))
            raise ValueError(f"q is {q.dtype}: attention='varlen:{self.name}' expects {legal}")
        if q.shape[-1] % self.head_dim_multiple or q.shape[-1] > self.longest_head_dim:
            raise ValueError(
                f"head_dim={q.shape[-1]}: attention='varlen:{self.name}' expects a multiple of "
                f"{self.head_dim_multiple} up to {self.longest_head_dim}"
            )


def aligned(x: Tensor, to_bytes: int) -> Tensor:
    """x [rows, heads, D], or a dense copy where a row or a head does not begin at a multiple of `to_bytes`, or lies
    where another one does: vector loads and descriptors of tensors take neither."""
    steps = [stride * x.element_size() for stride, size in zip(x.stride()[:2], x.shape, strict=False) if size > 1]
    if x.data_ptr() % to_bytes == 0 and all(step and step % to_bytes == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def capability(device: torch.device) -> int:
    """Compute capability of an NVIDIA GPU, 90 for 9.0; 0 for everything else."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's switch for operators that repeat bit for bit, on meanwhile; memory is not filled for it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    switches.fill_uninitialized_memory = fill and before[0]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = fill
