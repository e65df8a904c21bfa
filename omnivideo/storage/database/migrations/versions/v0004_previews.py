"""Let events refer to previews in the object store, and store the turn that shows a job's steps.

Events that contain a preview are deleted, because the previews of a turn that has ended are not used.
"""

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("turn_id", sa.String(length=64), nullable=True))
    events = sa.table("turn_events", sa.column("body", sa.JSON))
    op.execute(sa.delete(events).where(events.c.body["kind"].as_string() == "preview"))


downgrade = refuse_downgrade
