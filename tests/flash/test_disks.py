"""Which disks may be written: recorded listings, and loop devices over files of our own. No real disk is ever named to the writer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.flash.disks import Disk, Mount, check_target, refusals
from edge_agent.flash.disks_linux import list_disks, unmount
from edge_agent.flash.errors import FlashError

GB = 10**9


def row(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "name": "sdx", "path": "/dev/sdx", "pkname": None, "type": "disk", "size": 32 * GB, "rm": True, "hotplug": True, "ro": False,
        "tran": "usb", "model": "Card Reader ", "mountpoints": [None], "fstype": None,
    }
    return {**base, **changes}


def listing(*rows: dict[str, object]) -> str:
    return json.dumps({"blockdevices": list(rows)})


PARTITION = {"name": "sdx1", "path": "/dev/sdx1", "pkname": "sdx", "type": "part", "size": GB, "rm": True, "ro": False, "tran": None}


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        (row(), None),
        (row(tran="mmc", rm=False, hotplug=False, path="/dev/mmcblk0"), None),
        (row(children=[{**PARTITION, "mountpoints": [None]}]), None),
        (row(children=[{**PARTITION, "mountpoints": ["/"]}]), "mounted on /"),
        (row(children=[{**PARTITION, "mountpoints": ["/media/ann/photos", "/srv"]}]), "mounted on /media/ann/photos"),
        (row(children=[{**PARTITION, "mountpoints": ["[SWAP]"]}]), "swap"),
        (row(mountpoints=["/data"]), "mounted on /data"),
        (row(children=[{**PARTITION, "mountpoints": [None], "children": [{"path": "/dev/mapper/vg-home", "type": "lvm", "mountpoints": ["/home"]}]}]), "lvm"),
        (row(children=[{**PARTITION, "mountpoints": [None], "children": [{"path": "/dev/md0", "type": "raid1", "mountpoints": [None]}]}]), "raid1"),
        (row(children=[{**PARTITION, "mountpoints": [None], "children": [{"path": "/dev/mapper/c", "type": "crypt", "mountpoints": [None]}]}]), "crypt"),
        (row(tran="sata", rm=False, hotplug=False), "not removable"),
        (row(tran="nvme", rm=False, hotplug=False), "not removable"),
        (row(ro=True), "read-only"),
        (row(size=0), "no card"),
        (row(size=GB), "the image needs"),
        (row(size=2000 * GB), "more than"),
        (row(type="loop", tran=None), "type loop"),
    ],
)
def test_what_may_be_written(disk: dict[str, object], words: str | None):
    (found,) = list_disks(listing(disk))
    reasons = refusals(found, 4 * GB)
    assert bool(reasons) == (words is not None), reasons
    if words:
        assert any(words in reason for reason in reasons), reasons


def test_only_what_a_desktop_mounted_can_be_let_go():
    (plugged,) = list_disks(listing(row(children=[{**PARTITION, "mountpoints": ["/media/ann/bootfs"]}])))
    assert any("(--unmount lets go of it)" in reason for reason in refusals(plugged, GB))
    assert refusals(plugged, GB, unmount=True) == []
    (both,) = list_disks(listing(row(children=[{**PARTITION, "mountpoints": ["/media/ann/bootfs", "/"]}])))
    assert refusals(both, GB, unmount=True) == ["it is in use: /dev/sdx1 is mounted on /"]


def test_partitions_and_optical_drives_are_not_listed():
    assert list_disks(listing({**row(), "type": "rom"}, {**row(), "type": "part"})) == []


@pytest.mark.parametrize("target", ["/dev/no-such-disk", "/no/such/folder/card.img", "/dev/null", "/"])
def test_what_is_neither_a_disk_nor_a_file(target: str):
    with pytest.raises(FlashError, match=r"does not exist|neither a disk nor a file"):
        check_target(Path(target), 1, disks=[])


def test_a_new_file_is_let_through(tmp_path: Path):
    assert check_target(tmp_path / "card.img", 10**12) is None


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    if os.geteuid() != 0 or shutil.which("losetup", path="/usr/sbin:/sbin") is None:
        pytest.skip("loop devices need root and losetup")
    backing = tmp_path / "backing.img"
    with backing.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    made = subprocess.run(["/usr/sbin/losetup", "--find", "--show", backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device is to be had here: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device, backing
    subprocess.run(["/usr/sbin/losetup", "--detach", device], check=False)


def test_unmounting(loop_device: tuple[str, Path], tmp_path: Path):
    device, _ = loop_device
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", device], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", device, place], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    disk = Disk(device, GB, "", "usb", removable=True, read_only=False, kind="disk", used_for=(), mounts=(Mount(device, str(place)),))
    try:
        with (place / "file").open("w"), pytest.raises(FlashError, match=f"{place} cannot be unmounted: .*; close what uses it"):
            unmount(disk)
        unmount(disk)
        assert not place.is_mount()
    finally:
        if place.is_mount():
            subprocess.run(["umount", place], check=True)


def test_a_loop_device_is_refused_as_it_is_and_when_mounted(loop_device: tuple[str, Path], tmp_path: Path):
    device, backing = loop_device
    with pytest.raises(FlashError, match="type loop"):
        check_target(Path(device), 1024)
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", device], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", device, place], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        before = backing.read_bytes()
        with pytest.raises(FlashError, match=f"mounted on {place}"):
            check_target(Path(device), 1024)
        # The second guard: were it let through, it could not be opened.
        from edge_agent.flash.card import write_card

        with pytest.raises(FlashError, match="in use"):
            write_card(tmp_path / "none.img", Path(device))
        assert backing.read_bytes() == before
    finally:
        subprocess.run(["umount", place], check=True)
