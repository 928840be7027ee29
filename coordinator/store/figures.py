"""Figures for monitoring that no page has a query for: the newest evaluations, checkpoints, sizes on disk."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from coordinator.store.models import Backbone, Certificate, Checkpoint, Evaluation, Run


@dataclass(frozen=True)
class Measured:
    """A held-out measurement; `name` is "fleet", a fingerprint, or the device that does worst."""

    scope: str
    name: str
    step: int
    accuracy: float
    loss: float
    samples: int
    at: datetime


@dataclass(frozen=True)
class CheckpointFigures:
    """How many checkpoints there were, and the newest generations (0: none yet)."""

    offered: int
    published: int
    offered_generation: int
    published_generation: int
    published_at: datetime | None


def newest_measurements(session: Session) -> list[Measured]:
    """The newest evaluation of the newest run that has any: the fleet's, each backbone's, the worst device's."""
    run = select(func.max(Run.id)).join(Evaluation, Evaluation.run_id == Run.id).scalar_subquery()
    scopes = ("fleet", "backbone", "worst-device")
    step = (
        select(func.max(Evaluation.step)).where(Evaluation.run_id == run, Evaluation.scope == "fleet").scalar_subquery()
    )
    rows = session.scalars(
        select(Evaluation)
        .where(Evaluation.run_id == run, Evaluation.scope.in_(scopes), Evaluation.step == step)
        .order_by(Evaluation.id)
    )
    newest = {  # measured twice at a step (a trainer that resumed): the later one counts
        (row.scope, "" if row.scope == "worst-device" else row.name): Measured(
            row.scope, row.name, row.step, row.accuracy, row.loss, row.samples, row.at
        )
        for row in rows
    }
    return list(newest.values())


def checkpoint_figures(session: Session) -> CheckpointFigures:
    """Counts and newest generations of the checkpoints."""
    offered, newest, published = session.execute(
        select(func.count(), func.max(Checkpoint.generation), func.count(Checkpoint.published_at))
    ).one()
    generation, at = session.execute(
        select(func.max(Checkpoint.generation), func.max(Checkpoint.published_at)).where(Checkpoint.published_at.is_not(None))
    ).one()
    return CheckpointFigures(offered, published, newest or 0, generation or 0, at)


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
