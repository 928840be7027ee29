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
from edge_agent.flash.fleet import flash_fleet
from edge_agent.flash.ledger import Ledger, hold
from edge_agent.flash.values import COUNTRIES
from edge_agent.flash.volume import FileVolume
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

    # What this batch itself left unfinished is overwritten without asking.
    result = CliRunner().invoke(app, arguments(fleet, image))
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
    # A spent bundle may be gone; a new one means a new card, and the old one is a card that somebody may still want.
    (folder / "bundles" / "kitchen.bundle.json").unlink()
    (folder / "bundles" / "study.bundle.json").write_text(make_bundle("study", claim="claim-00000000000000ff").to_text())
    asked = CliRunner().invoke(app, arguments(fleet, image))
    assert asked.exit_code == 1
    assert "line 4 (study)" in asked.output
    assert "add --yes" in asked.output
    assert "2 of 3 cards are made already" in CliRunner().invoke(app, [*arguments(fleet, image), "--yes"]).output
    assert json.loads(boot_file(folder / "card-study", "mobillm/device.bundle"))["claim"] == "claim-00000000000000ff"


@needs_image_tools
def test_a_card_that_fails_stops_the_batch_and_is_named(fleet: Path, monkeypatch: pytest.MonkeyPatch):
    folder = fleet.parent
    image = make_image(folder / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    real = FileVolume.write_at

    def fail(disk: FileVolume, offset: int, content: bytes) -> None:
        if disk.path.name == "card-bedroom" and offset:
            raise OSError(5, "Input/output error")
        real(disk, offset, content)

    with monkeypatch.context() as patch:
        patch.setattr(FileVolume, "write_at", fail)
        result = CliRunner().invoke(app, arguments(fleet, image))
    assert result.exit_code == 1
    assert "bedroom: " in result.output
    assert "1 cards were made" in result.output
    assert CliRunner().invoke(app, arguments(fleet, image)).exit_code == 0


def wrongs(fleet: Path, *more: str, image: str = "none.img") -> str:
    """What is said of the fleet file; nothing may have been written."""
    result = CliRunner().invoke(app, [*arguments(fleet, fleet.parent / image), *more])
    assert result.exit_code == 1, result.output
    assert not list(fleet.parent.glob("card-*"))
    assert not fleet.with_name("fleet.csv.ledger.jsonl").exists()
    return result.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs a first line"),
        ("name\nkitchen\n", "unknown: name"),
        ("device,colour\nkitchen,red\n", "unknown: colour"),
        ("device,group,group\nkitchen,a,b\n", "twice: group"),
        ("device\n", "names no device"),
        ("device,hostname\n,\n", "names no device"),
        ("device,hostname\n,attic\n", "line 2 (no device): device name ''"),
        ("device\nkitchen\n\nkitchen\n", "line 4 (kitchen): device kitchen is that of line 2 too"),
        ("device\nki+chen\n", "line 2 (ki+chen): device name"),
        ("device\nfleet\n", "reserved"),
        ("device\ncellar\n", "line 2 (cellar): bundle"),
        ("device,bundle\nkitchen,bundles/study.bundle.json\n", "is for study, not for kitchen"),
        ("device,hostname\nkitchen,Loft\nstudy,loft\n", "line 3 (study): host name loft is that of line 2 too"),
        ("device\nkitchen,GB\n", "line 2 (kitchen): 'GB' stands under no column"),
        ("device,country\nkitchen,UK\n", "line 2 (kitchen): country 'UK' is none of ISO 3166's: the United Kingdom is GB"),
        ("device,timezone\nkitchen,Europe/Lodnon\n", "line 2 (kitchen): time zone 'Europe/Lodnon' is unknown; is it Europe/London?"),
        ("device,wifi,wifi_secret_file\nkitchen,Home,none.txt\n", "none.txt, cannot be read"),
        ("device,wifi\nkitchen,Home\n", "nobody is there to answer 'Passphrase of Home (empty: open network):'; name a file"),
        ("device,wifi\nkitchen,Home\n", "Wi-Fi needs a country"),
        ("device,wifi,wifi_secret_file,country\nkitchen,Home,short.txt,GB\n", "has 5 characters"),
        ("device,group\nkitchen,lab\n", "was made for no group, not for group lab; `coordinator enrol kitchen --group lab`"),
        ("device,backbone\nkitchen,nowhere\n", "line 2 (kitchen): the backbone cannot go on the card"),
        ('device,hostname\n"kitchen', "fleet file"),
    ],
)
def test_a_wrong_fleet_file_is_said_before_the_first_card(fleet: Path, text: str, words: str):
    fleet.write_text(text)
    (fleet.parent / "short.txt").write_text("short")
    assert words in wrongs(fleet)


def test_every_bad_line_is_said_at_once_and_what_they_share_only_once(fleet: Path):
    expired = make_bundle("bedroom", claim="claim-00000000000000aa", expires_at=1.0)
    (fleet.parent / "bundles" / "bedroom.bundle.json").write_text(expired.to_text())
    fleet.write_text("device;hostname;country;timezone\nkitchen;a_b;Germany;Berlin\nbedroom;;DE;\nstudy;a b;;\ncellar;;DE;\n")
    said = wrongs(fleet, "--ssh-key", str(fleet))
    assert "line 2 (kitchen): host name 'a_b'" in said
    assert "line 2 (kitchen): country 'Germany'" in said
    assert "line 2 (kitchen): time zone 'Berlin' is unknown" in said
    assert "line 3 (bedroom): bundle" in said
    assert "expired at 1970-01-01 00:00 UTC" in said
    assert "line 4 (study): host name 'a b'" in said
    assert "line 5 (cellar): bundle" in said
    assert said.count("needs a user") == 1
    assert "lines 2, 3, 4, 5: a password or an SSH key needs a user" in said
    assert "none.img cannot be opened" in said


@needs_image_tools
def test_an_image_that_nothing_sets_up_is_said_before_the_first_card(fleet: Path):
    make_image(fleet.parent / "os.img", {"kernel.img": b"k"}, root_megabytes=1)
    said = wrongs(fleet, image="os.img")
    assert said.count("none of the first-boot systems") == 1


@needs_image_tools
def test_files_in_the_way_are_all_named_before_the_first_card(fleet: Path):
    folder = fleet.parent
    image = make_image(folder / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    for device in ("bedroom", "study"):
        (folder / f"card-{device}").write_text("somebody's")
    for _ in range(2):  # a refusal is no beginning
        result = CliRunner().invoke(app, arguments(fleet, image))
        assert result.exit_code == 1
        assert "line 3 (bedroom)" in result.output
        assert "line 4 (study)" in result.output
        assert not (folder / "card-kitchen").exists()
        assert (folder / "card-study").read_text() == "somebody's"
    assert CliRunner().invoke(app, [*arguments(fleet, image), "--yes"]).exit_code == 0


def test_a_claim_that_is_on_a_card_already_is_refused(fleet: Path):
    """A copied bundle with another name written into it: its certificate would be good for the first device only."""
    Ledger(fleet.with_name("fleet.csv.ledger.jsonl")).note("made", "attic", claim=f"claim-{0:016x}", target="/dev/x")
    result = CliRunner().invoke(app, arguments(fleet, fleet.parent / "none.img"))
    assert "line 2 (kitchen): the claim claim-0000000000000000 is on the card of attic already" in result.output


@needs_image_tools
def test_the_group_is_on_the_card_and_on_the_label(fleet: Path):
    folder = fleet.parent
    bundle = make_bundle("kitchen", group="ground-floor", claim="claim-00000000000000bb")
    (folder / "bundles" / "kitchen.bundle.json").write_text(bundle.to_text())
    fleet.write_text("device,group\nkitchen,ground-floor\n")
    image = make_image(folder / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    result = CliRunner().invoke(app, arguments(fleet, image))
    assert result.exit_code == 0, result.output
    assert json.loads(boot_file(folder / "card-kitchen", "mobillm/flashed.json"))["group"] == "ground-floor"
    assert "group: ground-floor\n" in (folder / "labels" / "kitchen.txt").read_text()


def test_a_line_with_its_own_network_does_not_get_another_ones_passphrase(fleet: Path):
    """`--wifi Home --wifi-secret-file` is for lines without a network of their own."""
    (fleet.parent / "home.txt").write_text("home's passphrase")
    fleet.write_text("device,wifi\nkitchen,\nbedroom,Other\n")
    said = wrongs(fleet, "--wifi", "Home", "--wifi-secret-file", str(fleet.parent / "home.txt"), "--country", "GB")
    assert "line 3 (bedroom): nobody is there to answer 'Passphrase of Other" in said
    assert "line 2" not in said


def test_two_programs_with_one_ledger_refuse_each_other(fleet: Path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom edge_agent.flash.ledger import hold\n"
        "with hold(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    ledger = fleet.with_name("fleet.csv.ledger.jsonl")
    with subprocess.Popen([sys.executable, "-c", program, ledger], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        said = wrongs(fleet)
        assert f"another `edge-agent flash` (process {other.pid} on " in said
        assert "wait for its end, or end it" in said
        other.kill()
        other.wait()
    with hold(ledger):  # whichever way it ended
        pass


def test_countries_are_those_of_the_standard():
    table = Path("/usr/share/zoneinfo/iso3166.tab")
    if not table.exists():
        pytest.skip("this machine has no list of countries (package tzdata)")
    assert {line.split("\t")[0] for line in table.read_text(encoding="utf-8").splitlines() if not line.startswith("#")} == COUNTRIES


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
