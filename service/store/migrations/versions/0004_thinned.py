"""How far each job's stream was thinned."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "thinned",
        sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("upto", sa.Integer, nullable=False),
    )
