"""One run at a time writes into a folder. The lock is the kernel's: it goes with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flashcp.train.ranks import Ranks

LOCK = "lock"
PATIENCE_S = 1.0  # `check_free` holds the lock for a moment


def check_free(out: Path) -> None:
    """Raise ValueError, naming the process, while a run writes into `out`. Makes no file."""
    if (out / LOCK).is_file():
        with suppress(FileNotFoundError):  # it ended just now
            os.close(_locked(out, create=False))


@contextmanager
def only_writer(out: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other runs from `out` meanwhile; the folder is made. Every rank must call it.

    Raises ValueError on every rank, naming the process, when a run writes there already.
    """
    file, trouble = -1, ""
    if ranks.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = _locked(out, PATIENCE_S)
        except ValueError as error:
            trouble = str(error)
        except OSError as error:
            trouble = f"out={str(out)!r}: cannot be written ({error.strerror})"
    try:
        if trouble := ranks.gather(trouble)[0]:
            raise ValueError(trouble)
        if ranks.rank == 0:
            os.ftruncate(file, 0)  # what a dead process left
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if file >= 0:
            (out / LOCK).unlink(missing_ok=True)
            os.close(file)


def _locked(out: Path, patience_s: float = 0.0, create: bool = True) -> int:
    """The open lock file of `out`, locked."""
    place, deadline = out / LOCK, time.monotonic() + patience_s
    while True:
        file = os.open(place, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), place.stat()):
                return file
            os.close(file)
        except FileNotFoundError:  # its holder ended just now
            os.close(file)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another run"
            os.close(file)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"out={str(out)!r}: {holder} writes there; wait for its end, or choose another out"
                ) from None
            time.sleep(0.05)
        except OSError as error:
            print(f"out={str(out)!r}: this file system does not lock ({error.strerror})", file=sys.stderr)
            return file
