"""torchtitan where it would not run by itself: on CPUs, and with torch 2.13."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.tools import utils

FSDP_READS_SPMD_TYPES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
_NAMES = ("device_type", "device_module")


class _Cpu:
    """What torchtitan asks of `torch.cuda`, answered for a CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def get_device_properties(self, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def memory_stats(self, *_: Any) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, *_: Any) -> None:
        pass

    empty_cache = reset_peak_memory_stats


def make_it_run() -> None:
    """Name CPUs to torchtitan where there is no accelerator, and give torch 2.13 the function that it calls after the
    first step. Whatever of it is imported already is told too."""
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = dist.distributed_c10d._set_pg_timeout  # type: ignore[attr-defined]
    if torch.accelerator.is_available():
        return
    found = {"device_type": "cpu", "device_module": _Cpu()}
    for name, module in list(sys.modules.items()):
        if module is utils or (name.startswith("torchtitan.") and getattr(module, "device_type", None) == "cuda"):
            for one in _NAMES:
                if hasattr(module, one):
                    setattr(module, one, found[one])
