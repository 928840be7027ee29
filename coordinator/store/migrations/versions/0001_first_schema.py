"""The first schema: devices, spools, frames, samples, rejections, plans, runs, evaluations, checkpoints."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIMESTAMP = sa.DateTime(timezone=True)
# SQLite numbers rows by itself only for the type INTEGER.
BIG_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "backbones",
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("registered_at", TIMESTAMP, nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_backbones")),
    )
    op.create_table(
        "devices",
        sa.Column("id", BIG_INTEGER, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("first_seen_at", TIMESTAMP, nullable=False),
        sa.Column("last_arrival_at", TIMESTAMP, nullable=True),
        sa.Column("rate_started_at", TIMESTAMP, nullable=True),
        sa.Column("rate_sum_60", sa.Double(), nullable=False),
        sa.Column("rate_sum_300", sa.Double(), nullable=False),
        sa.Column("rate_sum_3600", sa.Double(), nullable=False),
        sa.Column("interval_seconds", sa.Double(), nullable=True),
        sa.Column("interval_deviation_seconds", sa.Double(), nullable=False),
        sa.Column("backbone", sa.String(length=64), nullable=True),
        sa.Column("unattributed_rejections", BIG_INTEGER, nullable=False),
        sa.Column("presence", sa.String(length=16), nullable=True),
        sa.Column("presence_at", TIMESTAMP, nullable=True),
        sa.Column("presence_reason", sa.Text(), nullable=False),
        sa.Column("heartbeat_at", TIMESTAMP, nullable=True),
        sa.Column("session", sa.String(length=64), nullable=True),
        sa.Column("reported_at", TIMESTAMP, nullable=True),
        sa.Column("clock_offset_seconds", sa.Double(), nullable=True),
        sa.Column("health", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("name", name=op.f("uq_devices_name")),
    )
    op.create_table(
        "runs",
        sa.Column("id", BIG_INTEGER, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("started_at", TIMESTAMP, nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("name", name=op.f("uq_runs_name")),
    )
    op.create_table(
        "tap_plans",
        sa.Column("version", BIG_INTEGER, autoincrement=False, nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("plan", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_tap_plans")),
    )
    op.create_index(op.f("ix_tap_plans_owner"), "tap_plans", ["owner"], unique=False)
    op.create_table(
        "arrivals",
        sa.Column("device_id", BIG_INTEGER, autoincrement=False, nullable=False),
        sa.Column("minute", TIMESTAMP, nullable=False),
        sa.Column("frames", BIG_INTEGER, nullable=False),
        sa.Column("samples", BIG_INTEGER, nullable=False),
        sa.Column("payload_bytes", BIG_INTEGER, nullable=False),
        sa.Column("duplicates", BIG_INTEGER, nullable=False),
        sa.Column("rejected", BIG_INTEGER, nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_arrivals_device_id_devices")),
        sa.PrimaryKeyConstraint("device_id", "minute", name=op.f("pk_arrivals")),
    )
    op.create_index(op.f("ix_arrivals_minute"), "arrivals", ["minute"], unique=False)
    op.create_table(
        "checkpoints",
        sa.Column("generation", BIG_INTEGER, nullable=False),
        sa.Column("run_id", BIG_INTEGER, nullable=False),
        sa.Column("step", BIG_INTEGER, nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("published_at", TIMESTAMP, nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_checkpoints_run_id_runs")),
        sa.PrimaryKeyConstraint("generation", name=op.f("pk_checkpoints")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "evaluations",
        sa.Column("id", BIG_INTEGER, nullable=False),
        sa.Column("run_id", BIG_INTEGER, nullable=False),
        sa.Column("step", BIG_INTEGER, nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("accuracy", sa.Double(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=False),
        sa.Column("samples", BIG_INTEGER, nullable=False),
        sa.Column("at", TIMESTAMP, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_evaluations_run_id_runs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    op.create_index(
        "ix_evaluations_run_id_scope_step", "evaluations", ["run_id", "scope", "step"], unique=False
    )
    op.create_table(
        "spools",
        sa.Column("id", BIG_INTEGER, nullable=False),
        sa.Column("device_id", BIG_INTEGER, nullable=False),
        sa.Column("spool", sa.String(length=64), nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("superseded_at", TIMESTAMP, nullable=True),
        sa.Column("stored_through", BIG_INTEGER, nullable=False),
        sa.Column("highest_sequence", BIG_INTEGER, nullable=False),
        sa.Column("floor", BIG_INTEGER, nullable=False),
        sa.Column("known_sequences", BIG_INTEGER, nullable=False),
        sa.Column("skipped_sequences", BIG_INTEGER, nullable=False),
        sa.Column("stored_frames", BIG_INTEGER, nullable=False),
        sa.Column("stored_samples", BIG_INTEGER, nullable=False),
        sa.Column("stored_bytes", BIG_INTEGER, nullable=False),
        sa.Column("duplicate_frames", BIG_INTEGER, nullable=False),
        sa.Column("duplicate_samples", BIG_INTEGER, nullable=False),
        sa.Column("rejected_frames", BIG_INTEGER, nullable=False),
        sa.Column("rejected_samples", BIG_INTEGER, nullable=False),
        sa.Column("unreadable_frames", BIG_INTEGER, nullable=False),
        sa.Column("assembling_samples", BIG_INTEGER, nullable=False),
        sa.Column("produced_seen", BIG_INTEGER, nullable=False),
        sa.Column("newest_frame_at", TIMESTAMP, nullable=True),
        sa.Column("report_at", TIMESTAMP, nullable=True),
        sa.Column("reported_produced", BIG_INTEGER, nullable=False),
        sa.Column("reported_receipted", BIG_INTEGER, nullable=False),
        sa.Column("reported_spooled", BIG_INTEGER, nullable=False),
        sa.Column("reported_dropped", BIG_INTEGER, nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_spools_device_id_devices")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_spools")),
        sa.UniqueConstraint("device_id", "spool", name=op.f("uq_spools_device_id_spool")),
    )
    op.create_table(
        "frame_parts",
        sa.Column("id", BIG_INTEGER, nullable=False),
        sa.Column("spool_id", BIG_INTEGER, nullable=False),
        sa.Column("sequence", BIG_INTEGER, nullable=False),
        sa.Column("first", BIG_INTEGER, nullable=False),
        sa.Column("count", BIG_INTEGER, nullable=False),
        sa.Column("samples", BIG_INTEGER, nullable=False),
        sa.Column("received_at", TIMESTAMP, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["spool_id"], ["spools.id"], name=op.f("fk_frame_parts_spool_id_spools")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_frame_parts")),
        sa.UniqueConstraint("spool_id", "sequence", name=op.f("uq_frame_parts_spool_id_sequence")),
    )
    op.create_index("ix_frame_parts_spool_id_first", "frame_parts", ["spool_id", "first"], unique=False)
    op.create_table(
        "frames",
        sa.Column("id", BIG_INTEGER, nullable=False),
        sa.Column("spool_id", BIG_INTEGER, nullable=False),
        sa.Column("sequence", BIG_INTEGER, nullable=False),
        sa.Column("span", BIG_INTEGER, nullable=False),
        sa.Column("received_at", TIMESTAMP, nullable=False),
        sa.Column("captured_at", TIMESTAMP, nullable=False),
        sa.Column("payload_bytes", BIG_INTEGER, nullable=False),
        sa.Column("samples", BIG_INTEGER, nullable=False),
        sa.Column("produced", BIG_INTEGER, nullable=False),
        sa.Column("backbone", sa.String(length=64), nullable=False),
        sa.Column("plan_version", BIG_INTEGER, nullable=False),
        sa.Column("mode", sa.String(length=16), nullable=False),
        sa.Column("has_body", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["spool_id"], ["spools.id"], name=op.f("fk_frames_spool_id_spools")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_frames")),
        sa.UniqueConstraint("spool_id", "sequence", name=op.f("uq_frames_spool_id_sequence")),
    )
    op.create_index(
        "ix_frames_with_body",
        "frames",
        ["received_at", "payload_bytes"],
        unique=False,
        sqlite_where=sa.text("has_body"),
        postgresql_where=sa.text("has_body"),
    )
    op.create_table(
        "rejections",
        sa.Column("id", BIG_INTEGER, nullable=False),
        sa.Column("device_id", BIG_INTEGER, nullable=False),
        sa.Column("spool_id", BIG_INTEGER, nullable=True),
        sa.Column("sequence", BIG_INTEGER, nullable=True),
        sa.Column("span", BIG_INTEGER, nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("samples", BIG_INTEGER, nullable=True),
        sa.Column("digest", sa.String(length=32), nullable=False),
        sa.Column("times", BIG_INTEGER, nullable=False),
        sa.Column("received_at", TIMESTAMP, nullable=False),
        sa.Column("payload_bytes", BIG_INTEGER, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_rejections_device_id_devices")),
        sa.ForeignKeyConstraint(["spool_id"], ["spools.id"], name=op.f("fk_rejections_spool_id_spools")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rejections")),
        sa.UniqueConstraint("spool_id", "sequence", name=op.f("uq_rejections_spool_id_sequence")),
    )
    op.create_index("ix_rejections_device_id_digest", "rejections", ["device_id", "digest"], unique=False)
    op.create_index(op.f("ix_rejections_received_at"), "rejections", ["received_at"], unique=False)
    op.create_table(
        "frame_bodies",
        sa.Column("frame_id", BIG_INTEGER, autoincrement=False, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["frame_id"], ["frames.id"], name=op.f("fk_frame_bodies_frame_id_frames")),
        sa.PrimaryKeyConstraint("frame_id", name=op.f("pk_frame_bodies")),
    )
    op.create_table(
        "samples",
        sa.Column("id", BIG_INTEGER, nullable=False),
        sa.Column("frame_id", BIG_INTEGER, nullable=False),
        sa.Column("position", BIG_INTEGER, nullable=False),
        sa.Column("device_id", BIG_INTEGER, nullable=False),
        sa.Column("sample_id", sa.LargeBinary(), nullable=False),
        sa.Column("label", BIG_INTEGER, nullable=True),
        sa.Column("split", sa.String(length=16), nullable=False),
        sa.Column("tokens", BIG_INTEGER, nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_samples_device_id_devices")),
        sa.ForeignKeyConstraint(["frame_id"], ["frames.id"], name=op.f("fk_samples_frame_id_frames")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_samples")),
        sa.UniqueConstraint("device_id", "sample_id", name=op.f("uq_samples_device_id_sample_id")),
    )


def downgrade() -> None:
    op.drop_table("samples")
    op.drop_table("frame_bodies")
    op.drop_index(op.f("ix_rejections_received_at"), table_name="rejections")
    op.drop_index("ix_rejections_device_id_digest", table_name="rejections")
    op.drop_table("rejections")
    op.drop_index(
        "ix_frames_with_body",
        table_name="frames",
        sqlite_where=sa.text("has_body"),
        postgresql_where=sa.text("has_body"),
    )
    op.drop_table("frames")
    op.drop_index("ix_frame_parts_spool_id_first", table_name="frame_parts")
    op.drop_table("frame_parts")
    op.drop_table("spools")
    op.drop_index("ix_evaluations_run_id_scope_step", table_name="evaluations")
    op.drop_table("evaluations")
    op.drop_table("checkpoints")
    op.drop_index(op.f("ix_arrivals_minute"), table_name="arrivals")
    op.drop_table("arrivals")
    op.drop_index(op.f("ix_tap_plans_owner"), table_name="tap_plans")
    op.drop_table("tap_plans")
    op.drop_table("runs")
    op.drop_table("devices")
    op.drop_table("backbones")
