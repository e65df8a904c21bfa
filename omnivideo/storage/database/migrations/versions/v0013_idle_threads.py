"""Record when the last turn of a thread began; threads that exist count as used now."""

import time

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("threads", sa.Column("used_at", sa.Float(), nullable=True))
    threads = sa.table("threads", sa.column("used_at", sa.Float))
    op.execute(sa.update(threads).values(used_at=time.time()))


downgrade = refuse_downgrade
