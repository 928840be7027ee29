"""The fleet for real: `coordinator run` with mosquitto, one `edge-agent run` per device, a counting proxy before each.

Devices hold train rows only. In the end each measures itself on its own test rows with the checkpoint that it fetched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from benchmarks.counting_proxy import CountingProxy
from coordinator.demonstration.data import Dataset, Partition, Share
from coordinator.demonstration.demo import prepare_coordinator
from coordinator.demonstration.fleet import (
    PreparedBackbone,
    free_port,
    make_devices,
    write_agent_config,
    write_coordinator_config,
)
from coordinator.demonstration.observation import Observation
from coordinator.demonstration.options import Options
from coordinator.demonstration.processes import run_program
from coordinator.demonstration.running import RunningFleet
from coordinator.demonstration.view import View
from coordinator.settings import load_settings
from coordinator.store.engine import open_store
from edge_agent.settings import HealthSettings
from side_tuning.wire.messages import Mode

SECONDS = 240.0  # at most, from the first sample on
PRODUCING_SECONDS = 20.0
HEALTH_SECONDS = HealthSettings().every_seconds  # the agent's default; the demonstration has a quicker one
INFERRING_SECONDS = 600.0
LONG_SECONDS = 3_600.0  # between checkpoints while samples still come: no device needs one before the end


@dataclass(frozen=True)
class RealDevice:
    """What one device sent, fetched and can do."""

    samples: int
    up_bytes: int
    down_bytes: int
    accuracy: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class RealFleet:
    devices: list[RealDevice]
    accuracy: float  # measured on the devices, weighted by their test rows
    checkpoints: int
    balanced: bool


class _UndisturbedFleet(RunningFleet):
    """As in the demonstration, but nobody cuts a device's power."""

    def _cut_power_once(self, seen: Observation) -> None:
        pass


def run_fleet(  # noqa: PLR0917 - who has what, on what, where
    dataset: Dataset, shares: Sequence[Share], backbone: PreparedBackbone, mode: Mode, folder: Path, seed: int
) -> RealFleet:
    train_only = [replace(share, test=()) for share in shares]
    devices = make_devices(train_only, [backbone], folder / "devices", producing_seconds=PRODUCING_SECONDS, seed=seed)
    config = folder / "coordinator.toml"
    write_coordinator_config(
        config, dataset, data=folder / "coordinator", port=free_port(), seconds=LONG_SECONDS, seed=seed,
        train_samples=sum(len(share.train) for share in shares), anchors_file=None,
    )  # fmt: skip
    with config.open("a", encoding="utf-8") as file:
        file.write(f'\n[plan]\nmode = "{mode}"\n')
    settings = load_settings(config)
    prepare_coordinator(settings, devices)
    proxies = [CountingProxy((settings.broker.host, settings.broker.port)) for _ in devices]
    for device, proxy in zip(devices, proxies, strict=True):
        write_agent_config(device, port=proxy.port, public_key_file=settings.public_key_file, health_seconds=HEALTH_SECONDS)
    options = Options(None, len(devices), Partition("iid"), "mosquitto", SECONDS, None, seed, folder, compare=False)
    store = open_store(settings.database_url, read_only=True)
    try:
        with View(devices, Console(quiet=True), SECONDS) as view:
            fleet = _UndisturbedFleet(options, settings, config, devices, store=store, view=view)
            fleet.run()
        seen = fleet.seen
    finally:
        store.close()
        for proxy in proxies:
            proxy.close()
    assert seen is not None, "the coordinator's database was never readable"

    def measure(number: int) -> float:
        rows = folder / "devices" / devices[number].name / "test.jsonl"
        rows.write_text("".join(row.as_json("held-out") + "\n" for row in shares[number].test), encoding="utf-8")
        program = [sys.executable, "-m", "edge_agent.cli", "infer", "--config", str(devices[number].config_file)]
        said = run_program(f"measuring {devices[number].name}", [*program, "--file", str(rows), "--json"], INFERRING_SECONDS)
        return float(json.loads(said)["score"])

    with ThreadPoolExecutor(max_workers=2) as pool:
        accuracies = list(pool.map(measure, range(len(devices))))
    sizes = [len(share.test) for share in shares]
    return RealFleet(
        [
            RealDevice(len(share.train), proxy.up, proxy.down, accuracy, fleet.peak_rss_bytes.get(device.name, 0))
            for share, proxy, accuracy, device in zip(shares, proxies, accuracies, devices, strict=True)
        ],
        sum(a * n for a, n in zip(accuracies, sizes, strict=True)) / sum(sizes),
        seen.totals.checkpoints_published,
        seen.totals.ledger.balanced,
    )
