"""The image's recipe, as far as it goes without building one: package list, files, layout, file systems, os_list.json."""

import configparser
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
from datetime import datetime, timezone

import pytest
import tomllib
import yaml

from edge_agent.flash.fat import FatPartition
from edge_agent.flash.first_boot import detect
from edge_agent.flash.image import disk
from edge_agent.flash.image.os_list import os_list, write_os_list
from edge_agent.flash.image.root import FILES, set_times
from edge_agent.flash.image.tree import EPOCH, ImageError, packages, run
from edge_agent.flash.partitions import boot_partition
from edge_agent.flash.volume import FileVolume
from tests.flash.images import SBIN, needs_image_tools

needs_ext4_tools = pytest.mark.skipif(
    not all(shutil.which(name, path=SBIN) for name in ("mke2fs", "debugfs", "e2fsck")), reason="e2fsprogs is not installed (apt install e2fsprogs)"
)
pytestmark = needs_image_tools


def make_tree(folder):
    """A root as small as can be, with the image's own files."""
    root = folder / "root"
    shutil.copytree(FILES, root)
    for name, content in {"usr/bin/program": b"program" * 1000, "var/lib/state": b"", "boot/firmware/overlays/a long name.dtbo": b"overlay"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "bin").symlink_to("usr/bin")
    set_times(root)
    return root


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "made.img"
    return path, disk.make_disk(make_tree(tmp_path), path)


def test_no_package_is_listed_twice_and_comments_are_none():
    listed = packages()
    assert len(listed) == len(set(listed))
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name) for name in listed)
    assert {"systemd", "cloud-init", "linux-image-arm64", "python3", "cloud-guest-utils"} <= set(listed)


def test_partitions_follow_each_other_from_4_mib_on():
    layout = disk.Layout.of(900_000_000, 80_000_000)
    assert layout.boot.start == 4 * disk.MIB
    assert layout.root.start == layout.boot.start + layout.boot.size
    assert layout.var.start == layout.root.start + layout.root.size
    assert layout.total == layout.var.start + layout.var.size
    assert all(number % (4 * disk.MIB) == 0 for part in (layout.boot, layout.root, layout.var) for number in (part.start, part.size))
    assert layout.root.size >= 900_000_000 + disk.ROOT_SPARE


def test_disk_id_is_one_everywhere():
    fstab = (FILES / "etc/fstab").read_text()
    cmdline = (FILES / "boot/firmware/cmdline.txt").read_text()
    assert {*re.findall(r"PARTUUID=(\w+)-", fstab + cmdline)} == {disk.DISK_ID}
    assert "\n" not in cmdline


def test_units_are_ini_and_what_they_run_is_there():
    for path in FILES.rglob("*.service"):
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str
        parser.read(path)
        program = parser["Service"]["ExecStart"].split()[0]
        if program.startswith("/usr/lib/mobillm-fleet"):
            script = FILES / program[1:]
            assert script.stat().st_mode & stat.S_IXUSR
            subprocess.run(["sh", "-n", script], check=True)


def test_configuration_files_can_be_read():
    assert yaml.safe_load((FILES / "etc/cloud/cloud.cfg.d/90-mobillm.cfg").read_text())["datasource"]["NoCloud"]["seedfrom"] == "file:///boot/firmware/"
    assert tomllib.loads((FILES / "etc/mobillm-fleet/agent.toml").read_text()) == {"bundle_file": "/var/lib/mobillm-fleet/device.bundle"}


def test_seal_makes_the_root_read_only_and_nothing_else():
    command = re.search(r"sed -i '([^']+)'", (FILES / "usr/lib/mobillm-fleet/seal-root").read_text()).group(1)
    before = (FILES / "etc/fstab").read_text()
    after = subprocess.run(["sed", command], input=before, capture_output=True, text=True, check=True).stdout
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert changed == [f"PARTUUID={disk.DISK_ID}-02 / ext4 ro,noatime 0 1"]
    assert subprocess.run(["sed", command], input=after, capture_output=True, text=True, check=True).stdout == after


@needs_ext4_tools
def test_flash_finds_the_boot_partition_and_its_system(image):
    path, layout = image
    with FileVolume(path) as volume:
        part = boot_partition(volume)
        assert part.start == layout.boot.start
        boot = FatPartition(volume, part.start)
        assert detect(boot) == "cloud-init"
        assert boot.read("cmdline.txt") == (FILES / "boot/firmware/cmdline.txt").read_bytes()
        assert boot.read("overlays/a long name.dtbo") == b"overlay"


@needs_ext4_tools
def test_file_systems_are_sound_and_hold_the_tree(image, tmp_path):
    path, layout = image
    for part, name, size in ((layout.root, "/usr/bin/program", 7000), (layout.var, "/lib/state", 0)):
        content = tmp_path / "partition"
        with path.open("rb") as file:
            file.seek(part.start)
            content.write_bytes(file.read(part.size))
        run(["e2fsck", "-f", "-n", str(content)])
        shown = run(["debugfs", "-R", f"stat {name}", str(content)])
        assert f"Size: {size}" in shown
        times = re.findall(r"[acm]time: 0x([0-9a-f]+)", shown)
        assert len(times) >= 3
        assert {int(value, 16) for value in times} == {EPOCH}


@needs_ext4_tools
def test_the_same_tree_gives_the_same_image(tmp_path):
    hashes = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        disk.make_disk(make_tree(tmp_path / name), tmp_path / name / "made.img")
        hashes.add(hashlib.sha256((tmp_path / name / "made.img").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_os_list_tells_the_true_sizes_and_hashes(tmp_path):
    image, packed = tmp_path / "made.img", tmp_path / "made.img.zst"
    image.write_bytes(os.urandom(3_000_000))
    packed.write_bytes(os.urandom(1000))
    write_os_list(tmp_path / "os_list.json", os_list(image, packed, "https://images.example/made.img.zst", datetime(2026, 11, 26, tzinfo=timezone.utc)))
    entry = json.loads((tmp_path / "os_list.json").read_text())["os_list"][0]
    assert entry["extract_size"] == 3_000_000
    assert entry["extract_sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert entry["image_download_size"] == 1000
    assert entry["image_download_sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert entry["release_date"] == "2026-11-26"
    assert entry["init_format"] == "cloudinit"
    assert {"name", "description", "url", "devices"} <= entry.keys()


def test_a_failing_tool_is_named_with_its_words():
    with pytest.raises(ImageError, match="not installed"):
        run(["no-such-program-here"])
    with pytest.raises(ImageError, match=r"(?s)ls .*failed: .*no-such-file"):
        run(["ls", "/no-such-file"])
