"""Where the time of a rank goes: host wall-clock spent in attention, in the exchange, and waiting for other ranks.

The same blocks are named ranges in the trace of a profiler.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from torch.autograd import profiler
from torch.profiler import record_function

_NOTHING = nullcontext()


@dataclass
class Clock:
    """Milliseconds since the last reset, this rank's.

    attention_ms: attention kernels, forward and backward. exposed_exchange_ms: packing, sending and waiting for rows,
    that is, the part of the exchange that no attention hides. wait_ms: waiting for slower ranks to come to it.
    """

    attention_ms: float = 0.0
    exposed_exchange_ms: float = 0.0
    wait_ms: float = 0.0
    _inner_ms: float = field(default=0.0, repr=False, compare=False)

    def reset(self) -> None:
        """Set all to zero."""
        self.attention_ms = self.exposed_exchange_ms = self.wait_ms = 0.0

    @contextmanager
    def measure(self, total: str, name: str = "") -> Iterator[None]:
        """Add the time of a block to one of the fields; a block inside another counts for itself alone.

        name: of the block in a trace; empty for one whose parts have names.
        """
        start, inner, self._inner_ms = time.perf_counter(), self._inner_ms, 0.0
        try:
            with span(name) if name else _NOTHING:
                yield
        finally:
            passed = 1e3 * (time.perf_counter() - start)
            setattr(self, total, getattr(self, total) + passed - self._inner_ms)
            self._inner_ms = inner + passed


def span(name: str) -> AbstractContextManager[object]:
    """A block as a named range in the trace, on the track of its thread; nothing where no profiler runs.

    The profiler must be one of all threads to see those of `comm/fabrics/` (`train/trace.py`).
    """
    return record_function(name) if profiler._is_profiler_enabled else _NOTHING
