r"""Windows: PowerShell says all about disks; \\.\PhysicalDriveN is read and written past the cache, its volumes locked meanwhile.

Written after Microsoft's documentation (MSFT_Disk, MSFT_Partition, CreateFileW, winioctl.h); it was never run on Windows.
"""

from __future__ import annotations

import ctypes
import errno
import json
import re
import struct
import subprocess
from ctypes import wintypes
from pathlib import Path
from typing import Any

from edge_agent.flash.disks import Disk, Mount
from edge_agent.flash.errors import FlashError
from edge_agent.flash.volume import SectorVolume

RIGHTS = "run this in a terminal that was opened as administrator"
LISTING = (
    "[Console]::OutputEncoding = [Text.Encoding]::UTF8; "
    "@{disks = @(Get-Disk | Select-Object Number, FriendlyName, Size, BusType, IsBoot, IsSystem, IsReadOnly, IsClustered); "
    "partitions = @(Get-Partition -ErrorAction SilentlyContinue | Select-Object DiskNumber, PartitionNumber, AccessPaths, IsBoot, IsSystem)} "
    "| ConvertTo-Json -Depth 4 -Compress"
)
# MSFT_Disk's BusType, which PowerShell shows by name.
_BUSES = {7: "USB", 12: "SD", 13: "MMC", 15: "File Backed Virtual", 16: "Spaces", 17: "NVMe"}
_CARD_BUSES = ("USB", "SD", "MMC")
_NO_DISKS = ("File Backed Virtual", "Spaces", "Storage Spaces", "iSCSI")

# CreateFileW
_READ, _WRITE, _SHARED, _EXISTING = 0x80000000, 0x40000000, 0x3, 3
_NO_BUFFERING, _WRITE_THROUGH = 0x20000000, 0x80000000
_INVALID = ctypes.c_void_p(-1).value


def control_code(device: int, function: int, access: int) -> int:
    """winioctl.h's CTL_CODE with METHOD_BUFFERED."""
    return device << 16 | access << 14 | function << 2


LOCK_VOLUME, DISMOUNT_VOLUME = control_code(9, 6, 0), control_code(9, 8, 0)
GET_GEOMETRY, GET_LENGTH, UPDATE_PROPERTIES = control_code(7, 0, 0), control_code(7, 0x17, 1), control_code(7, 0x50, 0)
EJECT_MEDIA = control_code(0x2D, 0x202, 1)


def list_disks(listing: str | None = None) -> list[Disk]:
    """Every whole disk, from PowerShell or from a `listing` of it.

    Raises:
        FlashError: PowerShell is missing, fails, or says something unknown.

    """
    try:
        found = json.loads(_powershell() if listing is None else listing)
        return [_disk(row, [part for part in found["partitions"] if part["DiskNumber"] == row["Number"]]) for row in found["disks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FlashError(f"PowerShell's list of disks is not as expected ({error!r}), so nobody can tell which are safe; nothing is written") from error


def disk_name(target: Path) -> str | None:
    # A Path may have put a backslash behind it.
    found = re.fullmatch(r"[\\/]{2}[.?][\\/]PhysicalDrive(\d{1,4})[\\/]?", str(target), re.IGNORECASE)
    return rf"\\.\PhysicalDrive{int(found[1])}" if found else None


def open_volume(disk: str) -> SectorVolume:
    # Windows writes to no sector of a mounted volume, so all of them are taken away until this is closed.
    locks = [_Lock(volume) for volume in _volumes(disk)]
    try:
        return SectorVolume(_Drive(disk, writing=True, locks=locks), Path(disk))
    except BaseException:
        for lock in locks:
            lock.close()
        raise


def open_reader(disk: str) -> SectorVolume:
    return SectorVolume(_Drive(disk, writing=False, locks=[]), Path(disk))


def unmount(_: Disk) -> None:
    """Done when the disk is opened, since Windows would mount it again at once."""


def eject(disk: str) -> str:
    try:
        locks = [_Lock(volume) for volume in _volumes(disk)]
        try:
            drive = _Drive(disk, writing=False, locks=locks)
            drive.control(EJECT_MEDIA)
            drive.close()
        finally:
            for lock in locks:
                lock.close()
    except (OSError, FlashError) as error:
        return f"{disk} is flushed but could not be ejected ({error}); use 'Safely Remove Hardware' before it is taken out."
    return f"{disk} is ejected; the card can be taken out."


class _Handle:
    """An open file of Windows', past its cache."""

    def __init__(self, path: str, access: int, flags: int) -> None:
        self._kernel = _kernel32()
        self._handle = self._kernel.CreateFileW(path, access, _SHARED, None, _EXISTING, flags, None)
        if self._handle in (None, _INVALID):
            raise _last_error(path)
        self._path = path

    def control(self, code: int, answer_bytes: int = 0) -> bytes:
        """DeviceIoControl without input."""
        answer, count = ctypes.create_string_buffer(max(answer_bytes, 1)), wintypes.DWORD()
        if not self._kernel.DeviceIoControl(self._handle, code, None, 0, answer, answer_bytes, ctypes.byref(count), None):
            raise _last_error(self._path)
        return answer.raw[:answer_bytes]

    def close(self) -> None:
        self._kernel.CloseHandle(self._handle)


class _Lock(_Handle):
    """A volume that nobody else may use, dismounted, until this is closed."""

    def __init__(self, volume: str) -> None:
        super().__init__(volume, _READ | _WRITE, 0)
        try:
            self.control(LOCK_VOLUME)
            self.control(DISMOUNT_VOLUME)
        except OSError as error:
            self.close()
            raise OSError(errno.EBUSY, f"a program has files of {volume} open ({error.strerror})", volume) from error


class _Drive(_Handle):
    """A physical drive (`volume.SectorDevice`)."""

    def __init__(self, disk: str, *, writing: bool, locks: list[_Lock]) -> None:
        super().__init__(disk, _READ | (_WRITE if writing else 0), _NO_BUFFERING | _WRITE_THROUGH)
        self._locks, self._writing = locks, writing
        try:
            (self.sector,) = struct.unpack_from("<I", self.control(GET_GEOMETRY, 24), 20)  # DISK_GEOMETRY.BytesPerSector
            (self.size,) = struct.unpack("<q", self.control(GET_LENGTH, 8))
        except BaseException:
            super().close()
            raise

    def read_into(self, view: memoryview, offset: int) -> int:
        return self._move(self._kernel.ReadFile, view, offset)

    def write_from(self, view: memoryview, offset: int) -> int:
        return self._move(self._kernel.WriteFile, view, offset)

    def _move(self, call: Any, view: memoryview, offset: int) -> int:
        count = wintypes.DWORD()
        address = ctypes.addressof((ctypes.c_char * len(view)).from_buffer(view))
        if not self._kernel.SetFilePointerEx(self._handle, offset, None, 0) or not call(self._handle, address, len(view), ctypes.byref(count), None):
            raise _last_error(self._path)
        return count.value

    def flush(self) -> None:
        if not self._kernel.FlushFileBuffers(self._handle):
            raise _last_error(self._path)

    def close(self) -> None:
        try:
            if self._writing:
                self.control(UPDATE_PROPERTIES)  # there are other partitions now
        except OSError:
            pass  # they show when the card is plugged in again
        finally:
            super().close()
            for lock in self._locks:
                lock.close()


def _kernel32() -> Any:
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    handle, word, pointer = wintypes.HANDLE, wintypes.DWORD, ctypes.c_void_p
    kernel.CreateFileW.argtypes = (wintypes.LPCWSTR, word, word, pointer, word, word, handle)
    kernel.CreateFileW.restype = handle
    kernel.CloseHandle.argtypes = kernel.FlushFileBuffers.argtypes = (handle,)
    kernel.ReadFile.argtypes = kernel.WriteFile.argtypes = (handle, pointer, word, pointer, pointer)
    kernel.SetFilePointerEx.argtypes = (handle, wintypes.LARGE_INTEGER, pointer, word)
    kernel.DeviceIoControl.argtypes = (handle, word, pointer, word, pointer, word, pointer, pointer)
    return kernel


def _last_error(path: str) -> OSError:
    code = ctypes.get_last_error()  # type: ignore[attr-defined,unused-ignore]
    words = ctypes.FormatError(code)  # type: ignore[attr-defined,unused-ignore]
    return OSError(None, words, path, code)  # Windows' code becomes the errno that fits


def _powershell() -> str:
    command = ["powershell", "-NoProfile", "-NonInteractive", "-Command", LISTING]
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    except FileNotFoundError as error:
        raise FlashError("PowerShell is missing, so nobody can tell which disks are safe; nothing is written") from error
    if result.returncode:
        raise FlashError(f"PowerShell's Get-Disk failed: {result.stderr.strip()}; nothing is written")
    return result.stdout


def _volumes(disk: str) -> list[str]:
    r"""Every volume on a disk as \\?\Volume{...}, with or without a letter."""
    number = int(disk.rpartition("PhysicalDrive")[2])
    parts = [part for part in json.loads(_powershell())["partitions"] if part["DiskNumber"] == number]
    return volume_paths(parts)


def volume_paths(parts: list[dict[str, Any]]) -> list[str]:
    """What CreateFileW opens of partitions' volumes."""
    return [path.rstrip("\\") for part in parts for path in _access_paths(part) if path.startswith("\\\\?\\Volume")]


def _access_paths(part: dict[str, Any]) -> list[str]:
    """Letters, folders and the volume's own name, however this PowerShell writes a list into JSON."""
    paths = part["AccessPaths"] or []
    paths = paths["value"] if isinstance(paths, dict) else [paths] if isinstance(paths, str) else paths
    if not all(isinstance(path, str) for path in paths):
        raise TypeError(f"access paths {paths!r}")
    return list(paths)


def _disk(row: dict[str, Any], parts: list[dict[str, Any]]) -> Disk:
    path = rf"\\.\PhysicalDrive{int(row['Number'])}"
    bus = _BUSES.get(row["BusType"], str(row["BusType"]))
    uses = [f"{path} {words}" for key, words in (("IsBoot", "has Windows on it"), ("IsSystem", "starts this computer"), ("IsClustered", "belongs to a cluster")) if row[key]]
    mounts = list[Mount]()
    for part in parts:
        name = f"partition {part['PartitionNumber']} of {path}"
        if part.get("IsBoot") or part.get("IsSystem"):
            uses.append(f"{name} belongs to Windows")
        mounts += [Mount(name, place) for place in _access_paths(part) if not place.startswith("\\\\?\\")]
    return Disk(
        path=path,
        size=int(row.get("Size") or 0),
        model=str(row.get("FriendlyName") or "").strip(),
        transport=bus,
        removable=bus in _CARD_BUSES,
        read_only=bool(row["IsReadOnly"]),
        kind=bus.lower() if bus in _NO_DISKS else "disk",
        used_for=tuple(uses),
        mounts=tuple(mounts),
    )
