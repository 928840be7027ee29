"""The device layers of macOS and Windows, as far as that can be seen elsewhere.

Their lists below are written after the documentation (diskutil(8) and what other programs read from it; MSFT_Disk and
MSFT_Partition), not recorded from a machine.
"""

from __future__ import annotations

import errno
import json
import os
import plistlib
import random
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest
from typer.testing import CliRunner

from edge_agent.cli import app
from edge_agent.flash import disks, disks_linux, disks_macos, disks_windows
from edge_agent.flash.disks import Disk, Mount, check_target, refusals
from edge_agent.flash.disks_macos import DescriptorDevice
from edge_agent.flash.errors import FlashError
from edge_agent.flash.volume import CHUNK_BYTES, SectorVolume
from tests.flash.images import MIB, boot_file, make_image, needs_image_tools
from tests.flash.test_first_boot import SYSTEMS, make_bundle

GB = 10**9

# macOS.


def mac_card(number: int = 4, *, mounted: str | None = None, content: str = "Windows_FAT_32", **about: object) -> tuple[dict[str, object], dict[str, object]]:
    """A row of `diskutil list -plist` and what `diskutil info -plist` says of it."""
    name = f"disk{number}"
    part: dict[str, object] = {"DeviceIdentifier": f"{name}s1", "Content": content, "Size": GB, "VolumeName": "bootfs"}
    if mounted:
        part["MountPoint"] = mounted
    row = {"DeviceIdentifier": name, "Content": "FDisk_partition_scheme", "OSInternal": False, "Size": 32 * GB, "Partitions": [part]}
    info = {
        "DeviceIdentifier": name, "DeviceNode": f"/dev/{name}", "WholeDisk": True, "VirtualOrPhysical": "Physical", "TotalSize": 32 * GB, "Size": 32 * GB,
        "MediaName": "STORAGE DEVICE", "BusProtocol": "USB", "Internal": False, "RemovableMedia": True, "Ejectable": True, "WritableMedia": True,
        "DeviceBlockSize": 512, "SystemImage": False, "OSInternalMedia": False,
    }
    return row, {**info, **about}


def mac(*cards: tuple[dict[str, object], dict[str, object]]) -> list[Disk]:
    def ask(arguments: list[str]) -> bytes:
        if arguments == ["list", "-plist"]:
            return plistlib.dumps({"AllDisks": [], "AllDisksAndPartitions": [row for row, _ in cards], "WholeDisks": [row["DeviceIdentifier"] for row, _ in cards]})
        assert arguments[:2] == ["info", "-plist"]
        return plistlib.dumps(next(info for row, info in cards if row["DeviceIdentifier"] == arguments[2]))

    return disks_macos.list_disks(ask)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (mac_card(), None),
        (mac_card(BusProtocol="Secure Digital", Internal=True), None),  # a MacBook's own reader
        (mac_card(RemovableMedia=False), None),  # a USB reader that does not say so
        (mac_card(mounted="/Volumes/bootfs"), "/dev/disk4s1 is mounted on /Volumes/bootfs (--unmount lets go of it)"),
        (mac_card(mounted="/"), "mounted on /"),
        (mac_card(mounted="/System/Volumes/Data"), "mounted on /System/Volumes/Data"),
        (mac_card(content="Apple_APFS"), "holds an APFS container"),
        (mac_card(content="Apple_CoreStorage"), "CoreStorage"),
        (mac_card(BusProtocol="PCI-Express", Internal=True, RemovableMedia=False), "not removable"),
        (mac_card(BusProtocol="Thunderbolt", RemovableMedia=False), "not removable"),
        (mac_card(SystemImage=True), "belongs to macOS"),
        (mac_card(WritableMedia=False), "read-only"),
        (mac_card(VirtualOrPhysical="Virtual"), "of type virtual"),
        (mac_card(TotalSize=0, Size=0), "no card"),
        (mac_card(TotalSize=GB), "the image needs"),
        (mac_card(TotalSize=2000 * GB), "more than"),
    ],
)
def test_what_may_be_written_on_a_mac(card: tuple[dict[str, object], dict[str, object]], words: str | None):
    (found,) = mac(card)
    reasons = refusals(found, 4 * GB)
    assert bool(reasons) == (words is not None), reasons
    if words:
        assert any(words in reason for reason in reasons), reasons


def test_a_mac_lists_what_stores_a_container_not_the_container():
    synthesized = ({"DeviceIdentifier": "disk1", "APFSPhysicalStores": [{"DeviceIdentifier": "disk0s2"}], "APFSVolumes": [{"MountPoint": "/"}]}, {})
    assert [disk.path for disk in mac(mac_card(0), synthesized, mac_card(4))] == ["/dev/disk0", "/dev/disk4"]


@pytest.mark.parametrize("answer", [b"", b"not a plist", plistlib.dumps({}), plistlib.dumps({"AllDisksAndPartitions": [{}]})])
def test_a_mac_that_says_something_unknown_writes_nothing(answer: bytes):
    with pytest.raises(FlashError, match="nothing is written"):
        disks_macos.list_disks(lambda _: answer)


def test_a_macs_disks_by_both_their_names():
    for target, name in (("/dev/disk4", "/dev/disk4"), ("/dev/rdisk4", "/dev/disk4"), ("/dev/disk4s1", "/dev/disk4s1"), ("card.img", None), ("/dev/null", None)):
        assert disks_macos.disk_name(Path(target)) == name
    assert disks_macos.raw_path("/dev/disk4") == "/dev/rdisk4"
    (card,) = mac(mac_card(mounted="/Volumes/bootfs"))
    assert check_target(Path("/dev/rdisk4"), GB, unmount=True, disks=[card], layer=disks_macos) == card
    with pytest.raises(FlashError, match="no whole disk"):
        check_target(Path("/dev/disk4s1"), GB, disks=[card], layer=disks_macos)


# Windows.


def windows(card: dict[str, object], *parts: dict[str, object]) -> list[Disk]:
    row = {"Number": 2, "FriendlyName": "Generic STORAGE DEVICE", "Size": 32 * GB, "BusType": "USB", "IsBoot": False, "IsSystem": False, "IsReadOnly": False, "IsClustered": False}
    return disks_windows.list_disks(json.dumps({"disks": [{**row, **card}], "partitions": list(parts)}))


def part(*paths: str, **more: object) -> dict[str, object]:
    return {"DiskNumber": 2, "PartitionNumber": 1, "AccessPaths": list(paths) or None, "IsBoot": False, "IsSystem": False, **more}


VOLUME = "\\\\?\\Volume{0b8f4d2e-0000-0000-0000-100000000000}\\"


@pytest.mark.parametrize(
    ("card", "parts", "words"),
    [
        ({}, (), None),
        ({"BusType": "SD"}, (), None),
        ({"BusType": 12}, (), None),  # the number behind the name
        ({}, (part(VOLUME),), None),  # nobody sees it
        ({}, (part(),), None),
        ({}, (part("E:\\", VOLUME, DiskNumber=3),), None),  # another disk's
        ({}, (part(AccessPaths={"value": ["E:\\"], "Count": 1}),), "is mounted on E:"),  # as some versions write lists
        ({}, (part(AccessPaths="E:\\"),), "is mounted on E:"),
        ({}, (part("E:\\", VOLUME),), "is mounted on E:\\ (--unmount lets go of it)"),
        ({}, (part("C:\\", VOLUME, IsBoot=True),), "belongs to Windows"),
        ({"IsBoot": True}, (), "has Windows on it"),
        ({"IsSystem": True}, (), "starts this computer"),
        ({"BusType": "NVMe"}, (), "not removable"),
        ({"BusType": "SATA"}, (), "not removable"),
        ({"BusType": "File Backed Virtual"}, (), "of type file backed virtual"),
        ({"IsReadOnly": True}, (), "read-only"),
        ({"Size": 0}, (), "no card"),
        ({"Size": GB}, (), "the image needs"),
        ({"Size": 2000 * GB}, (), "more than"),
    ],
)
def test_what_may_be_written_on_windows(card: dict[str, object], parts: tuple[dict[str, object], ...], words: str | None):
    (found,) = windows(card, *parts)
    reasons = refusals(found, 4 * GB)
    assert bool(reasons) == (words is not None), reasons
    if words:
        assert any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize("answer", ["", "[]", "{}", '{"disks": [{}], "partitions": []}', '{"disks": [{"Number": 1}], "partitions": null}'])
def test_windows_that_says_something_unknown_writes_nothing(answer: str):
    with pytest.raises(FlashError, match="nothing is written"):
        disks_windows.list_disks(answer)


def test_windows_disks_by_their_names():
    for target in (r"\\.\PhysicalDrive2", r"\\.\physicaldrive2", "//./PhysicalDrive2", "\\\\?\\PhysicalDrive2\\"):
        assert disks_windows.disk_name(PureWindowsPath(target)) == r"\\.\PhysicalDrive2"  # type: ignore[arg-type]
    for target in ("C:\\card.img", r"\\.\PhysicalDrive2x", r"\\server\PhysicalDrive2", r"\\.\E:"):
        assert disks_windows.disk_name(PureWindowsPath(target)) is None  # type: ignore[arg-type]


def test_every_volume_of_a_windows_disk_is_locked_with_or_without_a_letter():
    assert disks_windows.volume_paths([part("E:\\", VOLUME), part(), part(VOLUME)]) == [VOLUME.rstrip("\\")] * 2


def test_windows_control_codes_are_those_of_the_documentation():
    """As Microsoft's pages and winioctl.h print them."""
    assert (disks_windows.LOCK_VOLUME, disks_windows.DISMOUNT_VOLUME) == (0x00090018, 0x00090020)
    assert (disks_windows.GET_GEOMETRY, disks_windows.GET_LENGTH) == (0x00070000, 0x0007405C)
    assert (disks_windows.EJECT_MEDIA, disks_windows.UPDATE_PROPERTIES) == (0x002D4808, 0x00070140)


# Whole sectors.


class StrictDevice:
    """A file that takes whole sectors alone, from aligned memory, a few at a time: as raw disks of macOS and Windows do."""

    def __init__(self, path: Path, sector: int) -> None:
        self.sector, self.size = sector, path.stat().st_size
        self.failing = False
        self._file = path.open("r+b", buffering=0)

    def _check(self, view: memoryview, offset: int) -> memoryview:
        import ctypes

        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        if self.failing or offset % self.sector or len(view) % self.sector or address % self.sector or offset + len(view) > self.size:
            raise OSError(errno.EINVAL, f"{len(view)} bytes at {offset}")
        return view[: 64 * self.sector]

    def read_into(self, view: memoryview, offset: int) -> int:
        self._file.seek(offset)
        return self._file.readinto(self._check(view, offset))

    def write_from(self, view: memoryview, offset: int) -> int:
        self._file.seek(offset)
        return self._file.write(self._check(view, offset))

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def strict(path: Path, sector: int) -> SectorVolume:
    return SectorVolume(StrictDevice(path, sector), path)


@pytest.mark.parametrize("sector", [512, 4096])
def test_any_piece_of_a_raw_disk_is_read_and_written(tmp_path: Path, sector: int):
    """The same pieces in memory and on the disk; what is beside them in the same sectors stays."""
    path, chance = tmp_path / "disk", random.Random(sector)
    expected = bytearray(chance.randbytes(12 * MIB))
    path.write_bytes(expected)
    with strict(path, sector) as volume:
        places = [(0, 1), (sector - 1, 2), (len(expected) - 3, 3), (5, CHUNK_BYTES), (sector, CHUNK_BYTES + sector + 1), (0, len(expected))]
        places += [(chance.randrange(len(expected) - 70_000), chance.randrange(1, 70_000)) for _ in range(50)]
        for offset, length in places:
            content = chance.randbytes(length)
            expected[offset : offset + length] = content
            volume.write_at(offset, content)
            assert volume.read_at(offset, length) == content
            around = max(offset - 100, 0)
            assert volume.read_at(around, length + 200) == expected[around : around + length + 200]
        volume.sync()
        assert volume.read_at(len(expected) - 10, 100) == expected[-10:]
        with pytest.raises(OSError, match="the disk ends") as full:
            volume.write_at(len(expected) - 10, bytes(11))
        assert full.value.errno == errno.ENOSPC
    assert path.read_bytes() == expected


def test_a_raw_disk_that_fails_says_why(tmp_path: Path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    device = StrictDevice(path, 512)
    with SectorVolume(device, path) as volume:
        device.failing = True
        with pytest.raises(OSError, match="512 bytes at 0"):
            volume.read_at(0, 512)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT, which asks for aligned sectors as raw disks do")
def test_the_macs_device_on_a_file_that_takes_whole_sectors_alone(tmp_path: Path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(5 * MIB))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    with SectorVolume(DescriptorDevice(descriptor, 4096, 5 * MIB), path) as volume:
        volume.write_at(4 * MIB - 7, b"across two chunks")
        volume.sync()
        assert volume.read_at(4 * MIB - 8, 19) == b"\0across two chunks\0"
    assert path.read_bytes()[4 * MIB - 7 :][:17] == b"across two chunks"


class RawLayer:
    """A system as macOS and Windows are: raw sectors, disks mounted when they are plugged in. A file stands for its one disk."""

    RIGHTS = "be an administrator"

    def __init__(self, path: Path, *, mounted: bool = True) -> None:
        self.path, self.done = path, list[str]()
        self.mounted = mounted

    def list_disks(self) -> list[Disk]:
        mounts = (Mount(f"{self.path} part 1", "/Volumes/bootfs"),) if self.mounted else ()
        return [Disk(str(self.path), self.path.stat().st_size, "Card", "USB", removable=True, read_only=False, kind="disk", used_for=(), mounts=mounts)]

    def disk_name(self, target: Path) -> str | None:
        return str(target) if target == self.path else None

    def open_volume(self, disk: str) -> SectorVolume:
        if self.mounted:
            raise OSError(errno.EBUSY, "Resource busy")
        self.done.append("opened")
        return strict(Path(disk), 512)

    def open_reader(self, disk: str) -> SectorVolume:
        return strict(Path(disk), 512)

    def unmount(self, disk: Disk) -> None:
        assert disk.mounts
        self.mounted = False
        self.done.append("unmounted")

    def eject(self, disk: str) -> str:
        self.done.append("ejected")
        return f"{disk} is gone"


@needs_image_tools
def test_a_card_is_made_through_raw_sectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = make_image(tmp_path / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    card = tmp_path / "disk"
    card.write_bytes(b"\xee" * (image.stat().st_size + 3 * MIB))
    (tmp_path / "bundle").write_text(make_bundle().to_text())
    layer = RawLayer(card)
    arguments = ["flash", "--image", str(image), "--target", str(card), "--bundle", str(tmp_path / "bundle")]
    for module in ("disks", "card", "command"):
        monkeypatch.setattr(f"edge_agent.flash.{module}.this_system", lambda: layer)
    refused = CliRunner().invoke(app, [*arguments, "--yes"])
    assert "is mounted on /Volumes/bootfs (--unmount lets go of it)" in refused.output
    assert "nobody is there to confirm" in CliRunner().invoke(app, [*arguments, "--unmount"]).output
    assert layer.done == []
    result = CliRunner().invoke(app, [*arguments, "--unmount", "--yes"])
    assert result.exit_code == 0, result.output
    assert "no uncached reading" not in result.output
    assert layer.done == ["unmounted", "opened", "ejected"]
    assert b"kitchen" in boot_file(card, "mobillm/flashed.json")
    content = card.read_bytes()
    assert content[-4 * MIB : -3 * MIB] == image.read_bytes()[-MIB:]
    assert content[-3 * MIB :] == b"\xee" * (3 * MIB)


# Everywhere.


@needs_image_tools
def test_a_file_is_made_where_python_has_none_of_unix(tmp_path: Path):
    """Windows' Python lacks these modules and functions; importing all of it and making a card need none of them."""
    image = make_image(tmp_path / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    (tmp_path / "bundle").write_text(make_bundle().to_text())
    program = (
        "import os, sys, pkgutil, platform, importlib, subprocess, tempfile\nfrom pathlib import Path\n"
        "import rich.console, typer, getpass\n"
        "for name in ('fcntl', 'termios', 'resource', 'pwd', 'grp'): sys.modules[name] = None\n"
        "for name in ('pread', 'preadv', 'pwrite', 'pwritev', 'O_DIRECT', 'O_CLOEXEC', 'posix_fadvise', 'geteuid', 'getuid'):\n"
        "    if hasattr(os, name): delattr(os, name)\n"
        "platform.system = lambda: 'Windows'\n"
        "import edge_agent.flash\n"
        "for module in pkgutil.iter_modules(edge_agent.flash.__path__): importlib.import_module(f'edge_agent.flash.{module.name}')\n"
        "from edge_agent.flash import disks_windows\n"
        "assert edge_agent.flash.disks.this_system() is disks_windows\n"
        "from edge_agent.cli import main\nmain()\n"
    )
    arguments = ["flash", "--image", image, "--target", tmp_path / "card", "--bundle", tmp_path / "bundle"]
    result = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no uncached reading" in result.stdout
    assert b"kitchen" in boot_file(tmp_path / "card", "mobillm/flashed.json")


@needs_image_tools
def test_an_unknown_system_writes_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edge_agent.flash.disks.platform.system", lambda: "Plan 9")
    image = make_image(tmp_path / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    (tmp_path / "bundle").write_text(make_bundle().to_text())
    assert "cannot be told apart on Plan 9" in CliRunner().invoke(app, ["flash", "--list"]).output
    arguments = ["flash", "--image", str(image), "--bundle", str(tmp_path / "bundle"), "--yes"]
    assert "neither a disk nor a file" in CliRunner().invoke(app, [*arguments, "--target", "/dev/null"]).output
    assert CliRunner().invoke(app, [*arguments, "--target", str(tmp_path / "card")]).exit_code == 0


def test_every_layer_has_all_of_the_interface():
    names = {name for name in vars(disks.DeviceLayer) if not name.startswith("_")}
    assert len(names) == 7
    for layer in (disks_linux, disks_macos, disks_windows):
        assert not {name for name in names if not hasattr(layer, name)}, layer
