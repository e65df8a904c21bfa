"""Events refer to their previews in the object store, and a job knows the turn that shows its steps.

Events with a preview in them are deleted: nobody looks at the previews of a turn that has ended.
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
