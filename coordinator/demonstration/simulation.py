"""Prepares simulated devices for docker-compose.devices.yml: python -m coordinator.demonstration.simulation FOLDER DEVICE...

Each device gets FOLDER/DEVICE/agent.toml and samples to read at a given rate, and one of the demonstration's cuts of
MiniLM, which is registered with the coordinator that the environment's settings name. Run again, it changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from coordinator.backbone_library import keep_artifact
from coordinator.demonstration.data import (
    Partition,
    deal,
    load_dataset,
    set_anchors_aside,
    write_anchors,
    write_share,
)
from coordinator.demonstration.fleet import prepare_backbones
from coordinator.demonstration.toml import write_toml
from coordinator.settings import load_settings
from coordinator.store.engine import open_store
from coordinator.store.errors import StoreError
from coordinator.store.registry import register_backbone

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare simulated devices.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("devices", nargs="+")
    parser.add_argument("--rate", type=float, default=20.0, help="samples a second, each")
    parser.add_argument("--state", default="/var/lib/mobillm-fleet", help="where an agent keeps its state and finds its bundle")
    options = parser.parse_args()
    try:
        prepare(options.folder, options.devices, rate=options.rate, state=options.state)
    except StoreError as error:  # the coordinator may not have made its database yet
        sys.exit(f"simulation: {error}")


def prepare(folder: Path, devices: list[str], *, rate: float, state: str) -> None:
    settings = load_settings(None)
    store = open_store(settings.database_url)  # before the work: where there is no database yet, it is for nothing
    try:
        backbones = prepare_backbones(len(devices), folder / "backbones", print)
        for backbone in backbones:
            keep_artifact(settings.data_directory, backbone.folder)
            with store.write() as session:
                register_backbone(session, backbone.manifest)
    finally:
        store.close()
    dataset, anchors = set_anchors_aside(load_dataset(), SEED)
    if not (folder / "anchors.jsonl").exists():
        write_anchors(anchors, folder / "anchors.jsonl")
    random = np.random.default_rng(SEED)
    shares = deal(dataset, Partition("iid"), len(devices), SEED)
    for device, share, backbone in zip(devices, shares, backbones, strict=False):
        config = folder / device / "agent.toml"
        if config.exists():
            continue
        samples, _ = write_share(share, folder / device, random)
        write_toml(config, {
            "state_directory": state,
            "bundle_file": f"{state}/bundle.json",
            "backbone": {"folder": str(backbone.folder)},
            "health": {"every_seconds": 10.0},
            "sources": [{"kind": "file", "path": str(samples), "rate_per_second": rate}],
        })  # fmt: skip
    print(f"simulated devices are ready: {', '.join(devices)}")


if __name__ == "__main__":
    main()
