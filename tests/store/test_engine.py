"""Opening, upgrading and refusing: the schema must fit, writers wait, readers cannot write, a full disk is retryable."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from coordinator.store.engine import SCHEMA_REVISION, Store, open_store
from coordinator.store.errors import StoreError, StoreUnavailable
from coordinator.store.fleet import fleet_totals
from coordinator.store.ingest import insert_frames
from coordinator.store.models import Base
from coordinator.store.schema import MIGRATIONS, downgrade, upgrade
from tests.store.frames import make_frame, received


def set_revision(url: str, revision: str) -> None:
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    database.close()


def test_the_program_knows_the_newest_migration():
    scripts = ScriptDirectory(str(MIGRATIONS))
    assert scripts.get_current_head() == SCHEMA_REVISION
    assert all(script.revision.isdigit() for script in scripts.walk_revisions())


def test_models_and_migrations_agree(store: Store):
    with store.read() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_down_to_nothing_and_up_again(url: str):
    upgrade(url)
    downgrade(url, "base")
    with pytest.raises(StoreError, match="no tables yet: run `coordinator database upgrade`"):
        open_store(url)
    upgrade(url)
    store = open_store(url)
    with store.read() as session:
        assert set(inspect(session.connection()).get_table_names()) == {*Base.metadata.tables, "alembic_version"}
    store.close()


def test_upgrade_changes_nothing_where_the_schema_fits(store: Store, url: str):
    with store.write() as session:
        insert_frames(session, [received(make_frame())])
    upgrade(url)
    with store.read() as session:
        assert fleet_totals(session).frames_stored == 1


def test_two_programs_may_upgrade_at_once(url: str):
    failures: list[BaseException] = []

    def run() -> None:
        try:
            upgrade(url)
        except BaseException as error:  # the test reports it
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    open_store(url).close()


def test_a_newer_schema_is_refused_and_left_alone(url: str):
    upgrade(url)
    set_revision(url, "0999")
    for attempt in (open_store, upgrade):
        with pytest.raises(StoreError, match=rf"0999, newer than {SCHEMA_REVISION}.*install the version"):
            attempt(url)


def test_an_older_schema_names_the_cure(url: str):
    upgrade(url)
    set_revision(url, "0000")
    with pytest.raises(StoreError, match=rf"0000, this program needs {SCHEMA_REVISION}: run `coordinator database upgrade`"):
        open_store(url)


def test_a_missing_file_is_not_made_by_looking(tmp_path: Path):
    with pytest.raises(StoreError, match="does not exist: run `coordinator database upgrade`"):
        open_store(f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.iterdir()) == []


def test_upgrade_makes_the_folder(tmp_path: Path):
    upgrade(f"sqlite:///{tmp_path}/a/b/store.db")
    open_store(f"sqlite:///{tmp_path}/a/b/store.db").close()


@pytest.mark.parametrize(
    ("url", "word"),
    [("sqlite://", "memory"), ("mysql://host/name", "not supported"), ("no url", "write sqlite:///"), ("sqlite:///:memory:", "memory")],
)
def test_urls_of_no_use_are_refused(url: str, word: str):
    with pytest.raises(StoreError, match=word):
        open_store(url)


def test_a_file_that_is_no_database_is_an_error_of_its_own(tmp_path: Path):
    (tmp_path / "store.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match=r"not a database.*move"):
        open_store(f"sqlite:///{tmp_path}/store.db")


def test_the_log_is_synced_at_every_commit(store: Store):
    with store.write() as session:
        pragma = {name: session.scalar(text(f"PRAGMA {name}")) for name in ("synchronous", "journal_mode", "foreign_keys", "auto_vacuum")}
    assert pragma == {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1, "auto_vacuum": 2}


def test_readers_cannot_write(store: Store, url: str):
    reader = open_store(url, read_only=True)
    with pytest.raises(StoreUnavailable, match="readonly"), reader.read() as session:
        session.execute(text("DELETE FROM devices"))
    with pytest.raises(StoreError, match="opened read-only"), reader.write():
        pass
    reader.close()


def test_readers_see_the_last_commit_while_one_writes(store: Store):
    with store.write() as session:
        insert_frames(session, [received(make_frame())])
        with store.read() as other:
            assert fleet_totals(other).frames_stored == 0
    with store.read() as other:
        assert fleet_totals(other).frames_stored == 1


def test_writers_of_one_process_take_turns(store: Store):
    failures: list[BaseException] = []

    def write(device: str) -> None:
        try:
            for sequence in range(1, 21):
                with store.write() as session:
                    insert_frames(session, [received(make_frame(device, sequence, [sequence]))])
        except BaseException as error:  # the test reports it
            failures.append(error)

    threads = [threading.Thread(target=write, args=(f"device-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with store.read() as session:
        assert fleet_totals(session).frames_stored == 80


def test_a_full_disk_is_retryable_and_loses_nothing_committed(store: Store):
    with store.write() as session:
        insert_frames(session, [received(make_frame(sequence=1))])
        pages = session.scalar(text("PRAGMA page_count"))
        session.execute(text(f"PRAGMA max_page_count = {pages}"))  # SQLite answers as it does on a full disk
    big = [received(make_frame(sequence=n, names=[n], width=2000)) for n in range(2, 200)]
    with pytest.raises(StoreUnavailable, match=r"full.*free some disk space"), store.write() as session:
        insert_frames(session, big)
    with store.read() as session:
        assert fleet_totals(session).frames_stored == 1
    with store.write() as session:
        session.execute(text("PRAGMA max_page_count = 1000000"))
    with store.write() as session:
        assert {outcome.outcome for outcome in insert_frames(session, big)} == {"stored"}


def test_a_locked_database_is_retryable(store: Store, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coordinator.store.engine._BUSY_TIMEOUT_SECONDS", 0.05)
    other = open_store(url)
    with store.write() as session:
        insert_frames(session, [received(make_frame())])
        with pytest.raises(StoreUnavailable, match="locked"), other.write() as second:
            insert_frames(second, [received(make_frame(sequence=2))])
    with other.write() as session:
        insert_frames(session, [received(make_frame(sequence=2))])
    other.close()


def test_the_log_can_be_moved_into_the_database(store: Store, tmp_path: Path):
    with store.write() as session:
        insert_frames(session, [received(make_frame(width=2000))])
    log = tmp_path / "store.db-wal"
    assert log.stat().st_size > 0
    assert store.checkpoint_log() == 0
    assert log.stat().st_size == 0


def test_a_reader_that_stays_open_is_told_of(store: Store):
    """It keeps the log from shrinking; the caller can see how large it is."""
    with store.write() as session:
        insert_frames(session, [received(make_frame(sequence=1))])
    with store.read() as session:
        fleet_totals(session)
        with store.write() as writer:
            insert_frames(writer, [received(make_frame(sequence=2, width=2000))])
        assert store.checkpoint_log() > 0
    assert store.checkpoint_log() == 0
