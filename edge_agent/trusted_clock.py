"""What time it is at least. A board without a clock starts in 1970, where every certificate seems to be of the future.

The trusted time is the latest that has certainly passed: this program's release, the last time at which a broker's
certificate was found valid (saved), what the coordinator said. A system clock that shows less is wrong, and dates of
certificates are then checked against the trusted time (side_tuning/broker_tls.py). Samples keep the system's time.

It is saved only while a verified connection stands, so that a clock that runs ahead cannot carry it beyond the broker's
certificate and lock the device out once the clock is set right.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from edge_agent.checkpoint_store import write_file

logger = logging.getLogger(__name__)

RELEASED_AT = datetime(2026, 9, 1, tzinfo=timezone.utc).timestamp()  # a little before; move it up with each release
LATEST = datetime(2100, 1, 1, tzinfo=timezone.utc).timestamp()  # a saved time beyond is damage
SAVE_SECONDS = 24 * 3600.0  # the card is not written more often than that for this
TOLERANCE_SECONDS = 300.0  # two clocks are never quite the same


class TrustedClock:
    """The system's clock, and the trusted time, `passed`, below which it is not believed. Thread-safe."""

    def __init__(self, state_directory: Path, now: Callable[[], float] = time.time) -> None:
        self._path = state_directory / "trusted-time"
        self._system = now
        self._lock = threading.Lock()
        self._saved = self._read()
        self.passed = max(RELEASED_AT, self._saved)  # seconds since 1970
        self._told = False

    def now(self) -> float:
        """Never earlier than the trusted time."""
        return max(self._system(), self.passed)

    @property
    def is_behind(self) -> bool:
        return self._system() < self.passed - TOLERANCE_SECONDS

    def instead_of_system(self) -> float | None:
        """What to check certificates against where the system's clock will not do, else None."""
        if not self.is_behind:
            self._told = False
            return None
        if not self._told:
            self._told = True
            logger.warning("%s", self.trouble)
        return self.passed

    @property
    def trouble(self) -> str:
        """What is wrong with the system's clock, in words; empty if nothing is known to be."""
        if not self.is_behind:
            return ""
        return (
            f"the clock shows {_date(self._system())}, but it is at least {_date(self.passed)}; certificates are checked against that: "
            "set the date, or let this device reach a time server"
        )

    def told(self, at: float, *, no_later_than: float) -> None:
        """Somebody trusted says that it is `at`; a mistake of theirs must not reach beyond `no_later_than`. Saved."""
        with self._lock:
            self.passed = max(self.passed, min(at, no_later_than))
            self._save(self.passed)

    def note(self, *, at_once: bool = False) -> None:
        """The broker's certificate was just found valid under the system's clock: keep the time, once a day or `at_once`."""
        now = self._system()
        with self._lock:
            self.passed = max(self.passed, now)
            if self.passed - self._saved >= (1.0 if at_once else SAVE_SECONDS):
                self._save(self.passed)

    def _save(self, at: float) -> None:
        if at <= self._saved:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, f"{at:.0f}\n".encode())
        except OSError as error:
            logger.debug("the time could not be saved to %s: %s", self._path, error.strerror)
            return
        self._saved = at

    def _read(self) -> float:
        try:
            text = self._path.read_text(encoding="ascii")[:32].strip()
        except (OSError, UnicodeDecodeError):
            return 0.0
        return float(text) if text.isdigit() and float(text) < LATEST else 0.0


def _date(at: float) -> str:
    try:
        return f"{datetime.fromtimestamp(at, tz=timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return f"{at:.0f} s"
