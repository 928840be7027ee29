"""What each device reports of its first boot."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "first_steps",
        sa.Column("device_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("step", sa.String(length=32), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_first_steps_device_id_devices")),
        sa.PrimaryKeyConstraint("device_id", "step", name=op.f("pk_first_steps")),
    )


def downgrade() -> None:
    op.drop_table("first_steps")
