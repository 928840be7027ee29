"""A card or an image as it will be: what is put on it is held in memory, and what it holds itself is read."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from edge_agent.flash.errors import FlashError
from edge_agent.flash.partitions import SECTOR
from edge_agent.flash.volume import CHUNK_BYTES


class Overlay:
    """What `read_at` gives, with `first` in place of its beginning and with every sector that was written since."""

    def __init__(self, read_at: Callable[[int, int], bytes], first: bytes) -> None:
        self._read_at = read_at
        self._first = first
        self._sectors: dict[int, bytes] = {}

    def read_at(self, offset: int, length: int) -> bytes:
        pieces = [
            self._read_at(offset + n, min(CHUNK_BYTES, length - n)) for n in range(0, length, CHUNK_BYTES)
        ]
        content = bytearray(b"".join(pieces))
        if len(content) < length:
            raise OSError(errno.EIO, f"the end came at byte {offset + len(content)}")
        if offset < len(self._first):
            held = self._first[offset : offset + length]
            content[: len(held)] = held
        for at in range(offset, offset + length, SECTOR) if self._sectors else ():
            if (sector := self._sectors.get(at)) is not None:
                content[at - offset : at - offset + SECTOR] = sector
        return bytes(content)

    def write_at(self, offset: int, content: bytes) -> None:
        if offset < len(self._first):
            raise FlashError("the boot partition overlaps the partition table; this image is damaged")
        assert offset % SECTOR == 0
        assert len(content) % SECTOR == 0
        for n in range(0, len(content), SECTOR):
            self._sectors[offset + n] = content[n : n + SECTOR]

    def stretches(self) -> Iterator[tuple[int, bytes]]:
        """What was put on it, in ascending stretches of at most CHUNK_BYTES."""
        start, run = 0, list[bytes]()
        for at in sorted(self._sectors):
            if run and (at != start + len(run) * SECTOR or len(run) * SECTOR >= CHUNK_BYTES):
                yield start, b"".join(run)
                run = []
            if not run:
                start = at
            run.append(self._sectors[at])
        if run:
            yield start, b"".join(run)
