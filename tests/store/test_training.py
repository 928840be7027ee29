"""Runs, evaluations and checkpoints; generations only grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import text

from coordinator.store.engine import Store
from coordinator.store.errors import StoreError
from coordinator.store.fleet import device_overview, fleet_totals
from coordinator.store.health import record_health
from coordinator.store.ingest import insert_frames
from coordinator.store.training import (
    checkpoints,
    checkpoints_to_publish,
    evaluations,
    insert_checkpoint,
    insert_evaluation,
    insert_run,
    latest_checkpoint,
    mark_published,
    republish_checkpoint,
)
from tests.store.frames import START, after, make_frame, received, report


def test_a_run_begins_once(store: Store):
    with store.write() as session:
        assert insert_run(session, "first", {"seed": 1}, START)
        assert not insert_run(session, "first", {"seed": 2}, START)


def test_the_newest_scores_of_each_device_is_shown(store: Store):
    with store.write() as session:
        insert_frames(session, [received(make_frame(name)) for name in ("kitchen", "attic", "cellar")])
        for run in ("old", "new"):
            insert_run(session, run, {}, START)
        insert_evaluation(session, "old", 900, "device", "cellar", 0.1, 1.0, 10, START)
        for step, accuracy in ((10, 0.5), (20, 0.75)):
            insert_evaluation(session, "new", step, "device", "kitchen", accuracy, 0.5, 10, after(step))
            insert_evaluation(session, "new", step, "fleet", "fleet", accuracy, 0.5, 30, after(step))
        insert_evaluation(session, "new", 10, "device", "attic", 0.25, 0.5, 10, after(10))
    with store.read() as session:
        assert {d.device: d.score for d in device_overview(session, START)} == {"kitchen": 0.75, "attic": 0.25, "cellar": None}
        assert [(e.step, e.score) for e in evaluations(session, "new")] == [(10, 0.5), (20, 0.75)]


def test_checkpoints_are_offered_published_and_rolled_back(store: Store):
    with store.write() as session:
        insert_run(session, "run", {}, START)
        assert latest_checkpoint(session) is None
        first = insert_checkpoint(session, "run", 10, "/data/10", {"accuracy": 0.5}, START)
        second = insert_checkpoint(session, "run", 20, "/data/20", {"accuracy": 0.75}, after(10))
        assert second > first
        assert [c.generation for c in checkpoints_to_publish(session)] == [first, second]
        mark_published(session, second, after(20))
        assert checkpoints_to_publish(session) == []  # the first is superseded
    with store.write() as session:
        third = republish_checkpoint(session, first, after(30))
    with store.read() as session:
        newest = latest_checkpoint(session)
        assert newest is not None
        assert (newest.generation, newest.run, newest.step, newest.folder) == (third, "run", 10, "/data/10")
        assert newest.metrics == {"accuracy": 0.5}
        assert newest.published_at is None
        assert [c.generation for c in checkpoints(session)] == [third, second, first]
        totals = fleet_totals(session)
    assert (totals.checkpoints, totals.checkpoints_published) == (3, 1)


def test_a_generation_is_never_given_twice(store: Store):
    with store.write() as session:
        insert_run(session, "run", {}, START)
        gone = insert_checkpoint(session, "run", 10, "/data/10", {}, START)
        session.execute(text("DELETE FROM checkpoints"))
    with store.write() as session:
        assert insert_checkpoint(session, "run", 20, "/data/20", {}, START) > gone


def test_what_is_not_there_is_named(store: Store):
    with pytest.raises(StoreError, match="run 'none' is not in the store"), store.write() as session:
        insert_checkpoint(session, "none", 1, "/data", {}, START)
    for attempt in (mark_published, republish_checkpoint):
        with pytest.raises(StoreError, match="checkpoint 7 is not in the store"), store.write() as session:
            attempt(session, 7, START)


def test_devices_that_outlived_a_database_are_offered_higher_generations(store: Store):
    """A device follows no lower generation; one that lies cannot use them all up."""
    believable, lie = report(0, 0, 0, 1), report(0, 0, 0, 1)
    with store.write() as session:
        insert_run(session, "run", {}, START)
        record_health(session, "kitchen", replace(believable, checkpoint=15), START)
        record_health(session, "attic", replace(lie, checkpoint=2**53), START)
        assert [insert_checkpoint(session, "run", n, f"/data/{n}", {}, START) for n in (1, 2, 3)] == [16, 17, 18]
