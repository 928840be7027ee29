"""Dropped payloads are gone for the trainer only: never stored again, never out of the ledger."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from sqlalchemy import text

from coordinator.store.engine import Store
from coordinator.store.fleet import arrivals_per_minute, device_overview, fleet_totals
from coordinator.store.ingest import insert_frames, receipts_for
from coordinator.store.rejections import rejections
from coordinator.store.retention import RetentionStep, apply_retention, stored_bytes
from coordinator.store.training import frame_payloads, training_samples_after
from side_tuning.wire.frame import encode_frame, split_frame
from tests.store.frames import SPOOL, START, after, make_frame, received, unreadable

DAY = timedelta(days=1)


def fill(store: Store, frames: int = 10, width: int = 100) -> None:
    with store.write() as session:
        for n in range(1, frames + 1):
            insert_frames(session, [received(make_frame(sequence=n, names=[n], produced=n, width=width), after(60 * n))])


def sequences_left(store: Store) -> int:
    with store.read() as session:
        samples = training_samples_after(session, 0, 1000)
        assert set(frame_payloads(session, {s.frame_id for s in samples})) == {s.frame_id for s in samples}
    return len(samples)


def retain(store: Store, **limits: object) -> RetentionStep:
    arguments = {"max_age": None, "max_bytes": None, "now": after(60 * 10), **limits}
    with store.write() as session:
        return apply_retention(session, **arguments)  # type: ignore[arg-type]


def test_without_limits_nothing_goes(store: Store):
    fill(store)
    assert retain(store) == RetentionStep(0, 0, 0, 0, more=False)
    assert sequences_left(store) == 10


def test_old_frames_go_by_age(store: Store):
    fill(store)
    assert retain(store, max_age=timedelta(minutes=5)).frames == 4
    assert sequences_left(store) == 6


def test_the_oldest_frames_go_by_bytes(store: Store):
    fill(store)
    with store.read() as session:
        held = stored_bytes(session).frames
    assert retain(store, max_bytes=held // 2).frames == 5
    assert sequences_left(store) == 5
    with store.read() as session:
        assert stored_bytes(session).frames <= held // 2


def test_what_was_dropped_is_neither_stored_again_nor_missed(store: Store):
    fill(store)
    with store.read() as session:
        before = device_overview(session, START)[0].ledger
    retain(store, max_age=timedelta(0), now=after(10_000))
    assert sequences_left(store) == 0
    with store.write() as session:
        again = [received(make_frame(sequence=n, names=[n], produced=n, width=100)) for n in range(1, 11)]
        assert {o.outcome for o in insert_frames(session, again)} == {"duplicate"}
        flashed = insert_frames(session, [received(make_frame(spool="0ther", names=range(1, 11)))])[0]
        assert (flashed.samples, flashed.duplicate_samples) == (0, 10)
    assert sequences_left(store) == 0
    with store.read() as session:
        assert device_overview(session, START)[0].spools[0].ledger == before
        assert fleet_totals(session).samples_stored == 10
        assert receipts_for(session, [("kitchen", SPOOL)])["kitchen", SPOOL].stored_through == 10


def test_rejected_payloads_have_a_small_budget_of_their_own(store: Store):
    with store.write() as session:
        for n in range(1, 11):
            insert_frames(session, [unreadable("kitchen", n, after(n), payload=bytes(100))])
    assert retain(store, max_bytes=3000).rejections == 7
    with store.read() as session:
        kept = rejections(session, with_payload=True)
    assert [row.payload is not None for row in kept] == [True] * 3 + [False] * 7
    assert all(row.reason == "frame: damaged" for row in kept)  # the row and its reason stay
    assert retain(store, max_age=DAY, now=after(2 * 86_400)).rejections == 3


def test_frames_whose_parts_never_all_came_are_given_up_with_a_reason(store: Store):
    parts = split_frame(encode_frame(make_frame(names=range(40), produced=40, width=64)), 1200)
    with store.write() as session:
        insert_frames(session, [received(part) for part in parts[:2]])
    assert retain(store, max_age=DAY).incomplete == 0
    assert retain(store, max_age=DAY, now=after(2 * 86_400)).incomplete == 1
    with store.read() as session:
        assert "did not come in time" in rejections(session)[0].reason
        ledger = device_overview(session, START)[0].ledger
    assert (ledger.rejected, ledger.missing, ledger.balanced) == (40, 0, True)


def test_much_is_dropped_in_steps(store: Store, monkeypatch):
    monkeypatch.setattr("coordinator.store.retention.STEP_FRAMES", 4)
    fill(store)
    steps = []
    while not steps or steps[-1].more:
        steps.append(retain(store, max_age=timedelta(0), now=after(10_000)))
    assert [step.frames for step in steps] == [4, 4, 2]


def test_disk_space_comes_back(sqlite_store: Store, tmp_path: Path):
    fill(sqlite_store, frames=60, width=8000)
    sqlite_store.checkpoint_log()
    size = (tmp_path / "store.db").stat().st_size
    retain(sqlite_store, max_age=timedelta(0), now=after(10_000))
    sqlite_store.checkpoint_log()
    assert (tmp_path / "store.db").stat().st_size < size / 2
    with sqlite_store.read() as session:
        assert session.scalar(text("PRAGMA integrity_check")) == "ok"


def test_arrivals_per_minute_are_kept_for_a_month(store: Store):
    fill(store, frames=3)
    with store.read() as session:
        minutes = arrivals_per_minute(session, START)
    assert [(minute, frames, samples) for minute, frames, samples, _ in minutes] == [(after(60 * n), 1, 1) for n in (1, 2, 3)]
    retain(store, now=after(31 * 86_400))
    with store.read() as session:
        assert arrivals_per_minute(session, START) == []
