"""What evaluations measure is the score of the run's task: accuracy is one of several."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE evaluations RENAME COLUMN accuracy TO score")


def downgrade() -> None:
    op.execute("ALTER TABLE evaluations RENAME COLUMN score TO accuracy")
