"""What the trainer reads (samples and frame payloads) and writes (runs, evaluations, checkpoints)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session, contains_eager

from coordinator.store.errors import StoreError
from coordinator.store.models import Checkpoint, Device, Evaluation, FrameBody, FrameRow, Run, SampleRow
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.frame import Split
from side_tuning.wire.messages import Health

Scope = Literal["fleet", "device", "backbone", "worst-device", "untuned"]

# SQLite takes at most 32766 values in one statement; there is no need to come near it.
_IDS_PER_QUERY = 1000
# A device may lie; one lie must not use up the generations that a manifest can carry (2**53).
_LONGEST_LEAP = 1_000_000


@dataclass(frozen=True, slots=True)
class StoredSample:
    """One sample and where its vectors lie: `position` in frame `frame_id`."""

    row_id: int
    frame_id: int
    position: int
    device: str
    sample_id: str
    label: int | None
    split: Split
    tokens: int
    backbone: str
    plan_version: int


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on offer; `published_at` is None until the devices can fetch it."""

    generation: int
    run: str
    step: int
    folder: str
    metrics: dict[str, Any]
    created_at: datetime
    published_at: datetime | None


@dataclass(frozen=True)
class StoredEvaluation:
    run: str
    step: int
    scope: Scope
    name: str
    score: float  # of the run's task (side_tuning/tasks.py)
    loss: float
    samples: int
    at: datetime


def training_samples_after(session: Session, sample_row_id: int, limit: int) -> list[StoredSample]:
    """The next samples by row id whose frame still has its body. Row ids ascend in the order of commits."""
    rows = session.execute(
        select(
            SampleRow.id,
            SampleRow.frame_id,
            SampleRow.position,
            Device.name,
            SampleRow.sample_id,
            SampleRow.label,
            SampleRow.split,
            SampleRow.tokens,
            FrameRow.backbone,
            FrameRow.plan_version,
        )
        .join(FrameRow, FrameRow.id == SampleRow.frame_id)
        .join(Device, Device.id == SampleRow.device_id)
        .where(SampleRow.id > sample_row_id, FrameRow.has_body)
        .order_by(SampleRow.id)
        .limit(limit)
    )
    return [
        StoredSample(row_id, frame_id, position, device, sample_id.hex(), label, split, tokens, backbone, plan_version)
        for row_id, frame_id, position, device, sample_id, label, split, tokens, backbone, plan_version in rows
    ]


def frame_payloads(session: Session, frame_ids: Iterable[int]) -> dict[int, bytes]:
    """Whole payloads by frame id (what came in parts is joined). A frame whose body retention has dropped is left out."""
    wanted = sorted(set(frame_ids))
    found: dict[int, bytes] = {}
    for start in range(0, len(wanted), _IDS_PER_QUERY):
        some = wanted[start : start + _IDS_PER_QUERY]
        rows = session.execute(select(FrameBody.frame_id, FrameBody.payload).where(FrameBody.frame_id.in_(some)))
        found.update((frame_id, payload) for frame_id, payload in rows)
    return found


def insert_run(session: Session, run: str, settings: Mapping[str, Any], at: datetime) -> bool:
    """Begin a run; False if it had begun before (the trainer resumes it)."""
    if session.scalar(select(Run.id).where(Run.name == run)) is not None:
        return False
    session.add(Run(name=run, settings=dict(settings), started_at=at))
    session.flush()
    return True


def insert_evaluation(  # noqa: PLR0917 - one row, in the order of its columns
    session: Session, run: str, step: int, scope: Scope, name: str, score: float, loss: float, samples: int, at: datetime
) -> None:
    """Keep one held-out measurement; `name` is the device or fingerprint (for the fleet: "fleet")."""
    row = Evaluation(run_id=_run_id(session, run), step=step, scope=scope, name=name, score=score, loss=loss, samples=samples, at=at)
    session.add(row)
    session.flush()


def evaluations(session: Session, run: str, scope: Scope = "fleet", limit: int = 1000) -> list[StoredEvaluation]:
    """The newest measurements of a run, oldest first."""
    rows = session.execute(
        select(Evaluation.step, Evaluation.name, Evaluation.score, Evaluation.loss, Evaluation.samples, Evaluation.at)
        .where(Evaluation.run_id == _run_id(session, run), Evaluation.scope == scope)
        .order_by(Evaluation.step.desc(), Evaluation.id.desc())
        .limit(limit)
    )
    newest_first = [
        StoredEvaluation(run, step, scope, name, score, loss, samples, at) for step, name, score, loss, samples, at in rows
    ]
    return newest_first[::-1]


def insert_checkpoint(  # noqa: PLR0917 - one row, in the order of its columns
    session: Session, run: str, step: int, folder: str, metrics: Mapping[str, Any], at: datetime
) -> int:
    """Offer a checkpoint; returns its generation, higher than any before, here or on a device.

    Devices that outlived a database hold generations of the old one, and follow none that is lower.
    """
    row = Checkpoint(run_id=_run_id(session, run), step=step, folder=str(folder), metrics=dict(metrics), created_at=at)
    highest = session.scalar(select(func.coalesce(func.max(Checkpoint.generation), 0))) or 0
    on_devices = _highest_generation_on_devices(session, highest + _LONGEST_LEAP)
    if on_devices > highest:
        row.generation = on_devices + 1
        if session.get_bind().dialect.name == "postgresql":  # SQLite counts on from the highest by itself
            session.execute(select(func.setval(func.pg_get_serial_sequence("checkpoints", "generation"), row.generation)))
    session.add(row)
    session.flush()
    return row.generation


def checkpoints_to_publish(session: Session) -> list[StoredCheckpoint]:
    """Offered and not yet published, oldest first; what is older than a published one is passed over."""
    published = select(func.coalesce(func.max(Checkpoint.generation), 0)).where(Checkpoint.published_at.is_not(None)).scalar_subquery()
    wanted = _checkpoints().where(Checkpoint.generation > published).order_by(Checkpoint.generation)
    return [_stored(row) for row in session.scalars(wanted)]


def mark_published(session: Session, generation: int, at: datetime) -> None:
    """The devices can fetch this checkpoint now."""
    row = session.get(Checkpoint, generation)
    if row is None:
        raise StoreError(f"checkpoint {generation} is not in the store: list them with `coordinator checkpoints list`")
    row.published_at = row.published_at or at
    session.flush()


def latest_checkpoint(session: Session) -> StoredCheckpoint | None:
    """The checkpoint with the highest generation."""
    row = session.scalars(_checkpoints().order_by(Checkpoint.generation.desc()).limit(1)).first()
    return None if row is None else _stored(row)


def checkpoints(session: Session, limit: int = 100) -> list[StoredCheckpoint]:
    """The newest checkpoints, newest first."""
    return [_stored(row) for row in session.scalars(_checkpoints().order_by(Checkpoint.generation.desc()).limit(limit))]


def republish_checkpoint(session: Session, generation: int, at: datetime) -> int:
    """Offer an old checkpoint again (a roll-back); returns its new generation."""
    old = session.scalars(_checkpoints().where(Checkpoint.generation == generation)).first()
    if old is None:
        raise StoreError(f"checkpoint {generation} is not in the store: list them with `coordinator checkpoints list`")
    return insert_checkpoint(session, old.run.name, old.step, old.folder, old.metrics, at)


def _highest_generation_on_devices(session: Session, at_most: int) -> int:
    """The highest generation that a device says it has, of those that are believable."""
    highest = 0
    for payload in session.scalars(select(Device.health).where(Device.health.is_not(None))):
        try:
            generation = Health.from_bytes(payload or b"").checkpoint
        except FrameError:  # written by a newer version of this program
            continue
        highest = max(highest, generation if generation <= at_most else 0)
    return highest


def _checkpoints() -> Any:
    return select(Checkpoint).join(Checkpoint.run).options(contains_eager(Checkpoint.run))


def _stored(row: Checkpoint) -> StoredCheckpoint:
    return StoredCheckpoint(row.generation, row.run.name, row.step, row.folder, row.metrics, row.created_at, row.published_at)


def _run_id(session: Session, run: str) -> int:
    found = session.scalar(select(Run.id).where(Run.name == run))
    if found is None:
        raise StoreError(f"training run {run!r} is not in the store: call insert_run first")
    return found
