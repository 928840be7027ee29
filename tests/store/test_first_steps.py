"""Reported first steps, set right by our clock; the beginning that a timeline tells; what a hostile device may say."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from coordinator.store.engine import Store
from coordinator.store.first_steps import beginning_of
from coordinator.store.health import record_health
from coordinator.store.identities import (
    add_certificate,
    add_claim,
    approve_device,
    hold_request,
    mark_certificate_seen,
    revoke_device,
    spend_claim,
    withdraw_claim,
)
from coordinator.store.ingest import insert_frames
from coordinator.timeline import Facts
from side_tuning.wire.messages import DeviceStep, Health
from tests.store.frames import START, after, make_frame, received

YEARS = 50 * 365 * 86_400.0
Times = dict[DeviceStep, float | None]


def tell(store: Store, seconds: float, steps: Times | None, *, ahead: float = 0.0, session: str = "one", retained: bool = False) -> None:
    """A report at `seconds`, from a device whose clock is `ahead`."""
    health = Health("online", session, max(0.0, after(seconds).timestamp() + ahead), first_steps=steps)
    with store.write() as transaction:
        record_health(transaction, "kitchen", health, after(seconds), retained=retained)


def at(seconds: float) -> float:
    return after(seconds).timestamp()


def beginning(store: Store, seconds: float = 1000) -> Facts:
    with store.read() as session:
        return beginning_of(session, "kitchen", after(seconds))


def claim(store: Store, seconds: float, name: str = "a", days: float = 7) -> str:
    with store.write() as session:
        add_claim(
            session, f"claim-{name}", "kitchen", serial=name, at=after(seconds), expires_at=after(seconds) + timedelta(days=days), actor="operator"
        )
    return f"claim-{name}"


def enrolled(store: Store, name: str, seconds: float) -> None:
    with store.write() as session:
        assert spend_claim(session, f"claim-{name}", key_digest=name, at=after(seconds))
        add_certificate(
            session, serial=f"c{name}", device="kitchen", key_digest=name, pem=b"", issued_at=after(seconds), expires_at=after(9e6), claim=f"claim-{name}"
        )


def frame(store: Store, sequence: int, seconds: float, spool: str = "5b00") -> None:
    with store.write() as session:
        insert_frames(session, [received(make_frame(sequence=sequence, names=[f"{spool}{sequence}"], spool=spool), after(seconds))])


def test_steps_are_kept_and_follow_what_the_device_says(store: Store):
    tell(store, 10, {"booted": None, "network": at(5)})
    assert beginning(store).reported == {"booted": None, "network": after(5)}
    tell(store, 20, None)
    assert beginning(store).reported == {"booted": None, "network": after(5)}, "a report that says nothing changes nothing"
    tell(store, 30, {"booted": at(1), "network": at(6), "clock": at(25)})
    assert beginning(store).reported == {"booted": after(1), "network": after(5), "clock": after(25)}, "a second is no news"
    tell(store, 40, {"network": at(35)})
    assert beginning(store).reported == {"network": after(35)}, "flashed anew"


def test_a_board_in_1970_is_set_right_by_our_clock(store: Store):
    tell(store, 10, {"booted": 0.0, "network": 40.0, "flashed": at(-600)}, ahead=50.0 - at(10))
    assert beginning(store).reported == {"booted": after(-40), "network": after(0), "flashed": after(-600)}
    # It was switched off and on: 1970 once more, while the first steps have their dates.
    tell(store, 500, {"booted": at(-40), "network": at(0)}, ahead=20.0 - at(500), session="two")
    assert beginning(store).reported == {"booted": after(-40), "network": after(0)}


@pytest.mark.parametrize("ahead", [0.0, YEARS, -YEARS, 86_400.0])
@pytest.mark.parametrize("said", [0.0, 1e12, 253_402_300_800.0, 1.0])
def test_times_that_cannot_be_are_none(store: Store, ahead: float, said: float):
    """Nor can a device put its steps into the future, whatever its clock says."""
    tell(store, 10, {"network": said, "flashed": said}, ahead=ahead)
    for moment in beginning(store).reported.values():
        assert moment is None or datetime(2020, 1, 1, tzinfo=START.tzinfo) <= moment <= after(10)


def test_a_step_a_little_ahead_of_us_is_now(store: Store):
    tell(store, 10, {"network": at(12)})
    assert beginning(store).reported == {"network": after(10)}


def test_a_retained_report_of_a_device_whose_clock_nobody_knows_is_taken_by_its_word(store: Store):
    tell(store, 5000, {"network": at(5), "clock": 3.0}, retained=True)
    assert beginning(store).reported == {"network": after(5), "clock": None}


def test_from_the_claim_to_the_first_frame(store: Store):
    claim(store, 0)
    assert beginning(store) == Facts("kitchen", claimed_at=START)
    with store.write() as session:
        hold_request(session, "claim-a", request=b"csr", at=after(20))
    assert beginning(store).asked_at == after(20)
    with store.write() as session:
        approve_device(session, "kitchen", at=after(30), actor="operator")
    enrolled(store, "a", 40)
    tell(store, 60, {"network": at(15)})
    frame(store, 1, 70)
    frame(store, 2, 80)
    assert beginning(store) == Facts(
        "kitchen", START, "", after(20), after(30), after(40), after(60), stored=True, stored_at=after(70), reported={"network": after(15)},
    )
    with store.write() as session:
        revoke_device(session, "kitchen", at=after(90), actor="operator")
    assert beginning(store).revoked


def test_without_any_claim_the_first_message_begins_it(store: Store):
    frame(store, 1, 70)
    assert beginning(store) == Facts("kitchen", seen_at=after(70), stored=True, stored_at=after(70))
    assert beginning(store, 0).claimed_at is None


def test_a_card_flashed_anew_begins_anew(store: Store):
    claim(store, 0)
    enrolled(store, "a", 40)
    tell(store, 60, {"network": at(30)})
    frame(store, 1, 70)
    claim(store, 10_000, "b")
    assert beginning(store, 10_001) == Facts("kitchen", claimed_at=after(10_000)), "nothing of the old card counts"
    enrolled(store, "b", 10_100)
    with store.write() as session:
        mark_certificate_seen(session, "kitchen", "cb", at=after(10_120))
    tell(store, 10_120, {"network": at(10_090)}, session="two")
    frame(store, 1, 10_130, spool="0ther")
    assert beginning(store, 10_200) == Facts(
        "kitchen", after(10_000), enrolled_at=after(10_100), seen_at=after(10_120), stored=True, stored_at=after(10_130), reported={"network": after(10_090)},
    )


def test_a_device_that_is_enrolled_anew_with_its_spool_shows_when_its_frames_went_on(store: Store):
    claim(store, 0)
    enrolled(store, "a", 40)
    frame(store, 1, 70)
    claim(store, 10_000, "b")
    enrolled(store, "b", 10_100)
    frame(store, 2, 10_130)
    found = beginning(store, 10_200)
    assert (found.stored, found.stored_at) == (True, after(10_100)), "to the minute, and not before its certificate"


def test_a_claim_that_ended_unused_counts_only_where_there_is_no_other(store: Store):
    claim(store, 0, days=0.001)
    assert beginning(store, 1000).claim_ended == "expired"
    newer = claim(store, 200, "c")
    with store.write() as session:
        withdraw_claim(session, newer, at=after(210), actor="operator")
    assert beginning(store, 1000).claim_ended == "withdrawn", "both have ended: the newer is told"
    claim(store, 300, "d")
    assert (beginning(store, 1000).claimed_at, beginning(store, 1000).claim_ended) == (after(300), "")
