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
from sqlalchemy.exc import DBAPIError

from coordinator.store.engine import SCHEMA_REVISION, Store, open_store
from coordinator.store.errors import StoreError, StoreUnavailable
from coordinator.store.fleet import fleet_totals
from coordinator.store.ingest import insert_frames
from coordinator.store.models import Base
from coordinator.store.schema import MIGRATIONS, downgrade, upgrade
from tests.brokers import free_port
from tests.store.frames import make_frame, received


def set_revision(url: str, revision: str) -> None:
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    database.close()


def test_the_program_knows_the_newest_migration():
    scripts = ScriptDirectory(str(MIGRATIONS))
    assert scripts.get_current_head() == SCHEMA_REVISION
    assert all(script.revision.isdigit() for script in scripts.walk_revisions())


def test_models_and_migrations_agree(sqlite_store: Store):
    with sqlite_store.read() as session:
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


def test_upgrade_changes_nothing_where_the_schema_fits(sqlite_store: Store, url: str):
    with sqlite_store.write() as session:
        insert_frames(session, [received(make_frame())])
    upgrade(url)
    with sqlite_store.read() as session:
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


def test_the_log_is_synced_at_every_commit(sqlite_store: Store):
    with sqlite_store.write() as session:
        pragma = {name: session.scalar(text(f"PRAGMA {name}")) for name in ("synchronous", "journal_mode", "foreign_keys", "auto_vacuum")}
    assert pragma == {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1, "auto_vacuum": 2}


def test_readers_cannot_write(sqlite_store: Store, url: str):
    reader = open_store(url, read_only=True)
    with pytest.raises(StoreUnavailable, match="readonly"), reader.read() as session:
        session.execute(text("DELETE FROM devices"))
    with pytest.raises(StoreError, match="opened read-only"), reader.write():
        pass
    reader.close()


def test_readers_see_the_last_commit_while_one_writes(sqlite_store: Store):
    with sqlite_store.write() as session:
        insert_frames(session, [received(make_frame())])
        with sqlite_store.read() as other:
            assert fleet_totals(other).frames_stored == 0
    with sqlite_store.read() as other:
        assert fleet_totals(other).frames_stored == 1


def test_writers_of_one_process_take_turns(sqlite_store: Store):
    failures: list[BaseException] = []

    def write(device: str) -> None:
        try:
            for sequence in range(1, 21):
                with sqlite_store.write() as session:
                    insert_frames(session, [received(make_frame(device, sequence, [sequence]))])
        except BaseException as error:  # the test reports it
            failures.append(error)

    threads = [threading.Thread(target=write, args=(f"device-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with sqlite_store.read() as session:
        assert fleet_totals(session).frames_stored == 80


def test_a_full_disk_is_retryable_and_loses_nothing_committed(sqlite_store: Store):
    with sqlite_store.write() as session:
        insert_frames(session, [received(make_frame(sequence=1))])
        pages = session.scalar(text("PRAGMA page_count"))
        session.execute(text(f"PRAGMA max_page_count = {pages}"))  # SQLite answers as it does on a full disk
    big = [received(make_frame(sequence=n, names=[n], width=2000)) for n in range(2, 200)]
    with pytest.raises(StoreUnavailable, match=r"full.*free some disk space"), sqlite_store.write() as session:
        insert_frames(session, big)
    with sqlite_store.read() as session:
        assert fleet_totals(session).frames_stored == 1
    with sqlite_store.write() as session:
        session.execute(text("PRAGMA max_page_count = 1000000"))
    with sqlite_store.write() as session:
        assert {outcome.outcome for outcome in insert_frames(session, big)} == {"stored"}


def test_a_locked_database_is_retryable(sqlite_store: Store, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coordinator.store.engine._BUSY_TIMEOUT", "PRAGMA busy_timeout = 50")
    other = open_store(url)
    with sqlite_store.write() as session:
        insert_frames(session, [received(make_frame())])
        with pytest.raises(StoreUnavailable, match="locked"), other.write() as second:
            insert_frames(second, [received(make_frame(sequence=2))])
    with other.write() as session:
        insert_frames(session, [received(make_frame(sequence=2))])
    other.close()


def test_the_log_can_be_moved_into_the_database(sqlite_store: Store, tmp_path: Path):
    with sqlite_store.write() as session:
        insert_frames(session, [received(make_frame(width=2000))])
    log = tmp_path / "store.db-wal"
    assert log.stat().st_size > 0
    assert sqlite_store.checkpoint_log() == 0
    assert log.stat().st_size == 0


def test_a_reader_that_stays_open_is_told_of(sqlite_store: Store):
    """It keeps the log from shrinking; the caller can see how large it is."""
    with sqlite_store.write() as session:
        insert_frames(session, [received(make_frame(sequence=1))])
    with sqlite_store.read() as session:
        fleet_totals(session)
        with sqlite_store.write() as writer:
            insert_frames(writer, [received(make_frame(sequence=2, width=2000))])
        assert sqlite_store.checkpoint_log() > 0
    assert sqlite_store.checkpoint_log() == 0


@pytest.mark.slow
class TestOnPostgres:
    """What differs there: migrations, the writers' lock, readers, and a server that goes away."""

    def test_migrations_make_the_models_and_take_them_back(self, postgres_url: str):
        upgrade(postgres_url)
        store = open_store(postgres_url)
        with store.read() as session:
            context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
            assert compare_metadata(context, Base.metadata) == []
        store.close()
        downgrade(postgres_url, "base")
        with pytest.raises(StoreError, match="no tables yet"):
            open_store(postgres_url)
        upgrade(postgres_url)
        open_store(postgres_url).close()

    def test_a_newer_schema_is_refused(self, postgres_url: str):
        upgrade(postgres_url)
        store = open_store(postgres_url)
        with store.write() as session:
            session.execute(text("UPDATE alembic_version SET version_num = '0999'"))
        store.close()
        with pytest.raises(StoreError, match="0999, newer than"):
            open_store(postgres_url)

    def test_writers_of_several_programs_take_turns(self, postgres_url: str):
        """Row ids must ascend in commit order, or the trainer would pass over samples."""
        upgrade(postgres_url)
        stores = [open_store(postgres_url) for _ in range(3)]
        failures: list[BaseException] = []

        def write(store: Store, device: str) -> None:
            try:
                for sequence in range(1, 21):
                    with store.write() as session:
                        insert_frames(session, [received(make_frame(device, sequence, [sequence]))])
            except BaseException as error:  # the test reports it
                failures.append(error)

        threads = [threading.Thread(target=write, args=(store, f"device-{n}")) for n, store in enumerate(stores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        with stores[0].read() as session:
            assert fleet_totals(session).frames_stored == 60
        for store in stores:
            store.close()

    def test_readers_cannot_write(self, postgres_url: str):
        upgrade(postgres_url)
        reader = open_store(postgres_url, read_only=True)
        with pytest.raises(DBAPIError, match="read-only transaction"), reader.read() as session:
            session.execute(text("DELETE FROM devices"))
        reader.close()

    def test_a_connection_that_breaks_is_retryable_and_made_anew(self, postgres_url: str):
        upgrade(postgres_url)
        store, other = open_store(postgres_url), open_store(postgres_url)
        break_all = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")

        def write_while_it_breaks() -> None:
            with store.write() as session:
                insert_frames(session, [received(make_frame())])
                with other.read() as killer:
                    killer.execute(break_all)
                insert_frames(session, [received(make_frame(sequence=2))])

        with pytest.raises(StoreUnavailable, match="cannot be used now"):
            write_while_it_breaks()
        with store.write() as session:
            assert insert_frames(session, [received(make_frame())])[0].outcome == "stored"
        store.close()
        other.close()

    def test_a_server_that_is_not_there_is_retryable_and_named(self):
        with pytest.raises(StoreUnavailable, match=r"coordinator@127.0.0.1.*cannot be used now"):
            open_store(f"postgresql://coordinator@127.0.0.1:{free_port()}/store")
