"""The saver of checkpoints in PostgreSQL, which keeps them linear (compact_checkpoints.py).

PostgreSQL's saver writes lists into checkpoint_blobs, one row for each version of a channel.
"""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

from langgraph.checkpoint.postgres import PostgresSaver
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from omnivideo.storage.compact_checkpoints import (
    CREATE_ITEMS,
    GROWING_CHANNELS,
    INTERRUPT_CHANNEL,
    CompactingSaver,
    translate_errors,
)

Rows = list[tuple[Any, ...]]  # inside the class, `list` is a method


class CompactPostgresSaver(CompactingSaver, PostgresSaver):
    """A PostgresSaver over a pool of connections.

    PostgresSaver holds its lock during every statement, because it may have a single connection. The pool gives each
    thread a connection of its own; with the lock, all threads of the service would wait for each other's statements.
    """

    conn: Any

    def __init__(self, pool: Any):
        super().__init__(pool)
        self.lock = cast(threading.Lock, nullcontext())

    def setup(self) -> None:
        super().setup()
        self.fetch_rows(CREATE_ITEMS.format(bytes_type="BYTEA"))

    def fetch_rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with (
            translate_errors(),
            self.conn.connection() as connection,
            connection.cursor(row_factory=tuple_row) as cursor,
        ):
            cursor.execute(statement.replace("?", "%s"), parameters)
            return cursor.fetchall() if cursor.description else []

    def erase_freed_space(self) -> None:
        """Do nothing: the service's tables are in the same database."""

    def find_last_complete(self, thread_id: str, before_id: str) -> str | None:
        query = """SELECT max(checkpoint_id) FROM checkpoints
            WHERE thread_id = ? AND checkpoint_id < ? AND metadata->'num_turns' IS NOT NULL"""
        ((checkpoint_id,),) = self.fetch_rows(query, (thread_id, before_id))
        return None if checkpoint_id is None else str(checkpoint_id)

    def delete_steps(self, thread_id: str, after_id: str, before_id: str) -> None:
        first, last = (self.load_versions(thread_id, checkpoint_id) for checkpoint_id in (after_id, before_id))
        for table in ("checkpoint_writes", "checkpoints"):
            bounds = "thread_id = ? AND checkpoint_id > ? AND checkpoint_id < ?"
            self.fetch_rows(f"DELETE FROM {table} WHERE {bounds}", (thread_id, after_id, before_id))
        self.fetch_rows(
            "DELETE FROM checkpoint_writes WHERE thread_id = ? AND checkpoint_id = ?", (thread_id, after_id)
        )
        for channel, version in last.items():
            bounds = 'thread_id = ? AND channel = ? AND version COLLATE "C" > ? AND version COLLATE "C" < ?'
            parameters = (thread_id, channel, first.get(channel, ""), version)
            self.fetch_rows(f"DELETE FROM checkpoint_blobs WHERE {bounds}", parameters)

    def restore_values(self, thread_id: str, checkpoint_id: str) -> None:
        query = "SELECT metadata->'packed' FROM checkpoints WHERE thread_id = ? AND checkpoint_id = ?"
        ((digests,),) = self.fetch_rows(query, (thread_id, checkpoint_id))
        versions = self.load_versions(thread_id, checkpoint_id)
        statement = """UPDATE checkpoint_blobs SET type = ?, blob = ?
            WHERE thread_id = ? AND channel = ? AND version = ?"""
        for channel, digest in (digests or {}).items():
            value = self.serde.dumps_typed(self.load_items(thread_id, channel, digest))
            self.fetch_rows(statement, (*value, thread_id, channel, versions[channel]))

    def delete_checkpoints(self, thread_id: str, first_id: str, before_id: str) -> None:
        for table in ("checkpoint_writes", "checkpoints"):
            bounds = "thread_id = ? AND checkpoint_id >= ? AND checkpoint_id < ?"
            self.fetch_rows(f"DELETE FROM {table} WHERE {bounds}", (thread_id, first_id, before_id))
        statement = """DELETE FROM checkpoint_blobs WHERE thread_id = ? AND NOT EXISTS (
            SELECT 1 FROM checkpoints WHERE checkpoints.thread_id = checkpoint_blobs.thread_id
            AND checkpoint->'channel_versions'->>channel = version)"""
        self.fetch_rows(statement, (thread_id,))

    def list_packed_digests(self, thread_id: str) -> set[str]:
        query = "SELECT metadata->'packed' FROM checkpoints WHERE thread_id = ? AND metadata->'packed' IS NOT NULL"
        return {digest for (digests,) in self.fetch_rows(query, (thread_id,)) for digest in digests.values()}

    def load_versions(self, thread_id: str, checkpoint_id: str) -> dict[str, str]:
        """Return the version of each channel in a checkpoint; versions sort like texts."""
        query = "SELECT checkpoint->'channel_versions' FROM checkpoints WHERE thread_id = ? AND checkpoint_id = ?"
        ((versions,),) = self.fetch_rows(query, (thread_id, checkpoint_id))
        return dict(versions)

    def find_newest(self, thread_id: str) -> tuple[str, dict[str, Any]] | None:
        query = """SELECT checkpoint_id, metadata FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ''
            ORDER BY checkpoint_id DESC LIMIT 1"""
        rows = self.fetch_rows(query, (thread_id,))
        return (str(rows[0][0]), dict(rows[0][1])) if rows else None

    def fetch_interrupt(self, thread_id: str, checkpoint_id: str) -> Rows:
        query = """SELECT type, blob FROM checkpoint_writes
            WHERE thread_id = ? AND checkpoint_id = ? AND channel = ? LIMIT 1"""
        return self.fetch_rows(query, (thread_id, checkpoint_id, INTERRUPT_CHANNEL))

    def pack(self, thread_id: str, checkpoint_id: str) -> None:
        values = self.read_growing_values(thread_id, checkpoint_id)
        if values:
            digests = {channel: self.store_items(thread_id, value) for channel, value in values.items()}
            self.replace_growing_values(thread_id, checkpoint_id, digests)

    def read_growing_values(self, thread_id: str, checkpoint_id: str) -> dict[str, Any]:
        """Return the values of GROWING_CHANNELS in a checkpoint that is not packed."""
        versions, values = self.load_versions(thread_id, checkpoint_id), dict[str, Any]()
        query = "SELECT type, blob FROM checkpoint_blobs WHERE thread_id = ? AND channel = ? AND version = ?"
        for channel in GROWING_CHANNELS:
            for kind, data in self.fetch_rows(query, (thread_id, channel, versions.get(channel, ""))):
                if kind != "empty":
                    values[channel] = self.serde.loads_typed((kind, bytes(data)))
        return values

    def replace_growing_values(self, thread_id: str, checkpoint_id: str, digests: dict[str, str]) -> None:
        """Remove the values of GROWING_CHANNELS from a checkpoint, and store their digests in its metadata."""
        statement = """UPDATE checkpoints SET metadata = metadata || jsonb_build_object('packed', ?::jsonb)
            WHERE thread_id = ? AND checkpoint_id = ?"""
        self.fetch_rows(statement, (Jsonb(digests), thread_id, checkpoint_id))
        # A version may belong to later checkpoints too, which are not packed yet.
        statement = """UPDATE checkpoint_blobs SET type = 'empty', blob = NULL
            WHERE thread_id = ? AND channel = ? AND version = ? AND NOT EXISTS (
                SELECT 1 FROM checkpoints WHERE checkpoints.thread_id = checkpoint_blobs.thread_id
                AND checkpoint_id > ? AND metadata->'packed' IS NULL
                AND checkpoint->'channel_versions'->>channel = version)"""
        versions = self.load_versions(thread_id, checkpoint_id)
        for channel in digests:
            self.fetch_rows(statement, (thread_id, channel, versions[channel], checkpoint_id))
