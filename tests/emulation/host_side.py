"""The host's part in an emulated first boot: coordinator, broker, bundle and card, and what must be true of them at the end.

Coordinator and broker are the real programs on this machine, with TLS and the shipped rules.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from coordinator.settings import load_settings
from edge_agent.flash.fat import FatPartition
from edge_agent.flash.partitions import Partition, boot_partition, read_partitions
from edge_agent.flash.volume import FileVolume
from side_tuning.bundle import read_bundle
from tests.backbones.models import minilm_folder
from tests.brokers import free_port
from tests.tls_broker import tls_broker

DEVICE = "kitchen"
SAMPLES = 24
AGENT = """bundle_file = "/var/lib/mobillm-fleet/device.bundle"
[health]
every_seconds = 5
[[sources]]
kind = "file"
path = "/var/lib/mobillm-fleet/samples.jsonl"
"""


def rows(first: int = 0) -> list[dict[str, str]]:
    """SAMPLES labelled texts, as the device's file of samples holds them."""
    numbers = range(first, first + SAMPLES)
    return [{"text": f"turn the light {n} on", "label": "light"} if n % 2 else {"text": f"play song {n}", "label": "music"} for n in numbers]


def as_lines(of: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in of)


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


class HostSide:
    """One run; `folder` keeps every log. The device reaches this machine at `seen_as`."""

    def __init__(self, image: Path, folder: Path, *, seen_as: str, settings: str = "") -> None:
        self.image, self.folder, self.backbone = image, folder, folder / "backbone"
        self.config, self.bundle, self.card = folder / "coordinator.toml", folder / "kitchen.bundle.json", folder / "card.img"
        self.seen_as, self.settings = seen_as, settings
        self.began = time.monotonic()

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {what}", flush=True)

    def coordinator(self, *arguments: object) -> str:
        done = subprocess.run(program("coordinator.cli", *arguments, "--config", self.config), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def serve(self, stack: ExitStack) -> None:
        """Broker, enrolment and gateway run until `stack` ends; the backbone is known, the device has its bundle."""
        port, claims_port = free_port(), free_port()
        self.config.write_text(
            f'data_directory = "{self.folder / "data"}"\n[broker]\nhost = "127.0.0.1"\nport = {port}\n[task]\nlabels = ["light", "music"]\n'
            f'[enrolment]\nclaims_port = {claims_port}\npublic_host = "{self.seen_as}"\n{self.settings}'
        )
        self.coordinator("init")
        self.say("preparing two layers of MiniLM")
        prepare = program("coordinator.cli", "backbone", "prepare", "--model", minilm_folder(), "--out", self.backbone, "--layers", 2, "--weights", "int8")
        subprocess.run(prepare, check=True, capture_output=True)
        self.coordinator("backbone", "register", self.backbone)
        settings = load_settings(self.config)
        stack.enter_context(tls_broker(self.folder / "mosquitto", broker_directory=settings.broker_directory, port=port, claims_port=claims_port))
        for name in ("enrolment", "gateway"):
            stack.enter_context(running(program("coordinator.cli", name, "--config", self.config), self.folder / f"{name}.log"))
        self.coordinator("enrol", DEVICE, "--out", self.bundle)

    def flash(self, *more: object) -> None:
        """The card, with the samples already in its /var: no sensor is emulated."""
        agent = self.folder / "agent.toml"
        agent.write_text(AGENT)
        command = ["flash", "--image", self.image, "--target", self.card, "--bundle", self.bundle, "--agent-config", agent, "--backbone", self.backbone]
        done = subprocess.run(program("edge_agent.cli", *command, "--user", "ann", "--yes", *more), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        self.say(f"flashed and read back: {' '.join(done.stdout.split())[:160]}")
        samples = self.folder / "samples.jsonl"
        samples.write_text(as_lines(rows()))
        write = f"write {samples} lib/mobillm-fleet/samples.jsonl"
        path = f"{self.card}?offset={self.partition(2).start}"
        subprocess.run(["debugfs", "-w", "-R", write, path], check=True, capture_output=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})

    def partition(self, number: int) -> Partition:
        """0 is the boot partition, 1 the root, 2 /var."""
        with FileVolume(self.card) as volume:
            return read_partitions(volume)[number]

    def query(self, sql: str) -> Any:
        engine = create_engine(f"sqlite:///{self.folder / 'data/coordinator.db'}")
        with engine.connect() as connection:
            found = connection.execute(text(sql)).scalar_one()
        engine.dispose()
        return found

    def stored(self) -> int:
        return int(self.query("select coalesce(sum(samples), 0) from frames"))

    def wait(self, guest: subprocess.Popen[bytes], log: Path, seconds: float, *, samples: int = SAMPLES) -> None:
        """Until the guest is enrolled and that many samples are stored."""

        def enrolled() -> bool:
            assert guest.poll() is None, f"the guest ended; see {log}: {log.read_text(errors='replace')[-3000:]}"
            return bool(self.query("select count(*) from certificates"))

        patiently(enrolled, seconds, "the guest is enrolled")
        self.say("the guest is enrolled")
        patiently(lambda: enrolled() and self.stored() >= samples, seconds, f"{samples} samples of the guest are stored")
        self.say(f"{self.stored()} samples are stored")

    def boot_partition(self) -> bytes:
        with FileVolume(self.card) as volume:
            part = boot_partition(volume)
            return volume.read_at(part.start, part.size)

    def secrets(self) -> list[bytes]:
        return [line.encode() for line in read_bundle(self.bundle).claim_key.splitlines()[1:-1]]

    def search_secrets(self) -> None:
        """In every byte of the partition, not in its files alone: deleted is not wiped."""
        with FileVolume(self.card) as volume:
            boot = FatPartition(volume, boot_partition(volume).start)
            left = {name for name in ("mobillm/device.bundle", "network-config") if boot.exists(name)}
            self.say(boot.read("mobillm/applied.txt").decode())
        raw = self.boot_partition()
        assert not any(secret in raw for secret in self.secrets()), "the claim's key is still on the boot partition"
        assert not left, f"still on the boot partition: {left}"
