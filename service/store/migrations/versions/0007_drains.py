"""Addresses of machines that are kept empty."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "drains",
        sa.Column("address", sa.String(255), primary_key=True),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("asked_at", sa.Float, nullable=False),
    )
