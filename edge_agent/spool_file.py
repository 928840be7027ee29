"""The spool's file: lock, tables, PRAGMAs, what SQLite's errors mean, and moving a file aside that cannot be trusted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from datetime import datetime, timezone
from pathlib import Path

SCHEMA_VERSION = 1
KEPT_ASIDE = 3  # moved-aside files kept for inspection; older ones are deleted
# Checkpoints come often enough that the log stays far smaller than the reserve of disk_room.py, which has to outlast one.
WAL_PAGES = 256
WAL_LIMIT_BYTES = 2 * 1024 * 1024

_TABLES = """
CREATE TABLE counters (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    spool TEXT NOT NULL, next_sequence INTEGER NOT NULL, produced INTEGER NOT NULL, receipted INTEGER NOT NULL,
    dropped INTEGER NOT NULL, handed_out INTEGER NOT NULL, bytes_sent INTEGER NOT NULL
);
-- Payloads in a table of their own: start-up reads every row of `frames`, and no payload.
CREATE TABLE frames (
    sequence INTEGER PRIMARY KEY, first INTEGER NOT NULL, samples INTEGER NOT NULL, bytes INTEGER NOT NULL,
    crc INTEGER NOT NULL, created_at REAL NOT NULL
);
CREATE INDEX frames_first ON frames (first);
CREATE TABLE payloads (sequence INTEGER PRIMARY KEY, payload BLOB NOT NULL);
-- 64-bit digests, a frame's in one row: a row per sample would touch a page per sample and wear the card out.
CREATE TABLE seen (n INTEGER PRIMARY KEY, digests BLOB NOT NULL);
CREATE TABLE refusals (reason TEXT PRIMARY KEY, samples INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class SpoolError(RuntimeError):
    """The spool cannot be used; the text names the file and the cure."""


class SpoolFull(SpoolError):  # noqa: N818 - reads as what happened
    """There is no room for this frame now; nothing has changed and it can be offered again later."""


class SpoolDamaged(SpoolError):  # noqa: N818
    """The file turned out damaged while in use; the next start moves it aside."""


class SpoolLock:
    """Keeps a second agent off the same spool; the kernel releases it when the process dies."""

    def __init__(self, path: Path) -> None:
        lock_path = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SpoolError(
                f"the spool cannot be made in {path.parent}: {error.strerror}; make state_directory a folder this user can write, with room",
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise SpoolError(f"the spool {path} is in use by another edge-agent; stop that one, or give this one its own state_directory") from error

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the file (made if absent, readable by its owner only) with the PRAGMAs that the spool's promises rest on."""
    if read_only:
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    if not path.exists():
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise SpoolError(f"the spool {path} cannot be made: {error.strerror}; make its folder writable, with room on the disk") from error
        sync_folder(path.parent)
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")  # one fsync per commit, and the doctor may read meanwhile
        database.execute("PRAGMA synchronous = FULL")  # WAL with NORMAL loses the last commits on power loss
        database.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        database.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        database.execute("PRAGMA busy_timeout = 5000")  # the doctor's read may hold up a checkpoint
    except BaseException:
        database.close()
        raise
    return database


def create_tables(database: sqlite3.Connection, spool_id: str) -> None:
    """Make the tables in a new file; does nothing in one that has them."""
    if database.execute("PRAGMA user_version").fetchone()[0]:
        return
    counters = f"INSERT INTO counters VALUES (1, '{spool_id}', 1, 0, 0, 0, 0, 0);"  # noqa: S608 - hexadecimal digits
    database.executescript(f"BEGIN IMMEDIATE; {_TABLES} {counters} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def verify(path: Path) -> str:
    """Why the file cannot be trusted, or "" (also for a file that does not exist yet).

    Reads everything but the payloads, so it takes milliseconds; payloads carry a checksum each that is checked when
    they are read. A file marked suspect is read completely.

    Raises:
        SpoolError: made by a newer agent, or not readable.

    """
    size = path.stat().st_size if path.exists() else 0
    if size < 512:  # the smallest page; SQLite takes such a file for an empty one
        return f"the file is damaged (only {size} bytes are left)" if size else ""
    mark = _suspect_mark(path)
    why = mark.read_text(encoding="utf-8", errors="replace") if mark.exists() else ""
    if why == "rolled back":
        return "the coordinator holds frames that it never made, so it is an old copy"
    try:
        # Not read-only: a log left by a crash must be replayed first.
        with contextlib.closing(connect(path)) as database:
            problem = find_damage(database, thorough=bool(why))
    except sqlite3.Error as error:
        if not is_damage(error):
            raise explain(error, path) from error
        problem = str(error)
    if not problem:
        mark.unlink(missing_ok=True)
    return f"the file is damaged ({problem})" if problem else ""


def find_damage(database: sqlite3.Connection, *, thorough: bool) -> str:
    """What is wrong with an open spool file, or ""."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise SpoolError(
            f"the spool has schema version {version}, this edge-agent knows {SCHEMA_VERSION}: it was made by a newer one; "
            "install that version again",
        )
    if version == 0:
        return "" if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] else "no schema version"
    if thorough:
        answer = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if answer != "ok":
            return str(answer)
    counters = database.execute("SELECT produced, receipted, dropped, next_sequence FROM counters").fetchall()
    if len(counters) != 1:
        return "the counters are missing"
    produced, receipted, dropped, next_sequence = counters[0]
    spooled, highest, digest_bytes = database.execute(
        "SELECT (SELECT coalesce(sum(samples), 0) FROM frames), (SELECT coalesce(max(sequence), 0) FROM frames), "
        "(SELECT coalesce(sum(length(digests)), 0) FROM seen)",
    ).fetchone()
    if produced != receipted + spooled + dropped or highest >= next_sequence:
        return f"its counters disagree: {produced} samples produced, {receipted} receipted, {spooled} spooled, {dropped} dropped"
    return "the marks of its samples are incomplete" if digest_bytes % 8 else ""


def mark_suspect(path: Path, why: str) -> None:
    """Ask the next start to look at the whole file before it trusts it."""
    with contextlib.suppress(OSError):  # a full disk: that start still sees whatever its quick look shows
        _suspect_mark(path).write_text(why, encoding="utf-8")


def _suspect_mark(path: Path) -> Path:
    return path.with_name(path.name + ".suspect")


def move_aside(path: Path, now: float) -> Path:
    """Rename the file and its log; returns the new name."""
    stamp = datetime.fromtimestamp(now, tz=timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    target = path.with_name(f"{path.name}.aside-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.aside-{stamp}-{number}")
    path.rename(target)
    for suffix in ("-wal", "-shm"):
        log = path.with_name(path.name + suffix)
        if log.exists():
            log.rename(target.with_name(target.name + suffix))
    _suspect_mark(path).unlink(missing_ok=True)
    kept = sorted(old for old in path.parent.glob(f"{path.name}.aside-*") if not old.name.endswith(("-wal", "-shm")))
    for old in kept[:-KEPT_ASIDE]:
        for suffix in ("", "-wal", "-shm"):
            old.with_name(old.name + suffix).unlink(missing_ok=True)
    sync_folder(path.parent)
    return target


def sync_folder(folder: Path) -> None:
    """Make new and renamed files in `folder` survive power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What SQLite says. By text, since Python 3.10 gives no error codes.


def is_full(error: sqlite3.Error) -> bool:
    return "full" in str(error)


def is_damage(error: sqlite3.Error) -> bool:
    text = str(error)
    # A missing table or column is damage too: the schema was made by us, in one transaction.
    return any(sign in text for sign in ("malformed", "not a database", "no such table", "no such column", "unsupported file format"))


def explain(error: sqlite3.Error, path: Path) -> SpoolError:
    """The error in words, with the cure."""
    if is_full(error):
        return SpoolFull(f"the disk of the spool {path} is full; free some space, it goes on by itself")
    if is_damage(error):
        return SpoolDamaged(f"the spool {path} is damaged ({error}); start the agent again: it moves the file aside and begins a new one")
    if "readonly" in str(error) or "unable to open" in str(error):
        return SpoolError(f"the spool {path} cannot be written ({error}); is the disk mounted read-only, or the file another user's?")
    return SpoolError(f"the spool {path} failed: {error}; check the disk with `edge-agent doctor` and the kernel log")
