"""What the gateway counts, and the line it logs of it now and then."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, fields

from coordinator.intake import Intake

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
