"""Our FAT writer against Debian's own tools: what mkfs.vfat makes, mtools reads and fsck.vfat finds clean."""

from __future__ import annotations

import random
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest

from edge_agent.flash.errors import FlashError
from edge_agent.flash.fat import FatPartition
from edge_agent.flash.volume import FileVolume
from tests.flash.images import needs_image_tools, tool

pytestmark = needs_image_tools

NOW = datetime(2026, 11, 26, 12, 30, 14, tzinfo=timezone.utc)
OFFSET = 1024 * 1024


def make_partition(path: Path, fat: int, megabytes: int, sectors_per_cluster: int = 1) -> Path:
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(OFFSET + megabytes * 1024 * 1024)
    command = [tool("mkfs.vfat"), "-F", str(fat), "-s", str(sectors_per_cluster), "--offset", str(OFFSET // 512), path]
    subprocess.run([*command, str(megabytes * 1024)], check=True, capture_output=True)
    return path


def check_clean(path: Path, tmp_path: Path) -> None:
    """fsck.vfat knows no offset, so it looks at a copy of the partition."""
    copy = tmp_path / "partition"
    with path.open("rb") as whole, copy.open("wb") as part:
        whole.seek(OFFSET)
        shutil.copyfileobj(whole, part)
    result = subprocess.run([tool("fsck.vfat"), "-n", "-v", copy], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "differ" not in result.stdout, result.stdout


def read_with_mtools(path: Path, name: str) -> bytes:
    return subprocess.run([tool("mtype"), "-i", f"{path}@@{OFFSET}", f"::/{name}"], check=True, capture_output=True).stdout


@pytest.fixture(params=[(16, 16, 4), (32, 40, 1)], ids=["fat16", "fat32"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    fat, megabytes, spc = request.param
    return make_partition(tmp_path / "card.img", fat, megabytes, spc)


def test_any_sequence_of_writes_and_removals_leaves_a_clean_file_system(image: Path, tmp_path: Path):
    rng = random.Random(7)
    kept: dict[str, bytes] = {}
    names = ["cmdline.txt", "config.txt", "user-data", "Ein langer Name mit Ümläuten.toml", "CONFIG~1.TXT", "mobillm/device.bundle", "mobillm/unter/a.b.c", ".hidden"]
    names += [f"file number {n}.json" for n in range(40)]
    with FileVolume(image) as volume:
        partition = FatPartition(volume, OFFSET)
        for _ in range(120):
            name = rng.choice(names)
            if name in kept and rng.random() < 0.3:
                partition.remove(name)
                del kept[name]
            else:
                kept[name] = rng.randbytes(rng.choice([0, 1, 511, 512, 2048, 2049, 20_000]))
                partition.write(name, kept[name], NOW)
        again = FatPartition(volume, OFFSET)
        assert {name: again.read(name) for name in kept} == kept
    check_clean(image, tmp_path)
    for name in list(kept)[:12]:
        assert read_with_mtools(image, name) == kept[name]


def test_files_of_mtools_are_read_replaced_and_keep_their_names(image: Path, tmp_path: Path):
    for name, content in (("cmdline.txt", b"console=tty1 rootwait"), ("Long File Name.Conf", b"x" * 9000), ("UPPER.TXT", b"u")):
        source = tmp_path / "source"
        source.write_bytes(content)
        subprocess.run([tool("mcopy"), "-i", f"{image}@@{OFFSET}", source, f"::/{name}"], check=True)
    with FileVolume(image) as volume:
        partition = FatPartition(volume, OFFSET)
        assert sorted(partition.names()) == ["Long File Name.Conf", "UPPER.TXT", "cmdline.txt"]
        assert partition.read("CMDLINE.TXT") == b"console=tty1 rootwait"
        partition.write("cmdline.txt", b"short", NOW)
        partition.write("long file name.conf", b"y" * 30_000, NOW)
        assert sorted(partition.names()) == ["Long File Name.Conf", "UPPER.TXT", "cmdline.txt"]
    check_clean(image, tmp_path)
    assert read_with_mtools(image, "cmdline.txt") == b"short"
    assert read_with_mtools(image, "Long File Name.Conf") == b"y" * 30_000


def test_a_removed_file_leaves_no_trace_of_its_content(image: Path):
    secret = b"wpa-psk-0123456789abcdef"
    with FileVolume(image) as volume:
        partition = FatPartition(volume, OFFSET)
        partition.write("secret.txt", secret * 100, NOW)
        assert secret in image.read_bytes()
        partition.remove("secret.txt")
        assert not partition.exists("secret.txt")
        with pytest.raises(FileNotFoundError):
            partition.read("secret.txt")
    assert secret not in image.read_bytes()


def test_a_full_partition_is_said_and_stays_clean(image: Path, tmp_path: Path):
    with FileVolume(image) as volume:
        partition = FatPartition(volume, OFFSET)
        with pytest.raises(FlashError, match="no room"):
            partition.write("big", bytes(60 * 1024 * 1024), NOW)
        partition.write("small", b"fits", NOW)
    check_clean(image, tmp_path)


@pytest.mark.parametrize("damage", ["no signature", "no clusters", "loop"])
def test_damage_is_named(tmp_path: Path, damage: str):
    image = make_partition(tmp_path / "card.img", 32, 40)
    with FileVolume(image) as volume:
        FatPartition(volume, OFFSET).write("a.txt", bytes(3000), NOW)
    with image.open("r+b") as file:
        if damage == "no signature":
            file.seek(OFFSET + 510)
            file.write(b"\0\0")
        elif damage == "no clusters":
            file.seek(OFFSET + 13)
            file.write(b"\xff")
        else:  # cluster 3 leads to itself
            file.seek(OFFSET + 32 * 512 + 3 * 4)
            file.write((3).to_bytes(4, "little"))
    with FileVolume(image) as volume, pytest.raises(FlashError, match=r"no FAT file system|damaged"):
        FatPartition(volume, OFFSET).read("a.txt")


@pytest.mark.parametrize("name", ["", "..", "a:b", "x*", "tab\t", "end.", "n" * 256])
def test_names_that_fat_cannot_hold(image: Path, name: str):
    with FileVolume(image) as volume, pytest.raises(FlashError, match=r"no name|directory"):
        FatPartition(volume, OFFSET).write(f"d/{name}" if name else "", b"", NOW)
