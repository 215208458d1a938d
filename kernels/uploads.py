"""Small arrays on their way to a device: the host waits for nothing, and any stream may read what it keeps there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in the order of its current stream. On a CPU: the array's own memory.

    From pinned memory: a copy from pageable memory keeps the host until the device has come to it. torch's allocator of
    pinned memory keeps what it lent until the copy is done.
    """
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


class Uploaded:
    """An array that stays on a device, for whatever stream asks for it."""

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        self._tensor = to_device(array, device)
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if on_gpu else None
        self._landed = self._stream.record_event() if self._stream else None

    def here(self) -> Tensor:
        """The array, for the current stream to read."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._tensor.device)
            if current != self._stream:
                self._tensor.record_stream(current)
            # A graph that is captured knows no event from outside; what it reads was used before, and is there.
            if self._landed is not None and not torch.cuda.is_current_stream_capturing():
                if self._landed.query():
                    self._landed = None
                else:
                    current.wait_event(self._landed)
        return self._tensor
