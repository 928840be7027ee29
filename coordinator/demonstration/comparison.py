"""What the fleet is measured against: the same side network on the same taps in full precision, trained centrally and per device.

The taps come from the device program (`edge_agent.export_taps`) as a child process, from the very samples that the
fleet produced, without codec, spool or broker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.demonstration.fleet import DemoDevice, Say
from coordinator.demonstration.processes import run_program
from coordinator.training.settings import TrainingSettings
from side_tuning.wire.messages import TapPlan

if TYPE_CHECKING:
    from coordinator.training.reference import Activations

EXPORT_SECONDS = 3_600.0


@dataclass(frozen=True)
class Comparison:
    """Held-out scores over all devices' test rows."""

    centralised_score: float
    per_device_score: float  # mean over the held-out samples of all devices, each by its own device's network


def compare(
    devices: Sequence[DemoDevice],
    produced: Mapping[str, int],
    plan: TapPlan,
    settings: TrainingSettings,
    *,
    folder: Path,
    say: Say,
    checkpoint_folder: Path,
    samples_drawn: int | None = None,
) -> Comparison:
    """Train both comparisons on what each device produced.

    Args:
        devices: all of them.
        produced: rows that each device read, in order.
        plan: the fleet's.
        settings: the fleet's trainer's.
        folder: for files under way.
        say: told what goes on.
        checkpoint_folder: of the fleet; its anchor maps serve the comparisons too.
        samples_drawn: how many the fleet's trainer drew.

    """
    folder.mkdir(parents=True, exist_ok=True)
    plan_file = folder / "tap-plan"
    plan_file.write_bytes(plan.to_bytes())
    say("comparison: computing the same taps in full precision")
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        files = list(pool.map(lambda device: _export(device, produced[device.name], plan_file, folder), devices))
    train: list[Activations] = []
    held_out: list[Activations] = []
    for device, file in zip(devices, files, strict=True):
        for split, group in _read(device, file, plan).items():
            (held_out if split == "held-out" else train).append(group)
        file.unlink()
    import torch

    from coordinator.training.reference import train_centrally, train_per_device
    from side_tuning.network.anchor_map import AnchorMap
    from side_tuning.network.files import load_alignment

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    classes = len(plan.labels) or 1
    found = {path.stem.removeprefix("alignment-"): load_alignment(path) for path in checkpoint_folder.glob("alignment-*")}
    anchor_maps = {fingerprint: one for fingerprint, one in found.items() if isinstance(one, AnchorMap)}
    settings = settings.model_copy(update={"checkpoint_precision": "float"})
    say("comparison: training one side network centrally")
    central = train_centrally(train, held_out, settings, classes=classes, samples_drawn=samples_drawn, anchor_maps=anchor_maps, task=plan.task)
    say("comparison: training one side network per device")
    alone = train_per_device(train, held_out, settings, classes=classes, anchor_maps=anchor_maps, task=plan.task)
    return Comparison(central.score, alone.score)


def _export(device: DemoDevice, samples: int, plan_file: Path, folder: Path) -> Path:
    out = folder / f"{device.name}.safetensors"
    program = [sys.executable, "-m", "edge_agent.export_taps", "--backbone", str(device.backbone.folder)]
    rest = ["--plan", str(plan_file), "--samples", str(device.samples_file), "--out", str(out), "--limit", str(samples)]
    run_program(f"exporting the taps of {device.name}", [*program, *rest], EXPORT_SECONDS)
    return out


def _read(device: DemoDevice, file: Path, plan: TapPlan) -> dict[str, Activations]:
    import numpy as np
    from safetensors.numpy import load_file

    from coordinator.training.reference import Activations

    tensors = load_file(file)
    layers = plan.layers(device.backbone.manifest.layers)
    inputs = np.stack([tensors[f"layer.{layer}"] for layer in layers], axis=1)  # (rows, B, d)
    width = device.backbone.manifest.width
    rows_each, held_out = tensors["tokens"] + plan.summary_rows(width), tensors["held_out"]
    labels = tensors["target" if plan.task == "regression" else "label"]
    groups = {}
    for split, chosen in (("train", ~held_out), ("held-out", held_out)):
        if not chosen.any():
            continue
        rows = np.repeat(chosen, rows_each) if plan.mode == "sequence" else chosen
        groups[split] = Activations(
            device=device.name,
            fingerprint=device.backbone.manifest.fingerprint,
            inputs=inputs[rows],
            labels=labels[chosen],
            rows_each=rows_each[chosen].tolist() if plan.mode == "sequence" else None,
            summary_width=plan.summary_width(width),
        )
    return groups
