"""After the first boot nothing secret is left on the boot partition: in no byte of it, files, slack and freed clusters alike."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import pytest
import tomllib
import yaml

from edge_agent.flash.fat import FatPartition
from edge_agent.flash.partitions import boot_partition
from edge_agent.flash.volume import FileVolume
from side_tuning.bundle import Bundle
from tests.emulation.card_kernel import needs_card_kernel, run_with_card
from tests.flash.images import boot_file, needs_image_tools
from tests.flash.test_first_boot import PASSPHRASE, SYSTEMS, flash, make_bundle

FRAGMENT = 12  # bytes; a piece this long is a leak too

# Raspberry Pi's own programs, which write what they are told where it belongs: on the root.
HELPERS = """
mkdir -p /usr/lib/raspberrypi-sys-mods /usr/lib/userconf-pi
for program in raspberrypi-sys-mods/imager_custom userconf-pi/userconf; do
  printf '#!/bin/sh\\necho "$@" >> /etc/told\\n' > /usr/lib/$program
  chmod 755 /usr/lib/$program
done
"""


def long_bundle() -> Bundle:
    """With a key as long as a real one, so that the bundle has several clusters."""
    lines = [hashlib.sha256(bytes([n])).hexdigest() for n in range(20)]
    return make_bundle(claim_key="\n".join(["-----BEGIN PRIVATE KEY-----", *lines, "-----END PRIVATE KEY-----", ""]))


def secrets_of(bundle: Bundle) -> list[bytes]:
    wifi_key = hashlib.pbkdf2_hmac("sha1", PASSPHRASE.encode(), "Küche 'n' Bar".encode(), 4096, 32).hex()
    return [line.encode() for line in [*bundle.claim_key.splitlines()[1:-1], wifi_key, "$6$salt$hash"]]


def partition_bytes(card: Path) -> bytes:
    """The boot partition without its sectors of zeros, which are nearly all."""
    with FileVolume(card) as volume:
        part = boot_partition(volume)
        raw = volume.read_at(part.start, part.size)
    return b"".join(sector for n in range(0, len(raw), 512) if (sector := raw[n : n + 512]) != bytes(512))


def found(raw: bytes, secret: bytes) -> bool:
    """Whether any fragment of it stands there."""
    return any(secret[n : n + FRAGMENT] in raw for n in range(len(secret) - FRAGMENT + 1))


def first_boot(system: str, card: Path) -> str:
    """The commands of the image's own first-boot system, as it takes them from the files on the card."""
    if system == "cloud-init":
        commands = yaml.safe_load(boot_file(card, "user-data"))["runcmd"]
        return "\n".join(f"{shlex.join(command)} || true" for command in commands)  # cloud-init goes on after one that fails
    if system == "rpi-preseed":
        told = tomllib.loads(boot_file(card, "rpi-preseed.toml").decode())["runcmd"]
        return "\n".join([*told["early"], *told["late"]])
    return f"{HELPERS}bash /boot/firmware/firstrun.sh\ncat /etc/told\n"


@needs_image_tools
@needs_card_kernel
@pytest.mark.parametrize("system", list(SYSTEMS))
def test_no_byte_of_a_secret_is_left(tmp_path: Path, system: str):
    bundle = long_bundle()
    card = flash(tmp_path, system, bundle=bundle)
    secrets = secrets_of(bundle)
    raw = partition_bytes(card)
    assert all(found(raw, secret) for secret in secrets), "the search finds nothing where the secret must be"
    report = run_with_card(card, f"{first_boot(system, card)}\ncat /var/lib/mobillm-fleet/device.bundle\n", tmp_path / "kernel")
    assert bundle.to_text() in report, "the bundle did not come off the card"
    raw = partition_bytes(card)
    assert not [secret for secret in secrets if found(raw, secret)]
    with FileVolume(card) as volume:
        boot = FatPartition(volume, boot_partition(volume).start)
        assert not {name for name in ("mobillm/device.bundle", "network-config", "rpi-preseed.toml", "firstrun.sh") if boot.exists(name)}
        assert boot.exists("mobillm/flashed.json")
        assert boot.read("mobillm/applied.txt")
