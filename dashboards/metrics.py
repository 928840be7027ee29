"""`/metrics` for Prometheus: the store's figures as every page shows them, one metric family for each.

Rules: base units in the names; what can only grow is a counter, what a retry or a repair may take back is a gauge (a
counter that falls looks like a restart and a flood); names and versions that devices choose become labels only
cleaned and capped; per-device series end at a limit, the devices that are worst come first. docs/monitoring.md
explains every family.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store
from coordinator.store.errors import StoreError
from coordinator.store.fleet import DeviceOverview
from coordinator.timeline import late_first_steps
from dashboards.measures import Measures, take_measures
from dashboards.snapshot import STATES, FleetSnapshot
from side_tuning.tasks import Metric as TaskMetric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Of the device that is shut out nobody expects anything any more, whatever its connection looks like.
REVOKED = "revoked"
_CONNECTED = ("on-time", "late", "quiet")
_LABEL_CHARACTERS = 64
_MOST_DATES = 16  # certificates that one program tells of

Kind = Literal["counter", "gauge"]
_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


@dataclass(frozen=True)
class PerDevice:
    """A family with one series per device; a device for which `value` is None has none.

    `live`: of no use once the device is gone: the heat of a board that is off must raise no alarm.
    """

    name: str
    kind: Kind
    help: str
    value: Callable[[DeviceOverview], float | None]
    live: bool = False


def _at(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def _reported(name: str) -> Callable[[DeviceOverview], float | None]:
    def value(device: DeviceOverview) -> float | None:
        found = None if device.health is None else getattr(device.health, name)
        return None if found is None else float(found)

    return value


def _spooled(name: str) -> Callable[[DeviceOverview], float | None]:
    def value(device: DeviceOverview) -> float | None:
        spool = None if device.health is None else device.health.spool
        return None if spool is None else float(getattr(spool, name))

    return value


def _refused_samples(device: DeviceOverview) -> float | None:
    spool = None if device.health is None else device.health.spool
    return None if spool is None else float(sum(spool.refused.values()))


def _trouble(name: str) -> Callable[[DeviceOverview], float | None]:
    return lambda device: None if device.health is None else float(bool(getattr(device.health, name)))


PER_DEVICE = (
    PerDevice("state_since_timestamp_seconds", "gauge", "Since when the device is in its state.", lambda d: _at(d.since)),
    PerDevice("first_seen_timestamp_seconds", "gauge", "First message of the device.", lambda d: _at(d.first_seen_at)),
    PerDevice("last_arrival_timestamp_seconds", "gauge", "Newest frame that was stored.", lambda d: _at(d.last_arrival_at)),
    PerDevice("last_report_timestamp_seconds", "gauge", "Newest health report of the device itself.", lambda d: _at(d.heartbeat_at)),
    PerDevice("frames_stored", "counter", "Frames stored.", lambda d: d.stored_frames),
    PerDevice("samples_stored", "counter", "Samples stored.", lambda d: d.stored_samples),
    PerDevice("payload_stored_bytes", "counter", "Payload of the stored frames.", lambda d: d.stored_bytes),
    PerDevice("frames_duplicate", "counter", "Frames that came again.", lambda d: d.duplicate_frames),
    PerDevice("frames_rejected", "gauge", "Frames set aside; fewer after a retry.", lambda d: d.rejected_frames),
    PerDevice("frames_missing", "gauge", "Gaps in the sequence: frames still on their way.", lambda d: d.gap_frames),
    PerDevice("samples_produced", "counter", "Samples the device ever put into its spools.", lambda d: d.ledger.produced),
    PerDevice("samples_dropped", "gauge", "Samples that full spools let go.", lambda d: d.ledger.dropped),
    PerDevice("samples_missing", "gauge", "Samples produced and neither stored, rejected nor dropped: spooled, on their way, or lost.", lambda d: d.ledger.missing),
    PerDevice("samples_abandoned", "gauge", "Samples that went with a spool that the device has no more.", lambda d: d.ledger.abandoned),
    PerDevice("ledger_balanced", "gauge", "1 while every sample is accounted for, 0 when some are lost.", lambda d: float(d.ledger.balanced)),
    PerDevice("clock_offset_seconds", "gauge", "How far the device's clock is ahead of the coordinator's.", lambda d: d.clock_offset_seconds, live=True),
    PerDevice("spool_samples", "gauge", "Samples waiting on the device, by its newest report.", _spooled("spooled")),
    PerDevice("spool_frames", "gauge", "Frames waiting on the device.", _spooled("spooled_frames")),
    PerDevice("spool_bytes", "gauge", "Bytes waiting on the device.", _spooled("spooled_bytes")),
    PerDevice("spool_oldest_age_seconds", "gauge", "Age of the oldest frame waiting on the device.", _spooled("oldest_age_seconds")),
    PerDevice("samples_refused", "counter", "Samples the device could not use (no text, unknown label).", _refused_samples),
    PerDevice("sent_bytes", "counter", "Frame payload handed to the broker, resends included.", _reported("bytes_sent")),
    PerDevice("paused", "gauge", "1 while the device is paused.", _reported("paused")),
    PerDevice("plan_version", "gauge", "Tap plan in use.", _reported("plan_version")),
    PerDevice("plan_refused", "gauge", "1 while the device cannot follow a tap plan.", _trouble("plan_error"), live=True),
    PerDevice("checkpoint_generation", "gauge", "Checkpoint in use, 0 for none.", _reported("checkpoint")),
    PerDevice("checkpoint_refused", "gauge", "1 while the device refuses a checkpoint.", _trouble("checkpoint_error"), live=True),
    PerDevice("forward_seconds", "gauge", "Forward pass, mean per sample since the last report.", _reported("forward_seconds"), live=True),
    PerDevice("temperature_celsius", "gauge", "Temperature of the processor.", _reported("temperature_celsius"), live=True),
    PerDevice("throttled", "gauge", "1 while the processor is slowed down for heat or low voltage.", _reported("throttled"), live=True),
    PerDevice("load1", "gauge", "Load average over one minute.", _reported("load_1m"), live=True),
    PerDevice("memory_available_bytes", "gauge", "Memory available on the device.", _reported("memory_available_bytes"), live=True),
    PerDevice("memory_peak_bytes", "gauge", "Most memory that the agent ever held.", _reported("peak_rss_bytes")),
    PerDevice("disk_free_bytes", "gauge", "Free room on the disk of the spool.", _reported("disk_free_bytes"), live=True),
)  # fmt: skip


def clean(value: object) -> str:
    """`value` as a label: printable, without surrogates (they would end the whole scrape), at most 64 characters."""
    return "".join(c if c.isprintable() and not "\ud800" <= c <= "\udfff" else "?" for c in str(value)[:_LABEL_CHARACTERS])


def states_of(snapshot: FleetSnapshot) -> dict[str, str]:
    """Each device's state by name; that of a revoked one is `revoked`."""
    revoked = {access.device for access in snapshot.access.values() if access.revoked_at is not None}
    return {device.device: REVOKED if device.device in revoked else device.state for device in snapshot.devices}


def worst_first(devices: Iterable[DeviceOverview], states: Mapping[str, str]) -> list[DeviceOverview]:
    """Lost samples first, then by state, then who has been in it for longest; revoked ones last."""
    order = (*STATES, REVOKED)
    return sorted(devices, key=lambda d: (states[d.device] == REVOKED, d.ledger.balanced, order.index(states[d.device]), d.since, d.device))


def metric_families(snapshot: FleetSnapshot, measures: Measures, devices_shown: int) -> Iterator[Metric]:
    """Everything that one scrape shows; `devices_shown` is the limit on devices with series of their own (47 each)."""
    yield InfoMetricFamily("mobillm_build", "Version of mobillm-fleet.", value={"version": _version()})
    states = states_of(snapshot)
    yield from _fleet(snapshot, measures, states)
    yield from _learning(snapshot, measures)
    yield from _server(snapshot, measures)
    ordered = worst_first(snapshot.devices, states)
    shown = ordered[:devices_shown]
    yield _gauge("device_series_left_out", "Devices without series of their own, for the limit was reached.", len(ordered) - len(shown))
    yield from _devices(shown, measures, states)
    yield _scores("device_score", "Score on the device's held-out samples.", snapshot.metric, "device", {d.device: d.score for d in shown})


def _version() -> str:
    try:
        return version("mobillm-fleet")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"


def _gauge(name: str, text: str, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mobillm_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"mobillm_{name}", text, value=value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, float | None]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"mobillm_{name}", text, labels=[label])
    for key, value in values.items():
        if value is not None and math.isfinite(value):
            family.add_metric([clean(key)], value)
    return family


def _scores(name: str, text: str, metric: TaskMetric, label: str | None, values: Mapping[str, float | None]) -> GaugeMetricFamily:
    """`metric` says what the score is: accuracies and correlations want to be high, bits per byte low."""
    family = GaugeMetricFamily(f"mobillm_{name}", text, labels=[*([label] if label else []), "metric"])
    for key, value in values.items():
        if value is not None and math.isfinite(value):
            family.add_metric([*([clean(key)] if label else []), metric.key], value)
    return family


def _fleet(snapshot: FleetSnapshot, measures: Measures, states: Mapping[str, str]) -> Iterator[Metric]:
    totals, ledger = snapshot.totals, snapshot.totals.ledger
    counted = Counter(states.values())
    yield _labelled("devices", "Devices by state.", "state", {state: counted[state] for state in (*STATES, REVOKED)})
    yield _gauge("devices_unbalanced", "Devices whose loss ledger does not balance.", sum(not d.ledger.balanced for d in snapshot.devices))
    access = snapshot.access.values()
    yield _gauge("devices_enrolled", "Devices that have had a certificate and are not revoked.", sum(a.enrolled_at is not None and a.revoked_at is None for a in access))
    yield _gauge("devices_waiting_for_approval", "Devices whose first certificate request waits for a person.", sum(a.waits_since is not None for a in access))
    yield _labelled("devices_first_step_overdue", "Devices of which a step of their beginning, from claim to first stored sample, did not come in time.", "step", _late(snapshot))
    yield _counter("frames_stored", "Frames stored.", totals.frames_stored)
    yield _counter("samples_stored", "Samples stored.", totals.samples_stored)
    yield _counter("payload_stored_bytes", "Payload of the stored frames.", totals.bytes_stored)
    yield _counter("frames_duplicate", "Frames that came again.", totals.duplicate_frames)
    yield _counter("samples_duplicate", "Samples that came again in a new frame.", totals.duplicate_samples)
    yield _gauge("frames_rejected", "Frames set aside; fewer after a retry.", totals.frames_rejected)
    yield _counter("samples_produced", "Samples that devices ever put into their spools.", ledger.produced)
    yield _gauge("samples_spooled", "Samples waiting on the devices, by their newest reports.", ledger.spooled)
    yield _gauge("samples_dropped", "Samples that full spools let go.", ledger.dropped)
    yield _gauge("samples_missing", "Samples produced and neither stored, rejected nor dropped: spooled, on their way, or lost.", ledger.missing)
    yield _gauge("samples_abandoned", "Samples that went with spools that no device has any more.", ledger.abandoned)
    yield _gauge("backbones", "Registered backbones.", measures.backbones)


def _late(snapshot: FleetSnapshot) -> dict[str, float | None]:
    heard = {device.device: device for device in snapshot.devices}
    late = Counter(
        one.step for name in heard.keys() | snapshot.access.keys() for one in late_first_steps(snapshot.access.get(name), heard.get(name), snapshot.at)
    )
    return {step: late[step] for step in ("approved", "enrolled", "seen", "backbone", "stored")}


def _learning(snapshot: FleetSnapshot, measures: Measures) -> Iterator[Metric]:
    metric = snapshot.metric
    for newest in snapshot.scores[-1:]:
        yield _scores("score", "Score on the fleet's held-out samples.", metric, None, {"": newest.score})
        yield _gauge("evaluation_loss", "Loss on the fleet's held-out samples.", newest.loss)
        yield _gauge("evaluation_samples", "Held-out samples in the newest evaluation.", newest.samples)
        yield _gauge("evaluation_step", "Training step of the newest evaluation.", newest.step)
        yield _gauge("evaluation_timestamp_seconds", "When the newest evaluation was made.", newest.at.timestamp())
    yield _scores("backbone_score", "Score on the held-out samples of a backbone type's devices.", metric, "backbone", measures.backbone_scores)
    worst = measures.worst_device
    yield _scores("worst_device_score", "Score of the device that does worst.", metric, "device", {} if worst is None else {worst.name: worst.score})
    yield _counter("checkpoints_offered", "Checkpoints that the trainer or a person offered.", snapshot.totals.checkpoints)
    yield _counter("checkpoints_published", "Checkpoints that devices could fetch.", snapshot.totals.checkpoints_published)
    offered = snapshot.checkpoints[0].generation if snapshot.checkpoints else 0
    published = next((c for c in snapshot.checkpoints if c.published_at is not None), None)
    yield _gauge("checkpoint_offered_generation", "Newest checkpoint, 0 for none.", offered)
    yield _gauge("checkpoint_published_generation", "Newest checkpoint that devices can fetch, 0 for none.", published.generation if published else 0)
    if published is not None:
        yield _gauge("checkpoint_published_timestamp_seconds", "When it was published.", _at(published.published_at))


# A program's own figures: (program, key of its status) -> (metric, kind, help).
PROGRAM_FIGURES: dict[tuple[str, str], tuple[str, Kind, str]] = {
    ("gateway", "connected"): ("gateway_connected", "gauge", "1 while the gateway is connected to the broker."),
    ("gateway", "queue_messages"): ("gateway_queue_messages", "gauge", "Messages received and not yet taken up for storing."),
    ("gateway", "dropped_messages"): ("gateway_messages_dropped", "counter", "Messages that met a full queue; their devices send them again."),
    ("gateway", "unattributable"): ("gateway_messages_unattributable", "counter", "Messages on topics that are no device's."),
    ("gateway", "health"): ("gateway_reports", "counter", "Health reports taken in."),
    ("gateway", "oldest_uncommitted_seconds"): ("gateway_oldest_uncommitted_seconds", "gauge", "Age of the oldest message that is not stored yet."),
    ("gateway", "commit_seconds_last"): ("gateway_commit_seconds", "gauge", "How long the newest batch took to reach the disk."),
    ("gateway", "commit_seconds_average"): ("gateway_commit_average_seconds", "gauge", "The same, over about the last twenty batches."),
    ("gateway", "broker_certificate_expires_at"): ("gateway_broker_certificate_expiry_timestamp_seconds", "gauge", "When the certificate that the broker shows expires."),
    ("enrolment", "connected"): ("enrolment_connected", "gauge", "1 while the enrolment program is connected to the broker."),
    ("enrolment", "answers_issued"): ("enrolment_certificates_issued", "counter", "Certificates issued since the program started, the same one again included."),
    ("enrolment", "answers_waiting"): ("enrolment_requests_held", "counter", "Answers that a request waits for approval."),
    ("enrolment", "answers_refused"): ("enrolment_requests_refused", "counter", "Requests refused by the rules."),
    ("enrolment", "turned_away"): ("enrolment_requests_turned_away", "counter", "Requests of askers that ask more than once a second."),
    ("enrolment", "cut_offs_pending"): ("enrolment_cut_offs_pending", "gauge", "Revoked devices whose connection is not ended yet."),
    ("trainer", "step"): ("trainer_steps", "counter", "Steps of the current run."),
    ("trainer", "samples"): ("trainer_samples", "gauge", "Labelled train samples that the trainer draws from."),
    ("trainer", "samples_drawn"): ("trainer_samples_drawn", "counter", "Samples drawn in the current run, repeats included."),
    ("trainer", "samples_per_second"): ("trainer_samples_per_second", "gauge", "Samples drawn per second, lately."),
    ("trainer", "samples_pending"): ("trainer_samples_pending", "gauge", "Draws that stored samples have paid for and that are not taken yet."),
    ("trainer", "waiting_for_samples"): ("trainer_waiting", "gauge", "1 while there are too few samples to begin with."),
    ("trainer", "loss"): ("trainer_loss", "gauge", "Loss of the newest step."),
    ("trainer", "replay_ratio"): ("trainer_replay_ratio", "gauge", "How often each sample was drawn, in the mean."),
    ("trainer", "replay_ratio_limit"): ("trainer_replay_ratio_limit", "gauge", "How often each may be drawn (training.replay_ratio)."),
}  # fmt: skip
_NONE_IS_ZERO = ("oldest_uncommitted_seconds", "samples_per_second")  # nothing waits; nothing moves


def _server(snapshot: FleetSnapshot, measures: Measures) -> Iterator[Metric]:
    programs = snapshot.programs
    yield _labelled("program_last_beat_timestamp_seconds", "When the program last said that it runs.", "program", {p.name: _at(p.at) for p in programs})
    yield _labelled("program_start_timestamp_seconds", "When the program started.", "program", {p.name: _at(p.started_at) for p in programs})
    yield _labelled(
        "program_looping", "1 while the program's own loops go round.", "program", {p.name: number(p.status.get("looping")) for p in programs}
    )
    yield _labelled(
        "program_in_trouble", "1 while something fails that the program tries again.", "program",
        {p.name: float(bool(p.status["error"])) for p in programs if "error" in p.status},
    )
    statuses = {program.name: program.status for program in programs}
    for (program, key), (name, kind, text) in PROGRAM_FIGURES.items():
        status = statuses.get(program, {})
        value = number(0 if key in _NONE_IS_ZERO and status.get(key, 0) is None else status.get(key))
        if value is not None:
            yield _FAMILIES[kind](f"mobillm_{name}", text, value=value)
    yield _gauge("database_bytes", "Size of the database without its log.", measures.database_bytes)
    if snapshot.log_bytes is not None:
        yield _gauge("database_log_bytes", "Size of SQLite's write-ahead log.", snapshot.log_bytes)
    if measures.disk_free_bytes is not None and measures.disk_size_bytes is not None:
        yield _gauge("disk_free_bytes", "Free room on the disk of the data directory.", measures.disk_free_bytes)
        yield _gauge("disk_size_bytes", "Size of the disk of the data directory.", measures.disk_size_bytes)
    yield _labelled(
        "certificate_expiry_timestamp_seconds", "When a certificate of the broker, an authority or a server program expires.", "certificate",
        _dates(statuses, "certificates"),
    )
    yield _labelled(
        "revocation_list_next_update_timestamp_seconds", "When a revocation list expires: from then on the broker lets nobody in.", "authority",
        _dates(statuses, "revocation_lists"),
    )


def _dates(statuses: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float | None]:
    """What the programs tell of the files that each can see (coordinator/certificate_dates.py)."""
    told = [status.get(key) for status in statuses.values()]
    return {str(name): number(at) for dates in told if isinstance(dates, dict) for name, at in list(dates.items())[:_MOST_DATES]}


def number(value: Any) -> float | None:
    """A figure of a program's status as a number; None where it is none (a row may be from another version)."""
    try:
        return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None
    except OverflowError:  # JSON knows integers of any length
        return None


def _devices(shown: list[DeviceOverview], measures: Measures, of: Mapping[str, str]) -> Iterator[Metric]:
    info = InfoMetricFamily("mobillm_device", "Backbone and agent of a device.", labels=["device"])
    states = GaugeMetricFamily("mobillm_device_state", "1 for the state that the device is in, 0 for the others.", labels=["device", "state"])
    names = {id(device): clean(device.device) for device in shown}
    for device in shown:
        agent = "" if device.health is None else device.health.agent_version
        info.add_metric([names[id(device)]], {"backbone": clean(device.backbone or ""), "agent_version": clean(agent)})
        for state in (*STATES, REVOKED):
            states.add_metric([names[id(device)], state], float(of[device.device] == state))
    yield info
    yield states
    for row in PER_DEVICE:
        family: Any = _FAMILIES[row.kind](f"mobillm_device_{row.name}", row.help, labels=["device"])
        for device in shown:
            if row.live and of[device.device] not in _CONNECTED:
                continue
            value = row.value(device)
            if value is not None and math.isfinite(value):
                family.add_metric([names[id(device)]], value)
        yield family
    yield from _device_certificates([device for device in shown if of[device.device] != REVOKED], measures)


def _device_certificates(shown: list[DeviceOverview], measures: Measures) -> Iterator[Metric]:
    """By the device's own report of the certificate in use, or else by what was issued."""
    expiry: dict[str, float | None] = {}
    lifetime: dict[str, float | None] = {}
    for device in shown:
        issued = measures.certificate_lifetimes.get(device.device)
        reported = None if device.health is None else device.health.certificate_expires_at
        expiry[device.device] = reported if reported is not None else _at(issued[1] if issued else None)
        lifetime[device.device] = None if issued is None else (issued[1] - issued[0]).total_seconds()
    yield _labelled("device_certificate_expiry_timestamp_seconds", "When the certificate in use expires.", "device", expiry)
    yield _labelled("device_certificate_lifetime_seconds", "How long the newest certificate issued to the device lasts in all.", "device", lifetime)


class FleetCollector(Collector):
    """Looks whenever it is asked; holds nothing between two scrapes.

    Args:
        snapshot: the fleet as every page shows it; raises StoreError.
        reader: the store for the rest; raises StoreError.
        settings: for the limit on devices and the places of files.

    """

    def __init__(self, snapshot: Callable[[], FleetSnapshot], reader: Callable[[], Store], settings: CoordinatorSettings) -> None:
        self._snapshot = snapshot
        self._reader = reader
        self._settings = settings

    def collect(self) -> Iterator[Metric]:
        try:
            snapshot = self._snapshot()
            measures = take_measures(self._reader(), snapshot, self._settings)
        except StoreError:
            # Said as a figure, so that an alert can tell it from a dashboard that is down.
            yield _gauge("store_up", "1 while the store can be read.", 0)
            return
        yield _gauge("store_up", "1 while the store can be read.", 1)
        yield from metric_families(snapshot, measures, self._settings.dashboard.metrics_devices)


def metrics_router(collector: Collector) -> APIRouter:
    """`GET /metrics` in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    router = APIRouter()

    @router.get("/metrics", include_in_schema=False)
    def metrics() -> Response:  # not async: it reads the database, so it runs in a thread
        return Response(generate_latest(registry), media_type=CONTENT_TYPE)

    return router
