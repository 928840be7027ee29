"""Files that readers never see half-written, one that only one program can hold, and what helps where a file fails."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write beside `path`, sync, rename over it, sync the folder: after a crash the old or the new content is there.

    With `mode` the file has just these rights (0o600: this user alone), from its first byte on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    with open(beside, "wb", opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else mode)) as file:
        if mode is not None:  # the umask may have narrowed it, a file left by a crash may be wider
            os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was renamed into `folder` is still there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(path: Path, refusal: Exception) -> Iterator[None]:
    """Hold the lock file `path`, or raise `refusal` if another program does; the kernel lets go when that one dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        yield


def file_trouble(error: OSError) -> str:
    """What a person can do about a file that cannot be read or written; empty for other failures of the system."""
    cures = {
        errno.ENOSPC: "free some space on the disk of data_directory",
        errno.EDQUOT: "free some space within this user's quota",
        errno.EROFS: "mount the disk for writing",
        errno.EACCES: "make it accessible to this user",
        errno.EPERM: "make it accessible to this user",
        errno.ENOENT: "correct the path, or make the folder",
        errno.ENOTDIR: "correct the path: a file stands where a folder should be",
    }
    if error.errno not in cures:
        return ""
    return f"{error.filename or 'a file of data_directory'}: {error.strerror}; {cures[error.errno]}"
