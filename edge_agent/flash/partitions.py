"""Where the partitions of an image begin: MBR and GPT (UEFI specification 2.10, chapter 5)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from edge_agent.flash.errors import FlashError
from edge_agent.flash.fat import Volume

SECTOR = 512
_GPT_GUARD = 0xEE
_MAX_GPT_ENTRIES = 1024
_FAT_TYPES = {0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF}


@dataclass(frozen=True)
class Partition:
    """Bytes from the beginning of the image; `kind` is the MBR's type byte or the GPT's type GUID."""

    number: int
    start: int
    size: int
    kind: str


def read_partitions(volume: Volume) -> list[Partition]:
    """The primary partitions in the order of their numbers.

    Raises:
        FlashError: there is no partition table, or it contradicts itself.

    """
    first = volume.read_at(0, SECTOR)
    if first[510:512] != b"\x55\xaa":
        raise FlashError("this is no disk image: its first sector ends without the mark 55 AA; unpack an archive, or take the .img file")
    rows = [struct.unpack_from("<B3xB3xII", first, 446 + 16 * n) for n in range(4)]
    if any(kind == _GPT_GUARD for _, kind, _, _ in rows):
        return _read_gpt(volume)
    return [
        Partition(n, start * SECTOR, count * SECTOR, f"{kind:02x}")
        for n, (_, kind, start, count) in enumerate(rows, 1)
        if kind and count
    ]


def boot_partition(volume: Volume) -> Partition:
    """The partition that boards read on start: the first one, which must be FAT.

    Raises:
        FlashError: there is none.

    """
    partitions = read_partitions(volume)
    found = next((one for one in partitions if len(one.kind) > 2 or int(one.kind, 16) in _FAT_TYPES), None)
    if found is None:
        kinds = ", ".join(one.kind for one in partitions) or "none at all"
        raise FlashError(
            f"the image has no FAT boot partition (its partitions: {kinds}); boards that start from another kind of file system are set up with `edge-agent install`"
        )
    return found


def _read_gpt(volume: Volume) -> list[Partition]:
    header = volume.read_at(SECTOR, SECTOR)
    size, crc = struct.unpack_from("<II", header, 12)
    if header[:8] != b"EFI PART" or not 92 <= size <= SECTOR:
        raise FlashError("the image's GPT header is damaged; get the image again")
    if zlib.crc32(header[:16] + bytes(4) + header[20:size]) != crc:
        raise FlashError("the image's GPT header does not match its checksum; get the image again")
    first, count, entry_bytes = struct.unpack_from("<QII", header, 72)
    if entry_bytes not in (128, 256, 512) or count > _MAX_GPT_ENTRIES:
        raise FlashError(f"the image's GPT states {count} entries of {entry_bytes} bytes, which cannot be; get the image again")
    length = -(-count * entry_bytes // SECTOR) * SECTOR
    table = volume.read_at(first * SECTOR, length)
    partitions = []
    for n in range(count):
        kind = table[n * entry_bytes : n * entry_bytes + 16]
        start, end = struct.unpack_from("<QQ", table, n * entry_bytes + 32)
        if kind != bytes(16) and end >= start:
            partitions.append(Partition(n + 1, start * SECTOR, (end - start + 1) * SECTOR, _guid(kind)))
    return partitions


def _guid(raw: bytes) -> str:
    a, b, c = struct.unpack_from("<IHH", raw)
    return f"{a:08x}-{b:04x}-{c:04x}-{raw[8:10].hex()}-{raw[10:].hex()}"
