"""Times in the store: timezone-aware UTC in Python, whatever the database keeps."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import DateTime
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

# 1970 to the year 2286: a device without a clock may say anything, and the store must hold it.
_LEAST_SECONDS = 0.0
_MOST_SECONDS = 9_999_999_999.0


def utc_now() -> datetime:
    """The wall clock; programs take it as an argument, so that tests can set it."""
    return datetime.now(timezone.utc)


def from_seconds(seconds: float) -> datetime:
    """Seconds since 1970 (as on the wire) as a datetime; values that no clock shows are clamped."""
    return datetime.fromtimestamp(min(max(seconds, _LEAST_SECONDS), _MOST_SECONDS), timezone.utc)


def to_seconds(moment: datetime) -> float:
    return moment.timestamp()


class Timestamp(TypeDecorator[datetime]):
    """UTC in, UTC out. SQLite has no time zones: it keeps the naive UTC value."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; pass an aware datetime, say datetime.now(timezone.utc)")
        value = value.astimezone(timezone.utc)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)
