"""The audit trail: who did what to whose access, or tried to. Rows are only ever added."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.store.models import AuditEntry

Outcome = Literal["done", "denied"]

_NAME_CHARACTERS = 64
_DETAIL_CHARACTERS = 1000


@dataclass(frozen=True)
class AuditRow:
    """One entry."""

    id: int
    at: datetime
    actor: str
    action: str
    device: str | None
    outcome: str
    detail: str


def audit(
    session: Session, *, at: datetime, actor: str, action: str, device: str | None, outcome: Outcome = "done", detail: str = ""
) -> None:
    """Add an entry, in the transaction of what it tells of. Parts of it may come from strangers: cut and made printable."""
    session.add(
        AuditEntry(
            at=at,
            actor=printable(actor, _NAME_CHARACTERS),
            action=printable(action, _NAME_CHARACTERS),
            device=None if device is None else printable(device, _NAME_CHARACTERS),
            outcome=outcome,
            detail=printable(detail, _DETAIL_CHARACTERS),
        )
    )


def audit_entries(session: Session, device: str | None = None, limit: int = 100) -> list[AuditRow]:
    """The newest entries, of one device or of all, newest first."""
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    if device is not None:
        query = query.where(AuditEntry.device == device)
    return [
        AuditRow(row.id, row.at, row.actor, row.action, row.device, row.outcome, row.detail) for row in session.scalars(query)
    ]


def printable(text: str, characters: int = _DETAIL_CHARACTERS) -> str:
    """What anybody may have written, cut short and safe to store and show."""
    # A NUL stops PostgreSQL, an escape sequence repaints the terminal of whoever reads the list.
    return "".join(character if character.isprintable() else "?" for character in text[:characters])
