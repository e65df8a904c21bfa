"""Store which preset a job needs, and with which weights and precision its resume point was computed."""

import sqlalchemy as sa
from alembic import context, op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("preset", sa.String(64), nullable=True))
    op.add_column("jobs", sa.Column("weights", sa.String(64), nullable=True))
    op.add_column("jobs", sa.Column("precision", sa.String(40), nullable=True))
    op.create_index("jobs_weights", "jobs", ["weights", "ended_at"])
    if preset := context.config.attributes.get("preset"):
        jobs = sa.table("jobs", sa.column("preset"))
        op.execute(sa.update(jobs).values(preset=preset.name))


downgrade = refuse_downgrade
