"""Which disks there are, and which of them may be overwritten. When in doubt, not.

What differs between systems is in `disks_linux`, `disks_macos` and `disks_windows`, behind `DeviceLayer`. A USB drive with
somebody's data looks as removable as a card, so there is a size above which a disk is refused too, and the person at the
keyboard types the path a second time.
"""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.flash.errors import FlashError
from edge_agent.flash.volume import FileVolume, Reader, UncachedReader, Volume

DEFAULT_LARGEST_BYTES = 256 * 10**9


@dataclass(frozen=True)
class Mount:
    """A part of a disk that a desktop mounted when it was plugged in; it can be let go."""

    part: str
    place: str


@dataclass(frozen=True)
class Disk:
    """A whole disk. `used_for` says what the running system does with it or with a part of it: mount points, swap, holders."""

    path: str
    size: int
    model: str
    transport: str
    removable: bool
    read_only: bool
    kind: str  # "disk", or what it is instead
    used_for: tuple[str, ...]
    mounts: tuple[Mount, ...] = ()

    def describe(self) -> str:
        return f"{self.path}  {self.size / 1e9:.1f} GB  {self.model or 'no model name'}  {self.transport or 'unknown bus'}"


class DeviceLayer(Protocol):
    """What each operating system does in its own way."""

    @property
    def RIGHTS(self) -> str:  # noqa: N802 - a constant of a module
        """What to do for the right to write to a disk."""

    def list_disks(self) -> list[Disk]:
        """Every whole disk; FlashError where nobody can tell."""

    def disk_name(self, target: Path) -> str | None:
        """The path of the disk (whole or not) that `target` is, as `list_disks` has it; None for anything else."""

    def open_volume(self, disk: str) -> Volume:
        """For writing, by nobody else; OSError where it cannot be had."""

    def open_reader(self, disk: str) -> Reader:
        """For reading past the cache."""

    def unmount(self, disk: Disk) -> None:
        """Let go of `disk.mounts`; FlashError where something still uses one."""

    def eject(self, disk: str) -> str:
        """Let go of a finished card, everything on it being flushed; a sentence for the person. Never powers the reader off."""


def this_system() -> DeviceLayer:
    """The layer of the system that this runs on.

    Raises:
        FlashError: there is none.

    """
    system = platform.system()
    if system == "Darwin":
        from edge_agent.flash import disks_macos

        return disks_macos
    if system == "Windows":
        from edge_agent.flash import disks_windows

        return disks_windows
    if system == "Linux":
        from edge_agent.flash import disks_linux

        return disks_linux
    raise FlashError(f"disks cannot be told apart on {system}; write to a file, and that to the card with another program")


def list_disks() -> list[Disk]:
    """Every whole disk of this machine.

    Raises:
        FlashError: nobody can tell.

    """
    return this_system().list_disks()


def is_disk(target: Path) -> bool:
    """Whether this is a disk of this machine, not a file."""
    return _disk_of(target) is not None


def open_volume(target: Path) -> Volume:
    """A disk or a file, for writing.

    Raises:
        OSError: it cannot be had.

    """
    found = _disk_of(target)
    return FileVolume(target) if found is None else found[0].open_volume(found[1])


def open_reader(target: Path) -> Reader:
    """A disk or a file, for reading past the cache.

    Raises:
        OSError: it cannot be had.

    """
    found = _disk_of(target)
    return UncachedReader(target) if found is None else found[0].open_reader(found[1])


def _disk_of(target: Path, layer: DeviceLayer | None = None) -> tuple[DeviceLayer, str] | None:
    """The disk that `target` is, and who knows it; None for a file, which is all that unknown systems have."""
    try:
        layer = layer or this_system()
    except FlashError:
        return None
    name = layer.disk_name(target)
    return None if name is None else (layer, name)


def refusals(disk: Disk, image_bytes: int, largest_bytes: int = DEFAULT_LARGEST_BYTES, *, unmount: bool = False) -> list[str]:
    """Why this disk must not be written; empty if it may. With `unmount`, what can be let go is no reason."""
    reasons = [f"it is in use: {use}" for use in disk.used_for]
    if not unmount:
        reasons += [f"it is in use: {mount.part} is mounted on {mount.place} (--unmount lets go of it)" for mount in disk.mounts]
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


def check_target(
    target: Path,
    image_bytes: int,
    *,
    largest_bytes: int = DEFAULT_LARGEST_BYTES,
    unmount: bool = False,
    disks: Sequence[Disk] | None = None,
    layer: DeviceLayer | None = None,
) -> Disk | None:
    """Let `target` through or say why not. None for a plain file, which is made or overwritten.

    Raises:
        FlashError: a disk that must not be written, or neither a disk nor a file.

    """
    found = _disk_of(target, layer)
    if found is None:
        _check_file(target)
        return None
    known = found[0].list_disks() if disks is None else disks
    disk = next((one for one in known if one.path == found[1]), None)
    if disk is None:
        raise FlashError(f"{target} is no whole disk (perhaps a partition, or taken out); `edge-agent flash --list` shows the cards")
    if reasons := refusals(disk, image_bytes, largest_bytes, unmount=unmount):
        raise FlashError(f"{disk.describe()} is not written: " + "; ".join(reasons))
    return disk


def _check_file(target: Path) -> None:
    if not target.exists():
        if target.parent.is_dir() and not str(target).startswith("/dev/"):
            return
        raise FlashError(f"{target} does not exist; `edge-agent flash --list` shows the cards")
    real = target.resolve()
    if not stat.S_ISREG(real.stat().st_mode):
        raise FlashError(f"{target} is neither a disk nor a file; `edge-agent flash --list` shows the cards")
    if not os.access(real, os.W_OK):
        raise FlashError(f"{target} is read-only; choose another file or change its permissions")
