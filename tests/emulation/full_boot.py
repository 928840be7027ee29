"""The whole way under emulation: our image, flashed with a bundle, booted as a machine of its own, until its frames are stored.

python -m tests.emulation.full_boot --image image/mobillm-fleet-arm64.img --work FOLDER      (docs/image.md)

Coordinator and broker are the real programs on this machine, with TLS and the shipped rules; the guest has no other network.
Ends with 0 when frames of the guest are stored and nothing secret is left on its boot partition.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text

from coordinator.settings import load_settings
from edge_agent.flash.fat import FatPartition
from edge_agent.flash.partitions import boot_partition, read_partitions
from edge_agent.flash.volume import FileVolume
from side_tuning.bundle import read_bundle
from tests.backbones.models import minilm_folder
from tests.brokers import free_port
from tests.tls_broker import tls_broker

DEVICE = "kitchen"
GUEST_SEES_HOST = "10.0.2.2"  # qemu's user network
SAMPLES = 24
AGENT = """bundle_file = "/var/lib/mobillm-fleet/device.bundle"
[health]
every_seconds = 5
[[sources]]
kind = "file"
path = "/var/lib/mobillm-fleet/samples.jsonl"
"""


def program(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def patiently(predicate: Callable[[], object], seconds: float, what: str) -> None:
    """Like tests.waiting.wait_until, but looks once a second: the guest needs the processor more."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not predicate():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        pause.wait(1.0)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class FullBoot:
    """One run; `folder` keeps every log."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder
        self.config, self.bundle, self.card = folder / "coordinator.toml", folder / "kitchen.bundle.json", folder / "card.img"
        self.began = time.monotonic()

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {what}", flush=True)

    def coordinator(self, *arguments: object) -> str:
        done = subprocess.run(program("coordinator.cli", *arguments, "--config", self.config), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def run(self, seconds: float) -> None:
        port, claims_port = free_port(), free_port()
        self.config.write_text(
            f'data_directory = "{self.folder / "data"}"\n[broker]\nhost = "127.0.0.1"\nport = {port}\n[task]\nlabels = ["light", "music"]\n'
            f'[enrolment]\nclaims_port = {claims_port}\npublic_host = "{GUEST_SEES_HOST}"\n'
        )
        backbone = self.folder / "backbone"
        with ExitStack() as stack:
            self.coordinator("init")
            self.say("preparing two layers of MiniLM")
            prepare = program("coordinator.cli", "backbone", "prepare", "--model", minilm_folder(), "--out", backbone, "--layers", 2, "--weights", "int8")
            subprocess.run(prepare, check=True, capture_output=True)
            self.coordinator("backbone", "register", backbone)
            settings = load_settings(self.config)
            stack.enter_context(tls_broker(self.folder / "mosquitto", broker_directory=settings.broker_directory, port=port, claims_port=claims_port))
            for name in ("enrolment", "gateway"):
                stack.enter_context(running(program("coordinator.cli", name, "--config", self.config), self.folder / f"{name}.log"))
            self.coordinator("enrol", DEVICE, "--out", self.bundle)
            self.flash(backbone)
            self.say("booting")
            guest = stack.enter_context(self.boot())
            self.wait(guest, seconds)
            print(self.coordinator("devices", "show", DEVICE))
            # Its own last step comes after the agent's first: the root read-only, written out.
            patiently(lambda: "Make the root read-only" in self.serial() or guest.poll() is not None, seconds, "the first boot ends")
        self.say("guest switched off")
        assert "resized filesystem" in self.serial() or "CHANGED: partition=3" in self.serial(), "/var did not grow"
        self.search_secrets()
        self.say("nothing secret is left on the boot partition")

    def flash(self, backbone: Path) -> None:
        agent = self.folder / "agent.toml"
        agent.write_text(AGENT)
        command = ["flash", "--image", self.image, "--target", self.card, "--bundle", self.bundle, "--agent-config", agent, "--backbone", backbone, "--user", "ann", "--yes"]
        done = subprocess.run(program("edge_agent.cli", *command), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        self.say(f"flashed and read back: {' '.join(done.stdout.split())[:160]}")
        with self.card.open("r+b") as file:
            file.truncate(self.image.stat().st_size + 512 * 1024 * 1024)  # a card is larger than the image: /var has to grow
        assert self.holds_secret(), "the search finds nothing where the secret must be"
        rows = [{"text": f"turn the light {number} on", "label": "light"} if number % 2 else {"text": f"play song {number}", "label": "music"} for number in range(SAMPLES)]
        samples = self.folder / "samples.jsonl"
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with FileVolume(self.card) as volume:
            start = read_partitions(volume)[2].start
        write = f"write {samples} lib/mobillm-fleet/samples.jsonl"
        subprocess.run(["debugfs", "-w", "-R", write, f"{self.card}?offset={start}"], check=True, capture_output=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})

    @contextmanager
    def boot(self) -> Iterator[subprocess.Popen[bytes]]:
        """Kernel, initramfs and command line come from the flashed card, as the Raspberry Pi's boot loader takes them."""
        with FileVolume(self.card) as volume:
            part = boot_partition(volume)
            boot = FatPartition(volume, part.start)
            names = boot.names()
            cmdline = boot.read("cmdline.txt").decode()
        files = {}
        for kind in ("vmlinuz", "initrd"):
            files[kind] = self.folder / kind
            name = next(name for name in names if name.startswith(kind))
            subprocess.run(["mcopy", "-o", "-i", f"{self.card}@@{part.start}", f"::/{name}", files[kind]], check=True)
        command = [
            "qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "2048", "-accel", "tcg,thread=multi",
            "-display", "none", "-no-reboot", "-serial", f"file:{self.folder / 'serial.log'}",
            "-kernel", files["vmlinuz"], "-initrd", files["initrd"], "-append", f"{cmdline} console=ttyAMA0 systemd.journald.forward_to_console=1",
            "-drive", f"file={self.card},format=raw,if=none,id=card", "-device", "virtio-blk-pci,drive=card",
            "-netdev", "user,id=net,restrict=off", "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci",
        ]
        with running(list(map(str, command)), self.folder / "qemu.log") as process:
            yield process

    def serial(self) -> str:
        path = self.folder / "serial.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, guest: subprocess.Popen[bytes], seconds: float) -> None:
        engine = create_engine(f"sqlite:///{self.folder / 'data/coordinator.db'}")

        def stored() -> int:
            assert guest.poll() is None, f"the guest ended; see {self.folder / 'serial.log'}"
            with engine.connect() as connection:
                return int(connection.execute(text("select coalesce(sum(samples), 0) from frames")).scalar_one())

        def enrolled() -> bool:
            stored()
            with engine.connect() as connection:
                return bool(connection.execute(text("select count(*) from certificates")).scalar_one())

        patiently(lambda: "Reached target" in self.serial(), seconds, "systemd runs in the guest")
        self.say("systemd runs in the guest")
        patiently(enrolled, seconds, "the guest is enrolled")
        self.say("the guest is enrolled")
        patiently(lambda: stored() >= SAMPLES, seconds, f"{SAMPLES} samples of the guest are stored")
        self.say(f"{stored()} samples are stored")
        engine.dispose()

    def search_secrets(self) -> None:
        """In every byte of the partition, not in its files alone: deleted is not wiped."""
        with FileVolume(self.card) as volume:
            boot = FatPartition(volume, boot_partition(volume).start)
            left = {name for name in ("mobillm/device.bundle", "network-config") if boot.exists(name)}
            print(boot.read("mobillm/applied.txt").decode())
        assert not self.holds_secret(), "the claim's key is still on the boot partition"
        assert not left, f"still on the boot partition: {left}"

    def holds_secret(self) -> bool:
        secret = read_bundle(self.bundle).claim_key.splitlines()[1].encode()
        with FileVolume(self.card) as volume:
            part = boot_partition(volume)
            return secret in volume.read_at(part.start, part.size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.emulation.full_boot", description=__doc__)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a new folder; keeps the logs and the card, 4 GB")
    parser.add_argument("--seconds", type=float, default=1800, help="for each step")
    options = parser.parse_args()
    missing = [name for name in ("qemu-system-aarch64", "mcopy", "mosquitto") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (apt install qemu-system-arm mtools mosquitto)")
    options.work.mkdir(parents=True)
    FullBoot(options.image, options.work.absolute()).run(options.seconds)


if __name__ == "__main__":
    main()
