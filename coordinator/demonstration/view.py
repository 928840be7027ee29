"""The live view: a table that renews itself in a terminal, plain lines every few seconds where there is none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from coordinator.demonstration.fleet import DemoDevice
from coordinator.demonstration.observation import Observation
from coordinator.store.fleet import DeviceOverview
from side_tuning.tasks import METRICS, Metric

PLAIN_EVERY_SECONDS = 5.0
_STATE_STYLES = {"on-time": "green", "late": "yellow", "quiet": "dim", "lost": "bold red", "offline": "red"}


class View:
    """Shows phases, news and observations; `with View(...)` gives the terminal back whatever happens."""

    def __init__(self, devices: Sequence[DemoDevice], console: Console, seconds: float) -> None:
        self._devices = devices
        self._console = console
        self._seconds = seconds
        self._began = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._phase = "starting"
        self._printed_at = -PLAIN_EVERY_SECONDS

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, phase: str) -> None:
        self._phase = phase
        self.say(phase)

    def say(self, line: str) -> None:
        """One line that stays."""
        self._console.print(Text(f"{self._clock()}  {line}"), soft_wrap=True)

    def show(self, seen: Observation | None) -> None:
        """Renew the picture."""
        if self._live is not None:
            self._live.update(Group(device_table(self._devices, seen), fleet_line(self._header(), seen)), refresh=True)
        elif time.monotonic() - self._printed_at >= PLAIN_EVERY_SECONDS:
            self._printed_at = time.monotonic()
            parts = [_brief(device, seen) for device in self._devices]
            self._console.print(Text(f"{self._clock()}  {' | '.join(parts)} || {fleet_line('', seen).plain}"), soft_wrap=True)

    def _header(self) -> str:
        return f"{self._clock()} of about {self._seconds:.0f} s: {self._phase}"

    def _clock(self) -> str:
        return f"{time.monotonic() - self._began:5.0f} s"


def device_table(devices: Sequence[DemoDevice], seen: Observation | None) -> Table:
    metric = metric_of(seen)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("device", "backbone", "state"):
        table.add_column(name)
    for name in ("samples/s", "spool", "stored", "sent", "checkpoint", metric.name):
        table.add_column(name, justify="right")
    for device in devices:
        one = None if seen is None else seen.devices.get(device.name)
        backbone = device.backbone.label
        if one is None:
            table.add_row(device.name, backbone, Text("starting", "dim"), *[""] * 6)
            continue
        health = one.health
        table.add_row(
            device.name,
            backbone,
            Text(one.state, _STATE_STYLES[one.state]),
            f"{one.rate_1m:.1f}",
            f"{one.ledger.spooled:,}",
            f"{one.stored_samples:,} / {device.samples:,}",
            "" if health is None else size_words(health.bytes_sent),
            str(health.checkpoint) if health is not None and health.checkpoint else "",
            "" if one.score is None else metric.shown(one.score),
        )
    return table


def fleet_line(header: str, seen: Observation | None) -> Text:
    """The fleet in a sentence, under a header if there is one."""
    line = Text(f"\n{header}\n" if header else "")
    if seen is None:
        return line.append("the coordinator is starting")
    totals = seen.totals
    books = totals.ledger
    line.append(f"{totals.samples_stored:,} samples in {totals.frames_stored:,} frames, {bytes_per_sample(seen):.0f} bytes a sample; ")
    line.append(f"{totals.frames_rejected} rejected, {totals.duplicate_frames} duplicates; ")
    if books.balanced:
        line.append(f"ledger balanced, {books.missing:,} on their way; " if books.missing else "ledger balanced; ", "green")
    else:
        line.append(f"LEDGER DOES NOT BALANCE: {books.missing} of {books.produced} missing; ", "bold red")
    line.append(f"step {seen.step:,}, {totals.checkpoints_published} checkpoints, ")
    return line.append(metric_of(seen).said(seen.evaluations[-1].score) if seen.evaluations else "not measured yet", "bold")


def _brief(device: DemoDevice, seen: Observation | None) -> str:
    one: DeviceOverview | None = None if seen is None else seen.devices.get(device.name)
    if one is None:
        return f"{device.name} starting"
    score = "" if seen is None or one.score is None else f" {metric_of(seen).shown(one.score)}"
    return f"{device.name} {one.state} {one.rate_1m:.1f}/s spool {one.ledger.spooled} stored {one.stored_samples}{score}"


def bytes_per_sample(seen: Observation) -> float:
    return seen.totals.bytes_stored / max(1, seen.totals.samples_stored)


def metric_of(seen: Observation | None) -> Metric:
    """What the fleet's scores are, by its tap plan."""
    return METRICS["classification" if seen is None or seen.plan is None else seen.plan.task]


def size_words(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
