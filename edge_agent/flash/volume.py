"""Random access to a card or an image, and reading past the operating system's cache.

Files, and disks where the system's block devices take any offset (Linux), are read and written as they are. Raw disks of
macOS and Windows take whole, aligned sectors alone; `SectorVolume` stands between.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from typing_extensions import Self

SECTOR_BYTES = 4096  # a multiple of every sector size in use; O_DIRECT wants aligned offsets, lengths and memory
CHUNK_BYTES = 4 * 1024 * 1024
_BLKFLSBUF = 0x1261  # linux/fs.h


class Reader(Protocol):
    """What is on the medium. `direct` is False where it may come from the system's cache."""

    direct: bool

    def read_at(self, offset: int, length: int) -> bytes: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Volume(Protocol):
    """A card or file that is open for writing. `size` in bytes."""

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int: ...

    def read_at(self, offset: int, length: int) -> bytes: ...

    def write_at(self, offset: int, content: bytes) -> None: ...

    def sync(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


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
        content = bytearray(length)
        view = memoryview(content)
        done = 0
        while done < length:
            count = read_into(self._descriptor, view[done:], offset + done)
            if not count:
                raise OSError(errno.EIO, f"the end came at byte {offset + done}", str(self.path))
            done += count
        return bytes(content)

    def write_at(self, offset: int, content: bytes) -> None:
        view = memoryview(content)
        while view:
            written = write_from(self._descriptor, view, offset)
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
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError:
            self._descriptor, self.direct = os.open(path, flags), False
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self._descriptor, fcntl.F_NOCACHE, 1)
        elif not hasattr(os, "O_DIRECT"):
            self.direct = False
        if not self.direct:
            self._drop_cache()
        self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
        self._memory = mmap.mmap(-1, CHUNK_BYTES + 2 * SECTOR_BYTES)  # page-aligned, as O_DIRECT wants it

    def _drop_cache(self) -> None:
        if hasattr(os, "posix_fadvise"):
            os.fsync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if self.path.is_block_device():
            import fcntl

            with suppress(PermissionError):  # root's alone
                fcntl.ioctl(self._descriptor, _BLKFLSBUF, 0)  # unlike the advice, this is obeyed

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
            count = read_into(self._descriptor, view, start)
            return bytes(view[offset - start : min(offset - start + length, count)])
        finally:
            view.release()


class SectorDevice(Protocol):
    """A raw disk: offsets, lengths and memory are aligned to `sector` bytes, or it refuses them."""

    @property
    def sector(self) -> int: ...

    @property
    def size(self) -> int: ...

    def read_into(self, view: memoryview, offset: int) -> int: ...

    def write_from(self, view: memoryview, offset: int) -> int: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class SectorVolume:
    """Any offset and length on a disk that takes whole sectors alone. Raw disks have no cache, so it reads past it."""

    direct = True

    def __init__(self, device: SectorDevice, path: Path) -> None:
        self.path = path
        self.size = device.size
        self._device = device
        self._memory = mmap.mmap(-1, CHUNK_BYTES + 2 * device.sector)  # page-aligned

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memory.close()
        self._device.close()

    def read_at(self, offset: int, length: int) -> bytes:
        """From anywhere; shorter only at the end."""
        content = bytearray()
        while len(content) < length and offset + len(content) < self.size:
            at = offset + len(content)
            start, end = self._sectors(at, min(length - len(content), CHUNK_BYTES))
            self._fill(start, end)
            content += self._memory[at - start : min(end, offset + length, self.size) - start]
        return bytes(content)

    def write_at(self, offset: int, content: bytes) -> None:
        """Anywhere; what else is in the first and the last sector stays."""
        done = 0
        while done < len(content):
            at, length = offset + done, min(len(content) - done, CHUNK_BYTES)
            start, end = self._sectors(at, length)
            if end > self.size:
                raise OSError(errno.ENOSPC, f"the disk ends at byte {self.size}", str(self.path))
            if (start, end) != (at, at + length):
                self._fill(start, end)
            self._memory[at - start : at - start + length] = content[done : done + length]
            self._move(self._device.write_from, start, end)
            done += length

    def sync(self) -> None:
        self._device.flush()

    def _sectors(self, offset: int, length: int) -> tuple[int, int]:
        sector = self._device.sector
        return offset // sector * sector, -(-(offset + length) // sector) * sector

    def _fill(self, start: int, end: int) -> None:
        self._move(self._device.read_into, start, min(end, self.size))

    def _move(self, step: _Step, start: int, end: int) -> None:
        with memoryview(self._memory) as memory:
            at = start
            while at < end:
                with memory[at - start : end - start] as view:
                    count = step(view, at)
                if count <= 0 or count % self._device.sector:
                    raise OSError(errno.EIO, f"{count} bytes went through at byte {at}", str(self.path))
                at += count


class _Step(Protocol):
    def __call__(self, view: memoryview, offset: int) -> int: ...


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Read from `offset`; how many bytes came. Windows has no preadv."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    content = os.read(descriptor, len(view))
    view[: len(content)] = content
    return len(content)


def write_from(descriptor: int, view: memoryview, offset: int) -> int:
    """Write at `offset`; how many bytes went."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.write(descriptor, view)
