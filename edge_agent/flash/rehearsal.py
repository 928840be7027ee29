"""Tries the device's files on the image before a card is touched: is there a boot partition, does anything read them, do they fit?

An image is unpacked only as far as is looked at: its boot partition comes first, and that partition's tables and root
directory first in it, so that even a large packed image is told apart after a few megabytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edge_agent.flash.errors import FlashError
from edge_agent.flash.fat import FatPartition
from edge_agent.flash.images import ImageStream, open_image
from edge_agent.flash.overlay import Overlay
from edge_agent.flash.partitions import boot_partition

# Puts the device's files on the boot partition and returns what it wrote: path -> content.
Customise = Callable[[FatPartition], "dict[str, bytes]"]


class Preview:
    """The image's boot partition, to be tried on as often as one likes; nothing that is written there stays."""

    def __init__(self, stream: ImageStream, unpacked: IO[bytes]) -> None:
        self._stream = stream
        self._chunks = stream.chunks()
        self._unpacked = unpacked

    def rehearse(self, customise: Customise) -> None:
        """Do to a copy in memory what will be done to the card.

        Raises:
            FlashError: it cannot be done; the text says why.

        """
        image = Overlay(self._read_at, b"")
        try:
            customise(FatPartition(image, boot_partition(image).start))
        except OSError as error:
            path, size = self._stream.path, self._stream.size
            raise FlashError(
                f"image {path} ends after {size:,} bytes, within its boot partition; that is no image, or it is cut short"
            ) from error

    def _read_at(self, offset: int, length: int) -> bytes:
        while self._stream.size < offset + length and (chunk := next(self._chunks, None)) is not None:
            if chunk.count(0) < len(chunk):  # holes need no room
                self._unpacked.seek(self._stream.size - len(chunk))
                self._unpacked.write(chunk)
        self._unpacked.seek(offset)
        there = max(min(length, self._stream.size - offset), 0)
        return self._unpacked.read(there).ljust(there, b"\x00")


@contextmanager
def open_preview(image: Path) -> Iterator[Preview]:
    """Open an image for rehearsals.

    Raises:
        FlashError: it cannot be opened or is no image.

    """
    with open_image(image) as stream, tempfile.TemporaryFile() as unpacked:
        yield Preview(stream, unpacked)


def rehearse(image: Path, customise: Customise) -> None:
    """One rehearsal.

    Raises:
        FlashError: `customise` cannot be done to this image; the text says why.

    """
    with open_preview(image) as preview:
        preview.rehearse(customise)
