"""When the user of a job asked for its stop. One under way counts from the upgrade on."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("stop_asked_at", sa.Float, nullable=True))
    now = "CAST(strftime('%s', 'now') AS REAL)"
    op.execute(f"UPDATE jobs SET stop_asked_at = {now} WHERE desired <> 'RUNNING'")
