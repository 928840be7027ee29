"""Waiting in tests: on a predicate with a limit, never for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.01


def wait_until(predicate: Callable[[], T], timeout_seconds: float = 10.0, what: str = "") -> T:
    """Return the predicate's first true value; fail with `what` (text, or the predicate's name) after the time."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds:g} s: {what or predicate.__name__}; last value {value!r}")
        time.sleep(POLL_SECONDS)
