"""What the trainer outlives: a store or a disk that does not work for now. Each is said once, with its cure, and again when it is over."""

from __future__ import annotations

import logging
from collections import Counter

from coordinator.files import file_trouble
from coordinator.store.errors import StoreUnavailable
from side_tuning.backbone_manifest import BackboneError

log = logging.getLogger(__name__)


class Troubles:
    """Failures in a row, by what failed."""

    def __init__(self) -> None:
        self.in_a_row: Counter[str] = Counter()
        self._newest: dict[str, str] = {}

    def note(self, what: str, error: StoreUnavailable | OSError | BackboneError) -> None:
        """Say that `what` failed: aloud the first time, for those who debug every time."""
        self.in_a_row[what] += 1
        said = str(error)
        if isinstance(error, OSError):
            said = file_trouble(error) or said
        self._newest[what] = said
        level = logging.WARNING if self.in_a_row[what] == 1 else logging.DEBUG
        log.log(level, "%s for now, tried again until it works (failure %d in a row): %s", what, self.in_a_row[what], said)

    def over(self, what: str) -> None:
        """`what` has worked."""
        self._newest.pop(what, None)
        failures = self.in_a_row.pop(what, 0)
        if failures:
            log.info("no longer after %d failures: %s", failures, what)

    def words(self) -> str:
        """What does not work now, and why; empty if all does."""
        return "; ".join(f"{what}: {said}" for what, said in self._newest.copy().items())
