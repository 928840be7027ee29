"""Which disks there are, and which of them may be overwritten. When in doubt, not.

Linux: `lsblk` says all of it. A USB drive with somebody's data looks as removable as a card, so there is a size above which
a disk is refused too, and the person at the keyboard types the path a second time.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.flash.errors import FlashError

LSBLK = ["lsblk", "--json", "--bytes", "--output", "NAME,PATH,PKNAME,TYPE,SIZE,RM,HOTPLUG,RO,TRAN,MODEL,MOUNTPOINTS,FSTYPE"]
DEFAULT_LARGEST_BYTES = 256 * 10**9
_CARD_TRANSPORTS = ("usb", "mmc")


@dataclass(frozen=True)
class Disk:
    """A whole disk. `used_for` says what the running system does with it or with a part of it: mount points, swap, holders."""

    path: str
    size: int
    model: str
    transport: str
    removable: bool
    read_only: bool
    kind: str
    used_for: tuple[str, ...]

    def describe(self) -> str:
        return f"{self.path}  {self.size / 1e9:.1f} GB  {self.model or 'no model name'}  {self.transport or 'unknown bus'}"


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


def refusals(disk: Disk, image_bytes: int, largest_bytes: int = DEFAULT_LARGEST_BYTES) -> list[str]:
    """Why this disk must not be written; empty if it may."""
    reasons = [f"it is in use: {use}" for use in disk.used_for]
    if disk.kind != "disk":
        reasons.append(f"it is no whole disk but of type {disk.kind}")
    if disk.read_only:
        reasons.append("it is read-only; is the card's lock slid down?")
    if not disk.removable:
        reasons.append("it is not removable (neither a USB drive nor a card)")
    if disk.size == 0:
        reasons.append("there is no card in it")
    elif disk.size < image_bytes:
        reasons.append(f"it has {disk.size:,} bytes, the image needs {image_bytes:,}")
    if disk.size > largest_bytes:
        reasons.append(f"it has {disk.size / 1e9:.0f} GB, more than the {largest_bytes / 1e9:.0f} GB that a card is expected to have (--largest-gb)")
    return reasons


def check_target(target: Path, image_bytes: int, *, largest_bytes: int = DEFAULT_LARGEST_BYTES, disks: Sequence[Disk] | None = None) -> Disk | None:
    """Let `target` through or say why not. None for a plain file, which is made or overwritten.

    Raises:
        FlashError: a disk that must not be written, or neither a disk nor a file.

    """
    if not target.exists():
        if target.parent.is_dir() and not str(target).startswith("/dev/"):
            return None
        raise FlashError(f"{target} does not exist; `edge-agent flash --list` shows the cards")
    real = target.resolve()
    mode = real.stat().st_mode
    if stat.S_ISREG(mode):
        if not os.access(real, os.W_OK):
            raise FlashError(f"{target} is read-only; choose another file or change its permissions")
        return None
    if not stat.S_ISBLK(mode):
        raise FlashError(f"{target} is neither a disk nor a file; `edge-agent flash --list` shows the cards")
    known = list_disks() if disks is None else disks
    disk = next((one for one in known if one.path == str(real)), None)
    if disk is None:
        raise FlashError(f"{target} is no whole disk (perhaps a partition); `edge-agent flash --list` shows the cards")
    if reasons := refusals(disk, image_bytes, largest_bytes):
        raise FlashError(f"{disk.describe()} is not written: " + "; ".join(reasons))
    return disk


def _disk(row: dict[str, Any]) -> Disk:
    return Disk(
        path=str(row["path"]),
        size=int(row.get("size") or 0),
        model=str(row.get("model") or "").strip(),
        transport=str(row.get("tran") or ""),
        removable=bool(row.get("rm")) or bool(row.get("hotplug")) or row.get("tran") in _CARD_TRANSPORTS,
        read_only=bool(row.get("ro")),
        kind=str(row.get("type") or ""),
        used_for=tuple(_uses(row)),
    )


def _uses(row: dict[str, Any]) -> list[str]:
    uses = [f"{row['path']} is mounted on {place}" if place != "[SWAP]" else f"{row['path']} is swap space" for place in row.get("mountpoints") or [] if place]
    for child in row.get("children") or []:
        if child.get("type") not in ("part", "disk"):
            uses.append(f"{child['path']} ({child.get('type')}) is built on it")
        uses.extend(_uses(child))
    return uses
