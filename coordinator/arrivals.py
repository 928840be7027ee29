"""Pure arithmetic on arrivals: rates, expected-by, presence with its reason, sequence gaps, clock offset, loss ledger.

Rules: no SQL, no clock of its own; time comes in as seconds (UTC). The store keeps these small states on its
`devices` and `spools` rows and calls the functions here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["on-time", "late", "quiet", "lost", "offline"]

WINDOWS_SECONDS = (60.0, 300.0, 3600.0)
HEARTBEAT_SECONDS = 30.0
# A device that vanished together with its broker leaves no last will, so silence alone must be enough: two
# heartbeats and a margin.
LOST_AFTER_HEARTBEATS = 2.0
LOST_MARGIN_SECONDS = 10.0
# Before a device's pace is known (fewer than two arrivals) and as the least patience with a bursty one.
UNKNOWN_PACE_SECONDS = 60.0
LEAST_SLACK_SECONDS = 5.0
QUIET_AFTER_WAITS = 3.0
# The largest frame that a tap plan allows; bounds what an unreadable frame can have held.
MOST_SAMPLES_PER_FRAME = 4096


@dataclass(frozen=True)
class RateEstimate:
    """Samples per second as exponential averages over 1, 5 and 60 minutes, corrected for the short past of a new device.

    The first arrival only starts the clock: with it counted, two frames a minute apart would look like twice the rate.
    """

    started_at: float | None = None
    updated_at: float = 0.0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)  # samples, each weighted by exp(-age / window)

    def add(self, samples: int, at: float) -> RateEstimate:
        if self.started_at is None:
            return RateEstimate(at, at)
        a, b, c = self._decayed(at)
        return RateEstimate(self.started_at, max(at, self.updated_at), (a + samples, b + samples, c + samples))

    def rates(self, now: float) -> tuple[float, float, float]:
        """Samples per second over each window; zeros until a second arrival."""
        if self.started_at is None:
            return (0.0, 0.0, 0.0)
        past = max(max(now, self.updated_at) - self.started_at, 1.0)
        a, b, c = (
            total / (window * -math.expm1(-past / window))
            for total, window in zip(self._decayed(now), WINDOWS_SECONDS, strict=True)
        )
        return (a, b, c)

    def _decayed(self, now: float) -> tuple[float, float, float]:
        elapsed = max(now - self.updated_at, 0.0)  # the coordinator's clock may step back
        a, b, c = (total * math.exp(-elapsed / w) for total, w in zip(self.sums, WINDOWS_SECONDS, strict=True))
        return (a, b, c)


@dataclass(frozen=True)
class Pace:
    """How far apart a device's arrivals lie: mean and mean deviation, as TCP estimates its round trip (RFC 6298)."""

    last_at: float | None = None
    interval: float | None = None
    deviation: float = 0.0

    def add(self, at: float) -> Pace:
        if self.last_at is None:
            return Pace(at)
        gap = max(at - self.last_at, 0.0)
        at = max(at, self.last_at)
        if self.interval is None:
            return Pace(at, gap, gap / 2)
        # One long absence must not teach the pace that absences are normal.
        gap = min(gap, max(4 * self.interval, UNKNOWN_PACE_SECONDS))
        deviation = self.deviation + (abs(gap - self.interval) - self.deviation) / 4
        return Pace(at, self.interval + (gap - self.interval) / 8, deviation)


def expected_by(pace: Pace) -> float | None:
    """When the next arrival is due at the latest; None before the first one."""
    if pace.last_at is None:
        return None
    if pace.interval is None:
        return pace.last_at + UNKNOWN_PACE_SECONDS
    return pace.last_at + pace.interval + max(4 * pace.deviation, LEAST_SLACK_SECONDS)


@dataclass(frozen=True)
class Signals:
    """What is known of a device, from three independent sources: the broker's last will, its reports, its frames."""

    first_seen_at: float
    presence: str | None = None  # of the newest health message: online, offline, or lost (the last will)
    presence_at: float | None = None
    presence_reason: str = ""
    heartbeat_at: float | None = None  # newest report that the device itself sent
    last_arrival_at: float | None = None
    expected_by: float | None = None
    paused: bool = False
    spooled: int | None = None  # samples that wait on the device; None when unknown or older than the last arrival


@dataclass(frozen=True)
class DeviceState:
    state: State
    reason: str
    since: float


def state(signals: Signals, now: float, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> DeviceState:
    """The state of a device with its reason and since when.

    A frame is as good a sign of life as a report; a goodbye or a will holds until a newer sign of life.
    """
    said_at = signals.presence_at if signals.presence_at is not None else -math.inf
    frame_since = signals.last_arrival_at is not None and signals.last_arrival_at > said_at
    if not frame_since and signals.presence == "offline":
        return DeviceState("offline", signals.presence_reason or "the device said goodbye", said_at)
    if not frame_since and signals.presence == "lost":
        return DeviceState("lost", signals.presence_reason or "the broker saw the connection break", said_at)

    signs = [at for at in (signals.heartbeat_at, signals.last_arrival_at) if at is not None]
    newest_sign = max(signs, default=signals.first_seen_at)
    patience = LOST_AFTER_HEARTBEATS * heartbeat_seconds + LOST_MARGIN_SECONDS
    if now - newest_sign > patience:
        silence = f"neither a report nor a frame for more than {patience:.0f} s, and no goodbye"
        return DeviceState("lost", silence, newest_sign + patience)

    if signals.last_arrival_at is None or signals.expected_by is None:
        reason = "paused" if signals.paused else "has sent no frame yet"
        return DeviceState("quiet", reason, signals.first_seen_at)
    if now <= signals.expected_by:
        return DeviceState("on-time", "frames arrive at their usual pace", signals.last_arrival_at)
    if signals.paused:
        return DeviceState("quiet", "paused", signals.expected_by)
    if signals.spooled == 0:
        return DeviceState("quiet", "nothing to send: its spool is empty", signals.expected_by)
    if signals.spooled is not None:
        waiting = f"{signals.spooled} samples wait in its spool and none has arrived in time"
        return DeviceState("late", waiting, signals.expected_by)
    quiet_from = signals.last_arrival_at + QUIET_AFTER_WAITS * (signals.expected_by - signals.last_arrival_at)
    if now <= quiet_from:
        return DeviceState("late", "the next frame is overdue", signals.expected_by)
    return DeviceState("quiet", "connected, but no frame for long", quiet_from)


def clock_offset(previous: float | None, device_at: float, received_at: float) -> float:
    """Seconds by which the device's clock is ahead of ours, after one more report.

    Transport delay only ever makes a device look behind, so the least delayed report counts: the estimate rises at
    once and sinks slowly, save for a jump that no delay explains.
    """
    measured = device_at - received_at
    if previous is None or measured >= previous or previous - measured > UNKNOWN_PACE_SECONDS:
        return measured
    return previous + (measured - previous) / 8


def advance(through: int, floor: int, spans: Iterable[tuple[int, int]]) -> int:
    """The highest sequence up to which nothing is open, given that `through` was one.

    Args:
        through: every sequence up to here is stored, rejected or below an earlier floor.
        floor: the device's word that no lower sequence can still arrive.
        spans: (first sequence, how many) of what is stored or rejected beyond, ascending.
    """
    through = max(through, floor - 1)
    for first, count in spans:
        if first > through + 1:
            break
        through = max(through, first + count - 1)
    return through


def gaps(highest: int, here: int, skipped: int) -> int:
    """Sequences up to `highest` that are neither here nor given up by the device: still on their way."""
    return max(highest - here - skipped, 0)


@dataclass(frozen=True)
class SpoolAccount:
    """Both sides' counts for one spool, in samples unless named otherwise: ours, and the device's newest report."""

    stored: int = 0
    stored_again: int = 0  # arrived in a new frame, but the device had sent that sample id before
    rejected: int = 0
    unreadable_frames: int = 0  # rejected frames whose sample count could not be read
    assembling: int = 0  # in frames of which some parts are here and some are not
    gap_frames: int = 0
    produced_seen: int = 0  # highest `produced` in a frame header
    produced: int = 0
    receipted: int = 0
    spooled: int = 0
    dropped: int = 0
    report_is_stale: bool = False  # a frame has arrived since the report, or there is none
    superseded: bool = False  # the device reports from another spool now (a re-flashed card)


@dataclass(frozen=True)
class Ledger:
    """produced = stored + stored_again + rejected + dropped + abandoned + missing; `missing` is what is still out.

    `dropped` leaves out samples that the device gave up but that had arrived. `abandoned` went with a spool that the
    device has no more.
    """

    produced: int = 0
    stored: int = 0
    rejected: int = 0
    spooled: int = 0
    dropped: int = 0
    missing: int = 0
    balanced: bool = True
    settled: bool = True
    stored_again: int = 0
    abandoned: int = 0


def ledger(account: SpoolAccount) -> Ledger:
    """The loss ledger of one spool.

    Balanced: everything the device ever produced is here, given up with a count, or where the device says it is.
    Known weakness: a sample that was dropped although it had arrived (its receipt got lost) can hide one lost sample.
    """
    produced = max(account.produced_seen, account.produced)
    rejected = account.rejected
    absent = produced - account.stored - account.stored_again - rejected
    dropped = min(account.dropped, max(absent, 0))
    missing = absent - dropped

    explained = account.spooled + account.assembling
    if account.report_is_stale and account.gap_frames > 0:
        explained = max(explained, missing)
    # Frames that could not be read were rejected whole; what nothing else explains was in them.
    unreadable = min(max(missing - explained, 0), account.unreadable_frames * MOST_SAMPLES_PER_FRAME)
    rejected += unreadable
    missing -= unreadable

    here = account.stored + account.stored_again + rejected + account.assembling
    balanced = 0 <= missing <= explained and account.receipted <= here + account.unreadable_frames * MOST_SAMPLES_PER_FRAME
    abandoned = missing if account.superseded and balanced else 0
    missing -= abandoned
    return Ledger(
        produced=produced,
        stored=account.stored,
        rejected=rejected,
        spooled=0 if account.superseded else account.spooled,
        dropped=dropped,
        missing=missing,
        balanced=balanced,
        settled=balanced and missing == 0,
        stored_again=account.stored_again,
        abandoned=abandoned,
    )


def combine(ledgers: Iterable[Ledger]) -> Ledger:
    """The ledger over several spools or devices: sums, balanced only if each is."""
    total = Ledger()
    for one in ledgers:
        total = Ledger(
            produced=total.produced + one.produced,
            stored=total.stored + one.stored,
            rejected=total.rejected + one.rejected,
            spooled=total.spooled + one.spooled,
            dropped=total.dropped + one.dropped,
            missing=total.missing + one.missing,
            balanced=total.balanced and one.balanced,
            settled=total.settled and one.settled,
            stored_again=total.stored_again + one.stored_again,
            abandoned=total.abandoned + one.abandoned,
        )
    return total
