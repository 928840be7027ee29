"""The closing figures: gathered once, printed as a table, written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from coordinator.demonstration.view import size_words
from side_tuning.tasks import METRICS, Metric


@dataclass(frozen=True)
class DeviceReport:
    """One device. None: not measured in this run."""

    device: str
    backbone: str
    layers: int
    weights: str
    samples_produced: int
    samples_stored: int
    bytes_sent: int
    score: float | None  # by the coordinator, on this device's held-out samples, with the checkpoint that the device uses
    on_device_score: float | None  # by the device itself, with the checkpoint that it received
    peak_rss_mb: float | None
    start_up_seconds: float | None  # from starting the program to its first connection
    checkpoint: int | None
    untuned_score: float | None = None  # language models: of the backbone alone, by the device itself
    label: str = ""  # of the backbone


@dataclass(frozen=True)
class FleetReport:
    """The whole fleet."""

    metric: str  # what the scores are: accuracy, correlation, bits per byte
    score: float | None
    worst_device_score: float | None
    samples_stored: int
    frames_stored: int
    frames_rejected: int
    duplicates: int
    bytes_per_sample: float
    checkpoints_published: int
    ledger_balanced: bool
    seconds: float
    centralised_score: float | None
    per_device_score: float | None
    gateway_frames_per_second: float | None
    training_samples_per_second: float | None
    peak_rss_mb: float | None
    start_up_seconds: float | None  # from starting everything to the first stored sample


@dataclass(frozen=True)
class Report:
    fleet: FleetReport
    devices: Sequence[DeviceReport]
    written: Mapping[int, str] = field(default_factory=dict)  # language models: what one device wrote with each checkpoint

    def as_json(self) -> Mapping[str, object]:
        return {"fleet": asdict(self.fleet), "devices": [asdict(device) for device in self.devices], "written": dict(self.written)}


def print_report(report: Report, console: Console) -> None:
    """Two tables, at most 80 columns wide."""
    metric = next(one for one in METRICS.values() if one.name == report.fleet.metric)
    table = Table(title="The devices", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    language = metric is METRICS["causal-lm"]
    for name in ("device", "backbone" if language else "MiniLM"):
        table.add_column(name, no_wrap=True)
    for name in ("stored", "sent", "untuned", "tuned", "on device", "memory") if language else ("produced", "stored", "sent", metric.name, "on device", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report.devices:
        table.add_row(
            one.device,
            one.label if language else f"{one.layers} x {one.weights}",
            *([] if language else [f"{one.samples_produced:,}"]),
            f"{one.samples_stored:,}",
            size_words(one.bytes_sent),
            *([_score(metric, one.untuned_score)] if language else []),
            _score(metric, one.score),
            _score(metric, one.on_device_score),
            "" if one.peak_rss_mb is None else f"{one.peak_rss_mb:.0f} MB",
        )
    console.print(table)
    fleet = report.fleet
    figures = Table(title="The fleet", title_justify="left", show_header=False, box=SIMPLE_HEAD, pad_edge=False)
    figures.add_column()
    figures.add_column(justify="right")
    rows: list[tuple[str, str]] = [
        (f"{metric.name} of the one shared side network", _score(metric, fleet.score)),
        ("the same on the worst device", _score(metric, fleet.worst_device_score)),
        ("trained centrally, same taps in full precision", _score(metric, fleet.centralised_score)),
        ("one network per device instead (mean)", _score(metric, fleet.per_device_score)),
        ("samples stored", f"{fleet.samples_stored:,}"),
        ("frames stored, rejected, duplicates", f"{fleet.frames_stored:,}, {fleet.frames_rejected}, {fleet.duplicates}"),
        ("loss ledger", "balanced" if fleet.ledger_balanced else "DOES NOT BALANCE"),
        ("bytes a sample", f"{fleet.bytes_per_sample:.0f}"),
        ("checkpoints published", str(fleet.checkpoints_published)),
        ("frames a second that the gateway can store", _number(fleet.gateway_frames_per_second)),
        ("samples a second that the trainer took", _number(fleet.training_samples_per_second)),
        ("largest agent", "" if fleet.peak_rss_mb is None else f"{fleet.peak_rss_mb:.0f} MB"),
        ("slowest start of an agent", _seconds(max((s for one in report.devices if (s := one.start_up_seconds)), default=None))),
        ("start to first stored sample", _seconds(fleet.start_up_seconds)),
        ("start to last checkpoint received", f"{fleet.seconds:.0f} s"),
    ]
    for name, value in rows:
        if value:
            figures.add_row(name, value)
    console.print(figures)
    for generation, text in sorted(report.written.items()):
        console.print(f"checkpoint {generation} wrote: {text}", markup=False, highlight=False)


def _score(metric: Metric, score: float | None) -> str:
    return "" if score is None else metric.shown(score)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
