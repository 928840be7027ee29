"""Card images as Debian's tools make them: MBR or GPT, a FAT boot partition, and a stretch that stands for the root."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

MIB = 1024 * 1024
BOOT_START = 4 * MIB
TOOLS = ("mkfs.vfat", "mcopy", "sfdisk")
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"

needs_image_tools = pytest.mark.skipif(
    not all(shutil.which(tool, path=SBIN) for tool in TOOLS), reason="dosfstools, mtools or fdisk is not installed (apt install dosfstools mtools fdisk)"
)


def tool(name: str) -> str:
    found = shutil.which(name, path=SBIN)
    assert found is not None
    return found


def make_image(path: Path, files: Mapping[str, bytes], *, table: str = "dos", boot_megabytes: int = 40, root_megabytes: int = 8) -> Path:
    """A card image with `files` on its boot partition. The root's bytes are random, so that a wrong byte anywhere shows."""
    total = BOOT_START + (boot_megabytes + root_megabytes + 1) * MIB
    with path.open("wb") as file:
        file.truncate(total)
    boot_kind = "c" if table == "dos" else "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
    script = f"label: {table}\nstart={BOOT_START // 512}, size={boot_megabytes * 2048}, type={boot_kind}\nsize={root_megabytes * 2048}\n"
    subprocess.run([tool("sfdisk"), "--quiet", path], input=script, text=True, check=True, capture_output=True)
    command = [tool("mkfs.vfat"), "-F", "32", "-s", "1", "--offset", str(BOOT_START // 512), path, str(boot_megabytes * 1024)]
    subprocess.run(command, check=True, capture_output=True)
    for name, content in files.items():
        source = path.with_name("mcopy-source")
        source.write_bytes(content)
        subprocess.run([tool("mcopy"), "-i", f"{path}@@{BOOT_START}", source, f"::/{name}"], check=True)
    with path.open("r+b") as file:
        file.seek(BOOT_START + boot_megabytes * MIB)
        file.write(random.Random(1).randbytes(root_megabytes * MIB))
    return path


def boot_file(path: Path, name: str) -> bytes:
    """A file of the boot partition, read with mtools."""
    return subprocess.run([tool("mtype"), "-i", f"{path}@@{BOOT_START}", f"::/{name}"], check=True, capture_output=True).stdout
