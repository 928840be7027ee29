"""Opens the store: one writing transaction at a time, readers that cannot write, and a schema that must fit.

`Store.write()` and `Store.read()` give a session; everything else is plain functions over a session in the modules
beside this one. Runs on SQLite (one machine) and PostgreSQL (by URL).
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from coordinator.store.errors import StoreError, StoreUnavailable

logger = logging.getLogger(__name__)

# The newest revision in migrations/versions. Revisions are numbers, so an older program can tell a newer schema.
SCHEMA_REVISION = "0005"
CURE = "run `coordinator database upgrade`"

# What passes by itself or with some disk space: whatever was to be written is kept and tried again.
OUT_OF_REACH = (StoreUnavailable, OperationalError, InterfaceError, PoolTimeoutError)

_BUSY_TIMEOUT_SECONDS = 30.0
_BUSY_TIMEOUT = f"PRAGMA busy_timeout = {int(_BUSY_TIMEOUT_SECONDS * 1000)}"
_MODE_RETRY_SECONDS = 0.02
_WAL_LIMIT_BYTES = 64 * 1024 * 1024
# Any constant will do; it only has to be the same for every coordinator.
_POSTGRESQL_WRITER_LOCK = 0x6D6F6269_6C6C6D
_RETRYABLE_SQLITE = (
    "SQLITE_FULL",
    "SQLITE_BUSY",
    "SQLITE_LOCKED",
    "SQLITE_IOERR",
    "SQLITE_CANTOPEN",
    "SQLITE_READONLY",
    "SQLITE_NOMEM",
)
_DAMAGED_SQLITE = ("SQLITE_NOTADB", "SQLITE_CORRUPT")
# Connection trouble, resources (disk full among them), operator intervention, deadlock, lock not available.
_RETRYABLE_POSTGRESQL = ("08", "53", "57", "40", "55P03", "58")


class Store:
    """An open store. `write` has one connection in the process; `read` sees the last commit and cannot write."""

    def __init__(self, url: URL, *, read_only: bool) -> None:
        self.url = url
        self._reader = _make_engine(url, writes=False)
        self._writer = None if read_only else _make_engine(url, writes=True)
        self._read_sessions = sessionmaker(self._reader, expire_on_commit=False)
        self._write_sessions = None if self._writer is None else sessionmaker(self._writer, expire_on_commit=False)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A writing transaction: committed (and on disk) when the block ends, rolled back when it raises."""
        if self._write_sessions is None:
            raise StoreError(f"{self.url!r} was opened read-only; open it without read_only to write")
        with self._write_sessions() as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A short reading transaction. Keep it short: while it lasts, SQLite cannot shrink its log."""
        with self._read_sessions() as session, session.begin():
            yield session

    @property
    def log_bytes(self) -> int | None:
        """The size of SQLite's write-ahead log; None on PostgreSQL."""
        if self.url.get_backend_name() != "sqlite":
            return None
        log = Path(f"{self.url.database}-wal")
        return log.stat().st_size if log.exists() else 0

    def checkpoint_log(self) -> int:
        """Move SQLite's write-ahead log into the database and return the bytes that are left in it.

        Call it now and then from the writer: under steady readers the log otherwise only grows (tens of gigabytes
        have been seen). Zero on PostgreSQL, which looks after its own.
        """
        if self._writer is None or self.url.get_backend_name() != "sqlite":
            return 0
        connection = self._writer.raw_connection()
        cursor = connection.cursor()
        try:
            # A reader may stay for long; take what can be had now instead of holding up the gateway.
            cursor.execute("PRAGMA busy_timeout = 0")
            busy, pages, moved = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            (page_bytes,) = cursor.execute("PRAGMA page_size").fetchone()
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(_describe(self.url, error)) from error
        finally:
            cursor.execute(_BUSY_TIMEOUT)
            connection.close()
        return int(pages * page_bytes) if busy else int((pages - moved) * page_bytes)

    def close(self) -> None:
        self._reader.dispose()
        if self._writer is not None:
            self._writer.dispose()


def open_store(url: str, *, read_only: bool = False) -> Store:
    """Open the store at `url`, whose schema must be the one that this program knows.

    Raises:
        StoreError: no schema, an older or a newer one, or a URL of no use; says what to do.
        StoreUnavailable: the database cannot be reached now.
    """
    parsed = parse_url(url)
    store = Store(parsed, read_only=read_only)
    try:
        _check_schema(store)
    except BaseException:
        store.close()
        raise
    return store


def parse_url(url: str) -> URL:
    """The URL of a store, checked: a SQLite file or PostgreSQL."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreError(f"database URL {url!r} is none: write sqlite:////path/to/store.db or postgresql://user@host/name") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise StoreError(f"database {backend!r} is not supported: use sqlite or postgresql")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError("a store in memory would lose every frame: give SQLite a file, sqlite:////path/to/store.db")
    return parsed


def schema_revision(connection: Connection) -> str | None:
    """The revision that the database says it has; None where there is no schema."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if revision is None else str(revision)


def explain_revision(found: str | None) -> str | None:
    """What is wrong with a schema of revision `found`, and the cure; None if it is the right one."""
    if found == SCHEMA_REVISION:
        return None
    if found is None:
        return f"it has no tables yet: {CURE}"
    if found.isdigit() and int(found) < int(SCHEMA_REVISION):
        return f"its schema is {found}, this program needs {SCHEMA_REVISION}: {CURE}"
    return (
        f"its schema is {found}, newer than {SCHEMA_REVISION}, the newest that this program knows: "
        "install the version of mobillm-fleet that last used it, or give another database_url"
    )


def _check_schema(store: Store) -> None:
    url = store.url
    # A look must not make an empty file.
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        raise StoreError(f"database {url.database} does not exist: {CURE}")
    with store.read() as session:
        trouble = explain_revision(schema_revision(session.connection()))
    if trouble:
        raise StoreError(f"database {url!r}: {trouble}")


def _make_engine(url: URL, *, writes: bool) -> Engine:
    options: dict[str, Any] = {"hide_parameters": True}  # errors are logged, and must not carry what devices sent
    if writes:
        # One writer: a second thread waits for the first one's commit instead of meeting "database is locked".
        options |= {"pool_size": 1, "max_overflow": 0, "pool_timeout": 60}
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_SECONDS, "check_same_thread": False}, **options)
        event.listen(engine, "connect", set_writer_pragmas if writes else _set_reader_pragmas)
        event.listen(engine, "begin", begin_immediate if writes else _begin_deferred)
    else:
        engine = create_engine(url, pool_pre_ping=True, **options)
        if writes:
            event.listen(engine, "begin", take_writer_lock)
        else:
            engine = engine.execution_options(postgresql_readonly=True)
    translate_errors(engine)
    return engine


def translate_errors(engine: Engine) -> None:
    """Make failures that may pass (disk full, locked, unreachable) `StoreUnavailable`, and a damaged file a `StoreError`."""
    event.listen(engine, "handle_error", _translate, retval=True)


def _set_pragmas(connection: sqlite3.Connection) -> None:
    # The driver must not open transactions of its own; `begin` does.
    connection.isolation_level = None
    # Wait for another process's commit instead of failing at once.
    connection.execute(_BUSY_TIMEOUT)
    # SQLite checks references only where asked to.
    connection.execute("PRAGMA foreign_keys = ON")


def set_writer_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    _set_pragmas(connection)
    _write_ahead(connection)
    # With NORMAL a power cut may take back commits, and a receipt would have been a lie.
    connection.execute("PRAGMA synchronous = FULL")
    # After a burst, give the log's disk space back.
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    # Move the log into the database every 16 MiB: the default of 4 MiB is three batches, and each move is two fsyncs.
    connection.execute("PRAGMA wal_autocheckpoint = 16384")
    # The index over sample ids is written at random places; keep it in memory (64 MiB).
    connection.execute("PRAGMA cache_size = -65536")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Readers see the last commit while one writes; a commit is one sequential write.

    On a new file SQLite does not wait for another program that changes the mode at the same moment: it fails at once,
    whatever the busy timeout. So the wait is here.
    """
    for left in reversed(range(int(_BUSY_TIMEOUT_SECONDS / _MODE_RETRY_SECONDS))):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if not left or error.sqlite_errorname not in ("SQLITE_BUSY", "SQLITE_LOCKED"):
                raise
            time.sleep(_MODE_RETRY_SECONDS)
        else:
            return


def _set_reader_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    _set_pragmas(connection)
    # A reader that writes by mistake fails, and never holds up the gateway.
    connection.execute("PRAGMA query_only = ON")


def begin_immediate(connection: Connection) -> None:
    # Take the write lock at the start: a transaction that reads first and writes later can fail half-way.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_deferred(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def take_writer_lock(connection: Connection) -> None:
    # The same "one writer at a time" as on SQLite: row ids ascend in commit order, counters are read and written back.
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_WRITER_LOCK})")


def _translate(context: ExceptionContext) -> StoreError | None:
    error = context.original_exception
    url = None if context.engine is None else context.engine.url
    name = getattr(error, "sqlite_errorname", None)
    code = getattr(error, "sqlstate", None)
    if name in _DAMAGED_SQLITE:
        return StoreError(
            f"database {url!r} is damaged or no database ({error}): move the file away and run `coordinator database upgrade`, "
            "or put a backup in its place; devices still hold what has no receipt"
        )
    if name is not None:
        retryable = any(name.startswith(prefix) for prefix in _RETRYABLE_SQLITE)
    elif code is not None:
        retryable = code.startswith(_RETRYABLE_POSTGRESQL)
    else:  # the driver could not say: no connection, or it broke
        retryable = type(error).__name__ == "OperationalError"
    return StoreUnavailable(_describe(url, error)) if retryable else None


def _describe(url: URL | None, error: BaseException) -> str:
    name = getattr(error, "sqlite_errorname", "") or getattr(error, "sqlstate", "") or type(error).__name__
    full = name.startswith(("SQLITE_FULL", "53100"))
    cure = "free some disk space, or lower the retention limits" if full else "it will be tried again"
    return f"database {url!r} cannot be used now: {str(error).strip()} ({name}); {cure}"
