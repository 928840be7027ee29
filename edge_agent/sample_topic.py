"""Samples from a topic of a local broker. A message is on this device's disk before the broker is told that it arrived.

Messages wait in a small SQLite file of their own until the spool has their samples. Unlike rows of a file they cannot
be read again, so each gets a random identity when it arrives, unless it brings an `id`.
"""

from __future__ import annotations

import logging
import queue
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from edge_agent.sample_formats import MAX_ROW_BYTES, parse_json_row
from edge_agent.sample_pace import Pace
from edge_agent.sample_rows import Given, Refusal, RowError, RowReader, Sample
from edge_agent.settings import MqttSourceSettings
from edge_agent.spool_file import connect, explain, is_damage, move_aside
from side_tuning.broker_connection import BrokerConnection, Message

logger = logging.getLogger(__name__)

SESSION_SECONDS = 86_400  # the local broker keeps messages this long while the agent is away
UNSAVED_MESSAGES = 256  # between the network thread and the disk; QoS 0 has no other brake
BATCH_MESSAGES = 64


class TopicSource:
    """One subscription with its inbox. `poll` gives what is in the inbox; it is never exhausted."""

    exhausted = False

    def __init__(
        self, settings: MqttSourceSettings, name: str, seen: Callable[[str], bool], folder: Path, *, monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._seen = seen
        self._name = name
        self._taken = Given(seen)
        self._pace = Pace(settings.rate_per_second, monotonic)
        folder.mkdir(parents=True, exist_ok=True)
        file_name = blake2b(name.encode(), digest_size=8).hexdigest()
        self._database = _open_inbox(folder / f"{file_name}.db")
        self._lock = threading.Lock()  # guards the database
        self._bytes = int(self._database.execute("SELECT coalesce(sum(length(payload)), 0) FROM inbox").fetchone()[0])
        self._last_given = 0
        self._given: deque[tuple[int, str]] = deque()  # rows handed out, until the spool has them
        self._unsaved: queue.Queue[Message] = queue.Queue(UNSAVED_MESSAGES)
        self._lost = 0
        self._stopping = threading.Event()
        client_id = str(self._database.execute("SELECT client_id FROM identity").fetchone()[0])
        self._connection = BrokerConnection(
            settings.broker(), client_id, subscriptions=[settings.topic], on_message=self._arrived, manual_ack=True,
            clean_start=False, session_expiry_seconds=SESSION_SECONDS, receive_maximum=BATCH_MESSAGES,
        )
        self._saver = threading.Thread(target=self._save_arrivals, name=f"inbox-{name}", daemon=True)
        self._saver.start()
        self._connection.start()

    def describe(self) -> str:
        return f"topic {self._settings.topic} at {self._settings.host}:{self._settings.port}"

    def poll(self, limit: int) -> list[Sample | Refusal]:
        self._forget_spooled()
        taken: list[Sample | Refusal] = []
        with self._lock:
            rows = self._database.execute(
                "SELECT n, id, payload FROM inbox WHERE n > ? ORDER BY n LIMIT ?", (self._last_given, self._pace.allow(limit)),
            ).fetchall()
        for n, row_id, payload in rows:
            item = self._item(n, row_id, payload)
            self._last_given = n
            if isinstance(item, Sample | Refusal):
                self._given.append((n, item.id))
                taken.append(item)
            else:  # the spool has it already, or the message came twice
                self._delete([n])
        self._pace.spend(taken)
        return taken

    def close(self) -> None:
        self._stopping.set()
        self._connection.stop()
        self._saver.join()
        with self._lock:
            self._database.close()

    def _item(self, n: int, row_id: str, payload: bytes) -> Sample | Refusal | str:
        # A reader for each message: a topic has no end, and what was given is known by its id.
        rows = RowReader(self._settings, self._name, self._taken)
        where = f"topic {self._settings.topic}, message {n}"
        try:
            text = payload.decode()
            is_json = text.lstrip().startswith("{")
            fields = parse_json_row(text) if is_json else {self._settings.columns.get("text", "text"): text}
        except UnicodeDecodeError:
            return rows.refusal("", "not UTF-8", f"{where}: not UTF-8; send text or JSON in UTF-8", id_if_none=row_id)
        except RowError as error:
            return rows.refusal("", error.reason, f"{where}: {error}", id_if_none=row_id)
        return rows.sample(fields, where, id_if_none=row_id)

    def _forget_spooled(self) -> None:
        """Delete rows whose sample the spool holds durably (or refused)."""
        done: list[int] = []
        while self._given and self._seen(self._given[0][1]):
            done.append(self._given.popleft()[0])
        self._delete(done)

    def _delete(self, numbers: list[int]) -> None:
        if not numbers:
            return
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("DELETE FROM inbox WHERE n = ?", [(n,) for n in numbers])
                self._database.execute("COMMIT")
            except sqlite3.Error as error:  # they stay; the next start knows them as seen and deletes them
                logger.debug("%s: %s messages stay in the inbox: %s", self.describe(), len(numbers), error)
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
            self._bytes = int(self._database.execute("SELECT coalesce(sum(length(payload)), 0) FROM inbox").fetchone()[0])

    # Network thread, and the thread that saves.

    def _arrived(self, message: Message) -> None:
        try:
            self._unsaved.put_nowait(message)
        except queue.Full:  # QoS 0 only: with QoS 1 the broker stops at receive_maximum
            self._lost += 1
            level = logging.WARNING if self._lost == 1 else logging.DEBUG
            logger.log(level, "%s: messages come faster than the disk takes them; %s lost. Publish them with QoS 1", self.describe(), self._lost)

    def _save_arrivals(self) -> None:
        failures = 0
        batch: list[Message] = []
        while not self._stopping.is_set():
            batch = batch or self._next_batch()
            if not batch:
                continue
            if self._bytes > self._settings.inbox_bytes:
                self._stopping.wait(0.2)  # unacknowledged: the broker keeps the rest until the spool takes some
                continue
            try:
                self._save(batch)
            except sqlite3.Error as error:
                failures += 1
                level = logging.ERROR if failures == 1 else logging.DEBUG
                logger.log(level, "%s: messages cannot be saved (%s); is the disk full? The broker keeps them, trying again", self.describe(), error)
                self._stopping.wait(min(30.0, 0.5 * 2 ** min(failures, 6)))
                continue
            failures = 0
            for message in batch:
                self._connection.acknowledge(message)
            batch = []

    def _next_batch(self) -> list[Message]:
        batch: list[Message] = []
        try:
            batch.append(self._unsaved.get(timeout=0.2))
            while len(batch) < BATCH_MESSAGES:
                batch.append(self._unsaved.get_nowait())
        except queue.Empty:
            pass
        return batch

    def _save(self, batch: list[Message]) -> None:
        # A message over the limit is kept as an empty one: it is refused and counted like any other without text.
        rows = [(secrets.token_hex(16), message.payload if len(message.payload) <= MAX_ROW_BYTES else b"") for message in batch]
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._database.executemany("INSERT INTO inbox (id, payload) VALUES (?, ?)", rows)
                self._database.execute("COMMIT")
            except sqlite3.Error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
            self._bytes += sum(len(payload) for _, payload in rows)


def _open_inbox(path: Path) -> sqlite3.Connection:
    try:
        return _connect_inbox(path)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise explain(error, path) from error
        logger.error("inbox %s is damaged (%s); it is kept as %s, a new one takes its place", path, error, move_aside(path, time.time()).name)
    return _connect_inbox(path)


def _connect_inbox(path: Path) -> sqlite3.Connection:
    database = connect(path)  # durable like the spool: a message is acknowledged once it would survive power loss
    try:
        # AUTOINCREMENT: a number is never used twice, so "given up to n" stays true when the inbox runs empty.
        database.execute("CREATE TABLE IF NOT EXISTS inbox (n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, payload BLOB NOT NULL)")
        database.execute("CREATE TABLE IF NOT EXISTS identity (only_row INTEGER PRIMARY KEY CHECK (only_row = 1), client_id TEXT NOT NULL)")
        database.execute("INSERT OR IGNORE INTO identity VALUES (1, ?)", (f"edge-agent-{secrets.token_hex(8)}",))
    except BaseException:
        database.close()
        raise
    return database
