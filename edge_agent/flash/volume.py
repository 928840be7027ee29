"""Random access to a card or an image in whole sectors, and reading past the operating system's cache."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

SECTOR_BYTES = 4096  # a multiple of every sector size in use; O_DIRECT wants aligned offsets, lengths and memory
CHUNK_BYTES = 4 * 1024 * 1024


class FileVolume:
    """A file or block device opened for reading and writing; block devices exclusively, so that a mounted one fails."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        if path.is_block_device():
            flags |= os.O_EXCL  # Linux: fails with EBUSY while a file system on it is mounted
        self.path = path
        self._descriptor = os.open(path, flags)
        self.size = os.lseek(self._descriptor, 0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read_at(self, offset: int, length: int) -> bytes:
        content = bytearray()
        while len(content) < length:
            piece = os.pread(self._descriptor, length - len(content), offset + len(content))
            if not piece:
                raise OSError(5, f"the end came at byte {offset + len(content)}", str(self.path))
            content += piece
        return bytes(content)

    def write_at(self, offset: int, content: bytes) -> None:
        view = memoryview(content)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset += written
            view = view[written:]

    def sync(self) -> None:
        """Everything written so far is on the medium when this returns."""
        os.fsync(self._descriptor)


class UncachedReader:
    """Reads what is on the medium, not what the system remembers of it: O_DIRECT on Linux, F_NOCACHE on macOS.

    `direct` is False where the file system offers neither (tmpfs); then the cache was at least asked to let go.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.direct = True
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        try:
            self._descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError:
            self._descriptor, self.direct = os.open(path, flags), False
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self._descriptor, fcntl.F_NOCACHE, 1)
        elif not hasattr(os, "O_DIRECT"):
            self.direct = False
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.fsync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
        self._memory = mmap.mmap(-1, CHUNK_BYTES + 2 * SECTOR_BYTES)  # page-aligned, as O_DIRECT wants it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memory.close()
        os.close(self._descriptor)

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to CHUNK_BYTES from anywhere; shorter only at the end."""
        assert length <= CHUNK_BYTES
        start = offset - offset % SECTOR_BYTES
        wanted = -(-(offset + length - start) // SECTOR_BYTES) * SECTOR_BYTES
        view = memoryview(self._memory)[:wanted]
        try:
            count = os.preadv(self._descriptor, [view], start)
            return bytes(view[offset - start : min(offset - start + length, count)])
        finally:
            view.release()
