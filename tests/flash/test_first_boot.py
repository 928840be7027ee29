"""What each first-boot system is told, seen on image files, and the script that does our part on the device."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import tomllib
import yaml
from typer.testing import CliRunner

from edge_agent.cli import app
from edge_agent.first_steps import FirstSteps
from edge_agent.flash.errors import FlashError
from edge_agent.flash.first_boot import CardPlan, Wifi
from side_tuning.bundle import Bundle
from tests.flash.images import boot_file, make_image, needs_image_tools

PASSPHRASE = "correct horse battery"
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0p0 me@laptop"
CMDLINE = b"console=serial0,115200 console=tty1 root=PARTUUID=1-02 rootfstype=ext4 rootwait"
FIRSTBOOT = CMDLINE + b" quiet init=/usr/lib/raspberrypi-sys-mods/firstboot\n"
SYSTEMS = {
    "cloud-init": {"cmdline.txt": CMDLINE, "user-data": b"#cloud-config\n", "network-config": b"", "meta-data": b"instance_id: rpios-image\n"},
    "rpi-preseed": {"cmdline.txt": CMDLINE, "rpi-preseed.toml": b'config_version = "1.1"\n'},
    "firstrun": {"cmdline.txt": FIRSTBOOT},
}


def make_bundle(device: str = "kitchen", **changes: object) -> Bundle:
    values: dict[str, object] = {
        "device": device, "claim": "claim-0123456789abcdef", "claim_certificate": "CERT", "claim_key": "THE CLAIM'S SECRET KEY", "host": "fleet.example",
        "port": 8883, "claims_port": 8884, "authorities": "AUTH", "issued_at": time.time(), "expires_at": time.time() + 3600,
    }
    return Bundle.model_validate({**values, **changes})


def flash(tmp_path: Path, system: str, *more: str, bundle: Bundle | None = None, target: str = "card") -> Path:
    image = tmp_path / f"{system}.img"
    if not image.exists():
        make_image(image, SYSTEMS[system], root_megabytes=1)
    (tmp_path / "device.bundle").write_text((bundle or make_bundle()).to_text())
    (tmp_path / "key.pub").write_text(SSH_KEY + "\n")
    (tmp_path / "wifi").write_text(PASSPHRASE + "\n")
    (tmp_path / "hash").write_text("$6$salt$hash\n")
    (tmp_path / "agent.toml").write_text('bundle_file = "/var/lib/mobillm-fleet/device.bundle"\n')
    arguments = [
        "flash", "--image", str(image), "--target", str(tmp_path / target), "--bundle", str(tmp_path / "device.bundle"), "--user", "ann",
        "--password-hash-file", str(tmp_path / "hash"), "--ssh-key", str(tmp_path / "key.pub"), "--wifi", "Küche 'n' Bar",
        "--wifi-secret-file", str(tmp_path / "wifi"), "--country", "GB", "--timezone", "Europe/London", "--agent-config", str(tmp_path / "agent.toml"), *more,
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return tmp_path / target


@pytest.fixture(params=list(SYSTEMS))
def card(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    return request.param, flash(tmp_path, request.param)


@needs_image_tools
def test_every_system_gets_the_bundle_the_script_and_a_manifest(card: tuple[str, Path]):
    system, path = card
    assert json.loads(boot_file(path, "mobillm/device.bundle"))["device"] == "kitchen"
    manifest = json.loads(boot_file(path, "mobillm/flashed.json"))
    assert manifest["first_boot"] == system
    assert manifest["device"] == manifest["hostname"] == "kitchen"
    for name, digest in manifest["files"].items():
        assert hashlib.sha256(boot_file(path, name)).hexdigest() == digest
    assert b"SECRET" not in boot_file(path, "mobillm/flashed.json")
    assert boot_file(path, "mobillm/agent.toml") == b'bundle_file = "/var/lib/mobillm-fleet/device.bundle"\n'


@needs_image_tools
def test_no_passphrase_is_ever_on_the_card(card: tuple[str, Path]):
    _, path = card
    key = hashlib.pbkdf2_hmac("sha1", PASSPHRASE.encode(), "Küche 'n' Bar".encode(), 4096, 32).hex()
    content = path.read_bytes()
    assert PASSPHRASE.encode() not in content
    assert key.encode() in content


@needs_image_tools
def test_cloud_init_is_told_in_valid_yaml(tmp_path: Path):
    path = flash(tmp_path, "cloud-init")
    user_data = boot_file(path, "user-data")
    assert user_data.startswith(b"#cloud-config\n")
    told = yaml.safe_load(user_data)
    assert told["hostname"] == "kitchen"
    assert told["user"] == {"name": "ann", "lock_passwd": False, "shell": "/bin/bash", "passwd": "$6$salt$hash", "ssh_authorized_keys": [SSH_KEY]}
    assert "users" not in told
    assert "manage_etc_hosts" not in told
    assert told["runcmd"][-1] == ["sh", "/boot/firmware/mobillm/first-boot.sh"]
    network = yaml.safe_load(boot_file(path, "network-config"))
    assert network["wifis"]["wlan0"]["regulatory-domain"] == "GB"
    (ssid,) = network["wifis"]["wlan0"]["access-points"]
    assert ssid == "Küche 'n' Bar"
    assert network["ethernets"]["wired"]["optional"] is True
    assert network["wifis"]["wlan0"]["optional"] is False
    instance = yaml.safe_load(boot_file(path, "meta-data"))["instance-id"]
    cmdline = boot_file(path, "cmdline.txt")
    assert cmdline == CMDLINE + f" ds=nocloud;i={instance} cfg80211.ieee80211_regdom=GB".encode()


@needs_image_tools
def test_each_flash_is_a_new_instance(tmp_path: Path):
    """Or cloud-init would take the card for one that it has set up already."""
    first = boot_file(flash(tmp_path, "cloud-init"), "meta-data")
    again = boot_file(flash(tmp_path, "cloud-init", "--yes"), "meta-data")
    assert first != again


@needs_image_tools
def test_preseed_is_valid_toml(tmp_path: Path):
    told = tomllib.loads(boot_file(flash(tmp_path, "rpi-preseed"), "rpi-preseed.toml").decode())
    assert told["config_version"] == "1.1"
    assert told["wlan"]["ssid"] == "Küche 'n' Bar"
    assert told["wlan"]["password_encrypted"] is True
    assert told["user"] == {"name": "ann", "password": "$6$salt$hash", "password_encrypted": True}
    assert told["runcmd"]["early"] == told["runcmd"]["late"] == ["sh /boot/firmware/mobillm/first-boot.sh"]


@needs_image_tools
def test_firstrun_is_a_shell_script_that_ends_itself(tmp_path: Path):
    path = flash(tmp_path, "firstrun")
    script = tmp_path / "firstrun.sh"
    script.write_bytes(boot_file(path, "firstrun.sh"))
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "set_wlan 'Küche '\"'\"'n'\"'\"' Bar'" in text
    cmdline = boot_file(path, "cmdline.txt").decode()
    assert cmdline.endswith(" systemd.run=/boot/firstrun.sh systemd.run_success_action=reboot systemd.unit=kernel-command-line.target")
    assert "\n" not in cmdline
    assert "init=/usr/lib/raspberrypi-sys-mods/firstboot" in cmdline


@needs_image_tools
def test_an_image_that_nothing_sets_up_is_refused_with_the_reason(tmp_path: Path):
    make_image(tmp_path / "other.img", {"kernel.img": b"k", "cmdline.txt": CMDLINE}, root_megabytes=1)
    (tmp_path / "b").write_text(make_bundle().to_text())
    result = CliRunner().invoke(app, ["flash", "--image", str(tmp_path / "other.img"), "--target", str(tmp_path / "card"), "--bundle", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert "none of the first-boot systems" in result.output
    assert "kernel.img" in result.output
    assert not (tmp_path / "card").exists()


def test_an_expired_bundle_is_refused_before_anything_is_written(tmp_path: Path):
    (tmp_path / "b").write_text(make_bundle(expires_at=time.time() - 1).to_text())
    (tmp_path / "i.img").write_bytes(b"")
    result = CliRunner().invoke(app, ["flash", "--image", str(tmp_path / "i.img"), "--target", str(tmp_path / "card"), "--bundle", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert "expired" in result.output
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hostname": "a_b"}, "host name"),
        ({"hostname": "$(reboot)"}, "host name"),
        ({"user": "Ann"}, "user name"),
        ({"ssh_keys": (SSH_KEY,)}, "needs a user"),
        ({"country": "gb"}, "country"),
        ({"wifi": Wifi("net")}, "--country"),
        ({"timezone": "../../etc/passwd; x"}, "time zone"),
        ({"user": "ann", "ssh_keys": ("ssh-ed25519 AAAA\nevil",)}, "public key"),
    ],
)
def test_values_that_no_system_could_take(changes: dict[str, object], words: str):
    values: dict[str, object] = {"bundle": make_bundle(), "hostname": "kitchen", "instance_id": "i", "flashed_at": datetime(2026, 1, 1, tzinfo=timezone.utc)}
    with pytest.raises(FlashError, match=words):
        CardPlan(**{**values, **changes}).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(("ssid", "secret"), [("", "12345678"), ("x" * 33, "12345678"), ("net", "short"), ("net", "ü" * 10), ("net", "x" * 64)])
def test_wifi_that_no_network_can_have(ssid: str, secret: str):
    with pytest.raises(FlashError, match="Wi-Fi"):
        Wifi.with_passphrase(ssid, secret)


def test_the_wifi_key_is_the_one_of_the_standard():
    """IEEE 802.11i, H.4.3, first test vector."""
    assert Wifi.with_passphrase("IEEE", "password").key == "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"


def run_script(boot: Path, state: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MOBILLM_STATE_DIRECTORY": str(state), "MOBILLM_CONFIGURATION_DIRECTORY": str(state / "etc")}
    return subprocess.run(["sh", boot / "mobillm" / "first-boot.sh"], env=environment, capture_output=True, text=True, check=False)


@needs_image_tools
@pytest.mark.parametrize("system", list(SYSTEMS))
def test_nothing_secret_is_left_on_the_partition_after_first_boot(tmp_path: Path, system: str):
    """The boot partition as a folder, since a FAT cannot be mounted everywhere; then the script, twice."""
    path = flash(tmp_path, system)
    boot, state = tmp_path / "boot", tmp_path / "state"
    boot.mkdir()
    subprocess.run(["mcopy", "-s", "-i", f"{path}@@{4 * 1024 * 1024}", "::/*", boot], check=True)
    bundle = (boot / "mobillm" / "device.bundle").read_bytes()
    (boot / "mobillm" / "agent.toml").write_text("settings")
    (boot / "mobillm" / "flashed.json").chmod(0o700)  # as on a FAT partition that only root may read
    for _ in range(2):
        result = run_script(boot, state)
        assert result.returncode == 0, result.stderr
    assert (state / "device.bundle").read_bytes() == bundle
    assert (state / "etc" / "agent.toml").read_text() == "settings"
    assert (state / "device.bundle").stat().st_mode & 0o77 == 0
    key = hashlib.pbkdf2_hmac("sha1", PASSPHRASE.encode(), "Küche 'n' Bar".encode(), 4096, 32).hex().encode()
    for file in boot.rglob("*"):
        if file.is_file() and file.name != "firstrun.sh":  # wipes itself, as the last thing it does
            content = file.read_bytes()
            assert b"SECRET" not in content, file
            assert key not in content, file
            assert b"$6$salt$hash" not in content, file
    assert "bundle copied" in (boot / "mobillm" / "applied.txt").read_text()
    assert (boot / "mobillm" / "flashed.json").read_bytes() == (state / "flashed.json").read_bytes()
    assert (state / "flashed.json").stat().st_mode & 0o777 == 0o644  # the agent is not root
    times = FirstSteps(state).times()
    assert times is not None
    assert list(times) == ["flashed", "configured", "booted"]
    assert times["booted"] < times["configured"] <= time.time()


def test_a_wipe_that_was_interrupted_is_finished(tmp_path: Path):
    """The bundle goes last, since our image's service runs the script while it is there. Zeros never take the place of the copy."""
    boot, state = tmp_path / "boot", tmp_path / "state"
    (boot / "mobillm").mkdir(parents=True)
    shutil.copy("edge_agent/flash/first-boot.sh", boot / "mobillm")
    state.mkdir()
    bundle = make_bundle().to_text()
    (state / "device.bundle").write_text(bundle)
    (boot / "network-config").write_text("the power went before this was wiped")
    (boot / "mobillm" / "device.bundle").write_bytes(bytes(100) + bundle.encode()[100:])
    assert run_script(boot, state).returncode == 0
    assert (state / "device.bundle").read_text() == bundle
    assert not (boot / "network-config").exists()
    assert not (boot / "mobillm" / "device.bundle").exists()
    noted = (boot / "mobillm" / "applied.txt").read_text()
    assert noted.index("wiped network-config") < noted.index("wiped device.bundle")


@needs_image_tools
@pytest.mark.parametrize("system", list(SYSTEMS))
def test_the_manifest_does_not_let_one_try_out_passphrases(tmp_path: Path, system: str):
    """Two cards with the same secrets have unlike hashes of every file with one."""
    bundle = make_bundle()
    first, second = (
        json.loads(boot_file(flash(tmp_path, system, bundle=bundle, target=target), "mobillm/flashed.json"))["files"] for target in ("one", "other")
    )
    same = {name for name in first if first[name] == second[name]}
    assert not same & {"user-data", "network-config", "rpi-preseed.toml", "firstrun.sh"}
    assert "mobillm/device.bundle" in same


def test_the_script_keeps_the_bundle_where_it_cannot_be_moved(tmp_path: Path):
    boot = tmp_path / "boot"
    (boot / "mobillm").mkdir(parents=True)
    shutil.copy("edge_agent/flash/first-boot.sh", boot / "mobillm")
    (boot / "mobillm" / "device.bundle").write_text("b")
    state = tmp_path / "state"
    state.mkdir()
    (state / "device.bundle.new").mkdir()  # the copy cannot be made
    (state / "device.bundle.new" / "device.bundle").mkdir()
    assert run_script(boot, state).returncode == 1
    assert (boot / "mobillm" / "device.bundle").read_text() == "b"
