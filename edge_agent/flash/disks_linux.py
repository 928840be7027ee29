"""Linux: `lsblk` says all about disks, O_EXCL and O_DIRECT do the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_agent.flash.disks import Disk, Mount
from edge_agent.flash.errors import FlashError
from edge_agent.flash.volume import FileVolume, UncachedReader

RIGHTS = "run with sudo, or join the group 'disk'"
LSBLK = ["lsblk", "--json", "--bytes", "--output", "NAME,PATH,PKNAME,TYPE,SIZE,RM,HOTPLUG,RO,TRAN,MODEL,MOUNTPOINTS,FSTYPE"]
_CARD_TRANSPORTS = ("usb", "mmc")
_DESKTOP_PLACES = ("/media/", "/run/media/")  # where udisks mounts what is plugged in


def list_disks(listing: str | None = None) -> list[Disk]:
    """Every whole disk, from `lsblk` or from a recorded `listing` of it.

    Raises:
        FlashError: lsblk is missing or fails.

    """
    if listing is None:
        if shutil.which("lsblk") is None:
            raise FlashError("lsblk is not installed (package util-linux), so nobody can tell which disks are safe; nothing is written")
        result = subprocess.run(LSBLK, capture_output=True, text=True, check=False)
        if result.returncode:
            raise FlashError(f"lsblk failed: {result.stderr.strip()}; nothing is written")
        listing = result.stdout
    found = json.loads(listing)["blockdevices"]
    return [_disk(row) for row in found if row.get("type") not in ("rom", "part")]


def disk_name(target: Path) -> str | None:
    real = target.resolve()
    return str(real) if real.is_block_device() else None


def open_volume(disk: str) -> FileVolume:
    return FileVolume(Path(disk))


def open_reader(disk: str) -> UncachedReader:
    return UncachedReader(Path(disk))


def unmount(disk: Disk) -> None:
    for mount in disk.mounts:
        command = ["umount", mount.place] if os.geteuid() == 0 else ["udisksctl", "unmount", "--block-device", mount.part]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise FlashError(f"{command[0]} is not installed; unmount {mount.place} yourself, or run this with sudo") from error
        if result.returncode:
            raise FlashError(f"{mount.place} cannot be unmounted: {result.stderr.strip()}; close what uses it")


def eject(disk: str) -> str:
    if Path(disk).name.startswith("mmcblk"):
        return f"{disk} is flushed; the card can be taken out."
    program = shutil.which("eject")
    if program is None:
        return f"{disk} is flushed but not ejected (the program 'eject' is not installed); the card can be taken out once the reader's light rests."
    result = subprocess.run([program, disk], capture_output=True, text=True, check=False, timeout=60)
    if result.returncode:
        return f"{disk} is flushed but could not be ejected ({result.stderr.strip() or result.returncode}); take the card out once the reader's light rests."
    return f"{disk} is ejected; the card can be taken out."


def _disk(row: dict[str, Any]) -> Disk:
    uses, mounts = list[str](), list[Mount]()
    for use in _uses(row):
        if isinstance(use, Mount):
            mounts.append(use)
        else:
            uses.append(use)
    return Disk(
        path=str(row["path"]),
        size=int(row.get("size") or 0),
        model=str(row.get("model") or "").strip(),
        transport=str(row.get("tran") or ""),
        removable=bool(row.get("rm")) or bool(row.get("hotplug")) or row.get("tran") in _CARD_TRANSPORTS,
        read_only=bool(row.get("ro")),
        kind=str(row.get("type") or ""),
        used_for=tuple(uses),
        mounts=tuple(mounts),
    )


def _uses(row: dict[str, Any]) -> Iterator[str | Mount]:
    for place in row.get("mountpoints") or []:
        if place == "[SWAP]":
            yield f"{row['path']} is swap space"
        elif place and place.startswith(_DESKTOP_PLACES):
            yield Mount(row["path"], place)
        elif place:
            yield f"{row['path']} is mounted on {place}"
    for child in row.get("children") or []:
        if child.get("type") not in ("part", "disk"):
            yield f"{child['path']} ({child.get('type')}) is built on it"
        yield from _uses(child)
