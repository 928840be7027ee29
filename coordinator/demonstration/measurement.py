"""What is measured when the fleet is at rest: the score on each device by the device, the gateway's speed, the comparisons."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from coordinator.demonstration.comparison import Comparison, compare
from coordinator.demonstration.data import held_out_among
from coordinator.demonstration.errors import DemoError
from coordinator.demonstration.fleet import DemoDevice
from coordinator.demonstration.observation import Observation, scores_at
from coordinator.demonstration.processes import run_program
from coordinator.demonstration.report import DeviceReport, FleetReport, Report
from coordinator.demonstration.running import RunningFleet
from coordinator.demonstration.throughput import measure_gateway
from coordinator.demonstration.view import bytes_per_sample
from coordinator.store.training import StoredEvaluation
from side_tuning.tasks import METRICS

INFERRING_SECONDS = 900.0
_MIB = 2**20


@dataclass(frozen=True)
class OnDevice:
    """What `edge-agent infer --file` says of the device's held-out rows."""

    score: float
    checkpoint: int
    peak_rss_mb: float
    untuned: float | None = None  # language models: bits per byte of the backbone alone


@dataclass
class Measured:
    """All that may be missing when a demonstration ends early."""

    on_device: Mapping[str, OnDevice]
    gateway_frames_per_second: float | None = None
    comparison: Comparison | None = None


def measure(fleet: RunningFleet, *, complete: bool) -> tuple[Report, bool]:
    """The report, and whether everything could be measured."""
    seen = fleet.seen
    if seen is None:
        raise DemoError("the coordinator's database was never readable; see the logs")
    measured = Measured({})
    try:
        if complete and seen.published is not None:
            _measure_at_rest(fleet, seen, measured)
    except KeyboardInterrupt:
        fleet.view.say("interrupted: the rest is not measured")
        complete = False
    return _report(fleet, seen, measured), complete


def _measure_at_rest(fleet: RunningFleet, seen: Observation, measured: Measured) -> None:
    view = fleet.view
    view.phase("each device measures itself with the checkpoint that it received")
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = pool.map(lambda device: _measure_on_device(device, _rows_read(seen, device)), fleet.devices)
        measured.on_device = {device.name: one for device, one in zip(fleet.devices, found, strict=True) if one is not None}
    for device in fleet.devices:
        if device.name not in measured.on_device:
            view.say(f"{device.name} has received no checkpoint: more --seconds give it time to")
    if not fleet.options.compare or seen.newest is None or seen.plan is None:
        return
    view.phase("measuring the gateway's speed with frames of this run")
    measured.gateway_frames_per_second = measure_gateway(fleet.store, seen, fleet.folder / "throughput", broker=fleet.options.broker)
    if fleet.options.task == "causal-lm":
        return  # benchmarks.language compares
    training = fleet.settings.training
    measured.comparison = compare(
        fleet.devices,
        {device.name: _rows_read(seen, device) for device in fleet.devices},
        seen.plan,
        training,
        folder=fleet.folder / "comparison",
        say=view.phase,
        checkpoint_folder=Path(seen.newest.folder),
        samples_drawn=seen.newest.step * training.batch_size,
    )


def _rows_read(seen: Observation, device: DemoDevice) -> int:
    return seen.produced(device.name) + seen.refused(device.name)


def _measure_on_device(device: DemoDevice, rows_read: int) -> OnDevice | None:
    """On the held-out rows that it has sent, so that coordinator and device speak of the same ones."""
    program = [sys.executable, "-m", "edge_agent.cli", "infer", "--config", str(device.config_file)]
    if not (device.state_directory / "checkpoints").is_dir():
        return None
    held_out = device.folder / "held-out-read.jsonl"
    if not held_out_among(device.samples_file, rows_read, held_out):
        return None
    said = run_program(f"measuring {device.name}", [*program, "--file", str(held_out), "--json"], INFERRING_SECONDS)
    body = json.loads(said)
    return OnDevice(float(body["score"]), int(body["checkpoint"]), float(body["peak_rss_mb"]), body.get("backbone_score"))


def _report(fleet: RunningFleet, seen: Observation, measured: Measured) -> Report:
    devices = [_device_report(fleet, seen, device, measured.on_device.get(device.name)) for device in fleet.devices]
    generation = max((one.checkpoint for one in measured.on_device.values()), default=seen.published.generation if seen.published else 0)
    score, by_device = scores_at(fleet.store, generation)
    totals = seen.totals
    metric = METRICS[fleet.settings.task.kind]
    peaks = [one.peak_rss_mb for one in devices if one.peak_rss_mb is not None]
    return Report(
        FleetReport(
            metric=metric.name,
            score=score,
            worst_device_score=min(by_device.values(), key=metric.rank, default=None),
            samples_stored=totals.samples_stored,
            frames_stored=totals.frames_stored,
            frames_rejected=totals.frames_rejected,
            duplicates=totals.duplicate_frames,
            bytes_per_sample=round(bytes_per_sample(seen), 1),
            checkpoints_published=totals.checkpoints_published,
            ledger_balanced=totals.ledger.balanced,
            seconds=round(fleet.seconds, 1),
            centralised_score=measured.comparison.centralised_score if measured.comparison else None,
            per_device_score=measured.comparison.per_device_score if measured.comparison else None,
            gateway_frames_per_second=_rounded(measured.gateway_frames_per_second),
            training_samples_per_second=_rounded(_training_rate(seen.evaluations, fleet.settings.training.of_task(fleet.settings.task.kind).batch_size)),
            peak_rss_mb=max(peaks, default=None),
            start_up_seconds=_rounded(fleet.first_sample_seconds),
        ),
        devices,
        fleet.writer.texts if fleet.writer is not None else {},
    )


def _device_report(fleet: RunningFleet, seen: Observation, device: DemoDevice, on_device: OnDevice | None) -> DeviceReport:
    one = seen.devices.get(device.name)
    health = one.health if one is not None else None
    checkpoint = on_device.checkpoint if on_device else (health.checkpoint if health else 0)
    peak = fleet.peak_rss_bytes.get(device.name)
    manifest = device.backbone.manifest
    return DeviceReport(
        device=device.name,
        backbone=manifest.fingerprint,
        layers=manifest.layers,
        weights=manifest.weights,
        samples_produced=seen.produced(device.name),
        samples_stored=one.stored_samples if one is not None else 0,
        bytes_sent=health.bytes_sent if health is not None else 0,
        score=scores_at(fleet.store, checkpoint)[1].get(device.name),
        on_device_score=on_device.score if on_device else None,
        peak_rss_mb=round(peak / _MIB, 1) if peak else None,
        start_up_seconds=_rounded(fleet.start_up_seconds.get(device.name)),
        checkpoint=checkpoint or None,
        untuned_score=on_device.untuned if on_device else None,
        label=device.backbone.label,
    )


def _training_rate(evaluations: Sequence[StoredEvaluation], batch_size: int) -> float | None:
    """The most samples a second between two evaluations: what the trainer does while it is not waiting for samples."""
    rates = [
        (later.step - earlier.step) * batch_size / seconds
        for earlier, later in pairwise(evaluations)
        if later.step > earlier.step and (seconds := (later.at - earlier.at).total_seconds()) >= 1.0
    ]
    return max(rates, default=None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
