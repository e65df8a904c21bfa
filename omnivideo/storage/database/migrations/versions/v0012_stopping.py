"""Record which running jobs have a worker that was told to stop: its end is no loss, even if it is killed."""

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("worker_stopping", sa.Boolean(), nullable=False, server_default=sa.false()))


downgrade = refuse_downgrade
