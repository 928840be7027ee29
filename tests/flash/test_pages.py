"""Every command on the flashing pages is run here, on image files and in trees, or says that it needs the hardware."""

from __future__ import annotations

import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.coordinator.fleet import settings_file
from tests.edge_agent.jetson import make_jetson_tree
from tests.flash.images import boot_file, make_image, needs_image_tools
from tests.flash.test_first_boot import SYSTEMS

ROOT = Path(__file__).parents[2]
HARDWARE = "# hardware:"
PAGES = ("flashing-raspberry-pi.md", "flashing-jetson.md", "flashing-running-board.md")
PROGRAMS = ("coordinator", "edge-agent", "mkdir", "sudo edge-agent")  # what a page may tell people to run without the hardware

pytestmark = [pytest.mark.slow, needs_image_tools]


def commands(page: str) -> list[str]:
    """The indented lines, in order, without those that need the hardware."""
    lines = re.findall(r"^    (\S.*)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert lines, f"{page} has no commands"
    return [line for line in lines if HARDWARE not in line]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with what a person has at hand: an image, settings, a key, a passphrase, NVIDIA's tree, a running board's root."""
    image = make_image(tmp_path / "raspios-lite.img", SYSTEMS["cloud-init"], root_megabytes=1)
    with lzma.open(tmp_path / "raspios-lite.img.xz", "wb", preset=0) as packed:
        packed.write(image.read_bytes())
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519.pub").write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMx0 ann@laptop\n")
    (tmp_path / "wifi.txt").write_text("correct horse battery\n")
    (tmp_path / "agent.toml").write_text('bundle_file = "/var/lib/mobillm-fleet/device.bundle"\n')
    make_jetson_tree(tmp_path)
    (tmp_path / "board" / "etc" / "systemd" / "system").mkdir(parents=True)
    (tmp_path / "board" / "usr" / "lib" / "systemd").mkdir(parents=True)
    settings_file(tmp_path, 1883)
    assert run(tmp_path, "coordinator init").returncode == 0
    return tmp_path


def run(desk: Path, command: str) -> subprocess.CompletedProcess[str]:
    """As on the page, but a file stands for the disk, and a tree for the running board."""
    command = command.removeprefix("sudo ")
    command = command.replace("/dev/sdX --fleet", "'card-{device}.img' --fleet").replace("/dev/sdX", "card.img")
    if command.startswith("edge-agent install") and "--root" not in command:
        command += " --root board"
    assert "/dev/" not in command, command
    environment = {
        **os.environ, "HOME": str(desk), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COORDINATOR_CONFIG": str(desk / "coordinator.toml"),
    }
    return subprocess.run(["bash", "-c", command], cwd=desk, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_works_or_says_what_it_needs(desk: Path, page: str):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    if table := re.search(r"```csv\n(.*?)```", text, re.DOTALL):
        (desk / "fleet.csv").write_text(table[1])
    for command in commands(page):
        assert command.startswith(PROGRAMS), f"{page}: {command!r} is neither run here nor marked with {HARDWARE!r}"
        done = run(desk, command)
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout}{done.stderr}"


def test_the_cards_of_the_page_are_unlike(desk: Path):
    page = "flashing-raspberry-pi.md"
    table = re.search(r"```csv\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    assert table
    (desk / "fleet.csv").write_text(table[1])
    for command in commands(page):
        assert run(desk, command).returncode == 0
    cards = [desk / name for name in ("card.img", "card-study.img", "card-bedroom.img")]
    for path in ("user-data", "meta-data", "mobillm/device.bundle"):
        assert len({boot_file(card, path) for card in cards}) == 3, path
    for card in cards:
        assert b"correct horse battery" not in card.read_bytes()  # only the derived key
    assert {path.name for path in (desk / "labels").glob("*.txt")} == {"study.txt", "bedroom.txt"}


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "flashing.md").read_text(encoding="utf-8")
    assert all(f"({page})" in index for page in PAGES)
    assert {path.name for path in (ROOT / "docs").glob("flashing-*.md")} == set(PAGES)
