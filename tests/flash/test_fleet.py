"""A batch of cards (files): interrupted, resumed, three unlike identities, and what is wrong said before the first card."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edge_agent.cli import app
from edge_agent.flash.command import FlashOptions
from edge_agent.flash.errors import FlashError
from edge_agent.flash.fleet import Ledger, flash_fleet, read_fleet
from tests.flash.images import boot_file, make_image, needs_image_tools
from tests.flash.test_first_boot import SYSTEMS, make_bundle

DEVICES = ("kitchen", "bedroom", "study")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "bundles").mkdir()
    for number, device in enumerate(DEVICES):
        bundle = make_bundle(device, claim=f"claim-{number:016x}", claim_key=f"secret of {device}")
        (tmp_path / "bundles" / f"{device}.bundle.json").write_text(bundle.to_text())
    path = tmp_path / "fleet.csv"
    path.write_text("device,hostname,timezone\nkitchen,,\nbedroom,upstairs,Europe/Paris\nstudy,,\n")
    return path


def arguments(fleet: Path, image: Path) -> list[str]:
    folder = fleet.parent
    return [
        "flash", "--image", str(image), "--fleet", str(fleet), "--target", str(folder / "card-{device}"),
        "--bundles", str(folder / "bundles"), "--labels", str(folder / "labels"), "--timezone", "Europe/London",
    ]


@needs_image_tools
def test_an_interrupted_batch_goes_on_where_it_was(fleet: Path):
    folder = fleet.parent
    image = make_image(folder / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    # kill -9 while the third card is read back
    program = (
        "import os, signal, sys\nfrom edge_agent.flash import command\nreal, cards = command.write_card, []\n"
        "def write(image, target, **more):\n"
        "    cards.append(target)\n"
        "    def progress(stage, done, total):\n"
        "        if len(cards) == 3 and stage == 'verify': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(image, target, **{**more, 'progress': progress})\n"
        "command.write_card = write\nfrom edge_agent.cli import main\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments(fleet, image)], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    ledger = Ledger(folder / "fleet.csv.ledger.jsonl")
    assert [ledger.made(device, f"claim-{n:016x}") for n, device in enumerate(DEVICES)] == [True, True, False]
    finished = {device: (folder / f"card-{device}").stat().st_mtime_ns for device in DEVICES[:2]}

    result = CliRunner().invoke(app, [*arguments(fleet, image), "--yes"])
    assert result.exit_code == 0, result.output
    assert "2 of 3 cards are made already" in result.output
    assert finished == {device: (folder / f"card-{device}").stat().st_mtime_ns for device in DEVICES[:2]}

    bundles = [json.loads(boot_file(folder / f"card-{device}", "mobillm/device.bundle")) for device in DEVICES]
    assert [bundle["device"] for bundle in bundles] == list(DEVICES)
    assert len({bundle["claim"] for bundle in bundles}) == len({bundle["claim_key"] for bundle in bundles}) == 3
    assert b'"timezone": "Europe/Paris"' in boot_file(folder / "card-bedroom", "user-data")
    assert b'"timezone": "Europe/London"' in boot_file(folder / "card-study", "user-data")
    assert b'"hostname": "upstairs"' in boot_file(folder / "card-bedroom", "user-data")
    for device in DEVICES:
        assert f"device: {device}" in (folder / "labels" / f"{device}.txt").read_text()
        assert (folder / "labels" / f"{device}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / "labels" / f"{device}.svg").read_text()
        assert "secret" not in (folder / "labels" / f"{device}.svg").read_text()

    assert "3 of 3 cards are made already" in CliRunner().invoke(app, arguments(fleet, image)).output
    # A new bundle means a new card.
    (folder / "bundles" / "study.bundle.json").write_text(make_bundle("study", claim="claim-00000000000000ff").to_text())
    assert "2 of 3 cards are made already" in CliRunner().invoke(app, [*arguments(fleet, image), "--yes"]).output


@needs_image_tools
def test_a_card_that_fails_stops_the_batch_and_is_named(fleet: Path):
    folder = fleet.parent
    image = make_image(folder / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    (folder / "card-bedroom").mkdir()
    result = CliRunner().invoke(app, arguments(fleet, image))
    assert result.exit_code == 1
    assert "bedroom: " in result.output
    assert "1 cards were made" in result.output
    (folder / "card-bedroom").rmdir()
    assert CliRunner().invoke(app, arguments(fleet, image)).exit_code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs a first line"),
        ("name\nkitchen\n", "unknown: name"),
        ("device,colour\nkitchen,red\n", "unknown: colour"),
        ("device\n", "names no device"),
        ("device\nkitchen\nkitchen\n", "line 3: kitchen stands there twice"),
        ("device\nki+chen\n", "line 2: device name"),
        ("device\nfleet\n", "reserved"),
        ("device\ncellar\n", "line 2: bundle .*cellar"),
        ("device,bundle\nkitchen,bundles/study.bundle.json\n", "is for study, not for kitchen"),
    ],
)
def test_a_wrong_fleet_file_is_said_before_the_first_card(fleet: Path, text: str, words: str):
    fleet.write_text(text)
    with pytest.raises(FlashError, match=words):
        read_fleet(fleet, fleet.parent / "bundles")


def test_a_ledger_that_the_power_cut_short_is_read(tmp_path: Path):
    path = tmp_path / "ledger"
    Ledger(path).note("made", "kitchen", claim="c1")
    with path.open("ab") as file:
        file.write(b'{"step": "made", "device": "bed')
    ledger = Ledger(path)
    assert ledger.made("kitchen", "c1")
    assert not ledger.made("kitchen", "c2")
    ledger.note("made", "study", claim="c3")
    assert Ledger(path).made("study", "c3")


@needs_image_tools
def test_a_finished_card_that_was_left_in_is_not_overwritten(fleet: Path):
    """In one reader: the person presses Enter and forgets to change the card."""
    folder = fleet.parent
    image = make_image(folder / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    reader, waits = folder / "reader", list[str]()

    def forgetful(device: str, target: Path, console: Console) -> None:
        waits.append(device)
        if waits.count(device) == 2:
            target.rename(folder / f"done-{len(waits)}")  # now it is taken out

    options = FlashOptions(image, reader, Path())
    made = flash_fleet(fleet, options, Console(), bundles=folder / "bundles", labels=folder / "labels", wait_for_card=forgetful)
    assert made == 3
    assert waits == ["bedroom", "bedroom", "study", "study"]
    cards = [folder / "done-2", folder / "done-4", reader]
    assert [json.loads(boot_file(card, "mobillm/flashed.json"))["device"] for card in cards] == list(DEVICES)
