"""The overview: right for one device, and as few queries for many."""

from __future__ import annotations

import pytest
from sqlalchemy import event

from coordinator.store.engine import Store
from coordinator.store.fleet import DeviceOverview, FleetMemory, device_overview, fleet_totals
from coordinator.store.health import record_health
from coordinator.store.ingest import insert_frames
from coordinator.store.training import insert_evaluation, insert_run
from tests.store.frames import SPOOL, START, after, make_frame, received, report, unreadable


def test_an_empty_store_has_no_devices(store: Store):
    with store.read() as session:
        assert device_overview(session, START) == []
        totals = fleet_totals(session)
    assert (totals.devices, totals.ledger.settled) == (0, True)


def test_a_device_with_its_rates_state_and_counts(store: Store):
    for n in range(1, 31):  # two samples every two seconds, one batch each: the state lives in the store
        with store.write() as session:
            insert_frames(session, [received(make_frame(sequence=n, names=[2 * n, 2 * n + 1]), after(2 * n))])
    with store.write() as session:
        record_health(session, "kitchen", report(62, 60, 2, floor=31, at=after(60)), after(60))
        insert_frames(session, [unreadable("kitchen", 31, after(61))])
    with store.read() as session:
        (view,) = device_overview(session, after(61))
    assert view.state == "on-time"
    assert view.since == after(60)
    assert view.rate_1m == pytest.approx(1.0, rel=0.1)
    assert view.rate_5m == pytest.approx(1.0, rel=0.1)
    assert view.rate_60m == pytest.approx(1.0, rel=0.1)
    assert view.expected_by is not None
    assert after(62) <= view.expected_by <= after(75)
    assert (view.stored_frames, view.stored_samples, view.rejected_frames) == (30, 60, 1)
    assert (view.gap_frames, view.ledger.balanced) == (0, True)
    assert view.spools[0].spool == SPOOL
    with store.read() as session:
        late = device_overview(session, after(100))[0]
    assert late.state == "late"


def test_the_overview_asks_the_same_few_questions_however_large_the_fleet(store: Store):
    """How long that takes is for benchmarks/dashboard.py to say; a query per device would show there, and here."""

    def statements() -> int:
        seen: list[str] = []

        def note(*arguments: object) -> None:
            seen.append(str(arguments[2]))

        event.listen(store._reader, "before_cursor_execute", note)
        with store.read() as session:
            views = device_overview(session, after(1))
        event.remove(store._reader, "before_cursor_execute", note)
        assert all(view.ledger.settled for view in views)
        return len(seen)

    counts = []
    for names in (["device-0"], [f"device-{n}" for n in range(1, 200)]):
        with store.write() as session:
            insert_frames(session, [received(make_frame(name)) for name in names])
            for name in names:
                record_health(session, name, report(2, 2, 0, floor=2), START)
        counts.append(statements())
    assert counts[0] == counts[1] <= 8, counts


def test_a_look_with_a_memory_sees_what_a_first_look_sees(store: Store):
    memory = FleetMemory()

    def both() -> tuple[list[DeviceOverview], list[DeviceOverview]]:
        with store.read() as session:
            return device_overview(session, after(120), memory=memory), device_overview(session, after(120))

    with store.write() as session:
        insert_frames(session, [received(make_frame("kitchen", 1)), received(make_frame("attic", 1))])
        record_health(session, "kitchen", report(2, 2, 0, 2), after(1))
    remembered, fresh = both()
    assert remembered == fresh
    with store.write() as session:
        insert_frames(session, [received(make_frame("kitchen", 2, ("c", "d")), after(60))])
        record_health(session, "kitchen", report(4, 2, 2, 2, at=after(61)), after(61))
        insert_run(session, "run", {}, after(62))
        insert_evaluation(session, "run", 10, "device", "kitchen", 0.75, 0.5, 4, after(63))
    remembered, fresh = both()
    assert remembered == fresh
    assert next(one for one in fresh if one.device == "kitchen").score == 0.75
