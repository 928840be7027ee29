"""Batches of frames: each stored once, counted once, and the reason of every refusal kept."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import func, select

from coordinator.store.accounts import open_counts
from coordinator.store.counts import SpoolCounts, write_counts
from coordinator.store.engine import Store
from coordinator.store.errors import StoreError
from coordinator.store.fleet import device_overview, fleet_totals
from coordinator.store.ingest import (
    FrameOutcome,
    ReceivedFrame,
    accept_rejected,
    insert_frames,
    insert_rejection,
    receipts_for,
)
from coordinator.store.models import FrameBody, FramePart, FrameRow, Run, SampleRow, Spool
from coordinator.store.rejections import rejections
from coordinator.store.statements import bind_moment, insert_rows
from coordinator.store.timestamps import Timestamp
from coordinator.store.training import frame_payloads, training_samples_after
from side_tuning.wire.frame import encode_frame, split_frame
from side_tuning.wire.messages import Receipt
from tests.store.frames import SPOOL, START, after, make_frame, received, sample_id, unreadable


def put(store: Store, *items: ReceivedFrame) -> list[FrameOutcome]:
    with store.write() as session:
        return insert_frames(session, items)


def receipt(store: Store, device: str = "kitchen", spool: str = SPOOL) -> Receipt:
    with store.read() as session:
        return receipts_for(session, [(device, spool)])[device, spool]


def count(store: Store, model: type) -> int:
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(model)) or 0


def test_a_batch_from_several_devices_is_stored_and_readable(store: Store):
    frames = [make_frame(f"device-{n}", 1, [f"{n}-a", f"{n}-b", f"{n}-c"]) for n in range(5)]
    outcomes = put(store, *map(received, frames))
    assert [(o.outcome, o.samples) for o in outcomes] == [("stored", 3)] * 5
    with store.read() as session:
        samples = training_samples_after(session, 0, 100)
        payloads = frame_payloads(session, {s.frame_id for s in samples})
    assert [s.row_id for s in samples] == sorted(s.row_id for s in samples)
    assert {(s.device, s.position, s.sample_id) for s in samples} == {
        (f"device-{n}", place, sample_id(f"{n}-{name}")) for n in range(5) for place, name in enumerate("abc")
    }
    assert sorted(payloads.values()) == sorted(encode_frame(frame) for frame in frames)
    assert {s.backbone for s in samples} == {frames[0].backbone}
    assert {(s.label, s.split, s.tokens, s.plan_version) for s in samples} == {(1, "train", 7, 1)}


def test_samples_can_be_read_in_steps(store: Store):
    put(store, received(make_frame(names=range(10))))
    with store.read() as session:
        first = training_samples_after(session, 0, 4)
        rest = training_samples_after(session, first[-1].row_id, 100)
    assert [s.position for s in first + rest] == list(range(10))


def test_a_frame_that_comes_again_is_a_duplicate(store: Store):
    frame = received(make_frame())
    assert [o.outcome for o in put(store, frame, frame)] == ["stored", "duplicate"]
    assert [o.outcome for o in put(store, frame)] == ["duplicate"]
    assert count(store, FrameRow) == 1
    with store.read() as session:
        totals = fleet_totals(session)
    assert (totals.frames_stored, totals.samples_stored, totals.duplicate_frames) == (1, 2, 2)
    assert totals.ledger.settled


def test_samples_that_the_device_sent_before_are_counted_as_stored_again(store: Store):
    put(store, received(make_frame(names=["a", "b"])))
    outcome = put(store, received(make_frame(sequence=2, names=["b", "c", "d"], produced=5)))[0]
    assert (outcome.outcome, outcome.samples, outcome.duplicate_samples) == ("stored", 2, 1)
    with store.read() as session:
        ledger = device_overview(session, START)[0].ledger
    assert (ledger.produced, ledger.stored, ledger.stored_again, ledger.missing) == (5, 4, 1, 0)
    assert ledger.balanced


def test_the_same_sample_id_of_another_device_is_another_sample(store: Store):
    put(store, received(make_frame("kitchen")), received(make_frame("attic")))
    assert count(store, SampleRow) == 4


def test_a_card_flashed_anew_stores_no_sample_and_no_body_twice(store: Store):
    put(store, received(make_frame()))
    outcome = put(store, received(make_frame(spool="0ther")))[0]
    assert (outcome.outcome, outcome.samples, outcome.duplicate_samples) == ("stored", 0, 2)
    assert count(store, FrameBody) == 1
    assert receipt(store, spool="0ther").stored_through == 1


@pytest.mark.parametrize("order", [[1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 3]])
@pytest.mark.parametrize("one_batch", [True, False])
def test_receipts_follow_whatever_order_frames_come_in(store: Store, order: list[int], one_batch: bool):
    frames = [received(make_frame(sequence=n, names=[n])) for n in order]
    if one_batch:
        put(store, *frames)
    else:
        here: set[int] = set()
        for frame, sequence in zip(frames, order, strict=True):
            put(store, frame)
            here.add(sequence)
            through = next(n for n in range(5) if n + 1 not in here)
            told = receipt(store)
            assert (told.stored_through, set(told.stored_ahead)) == (through, {n for n in here if n > through})
    assert receipt(store) == Receipt(SPOOL, 4)


def test_a_gap_longer_than_one_step_closes_at_once(store: Store):
    put(store, *(received(make_frame(sequence=n, names=[n])) for n in range(2, 2600)))
    told = receipt(store)
    assert (told.stored_through, len(told.stored_ahead)) == (0, Receipt.MAX_AHEAD)
    put(store, received(make_frame(sequence=1, names=[1])))
    assert receipt(store) == Receipt(SPOOL, 2599)


def test_rejected_frames_are_kept_receipted_and_counted(store: Store):
    good, bad = make_frame(sequence=1), make_frame(sequence=2, names="cde", produced=5)
    outcomes = put(store, received(good), received(bad, reason="backbone: unknown fingerprint"), unreadable("kitchen", 3))
    assert [o.outcome for o in outcomes] == ["stored", "rejected", "rejected"]
    assert receipt(store) == Receipt(SPOOL, 3, (), ((2, "backbone: unknown fingerprint"), (3, "frame: damaged")))
    with store.read() as session:
        kept = rejections(session, with_payload=True)
        ledger = device_overview(session, START)[0].ledger
    assert [(r.sequence, r.samples, r.payload) for r in kept] == [(3, None, b"junk"), (2, 3, encode_frame(bad))]
    assert (ledger.produced, ledger.stored, ledger.rejected) == (5, 2, 3)
    assert ledger.settled


def test_what_was_rejected_or_stored_stays_so_when_it_comes_again(store: Store):
    put(store, received(make_frame(sequence=2)), unreadable("kitchen", 3))
    again = put(store, unreadable("kitchen", 2), received(make_frame(sequence=3, names="xy")), unreadable("kitchen", 3))
    assert [o.outcome for o in again] == ["duplicate"] * 3
    assert (count(store, FrameRow), count(store, SampleRow)) == (1, 2)


def test_a_rejected_message_without_identity_is_one_row_however_often_it_comes(store: Store):
    for n in range(3):
        assert put(store, unreadable("kitchen", None, after(n), spool=None))[0].outcome == "rejected"
    put(store, unreadable("kitchen", 0, payload=b"other"))  # sequences start at 1: no receipt could name it
    with store.read() as session:
        assert [(r.times, r.spool) for r in rejections(session)] == [(1, None), (3, None)]
        assert fleet_totals(session).frames_rejected == 2


def test_a_single_rejection_is_receipted_too(store: Store):
    arguments = {"device": "kitchen", "topic": "t", "payload": b"x", "reason": "why", "received_at": START}
    with store.write() as session:
        assert insert_rejection(session, **arguments, spool=SPOOL, sequence=1)
        assert not insert_rejection(session, **arguments, spool=SPOOL, sequence=1)
        assert insert_rejection(session, **arguments)
    assert receipt(store).stored_through == 1


def test_a_rejected_frame_can_be_accepted_later(store: Store):
    bad = make_frame(sequence=2, names="cde", produced=5)
    put(store, received(make_frame()), received(bad, reason="backbone: unknown"))
    with store.write() as session:
        outcome = accept_rejected(session, rejections(session)[0].id, bad)
    assert (outcome.outcome, outcome.samples) == ("stored", 3)
    assert receipt(store) == Receipt(SPOOL, 2)
    with store.read() as session:
        totals = fleet_totals(session)
        assert rejections(session) == []
    assert (totals.frames_stored, totals.samples_stored, totals.frames_rejected) == (2, 5, 0)
    assert totals.ledger.settled


def test_a_rejection_without_payload_cannot_be_accepted(store: Store):
    put(store, received(make_frame(), reason="why"))
    with store.write() as session:
        row = rejections(session)[0].id
        session.connection().exec_driver_sql("UPDATE rejections SET payload = NULL")
    with pytest.raises(StoreError, match="retention dropped it"), store.write() as session:
        accept_rejected(session, row, make_frame())


def large_frame(sequence: int = 1, device: str = "kitchen") -> tuple[bytes, list[bytes]]:
    frame = make_frame(device, sequence, names=range(40), produced=40, width=64)
    payload = encode_frame(frame)
    parts = split_frame(payload, 1200)
    assert len(parts) > 2
    return payload, parts


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("one_batch", [False, True])
def test_parts_are_receipted_as_they_come_and_joined_when_all_are_here(store: Store, reverse: bool, one_batch: bool):
    payload, parts = large_frame()
    items = [received(part) for part in (parts[::-1] if reverse else parts)]
    batches = [items] if one_batch else [[item] for item in items]
    outcomes = [outcome for batch in batches for outcome in put(store, *batch)]
    assert [o.outcome for o in outcomes] == ["part"] * (len(parts) - 1) + ["stored"]
    assert receipt(store) == Receipt(SPOOL, len(parts))
    assert count(store, FramePart) == 0
    with store.read() as session:
        samples = training_samples_after(session, 0, 100)
        assert list(frame_payloads(session, {s.frame_id for s in samples}).values()) == [payload]
        assert len(samples) == 40
        assert device_overview(session, START)[0].ledger.settled
    assert {o.outcome for o in put(store, *items)} == {"duplicate"}


def test_the_ledger_balances_while_parts_are_on_their_way(store: Store):
    _payload, parts = large_frame()
    put(store, *map(received, parts[1:]))
    with store.read() as session:
        view = device_overview(session, START)[0]
    assert (view.gap_frames, view.ledger.missing, view.ledger.balanced, view.ledger.settled) == (1, 40, True, False)
    assert receipt(store) == Receipt(SPOOL, 0, tuple(range(2, len(parts) + 1)))


def test_a_frame_joined_from_parts_is_checked_and_rejected_whole(store: Store):
    payload, parts = large_frame()
    with store.write() as session:
        outcomes = insert_frames(session, [received(part) for part in parts], check=lambda _frame: "no such plan")
    assert [o.outcome for o in outcomes][-1] == "rejected"
    assert receipt(store) == Receipt(SPOOL, len(parts), (), ((1, "no such plan"),))
    with store.read() as session:
        assert [(r.payload, r.samples) for r in rejections(session, with_payload=True)] == [(payload, 40)]
        ledger = device_overview(session, START)[0].ledger
    assert (ledger.rejected, ledger.settled) == (40, True)
    assert {o.outcome for o in put(store, *map(received, parts))} == {"duplicate"}


def test_parts_that_make_no_frame_are_rejected_with_the_reason(store: Store):
    _payload, parts = large_frame()
    _other, others = large_frame(device="attic")
    mixed = [received(part) for part in parts[:-1]]
    foreign = received(others[-1])
    mixed.append(ReceivedFrame("kitchen", foreign.topic, foreign.payload, START, foreign.frame, None, SPOOL, foreign.sequence))
    outcome = put(store, *mixed)[-1]
    assert outcome.outcome == "rejected"
    assert "attic" in outcome.reason
    assert receipt(store).stored_through == len(parts)


def test_parts_of_two_frames_do_not_mix(store: Store):
    _one, first = large_frame()
    _two, second = large_frame(device="attic")
    outcomes = put(store, *(received(part) for pair in zip(first, second, strict=True) for part in pair))
    assert [o.outcome for o in outcomes].count("stored") == 2
    assert receipt(store, "attic").stored_through == len(second)


def test_a_batch_that_fails_leaves_nothing(store: Store):
    def fail(_frame: object) -> str | None:
        raise ZeroDivisionError

    batch = [received(make_frame()), *(received(part) for part in large_frame(5)[1])]
    with pytest.raises(ZeroDivisionError), store.write() as session:
        insert_frames(session, batch, check=fail)
    assert count(store, FrameRow) == count(store, FramePart) == 0
    assert put(store, received(make_frame()))[0].outcome == "stored"


def test_a_device_without_a_clock_is_stored_all_the_same(store: Store):
    frames = [replace(make_frame(sequence=n + 1, names=[n]), captured_at=at) for n, at in enumerate([0.0, 9e11])]
    assert [o.outcome for o in put(store, *map(received, frames))] == ["stored", "stored"]
    with store.read() as session:
        captured = session.scalars(select(FrameRow.captured_at).order_by(FrameRow.id)).all()
    assert [moment.year for moment in captured] == [1970, 2286]
    assert all(isinstance(moment, datetime) and moment.tzinfo for moment in captured)


def test_moments_are_bound_as_the_models_bind_them(store: Store):
    moments = [START, after(0.000001), after(0.5).astimezone(timezone(timedelta(hours=5, minutes=30)))]
    kind = Timestamp()
    with store.read() as session:
        bind, dialect = bind_moment(session), session.get_bind().dialect
        process = kind.dialect_impl(dialect).bind_processor(dialect) or (lambda moment: moment)
        assert [bind(moment) for moment in moments] == [process(moment) for moment in moments]


@pytest.mark.parametrize("rows", [0, 1, 3, 512, 1025])
def test_any_number_of_rows_goes_in_once(store: Store, rows: int):
    columns = ("id", "name", "settings", "started_at")
    given = [(number + 1, f"run {number}", "{}", START.isoformat()) for number in range(rows)]
    for expected in (rows, 0):
        with store.write() as session:
            assert insert_rows(session, "runs", columns, given, conflict="ON CONFLICT (name) DO NOTHING") == expected
    assert count(store, Run) == rows


def test_plain_columns_are_read_and_written_back_whole(store: Store):
    put(store, received(make_frame()), unreadable("kitchen", 3), unreadable("kitchen", None, spool=None))
    with store.write() as session:
        devices, spools = open_counts(session, ["kitchen"], [("kitchen", SPOOL)], START)
        before = (replace(devices["kitchen"]), replace(spools["kitchen", SPOOL]))
        write_counts(session, list(devices.values()))
        write_counts(session, list(spools.values()))
        devices, spools = open_counts(session, ["kitchen"], [("kitchen", SPOOL)], START)
        assert (devices["kitchen"], spools["kitchen", SPOOL]) == before
        row = session.scalars(select(Spool)).one()
        assert {one.name: getattr(row, one.name) for one in fields(SpoolCounts)} == asdict(before[1])
    assert (before[0].unattributed_rejections, before[1].stored_frames, before[1].rejected_frames) == (1, 1, 1)
    assert before[0].last_arrival_at == before[1].newest_frame_at == START


def test_mapped_rows_read_before_a_batch_are_new_after_it(store: Store):
    put(store, received(make_frame()))
    with store.write() as session:
        spool = session.scalars(select(Spool)).one()
        spool.reported_produced = 7
        insert_frames(session, [received(make_frame(sequence=2, names="cd"))])
        assert (spool.stored_frames, spool.reported_produced) == (2, 7)
