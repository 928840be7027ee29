"""Block maps (.bmap, format 1.4 and 2.0): which blocks of an image hold anything, with a checksum for each run of them."""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edge_agent.flash.errors import FlashError

MAX_BMAP_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Range:
    """Bytes `start` to `end` (exclusive) of the image are to be written; `sha256` is theirs, where the map states it."""

    start: int
    end: int
    sha256: str | None = None


@dataclass(frozen=True)
class BlockMap:
    """What a .bmap file says. `ranges` ascend and do not overlap."""

    image_size: int
    ranges: tuple[Range, ...]

    @property
    def mapped_bytes(self) -> int:
        return sum(one.end - one.start for one in self.ranges)


class MappedChunks:
    """Cuts an image's chunks down to what a map names, and checks each range against the map's checksum as it passes."""

    def __init__(self, block_map: BlockMap) -> None:
        self._map = block_map
        self._sums = [hashlib.sha256() for _ in block_map.ranges]

    def cut(self, position: int, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """(offset, content) of the stretches of this chunk that are to be written."""
        for one, sha256 in zip(self._map.ranges, self._sums, strict=True):
            start, end = max(one.start, position), min(one.end, position + len(chunk))
            if start < end:
                content = chunk[start - position : end - position]
                sha256.update(content)
                yield start, content

    def check(self) -> None:
        """Every range has passed.

        Raises:
            FlashError: one is not what the map says.

        """
        for one, sha256 in zip(self._map.ranges, self._sums, strict=True):
            if one.sha256 and sha256.hexdigest() != one.sha256.lower():
                raise FlashError(f"the image's bytes {one.start:,} to {one.end:,} do not match the block map; get both again")


def block_map_beside(image: Path) -> Path | None:
    """The map that stands beside an image, as bmaptool and Yocto name it: x.img.bmap, x.bmap for x.img.xz too."""
    name = image.name
    for suffix in (".xz", ".gz", ".zst"):
        name = name.removesuffix(suffix)
    candidates = [image.with_name(f"{image.name}.bmap"), image.with_name(f"{name}.bmap"), image.with_name(f"{name.removesuffix('.img')}.bmap")]
    return next((path for path in candidates if path.is_file()), None)


def read_block_map(path: Path) -> BlockMap:
    """Read and check a map, its own checksum included.

    Raises:
        FlashError: it cannot be read, is of another version, or contradicts itself.

    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FlashError(f"block map {path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BMAP_BYTES or b"<!ENTITY" in content:
        raise FlashError(f"block map {path} is no block map; remove it to write the whole image")
    try:
        root = ET.fromstring(content)  # noqa: S314 - no entities, see above
        version = root.attrib["version"]
        if version.split(".")[0] not in ("1", "2"):
            raise FlashError(f"block map {path} has version {version}; known are 1 and 2. Remove it to write the whole image")
        size, block = int(_text(root, "ImageSize")), int(_text(root, "BlockSize"))
        ranges = tuple(_range(node, block, size) for node in root.iterfind("BlockMap/Range"))
        own = root.findtext("BmapFileChecksum", root.findtext("BmapFileSHA1", "")).strip()
        algorithm = root.findtext("ChecksumType", "sha1").strip()
    except (ET.ParseError, KeyError, ValueError) as error:
        raise FlashError(f"block map {path} is damaged ({error}); get it again, or remove it to write the whole image") from error
    if own and algorithm in hashlib.algorithms_available:
        blank = content.replace(own.encode(), b"0" * len(own), 1)
        if hashlib.new(algorithm, blank).hexdigest() != own:
            raise FlashError(f"block map {path} does not match its own checksum; get it again, or remove it to write the whole image")
    if any(a.end > b.start for a, b in pairwise(ranges)) or not ranges:
        raise FlashError(f"block map {path} names no block, or one twice; remove it to write the whole image")
    if algorithm != "sha256":
        ranges = tuple(Range(one.start, one.end) for one in ranges)
    return BlockMap(size, ranges)


def _text(root: ET.Element, name: str) -> str:
    text = root.findtext(name)
    if text is None:
        raise ValueError(f"{name} is missing")
    return text.strip()


def _range(node: ET.Element, block: int, size: int) -> Range:
    first, _, last = (node.text or "").strip().partition("-")
    start, end = int(first) * block, (int(last or first) + 1) * block
    if not 0 <= start < end or start >= size:
        raise ValueError(f"range {node.text!r}")
    return Range(start, min(end, size), node.attrib.get("chksum") or node.attrib.get("sha1"))
