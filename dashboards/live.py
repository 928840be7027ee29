"""Keeps what open pages show up to date: one thread reads the fleet, every page's viewers share what it made of that.

A page is a set of named fragments of HTML. A channel is one page with its query; the sampler renders a channel's
fragments once per round and sends all of its viewers the same bytes: those fragments that changed. Nobody looking,
nothing read. The store is read in short transactions, none is held between rounds, however long a page stays open.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from sqlalchemy.orm import Session

from coordinator.store.engine import Store, open_store, parse_url
from coordinator.store.errors import StoreError
from coordinator.store.fleet import DeviceOverview, FleetMemory, device_overview
from coordinator.store.timestamps import utc_now
from dashboards.snapshot import FleetSnapshot, take_snapshot
from side_tuning.repeats import Repeats

logger = logging.getLogger(__name__)

MAX_VIEWERS = 500
STALE_SECONDS = 15.0  # how old a snapshot may be shown while the next one is being read
RETRY_SECONDS = 1.0  # between attempts to open a store that is not there yet
KEEP_ALIVE_SECONDS = 15.0  # so that a viewer who vanished is noticed
# A round may cost this share of a core at most: a large fleet is read less often, never the gateway starved.
BUSY_SHARE = 0.05

Fragments = Mapping[str, str]
Render = Callable[[FleetSnapshot], Fragments]


class TooManyViewersError(RuntimeError):
    """No more live pages can be served."""


@dataclass
class Channel:
    """One page with its query: what its viewers show now, and the newest change as it goes out."""

    render: Render
    viewers: int = 0
    version: int = 0
    fragments: Fragments = field(default_factory=dict)
    changes: bytes = b""  # from version - 1 to version
    trouble: str = ""  # why nothing moves now


class StoreAccess:
    """The store, opened when it can be; readers never make it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store: Store | None = None
        self._file: tuple[int, int] | None = None  # device and inode of SQLite's file
        self._trouble: StoreError | None = None
        self._tried_at = float("-inf")
        self._lock = threading.Lock()

    def reader(self) -> Store:
        """The open store.

        Raises:
            StoreError: it is not there yet, has another schema, or cannot be reached; tried again after a second.

        """
        with self._lock:
            if self._store is not None and self._file != self._file_now():
                # Restored from a backup under our feet: the open connections still see the file that is gone.
                self._store.close()
                self._store = None
            if self._store is not None:
                return self._store
            if self._trouble is not None and time.monotonic() - self._tried_at < RETRY_SECONDS:
                raise self._trouble
            self._tried_at = time.monotonic()
            try:
                self._file = self._file_now()
                self._store = open_store(self._url, read_only=True)
            except StoreError as error:
                self._trouble = error
                raise
            return self._store

    def _file_now(self) -> tuple[int, int] | None:
        url = parse_url(self._url)
        if url.get_backend_name() != "sqlite":
            return None
        try:
            found = Path(str(url.database)).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None


class Live:
    """The sampler thread, the newest snapshot and the channels."""

    def __init__(
        self, access: StoreAccess, *, every_seconds: float, heartbeat_seconds: float, now: Callable[[], datetime] = utc_now
    ) -> None:
        self._access = access
        self._every = every_seconds
        self._heartbeat = heartbeat_seconds
        self._now = now
        self._memory = FleetMemory()
        self._snapshot: FleetSnapshot | None = None
        self._taken_at = float("-inf")
        self._read_lock = threading.Lock()
        self._channels: dict[str, Channel] = {}
        self._lock = threading.Lock()  # of channels and closed
        self._wake = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._troubles = Repeats()
        self.closed = False
        self.rounds = 0

    # The shared snapshot.

    def snapshot(self, at_most_seconds: float = 0.0) -> FleetSnapshot:
        """The fleet as it was at most a round (or `at_most_seconds`) ago; whoever comes first reads it for all.

        While somebody is reading it anew, others get the one before rather than wait.

        Raises:
            StoreError: the store cannot be read now.

        """
        if (kept := self._kept(max(at_most_seconds, self._every))) is not None:
            return kept
        if not self._read_lock.acquire(blocking=False):
            if (kept := self._kept(STALE_SECONDS)) is not None:
                return kept
            self._read_lock.acquire()
        try:
            return self._kept(self._every) or self._read()
        finally:
            self._read_lock.release()

    def _kept(self, at_most_seconds: float) -> FleetSnapshot | None:
        kept = self._snapshot
        return kept if kept is not None and time.monotonic() - self._taken_at < at_most_seconds else None

    def device(self, session: Session, device: str) -> DeviceOverview | None:
        """One device as it is now, without reading the others."""
        known = FleetMemory(evaluation=self._memory.evaluation, scores=self._memory.scores)
        found = device_overview(session, self._now(), self._heartbeat, device=device, memory=known)
        return found[0] if found else None

    def fresh(self) -> FleetSnapshot:
        """The fleet as it is now: for the page that follows an action."""
        with self._read_lock:
            return self._read()

    def _read(self) -> FleetSnapshot:
        taken = take_snapshot(self._access.reader(), self._now(), self._heartbeat, self._memory)
        self._taken_at, self._snapshot = time.monotonic(), taken
        return taken

    def _pause(self, cost: float) -> float:
        return max(self._every, cost / BUSY_SHARE)

    # Viewers.

    def start(self) -> None:
        """Begin to serve viewers; called on the event loop that serves them."""
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End every open stream and the sampler; from any thread, more than once."""
        self.closed = True
        self._wake.set()
        self._announce()

    @property
    def viewers(self) -> int:
        with self._lock:
            return sum(channel.viewers for channel in self._channels.values())

    async def updates(self, key: str, render: Render) -> AsyncIterator[bytes]:
        """Server-sent events for one viewer of the page `key`, first everything it shows, then what changes.

        Raises:
            TooManyViewersError: at most MAX_VIEWERS are served.

        """
        assert self._news is not None
        with self._lock:
            if sum(channel.viewers for channel in self._channels.values()) >= MAX_VIEWERS:
                raise TooManyViewersError(f"{MAX_VIEWERS} pages are being kept up to date already; close some")
            channel = self._channels.setdefault(key, Channel(render))
            channel.viewers += 1
        self._wake.set()
        try:
            yield b"retry: 3000\n\n"
            seen = 0
            while not self.closed:
                news = self._news  # before looking, so that a change in between is not missed
                with self._lock:
                    version, changes, whole = channel.version, channel.changes, (channel.fragments, channel.trouble)
                if version == seen:
                    try:
                        await asyncio.wait_for(news.wait(), KEEP_ALIVE_SECONDS)
                    except asyncio.TimeoutError:
                        yield b": still here\n\n"
                    continue
                yield changes if version == seen + 1 and seen else _event(*whole, self._now())
                seen = version
        finally:
            with self._lock:
                channel.viewers -= 1
                if channel.viewers == 0 and self._channels.get(key) is channel:
                    del self._channels[key]

    def _announce(self) -> None:
        """Wake every viewer; from any thread."""

        def swap() -> None:
            before, self._news = self._news, asyncio.Event()
            if before is not None:
                before.set()

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(swap)

    # The sampler.

    def _run(self) -> None:
        # The first look at a large fleet decodes every device's report: do it before the first viewer waits for it.
        try:
            with self._read_lock:
                take_snapshot(self._access.reader(), self._now(), self._heartbeat, self._memory)
        except StoreError as error:
            logger.info("nothing to show yet: %s", error)
        except Exception:
            logger.exception("the fleet could not be read")
        while not self.closed:
            if self.viewers == 0:
                self._wake.wait(60.0)
                self._wake.clear()
                continue
            began, spent = time.monotonic(), time.thread_time()
            try:
                self._refresh(self.snapshot())
            except StoreError as error:
                self._say_trouble(str(error))
            except Exception:
                logger.exception("a round of live updates failed")
            self.rounds += 1
            deadline = began + self._pause(time.thread_time() - spent)
            while not self.closed and (left := deadline - time.monotonic()) > 0:
                if self._wake.wait(left) and not self.closed:
                    self._wake.clear()
                    self._refresh_new()  # a new viewer does not wait for the next round

    def _refresh(self, snapshot: FleetSnapshot, *, only_new: bool = False) -> None:
        with self._lock:
            channels = [c for c in self._channels.values() if not only_new or c.version == 0]
        for channel in channels:
            try:
                fragments = channel.render(snapshot)
            except StoreError:
                raise
            except Exception:
                # A page that cannot be rendered must not leave every other page standing still.
                logger.exception("a page could not be kept up to date")
                continue
            changed = {name: html for name, html in fragments.items() if channel.fragments.get(name) != html}
            if not changed and channel.version and not channel.trouble:
                continue
            with self._lock:
                channel.fragments, channel.trouble = fragments, ""
                channel.changes = _event(changed, "", snapshot.at)
                channel.version += 1
        self._announce()

    def _say_trouble(self, words: str) -> None:
        """Open pages say why they stand still."""
        if self._troubles.count(words) == 1:
            logger.warning("the fleet cannot be read: %s", words)
        with self._lock:
            for channel in self._channels.values():
                if channel.trouble != words:
                    channel.trouble, channel.changes = words, _event({}, words, self._now())
                    channel.version += 1
        self._announce()

    def _refresh_new(self) -> None:
        try:
            self._refresh(self.snapshot(), only_new=True)
        except StoreError:
            return  # the round says so
        except Exception:
            logger.exception("a new page could not be rendered")


def _event(fragments: Fragments, trouble: str, at: datetime) -> bytes:
    """A server-sent event: JSON never holds a line break, so one data line is enough."""
    body = {"at": at.timestamp(), "fragments": dict(fragments), "trouble": trouble}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
