"""Trouble that the kernel makes, on loop devices over files of our own; and bits that flip in what the device was given."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.flash.card import FIRST_BLOCK_BYTES, write_card
from edge_agent.flash.disks_linux import eject
from edge_agent.flash.errors import FlashError
from edge_agent.flash.volume import FileVolume, UncachedReader
from tests.flash.images import MIB, make_image, needs_image_tools
from tests.flash.test_card import is_bootable, put_bundle

pytestmark = needs_image_tools


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image") / "os.img", {"cmdline.txt": b"console=tty1"}, root_megabytes=1)


@contextmanager
def loop(backing: Path, *options: str) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("losetup", path="/usr/sbin:/sbin") is None:
        pytest.skip("loop devices need root and losetup")
    made = subprocess.run(["/usr/sbin/losetup", "--find", "--show", *options, backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device is to be had here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["/usr/sbin/losetup", "--detach", device], check=False)


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextmanager
def small_disk(tmp_path: Path, size: int) -> Iterator[Path]:
    """An ext4 of `size` bytes, mounted."""
    place = tmp_path / "small"
    place.mkdir()
    with loop(sparse(tmp_path / "small.img", size)) as device:
        subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", device], check=True)
        if subprocess.run(["mount", device, place], check=False).returncode:
            pytest.skip("nothing can be mounted here")
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)


def test_a_card_is_made_on_a_block_device(image: Path, tmp_path: Path):
    backing = sparse(tmp_path / "backing", 64 * MIB)
    with loop(backing) as device:
        written = write_card(image, device, customise=put_bundle)
        assert written.read_past_cache
    assert is_bootable(backing)


@pytest.mark.parametrize("direct", [True, False])
def test_reading_back_goes_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool):
    """The medium changes behind the kernel's back; what it remembers of it is not what is there."""
    backing = sparse(tmp_path / "backing", MIB)
    with loop(backing) as device:
        if device.read_bytes()[:3] != b"\0\0\0":
            pytest.fail("the device is not the sparse file")
        with device.open("rb") as remembered:  # while somebody has it open, the kernel keeps what it knows
            remembered.read(4096)
            with backing.open("r+b") as file:
                file.write(b"new")
            remembered.seek(0)
            if os.pread(remembered.fileno(), 3, 0) == b"new":
                pytest.skip("this kernel remembers nothing of a loop device")
            if not direct:
                monkeypatch.delattr(os, "O_DIRECT")
            with UncachedReader(device) as reader:
                assert reader.direct == direct
                assert reader.read_at(0, 3) == b"new"


@pytest.mark.parametrize("stated", [True, False])
def test_a_card_that_is_too_small(image: Path, tmp_path: Path, stated: bool):
    backing = sparse(tmp_path / "backing", 20 * MIB)
    with loop(backing) as device, pytest.raises(FlashError, match="take a larger card"):
        write_card(image, device, expected_size=image.stat().st_size if stated else None)
    assert not is_bootable(backing)


def test_a_read_only_card_is_left_as_it_is(image: Path, tmp_path: Path):
    backing = tmp_path / "backing"
    shutil.copy(image, backing)
    with loop(backing, "--read-only") as device, pytest.raises(FlashError, match=r"read-only|cannot be opened for writing") as refused:
        write_card(image, device)
    assert "does not boot" not in str(refused.value)
    assert backing.read_bytes() == image.read_bytes()


def test_a_full_target(image: Path, tmp_path: Path):
    with small_disk(tmp_path, 16 * MIB) as place:
        card = place / "card"
        with pytest.raises(FlashError, match=r"is full near byte .* does not boot"):
            write_card(image, card)
        assert not is_bootable(card)


def test_a_medium_that_fails_in_mid_write(image: Path, tmp_path: Path):
    """The disk takes fewer bytes than it claims, as counterfeit cards do: the kernel reports it when flushing."""
    with small_disk(tmp_path, 16 * MIB) as place, loop(sparse(place / "backing", 64 * MIB)) as device:
        with pytest.raises(FlashError, match=r"vanished or failed|is full|does not give back") as failed:
            write_card(image, device)
        assert "does not boot" in str(failed.value)
        assert not is_bootable(place / "backing")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_in_what_the_device_was_given_is_found(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int):
    """Anywhere in what was put on the boot partition: files, their slack, directories, both tables; or in the first block."""
    chance, late = random.Random(seed), list[tuple[int, int]]()
    target, real_write, real_sync = tmp_path / "card", FileVolume.write_at, FileVolume.sync
    of_first_block = seed % 4 == 0
    whole = image.stat().st_size
    seen = 0

    def write(disk: FileVolume, offset: int, content: bytes) -> None:
        nonlocal seen
        real_write(disk, offset, content)
        seen += len(content)
        if seen > whole + FIRST_BLOCK_BYTES and any(content) and (offset == 0) == of_first_block:
            late.append((offset, len(content)))

    def sync(disk: FileVolume) -> None:
        real_sync(disk)
        if late:
            offset, length = chance.choice(late)
            late.clear()
            at = offset + chance.randrange(length)
            byte = disk.read_at(at, 1)[0]
            real_write(disk, at, bytes([byte ^ 1 << chance.randrange(8)]))
            real_sync(disk)

    monkeypatch.setattr(FileVolume, "write_at", write)
    monkeypatch.setattr(FileVolume, "sync", sync)
    with pytest.raises(FlashError, match=r"does not give back .* does not boot"):
        write_card(image, target, customise=put_bundle)
    assert target.read_bytes()[:FIRST_BLOCK_BYTES] == bytes(FIRST_BLOCK_BYTES)


def test_ctrl_c_says_what_the_card_is_now(image: Path, tmp_path: Path):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(FlashError, match=r"interrupted\. .* does not boot"):
        write_card(image, tmp_path / "card", progress=interrupt)
    assert not is_bootable(tmp_path / "card")


def test_the_image_is_not_overwritten_with_itself(image: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(image)
    before = image.read_bytes()
    with pytest.raises(FlashError, match="the image itself"):
        write_card(image, tmp_path / "link")
    assert image.read_bytes() == before


def test_ejecting_never_fails_a_finished_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With no such program, and with one that refuses."""
    program = tmp_path / "eject"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in eject("/nowhere/card")
    program.write_text("#!/bin/sh\necho no such drive >&2\nexit 1\n")
    program.chmod(0o755)
    assert "could not be ejected (no such drive)" in eject("/nowhere/card")
    program.write_text("#!/bin/sh\nexit 0\n")
    assert "is ejected" in eject("/nowhere/card")
