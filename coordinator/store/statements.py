"""Many rows at once, straight to the driver: SQLAlchemy's handling of each value costs as much as the database's own work.

Rules: names of tables and columns come from the program, everything else is a parameter; a moment is bound as `Timestamp`
binds it (`bind_moment`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import cache
from itertools import chain
from typing import Any

from sqlalchemy.orm import Session

# SQLite takes 32766 values in a statement, PostgreSQL 65535.
_MOST_ROWS = 512
_SQLITE_MOMENT = len("2026-08-01 12:00:00.000000")


def insert_rows(session: Session, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, conflict: str = "") -> int:
    """Insert `rows` and return how many went in.

    Many rows to a statement: SQLite's driver gives up the interpreter's lock for each statement, and the network thread
    would take it each time. Few different sizes, so that the driver keeps the statements prepared.

    Args:
        session: in a writing transaction.
        table: its name.
        columns: their names, in the order of the values of a row.
        rows: the values; none of them needs SQLAlchemy's conversion.
        conflict: what follows the values, say "ON CONFLICT (spool_id, sequence) DO NOTHING".
    """
    connection, mark = session.connection(), _mark(session)
    done = inserted = 0
    while done < len(rows):
        size = min(1 << (len(rows) - done).bit_length() - 1, _MOST_ROWS)
        statement = _insert_sql(table, tuple(columns), size, mark, conflict)
        inserted += connection.exec_driver_sql(statement, tuple(chain.from_iterable(rows[done : done + size]))).rowcount
        done += size
    return inserted


def update_rows(session: Session, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Set `columns` of the rows whose id is the last value of each of `rows`."""
    if rows:
        session.connection().exec_driver_sql(_update_sql(table, tuple(columns), _mark(session)), [tuple(row) for row in rows])


def bind_moment(session: Session) -> Callable[[datetime], object]:
    """How the driver of this session's database takes a moment (aware, in UTC)."""
    return _as_is if session.get_bind().dialect.name == "postgresql" else _as_sqlite_text


def _as_is(moment: datetime) -> datetime:
    return moment


def _as_sqlite_text(moment: datetime) -> str:
    if moment.tzinfo is not timezone.utc:
        moment = moment.astimezone(timezone.utc)
    return moment.isoformat(" ", "microseconds")[:_SQLITE_MOMENT]


def _mark(session: Session) -> str:
    return "?" if session.get_bind().dialect.paramstyle == "qmark" else "%s"


@cache
def _insert_sql(table: str, columns: tuple[str, ...], rows: int, mark: str, conflict: str) -> str:
    row = f"({', '.join([mark] * len(columns))})"
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([row] * rows)} {conflict}"  # noqa: S608 - no input in it


@cache
def _update_sql(table: str, columns: tuple[str, ...], mark: str) -> str:
    return f"UPDATE {table} SET {', '.join(f'{column} = {mark}' for column in columns)} WHERE id = {mark}"  # noqa: S608 - no input in it
