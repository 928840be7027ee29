"""What the gateway counts, the line it logs of it now and then, and the figures in its heartbeat."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from coordinator.intake import Intake

if TYPE_CHECKING:
    from side_tuning.broker_connection import BrokerConnection

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What came in since the gateway started."""

    frames: int = 0
    samples: int = 0
    payload_bytes: int = 0
    parts: int = 0
    duplicates: int = 0
    rejected: int = 0
    health: int = 0
    unattributable: int = 0  # on topics that are no device's; nothing can be kept of them

    def since(self, earlier: Counters) -> Counters:
        return Counters(*(getattr(self, item.name) - getattr(earlier, item.name) for item in fields(self)))

    def copy(self) -> Counters:
        return self.since(Counters())


@dataclass
class Commits:
    """How long batches took to reach the disk, and the one under way. Written by the writer, read by the heartbeat."""

    last_seconds: float | None = None
    average_seconds: float | None = None  # over about the last twenty batches
    under_way_since: datetime | None = None  # arrival of the oldest message that is being stored

    def count(self, seconds: float) -> None:
        before = self.average_seconds
        self.last_seconds = seconds
        self.average_seconds = seconds if before is None else before + (seconds - before) / 20


def gateway_figures(
    counters: Counters, commits: Commits, intake: Intake, connection: BrokerConnection, *, wal_bytes: int | None, now: datetime
) -> dict[str, Any]:
    """What the gateway's row in `programs` holds. Seconds and bytes; times are seconds since 1970."""
    oldest = commits.under_way_since or intake.oldest_at
    return {
        "connected": connection.connected,
        "broker": connection.address,
        "broker_error": connection.last_error,
        "broker_certificate_expires_at": connection.peer_certificate_expires_at,
        "queue_messages": len(intake),
        "dropped_messages": intake.dropped,  # came while the queue was full; devices send them again
        **asdict(counters),
        "commit_seconds_last": commits.last_seconds,
        "commit_seconds_average": commits.average_seconds,
        "oldest_uncommitted_seconds": None if oldest is None else max(0.0, (now - oldest).total_seconds()),
        "wal_bytes": wal_bytes,
    }


class Reports:
    """One line of counters a minute, while anything happens."""

    def __init__(self, every_seconds: float, counters: Counters, intake: Intake) -> None:
        self._every_seconds = every_seconds
        self._counters = counters
        self._intake = intake
        self._last = counters.copy()
        self.started_at = self._last_at = time.monotonic()

    def log_due(self) -> None:
        seconds = time.monotonic() - self._last_at
        if seconds >= self._every_seconds:
            self.log(f"last {seconds:.0f} s", self._last, seconds)
            self._last, self._last_at = self._counters.copy(), time.monotonic()

    def log(self, when: str, since: Counters, seconds: float) -> None:
        new = self._counters.since(since)
        if new == Counters():
            return
        logger.info(
            "%s: %d frames (%.1f/s), %d samples (%.1f/s), %d bytes (%.0f/s), %d duplicates, %d rejected, %d parts, %d reports, %d waiting, %d dropped for want of room",
            when,
            new.frames,
            new.frames / max(seconds, 1e-9),
            new.samples,
            new.samples / max(seconds, 1e-9),
            new.payload_bytes,
            new.payload_bytes / max(seconds, 1e-9),
            new.duplicates,
            new.rejected,
            new.parts,
            new.health,
            len(self._intake),
            self._intake.dropped,
        )
