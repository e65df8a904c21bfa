"""Let ids of threads belong to their owners, and let the sweep remove what was deleted or is older than its lifetime.

A thread's own id is that of its checkpoints; the owner may know it under another one, which is unique among the owner's
threads. `stored_objects` lists what the service writes into the object store, so that the sweep removes it soon after
the last reference. `job_totals` counts the jobs whose rows were removed.
"""

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("threads", sa.Column("client_id", sa.String(64), nullable=True))
    op.execute(sa.text("UPDATE threads SET client_id = id"))
    is_present = sa.text("NOT deleted")
    op.create_index(
        "threads_known",
        "threads",
        ["owner", "client_id"],
        unique=True,
        sqlite_where=is_present,
        postgresql_where=is_present,
    )
    op.add_column("batches", sa.Column("deleted", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("batches", sa.Column("last_line", sa.Integer(), nullable=True))
    op.create_table(
        "stored_objects",
        sa.Column("key", sa.String(100), primary_key=True),
        sa.Column("written_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "job_totals",
        sa.Column("lane", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("state", sa.String(10), primary_key=True),
        sa.Column("jobs", sa.Integer(), nullable=False),
        sa.Column("steps", sa.BigInteger(), nullable=False),
        sa.Column("queued", sa.JSON(), nullable=False),
        sa.Column("generated", sa.JSON(), nullable=False),
    )


downgrade = refuse_downgrade
