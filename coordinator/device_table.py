"""`coordinator devices`: the fleet as lines for people, or as records for programs."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from typing import Any

from coordinator.store.engine import Store
from coordinator.store.fleet import DeviceOverview, device_overview
from coordinator.store.views import newest_run, task_of_run
from coordinator.timeline import Timeline, TimelineStep, late_first_steps
from side_tuning.tasks import METRICS, Metric

CLOCK_OFF_SECONDS = 300.0  # more than a slow link explains; certificates and schedules begin to suffer


def device_lines(store: Store, only: str | None = None) -> list[str]:
    """A line per device (or for `only` this one): state and since when, backbone, rate, what is stored, and whether its
    samples add up.
    """
    now = datetime.now(timezone.utc)
    with store.read() as session:
        devices = device_overview(session, now, device=only)
        metric = METRICS[task_of_run(session, newest_run(session))]
    if not devices:
        return ["no device has been heard of yet"]
    width = max(len(one.device) for one in devices)
    return [line for one in devices for line in (_line(one, width, metric), *(f"{'':<{width}}  ! {words}" for words in _troubles(one, now)))]


def timeline_lines(way: Timeline) -> list[str]:
    """A device's beginning, a step a line, with the time since the step before."""
    width = max((len(step.words) for step in way.steps), default=0)
    return [f"  {step.words:<{width}}  {_step_words(step)}" for step in way.steps]


def _step_words(step: TimelineStep) -> str:
    if step.overdue is not None:
        return f"OVERDUE: {step.overdue.words}"
    if not step.done:
        return "not yet"
    if step.at is None:
        return "yes, time not known"
    since = "" if step.after_seconds is None else f"  {step.after_seconds:+,.0f} s"
    return f"{step.at:%Y-%m-%d %H:%M:%S}{since}"


def device_records(store: Store) -> list[dict[str, Any]]:
    """The same, complete, as plain values."""
    with store.read() as session:
        devices = device_overview(session, datetime.now(timezone.utc))
    return [_plain(asdict(one)) for one in devices]


def _line(one: DeviceOverview, width: int, metric: Metric) -> str:
    ledger = one.ledger
    if ledger.settled:
        books = "all accounted for"
    elif ledger.balanced:
        books = f"{ledger.missing} on their way"
    else:
        books = f"LEDGER DOES NOT BALANCE: {ledger.missing} of {ledger.produced} missing"
    score = "" if one.score is None else f", {metric.said(one.score)}"
    return (
        f"{one.device:<{width}}  {one.state} since {one.since:%Y-%m-%d %H:%M:%S} ({one.reason}); "
        f"backbone {(one.backbone or 'unknown')[:8]}, {one.rate_5m:.2f} samples/s, {one.stored_samples} samples in "
        f"{one.stored_frames} frames, {one.rejected_frames} rejected, {one.duplicate_frames} duplicates; {books}{score}"
    )


def _troubles(one: DeviceOverview, now: datetime) -> list[str]:
    """What needs a person, with where to look: the device's own words, and what was refused there or rejected here."""
    found = []
    if one.rejected_frames:
        found.append(f"{one.rejected_frames} frames rejected: `coordinator rejections list --device {one.device}` says why")
    health = one.health
    if one.clock_offset_seconds is not None and abs(one.clock_offset_seconds) > CLOCK_OFF_SECONDS:
        away = timedelta(seconds=round(abs(one.clock_offset_seconds)))
        found.append(f"its clock is {away} {'behind' if one.clock_offset_seconds < 0 else 'ahead'}: let it reach a time server")
    found += [late.words for late in late_first_steps(None, one, now)]
    if health is None:
        return found
    if not one.ledger.balanced and health.spool is not None and health.spool.receipted > one.stored_samples + one.duplicate_samples + one.ledger.rejected:
        found.append(f"it has receipts for {health.spool.receipted} samples: if this database is a new or older one, the rest was in the one before")
    found += [words for words in (health.plan_error, health.checkpoint_error and f"checkpoint refused: {health.checkpoint_error}") if words]
    if health.presence == "online" and health.reason:
        found.append(f"it says: {health.reason}")
    if health.spool is not None and health.spool.refused:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(health.spool.refused.items()))
        found.append(f"refused on the device, its log names the rows: {reasons}")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value
