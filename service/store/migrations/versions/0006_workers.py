"""The number of workers in force, and where they are."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("workers", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("placement", sa.JSON, nullable=False, server_default="[]"))
    op.add_column("jobs", sa.Column("resized_at", sa.Float, nullable=True))
    # Until now every job ran on its least number.
    least = "COALESCE(json_extract(spec, '$.resources.workers.min'), 1)"
    op.execute(f"UPDATE jobs SET workers = {least} WHERE host_number > 0")
