"""A device's way from its claim to its first stored sample, from both sides' words joined in one order. Pure.

The coordinator's own times count where it has some; the device's steps fill what only it can know. Where a step does not
come in time, `Timeline.overdue` names it with a hint. The limits stand in side_tuning/first_steps.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

from side_tuning.first_steps import ORDER, WORDS, Overdue, Step, overdue
from side_tuning.wire.messages import DeviceStep

if TYPE_CHECKING:
    from coordinator.store.fleet import DeviceOverview
    from coordinator.store.views import DeviceAccess

CLOCKS_DIFFER_SECONDS = 300.0  # two clocks are never quite the same


@dataclass(frozen=True)
class Facts:
    """What is known of a device's newest beginning. Steps that the coordinator saw itself are in its own times."""

    device: str
    claimed_at: datetime | None = None
    claim_ended: str = ""  # "expired" or "withdrawn", unused
    asked_at: datetime | None = None  # for an approval
    approved_at: datetime | None = None
    enrolled_at: datetime | None = None
    seen_at: datetime | None = None
    stored: bool = False
    stored_at: datetime | None = None
    reported: Mapping[DeviceStep, datetime | None] = field(default_factory=dict)
    revoked: bool = False


@dataclass(frozen=True)
class TimelineStep:
    """One line of the timeline. `at` None: it came, or will; nobody knows when."""

    step: Step
    done: bool
    at: datetime | None = None
    after_seconds: float | None = None  # since the step before it
    overdue: Overdue | None = None

    @property
    def words(self) -> str:
        return WORDS[self.step]


@dataclass(frozen=True)
class Timeline:
    """What came in the order in which it came, then what is waited for."""

    steps: tuple[TimelineStep, ...] = ()

    @property
    def overdue(self) -> tuple[Overdue, ...]:
        return tuple(step.overdue for step in self.steps if step.overdue is not None)

    @property
    def took_seconds(self) -> float | None:
        """From the claim to the first stored sample."""
        known = {step.step: step.at for step in self.steps}
        begun, ended = known.get("claimed"), known.get("stored")
        return None if begun is None or ended is None else max(0.0, (ended - begun).total_seconds())


def timeline(facts: Facts, now: datetime, why_nothing_stored: str = "") -> Timeline:
    """Join what both sides know; `why_nothing_stored` replaces the general hints for the last steps."""
    times = _times(facts)
    late = {one.step: one for one in _late(facts, times, now, why_nothing_stored)}
    came: list[TimelineStep] = []
    before: datetime | None = None
    for step in _in_order(times):
        at = times[step]
        gap = (at - before).total_seconds() if at is not None and before is not None else None
        came.append(TimelineStep(step, done=True, at=at, after_seconds=gap))
        before = at or before
    waited_for = [TimelineStep(step, done=False, overdue=late.get(step)) for step in ORDER if step in _expected(facts, times) and step not in times]
    return Timeline((*came, *waited_for))


def late_first_steps(access: DeviceAccess | None, one: DeviceOverview | None, now: datetime) -> tuple[Overdue, ...]:
    """What is overdue of a device's beginning by the fleet's overview alone: cheap enough for every device, all the time."""
    if one is not None:
        if one.stored_frames:
            return ()
        without_backbone = one.health is not None and one.health.backbone is None
        revoked = access is not None and access.revoked_at is not None
        facts = Facts(one.device, seen_at=one.first_seen_at, reported={"network": None} if without_backbone else {}, revoked=revoked)
        return timeline(facts, now, why_nothing_stored(one)).overdue
    if access is None or access.revoked_at is not None or (access.enrolled_at is None and access.claimed_at is None):
        return ()
    ended = "expired" if access.enrolled_at is None and access.claim_expires_at is not None and access.claim_expires_at <= now else ""
    facts = Facts(access.device, access.claimed_at, ended, access.waits_since, enrolled_at=access.enrolled_at)
    return timeline(facts, now).overdue


def why_nothing_stored(one: DeviceOverview) -> str:
    """The likeliest reason, from what the device says of itself."""
    health = one.health
    if one.rejected_frames:
        return f"its frames are rejected: `coordinator rejections list --device {one.device}` says why"
    if one.state in ("lost", "offline"):
        return f"it is {one.state}: {one.reason}"
    if health is None:
        return ""
    if health.backbone is None:
        return "it has no backbone yet" + (f"; it says: {health.reason}" if health.reason else "")
    if health.paused:
        return "it is paused: resume it"
    if health.plan_error:
        return f"it refuses its tap plan: {health.plan_error}"
    if not health.plan_version:
        return "it has no tap plan: give the fleet one with `coordinator plan set`"
    if health.presence == "online" and health.reason:
        return f"it says: {health.reason}"
    if health.spool is not None and not health.spool.produced:
        refused = sum(health.spool.refused.values())
        return f"it refused {refused} samples, its log names them" if refused else "it has had no sample yet: look at [[sources]] in its settings"
    return ""


def _times(facts: Facts) -> dict[Step, datetime | None]:
    """When each step was that came. A time that cannot be is none."""
    reported = dict(facts.reported)
    # The card was written after its claim was made and before it was booted, or the clock of that computer is wrong.
    flashed, earliest = reported.get("flashed"), min((at for step, at in reported.items() if at is not None and step != "flashed"), default=None)
    if flashed is not None and (_before(flashed, facts.claimed_at) or _before(earliest, flashed)):
        reported["flashed"] = None
    times: dict[Step, datetime | None] = {step: at for step, at in reported.items() if step not in ("enrolled", "stored")}
    own: dict[Step, datetime | None] = {
        "claimed": facts.claimed_at, "asked": facts.asked_at, "approved": facts.approved_at, "enrolled": facts.enrolled_at, "seen": facts.seen_at,
    }
    times |= {step: at for step, at in own.items() if at is not None}
    if facts.stored:
        times["stored"] = facts.stored_at or reported.get("stored")
    return times


def _before(earlier: datetime | None, later: datetime | None) -> bool:
    return earlier is not None and later is not None and (later - earlier).total_seconds() > CLOCKS_DIFFER_SECONDS


def _expected(facts: Facts, times: Mapping[Step, datetime | None]) -> set[Step]:
    """What should come of this device, or has."""
    if facts.revoked:
        return set()
    expected: set[Step] = {"seen", "stored"}
    if facts.claimed_at is not None and "enrolled" not in times:
        expected.add("approved" if facts.asked_at is not None and facts.approved_at is None else "enrolled")
    if facts.reported:
        expected |= {"clock", "backbone"}
    return expected


def _late(facts: Facts, times: Mapping[Step, datetime | None], now: datetime, why: str) -> list[Overdue]:
    expected = _expected(facts, times)
    seconds = {step: None if at is None else at.timestamp() for step, at in times.items()}
    if facts.claim_ended and "enrolled" in expected and facts.claimed_at is not None:
        hint = f"its claim has {'expired' if facts.claim_ended == 'expired' else 'been withdrawn'}, unused: `coordinator enrol {facts.device}` makes a new bundle"
        return [Overdue("enrolled", "claimed", 0.0, (now - facts.claimed_at).total_seconds(), hint)]
    if "backbone" in expected and "backbone" not in times:
        expected.discard("stored")  # it has its time from then on
    late = overdue(seconds, expected, now.timestamp(), facts.device)
    return [replace(one, hint=why) if why and one.step in ("backbone", "stored") else one for one in late]


def _in_order(times: Mapping[Step, datetime | None]) -> list[Step]:
    """By time; what has none stands behind the step that should come before it."""
    steps = [step for step in ORDER if step in times]
    place: dict[Step, float] = {}
    reached = float("-inf")
    for step in steps:
        at = times[step]
        reached = reached if at is None else at.timestamp()
        place[step] = reached
    return sorted(steps, key=lambda step: (place[step], ORDER.index(step)))
