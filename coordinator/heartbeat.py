"""How a server program says that it is alive: a file for health checks and a row in the store, every few seconds.

Two threads, since the store may be slow: the file must not look old because the database is busy. Neither ever ends
or delays the program; what cannot be written is left out and tried again at the next beat.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from typing_extensions import Self

from coordinator.store.engine import Store
from coordinator.store.programs import record_program
from coordinator.store.timestamps import utc_now
from side_tuning.alive import touch_alive

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
_JOIN_SECONDS = 2.0


class Heartbeat:
    """Beats between `start` and `stop`, or within a `with` block.

    Args:
        figures: what the row's status is to hold; called in a thread of its own, so it may only read.
        looping: whether the program's own loops go round; while they do not, the file is left to grow old.

    """

    def __init__(
        self,
        name: str,
        *,
        store: Store,
        alive_file: Path,
        figures: Callable[[], dict[str, Any]],
        looping: Callable[[], bool] = lambda: True,
        now: Callable[[], datetime] = utc_now,
        every_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._name = name
        self._store = store
        self._alive_file = alive_file
        self._figures = figures
        self._looping = looping
        self._now = now
        self._every_seconds = every_seconds
        self._started_at = now()
        self._stop = threading.Event()
        self._failures = {self._touch: 0, self._record: 0}
        self._threads = [
            threading.Thread(target=self._again_and_again, args=(beat,), name=f"heartbeat-{what}", daemon=True)
            for what, beat in (("file", self._touch), ("row", self._record))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The file goes with a program that ends in order, so that a check need not wait until it is old."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)  # one that waits for the store may be left behind
        self._alive_file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _again_and_again(self, beat: Callable[[], None]) -> None:
        while True:
            try:
                beat()
            except Exception as error:  # whatever it is, it must not hurt the program
                self._failures[beat] += 1
                level = logging.WARNING if self._failures[beat] == 1 else logging.DEBUG
                logger.log(level, "cannot say that this program is alive (%d times so far), it goes on all the same: %s", self._failures[beat], error)
            if self._stop.wait(self._every_seconds):
                return

    def _touch(self) -> None:
        if self._looping():
            touch_alive(self._alive_file)

    def _record(self) -> None:
        status = finite({"looping": self._looping(), **self._figures()})
        with self._store.write() as session:
            record_program(session, self._name, started_at=self._started_at, at=self._now(), status=status)


def finite(value: Any) -> Any:
    """The same figures without NaN and infinities, which JSON (and PostgreSQL) cannot hold: they become None."""
    if isinstance(value, dict):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
