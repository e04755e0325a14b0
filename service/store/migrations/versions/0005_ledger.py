"""Where each job's time goes. Empty until the job's next record: its history is then read once."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # A table made anew: its text in the file is then that of the schema.
    op.rename_table("progress", "progress_before")
    op.create_table(
        "progress",
        sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("next_cursor", sa.Integer, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("latest_point", sa.LargeBinary, nullable=True),
        sa.Column("in_force", sa.LargeBinary, nullable=True),
        sa.Column("checkpoint", sa.JSON, nullable=True),
        sa.Column("checkpoint_at", sa.Float, nullable=True),
        sa.Column("validation_bpb", sa.Float, nullable=True),
        sa.Column("ledger", sa.JSON, nullable=True),
    )
    op.execute("INSERT INTO progress SELECT *, NULL FROM progress_before")
    op.drop_table("progress_before")
