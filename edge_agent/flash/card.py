"""Writes an image to a card so that either all of it is there, checked, with the device's files, or the card does not boot.

Order: the device's files are tried on the image itself, so that one that cannot take them is refused with the card as it
was; the first block is blanked; everything but the first block is written, flushed and read back past the cache; the
device's files are put together in memory, written, and every sector of that read back too, then each file by itself; the
first block (with the partition table) is written last. Whatever interrupts it leaves a card without a partition table.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.flash.block_map import BlockMap, MappedChunks
from edge_agent.flash.disks import is_disk, open_reader, open_volume, this_system
from edge_agent.flash.errors import FlashError
from edge_agent.flash.fat import FatPartition
from edge_agent.flash.images import ImageStream, open_image
from edge_agent.flash.overlay import Overlay
from edge_agent.flash.partitions import boot_partition
from edge_agent.flash.rehearsal import Customise, rehearse
from edge_agent.flash.volume import Volume

FIRST_BLOCK_BYTES = 4096
UNBOOTABLE = "The card has no partition table now and does not boot; write it again."

# stage ("write" or "verify"), bytes done, bytes in all where known
Progress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True)
class Written:
    """What is on the card now."""

    image_size: int
    image_sha256: str
    written_bytes: int
    files: tuple[str, ...]
    read_past_cache: bool  # False: the target's file system offers no uncached reading


@dataclass(frozen=True)
class _Piece:
    """A stretch that was written, with a checksum to compare it by."""

    start: int
    length: int
    digest: bytes


def write_card(
    image: Path,
    target: Path,
    *,
    customise: Customise | None = None,
    block_map: BlockMap | None = None,
    expected_sha256: str | None = None,
    expected_size: int | None = None,
    progress: Progress = lambda *_: None,
) -> Written:
    """Write `image` to `target` (a disk that `disks.check_target` let through, or a file, which is made).

    Args:
        image: .img, .img.xz, .img.gz or .img.zst.
        target: overwritten from its beginning.
        customise: called with the image's boot partition in a rehearsal that writes nothing, then with the written card's.
        block_map: write only what it maps.
        expected_sha256: of the unpacked image, hexadecimal.
        expected_size: of the unpacked image, bytes.
        progress: told now and then.

    Raises:
        FlashError: the text says what went wrong and where, and whether the card still boots.

    """
    disk = is_disk(target)
    if not disk and image.exists() and target.exists() and target.samefile(image):
        raise FlashError(f"{target} is the image itself; give another --target")
    if customise:
        rehearse(image, customise)
    if not disk and not target.exists():
        target.touch()
    try:
        volume = open_volume(target)
    except OSError as error:
        raise FlashError(_open_words(target, error)) from error
    with volume, open_image(image) as stream:
        total = block_map.image_size if block_map else expected_size
        room = volume.size if disk else None
        if room is not None and total is not None and total > room:
            raise FlashError(f"{target} has {room:,} bytes, the image needs {total:,}; take a larger card")
        try:
            _blank(volume)
        except OSError as error:
            raise FlashError(f"{_trouble(target, error, 0)} Nothing but its first block can have changed.") from error
        try:
            first, pieces = _write_but_first(stream, volume, room=room, block_map=block_map, total=total, progress=progress)
            _check_stream(stream, block_map, expected_sha256, expected_size)
            if room is None:
                os.truncate(target, stream.size)  # a file ends where the image does, mapped or not
            volume.sync()
            past_cache = _verify(target, pieces, progress)
            files = _put_files(volume, target, first, customise) if customise else ()
            volume.write_at(0, first)
            volume.sync()
            _verify(target, [_Piece(0, len(first), _digest(first))], lambda *_: None)
        except BaseException as error:
            with suppress(OSError):
                _blank(volume)  # the partition table may be there already
            if isinstance(error, KeyboardInterrupt):
                raise FlashError(f"interrupted. {UNBOOTABLE}") from error
            if isinstance(error, OSError):
                raise FlashError(f"{_trouble(target, error, stream.size)} {UNBOOTABLE}") from error
            if isinstance(error, FlashError):
                raise FlashError(f"{error}. {UNBOOTABLE}") from error
            raise
        return Written(stream.size, stream.sha256, sum(piece.length for piece in pieces), files, past_cache)


def read_file(target: Path, path: str) -> bytes | None:
    """A file of the boot partition of what is in `target` now; None where there is no such file, or no such partition."""
    try:
        with open_reader(target) as reader:
            card = Overlay(reader.read_at, b"")
            return FatPartition(card, boot_partition(card).start).read(path)
    except (OSError, FlashError):
        return None


def _blank(volume: Volume) -> None:
    volume.write_at(0, bytes(FIRST_BLOCK_BYTES))
    volume.sync()


def _write_but_first(
    stream: ImageStream, volume: Volume, *, room: int | None, block_map: BlockMap | None, total: int | None, progress: Progress
) -> tuple[bytes, list[_Piece]]:
    """Everything but the first block, which is returned with what was written."""
    first, pieces = b"", list[_Piece]()
    mapped = MappedChunks(block_map) if block_map else None
    for position, chunk in _positions(stream):
        if room is not None and position + len(chunk) > room:
            raise FlashError(f"{volume.path} has {room:,} bytes and the image more; take a larger card")
        if position == 0:
            first = chunk[:FIRST_BLOCK_BYTES]
        for start, content in mapped.cut(position, chunk) if mapped else ((position, chunk),):
            late = max(FIRST_BLOCK_BYTES - start, 0)  # what of it belongs to the first block
            pieces.append(_write_piece(volume, start, bytes(min(late, len(content))) + content[late:]))
        progress("write", stream.size if total else stream.packed_read, total or stream.packed_size)
    if mapped:
        mapped.check()
    return first, pieces


def _positions(stream: ImageStream) -> Iterator[tuple[int, bytes]]:
    position = 0
    for chunk in stream.chunks():
        yield position, chunk
        position += len(chunk)


def _write_piece(volume: Volume, start: int, content: bytes) -> _Piece:
    volume.write_at(start, content)
    return _Piece(start, len(content), _digest(content))


def _check_stream(stream: ImageStream, block_map: BlockMap | None, expected_sha256: str | None, expected_size: int | None) -> None:
    if stream.size < FIRST_BLOCK_BYTES:
        raise FlashError(f"image {stream.path} has {stream.size} bytes; that is no image")
    stated = block_map.image_size if block_map else expected_size
    if stated is not None and stream.size != stated:
        raise FlashError(f"image {stream.path} unpacks to {stream.size:,} bytes, not the {stated:,} expected; download it again")
    if expected_sha256 is not None and stream.sha256 != expected_sha256.lower():
        raise FlashError(f"image {stream.path} has the sha256 {stream.sha256}, not {expected_sha256.lower()}; download it again")


def _verify(target: Path, pieces: list[_Piece], progress: Progress) -> bool:
    """Read everything back and compare; whether the reading went past the cache."""
    total = sum(piece.length for piece in pieces)
    done = 0
    with open_reader(target) as reader:
        for piece in pieces:
            content = reader.read_at(piece.start, piece.length)
            if _digest(content) != piece.digest:
                raise FlashError(
                    f"{target} does not give back what was written to bytes {piece.start:,} to {piece.start + piece.length:,}: "
                    f"the card or its reader is bad (a false capacity shows like this too)"
                )
            done += piece.length
            progress("verify", done, total)
        return reader.direct


def _put_files(volume: Volume, target: Path, first: bytes, customise: Customise) -> tuple[str, ...]:
    held = Overlay(volume.read_at, first)
    start = boot_partition(held).start
    written = customise(FatPartition(held, start))
    pieces = [_write_piece(volume, offset, content) for offset, content in held.stretches()]
    volume.sync()
    _verify(target, pieces, lambda *_: None)
    with open_reader(target) as reader:
        again = FatPartition(Overlay(reader.read_at, first), start)
        for path, content in written.items():
            if again.read(path) != content:
                raise FlashError(f"{path} on the boot partition does not read back as it was written; the card is bad")
    return tuple(written)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _open_words(target: Path, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return f"{target} is in use (mounted, or another program writes to it); unmount it and close other flashing programs"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{target} cannot be opened for writing: {error.strerror}; {this_system().RIGHTS if is_disk(target) else 'choose another file'}"
    if error.errno == errno.EROFS:
        return f"{target} is read-only; is the card's lock slid down?"
    if error.errno in (errno.ENOMEDIUM if hasattr(errno, "ENOMEDIUM") else -1, errno.ENXIO, errno.ENODEV):
        return f"there is no card in {target}"
    return f"{target} cannot be opened: {error.strerror}"


def _trouble(target: Path, error: OSError, position: int) -> str:
    if error.errno == errno.ENOSPC:
        return f"{target} is full near byte {position:,}; take a larger card, or free the disk."
    if error.errno in (errno.EROFS, errno.EPERM):
        return f"{target} is read-only ({error.strerror}); is the card's lock slid down?"
    if error.errno in (errno.ENODEV, errno.ENXIO, errno.EIO):
        return f"{target} vanished or failed near byte {position:,} ({error.strerror}); was the card pulled out?"
    return f"{target} cannot be written near byte {position:,}: {error.strerror}."

