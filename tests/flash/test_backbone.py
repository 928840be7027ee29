"""A backbone on the card: on the boot partition where it fits, in its place after first boot, and never half."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_agent.cli import app
from side_tuning.backbone_manifest import MANIFEST, WEIGHTS, check_artifact, fingerprint_of
from tests.edge_agent.travelling import make_backbone
from tests.flash.images import make_image, needs_image_tools
from tests.flash.test_first_boot import SYSTEMS, flash, make_bundle, run_script

pytestmark = needs_image_tools


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("artifact"))


@pytest.fixture
def boot(tmp_path: Path, artifact: Path) -> Path:
    """The boot partition as a folder, since a FAT cannot be mounted everywhere."""
    card = flash(tmp_path, "cloud-init", "--backbone", str(artifact))
    folder = tmp_path / "boot"
    folder.mkdir()
    subprocess.run(["mcopy", "-s", "-i", f"{card}@@{4 * 1024 * 1024}", "::/*", folder], check=True)
    return folder


def test_the_backbone_is_on_the_card_and_in_its_place_after_first_boot(tmp_path: Path, boot: Path, artifact: Path):
    files = json.loads((boot / "mobillm" / "flashed.json").read_text())["files"]
    assert {name for name in files if "/backbone/" in name} == {f"mobillm/backbone/{file.name}" for file in artifact.iterdir()}
    state = tmp_path / "state"
    for _ in range(2):
        result = run_script(boot, state)
        assert result.returncode == 0, result.stderr
    assert check_artifact(state / "backbone") == check_artifact(artifact)
    assert (state / "backbone" / WEIGHTS).stat().st_mode & 0o77 == 0
    assert not (boot / "mobillm" / "backbone").exists()
    assert (boot / "mobillm" / "applied.txt").read_text().count("backbone moved to") == 1


def test_a_backbone_that_is_there_already_stays(tmp_path: Path, boot: Path):
    state = tmp_path / "state"
    (state / "backbone").mkdir(parents=True)
    (state / "backbone" / "mine").write_text("mine")
    assert run_script(boot, state).returncode == 0
    assert [file.name for file in (state / "backbone").iterdir()] == ["mine"]
    assert not (boot / "mobillm" / "backbone").exists()


def test_a_copy_that_fails_leaves_nothing_half_and_the_rest_is_done(tmp_path: Path, boot: Path):
    state = tmp_path / "state"
    state.mkdir()
    loop = boot / "mobillm" / "backbone" / "unreadable"
    loop.symlink_to(loop)  # cp -r copies the link, diff cannot follow it
    assert run_script(boot, state).returncode == 0
    assert not (state / "backbone").exists()
    assert not (state / "backbone.new").exists()
    assert (state / "device.bundle").exists()
    assert "the agent fetches it" in (boot / "mobillm" / "applied.txt").read_text()


def test_one_that_does_not_fit_is_left_out_and_said_so(tmp_path: Path, artifact: Path):
    large = tmp_path / "large"
    shutil.copytree(artifact, large)
    with (large / WEIGHTS).open("ab") as file:
        file.write(bytes(30 * 1024 * 1024))
    manifest = json.loads((large / MANIFEST).read_text())
    (large / MANIFEST).write_text(json.dumps({**manifest, "fingerprint": fingerprint_of(large)}))
    image = make_image(tmp_path / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    (tmp_path / "b").write_text(make_bundle().to_text())
    arguments = ["flash", "--image", str(image), "--target", str(tmp_path / "card"), "--bundle", str(tmp_path / "b"), "--backbone", str(large)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "does not fit" in result.output
    names = subprocess.run(["mdir", "-b", "-i", f"{tmp_path / 'card'}@@{4 * 1024 * 1024}", "::/mobillm"], capture_output=True, text=True, check=True).stdout
    assert "backbone" not in names


def test_a_damaged_one_is_refused_before_anything_is_written(tmp_path: Path, artifact: Path):
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    (damaged / WEIGHTS).write_bytes(b"x")
    (tmp_path / "b").write_text(make_bundle().to_text())
    (tmp_path / "i.img").write_bytes(b"")
    arguments = ["flash", "--image", str(tmp_path / "i.img"), "--target", str(tmp_path / "card"), "--bundle", str(tmp_path / "b"), "--backbone", str(damaged)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "is damaged" in result.output
    assert not (tmp_path / "card").exists()


def test_a_fleet_file_names_a_backbone_for_each_card(tmp_path: Path, artifact: Path):
    shutil.copytree(artifact, tmp_path / "small")
    make_image(tmp_path / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    for number, device in enumerate(("kitchen", "study")):
        (tmp_path / f"{device}.bundle.json").write_text(make_bundle(device, claim=f"claim-{number:016x}").to_text())
    (tmp_path / "fleet.csv").write_text("device,backbone\nkitchen,small\nstudy,none\n")
    arguments = [
        "flash", "--image", str(tmp_path / "os.img"), "--fleet", str(tmp_path / "fleet.csv"), "--target", str(tmp_path / "card-{device}"),
        "--bundles", str(tmp_path), "--labels", str(tmp_path / "labels"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "line 3 (study): the backbone cannot go on the card: " in result.output
    (tmp_path / "fleet.csv").write_text("device,backbone\nkitchen,small\nstudy,\n")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for device, there in (("kitchen", True), ("study", False)):
        shown = subprocess.run(["mdir", "-b", "-i", f"{tmp_path / f'card-{device}'}@@{4 * 1024 * 1024}", "::/mobillm"], capture_output=True, text=True, check=True)
        assert ("backbone" in shown.stdout) == there
