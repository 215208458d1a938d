"""Small arrays on their way to a device: the host waits for nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, in the order of its current stream. On a CPU: the array's own memory.

    From pinned memory: a copy from pageable memory keeps the host until the device has come to it. torch's allocator of
    pinned memory keeps what it lent until the copy is done.
    """
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
