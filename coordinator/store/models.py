"""The tables. Rules: every relationship is `lazy="raise"`, times are `Timestamp`, large bodies have tables of their own.

Rows are kept by the queries beside this module; nothing else writes them. A change here needs a migration
(`migrations/versions`), and a test compares the two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from coordinator.store.timestamps import Timestamp
from side_tuning.wire.frame import Split
from side_tuning.wire.messages import DeviceStep

# SQLite numbers rows by itself only for the type INTEGER, which there has 64 bits anyway.
BigId = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own spelling
        datetime: Timestamp,
        bytes: LargeBinary,
        dict[str, Any]: JSON,
        int: BigId,
        float: Double,
    }


class Device(Base):
    """One device: when and how fast it sends, and the newest that it said of itself."""

    __tablename__ = "devices"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    first_seen_at: Mapped[datetime]

    # Arrivals: the states of arrivals.RateEstimate and arrivals.Pace.
    last_arrival_at: Mapped[datetime | None]
    rate_started_at: Mapped[datetime | None]
    rate_sum_60: Mapped[float] = mapped_column(default=0.0)
    rate_sum_300: Mapped[float] = mapped_column(default=0.0)
    rate_sum_3600: Mapped[float] = mapped_column(default=0.0)
    interval_seconds: Mapped[float | None]
    interval_deviation_seconds: Mapped[float] = mapped_column(default=0.0)
    backbone: Mapped[str | None] = mapped_column(String(64))  # of the newest frame or report
    unattributed_rejections: Mapped[int] = mapped_column(default=0)  # frames whose spool and sequence nobody could read

    # Presence and health.
    presence: Mapped[str | None] = mapped_column(String(16))
    presence_at: Mapped[datetime | None]
    presence_reason: Mapped[str] = mapped_column(Text, default="")
    heartbeat_at: Mapped[datetime | None]
    session: Mapped[str | None] = mapped_column(String(64))
    reported_at: Mapped[datetime | None]  # by the device's own clock
    clock_offset_seconds: Mapped[float | None]
    health: Mapped[bytes | None]  # the newest message that the device itself sent, as it came


class FirstStep(Base):
    """A step of a device's first boot, as the device reports it."""

    __tablename__ = "first_steps"

    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"), primary_key=True, autoincrement=False)
    step: Mapped[DeviceStep] = mapped_column(String(32), primary_key=True)
    at: Mapped[datetime | None]  # None: it came, before the device had a clock


class Spool(Base):
    """One durable queue of a device: how far it is stored, and both sides of its loss ledger (samples unless named)."""

    __tablename__ = "spools"
    __table_args__ = (UniqueConstraint("device_id", "spool"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"))
    spool: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    superseded_at: Mapped[datetime | None]

    # Every sequence up to stored_through is stored, rejected, or below the device's floor; stored_through + 1 is not.
    stored_through: Mapped[int] = mapped_column(default=0)
    highest_sequence: Mapped[int] = mapped_column(default=0)
    floor: Mapped[int] = mapped_column(default=0)
    known_sequences: Mapped[int] = mapped_column(default=0)  # stored, rejected, or parts of a frame
    skipped_sequences: Mapped[int] = mapped_column(default=0)  # passed over because they lay below the floor

    stored_frames: Mapped[int] = mapped_column(default=0)
    stored_samples: Mapped[int] = mapped_column(default=0)
    stored_bytes: Mapped[int] = mapped_column(default=0)
    duplicate_frames: Mapped[int] = mapped_column(default=0)
    duplicate_samples: Mapped[int] = mapped_column(default=0)  # in new frames; the ledger's "stored again"
    rejected_frames: Mapped[int] = mapped_column(default=0)
    rejected_samples: Mapped[int] = mapped_column(default=0)
    unreadable_frames: Mapped[int] = mapped_column(default=0)
    assembling_samples: Mapped[int] = mapped_column(default=0)
    produced_seen: Mapped[int] = mapped_column(default=0)
    newest_frame_at: Mapped[datetime | None]

    # The device's newest report of this spool.
    report_at: Mapped[datetime | None]
    reported_produced: Mapped[int] = mapped_column(default=0)
    reported_receipted: Mapped[int] = mapped_column(default=0)
    reported_spooled: Mapped[int] = mapped_column(default=0)
    reported_dropped: Mapped[int] = mapped_column(default=0)

    device: Mapped[Device] = relationship(lazy="raise")


class Backbone(Base):
    """A prepared backbone that frames may come from, by fingerprint."""

    __tablename__ = "backbones"

    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    manifest: Mapped[dict[str, Any]]
    registered_at: Mapped[datetime]


class BackboneAssignment(Base):
    """The backbone that a device without one is to be sent; `owner` is a device or "fleet". Empty: none any more."""

    __tablename__ = "backbone_assignments"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    assigned_at: Mapped[datetime]


class TapPlanRow(Base):
    """A tap plan ever given out; `owner` is a device or "fleet" (no device can have that name)."""

    __tablename__ = "tap_plans"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    plan: Mapped[bytes]
    created_at: Mapped[datetime]


class FrameRow(Base):
    """A stored frame without its body. One that came in parts covers `span` sequences."""

    __tablename__ = "frames"
    __table_args__ = (
        UniqueConstraint("spool_id", "sequence"),
        # What retention reads: nothing but frames that still have a body, oldest first, with their sizes.
        Index(
            "ix_frames_with_body",
            "received_at",
            "payload_bytes",
            sqlite_where=text("has_body"),
            postgresql_where=text("has_body"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    spool_id: Mapped[int] = mapped_column(ForeignKey("spools.id"))
    sequence: Mapped[int]
    span: Mapped[int] = mapped_column(default=1)
    received_at: Mapped[datetime]
    captured_at: Mapped[datetime]  # by the device's clock; clamped where it has none
    payload_bytes: Mapped[int]
    samples: Mapped[int]
    produced: Mapped[int]
    backbone: Mapped[str] = mapped_column(String(64))
    plan_version: Mapped[int]
    mode: Mapped[str] = mapped_column(String(16))
    has_body: Mapped[bool]


class FrameBody(Base):
    """The payload of a frame, as it came."""

    __tablename__ = "frame_bodies"

    frame_id: Mapped[int] = mapped_column(ForeignKey("frames.id"), primary_key=True, autoincrement=False)
    payload: Mapped[bytes]


class FramePart(Base):
    """A part of a frame whose other parts are still on their way; gone once they are here."""

    __tablename__ = "frame_parts"
    __table_args__ = (UniqueConstraint("spool_id", "sequence"), Index("ix_frame_parts_spool_id_first", "spool_id", "first"))

    id: Mapped[int] = mapped_column(primary_key=True)
    spool_id: Mapped[int] = mapped_column(ForeignKey("spools.id"))
    sequence: Mapped[int]
    first: Mapped[int]
    count: Mapped[int]
    samples: Mapped[int]  # of the whole frame
    received_at: Mapped[datetime]
    payload: Mapped[bytes]


class SampleRow(Base):
    """One sample of a stored frame. Row ids ascend in the order of commits: there is one writer at a time."""

    __tablename__ = "samples"
    __table_args__ = (UniqueConstraint("device_id", "sample_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    frame_id: Mapped[int] = mapped_column(ForeignKey("frames.id"))
    position: Mapped[int]
    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"))
    sample_id: Mapped[bytes]  # the hexadecimal id as bytes: the index over it is the largest random write
    label: Mapped[int | None]
    split: Mapped[Split] = mapped_column(String(16))
    tokens: Mapped[int]


class ArrivalMinute(Base):
    """What arrived from a device within one minute (`minute` is its start)."""

    __tablename__ = "arrivals"

    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"), primary_key=True, autoincrement=False)
    minute: Mapped[datetime] = mapped_column(primary_key=True, index=True)
    frames: Mapped[int]
    samples: Mapped[int]
    payload_bytes: Mapped[int]
    duplicates: Mapped[int]
    rejected: Mapped[int]


class Rejection(Base):
    """A message that was not accepted, with the reason; kept so that it can be tried again."""

    __tablename__ = "rejections"
    __table_args__ = (
        UniqueConstraint("spool_id", "sequence"),
        Index("ix_rejections_device_id_digest", "device_id", "digest"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"))
    spool_id: Mapped[int | None] = mapped_column(ForeignKey("spools.id"))
    sequence: Mapped[int | None]
    span: Mapped[int] = mapped_column(default=1)
    topic: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    samples: Mapped[int | None]  # None where the header could not be read
    digest: Mapped[str] = mapped_column(String(32))  # tells a resend apart where spool and sequence cannot
    times: Mapped[int] = mapped_column(default=1)
    received_at: Mapped[datetime] = mapped_column(index=True)
    payload_bytes: Mapped[int]
    payload: Mapped[bytes | None]  # None once retention has dropped it

    device: Mapped[Device] = relationship(lazy="raise")
    spool: Mapped[Spool | None] = relationship(lazy="raise")


class Run(Base):
    """One training run."""

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    started_at: Mapped[datetime]
    settings: Mapped[dict[str, Any]]


class Evaluation(Base):
    """One held-out measurement of a run."""

    __tablename__ = "evaluations"
    __table_args__ = (Index("ix_evaluations_run_id_scope_step", "run_id", "scope", "step"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    step: Mapped[int]
    scope: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(64))
    score: Mapped[float]  # accuracy, or what else the run's task is judged by (side_tuning/tasks.py)
    loss: Mapped[float]
    samples: Mapped[int]
    at: Mapped[datetime]


class Checkpoint(Base):
    """A side network offered to the devices. Generations only grow; a roll-back is a new one with an old folder."""

    __tablename__ = "checkpoints"
    __table_args__ = ({"sqlite_autoincrement": True},)  # never give a generation twice

    generation: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    step: Mapped[int]
    folder: Mapped[str] = mapped_column(Text)
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    published_at: Mapped[datetime | None]

    run: Mapped[Run] = relationship(lazy="raise")


class Identity(Base):
    """What the fleet's owner decided about a device: that it may come in, that it may no more. Lives beside `devices`,
    whose rows begin with the first message.
    """

    __tablename__ = "identities"

    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    group: Mapped[str] = mapped_column(String(64), default="")  # for filters on screen; no rule looks at it
    created_at: Mapped[datetime]  # the first claim
    enrolled_at: Mapped[datetime | None]  # the first certificate
    revoked_at: Mapped[datetime | None]
    revoked_reason: Mapped[str] = mapped_column(Text, default="")


class Claim(Base):
    """A one-time right to ask for a device's first certificate. `id` is the name in the claim's certificate."""

    __tablename__ = "claims"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    device: Mapped[str] = mapped_column(String(64), index=True)
    serial: Mapped[str] = mapped_column(String(40))  # of the claim's own certificate, for the revocation list
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    withdrawn_at: Mapped[datetime | None]
    # A request that waits for `devices approve`, where approval is manual.
    requested_at: Mapped[datetime | None]
    request: Mapped[bytes | None]  # the CSR, PEM
    approved_at: Mapped[datetime | None]
    # Spent: `key_digest` is the key it was spent on, so that a repeated request gets the same certificate again.
    spent_at: Mapped[datetime | None]
    key_digest: Mapped[str | None] = mapped_column(String(64))


class Certificate(Base):
    """A device certificate ever issued."""

    __tablename__ = "certificates"

    serial: Mapped[str] = mapped_column(String(40), primary_key=True)  # lower-case hexadecimal
    device: Mapped[str] = mapped_column(String(64), index=True)
    key_digest: Mapped[str] = mapped_column(String(64))  # sha256 of the public key (SubjectPublicKeyInfo, DER)
    pem: Mapped[bytes]
    issued_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    claim: Mapped[str | None] = mapped_column(String(64))  # none: a renewal
    seen_at: Mapped[datetime | None]  # first health message that names it
    revoked_at: Mapped[datetime | None]
    revoked_reason: Mapped[str] = mapped_column(Text, default="")


class AuditEntry(Base):
    """Who did what to whose access, or tried to."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    actor: Mapped[str] = mapped_column(String(64))  # "operator", "dashboard", "enrolment", a claim's or a device's name
    action: Mapped[str] = mapped_column(String(64), index=True)  # "claim issued", "certificate refused", "device revoked" ...
    device: Mapped[str | None] = mapped_column(String(64), index=True)
    outcome: Mapped[str] = mapped_column(String(16))  # "done" or "denied"
    detail: Mapped[str] = mapped_column(Text, default="")


class CommandRow(Base):
    """An order to a device, written by a person, sent by the gateway."""

    __tablename__ = "commands"

    id: Mapped[int] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(64))
    sent_at: Mapped[datetime | None]


class ProgramRow(Base):
    """A server program's newest word of itself: alive at `at`, with figures that only it can know."""

    __tablename__ = "programs"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    started_at: Mapped[datetime]
    at: Mapped[datetime]
    status: Mapped[dict[str, Any]]
