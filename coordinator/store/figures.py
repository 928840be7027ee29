"""Figures that only monitoring asks for."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from coordinator.store.models import Backbone, Certificate


def certificate_lifetimes(session: Session) -> dict[str, tuple[datetime, datetime]]:
    """(issued, expires) of each device's newest certificate that is not revoked."""
    rows = session.execute(
        select(Certificate.device, Certificate.issued_at, Certificate.expires_at)
        .where(Certificate.revoked_at.is_(None))
        .order_by(Certificate.issued_at)
    )
    return {device: (issued_at, expires_at) for device, issued_at, expires_at in rows}


def registered_backbones(session: Session) -> int:
    """How many backbones frames may come from."""
    return session.scalar(select(func.count()).select_from(Backbone)) or 0


def database_bytes(session: Session) -> int:
    """Size of the database without SQLite's write-ahead log."""
    url = session.get_bind().engine.url
    if url.get_backend_name() == "postgresql":
        return int(session.scalar(text("SELECT pg_database_size(current_database())")) or 0)
    database = Path(str(url.database))
    return database.stat().st_size if database.exists() else 0
