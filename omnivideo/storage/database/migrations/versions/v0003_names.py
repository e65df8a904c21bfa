"""Rename tables, columns, indexes and the keys of JSON documents to the names in the code."""

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from alembic import op

from omnivideo.storage.database.migrations import refuse_downgrade

revision = "0003"
down_revision = "0002"

TABLES = {
    "keys": "api_keys",
    "lines": "batch_lines",
    "events": "turn_events",
    "chats": "chat_threads",
    "hooks": "webhooks",
    "deliveries": "webhook_deliveries",
}
COLUMNS = {  # by the new name of their table
    "jobs": {
        "turn": "fair_rank", "losses": "worker_losses", "cancel": "cancel_requested", "left": "eta_seconds",
        "point": "resume_key", "pack": "batch_job_ids", "worker": "worker_name", "made": "created_at",
        "told": "notified_at", "started": "started_at", "beat": "heartbeat_at", "ended": "ended_at",
    },
    "api_keys": {"made": "created_at"},
    "files": {"bytes": "size_bytes", "key": "object_key", "made": "created_at"},
    "batches": {
        "input": "input_file_id", "output": "output_file_id", "errors": "error_file_id", "meta": "metadata",
        "trouble": "validation_errors", "times": "state_times", "runner": "runner_name", "beat": "heartbeat_at",
        "made": "created_at",
    },
    "batch_lines": {"batch": "batch_id", "number": "line_number", "ok": "succeeded", "answer": "output_line"},
    "threads": {"made": "created_at"},
    "turns": {"thread": "thread_id", "cancel": "cancel_requested", "beat": "heartbeat_at", "made": "created_at"},
    "turn_events": {"turn": "turn_id", "made": "created_at"},
    "chat_threads": {
        "digest": "messages_digest", "thread": "thread_id", "turns": "turn_count", "made": "created_at",
    },
    "webhooks": {"events": "event_types", "made": "created_at"},
    "webhook_deliveries": {"hook": "webhook_id", "tries": "attempts", "due": "due_at", "done": "completed"},
}  # fmt: skip
INDEXES = [  # old name, new name, new table, new columns
    ("events_made", "turn_events_created", "turn_events", ["created_at"]),
    ("hooks_owner", "webhooks_owner", "webhooks", ["owner"]),
    ("deliveries_due", "webhook_deliveries_due", "webhook_deliveries", ["completed", "due_at"]),
]
CONSTRAINTS = [  # PostgreSQL's own names: new table, old name, new name
    *[(new, f"{old}_pkey", f"{new}_pkey") for old, new in TABLES.items()],
    ("api_keys", "keys_digest_key", "api_keys_digest_key"),
]

# For each document: the old key, the new key, and the fields of the key's value.
Fields = dict[str, tuple[str, Any]]
ARTIFACT: Fields = {"about": ("caption", {}), "made_by": ("created_by", {})}
SHOWN: Fields = {"artifact": ("artifact", ARTIFACT)}
JOB: Fields = {"given": ("overrides", {}), "source": ("source", ARTIFACT)}
RESULT: Fields = {"act": ("action", {}), "routed": ("route", {}), "tries": ("candidates", SHOWN)} | SHOWN
TURN: Fields = {
    "asked": ("clarifications", {}), "done": ("results", RESULT), "attachments": ("attachments", ARTIFACT),
}  # fmt: skip
TURN_BODY: Fields = {"attachments": ("attachments", ARTIFACT), "reply": ("is_reply", {})}
EVENTS: dict[str, Fields] = {  # by their kind
    "step": {"left": ("eta_seconds", {})},
    "thinking": {"piece": ("delta", {})},
    "text": {"piece": ("delta", {})},
    "plan": {"plan": ("plan", {"acts": ("actions", {})})},
    "artifact": SHOWN,
    "done": {"turn": ("turn", TURN)},
}
DOCUMENTS: list[tuple[str, list[str], dict[str, Fields | None]]] = [  # table, its key, its documents; None: by kind
    ("jobs", ["id"], {"body": JOB, "result": ARTIFACT}),
    ("files", ["id"], {"artifact": ARTIFACT}),
    ("turns", ["id"], {"body": TURN_BODY}),
    ("turn_events", ["turn_id", "number"], {"body": None}),
]
ROWS_AT_ONCE = 500


def rename_fields(value: Any, fields: Fields) -> Any:
    if isinstance(value, list):
        return [rename_fields(item, fields) for item in value]
    if not isinstance(value, dict) or not fields:
        return value
    renamed = {}
    for name, item in value.items():
        new_name, inner = fields.get(name, (name, {}))
        renamed[new_name] = rename_fields(item, inner)
    return renamed


def resolve_job(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job with complete settings, instead of only those that differ from the preset's."""
    config = op.get_context().config
    assert config and config.attributes["preset"], "upgrade_schema needs the preset that the jobs were created for"
    preset = config.attributes["preset"]
    rest = dict(job)
    defaults = preset.sampling[rest["task"]].model_dump() | {"negative_prompt": preset.null.negative_prompt}
    params = {"task": rest.pop("task")} | defaults | {"seed": rest.pop("seed")}
    params |= {name: value for name, value in rest.pop("overrides").items() if value is not None}
    return rest | {"params": params}


def convert_documents() -> None:
    """Rename the keys of all JSON documents, ROWS_AT_ONCE rows at a time; the tables have their new names already."""
    connection = op.get_bind()
    for table_name, key_names, documents in DOCUMENTS:
        columns: Iterable[Any] = [sa.column(name) for name in key_names]
        table = sa.table(table_name, *columns, *[sa.column(name, sa.JSON) for name in documents])
        keys = [table.c[name] for name in key_names]
        page = sa.select(table).order_by(*keys).limit(ROWS_AT_ONCE)
        rows = connection.execute(page).all()
        while rows:
            for row in rows:
                converted = {}
                for name, named_fields in documents.items():
                    document = getattr(row, name)
                    if document is None:
                        continue
                    fields = EVENTS.get(document["kind"], {}) if named_fields is None else named_fields
                    new_document = rename_fields(document, fields)
                    if fields is JOB:
                        new_document = resolve_job(new_document)
                    if new_document != document:
                        converted[name] = new_document
                if converted:
                    same_row = sa.and_(*[key == getattr(row, key.name) for key in keys])
                    connection.execute(sa.update(table).where(same_row).values(converted))
            last = [getattr(rows[-1], name) for name in key_names]
            rows = connection.execute(page.where(sa.tuple_(*keys) > sa.tuple_(*last))).all()


def remove_request_digests() -> None:
    """Remove the digests of requests from the jobs: 0.2 computes them from other fields, so none would match."""
    connection = op.get_bind()
    table = sa.table("jobs", sa.column("id"), sa.column("meta", sa.JSON))
    for row in connection.execute(sa.select(table)).all():
        if row.meta and "request" in row.meta:
            meta = {name: value for name, value in row.meta.items() if name != "request"}
            connection.execute(sa.update(table).where(table.c.id == row.id).values(meta=meta))


def upgrade() -> None:
    for old, _, _, _ in INDEXES:
        op.drop_index(old)
    for old, new in TABLES.items():
        op.rename_table(old, new)
    for table, columns in COLUMNS.items():
        for old, new in columns.items():
            op.alter_column(table, old, new_column_name=new)
    for _, new, table, names in INDEXES:
        op.create_index(new, table, names)
    if op.get_bind().dialect.name == "postgresql":
        for table, old, new in CONSTRAINTS:
            op.execute(f"ALTER TABLE {table} RENAME CONSTRAINT {old} TO {new}")
    convert_documents()
    remove_request_digests()


downgrade = refuse_downgrade
