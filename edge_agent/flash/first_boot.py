"""Which first-boot system an image has, by the files on its boot partition, and what each of them is told.

Sources: rpi-imager 2.0.11 and pi-gen 2026-06 for Raspberry Pi OS (firstrun.sh, cloud-init), cloud-init 26.1 (NoCloud),
raspberrypi/rpi-preseed (schema 1.1). JSON is valid YAML, so cloud-init's files are written as JSON: nothing has to be quoted
by hand. Whatever the system, `first-boot.sh` beside our files does our part and can be run again at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shlex
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from typing import Any, Literal

from edge_agent.flash.errors import FlashError
from edge_agent.flash.fat import MAX_FILE_BYTES, FatPartition
from edge_agent.flash.values import wrong_values
from side_tuning.bundle import Bundle

System = Literal["cloud-init", "rpi-preseed", "firstrun"]

FOLDER = "mobillm"  # ours on the boot partition
BUNDLE = f"{FOLDER}/device.bundle"
MANIFEST = f"{FOLDER}/flashed.json"
SCRIPT = f"{FOLDER}/first-boot.sh"
AGENT_CONFIG = f"{FOLDER}/agent.toml"
BACKBONE = f"{FOLDER}/backbone"
SPARE_BYTES = 16 * 1024 * 1024  # stays free on the boot partition, for the system's own updates
_WITH_SECRETS = {"user-data", "network-config", "rpi-preseed.toml", "firstrun.sh"}  # '#' begins a comment in all of them
_FIRSTBOOT_INIT = "init=/usr/lib/raspberrypi-sys-mods/firstboot"
_RUN_FIRSTRUN = "systemd.run=/boot/firstrun.sh systemd.run_success_action=reboot systemd.unit=kernel-command-line.target"


@dataclass(frozen=True)
class Wifi:
    """A network to join. `key` is the WPA pre-shared key as 64 hexadecimal digits, None for an open network."""

    ssid: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def with_passphrase(cls, ssid: str, passphrase: str | None) -> Wifi:
        """Derive the key (IEEE 802.11i, annex H.4), so that the passphrase itself never reaches the card.

        Raises:
            FlashError: a name or passphrase that no network can have.

        """
        if not 1 <= len(ssid.encode()) <= 32:
            raise FlashError(f"Wi-Fi name {ssid!r} has {len(ssid.encode())} bytes; use 1 to 32")
        if not passphrase:
            return cls(ssid)
        if re.fullmatch(r"[0-9A-Fa-f]{64}", passphrase):
            return cls(ssid, passphrase.lower())
        if not 8 <= len(passphrase) <= 63 or not passphrase.isascii() or not passphrase.isprintable():
            raise FlashError(f"the Wi-Fi passphrase has {len(passphrase)} characters; WPA takes 8 to 63 printable ASCII characters")
        return cls(ssid, hashlib.pbkdf2_hmac("sha1", passphrase.encode(), ssid.encode(), 4096, 32).hex())


@dataclass(frozen=True)
class CardPlan:
    """What one card is to become."""

    bundle: Bundle
    hostname: str
    instance_id: str  # fresh for every flash, or cloud-init takes the card for one that it has set up already
    flashed_at: datetime
    user: str | None = None
    password_hash: str | None = field(default=None, repr=False)  # crypt(3), yescrypt or sha512
    ssh_keys: tuple[str, ...] = ()
    wifi: Wifi | None = None
    country: str | None = None  # ISO 3166, for the radio
    timezone: str | None = None
    image_name: str = ""
    agent_config: bytes | None = None  # agent.toml, for /etc/mobillm-fleet
    backbone: dict[str, bytes] = field(default_factory=dict, repr=False)  # a prepared one's files, by name

    def check(self) -> None:
        """Refuse what no system could take.

        Raises:
            FlashError: names each wrong value.

        """
        wrong = wrong_values(
            hostname=self.hostname, user=self.user, password=self.password_hash is not None, ssh_keys=self.ssh_keys,
            wifi=self.wifi is not None, country=self.country, timezone=self.timezone,
        )
        if wrong:
            raise FlashError(*wrong)


def detect(boot: FatPartition) -> System:
    """Which system sets this image up on first boot.

    Raises:
        FlashError: none that we know.

    """
    names = {name.lower() for name in boot.names()}
    if "user-data" in names:
        return "cloud-init"
    if "rpi-preseed.toml" in names:
        return "rpi-preseed"
    if "cmdline.txt" in names and _FIRSTBOOT_INIT in boot.read("cmdline.txt").decode("utf-8", "replace"):
        return "firstrun"
    raise FlashError(
        "the image has none of the first-boot systems that are known here (cloud-init's user-data, rpi-preseed.toml, Raspberry Pi OS's "
        f"firstboot in cmdline.txt), so nothing on it would read the device's identity. Its boot partition holds: {', '.join(sorted(names)) or 'nothing'}. "
        "Take a Raspberry Pi OS or Ubuntu image, or start the board and run `edge-agent enrol` there"
    )


def put_files(boot: FatPartition, plan: CardPlan) -> dict[str, bytes]:
    """Write what makes this card this device; returns what was written, path -> content.

    Raises:
        FlashError: the image cannot be set up, or a value cannot be used.

    """
    plan.check()
    system = detect(boot)
    files: dict[str, bytes] = {BUNDLE: plan.bundle.to_text().encode(), SCRIPT: _script()}
    if plan.agent_config is not None:
        files[AGENT_CONFIG] = plan.agent_config
    if backbone_fits(boot, plan):
        files |= {f"{BACKBONE}/{name}": content for name, content in plan.backbone.items()}
    cmdline = boot.read("cmdline.txt").decode("utf-8", "replace") if boot.exists("cmdline.txt") else None
    if system == "cloud-init":
        files |= {"user-data": _user_data(plan), "network-config": _network_config(plan), "meta-data": _meta_data(plan)}
        cmdline = None if cmdline is None else _with_words(cmdline, [f"ds=nocloud;i={plan.instance_id}", *_regulatory(plan)])
    elif system == "rpi-preseed":
        files["rpi-preseed.toml"] = _preseed(plan)
        cmdline = None
    else:
        files["firstrun.sh"] = _firstrun(plan)
        cmdline = None if cmdline is None else _with_words(cmdline, [*_regulatory(plan), _RUN_FIRSTRUN])
    if cmdline is not None:
        files["cmdline.txt"] = cmdline.encode()
    for name in files.keys() & _WITH_SECRETS:
        # Or the manifest's hash of a file that is wiped later would let its finder try out passphrases.
        files[name] += f"# {secrets.token_hex(16)}\n".encode()
    files[MANIFEST] = _manifest(plan, system, files)
    for path, content in files.items():
        boot.write(path, content, plan.flashed_at)
    return files


def backbone_fits(boot: FatPartition, plan: CardPlan) -> bool:
    """Whether the boot partition has room for the backbone; where it has not, the device fetches it over the network."""
    largest = max(map(len, plan.backbone.values()), default=0)
    return largest <= MAX_FILE_BYTES and sum(map(len, plan.backbone.values())) + SPARE_BYTES <= boot.free_bytes


def _script() -> bytes:
    return resources.files("edge_agent.flash").joinpath("first-boot.sh").read_bytes()


def _manifest(plan: CardPlan, system: System, files: dict[str, bytes]) -> bytes:
    """What stays readable on the card: who it is and what was put on it. Hashes of files, none of their secrets."""
    manifest = {
        "device": plan.bundle.device,
        "group": plan.bundle.group,
        "hostname": plan.hostname,
        "claim": plan.bundle.claim,
        "instance_id": plan.instance_id,
        "flashed_at": plan.flashed_at.timestamp(),
        "image": plan.image_name,
        "first_boot": system,
        "files": {path: hashlib.sha256(content).hexdigest() for path, content in sorted(files.items())},
    }
    return (json.dumps(manifest, indent=2) + "\n").encode()


# cloud-init.


def _user_data(plan: CardPlan) -> bytes:
    data: dict[str, Any] = {"hostname": plan.hostname, "ssh_pwauth": False}
    if plan.timezone:
        data["timezone"] = plan.timezone
    if plan.user:
        # `user`, not `users`: the image's own groups (gpio, i2c ...) stay with it.
        data["user"] = {"name": plan.user, "lock_passwd": plan.password_hash is None, "shell": "/bin/bash"}
        if plan.password_hash:
            data["user"]["passwd"] = plan.password_hash
        if plan.ssh_keys:
            data["user"]["ssh_authorized_keys"] = list(plan.ssh_keys)
    # manage_etc_hosts would set the host name back on every boot, so the one line that sudo wants is added here.
    hosts = f"grep -q '127.0.1.1.*{plan.hostname}' /etc/hosts || echo '127.0.1.1 {plan.hostname}' >> /etc/hosts"
    data["runcmd"] = [["sh", "-c", hosts]]
    if plan.ssh_keys:
        data["runcmd"].append(["sh", "-c", "systemctl enable --now ssh || systemctl enable --now sshd"])
    data["runcmd"].append(["sh", f"/boot/firmware/{SCRIPT}"])
    return b"#cloud-config\n" + json.dumps(data, indent=1).encode() + b"\n"


def _network_config(plan: CardPlan) -> bytes:
    """Netplan, version 2. Replaces the image's own, so the wired interface is named too. runcmd waits for what is not optional."""
    config: dict[str, Any] = {
        "version": 2,
        "ethernets": {"wired": {"match": {"name": "e*"}, "dhcp4": True, "dhcp6": True, "optional": plan.wifi is not None}},
    }
    if plan.wifi:
        access = {"password": plan.wifi.key} if plan.wifi.key else {"auth": {"key-management": "none"}}
        config["wifis"] = {
            "wlan0": {"dhcp4": True, "optional": False, "regulatory-domain": plan.country, "access-points": {plan.wifi.ssid: access}}
        }
    return json.dumps(config, indent=1).encode() + b"\n"


def _meta_data(plan: CardPlan) -> bytes:
    # pi-gen's stock file says `instance_id`, which cloud-init does not read: every card would be "nocloud".
    return f"instance-id: {plan.instance_id}\nlocal-hostname: {plan.hostname}\n".encode()


# Raspberry Pi OS Bookworm.


def _firstrun(plan: CardPlan) -> bytes:
    """Runs once from the kernel command line, before the network; Raspberry Pi's own helper does the work."""
    custom = "/usr/lib/raspberrypi-sys-mods/imager_custom"
    lines = [
        "#!/bin/bash",
        "# Written by edge-agent flash. Runs once, then wipes itself.",
        "{  # read to its end before it runs, since it overwrites itself",
        f"custom={custom}",
        'if [ ! -x "$custom" ]; then',
        "  # Later images dropped this helper; they are set up by cloud-init, and must not come here.",
        f'  for boot in /boot/firmware /boot; do [ -d "$boot/{FOLDER}" ] && echo "no imager_custom" > "$boot/{FOLDER}/not-applied.txt"; done',
        "else",
        f'  "$custom" set_hostname {shlex.quote(plan.hostname)}',
    ]
    if plan.ssh_keys:
        lines.append(f'  "$custom" enable_ssh -k {shlex.quote(chr(10).join(plan.ssh_keys))}')
    if plan.user:
        secret = plan.password_hash or "!"
        lines.append(f"  /usr/lib/userconf-pi/userconf {shlex.quote(plan.user)} {shlex.quote(secret)}")
    if plan.wifi:
        lines.append(f'  "$custom" set_wlan {shlex.quote(plan.wifi.ssid)} {shlex.quote(plan.wifi.key or "")} {shlex.quote(plan.country or "")}')
    if plan.timezone:
        lines.append(f'  "$custom" set_timezone {shlex.quote(plan.timezone)}')
    lines += [
        "fi",
        "for boot in /boot/firmware /boot; do",
        f'  [ -f "$boot/{SCRIPT}" ] && sh "$boot/{SCRIPT}"',
        '  [ -f "$boot/cmdline.txt" ] && sed -i "s| systemd.run.*||g" "$boot/cmdline.txt"',
        '  if [ -f "$boot/firstrun.sh" ]; then',
        '    dd if=/dev/zero of="$boot/firstrun.sh" bs=1 count="$(stat -c %s "$boot/firstrun.sh")" conv=notrunc 2>/dev/null',
        '    sync; rm -f "$boot/firstrun.sh"',
        "  fi",
        "done",
        "exit 0",
        "}",
    ]
    return ("\n".join(lines) + "\n").encode()


# rpi-preseed.


def _preseed(plan: CardPlan) -> bytes:
    """TOML; JSON's strings and lists of strings are TOML's too."""
    sections: dict[str, dict[str, Any]] = {"system": {"hostname": plan.hostname}}
    if plan.user:
        sections["user"] = {"name": plan.user}
        if plan.password_hash:
            sections["user"] |= {"password": plan.password_hash, "password_encrypted": True}
    if plan.ssh_keys:
        sections["ssh"] = {"enabled": True, "password_authentication": False, "authorized_keys": list(plan.ssh_keys)}
    if plan.wifi:
        sections["wlan"] = {"ssid": plan.wifi.ssid, "country": plan.country}
        if plan.wifi.key:
            sections["wlan"] |= {"password": plan.wifi.key, "password_encrypted": True}
    if plan.timezone:
        sections["locale"] = {"timezone": plan.timezone}
    # Early, so that it depends on no network; its five seconds are too short for a backbone. Late again, for what was cut off.
    run = [f"sh /boot/firmware/{SCRIPT}"]
    sections["runcmd"] = {"early": run, "early_cmd_timeout": 25, "late": run, "late_require_time_sync": False, "late_wait_for_apt_lock": False}
    lines = ['config_version = "1.1"']
    for name, values in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())]
    return ("\n".join(lines) + "\n").encode()


# The kernel command line: one line, no newline at its end.


def _regulatory(plan: CardPlan) -> list[str]:
    return [f"cfg80211.ieee80211_regdom={plan.country}"] if plan.country else []


def _with_words(cmdline: str, words: list[str]) -> str:
    """`cmdline` with `words` at its end in place of earlier ones of the same names, so that flashing twice changes nothing."""
    names = {word.split("=", 1)[0] for group in words for word in group.split(" ")}
    kept = [word for word in cmdline.split() if word.split("=", 1)[0] not in names]
    return " ".join([*kept, *words])
