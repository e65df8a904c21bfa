"""Count the processes that turns, batches and deliveries lose, and let a thread have one open turn at a time.

A fork states what it begins with, so that it can be completed if its process is killed before its checkpoint is
written.
"""

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0007"
down_revision = "0006"
SUPERSEDED = {
    "message": "another turn was open in this thread", "type": "invalid_request_error", "param": "thread",
    "code": "busy",
}  # fmt: skip


def upgrade() -> None:
    for table, column in (
        ("turns", "process_losses"), ("batches", "runner_losses"), ("webhook_deliveries", "sender_losses"),
    ):  # fmt: skip
        op.add_column(table, sa.Column(column, sa.Integer(), nullable=False, server_default="0"))
    op.add_column("webhook_deliveries", sa.Column("claimed", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("threads", sa.Column("forked_from", sa.String(64), nullable=True))
    op.add_column("threads", sa.Column("forked_after", sa.Integer(), nullable=True))
    keep_one_open_turn()
    is_open = sa.text("state IN ('queued', 'running')")
    op.create_index(
        "turns_one_open", "turns", ["thread_id"], unique=True, sqlite_where=is_open, postgresql_where=is_open
    )


def keep_one_open_turn() -> None:
    """End all but the oldest open turn of each thread; there can be two of them in PostgreSQL."""
    turns = sa.table(
        "turns", *(sa.column(name) for name in ("id", "thread_id", "state", "created_at")), sa.column("error", sa.JSON)
    )
    older = turns.alias()
    open_states = ("queued", "running")
    is_older = sa.or_(
        older.c.created_at < turns.c.created_at,
        sa.and_(older.c.created_at == turns.c.created_at, older.c.id < turns.c.id),
    )
    has_older = sa.exists().where(older.c.thread_id == turns.c.thread_id, older.c.state.in_(open_states), is_older)
    update = sa.update(turns).where(turns.c.state.in_(open_states), has_older)
    op.execute(update.values(state="failed", error=SUPERSEDED))


downgrade = refuse_downgrade
