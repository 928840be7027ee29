"""Whole images to files that stand for cards: what arrives, what is noticed, and what an interruption leaves behind."""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
import os
import resource
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

from edge_agent.flash import volume
from edge_agent.flash.block_map import read_block_map
from edge_agent.flash.card import FIRST_BLOCK_BYTES, write_card
from edge_agent.flash.errors import FlashError
from edge_agent.flash.fat import FatPartition
from edge_agent.flash.volume import FileVolume
from tests.flash.images import MIB, boot_file, make_image, needs_image_tools

pytestmark = needs_image_tools

NOW = datetime(2026, 11, 26, tzinfo=timezone.utc)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image") / "os.img", {"cmdline.txt": b"console=tty1 rootwait", "config.txt": b"# none"})


def put_bundle(boot: FatPartition) -> dict[str, bytes]:
    files = {"mobillm/device.bundle": b"secret" * 1000, "meta-data": b"instance-id: x\n"}
    for path, content in files.items():
        boot.write(path, content, NOW)
    return files


def is_bootable(path: Path) -> bool:
    return path.read_bytes()[510:512] == b"\x55\xaa"


@functools.cache
def pack(image: Path, kind: str) -> Path:
    folder = image.parent
    content = image.read_bytes()
    if kind == "img":
        return image
    packed = folder / f"os.img.{kind}"
    if kind == "xz":
        packed.write_bytes(lzma.compress(content, preset=0))
    elif kind == "xz-streams":
        packed.write_bytes(lzma.compress(content[: 5 * MIB], preset=0) + bytes(8) + lzma.compress(content[5 * MIB :], preset=0))
    elif kind == "gz":
        packed.write_bytes(gzip.compress(content, 1))
    else:
        subprocess.run(["zstd", "-q", "-1", image, "-o", packed], check=True)
    return packed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["img", "xz", "xz-streams", "gz", "zst"])
def test_every_packing_arrives_whole_with_the_devices_files(image: Path, tmp_path: Path, kind: str):
    target = tmp_path / "card"
    seen: list[tuple[str, int, int | None]] = []
    written = write_card(pack(image, kind), target, customise=put_bundle, progress=lambda *step: seen.append(step))
    content = image.read_bytes()
    assert written.image_sha256 == hashlib.sha256(content).hexdigest()
    assert written.image_size == len(content) == target.stat().st_size
    assert boot_file(target, "mobillm/device.bundle") == b"secret" * 1000
    assert boot_file(target, "cmdline.txt") == b"console=tty1 rootwait"
    assert target.read_bytes()[-8 * MIB :] == content[-8 * MIB :]
    assert is_bootable(target)
    assert {stage for stage, _, _ in seen} == {"write", "verify"}
    assert all(done <= total for _, done, total in seen if total)


def test_an_image_without_customisation_is_a_true_copy(image: Path, tmp_path: Path):
    write_card(image, tmp_path / "card")
    assert (tmp_path / "card").read_bytes() == image.read_bytes()


def test_gpt_images_have_their_boot_partition_found(tmp_path: Path):
    gpt = make_image(tmp_path / "gpt.img", {"a": b"b"}, table="gpt")
    write_card(gpt, tmp_path / "card", customise=put_bundle)
    assert boot_file(tmp_path / "card", "meta-data") == b"instance-id: x\n"


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.5, 0.77, 0.99999])
def test_a_flipped_bit_anywhere_is_found(image: Path, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch):
    """The bit flips between writing and reading back, as on a bad card."""
    target = tmp_path / "card"
    position = max(int(image.stat().st_size * share), FIRST_BLOCK_BYTES)
    real_sync = FileVolume.sync

    def sync_badly(disk: FileVolume) -> None:
        real_sync(disk)
        if os.fstat(disk._descriptor).st_size > position:
            with target.open("r+b") as file:
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ 0x10]))

    monkeypatch.setattr(FileVolume, "sync", sync_badly)
    with pytest.raises(FlashError, match=r"does not give back what was written to bytes .* does not boot"):
        write_card(image, target)
    assert not is_bootable(target)


def test_a_flipped_bit_in_a_device_file_is_found(image: Path, tmp_path: Path):
    target = tmp_path / "card"

    def put_badly(boot: FatPartition) -> dict[str, bytes]:
        files = put_bundle(boot)
        return {**files, "meta-data": b"instance-id: y\n"}  # as if the card had changed it

    with pytest.raises(FlashError, match="meta-data on the boot partition does not read back"):
        write_card(image, target, customise=put_badly)
    assert not is_bootable(target)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"expected_sha256": "0" * 64}, "has the sha256"),
        ({"expected_size": 123}, "unpacks to"),
    ],
)
def test_a_wrong_image_does_not_become_a_card(image: Path, tmp_path: Path, wrong: dict[str, object], words: str):
    with pytest.raises(FlashError, match=words):
        write_card(image, tmp_path / "card", **wrong)
    assert not is_bootable(tmp_path / "card")


@pytest.mark.parametrize("kind", ["xz", "gz", "zst"])
@pytest.mark.parametrize("share", [0.02, 0.6, 0.999])
def test_a_truncated_image_is_said_to_be_one(image: Path, tmp_path: Path, kind: str, share: float):
    content = pack(image, kind).read_bytes()
    packed = tmp_path / "cut"
    packed.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FlashError, match="cut short or damaged"):
        write_card(packed, tmp_path / "card")
    assert not is_bootable(tmp_path / "card")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04rest", b"x" * 100_000])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes):
    source = tmp_path / "os.img"
    source.write_bytes(content)
    with pytest.raises(FlashError, match=r"no image|archive|no disk image"):
        write_card(source, tmp_path / "card", customise=put_bundle)


def test_an_interrupted_write_leaves_a_card_that_does_not_boot(image: Path, tmp_path: Path):
    """kill -9 in the middle, over a card that did boot before."""
    target = tmp_path / "card"
    write_card(image, target)
    assert is_bootable(target)
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom edge_agent.flash.card import write_card\n"
        "def die(stage, done, total):\n    if stage == sys.argv[3] and done > 20_000_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_card(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)\n"
    )
    for stage in ("write", "verify"):
        result = subprocess.run([sys.executable, "-c", program, image, target, stage], check=False)
        assert result.returncode == -9
        assert not is_bootable(target)
        assert target.read_bytes()[:FIRST_BLOCK_BYTES] == bytes(FIRST_BLOCK_BYTES)


def test_a_full_disk_is_said(image: Path, tmp_path: Path):
    """A limit on the size of files stands for a full disk; it gives EFBIG, so the words name the cause as the system gives it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * MIB, 10 * MIB))

    program = (
        "import signal, sys\nfrom pathlib import Path\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from edge_agent.flash.card import write_card\nfrom edge_agent.flash.errors import FlashError\n"
        "try:\n    write_card(Path(sys.argv[1]), Path(sys.argv[2]))\nexcept FlashError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, image, tmp_path / "card"], capture_output=True, text=True, check=True, preexec_fn=limit)
    assert "cannot be written near byte" in result.stdout
    assert "does not boot" in result.stdout
    assert not is_bootable(tmp_path / "card")


@pytest.mark.parametrize(("number", "words"), [(19, "vanished"), (28, "is full"), (5, "vanished or failed")])
def test_trouble_of_the_device_is_named(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str):
    real = FileVolume.write_at

    def fail_late(disk: FileVolume, offset: int, content: bytes) -> None:
        if offset > 8 * MIB:
            raise OSError(number, os.strerror(number))
        real(disk, offset, content)

    monkeypatch.setattr(FileVolume, "write_at", fail_late)
    with pytest.raises(FlashError, match=f"{words}.* does not boot"):
        write_card(image, tmp_path / "card")


def test_a_read_only_target_is_said(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "card").touch()

    def refuse(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(volume.os, "open", refuse)
    with pytest.raises(FlashError, match="read-only"):
        write_card(image, tmp_path / "card")


def test_a_block_map_writes_only_what_it_names(image: Path, tmp_path: Path):
    content = image.read_bytes()
    block = 4096
    blocks = -(-len(content) // block)
    used = [n for n in range(blocks) if content[n * block : (n + 1) * block].strip(b"\x00")]
    ranges: list[list[int]] = []
    for n in used:
        if ranges and ranges[-1][1] == n - 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    rows = "".join(
        f'<Range chksum="{hashlib.sha256(content[a * block : (b + 1) * block]).hexdigest()}">{a}-{b}</Range>' if a != b
        else f'<Range chksum="{hashlib.sha256(content[a * block : (b + 1) * block]).hexdigest()}">{a}</Range>'
        for a, b in ranges
    )
    text = (
        f'<?xml version="1.0" ?><bmap version="2.0"><ImageSize>{len(content)}</ImageSize><BlockSize>{block}</BlockSize>'
        f"<BlocksCount>{blocks}</BlocksCount><MappedBlocksCount>{len(used)}</MappedBlocksCount><ChecksumType>sha256</ChecksumType>"
        f"<BmapFileChecksum>{'0' * 64}</BmapFileChecksum><BlockMap>{rows}</BlockMap></bmap>"
    )
    path = tmp_path / "os.bmap"
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))
    block_map = read_block_map(path)
    target = tmp_path / "card"
    written = write_card(image, target, block_map=block_map, customise=put_bundle)
    assert written.written_bytes == block_map.mapped_bytes < len(content)
    assert target.read_bytes()[-9 * MIB : -MIB] == content[-9 * MIB : -MIB]
    assert boot_file(target, "cmdline.txt") == b"console=tty1 rootwait"

    wrong = tmp_path / "wrong.img"
    wrong.write_bytes(content[:-2 * MIB] + bytes([content[-2 * MIB] ^ 1]) + content[-2 * MIB + 1 :])
    with pytest.raises(FlashError, match="do not match the block map"):
        write_card(wrong, tmp_path / "card2", block_map=block_map)
    path.write_text(path.read_text().replace("<BlocksCount>", "<BlocksCount>1"))
    with pytest.raises(FlashError, match="does not match its own checksum"):
        read_block_map(path)
