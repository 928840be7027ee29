"""What the server programs say of themselves: one row each, newest word only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.store.models import ProgramRow


@dataclass(frozen=True)
class ProgramState:
    """A program's newest word. `status` holds the figures that only it knows, JSON values alone."""

    name: str
    started_at: datetime
    at: datetime
    status: dict[str, Any]


def record_program(session: Session, name: str, *, started_at: datetime, at: datetime, status: dict[str, Any]) -> None:
    """Put the word of program `name` in place of its last one."""
    row = session.get(ProgramRow, name)
    if row is None:
        session.add(ProgramRow(name=name, started_at=started_at, at=at, status=status))
    else:
        row.started_at, row.at, row.status = started_at, at, status
    session.flush()


def program_states(session: Session) -> dict[str, ProgramState]:
    """Every program that ever spoke, by name."""
    rows = session.scalars(select(ProgramRow).order_by(ProgramRow.name))
    return {row.name: ProgramState(row.name, row.started_at, row.at, row.status) for row in rows}
