"""Convert the planner's checkpoints of version 0.1, once, to the names that 0.2 uses.

A checkpoint holds the planner's state by channel, and the versions of the channels. LangGraph's SQLite saver writes
both into one row; its PostgreSQL saver writes numbers and short texts into the row and everything else into
checkpoint_blobs. The outputs of a step that is not complete wait in a table of writes, by channel. Channels named
`branch:to:<node>` and the ids of tasks follow from the names of the planner's nodes, which have not changed.
"""

import sqlite3
from collections.abc import Mapping
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol

from omnivideo.storage.database.migrations.versions.v0003_names import (
    ARTIFACT,
    RESULT,
    SHOWN,
    TURN,
    Fields,
    rename_fields,
)

CHANNELS = {
    "current": "current_key",
    "pieces": "action_texts",
    "abouts": "action_references",
    "at": "action_index",
    "asked": "clarifications",
    "done": "results",
    "act": "action",
    "over": "action_done",
    "routed": "detected_route",
    "tries": "candidates",
    "failures": "failed_turns",
}
DOCUMENTS: dict[str, Fields] = {  # by the old name of their channel
    "artifacts": ARTIFACT,
    "attachments": ARTIFACT,
    "turns": TURN,
    "done": RESULT,
    "tries": SHOWN,
}
INPUT_CHANNEL = "__start__"  # its value is a part of the state, by channel


def convert_value(channel: str, value: Any) -> Any:
    """Return the value of a channel with the new names of its fields, given the channel's old name."""
    if channel == INPUT_CHANNEL and isinstance(value, Mapping):
        return convert_channels(value)
    return rename_fields(value, DOCUMENTS.get(channel, {}))


def rename_channels(by_channel: Mapping[str, Any]) -> dict[str, Any]:
    return {CHANNELS.get(channel, channel): value for channel, value in by_channel.items()}


def convert_channels(values: Mapping[str, Any]) -> dict[str, Any]:
    return rename_channels({channel: convert_value(channel, value) for channel, value in values.items()})


def convert_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with the new names of channels and fields."""
    converted = dict(checkpoint)
    converted["channel_values"] = convert_channels(checkpoint["channel_values"])
    converted["channel_versions"] = rename_channels(checkpoint["channel_versions"])
    converted["versions_seen"] = {node: rename_channels(seen) for node, seen in checkpoint["versions_seen"].items()}
    if checkpoint.get("updated_channels"):
        converted["updated_channels"] = sorted(
            CHANNELS.get(channel, channel) for channel in checkpoint["updated_channels"]
        )
    return converted


def convert_serialized(serde: SerializerProtocol, channel: str, stored: tuple[str, bytes]) -> tuple[str, bytes]:
    """Return a serialized value of a channel with the new names of the fields."""
    return serde.dumps_typed(convert_value(channel, serde.loads_typed(stored)))


def convert_sqlite(connection: sqlite3.Connection, serde: SerializerProtocol) -> None:
    """Convert every checkpoint of a SQLite saver, within the caller's transaction."""
    row_ids = [row_id for (row_id,) in connection.execute("SELECT rowid FROM checkpoints").fetchall()]
    for row_id in row_ids:
        stored = connection.execute("SELECT type, checkpoint FROM checkpoints WHERE rowid = ?", (row_id,)).fetchone()
        converted = serde.dumps_typed(convert_checkpoint(serde.loads_typed(stored)))
        connection.execute("UPDATE checkpoints SET type = ?, checkpoint = ? WHERE rowid = ?", (*converted, row_id))
    row_ids = [row_id for (row_id,) in connection.execute("SELECT rowid FROM writes").fetchall()]
    for row_id in row_ids:
        row = connection.execute("SELECT channel, type, value FROM writes WHERE rowid = ?", (row_id,)).fetchone()
        channel, stored = row[0], row[1:]
        values = (CHANNELS.get(channel, channel), *convert_serialized(serde, channel, stored), row_id)
        connection.execute("UPDATE writes SET channel = ?, type = ?, value = ? WHERE rowid = ?", values)


def convert_postgres(connection: Any, serde: SerializerProtocol) -> None:
    """Convert every checkpoint of a PostgreSQL saver, within the caller's transaction.

    `connection` is a psycopg connection whose rows are dicts.
    """
    from psycopg.types.json import Jsonb

    key = "thread_id = %(thread_id)s AND checkpoint_ns = %(checkpoint_ns)s"
    rows = connection.execute("SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints").fetchall()
    for row in rows:
        same_row = f"{key} AND checkpoint_id = %(checkpoint_id)s"
        stored = connection.execute(f"SELECT checkpoint FROM checkpoints WHERE {same_row}", row).fetchone()
        values = row | {"converted": Jsonb(convert_checkpoint(stored["checkpoint"]))}
        connection.execute(f"UPDATE checkpoints SET checkpoint = %(converted)s WHERE {same_row}", values)
    for table, key_columns in (
        ("checkpoint_blobs", ("thread_id", "checkpoint_ns", "channel", "version")),
        ("checkpoint_writes", ("thread_id", "checkpoint_ns", "checkpoint_id", "task_id", "idx")),
    ):
        same_row = " AND ".join(f"{column} = %({column})s" for column in key_columns)
        columns = ", ".join(dict.fromkeys((*key_columns, "channel")))
        for row in connection.execute(f"SELECT {columns} FROM {table}").fetchall():
            stored = connection.execute(f"SELECT type, blob FROM {table} WHERE {same_row}", row).fetchone()
            channel = row["channel"]
            new_type, blob = stored["type"], stored["blob"]
            if blob is not None:  # the version of an empty channel has none
                new_type, blob = convert_serialized(serde, channel, (new_type, bytes(blob)))
            values = row | {"new_channel": CHANNELS.get(channel, channel), "new_type": new_type, "new_blob": blob}
            assignments = "channel = %(new_channel)s, type = %(new_type)s, blob = %(new_blob)s"
            connection.execute(f"UPDATE {table} SET {assignments} WHERE {same_row}", values)
