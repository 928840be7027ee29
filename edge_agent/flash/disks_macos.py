"""macOS: `diskutil` says all about disks and lets go of them; /dev/rdiskN is read and written past the cache.

Written after diskutil(8), `sys/disk.h` and what other programs read from its lists; it was never run on a Mac.
"""

from __future__ import annotations

import errno
import os
import plistlib
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent.flash.disks import Disk, Mount
from edge_agent.flash.errors import FlashError
from edge_agent.flash.volume import SectorVolume, read_into, write_from

RIGHTS = "run with sudo, and allow the terminal 'Removable Volumes' (System Settings, Privacy & Security, Files and Folders)"
_CARD_BUSES = ("USB", "Secure Digital")
_CONTAINERS = {"Apple_APFS": "an APFS container", "Apple_CoreStorage": "a CoreStorage volume", "Apple_RAID": "a part of a RAID"}
# sys/disk.h: _IOR('d', 24, uint32_t), _IOR('d', 25, uint64_t), _IO('d', 22)
_DKIOCGETBLOCKSIZE, _DKIOCGETBLOCKCOUNT, _DKIOCSYNCHRONIZECACHE = 0x40046418, 0x40086419, 0x20006416

# Arguments of diskutil -> its output, a property list.
Ask = Callable[[list[str]], bytes]


def list_disks(ask: Ask | None = None) -> list[Disk]:
    """Every whole disk, internal ones too: a MacBook's own card reader is one.

    Raises:
        FlashError: diskutil is missing, fails, or says something unknown.

    """
    ask = ask or _diskutil
    try:
        found = plistlib.loads(ask(["list", "-plist"]))["AllDisksAndPartitions"]
        # APFS shows its volumes as disks of their own; they belong to the disk that stores them.
        real = [row for row in found if not row.get("APFSPhysicalStores")]
        return [_disk(row, plistlib.loads(ask(["info", "-plist", row["DeviceIdentifier"]]))) for row in real]
    except (plistlib.InvalidFileException, KeyError, TypeError, ValueError) as error:
        raise FlashError(f"diskutil's list is not as expected ({error!r}), so nobody can tell which disks are safe; nothing is written") from error


def disk_name(target: Path) -> str | None:
    found = re.fullmatch(r"/dev/r?(disk\d+(?:s\d+)*)", str(target))
    return f"/dev/{found[1]}" if found else None


def raw_path(disk: str) -> str:
    """The character device of a disk: no cache, and many times as fast as the block device."""
    return disk.replace("/dev/disk", "/dev/rdisk", 1)


def open_volume(disk: str) -> SectorVolume:
    return SectorVolume(DescriptorDevice(os.open(raw_path(disk), os.O_RDWR | os.O_CLOEXEC)), Path(disk))


def open_reader(disk: str) -> SectorVolume:
    return SectorVolume(DescriptorDevice(os.open(raw_path(disk), os.O_RDONLY | os.O_CLOEXEC)), Path(disk))


def unmount(disk: Disk) -> None:
    try:
        _diskutil(["unmountDisk", disk.path])
    except FlashError as error:
        raise FlashError(f"{disk.path} cannot be unmounted; close what uses {', '.join(mount.place for mount in disk.mounts)}: {error}") from error


def eject(disk: str) -> str:
    try:
        _diskutil(["eject", disk])
    except FlashError as error:
        return f"{disk} is flushed but could not be ejected ({error}); eject it in the Finder."
    return f"{disk} is ejected; the card can be taken out."


class DescriptorDevice:
    """A raw disk by its descriptor; `sector` and `size` are asked from the driver unless given."""

    def __init__(self, descriptor: int, sector: int | None = None, size: int | None = None) -> None:
        self._descriptor = descriptor
        try:
            self._keep_uncached()
            self.sector = sector or struct.unpack("=I", self._ask(_DKIOCGETBLOCKSIZE, 4))[0]
            self.size = self.sector * struct.unpack("=Q", self._ask(_DKIOCGETBLOCKCOUNT, 8))[0] if size is None else size
        except BaseException:
            os.close(descriptor)
            raise

    def _keep_uncached(self) -> None:
        import fcntl

        if hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(self._descriptor, fcntl.F_NOCACHE, 1)

    def _ask(self, request: int, length: int) -> bytes:
        import fcntl

        return fcntl.ioctl(self._descriptor, request, bytes(length))

    def read_into(self, view: memoryview, offset: int) -> int:
        return read_into(self._descriptor, view, offset)

    def write_from(self, view: memoryview, offset: int) -> int:
        return write_from(self._descriptor, view, offset)

    def flush(self) -> None:
        try:
            self._ask(_DKIOCSYNCHRONIZECACHE, 0)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.ENOTSUP):  # a reader without a cache of its own
                raise

    def close(self) -> None:
        os.close(self._descriptor)


def _diskutil(arguments: list[str]) -> bytes:
    try:
        result = subprocess.run(["diskutil", *arguments], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise FlashError("diskutil is missing, so nobody can tell which disks are safe; nothing is written") from error
    if result.returncode:
        raise FlashError(f"diskutil {' '.join(arguments)} failed: {(result.stderr or result.stdout).decode('utf-8', 'replace').strip()}")
    return result.stdout


def _disk(row: dict[str, Any], about: dict[str, Any]) -> Disk:
    uses, mounts = list[str](), list[Mount]()
    for part in [row, *row.get("Partitions", [])]:
        name = f"/dev/{part['DeviceIdentifier']}"
        if what := _CONTAINERS.get(str(part.get("Content"))):
            uses.append(f"{name} holds {what}, as disks with somebody's data do")
        if (place := part.get("MountPoint")) and place.startswith("/Volumes/"):
            mounts.append(Mount(name, place))
        elif place:
            uses.append(f"{name} is mounted on {place}")
    if about.get("SystemImage") or about.get("OSInternalMedia"):
        uses.append(f"{about['DeviceNode']} belongs to macOS")
    bus = str(about.get("BusProtocol") or "")
    return Disk(
        path=str(about["DeviceNode"]),
        size=int(about.get("TotalSize") or about.get("Size") or 0),
        model=str(about.get("MediaName") or about.get("IORegistryEntryName") or "").strip(),
        transport=bus,
        removable=bool(about.get("RemovableMedia")) or (not about.get("Internal", True) and bus in _CARD_BUSES),
        read_only=not about.get("WritableMedia", about.get("Writable", False)),
        kind="disk" if about.get("VirtualOrPhysical") == "Physical" else str(about.get("VirtualOrPhysical", "unknown")).lower(),
        used_for=tuple(uses),
        mounts=tuple(mounts),
    )
