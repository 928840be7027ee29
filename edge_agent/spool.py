"""The device's durable, bounded queue of encoded frames, and its half of the loss ledger.

Rules:
- What a call acknowledged survives kill -9 and power loss: one SQLite file, WAL, synchronous=FULL.
- A frame, the marks of its samples and the counters change in one transaction, so at every instant
  produced = receipted + spooled + dropped, and no sample is marked without its frame.
- Sequences start at 1 and are never used twice under one spool id. A spool that cannot be trusted (damaged, rolled
  back) is moved aside and a new one, with a new id, takes its place.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

from typing_extensions import Self

from edge_agent.compact_set import CompactSet, digest_of, pack_digests
from edge_agent.disk_room import DiskRoom
from edge_agent.spool_file import (
    SpoolDamaged,
    SpoolError,
    SpoolFull,
    SpoolLock,
    connect,
    create_tables,
    explain,
    is_damage,
    is_full,
    mark_suspect,
    move_aside,
    verify,
)
from side_tuning.wire.messages import Receipt, SpoolCount

__all__ = ["Spool", "SpoolDamaged", "SpoolError", "SpoolFull", "SpooledFrame"]

logger = logging.getLogger(__name__)

Policy = Literal["pause", "drop-oldest"]
T = TypeVar("T")

MAX_REFUSAL_REASONS = 60  # the wire allows 64
BUFFERED_REFUSALS = 64  # refused rows wait for each other: a file of a million bad rows must not cost a million fsyncs
FORGET_FRAMES = 64  # per transaction: bounds the log, which must fit the reserve when the disk is full
SHRINK_ABOVE_FREE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class SpooledFrame:
    sequence: int
    payload: bytes
    samples: int  # in a frame of several parts, all on the first part
    created_at: float


@dataclass
class _Tally:
    """The counters as of the last commit; `spooled*` are derived from the frames when the file is opened."""

    next_sequence: int
    produced: int
    receipted: int
    dropped: int
    handed_out: int  # highest sequence that `pending` has returned: it may have been published
    bytes_sent: int
    spooled: int
    spooled_frames: int
    spooled_bytes: int


class Spool:
    """Open with `Spool.open`. Every method may be called from any thread; they take turns."""

    def __init__(
        self, path: Path, lock: SpoolLock, database: sqlite3.Connection, *, max_bytes: int, policy: Policy, clock: Callable[[], float],
    ) -> None:
        self.path = path
        self.id = str(database.execute("SELECT spool FROM counters").fetchone()[0])
        self.moved_aside = ""  # why the spool before this one was moved aside, when that happened at this start
        self._file_lock = lock
        self._room = DiskRoom(path, database, max_bytes)
        self._database = database
        self._max_bytes = max_bytes
        self._policy = policy
        self._clock = clock
        self._lock = threading.RLock()
        self._new_frames = threading.Event()
        self._seen = CompactSet(b"".join(row[0] for row in database.execute("SELECT digests FROM seen ORDER BY n")))
        self._refused: dict[str, int] = dict(database.execute("SELECT reason, samples FROM refusals"))
        self._unwritten_refusals: list[tuple[str, int | None]] = []
        self._tally = self._read_tally()
        self._drops_logged = 0
        self._closed = False

    @classmethod
    def open(cls, path: Path, *, max_bytes: int, policy: Policy, clock: Callable[[], float]) -> Spool:
        """Open the spool file at `path`, or make it (and its folder).

        Raises:
            SpoolError: in use by another agent, made by a newer one, or the disk refuses; the text says the cure.

        """
        lock = SpoolLock(path)
        try:
            reason = verify(path)
            if reason:
                moved_to = move_aside(path, clock())
                reason = f"{reason}; it is kept as {moved_to.name}, a new spool takes its place"
                logger.error("spool %s: %s. Samples from files are read and sent again.", path, reason)
            database = connect(path)
            try:
                create_tables(database, secrets.token_hex(8))
                spool = cls(path, lock, database, max_bytes=max_bytes, policy=policy, clock=clock)
                if reason:
                    spool.moved_aside = reason
                    spool.refuse(None, "spool moved aside")
            except BaseException:
                database.close()
                raise
        except sqlite3.Error as error:
            lock.release()
            raise explain(error, path) from error
        except BaseException:
            lock.release()
            raise
        return spool

    def _read_tally(self) -> _Tally:
        counters = self._database.execute(
            "SELECT next_sequence, produced, receipted, dropped, handed_out, bytes_sent FROM counters",
        ).fetchone()
        spooled = self._database.execute("SELECT coalesce(sum(samples), 0), count(*), coalesce(sum(bytes), 0) FROM frames").fetchone()
        return _Tally(*counters, *spooled)

    # Samples in.

    def append(self, sample_ids: Sequence[str], build: Callable[[int, int], list[bytes]]) -> list[int]:
        """Store the frame of these samples and mark them as seen; returns its sequence (one per part).

        Args:
            sample_ids: the samples that the frame carries.
            build: gets the frame's sequence and the samples produced so far, these included; returns the payload, or
                its parts in order. Called once.

        Raises:
            SpoolFull: no room under the policy, or on the disk; nothing has changed, the samples can be offered again.
            SpoolError: the frame alone exceeds the spool, or the file cannot be used any more.

        """
        with self._lock:
            digests = [digest_of(sample_id) for sample_id in sample_ids]
            room = self._room.bytes_allowed()
            if self._policy == "pause" and self._tally.spooled_bytes >= room:
                raise self._full()
            first = self._tally.next_sequence
            payloads = build(first, self._tally.produced + len(sample_ids))
            if not payloads:
                raise ValueError("a frame needs at least one payload")
            payload_bytes = sum(len(payload) for payload in payloads)
            if payload_bytes > self._max_bytes:
                raise SpoolError(
                    f"one frame of {payload_bytes} bytes is larger than the whole spool; raise spool.max_bytes ({self._max_bytes})",
                )
            if self._policy == "pause" and self._tally.spooled_bytes + payload_bytes > room:
                raise self._full()

            def insert(tally: _Tally) -> None:
                if self._policy == "drop-oldest":
                    self._drop_down_to(tally, room - payload_bytes)
                self._insert(tally, payloads, len(sample_ids))
                self._database.execute("INSERT INTO seen (digests) VALUES (?)", (pack_digests(digests),))

            try:
                self._write(insert)
            except SpoolFull:
                room = self._room.lower(self._tally.spooled_bytes)
                if self._policy == "pause" or self._tally.spooled_frames == 0:
                    raise
                self._write(insert, makes_room=True)
                self._room.restore()
            self._seen.add(digests)
            self._new_frames.set()
            return list(range(first, first + len(payloads)))

    def _insert(self, tally: _Tally, payloads: list[bytes], samples: int) -> None:
        first = tally.next_sequence
        for sequence, payload in enumerate(payloads, first):
            counted = samples if sequence == first else 0
            self._database.execute(
                "INSERT INTO frames (sequence, first, samples, bytes, crc, created_at) VALUES (?, ?, ?, ?, ?, ?)",
                (sequence, first, counted, len(payload), zlib.crc32(payload), self._clock()),
            )
            self._database.execute("INSERT INTO payloads (sequence, payload) VALUES (?, ?)", (sequence, payload))
            tally.spooled_bytes += len(payload)
        tally.next_sequence += len(payloads)
        tally.spooled_frames += len(payloads)
        tally.produced += samples
        tally.spooled += samples

    def seen(self, sample_id: str) -> bool:
        """Whether this sample was appended or refused before, in any run."""
        with self._lock:
            return digest_of(sample_id) in self._seen

    def refuse(self, sample_id: str | None, reason: str) -> None:
        """Count a sample that never becomes part of a frame, and mark it as seen unless it has no id.

        Refusals are written with the next frame or in batches; one lost to a crash is read and refused again.
        """
        with self._lock:
            reason = reason[:64]
            if reason not in self._refused and len(self._refused) >= MAX_REFUSAL_REASONS:
                reason = "other"
            digest = digest_of(sample_id) if sample_id else None
            self._refused[reason] = self._refused.get(reason, 0) + 1
            if digest is not None:
                self._seen.add([digest])
            self._unwritten_refusals.append((reason, digest))
            if len(self._unwritten_refusals) >= BUFFERED_REFUSALS:
                self._flush_if_room()

    # Frames out.

    def pending(self, after_sequence: int, limit: int) -> list[SpooledFrame]:
        """Up to `limit` frames with a higher sequence, ascending. They count as possibly published from now on."""
        with self._lock:
            try:
                rows = self._database.execute(
                    "SELECT sequence, payload, samples, created_at, crc FROM frames JOIN payloads USING (sequence) "
                    "WHERE sequence > ? ORDER BY sequence LIMIT ?",
                    (after_sequence, limit),
                ).fetchall()
            except sqlite3.Error as error:
                raise self._fail(error) from error
            broken = [row[0] for row in rows if zlib.crc32(row[1]) != row[4]]
            if broken:
                self._drop_broken(broken)
                return self.pending(after_sequence, limit)
            if rows:
                self._tally.handed_out = max(self._tally.handed_out, rows[-1][0])
            return [SpooledFrame(*row[:4]) for row in rows]

    def acknowledge(self, receipt: Receipt) -> int:
        """Forget the frames that the coordinator holds; returns how many. A receipt for another spool id is ignored.

        Raises:
            SpoolError: the coordinator holds frames that this spool never made, so this file is an old copy.

        """
        if receipt.spool != self.id:
            return 0
        with self._lock:
            highest = max(receipt.stored_through, *receipt.stored_ahead, 0)
            if highest >= self._tally.next_sequence:
                mark_suspect(self.path, "rolled back")
                raise SpoolError(
                    f"spool {self.path}: the coordinator holds frame {highest} of it, but the next one here would be "
                    f"{self._tally.next_sequence}: the file is an old copy (a restored card or backup). Start the agent again: "
                    "it moves the file aside and sends from a new one",
                )
            ahead = [sequence for sequence in receipt.stored_ahead if sequence > receipt.stored_through]
            marks = ", ".join("?" * len(ahead))
            receipted = self._rows(f"sequence <= ? OR sequence IN ({marks})", (receipt.stored_through, *ahead))
            for start in range(0, len(receipted), FORGET_FRAMES):
                self._forget(receipted[start : start + FORGET_FRAMES])
            if receipted:
                self._room.restore()
                self._shrink()
            return len(receipted)

    def _forget(self, rows: list[tuple[int, int, int]]) -> None:
        def forget(tally: _Tally) -> None:
            tally.receipted += self._delete(tally, rows)

        self._write(forget, makes_room=True)

    def wait_for_new(self, timeout_seconds: float) -> bool:
        """Wait until a frame was appended since the last call that returned True; for one waiting thread."""
        if self._new_frames.wait(timeout_seconds):
            self._new_frames.clear()
            return True
        return False

    # Numbers and small values.

    def count(self) -> SpoolCount:
        """The device's half of the loss ledger; what was counted up to here is on the disk afterwards, if that has room."""
        with self._lock:
            self._flush_if_room()
            try:
                oldest = self._database.execute("SELECT sequence, created_at FROM frames ORDER BY sequence LIMIT 1").fetchone()
            except sqlite3.Error as error:
                raise self._fail(error) from error
            tally = self._tally
            return SpoolCount(
                spool=self.id,
                produced=tally.produced,
                receipted=tally.receipted,
                spooled=tally.spooled,
                dropped=tally.dropped,
                spooled_frames=tally.spooled_frames,
                spooled_bytes=tally.spooled_bytes,
                oldest_age_seconds=max(0.0, self._clock() - oldest[1]) if oldest else 0.0,
                floor=oldest[0] if oldest else tally.next_sequence,
                next_sequence=tally.next_sequence,
                refused=dict(self._refused),
            )

    @property
    def bytes_sent(self) -> int:
        return self._tally.bytes_sent

    def add_bytes_sent(self, payload_bytes: int) -> None:
        """Count published bytes; written with the next change, so a crash may lose the latest."""
        with self._lock:
            self._tally.bytes_sent += payload_bytes

    def get_setting(self, key: str) -> str | None:
        with self._lock:
            row = self._database.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
            return None if row is None else str(row[0])

    def set_setting(self, key: str, value: str) -> None:
        """Keep a small value durably, such as the plan in use or whether the device is paused."""
        with self._lock:
            self._write(lambda _: self._database.execute("INSERT OR REPLACE INTO settings (key, value) VALUES (?, ?)", (key, value)))

    def flush(self) -> None:
        """Write what is only counted so far."""
        with self._lock:
            self._write(lambda _: None)

    def _flush_if_room(self) -> None:
        try:
            self.flush()
        except SpoolFull:
            logger.debug("spool %s: counters wait for room on the disk", self.path)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self.flush()
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except (SpoolError, sqlite3.Error) as error:
                logger.warning("spool %s: the last counters were not written: %s", self.path, error)
            finally:
                self._database.close()
                self._file_lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # One transaction.

    def _write(self, change: Callable[[_Tally], T], *, makes_room: bool = False) -> T:
        """Run `change` on a copy of the tally in a transaction; the copy counts once it is committed.

        On a full disk it is tried again with the room that a checkpoint frees in the log, and a change that
        `makes_room` may use up the reserve.
        """
        try:
            return self._commit(change)
        except sqlite3.Error as error:
            if not is_full(error):
                raise self._fail(error) from error
        self._room.free_the_log(use_reserve=makes_room)
        try:
            return self._commit(change)
        except sqlite3.Error as error:
            raise self._fail(error) from error

    def _commit(self, change: Callable[[_Tally], T]) -> T:
        tally = replace(self._tally)
        self._database.execute("BEGIN IMMEDIATE")
        try:
            result = change(tally)
            for reason, _ in self._unwritten_refusals:
                self._database.execute(
                    "INSERT INTO refusals (reason, samples) VALUES (?, 1) ON CONFLICT (reason) DO UPDATE SET samples = samples + 1", (reason,),
                )
            marks = pack_digests(digest for _, digest in self._unwritten_refusals if digest is not None)
            if marks:
                self._database.execute("INSERT INTO seen (digests) VALUES (?)", (marks,))
            self._database.execute(
                "UPDATE counters SET next_sequence = ?, produced = ?, receipted = ?, dropped = ?, handed_out = ?, bytes_sent = ?",
                (tally.next_sequence, tally.produced, tally.receipted, tally.dropped, tally.handed_out, tally.bytes_sent),
            )
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        self._unwritten_refusals.clear()
        self._tally = tally
        return result

    def _fail(self, error: sqlite3.Error) -> SpoolError:
        if is_damage(error):
            mark_suspect(self.path, str(error))
        return explain(error, self.path)

    # Room.

    def _full(self) -> SpoolFull:
        if self._room.is_lowered:
            return SpoolFull(f"the disk of the spool {self.path} is full; free some space, it goes on by itself")
        return SpoolFull(
            f"the spool is full: {self._tally.spooled_bytes} of {self._max_bytes} bytes wait for the coordinator's receipt. "
            'Samples are taken again when it answers; raise spool.max_bytes or set spool.policy = "drop-oldest" if that is not wanted',
        )

    def _rows(self, where: str, values: tuple[int, ...]) -> list[tuple[int, int, int]]:
        try:
            return self._database.execute(f"SELECT sequence, samples, bytes FROM frames WHERE {where}", values).fetchall()  # noqa: S608 - fixed texts
        except sqlite3.Error as error:
            raise self._fail(error) from error

    def _delete(self, tally: _Tally, rows: list[tuple[int, int, int]]) -> int:
        """Delete frames and return the samples that they carried."""
        for table in ("frames", "payloads"):
            self._database.executemany(f"DELETE FROM {table} WHERE sequence = ?", [(row[0],) for row in rows])  # noqa: S608 - fixed names
        samples = sum(row[1] for row in rows)
        tally.spooled -= samples
        tally.spooled_frames -= len(rows)
        tally.spooled_bytes -= sum(row[2] for row in rows)
        return samples

    def _drop_down_to(self, tally: _Tally, wanted_bytes: int) -> None:
        """Drop whole frames, the oldest first, until at most `wanted_bytes` are held.

        Frames that may be on their way to the coordinator go last: one that is dropped here and stored there would be
        counted twice in the ledger. A frame whose first part is receipted stays: its samples count as receipted.
        """
        while tally.spooled_bytes > wanted_bytes:
            oldest = self._database.execute(
                "SELECT first FROM frames WHERE sequence = first ORDER BY sequence <= ?, sequence LIMIT 1", (tally.handed_out,),
            ).fetchone()
            if oldest is None:
                raise self._full()
            samples = self._delete(tally, self._rows("first = ?", oldest))
            tally.dropped += samples
            self._drops_logged += 1
            level = logging.WARNING if self._drops_logged == 1 else logging.DEBUG
            logger.log(level, "spool full: dropped frame %s with %s samples (%s samples dropped so far)", oldest[0], samples, tally.dropped)

    def _drop_broken(self, sequences: list[int]) -> None:
        def drop(tally: _Tally) -> None:
            for sequence in sequences:
                tally.dropped += self._delete(tally, self._rows("sequence = ?", (sequence,)))

        self._write(drop)
        logger.error(
            "spool %s: frames %s were damaged on the disk and are dropped (counted). Check the card: `edge-agent doctor`", self.path, sequences,
        )

    def _shrink(self) -> None:
        """Give disk space back once a backlog is gone; SQLite keeps freed pages otherwise."""
        if self._tally.spooled_frames:
            return
        try:
            free, size = (self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_size"))
            if free * size > SHRINK_ABOVE_FREE_BYTES:
                self._database.execute("VACUUM")
        except sqlite3.Error as error:
            logger.warning("spool %s keeps its size: %s", self.path, error)
