"""Files that a user names, read within bounds: a device, a pipe or a file without end takes neither time nor memory."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from flashcp.sharding.values import shown

MIB = 1 << 20


def read_path(text: str | Path, field: str) -> Path:
    """A path that a user wrote, `~` being home. Raises ValueError, naming the field, for one that no file can have."""
    try:
        path = Path(text).expanduser()
        path.lstat()
    except (RuntimeError, ValueError) as error:  # a user that there is not, a null byte
        raise ValueError(f"{field}={shown(str(text))}: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{field}={shown(str(text))}: {error.strerror}") from error
    return path


def check_regular(file: Path, label: str) -> None:
    """Raise ValueError, beginning with `label`, for what is no regular file or cannot be looked at."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ValueError(f"{label}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"{label}: {kind.get(stat.S_IFMT(mode), 'a device')}, expected a file")


def read_bounded(file: Path, label: str, most_mib: int) -> bytes:
    """The bytes of a regular file. Raises ValueError, beginning with `label`, for one that cannot be read, and for one
    of more than so many MiB."""
    check_regular(file, label)
    try:
        with file.open("rb") as opened:
            content = opened.read(most_mib * MIB + 1)
    except OSError as error:
        raise ValueError(f"{label}: cannot be read ({error.strerror})") from error
    if len(content) > most_mib * MIB:
        raise ValueError(f"{label}: more than {most_mib} MiB")
    return content
