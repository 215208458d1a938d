"""What the paper prints (arXiv 2606.08476v1): the numbers that ours stand beside."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BREAKDOWN", "KERNEL_LATENCY", "MEAN_SPEEDUPS", "SOLVER", "SPEEDUPS_BY_CONTEXT", "Breakdown"]


class Breakdown(NamedTuple):
    """Parts of one training pass of the attention module, ms."""

    copies: float
    attention_forward: float
    attention_backward: float
    all_gather: float
    reduce_scatter: float

    @property
    def total(self) -> float:
        """All of it: the paper's parts follow one another."""
        return sum(self)


BREAKDOWN = {
    "wlb_llm": {
        "llama3": Breakdown(13.1, 26.2, 75.6, 5.4, 5.5),
        "per_document": Breakdown(19.8, 19.3, 55.1, 5.4, 5.5),
        "flashcp_paper": Breakdown(15.9, 19.1, 53.9, 4.2, 4.2),
    },
    "pile": {
        "llama3": Breakdown(13.3, 9.5, 27.6, 5.4, 5.5),
        "per_document": Breakdown(29.7, 5.7, 18.4, 5.4, 5.5),
        "flashcp_paper": Breakdown(16.5, 5.5, 15.6, 3.6, 3.6),
    },
}
"""Figure 6: data set, method; N = 8, windows of 128K, H = 32, D = 128, bf16."""

MEAN_SPEEDUPS = {"llama3": 1.38, "per_document": 1.63, "ring": 1.97, "ring_zigzag": 2.14}
"""Figure 5: FlashCP over each, mean over data sets, N = 4 and 8, H = 16 and 32, inference and training."""

KERNEL_LATENCY = {
    "one 128K document": {"llama3": 1.00, "per_document": 1.03, "ring_zigzag": 1.06},
    "sixteen 8K documents": {"llama3": 1.00, "per_document": 1.21, "ring_zigzag": 1.41},
}
"""Figure 3: attention kernels alone, relative to llama3's."""

SPEEDUPS_BY_CONTEXT = {
    "inference": {
        "per_document": {65536: 0.89, 98304: 0.98, 131072: 1.07},
        "flashcp_paper": {65536: 0.97, 98304: 1.12, 131072: 1.24},
    },
    "training": {
        "per_document": {65536: 1.03, 98304: 1.11, 131072: 1.20},
        "flashcp_paper": {65536: 1.07, 98304: 1.19, 131072: 1.30},
    },
}
"""Figure 7: over llama3, WLB-LLM's lengths, N = 8, by tokens of the window."""

SOLVER = {"flashcp_paper": {"saving": 0.28, "imbalance": 1.04}, "exact": {"saving": 0.36, "imbalance": 1.00}}
"""Table 2: Pile, N = 4; the paper's heuristic and its integer program."""
