"""Both sides' words become one timeline: one order, no step twice, what is overdue named with its cure."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from coordinator.store.fleet import DeviceOverview, device_overview
from coordinator.store.views import DeviceAccess
from coordinator.timeline import Facts, late_first_steps, timeline, why_nothing_stored
from side_tuning.wire.messages import BackboneInfo, Health
from tests.store.frames import START, after, report

DAY = 86_400.0
BACKBONE = BackboneInfo("ab" * 16, "bert", 4, 32, "float")
REPORTED = {
    "flashed": after(60), "booted": after(300), "configured": after(320), "network": after(330), "clock": after(335), "enrolled": after(341),
    "backbone": after(360), "stored": after(372),
}
WHOLE = Facts("kitchen", START, enrolled_at=after(340), seen_at=after(362), stored=True, stored_at=after(370), reported=REPORTED)


def steps(facts: Facts, seconds: float = 400, why: str = "") -> list[str]:
    return [step.step for step in timeline(facts, after(seconds), why).steps if step.done]


def late(facts: Facts, seconds: float, why: str = "") -> list[tuple[str, str]]:
    return [(one.step, one.hint) for one in timeline(facts, after(seconds), why).overdue]


def test_every_step_stands_once_in_order_with_the_time_between():
    way = timeline(WHOLE, after(400))
    assert [(step.step, step.after_seconds) for step in way.steps] == [
        ("claimed", None), ("flashed", 60), ("booted", 240), ("configured", 20), ("network", 10), ("clock", 5), ("enrolled", 5), ("backbone", 20),
        ("seen", 2), ("stored", 8),
    ]
    assert all(step.done for step in way.steps)
    assert way.overdue == ()
    assert way.took_seconds == 370
    assert next(step.at for step in way.steps if step.step == "enrolled") == after(340), "the coordinator knows that itself"


def test_they_stand_as_they_came_where_that_is_another_order():
    """A board without a time server enrols by the trusted time, and has its clock right later."""
    assert steps(replace(WHOLE, reported={**REPORTED, "clock": after(350)})) == [
        "claimed", "flashed", "booted", "configured", "network", "enrolled", "clock", "backbone", "seen", "stored",
    ]


def test_a_step_without_a_time_stands_where_it_belongs():
    way = timeline(replace(WHOLE, reported={**REPORTED, "booted": None, "configured": None}), after(400))
    assert [step.step for step in way.steps][:5] == ["claimed", "flashed", "booted", "configured", "network"]
    assert [step.after_seconds for step in way.steps][2:5] == [None, None, 270]


@pytest.mark.parametrize("at", [after(-3600), after(3000)], ids=["before the claim", "after the boot"])
def test_a_card_written_by_a_computer_whose_clock_is_wrong_has_no_time(at):
    flashed = timeline(replace(WHOLE, reported={**REPORTED, "flashed": at}), after(4000)).steps[1]
    assert (flashed.step, flashed.done, flashed.at) == ("flashed", True, None)


def test_without_a_claim_and_an_agent_that_tells_only_what_was_seen_is_shown():
    assert steps(Facts("kitchen", seen_at=START, stored=True, stored_at=after(5))) == ["seen", "stored"]
    assert [step.step for step in timeline(Facts("kitchen"), START).steps] == ["seen", "stored"], "waited for"


def test_what_the_device_says_of_receipts_does_not_count_without_a_frame():
    assert "stored" not in steps(replace(WHOLE, stored=False, stored_at=None))


CLAIMED = Facts("kitchen", START)


@pytest.mark.parametrize(
    ("facts", "seconds", "step", "hint"),
    [
        (CLAIMED, DAY + 1, "enrolled", "is the card in the board"),
        (replace(CLAIMED, claim_ended="expired"), 10, "enrolled", "expired, unused: `coordinator enrol kitchen`"),
        (replace(CLAIMED, claim_ended="withdrawn"), 10, "enrolled", "been withdrawn, unused: `coordinator enrol kitchen`"),
        (replace(CLAIMED, asked_at=after(60)), 3661, "approved", "`coordinator devices approve kitchen`"),
        (replace(CLAIMED, asked_at=after(60), approved_at=after(90)), 691, "enrolled", "has not asked again"),
        (replace(CLAIMED, enrolled_at=after(60)), 961, "seen", "does the agent run"),
        (replace(WHOLE, stored=False, seen_at=after(340), reported={"network": after(330), "backbone": after(360)}), 931, "clock", "time server"),
        (replace(WHOLE, stored=False, seen_at=after(340), reported={"network": after(330), "clock": after(330)}), 3941, "backbone", "edge-agent doctor"),
        (replace(WHOLE, stored=False), 2161, "stored", "coordinator plan show"),
        (Facts("kitchen", seen_at=START), 1801, "stored", "coordinator plan show"),
    ],
)
def test_what_does_not_come_in_time_is_named_with_a_hint(facts: Facts, seconds: float, step: str, hint: str):
    ((found, words),) = late(facts, seconds)
    assert found == step
    assert hint in words
    if not facts.claim_ended:
        assert late(facts, seconds - 2) == []
    assert late(replace(facts, revoked=True), seconds) == [], "nobody waits for a device that is shut out"


def test_who_waits_for_an_approval_is_not_asked_for_its_cable():
    assert [step for step, _ in late(replace(CLAIMED, asked_at=after(60)), 9 * DAY)] == ["approved"]


def test_the_devices_own_reason_takes_the_place_of_the_general_hint():
    assert late(Facts("kitchen", seen_at=START), 1801, "it is paused: resume it") == [("stored", "it is paused: resume it")]


def overview(store, **changes: object) -> DeviceOverview:
    from coordinator.store.health import record_health

    with store.write() as session:
        record_health(session, "kitchen", replace(report(0, 0, 0, 1, at=START), **{"plan_version": 1, "backbone": BACKBONE, **changes}), START)
    with store.read() as session:
        return device_overview(session, START)[0]


@pytest.fixture
def store(tmp_path):
    from coordinator.store.engine import open_store
    from coordinator.store.schema import upgrade

    upgrade(f"sqlite:///{tmp_path}/store.db")
    with_it = open_store(f"sqlite:///{tmp_path}/store.db")
    yield with_it
    with_it.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "no sample yet: look at [[sources]]"),
        ({"backbone": None}, "it has no backbone yet"),
        ({"backbone": None, "reason": "fetching: 40 %"}, "it has no backbone yet; it says: fetching: 40 %"),
        ({"paused": True}, "it is paused"),
        ({"plan_error": "its rank is 0"}, "refuses its tap plan: its rank is 0"),
        ({"plan_version": 0}, "`coordinator plan set`"),
        ({"reason": "the spool is full"}, "it says: the spool is full"),
        ({"spool": replace(report(0, 0, 0, 1).spool, refused={"no text": 3})}, "refused 3 samples"),
        ({"spool": replace(report(5, 0, 5, 1).spool)}, ""),
    ],
)
def test_why_nothing_is_stored_is_taken_from_what_the_device_says(store, changes, words: str):
    one = overview(store, **changes)
    assert words in why_nothing_stored(one)
    assert bool(words) == bool(why_nothing_stored(one))
    limit = 1800 if one.health and one.health.backbone else 3600  # a backbone may be on its way for longer
    (found,) = late_first_steps(None, one, after(limit + 1))
    assert words in found.words
    assert late_first_steps(None, one, after(limit - 1)) == ()
    assert late_first_steps(None, replace(one, stored_frames=1), after(1801)) == ()


def test_rejected_frames_and_older_agents_have_words_too(store):
    one = overview(store)
    assert "coordinator rejections list" in why_nothing_stored(replace(one, rejected_frames=2))
    assert why_nothing_stored(replace(one, health=None)) == ""
    assert why_nothing_stored(replace(one, state="lost", reason="no goodbye")) == "it is lost: no goodbye"
    assert isinstance(one.health, Health)


def access(**changes: object) -> DeviceAccess:
    values = {
        "device": "shed", "group": "", "created_at": START, "enrolled_at": None, "revoked_at": None, "revoked_reason": "", "waits_since": None,
        "certificate_expires_at": None, "claimed_at": START, "claim_expires_at": after(7 * DAY), **changes,
    }
    return DeviceAccess(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "step"),
    [
        (access(), "enrolled"),
        (access(waits_since=after(60)), "approved"),
        (access(claim_expires_at=after(3600)), "enrolled"),
        (access(enrolled_at=after(60), claimed_at=None, claim_expires_at=None), "seen"),
        (access(claimed_at=None, claim_expires_at=None), None),  # its claim was withdrawn
        (access(revoked_at=after(60)), None),
        (None, None),
    ],
)
def test_a_device_that_never_came_is_overdue_by_its_claim(one, step):
    now = START + timedelta(days=2)
    assert [found.step for found in late_first_steps(one, None, now)] == ([] if step is None else [step])
    assert late_first_steps(one, None, after(120)) == ()
