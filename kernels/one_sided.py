"""One-sided verbs on the device, as NVSHMEM has them: put, get, signal, wait and quiet over a table of heap bases.

Every rank has a symmetric heap: an offset, in bytes, means the same thing on all of them. `bases` int64 [N] holds at r
the address of rank r's heap as this process maps it: NVLink peers and processes of one host see each other's memory,
so a put is a plain store and a get a plain load. Rows lie at multiples of 16 bytes. Where a network lies between, the
host's transport does the same work.

Flags are int32 epochs that only grow; a reader asks for *at least* an epoch. A flag is raised after the rows it speaks
of, with release, and read with acquire, both for the whole system. Three rules hold all of this together:

- Before a release there is a barrier: rows are stored by all threads of a program, the flag is raised by one.
- What another program may change while it is read (flags, counts, `stuck`) is read by one thread for all, by an atomic:
  with a plain load each thread would see its own value, and threads that leave a loop apart never meet again.
- Rows that were waited for are read through pointers, not by the copy engine of a chip (TMA), which a flag does not
  order.

A wait ends: after `spins` looks it notes source + 1 in `stuck` (int32, 0 while all is well, the first to be late stays)
and from then on no wait that sees `stuck` lasts, so that the kernel ends soon and the host can raise an error.

The kernels below are launched by `kernels/transfers.py`, which documents their arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels.blocks import place

__all__ = [
    "get_rows",
    "get_rows_kernel",
    "put_rows",
    "put_rows_kernel",
    "put_signal",
    "quiet",
    "signal",
    "signal_kernel",
    "wait_kernel",
    "wait_until",
]


@triton.jit
def put_rows(bases, rank, offset, rows, stride_row, values, present, HEAD_DIM: tl.constexpr):
    """Store values [ROWS, BLOCK_D] as rows `rows` [ROWS] of the region at `offset` of a rank's heap.

    stride_row: elements from row to row. present [ROWS]: which of the rows there are. Nobody may rely on them before a
    flag says so.
    """
    to = _elements(bases, rank, offset, rows, stride_row, values.dtype, values.shape[1])
    tl.store(to, values, mask=_mask(present, HEAD_DIM, values.shape[1]))


@triton.jit
def put_signal(
    bases, rank, offset, rows, stride_row, values, present, flag_offset, epoch, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """`put_rows`, then `signal` that rank: who sees the epoch sees these rows, and all that this program put before."""
    put_rows(bases, rank, offset, rows, stride_row, values, present, HEAD_DIM)
    signal(bases, rank, flag_offset, epoch)


@triton.jit
def get_rows(
    bases, rank, offset, rows, stride_row, present, DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """[ROWS, BLOCK_D] of DTYPE: rows `rows` [ROWS] of the region at `offset` of a rank's heap, zeros where not present.

    Call it after a `wait_until` for the flag that rank raised behind them.
    """
    at = _elements(bases, rank, offset, rows, stride_row, DTYPE, BLOCK_D)
    return tl.load(at, mask=_mask(present, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def signal(bases, rank, flag_offset, epoch):
    """Raise the flag at `flag_offset` of a rank's heap to `epoch`, or leave it where it is higher.

    Who sees the epoch sees all that this program stored, anywhere, before. Between GPUs this atomic needs NVLink: over
    PCIe alone let the host copy and signal.
    """
    tl.debug_barrier()
    flag = tl.cast(tl.load(bases + rank) + flag_offset, tl.pointer_type(tl.int32))
    tl.atomic_max(flag, epoch, sem="release", scope="sys")


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


@triton.jit
def quiet(count):
    """Count this program in, in memory of this rank; how many were counted before.

    All puts of the programs counted so far, this one's too, come before whatever this program signals from now on: the
    last of several programs speaks for all. It does not tell any other rank, nor wait for copy engines or the host.
    """
    tl.debug_barrier()
    return tl.atomic_add(count, 1, sem="acq_rel", scope="sys")


@triton.jit(do_not_specialize=["count", "rank", "epoch", "clear_epoch", "spins"])
def put_rows_kernel(
    x, index, blocks, count, expected, done, bases, region, region_row, signals, rank, epoch,
    clear, clear_epoch, stuck, spins, heads, row, head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of x to the regions of other ranks; each is signalled by the last program that had rows for it.

    A rank's region is written once that rank has cleared it, not at all if it does not in time: then it is not
    signalled either, since its programs are not all counted.
    """
    for b in range(tl.program_id(0), count, tl.num_programs(0)):
        to, first, stop, at = _block(blocks, b)
        if wait_until(clear + to, clear_epoch, spins, stuck, to):
            entry = tl.arange(0, BLOCK_ROWS)
            present = first + entry < stop
            mine = tl.load(index + first + entry, mask=present, other=0).to(tl.int64)
            from_row = mine[:, None] * row + tl.arange(0, BLOCK_D)[None, :]
            for h in range(heads):
                values = tl.load(place(x, 0, 0, h, head) + from_row, mask=_mask(present, HEAD_DIM, BLOCK_D))
                into = region + h * (HEAD_DIM * (x.dtype.element_ty.primitive_bitwidth // 8))
                put_rows(bases, to, into, at + entry, region_row, values, present, HEAD_DIM)
            if _last(done, expected, to):
                signal(bases, to, signals + 4 * rank, epoch)


@triton.jit(do_not_specialize=["count", "rank", "epoch", "ready_epoch", "spins"])
def get_rows_kernel(
    x, index, blocks, count, expected, done, bases, region, region_row, signals, arrived, rank, epoch,
    ready, ready_epoch, stuck, spins, heads, row, head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of other ranks' regions into x; the last program that read from a rank says so, here and there.

    A rank's region is read once it is ready, not at all if it is not in time.
    """
    for b in range(tl.program_id(0), count, tl.num_programs(0)):
        source, first, stop, at = _block(blocks, b)
        if wait_until(ready + source, ready_epoch, spins, stuck, source):
            entry = tl.arange(0, BLOCK_ROWS)
            present = first + entry < stop
            theirs = tl.load(index + first + entry, mask=present, other=0)
            to_row = (at + entry).to(tl.int64)[:, None] * row + tl.arange(0, BLOCK_D)[None, :]
            for h in range(heads):
                at_head = region + h * (HEAD_DIM * (x.dtype.element_ty.primitive_bitwidth // 8))
                values = get_rows(
                    bases, source, at_head, theirs, region_row, present, x.dtype.element_ty, HEAD_DIM, BLOCK_D
                )
                tl.store(place(x, 0, 0, h, head) + to_row, values, mask=_mask(present, HEAD_DIM, BLOCK_D))
            if _last(done, expected, source):
                signal(bases, rank, arrived + 4 * source, epoch)
                signal(bases, source, signals + 4 * rank, epoch)


@triton.jit(do_not_specialize=["rank", "epoch"])
def signal_kernel(bases, ranks, signals, rank, epoch):
    """Program i raises this rank's flag on rank ranks[i]."""
    signal(bases, tl.load(ranks + tl.program_id(0)), signals + 4 * rank, epoch)


@triton.jit(do_not_specialize=["count", "epoch", "spins"])
def wait_kernel(flags, sources, count, epoch, stuck, spins):
    """One program waits for one source after the other."""
    for i in range(count):
        source = tl.load(sources + i)
        wait_until(flags + source, epoch, spins, stuck, source)


@triton.jit
def _block(blocks, index):
    """An entry of a table of blocks: (other rank, first and past-last entry of the index, first row at the far end)."""
    entry = blocks + 4 * index
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _last(done, expected, rank):
    """Count this block in; whether it is the last one of its rank. The count then starts again."""
    last = quiet(done + rank) == tl.load(expected + rank) - 1
    if last:
        tl.store(done + rank, 0)
    return last


@triton.jit
def _read(word):
    """An int32 that others write, the same for all threads, with acquire (compiles to a load)."""
    return tl.atomic_add(word, 0, sem="acquire", scope="sys")


@triton.jit
def _elements(bases, rank, offset, rows, stride_row, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr):
    region = tl.multiple_of(tl.cast(tl.load(bases + rank) + offset, tl.pointer_type(DTYPE)), 16)
    return region + (rows.to(tl.int64)[:, None] * stride_row + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _mask(present, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    return present[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
