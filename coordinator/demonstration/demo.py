"""MAIN FLOW of the demonstration: prepare, run the fleet, measure it at rest, compare, report.

Everything that runs is what a user would run: `coordinator run` with a broker, and one `edge-agent run` per device. This
program only writes their configuration, starts and ends them, looks at the store, and once cuts a device's power.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.console import Console

from coordinator.backbone_library import keep_artifact
from coordinator.demonstration.data import (
    DataError,
    Partition,
    deal,
    load_dataset,
    set_anchors_aside,
    write_anchors,
)
from coordinator.demonstration.errors import DemoError
from coordinator.demonstration.fleet import (
    CUTS,
    DemoDevice,
    cache_folder,
    free_port,
    make_devices,
    prepare_backbones,
    write_agent_config,
    write_coordinator_config,
)
from coordinator.demonstration.language import BACKBONES, load_texts, prepare_decoders
from coordinator.demonstration.measurement import measure
from coordinator.demonstration.options import Options, parse_options
from coordinator.demonstration.report import Report, print_report
from coordinator.demonstration.running import RunningFleet
from coordinator.demonstration.view import View
from coordinator.local_broker import find_mosquitto
from coordinator.outbox import ensure_signing_key
from coordinator.settings import ConfigError, CoordinatorSettings, load_settings
from coordinator.store.engine import open_store
from coordinator.store.registry import register_backbone
from coordinator.store.schema import upgrade
from coordinator.training.settings import FEWEST_ANCHORS

PRODUCING = 0.5  # share of --seconds that the slowest device is given for its data


def run(arguments: Sequence[str]) -> int:
    """The `coordinator demo` program; returns its exit code."""
    options = parse_options(arguments)
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        report, complete = demonstrate(options, console)
    except (DemoError, DataError, ConfigError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted before there was anything to show", file=sys.stderr)
        return 130
    print_report(report, console)
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
        console.print(f"figures written to {options.json}")
    if not complete:
        return 130
    return 0 if report.fleet.ledger_balanced else 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def demonstrate(options: Options, console: Console) -> tuple[Report, bool]:
    """Run it all; the report, and whether it ran to its end."""
    language = options.task == "causal-lm"
    dataset, anchors = set_anchors_aside(load_texts(options.data) if language else load_dataset(options.data, options.task), options.seed)
    named = language and all(row.user is not None for row in dataset.train)
    shares = deal(dataset, options.partition or Partition("user" if named else "iid"), options.devices, options.seed)
    if options.broker == "mosquitto":
        find_mosquitto()
    console.print(f"{dataset.name}: {len(dataset.train):,} rows to learn from, {len(dataset.test):,} to be measured on" + (f", {len(dataset.labels)} classes" if dataset.labels else ""))
    console.print(f"{len(anchors):,} further texts, without labels, are public: they run through every backbone to bring them into one space")
    if language:
        backbones = prepare_decoders(min(len(BACKBONES), options.devices), cache_folder(), console.print)
    else:
        backbones = prepare_backbones(min(len(CUTS), options.devices), cache_folder(), console.print)
    with _state_folder(options.state) as folder:
        # What this process's own connections say goes beside the children's logs, never into the picture.
        logging.basicConfig(filename=folder / "demo.log", level=logging.INFO, force=True)
        devices = make_devices(shares, backbones, folder / "devices", producing_seconds=PRODUCING * options.seconds, seed=options.seed)
        anchors_file = folder / "anchors.jsonl"
        write_anchors(anchors, anchors_file)
        config = folder / "coordinator.toml"
        write_coordinator_config(
            config, dataset, data=folder / "coordinator", port=free_port(), seconds=options.seconds, seed=options.seed,
            train_samples=sum(len(share.train) for share in shares), anchors_file=anchors_file if len(anchors) >= FEWEST_ANCHORS else None,
            dashboard_port=options.dashboard, task=options.task,
        )  # fmt: skip
        settings = load_settings(config)
        prepare_coordinator(settings, devices)
        store = open_store(settings.database_url, read_only=True)
        try:
            with View(devices, console, options.seconds) as view:
                fleet = RunningFleet(options, settings, config, devices, store=store, view=view)
                complete = fleet.run()
                report, complete = measure(fleet, complete=complete)
        finally:
            store.close()
    return report, complete


def prepare_coordinator(settings: CoordinatorSettings, devices: Sequence[DemoDevice]) -> None:
    """What an operator does once: the database, the known backbones, and a key for every device to check checkpoints by."""
    upgrade(settings.database_url)
    store = open_store(settings.database_url)
    try:
        for backbone in {device.backbone.manifest.fingerprint: device.backbone for device in devices}.values():
            keep_artifact(settings.data_directory, backbone.folder)
            with store.write() as session:
                register_backbone(session, backbone.manifest)
    finally:
        store.close()
    ensure_signing_key(settings)
    for device in devices:
        write_agent_config(device, port=settings.broker.port, public_key_file=settings.public_key_file)


@contextmanager
def _state_folder(keep_in: Path | None) -> Iterator[Path]:
    """A new folder; a temporary one goes when all went well, and stays with its logs when not."""
    if keep_in is not None:
        folder = keep_in.absolute() / f"run-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
        folder.mkdir(parents=True)
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="mobillm-demo-"))
    try:
        yield folder
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except Exception:
        print(f"demo: databases and logs are kept in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder, ignore_errors=True)
