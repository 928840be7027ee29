"""Room on the disk for the spool: the limit of the settings, or less on a disk that is fuller than that.

On a disk that something else filled up even forgetting a frame needs room, in SQLite's log. So a reserve is held
back for that; without it a full disk would be for ever, since no receipt could be applied and no room be made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

from edge_agent.health import disk_free_bytes

logger = logging.getLogger(__name__)

RESERVE_BYTES = 2 * 1024 * 1024


class DiskRoom:
    """How many payload bytes the spool may hold now, and the reserve file beside it."""

    def __init__(self, spool_path: Path, database: sqlite3.Connection, max_bytes: int) -> None:
        self._folder = spool_path.parent
        self._reserve = spool_path.with_name(spool_path.name + ".reserve")
        self._database = database
        self._max_bytes = max_bytes
        self._lowered_to: int | None = None
        self._take_reserve()

    @property
    def is_lowered(self) -> bool:
        """Whether the disk, not the settings, is the limit."""
        return self._lowered_to is not None

    def bytes_allowed(self) -> int:
        if self._lowered_to is not None and self._disk_has_room():
            self.restore()
            if self._reserve_is_whole() and self._disk_has_room():
                self._lowered_to = None
        return self._max_bytes if self._lowered_to is None else min(self._max_bytes, self._lowered_to)

    def lower(self, held_bytes: int) -> int:
        """After "disk full": stay somewhat below what was held then, so that the file lives in its own freed pages."""
        self._lowered_to = held_bytes - min(held_bytes // 4, RESERVE_BYTES // 2)
        return self._lowered_to

    def free_the_log(self, *, use_reserve: bool) -> None:
        """Make room in the log by a checkpoint, with the reserve's space if that is allowed."""
        if use_reserve:
            self._reserve.unlink(missing_ok=True)
        try:
            # RESTART, not TRUNCATE: the log keeps its place on the disk, which somebody else might take.
            self._database.execute("PRAGMA wal_checkpoint(RESTART)")
        except sqlite3.Error as error:
            logger.debug("no checkpoint on the full disk of %s: %s", self._folder, error)

    def restore(self) -> None:
        """Take the reserve back, or as much of it as there is."""
        if not self._reserve_is_whole():
            self.free_the_log(use_reserve=False)  # first: the checkpoint may need the space itself
            self._take_reserve()

    def _take_reserve(self) -> None:
        size = RESERVE_BYTES
        while not self._reserve_is_whole() and size >= RESERVE_BYTES // 8:
            with contextlib.suppress(OSError), self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            size //= 2

    def _reserve_is_whole(self) -> bool:
        return self._reserve.exists() and self._reserve.stat().st_size >= RESERVE_BYTES

    def _disk_has_room(self) -> bool:
        return (disk_free_bytes(self._folder) or 0) > RESERVE_BYTES
