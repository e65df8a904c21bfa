"""Store the jobs that are rendered in one pass with a job."""

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("pack", sa.JSON(none_as_null=True), nullable=True))


downgrade = refuse_downgrade
