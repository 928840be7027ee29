"""Samples from one file, or from a folder of them. A file that cannot be opened is told once and tried again."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

from edge_agent.sample_formats import Item, read_items, unavailable
from edge_agent.sample_pace import Pace
from edge_agent.sample_rows import Given, Refusal, RowReader, Sample
from edge_agent.settings import SAMPLE_SUFFIXES, FileSourceSettings, FolderSourceSettings

logger = logging.getLogger(__name__)

ROWS_PER_POLL = 2000  # looked at in one poll: skipping a million rows taken before must not block the agent
RETRY_SECONDS = 5.0
RESCAN_SECONDS = 1.0


def is_sample_file(path: Path) -> bool:
    return path.name.lower().endswith(SAMPLE_SUFFIXES) and not path.name.startswith(".")


class FileSource:
    """Rows of one file, in order; with `follow`, also those appended later, through truncation and rotation."""

    def __init__(
        self, settings: FileSourceSettings, name: str, seen: Callable[[str], bool], *, monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.exhausted = False
        self._settings = settings
        self._name = name
        self._given = Given(seen)
        self._monotonic = monotonic
        self._pace = Pace(settings.rate_per_second, monotonic)
        self._items: Iterator[Item] | None = None
        self._file: IO[bytes] | None = None
        self._retry_at = 0.0
        self._rows = 0
        self._told: set[str] = set()

    def describe(self) -> str:
        return f"file {self._settings.path}"

    def poll(self, limit: int) -> list[Sample | Refusal]:
        if self.exhausted or (self._items is None and self._monotonic() < self._retry_at):
            return []
        trouble: list[Sample | Refusal] = []
        if self._items is None:
            trouble += self._open()
        if self._items is None:
            return trouble
        taken, items_left = _take(self._items, self._pace.allow(limit))
        self._pace.spend(taken)
        self._rows += len(taken)
        if items_left == "ended":
            self.close()
            self.exhausted = not self._settings.follow
            if self.exhausted:
                logger.info("%s is read to its end, %d new rows; set follow = true to take rows that are appended later", self._settings.path, self._rows)
            self._retry_at = self._monotonic() + RETRY_SECONDS
        elif items_left == "nothing yet":
            taken += self._check_still_there()
        return trouble + taken

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._items = None

    def _open(self) -> list[Sample | Refusal]:
        path = self._settings.path
        try:
            self._file = path.open("rb")
        except OSError as error:
            return self._unavailable(error)
        self._told.clear()
        if not self._settings.follow and os.fstat(self._file.fileno()).st_size == 0:
            logger.warning("%s is empty; put rows in it before the agent starts, or set follow = true", path)
        self._items = read_items(self._file, path, self._settings, RowReader(self._settings, self._name, self._given), follow=self._settings.follow)
        return []

    def _check_still_there(self) -> list[Sample | Refusal]:
        assert self._file is not None
        try:
            now = self._settings.path.stat()
        except OSError as error:
            return self._unavailable(error)
        here = os.fstat(self._file.fileno())
        if (now.st_dev, now.st_ino) != (here.st_dev, here.st_ino) or now.st_size < self._file.tell():
            logger.info("%s was replaced or cut short; reading it from the start", self._settings.path)
            self.close()
        self._told.clear()
        return []

    def _unavailable(self, error: OSError) -> list[Sample | Refusal]:
        self._retry_at = self._monotonic() + RETRY_SECONDS
        refusal = unavailable(self._settings.path, error)
        if refusal.reason in self._told:
            return []
        self._told.add(refusal.reason)
        return [refusal]


class FolderSource:
    """Rows of every sample file in a folder; a file that changed is read again, and only its new rows count.

    With `follow`, a file is read once its size and time stood still for a moment: it may still be being copied.
    """

    def __init__(
        self, settings: FolderSourceSettings, name: str, seen: Callable[[str], bool], *, monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.exhausted = False
        self._settings = settings
        self._name = name
        self._given = Given(seen)
        self._monotonic = monotonic
        self._pace = Pace(settings.rate_per_second, monotonic)
        self._rescan_at = 0.0
        self._waiting: deque[Path] = deque()
        self._found: dict[str, tuple[int, int]] = {}  # size and time when last looked at
        self._read: dict[str, tuple[int, int]] = {}  # the same when last read
        self._items: Iterator[Item] | None = None
        self._file: IO[bytes] | None = None
        self._told: set[str] = set()

    def describe(self) -> str:
        return f"folder {self._settings.path}"

    def poll(self, limit: int) -> list[Sample | Refusal]:
        trouble: list[Sample | Refusal] = []
        if self._items is None and not self._waiting and not self.exhausted and self._monotonic() >= self._rescan_at:
            trouble += self._scan()
        if self._items is None and self._waiting:
            trouble += self._open(self._waiting.popleft())
        if self._items is None:
            return trouble
        taken, items_left = _take(self._items, self._pace.allow(limit))
        self._pace.spend(taken)
        if items_left == "ended":
            self.close()
            self.exhausted = not self._waiting and not self._settings.follow
        return trouble + taken

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._items = None

    def _scan(self) -> list[Sample | Refusal]:
        folder = self._settings.path
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
        except OSError as error:
            self._rescan_at = self._monotonic() + RETRY_SECONDS
            return self._tell(unavailable(folder, error))
        self._rescan_at = self._monotonic() + RESCAN_SECONDS
        self._told.discard(str(folder))
        for name in names:
            path = folder / name
            if not is_sample_file(path):
                if not name.startswith(".") and name not in self._told:
                    self._told.add(name)
                    logger.warning("%s is left out: its name ends in none of %s", path, ", ".join(SAMPLE_SUFFIXES))
                continue
            try:
                status = path.stat()
            except OSError:
                continue  # gone again; if it comes back, a later look finds it
            state = (status.st_size, status.st_mtime_ns)
            settled = not self._settings.follow or self._found.get(name) == state
            self._found[name] = state
            if settled and self._read.get(name) != state:
                self._waiting.append(path)
        self.exhausted = not self._waiting and not self._settings.follow
        return []

    def _open(self, path: Path) -> list[Sample | Refusal]:
        self._read[path.name] = self._found[path.name]
        try:
            self._file = path.open("rb")
        except OSError as error:
            self.exhausted = not self._waiting and not self._settings.follow
            return self._tell(unavailable(path, error))
        rows = RowReader(self._settings, f"{self._name}/{path.name}", self._given)
        self._items = read_items(self._file, path, self._settings, rows, follow=False)
        return []

    def _tell(self, refusal: Refusal) -> list[Sample | Refusal]:
        key = refusal.detail.split(":", 1)[0]
        if key in self._told:
            return []
        self._told.add(key)
        return [refusal]


def _take(items: Iterator[Item], limit: int) -> tuple[list[Sample | Refusal], Literal["more", "nothing yet", "ended"]]:
    taken: list[Sample | Refusal] = []
    for _ in range(ROWS_PER_POLL):
        if len(taken) >= limit:
            return taken, "more"
        item = next(items, None)
        if item is None:
            return taken, "ended"
        if item == "nothing yet":
            return taken, "nothing yet"
        if isinstance(item, Sample | Refusal):
            taken.append(item)
    return taken, "more"
