"""Reads and writes files on a FAT16 or FAT32 partition inside an image or on a card, without mounting it and without root.

After Microsoft's "FAT: General Overview of On-Disk Format" 1.03. Long names are written as VFAT entries. Every access is
whole sectors, so that it works on a raw block device. Order of writes: data, both tables, then the directory entry; the
old chain is freed last. It is not safe against power loss in between: a card that lost power while being made is made anew.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from edge_agent.flash.errors import FlashError

MAX_FAT_BYTES = 64 * 1024 * 1024  # a FAT32 table of a terabyte card; more is damage
MAX_FILE_BYTES = 64 * 1024 * 1024
_ENTRY = 32
_END = 0x0FFFFFFF
_DIRECTORY, _VOLUME_LABEL, _LONG_NAME, _ARCHIVE = 0x10, 0x08, 0x0F, 0x20
_FREE, _LAST = 0xE5, 0x00
_ALLOWED_SHORT = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")


class Volume(Protocol):
    """Random access to the bytes of a card or an image; offsets and lengths are whole sectors."""

    def read_at(self, offset: int, length: int) -> bytes: ...

    def write_at(self, offset: int, content: bytes) -> None: ...


@dataclass(frozen=True)
class _Entry:
    name: str
    short: bytes  # 11 bytes as on disk
    attributes: int
    case: int  # Windows NT's flags: stem, extension are lower case
    cluster: int
    size: int
    first_slot: int  # where its long name begins
    slot: int

    @property
    def is_directory(self) -> bool:
        return bool(self.attributes & _DIRECTORY)


class FatPartition:
    """The files of one FAT partition. Paths have `/` between names; names are compared without regard to case."""

    def __init__(self, volume: Volume, offset: int) -> None:
        """Read the partition that begins `offset` bytes into `volume`.

        Raises:
            FlashError: it is no FAT16 or FAT32, or its figures contradict one another.

        """
        self._volume = volume
        self._offset = offset
        boot = volume.read_at(offset, 512)
        self._sector = int.from_bytes(boot[11:13], "little")
        spc, reserved, fats = boot[13], int.from_bytes(boot[14:16], "little"), boot[16]
        root_entries, total16, fat16 = struct.unpack_from("<HHxH", boot, 17)
        total32, fat32 = struct.unpack_from("<II", boot, 32)
        if boot[510:512] != b"\x55\xaa" or self._sector not in (512, 1024, 2048, 4096) or spc == 0 or spc & (spc - 1) or not reserved or fats not in (1, 2):
            raise FlashError(f"the partition at byte {offset} holds no FAT file system; is this an image for a Raspberry Pi or similar board?")
        sectors, self._fat_sectors = total16 or total32, fat16 or fat32
        root_sectors = -(-root_entries * _ENTRY // self._sector)
        data_start = reserved + fats * self._fat_sectors + root_sectors
        self._clusters = (sectors - data_start) // spc if sectors > data_start else 0
        if self._clusters < 4085:
            raise FlashError(f"the FAT partition at byte {offset} has {self._clusters} clusters; FAT16 has at least 4085, and FAT12 is not used for booting")
        self._wide = self._clusters >= 65_525
        fat_bytes = self._fat_sectors * self._sector
        if fat_bytes > MAX_FAT_BYTES or fat_bytes < (self._clusters + 2) * (4 if self._wide else 2):
            raise FlashError(f"the FAT partition at byte {offset} is damaged: a table of {fat_bytes} bytes for {self._clusters} clusters")
        self._cluster_bytes = spc * self._sector
        self._fat_starts = [reserved + n * self._fat_sectors for n in range(fats)]
        self._root_start, self._root_sectors = reserved + fats * self._fat_sectors, root_sectors
        self._data_start = data_start
        self._root_cluster = struct.unpack_from("<I", boot, 44)[0] if self._wide else 0
        self._info_sector = struct.unpack_from("<H", boot, 48)[0] if self._wide else 0
        raw = self._read_sectors(reserved, self._fat_sectors)
        count = self._clusters + 2
        self._table = list(struct.unpack_from(f"<{count}{'I' if self._wide else 'H'}", raw))
        self._table_tail = raw[count * (4 if self._wide else 2) :]

    # Files.

    def names(self, directory: str = "") -> list[str]:
        """Names in a directory, as they stand there."""
        return [entry.name for entry in self._entries(self._open_directory(directory))]

    @property
    def free_bytes(self) -> int:
        return sum(self._table[n] & 0x0FFFFFFF == 0 for n in range(2, self._clusters + 2)) * self._cluster_bytes

    def exists(self, path: str) -> bool:
        try:
            self._find(path)
        except FileNotFoundError:
            return False
        return True

    def read(self, path: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: there is none.
            FlashError: it is larger than MAX_FILE_BYTES, or its chain is broken.

        """
        entry = self._find(path)
        if entry.is_directory:
            raise FlashError(f"{path} on the boot partition is a directory")
        if entry.size > MAX_FILE_BYTES:
            raise FlashError(f"{path} on the boot partition has {entry.size} bytes; the limit is {MAX_FILE_BYTES}")
        return self._read_chain(entry.cluster, entry.size)

    def write(self, path: str, content: bytes, now: datetime) -> None:
        """Create or replace a file; directories on the way are made.

        Raises:
            FlashError: no room, or a name that FAT cannot hold.

        """
        *parents, name = _names(path)
        directory = self._make_directories(parents, now)
        old = next((entry for entry in self._entries(directory) if entry.name.lower() == name.lower()), None)
        if old is not None and old.is_directory:
            raise FlashError(f"{path} on the boot partition is a directory; a file cannot take its place")
        cluster = self._write_chain(content)
        if old is not None:
            raw = bytearray(self._read_directory(directory))
            entry = _entry_bytes(old.short, old.attributes, cluster, len(content), now, case=old.case)
            raw[old.slot * _ENTRY : (old.slot + 1) * _ENTRY] = entry
            self._write_directory(directory, bytes(raw))
            self._free(old.cluster)
        else:
            self._add_entry(directory, name, _ARCHIVE, cluster=cluster, size=len(content), now=now)
        self._write_tables()

    def remove(self, path: str) -> None:
        """Delete a file and overwrite its content with zeros."""
        *parents, _ = _names(path)
        entry = self._find(path)
        if entry.is_directory:
            raise FlashError(f"{path} on the boot partition is a directory")
        for cluster in self._chain(entry.cluster):
            self._write_cluster(cluster, bytes(self._cluster_bytes))
        directory = self._open_directory("/".join(parents))
        raw = bytearray(self._read_directory(directory))
        for slot in range(entry.first_slot, entry.slot + 1):
            raw[slot * _ENTRY] = _FREE
        self._write_directory(directory, bytes(raw))
        self._free(entry.cluster)
        self._write_tables()

    # Directories. A directory is known by its first cluster; 0 is the root of FAT16.

    def _root(self) -> int:
        return self._root_cluster

    def _open_directory(self, path: str) -> int:
        cluster = self._root()
        for name in _names(path) if path.strip("/") else []:
            entry = next((entry for entry in self._entries(cluster) if entry.name.lower() == name.lower()), None)
            if entry is None or not entry.is_directory:
                raise FileNotFoundError(path)
            cluster = entry.cluster
        return cluster

    def _find(self, path: str) -> _Entry:
        *parents, name = _names(path)
        for entry in self._entries(self._open_directory("/".join(parents))):
            if entry.name.lower() == name.lower():
                return entry
        raise FileNotFoundError(path)

    def _make_directories(self, parents: list[str], now: datetime) -> int:
        cluster = self._root()
        for name in parents:
            entry = next((entry for entry in self._entries(cluster) if entry.name.lower() == name.lower()), None)
            if entry is None:
                made = self._write_chain(bytes(self._cluster_bytes))
                parent = 0 if cluster == self._root() else cluster
                dots = _entry_bytes(b".          ", _DIRECTORY, made, 0, now) + _entry_bytes(b"..         ", _DIRECTORY, parent, 0, now)
                self._write_cluster(made, dots + bytes(self._cluster_bytes - len(dots)))
                self._add_entry(cluster, name, _DIRECTORY, cluster=made, size=0, now=now)
                cluster = made
            elif entry.is_directory:
                cluster = entry.cluster
            else:
                raise FlashError(f"{name} on the boot partition is a file; a directory cannot take its place")
        return cluster

    def _entries(self, directory: int) -> Iterator[_Entry]:
        raw = self._read_directory(directory)
        long_name: list[bytes] = []
        first = 0
        checksum = -1
        for slot in range(len(raw) // _ENTRY):
            item = raw[slot * _ENTRY : (slot + 1) * _ENTRY]
            if item[0] == _LAST:
                return
            if item[0] == _FREE:
                long_name = []
                continue
            if item[11] == _LONG_NAME:
                if item[0] & 0x40:
                    long_name, first, checksum = [], slot, item[13]
                long_name.insert(0, item[1:11] + item[14:26] + item[28:32])
                continue
            if not item[11] & _VOLUME_LABEL:
                whole = long_name and checksum == _checksum(item[:11])
                name = _long_text(b"".join(long_name)) if whole else _short_text(item)
                if name not in (".", ".."):
                    cluster = int.from_bytes(item[26:28], "little") | (int.from_bytes(item[20:22], "little") << 16 if self._wide else 0)
                    yield _Entry(name, item[:11], item[11], item[12], cluster, int.from_bytes(item[28:32], "little"), first if whole else slot, slot)
            long_name = []

    def _read_directory(self, directory: int) -> bytes:
        if directory == 0:
            return self._read_sectors(self._root_start, self._root_sectors)
        return self._read_chain(directory, None)

    def _write_directory(self, directory: int, raw: bytes) -> None:
        if directory == 0:
            self._write_sectors(self._root_start, raw)
            return
        for number, cluster in enumerate(self._chain(directory)):
            self._write_cluster(cluster, raw[number * self._cluster_bytes : (number + 1) * self._cluster_bytes])

    def _add_entry(self, directory: int, name: str, attributes: int, *, cluster: int, size: int, now: datetime) -> None:
        taken = {entry.short for entry in self._entries(directory)}
        short, needs_long = _short_name(name, taken)
        items = (_long_entries(name, short) if needs_long else []) + [_entry_bytes(short, attributes, cluster, size, now)]
        raw = bytearray(self._read_directory(directory))
        used = next((n for n in range(0, len(raw), _ENTRY) if raw[n] == _LAST), len(raw))
        raw[used:] = bytes(len(raw) - used)  # nothing counts beyond the end mark, whatever stands there
        while (start := _free_run(raw, len(items))) is None:
            if directory == 0:
                raise FlashError("the root directory of the boot partition is full; use another image")
            self._table[self._chain(directory)[-1]] = self._write_chain(bytes(self._cluster_bytes))
            raw += bytes(self._cluster_bytes)
        raw[start * _ENTRY : (start + len(items)) * _ENTRY] = b"".join(items)
        self._write_tables()
        self._write_directory(directory, bytes(raw))

    # Chains of clusters.

    def _chain(self, cluster: int) -> list[int]:
        chain: list[int] = []
        end = 0x0FFFFFF8 if self._wide else 0xFFF8
        while cluster and (value := cluster & 0x0FFFFFFF) < end:
            if not 2 <= value < self._clusters + 2 or len(chain) > self._clusters:
                raise FlashError(f"the boot partition is damaged: its table leads to cluster {value}; write the image again")
            chain.append(value)
            cluster = self._table[value]
        return chain

    def _read_chain(self, cluster: int, size: int | None) -> bytes:
        chain = self._chain(cluster)
        if size is not None and len(chain) * self._cluster_bytes < size:
            raise FlashError("the boot partition is damaged: a file is shorter than its directory says; write the image again")
        if size is None and len(chain) * self._cluster_bytes > MAX_FILE_BYTES:
            raise FlashError("the boot partition is damaged: a directory is larger than any can be; write the image again")
        content = b"".join(self._read_sectors(self._first_sector(n), self._cluster_bytes // self._sector) for n in chain)
        return content if size is None else content[:size]

    def _write_chain(self, content: bytes) -> int:
        """Put `content` into free clusters (the tables stay in memory); the first of them, 0 for no content."""
        needed = -(-len(content) // self._cluster_bytes)
        free = [n for n in range(2, self._clusters + 2) if self._table[n] & 0x0FFFFFFF == 0][:needed]
        if len(free) < needed:
            raise FlashError(f"the boot partition has no room for {len(content)} bytes more; use an image with a larger one")
        for number, cluster in enumerate(free):
            piece = content[number * self._cluster_bytes : (number + 1) * self._cluster_bytes]
            self._write_cluster(cluster, piece + bytes(self._cluster_bytes - len(piece)))
            follower = free[number + 1] if number + 1 < needed else (_END if self._wide else 0xFFFF)
            self._table[cluster] = (self._table[cluster] & 0xF0000000) | follower if self._wide else follower
        return free[0] if free else 0

    def _free(self, cluster: int) -> None:
        for one in self._chain(cluster):
            self._table[one] &= 0xF0000000 if self._wide else 0

    def _write_tables(self) -> None:
        raw = struct.pack(f"<{len(self._table)}{'I' if self._wide else 'H'}", *self._table) + self._table_tail
        for start in self._fat_starts:
            self._write_sectors(start, raw)
        if self._info_sector not in (0, 0xFFFF):
            info = bytearray(self._read_sectors(self._info_sector, 1))
            if info[:4] == b"RRaA" and info[484:488] == b"rrAa":
                free = [n for n in range(2, self._clusters + 2) if self._table[n] & 0x0FFFFFFF == 0]
                struct.pack_into("<II", info, 488, len(free), free[0] if free else 0xFFFFFFFF)
                self._write_sectors(self._info_sector, bytes(info))

    def _first_sector(self, cluster: int) -> int:
        return self._data_start + (cluster - 2) * (self._cluster_bytes // self._sector)

    def _write_cluster(self, cluster: int, content: bytes) -> None:
        self._write_sectors(self._first_sector(cluster), content)

    def _read_sectors(self, first: int, count: int) -> bytes:
        return self._volume.read_at(self._offset + first * self._sector, count * self._sector)

    def _write_sectors(self, first: int, content: bytes) -> None:
        self._volume.write_at(self._offset + first * self._sector, content)


def _free_run(raw: bytes | bytearray, length: int) -> int | None:
    """The first slot of `length` free ones in a row."""
    run = 0
    for slot in range(len(raw) // _ENTRY):
        run = run + 1 if raw[slot * _ENTRY] in (_FREE, _LAST) else 0
        if run == length:
            return slot - length + 1
    return None


# Names.


def _names(path: str) -> list[str]:
    names = path.strip("/").split("/")
    for name in names:
        if not name or len(name) > 255 or name != name.rstrip(" .") or any(c in '\\:*?"<>|' or c < " " for c in name):
            raise FlashError(f"{path!r} is no name for a file on a FAT partition")
    return names


def _short_name(name: str, taken: set[bytes]) -> tuple[bytes, bool]:
    """The 8.3 name as 11 bytes, unlike all in `taken`, and whether a long name must go with it."""
    stem, dot, extension = name.rpartition(".") if "." in name.lstrip(".") else (name, "", "")
    exact = name == name.upper() and 0 < len(stem) <= 8 and len(extension) <= 3 and set(stem + extension) <= _ALLOWED_SHORT and (not dot or extension)
    plain = (stem.ljust(8) + extension.ljust(3)).encode("ascii") if exact else b""
    if exact and plain not in taken:
        return plain, False
    base = "".join(c if c in _ALLOWED_SHORT else "_" for c in stem.upper() if c not in " .") or "_"
    end = "".join(c if c in _ALLOWED_SHORT else "_" for c in extension.upper() if c not in " .")[:3].ljust(3)
    for number in range(1, 1_000_000):
        tail = f"~{number}"
        short = (base[: 8 - len(tail)] + tail).ljust(8).encode("ascii") + end.encode("ascii")
        if short not in taken:
            return short, True
    raise FlashError(f"no short name is left for {name!r} on the boot partition")


def _checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = ((total & 1) << 7 | total >> 1) + byte & 0xFF
    return total


def _long_entries(name: str, short: bytes) -> list[bytes]:
    units = name.encode("utf-16-le")
    count = -(-len(units) // 26)
    units += b"\x00\x00" if len(units) < count * 26 else b""
    units = units.ljust(count * 26, b"\xff")
    items = []
    for number in range(count, 0, -1):
        piece = units[(number - 1) * 26 : number * 26]
        order = number | (0x40 if number == count else 0)
        items.append(bytes([order]) + piece[:10] + bytes([_LONG_NAME, 0, _checksum(short)]) + piece[10:22] + b"\x00\x00" + piece[22:26])
    return items


def _long_text(units: bytes) -> str:
    return units.decode("utf-16-le", errors="replace").split("\x00", 1)[0]


def _short_text(item: bytes) -> str:
    stem, extension = item[:8].decode("cp437").rstrip(), item[8:11].decode("cp437").rstrip()
    # Windows NT keeps "all lower case" of stem and extension as two flags instead of a long name.
    stem = stem.lower() if item[12] & 0x08 else stem
    extension = extension.lower() if item[12] & 0x10 else extension
    return f"{stem}.{extension}" if extension else stem


def _entry_bytes(short: bytes, attributes: int, cluster: int, size: int, now: datetime, *, case: int = 0) -> bytes:
    day = (max(now.year - 1980, 0) << 9) | (now.month << 5) | now.day
    moment = (now.hour << 11) | (now.minute << 5) | (now.second // 2)
    high, low = cluster >> 16 & 0x0FFF, cluster & 0xFFFF
    return short + struct.pack("<BBBHHHHHHHI", attributes, case, 0, moment, day, day, high, moment, day, low, size)
