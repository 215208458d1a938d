"""A kernel that waits for rows which others put into this rank's memory.

Whoever puts rows raises a flag behind them: an int32 epoch in this rank's memory that only grows, so a reader asks for
*at least* an epoch. Rows and flags are moved by copy engines and streams (`comm/fabrics/cuda.py`), which order them and
fence the flag for the whole system. Two rules hold on the reader's side:

- What others may change while it is read (flags, `stuck`) is read by one thread for all, by an atomic with acquire:
  with a plain load each thread would see its own value, and threads that leave a loop apart never meet again.
- Rows that were waited for are read through pointers, not by the copy engine of a chip (TMA), which a flag does not
  order.

A wait ends: after `spins` looks it notes source + 1 in `stuck` (int32, 0 while all is well, the first to be late stays)
and from then on no wait that sees `stuck` lasts, so that the kernel ends soon and the host can raise an error.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_LONGEST = 2**31 - 1


@triton.jit
def wait_until(flag, epoch, spins, stuck, source):
    """Look at a flag of this rank up to 1 + `spins` times until it is at least `epoch`; whether it is.

    Then every thread of the program sees what `source` stored before it raised the flag. If it is not, `stuck` holds
    source + 1, or what an earlier wait left there.
    """
    seen = _read(flag)
    left = spins
    while (seen < epoch) & (left > 0):
        left = tl.where(_read(stuck) == 0, left - 1, 0)
        seen = _read(flag)
    if seen < epoch:
        tl.atomic_cas(stuck, 0, source + 1, sem="release", scope="sys")
    return seen >= epoch


@triton.jit(do_not_specialize=["epoch", "spins"])
def wait_kernel(flag, epoch, spins, stuck):
    """One program that waits for one flag, of source 0: how long a look takes is measured with it."""
    wait_until(flag, epoch, spins, stuck, 0)


@triton.jit
def _read(word):
    """An int32 that others write, the same for all threads, with acquire (compiles to a load)."""
    return tl.atomic_add(word, 0, sem="acquire", scope="sys")


def spins(device: torch.device, timeout_s: float) -> int:
    """How often a waiting kernel looks at a flag in so many seconds. Measured in the first call, which makes the host
    wait for the device."""
    return min(_LONGEST, max(1, round(timeout_s * _spins_per_s(device))))


@lru_cache
def _spins_per_s(device: torch.device) -> float:
    """Looks a second at a flag that never rises: the fastest of three waits of 10 ms and more.

    Under the interpreter a second is one of this process's own: beside busy neighbours time-outs last longer, not less.
    """
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    looks, rates = 1, list[float]()
    while len(rates) < 3:
        start = _now(device)
        _wait(flag, looks)
        took = _now(device) - start
        if took < 0.01:
            looks *= 4
        else:
            rates.append(looks / took)
    return max(rates)


def _wait(flag: Tensor, looks: int) -> None:
    with torch.cuda.device_of(flag):
        wait_kernel[(1,)](flag, 1, looks, torch.zeros_like(flag), num_warps=4)


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
