"""Store what each key may use, and what it has used by day."""

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0011"
down_revision = "0009"


def upgrade() -> None:
    for column in (
        sa.Column("scopes", sa.String(60)), sa.Column("expires_at", sa.Float()),
        sa.Column("requests_per_minute", sa.Integer()), sa.Column("open_jobs", sa.Integer()),
        sa.Column("device_seconds_per_day", sa.Float()), sa.Column("stored_bytes_per_day", sa.BigInteger()),
    ):  # fmt: skip
        op.add_column("api_keys", column)
    op.create_table(
        "usage_days",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("day", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("clips", sa.Integer(), nullable=False),
        sa.Column("images", sa.Integer(), nullable=False),
        sa.Column("steps", sa.BigInteger(), nullable=False),
        sa.Column("device_seconds", sa.Float(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("answer_tokens", sa.BigInteger(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_index("usage_days_day", "usage_days", ["day"])
    op.create_table(
        "request_windows",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("request_count", sa.Integer(), nullable=False),
    )


downgrade = refuse_downgrade
