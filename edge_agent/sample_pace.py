"""Holds a source to its stated rate, by the monotonic clock: wall clocks of small devices jump."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edge_agent.sample_rows import Sample

BURST_SECONDS = 1.0


class Pace:
    """A bucket that fills at `rate_per_second`; None means no limit. Refused rows cost nothing."""

    def __init__(self, rate_per_second: float | None, monotonic: Callable[[], float]) -> None:
        self._rate = rate_per_second
        self._monotonic = monotonic
        self._allowance = 1.0
        self._filled_at = monotonic()

    def allow(self, limit: int) -> int:
        """How many samples may be taken now, at most `limit`."""
        if self._rate is None:
            return limit
        now = self._monotonic()
        most = max(1.0, self._rate * BURST_SECONDS)
        self._allowance = min(most, self._allowance + (now - self._filled_at) * self._rate)
        self._filled_at = now
        return min(limit, int(self._allowance))

    def spend(self, taken: Sequence[Any]) -> None:
        if self._rate is not None:
            self._allowance -= sum(isinstance(item, Sample) for item in taken)
