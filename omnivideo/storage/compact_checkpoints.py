"""Keep the checkpoints of a conversation linear in its number of turns.

A checkpoint holds the whole state, with every turn and artifact so far, and LangGraph writes one after each step. Once
a turn is complete, this module
- deletes the checkpoints of its steps: only those between two turns are needed later, to fork from;
- packs the checkpoint before the turn: of the lists that grow, it keeps one digest. The items are rows of
  checkpoint_items, each of which refers to the one before it, so a list and its prefixes share their rows.
The newest checkpoint is never packed, so a version that does not know about packing can continue the conversation.
"""

import hashlib
import json
import logging
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from langgraph.checkpoint.base import (
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.errors import StoreError, describe_database_failure

log = logging.getLogger("omnivideo.storage")
GROWING_CHANNELS = ("turns", "artifacts", "descriptions")
NEXT_STEP_PREFIXES = ("branch:to:", "__start__")  # of the channels that say which step is next
CREATE_ITEMS = """CREATE TABLE IF NOT EXISTS checkpoint_items (
    thread_id TEXT NOT NULL, digest TEXT NOT NULL, previous TEXT NOT NULL, position INTEGER NOT NULL,
    type TEXT NOT NULL, value {bytes_type} NOT NULL, PRIMARY KEY (thread_id, digest))"""
INSERT_ITEM = """INSERT INTO checkpoint_items (thread_id, digest, previous, position, type, value)
    VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""
SELECT_ITEMS = """WITH RECURSIVE chain AS (
    SELECT * FROM checkpoint_items WHERE thread_id = ? AND digest = ?
    UNION ALL
    SELECT item.* FROM checkpoint_items AS item, chain
    WHERE item.thread_id = chain.thread_id AND item.digest = chain.previous)
    SELECT type, value FROM chain ORDER BY position"""


def is_between_turns(values: dict[str, Any]) -> bool:
    """Return whether a state lies between two turns, given the values of its channels."""
    return not any(channel.startswith(NEXT_STEP_PREFIXES) for channel in values)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise a StoreError instead of an error that says that the database is unavailable."""
    try:
        yield
    except Exception as error:
        if (failure := describe_database_failure(error)) is None:
            raise
        raise StoreError(f"conversations: {failure}; try again later") from error


class CompactingSaver(ABC):
    """What the savers for SQLite and PostgreSQL share; each implements the statements that differ."""

    serde: Any

    @abstractmethod
    def fetch_rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement, whose parameters are marked with ?, in its own transaction."""

    @abstractmethod
    def find_last_complete(self, thread_id: str, before_id: str) -> str | None:
        """Return the id of the last checkpoint between two turns."""

    @abstractmethod
    def delete_steps(self, thread_id: str, after_id: str, before_id: str) -> None:
        """Delete the checkpoints between two others."""

    @abstractmethod
    def restore_values(self, thread_id: str, checkpoint_id: str) -> None:
        """Give a packed checkpoint its values back, so that a new one can begin with it."""

    @abstractmethod
    def delete_checkpoints(self, thread_id: str, first_id: str, before_id: str) -> None:
        """Delete the checkpoints from one to another, without the latter, and what was written after them."""

    @abstractmethod
    def list_packed_digests(self, thread_id: str) -> set[str]:
        """Return the digests of the last items of every packed checkpoint."""

    @abstractmethod
    def read_growing_values(self, thread_id: str, checkpoint_id: str) -> dict[str, Any]:
        """Return the values of GROWING_CHANNELS in a checkpoint that is not packed."""

    @abstractmethod
    def replace_growing_values(self, thread_id: str, checkpoint_id: str, digests: dict[str, str]) -> None:
        """Remove the values of GROWING_CHANNELS from a checkpoint, and store their digests in its metadata."""

    @abstractmethod
    def erase_freed_space(self) -> None:
        """Overwrite what deleted checkpoints have left in files, where the database allows it."""

    # ------------------------------------------------------------ the saver's interface, which raises StoreError

    def put(
        self, config: Any, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> Any:
        values = checkpoint["channel_values"]
        is_complete = is_between_turns(values)
        marked_metadata = {**metadata, "num_turns": len(values.get("turns", []))} if is_complete else metadata
        with translate_errors():
            saved = super().put(config, checkpoint, marked_metadata, new_versions)  # type: ignore[misc]
        if not is_complete:
            return saved
        try:
            self.compact(str(config["configurable"]["thread_id"]), checkpoint["id"])
        except Exception as error:  # the turn is saved; it only takes more space
            log.warning("checkpoints were not compacted: %s", type(error).__name__)
        return saved

    def put_writes(self, *arguments: Any, **options: Any) -> None:
        with translate_errors():
            super().put_writes(*arguments, **options)  # type: ignore[misc]

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        with translate_errors():
            found = super().get_tuple(config)  # type: ignore[misc]
            return None if found is None else self.unpack(found)

    def list(self, config: Any, **options: Any) -> Iterator[CheckpointTuple]:
        with translate_errors():  # SQLite's saver holds its lock while it iterates
            all_found = [*super().list(config, **options)]  # type: ignore[misc]
        for found in all_found:
            yield self.unpack(found)

    def delete_thread(self, thread_id: str) -> None:
        with translate_errors():
            super().delete_thread(thread_id)  # type: ignore[misc]
        self.fetch_rows("DELETE FROM checkpoint_items WHERE thread_id = ?", (thread_id,))

    def delete_branch(self, thread_id: str, first_id: str, newest_id: str) -> None:
        """Delete the checkpoints from one to the newest, with all values and items that no other checkpoint has.

        The newest begins with the first, has all of its values, and stays.
        """
        self.delete_checkpoints(thread_id, first_id, newest_id)
        query = "SELECT digest, previous FROM checkpoint_items WHERE thread_id = ?"
        previous = {str(digest): str(before) for digest, before in self.fetch_rows(query, (thread_id,))}
        kept = set[str]()
        for last in self.list_packed_digests(thread_id):
            digest = last
            while digest in previous and digest not in kept:
                kept.add(digest)
                digest = previous[digest]
        for digest in previous.keys() - kept:
            statement = "DELETE FROM checkpoint_items WHERE thread_id = ? AND digest = ?"
            self.fetch_rows(statement, (thread_id, digest))

    def list_thread_ids(self) -> Iterator[str]:
        rows = self.fetch_rows("SELECT DISTINCT thread_id FROM checkpoints ORDER BY thread_id")
        return (str(row[0]) for row in rows)

    def has_thread(self, thread_id: str) -> bool:
        """Return whether a thread has a checkpoint, without reading one: it is as long as the conversation."""
        return bool(self.fetch_rows("SELECT 1 FROM checkpoints WHERE thread_id = ? LIMIT 1", (thread_id,)))

    # ------------------------------------------------------------ packing

    def compact(self, thread_id: str, newest_id: str) -> None:
        """Delete the steps of the turn that has just ended, and pack the checkpoint before it."""
        previous_id = self.find_last_complete(thread_id, newest_id)
        if previous_id is None:  # of a version that did not mark them
            return
        self.delete_steps(thread_id, previous_id, newest_id)
        values = self.read_growing_values(thread_id, previous_id)
        if values:
            digests = {channel: self.store_items(thread_id, value) for channel, value in values.items()}
            self.replace_growing_values(thread_id, previous_id, digests)

    def store_items(self, thread_id: str, value: Any) -> str:
        """Store the items of a list, or of a dict in order, that are not stored yet. Return the last one's digest."""
        items = list(value.items()) if isinstance(value, dict) else value
        rows, digest = list[tuple[Any, ...]](), ""
        for position, item in enumerate(items):
            kind, data = self.serde.dumps_typed(item)
            previous, digest = digest, hashlib.sha256(digest.encode() + kind.encode() + data).hexdigest()
            rows.append((thread_id, digest, previous, position, kind, data))
        num_stored = len(rows)
        while num_stored and not self.has_item(thread_id, rows[num_stored - 1][1]):
            num_stored -= 1
        for row in rows[num_stored:]:  # in order: an item is stored after those before it
            self.fetch_rows(INSERT_ITEM, row)
        return digest

    def has_item(self, thread_id: str, digest: str) -> bool:
        query = "SELECT 1 FROM checkpoint_items WHERE thread_id = ? AND digest = ?"
        return bool(self.fetch_rows(query, (thread_id, digest)))

    def unpack(self, found: CheckpointTuple) -> CheckpointTuple:
        digests = found.metadata.get("packed")
        if not digests:
            return found
        thread_id = str(found.config["configurable"]["thread_id"])
        for channel, digest in dict(digests).items():  # type: ignore[call-overload]
            found.checkpoint["channel_values"][channel] = self.load_items(thread_id, channel, digest)
        return found

    def load_items(self, thread_id: str, channel: str, digest: str) -> Any:
        """Return the value of a channel whose last item has this digest."""
        rows = self.fetch_rows(SELECT_ITEMS, (thread_id, digest))
        items = [self.serde.loads_typed((kind, bytes(data))) for kind, data in rows]
        return dict(items) if channel == "descriptions" else items


class CompactSqliteSaver(CompactingSaver, SqliteSaver):
    def setup(self) -> None:
        if self.is_setup:
            return
        super().setup()
        self.conn.execute("PRAGMA secure_delete=ON")
        self.conn.execute(CREATE_ITEMS.format(bytes_type="BLOB"))

    def erase_freed_space(self) -> None:
        self.fetch_rows("VACUUM")
        self.fetch_rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def fetch_rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with translate_errors(), self.cursor() as cursor:
            return cursor.execute(statement, tuple(parameters)).fetchall()

    def find_last_complete(self, thread_id: str, before_id: str) -> str | None:
        is_complete = "json_extract(CAST(metadata AS TEXT), '$.num_turns') IS NOT NULL"
        query = (
            f"SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = ? AND checkpoint_id < ? AND {is_complete}"
        )
        ((checkpoint_id,),) = self.fetch_rows(query, (thread_id, before_id))
        return None if checkpoint_id is None else str(checkpoint_id)

    def delete_steps(self, thread_id: str, after_id: str, before_id: str) -> None:
        for table in ("writes", "checkpoints"):
            bounds = "thread_id = ? AND checkpoint_id > ? AND checkpoint_id < ?"
            self.fetch_rows(f"DELETE FROM {table} WHERE {bounds}", (thread_id, after_id, before_id))
        self.fetch_rows("DELETE FROM writes WHERE thread_id = ? AND checkpoint_id = ?", (thread_id, after_id))

    def restore_values(self, thread_id: str, checkpoint_id: str) -> None:
        """Do nothing: each new checkpoint has all of its values."""

    def delete_checkpoints(self, thread_id: str, first_id: str, before_id: str) -> None:
        for table in ("writes", "checkpoints"):
            bounds = "thread_id = ? AND checkpoint_id >= ? AND checkpoint_id < ?"
            self.fetch_rows(f"DELETE FROM {table} WHERE {bounds}", (thread_id, first_id, before_id))

    def list_packed_digests(self, thread_id: str) -> set[str]:
        query = "SELECT json_extract(CAST(metadata AS TEXT), '$.packed') FROM checkpoints WHERE thread_id = ?"
        packed = [json.loads(text) for (text,) in self.fetch_rows(query, (thread_id,)) if text]
        return {digest for digests in packed for digest in digests.values()}

    def load_checkpoint(self, thread_id: str, checkpoint_id: str) -> Any:
        query = "SELECT type, checkpoint FROM checkpoints WHERE thread_id = ? AND checkpoint_id = ?"
        (row,) = self.fetch_rows(query, (thread_id, checkpoint_id))
        return self.serde.loads_typed(row)

    def read_growing_values(self, thread_id: str, checkpoint_id: str) -> dict[str, Any]:
        values = self.load_checkpoint(thread_id, checkpoint_id)["channel_values"]
        return {channel: values[channel] for channel in GROWING_CHANNELS if channel in values}

    def replace_growing_values(self, thread_id: str, checkpoint_id: str, digests: dict[str, str]) -> None:
        checkpoint = self.load_checkpoint(thread_id, checkpoint_id)
        for channel in digests:
            del checkpoint["channel_values"][channel]
        kind, data = self.serde.dumps_typed(checkpoint)
        statement = """UPDATE checkpoints SET type = ?, checkpoint = ?,
            metadata = CAST(json_set(CAST(metadata AS TEXT), '$.packed', json(?)) AS BLOB)
            WHERE thread_id = ? AND checkpoint_id = ?"""
        self.fetch_rows(statement, (kind, data, json.dumps(digests), thread_id, checkpoint_id))


def open_sqlite_saver(connection: sqlite3.Connection) -> CompactSqliteSaver:
    saver = CompactSqliteSaver(connection)
    saver.setup()
    return saver
