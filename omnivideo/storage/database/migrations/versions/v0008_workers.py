"""Store which workers run, with which weights, and where each part computes."""

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("preset", sa.String(64), nullable=False),
        sa.Column("weights", sa.String(64), nullable=False),
        sa.Column("precision", sa.String(40), nullable=False),
        sa.Column("placement", sa.String(60), nullable=False),
        sa.Column("parts", sa.JSON(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
    )


downgrade = refuse_downgrade
