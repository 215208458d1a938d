"""What attention waits for when it starts before all rows are there."""

from __future__ import annotations

import time
from typing import NamedTuple

from torch import Tensor

__all__ = ["Arrivals"]

_NAP_S = 2e-5


class Arrivals(NamedTuple):
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
