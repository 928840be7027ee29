"""From a root to an image file: MBR, the boot partition (FAT), the root, and /var, which grows on the card. No mount is needed."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from edge_agent.flash.image.tree import EPOCH, ImageError, run

MIB = 1024 * 1024
DISK_ID = "6d6f6269"  # also in files/etc/fstab and cmdline.txt
BOOT_BYTES = 512 * MIB
ROOT_SPARE = 256 * MIB  # for updates
VAR_SPARE = 128 * MIB
_NAMESPACE = uuid.UUID("7ad0a9de-6f0f-4f43-9f0b-6d6f62696c6c")


@dataclass(frozen=True)
class Part:
    """A partition, in bytes."""

    start: int
    size: int


@dataclass(frozen=True)
class Layout:
    """Where each partition lies. They start at 4 MiB, since cards are erased in blocks of that size."""

    boot: Part
    root: Part
    var: Part

    @classmethod
    def of(cls, root_bytes: int, var_bytes: int) -> Layout:
        boot = Part(4 * MIB, BOOT_BYTES)
        root = Part(boot.start + boot.size, _rounded(root_bytes * 11 // 10 + ROOT_SPARE))
        return cls(boot, root, Part(root.start + root.size, _rounded(var_bytes * 11 // 10 + VAR_SPARE)))

    @property
    def total(self) -> int:
        return self.var.start + self.var.size

    def table(self) -> str:
        """For sfdisk."""
        kinds = ((self.boot, "c"), (self.root, "83"), (self.var, "83"))
        lines = [f"start={part.start // 512}, size={part.size // 512}, type={kind}" for part, kind in kinds]
        return "\n".join(["label: dos", f"label-id: 0x{DISK_ID}", *lines]) + "\n"


def make_disk(root: Path, image: Path) -> Layout:
    """Write `image` from the tree in `root`. What belongs to /boot/firmware and /var leaves the tree for folders beside it.

    Raises:
        ImageError: a tool is missing or fails.

    """
    boot, var = root.with_name("boot"), root.with_name("var")
    for apart, place in ((boot, root / "boot/firmware"), (var, root / "var")):
        shutil.rmtree(apart, ignore_errors=True)
        place.rename(apart)
        place.mkdir()
        os.utime(place, (EPOCH, EPOCH))
        os.utime(place.parent, (EPOCH, EPOCH))
    layout = Layout.of(_size_of(root), _size_of(var))
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(layout.total)
    run(["sfdisk", "--quiet", str(image)], stdin=layout.table())
    _make_fat(image, layout.boot, boot)
    _make_ext4(image, layout.root, root, "root")
    _make_ext4(image, layout.var, var, "var")
    return layout


def _make_fat(image: Path, part: Part, folder: Path) -> None:
    run(["mkfs.vfat", "--invariant", "-F", "32", "-s", "4", "-i", "6D6F6269", "-n", "BOOT", "--offset", str(part.start // 512), str(image), str(part.size // 1024)])
    names = sorted(str(path) for path in folder.iterdir())
    run(["mcopy", "-s", "-m", "-i", f"{image}@@{part.start}", *names, "::/"], environment={"SOURCE_DATE_EPOCH": str(EPOCH), "TZ": "UTC"})


def _make_ext4(image: Path, part: Part, folder: Path, name: str) -> None:
    identity = str(uuid.uuid5(_NAMESPACE, name))
    run(
        ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-i", "16384", "-d", str(folder), "-L", name, "-U", identity, "-E", f"hash_seed={identity},offset={part.start},root_owner=0:0", "-O", "^metadata_csum_seed", str(image), f"{part.size // 1024}k"],
        environment={"E2FSPROGS_FAKE_TIME": str(EPOCH)},
    )
    _set_inode_times(f"{image}?offset={part.start}", sum(1 for _ in folder.rglob("*")))


def _set_inode_times(file_system: str, count: int) -> None:
    """mke2fs takes the times of change from the tree, which nobody can set there: they would tell when the image was built."""
    fields = ("ctime", "atime", "mtime", "crtime")
    inodes = [2, *range(11, 13 + count)]
    lines = [f"sif <{inode}> {name} @{EPOCH}\nsif <{inode}> {name}_extra 0" for inode in inodes for name in fields]
    run(["debugfs", "-w", "-f", "-", file_system], stdin="\n".join(lines) + "\n", environment={"E2FSPROGS_FAKE_TIME": str(EPOCH)})


def _size_of(folder: Path) -> int:
    """What a file system of 4 KiB blocks needs for it."""
    size = 0
    for path in folder.rglob("*"):
        status = path.lstat()
        size += 4096 + (-(-status.st_size // 4096) * 4096 if path.is_file() and not path.is_symlink() else 0)
    if not size:
        raise ImageError(f"{folder} is empty; build the tree anew")
    return size


def _rounded(size: int) -> int:
    return -(-size // (4 * MIB)) * 4 * MIB
