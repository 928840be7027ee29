"""Reports and last wills: presence, clock, floors and the device's half of the ledger."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from coordinator.store.engine import Store
from coordinator.store.fleet import DeviceOverview, device_overview
from coordinator.store.health import record_health
from coordinator.store.ingest import insert_frames, receipts_for
from coordinator.store.rejections import rejections
from side_tuning.wire.frame import encode_frame, split_frame
from side_tuning.wire.messages import BackboneInfo, Health, Receipt
from tests.store.frames import FINGERPRINT, SPOOL, START, after, make_frame, received, report


def tell(store: Store, health: Health, at: datetime, retained: bool = False) -> None:
    with store.write() as session:
        record_health(session, "kitchen", health, at, retained=retained)


def look(store: Store, at: datetime) -> DeviceOverview:
    with store.read() as session:
        return device_overview(session, at)[0]


def receipt(store: Store) -> Receipt:
    with store.read() as session:
        return receipts_for(session, [("kitchen", SPOOL)])["kitchen", SPOOL]


def online(seconds: float, session: str = "one", **changes: object) -> Health:
    return replace(Health("online", session, after(seconds).timestamp()), **changes)  # type: ignore[arg-type]


def test_a_report_is_kept_whole(store: Store):
    health = online(0, backbone=BackboneInfo(FINGERPRINT, "bert", 6, 384, "int8"), temperature_celsius=61.5, paused=True)
    tell(store, health, after(0.5))
    view = look(store, after(1))
    assert view.health == health
    assert (view.state, view.reason, view.backbone) == ("quiet", "paused", FINGERPRINT)
    assert view.clock_offset_seconds == pytest.approx(-0.5)


def test_goodbye_last_will_and_silence_are_told_apart(store: Store):
    tell(store, online(0), after(0))
    assert look(store, after(60)).state == "quiet"
    assert look(store, after(71)).state == "lost"

    tell(store, Health("offline", "one", after(80).timestamp(), reason="stopped by systemd"), after(80))
    view = look(store, after(500))
    assert (view.state, view.reason, view.since) == ("offline", "stopped by systemd", after(80))

    tell(store, online(600, "two"), after(600))
    assert look(store, after(601)).state == "quiet"
    tell(store, online(600, "two").as_last_will(), after(630))
    view = look(store, after(631))
    assert (view.state, view.since) == ("lost", after(630))
    assert view.health is not None
    assert view.health.presence == "online"  # a will says nothing of the device; its last report stays to be seen


def test_an_old_will_cannot_declare_a_newer_connection_lost(store: Store):
    old, new = online(0, "old"), online(100, "new")
    tell(store, old, after(0))
    tell(store, new, after(100))
    tell(store, old.as_last_will(), after(101))
    assert look(store, after(102)).state == "quiet"


def test_a_will_of_a_connection_that_was_never_heard_of_counts_if_it_is_younger(store: Store):
    """The gateway was away while the device came back and died."""
    tell(store, online(0, "old"), after(0))
    tell(store, online(50, "unheard").as_last_will(), after(60), retained=True)
    assert look(store, after(61)).state == "lost"


def test_a_will_after_a_goodbye_changes_nothing(store: Store):
    tell(store, online(0), after(0))
    tell(store, Health("offline", "one", after(5).timestamp(), reason="stopped"), after(5))
    tell(store, online(0).as_last_will(), after(6))
    assert look(store, after(7)).state == "offline"


def test_a_retained_report_does_not_make_a_dead_device_look_alive(store: Store):
    """Broker and device lost power together, so no will was sent; a new gateway gets the retained report."""
    tell(store, online(0), after(0))
    tell(store, online(0), after(3600), retained=True)
    assert look(store, after(3601)).state == "lost"
    tell(store, online(30), after(7200), retained=True)  # one that we had missed, but old all the same
    assert look(store, after(7201)).state == "lost"


def test_a_raised_floor_lets_the_receipt_pass_what_was_dropped(store: Store):
    with store.write() as session:
        insert_frames(session, [received(make_frame(sequence=n, names=[n], produced=n)) for n in (1, 4, 6)])
    assert receipt(store) == Receipt(SPOOL, 1, (4, 6))
    tell(store, report(produced=6, receipted=3, spooled=1, floor=5, at=after(1), dropped=2), after(1))
    assert receipt(store) == Receipt(SPOOL, 4, (6,))
    view = look(store, after(1))
    assert (view.gap_frames, view.ledger.dropped, view.ledger.missing, view.ledger.balanced) == (1, 2, 1, True)

    with store.write() as session:
        insert_frames(session, [received(make_frame(sequence=5, names=[5], produced=5))])
    assert receipt(store) == Receipt(SPOOL, 6)
    assert look(store, after(1)).ledger.settled

    with store.write() as session:  # dropped, and yet it comes: the broker had it all the time
        assert insert_frames(session, [received(make_frame(sequence=2, names=[2], produced=2))])[0].outcome == "stored"
    assert receipt(store) == Receipt(SPOOL, 6)
    view = look(store, after(1))
    assert (view.gap_frames, view.ledger.stored, view.ledger.dropped, view.ledger.settled) == (0, 5, 1, True)


def test_a_floor_far_beyond_anything_sent_costs_nothing(store: Store):
    tell(store, report(produced=0, receipted=0, spooled=0, floor=2**53), after(1))
    assert receipt(store).stored_through == 2**53 - 1
    with store.write() as session:
        assert insert_frames(session, [received(make_frame())])[0].outcome == "stored"


def test_a_frame_whose_other_parts_were_dropped_is_rejected(store: Store):
    parts = split_frame(encode_frame(make_frame(names=range(40), produced=40, width=64)), 1200)
    with store.write() as session:
        insert_frames(session, [received(part) for part in parts[:-1]])
    tell(store, report(produced=40, receipted=40, spooled=0, floor=len(parts) + 1), after(1))
    with store.read() as session:
        kept = rejections(session, with_payload=True)
    assert [row.payload for row in kept] == parts[:-1][::-1]
    assert f"of {len(parts)} parts of which {len(parts) - 1} came; the device gave up the rest" in kept[0].reason
    view = look(store, after(1))
    assert (view.ledger.rejected, view.ledger.settled, view.gap_frames) == (40, True, 0)
    assert receipt(store).stored_through == len(parts)


def test_a_card_flashed_anew_has_a_ledger_of_its_own(store: Store):
    with store.write() as session:
        insert_frames(session, [received(make_frame(sequence=1, names="ab", produced=2))])
    tell(store, report(produced=5, receipted=2, spooled=3, floor=2), after(1))
    assert look(store, after(1)).ledger.missing == 3

    new = "0ther"
    with store.write() as session:
        insert_frames(session, [received(make_frame(sequence=1, names="abc", produced=3, spool=new))])
    tell(store, report(produced=3, receipted=3, spooled=0, floor=2, spool=new, session="two"), after(2))
    view = look(store, after(2))
    assert [spool.superseded_at for spool in view.spools] == [after(2), None]
    assert (view.ledger.produced, view.ledger.stored, view.ledger.stored_again) == (8, 3, 2)
    assert (view.ledger.abandoned, view.ledger.missing, view.ledger.settled) == (3, 0, True)


def test_an_older_report_does_not_take_counts_back(store: Store):
    tell(store, report(produced=10, receipted=0, spooled=10, floor=1), after(1))
    tell(store, report(produced=4, receipted=0, spooled=4, floor=1, session="older"), START)
    assert look(store, after(1)).ledger.produced == 10
