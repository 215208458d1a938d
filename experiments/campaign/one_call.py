"""One forward and backward of the kernels, once to warm up and once more: what tools look at."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from flashcp.attention import varlen_attention

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute attention of some tokens in three documents, one of them long. Returns 0."""
    parser = argparse.ArgumentParser(prog="one_call", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args(arguments).tokens
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [tokens - 8, 1, 7]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(tokens, 4, 128, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    for _ in range(2):
        out = varlen_attention(q, k, v, lengths)
        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
