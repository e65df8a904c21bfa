"""Keep the checkpoints of a conversation linear in its number of turns.

A checkpoint holds the whole state, with every turn and artifact so far, and LangGraph writes one after each step. The
savers write the steps without the earlier turns: PostgreSQL's does so anyway, and the one for SQLite writes them as
rows of a namespace of their own. An older version does not see that namespace: it continues from the checkpoint before
the turn, whose jobs have the same ids. Once a turn is complete, this module
- deletes the checkpoints of its steps: only those between two turns are needed later, to fork from;
- packs the checkpoint before the turn: of the lists that grow, it keeps one digest. The items are rows of
  checkpoint_items, each of which refers to the one before it, so a list and its prefixes share their rows.
The newest checkpoint is never packed, so a version that does not know about packing can continue the conversation.

The metadata of a checkpoint tell how far the conversation has got, so that nobody reads all turns to know it: "lengths"
of the lists, and "num_turns" between two turns.
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
from langgraph.checkpoint.sqlite.utils import load_pending_writes, pending_writes_sql

from omnivideo.errors import StoreError, describe_database_failure
from omnivideo.turns import ThreadProgress

log = logging.getLogger("omnivideo.storage")
GROWING_CHANNELS = ("turns", "artifacts", "descriptions")
APPENDED_CHANNELS = ("turns", "artifacts")  # of these, what is to be appended to a list
STEPS = "steps"  # the namespace of the checkpoints within a turn, in SQLite
PACKED = "packed"  # that of the packed form of a checkpoint that is not to be packed yet, in SQLite
INTERRUPT_CHANNEL = "__interrupt__"  # of the writes that hold a question
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
Rows = list[tuple[Any, ...]]  # inside the classes, `list` is a method


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
    def pack(self, thread_id: str, checkpoint_id: str) -> None:
        """Move the values of GROWING_CHANNELS from a checkpoint to checkpoint_items, unless that has been done.

        Their digests are stored in its metadata.
        """

    @abstractmethod
    def find_newest(self, thread_id: str) -> tuple[str, dict[str, Any]] | None:
        """Return the id and the metadata of a thread's newest checkpoint."""

    @abstractmethod
    def fetch_interrupt(self, thread_id: str, checkpoint_id: str) -> list[tuple[Any, ...]]:
        """Return the type and the value of the question that was asked after a checkpoint, if there is one."""

    @abstractmethod
    def erase_freed_space(self) -> None:
        """Overwrite what deleted checkpoints have left in files, where the database allows it."""

    # ------------------------------------------------------------ the saver's interface, which raises StoreError

    def put(
        self, config: Any, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> Any:
        values = checkpoint["channel_values"]
        lengths = {channel: len(values.get(channel, ())) for channel in APPENDED_CHANNELS}
        marked_metadata: Any = {**metadata, "lengths": lengths}
        if not is_between_turns(values):
            with translate_errors():
                return self.put_step(config, checkpoint, marked_metadata, new_versions)
        marked_metadata["num_turns"] = lengths["turns"]
        with translate_errors():
            saved = super().put(config, checkpoint, marked_metadata, new_versions)  # type: ignore[misc]
        try:
            self.prepare_packing(config, checkpoint, marked_metadata)
            self.compact(str(config["configurable"]["thread_id"]), checkpoint["id"])
        except Exception as error:  # the turn is saved; it only takes more space
            log.warning("checkpoints were not compacted: %s", type(error).__name__)
        return saved

    def put_step(self, *arguments: Any) -> Any:
        """Write the checkpoint of a step within a turn."""
        return super().put(*arguments)  # type: ignore[misc]

    def prepare_packing(self, config: Any, checkpoint: Checkpoint, metadata: Any) -> None:
        """Store what `pack` will need once a later turn is complete, while the values are at hand."""
        return None

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

    def read_progress(self, thread_id: str) -> ThreadProgress | None:
        """Return how far a thread has got; None if the newest checkpoint is of a version that does not say it."""
        newest = self.find_newest(thread_id)
        if newest is None or "lengths" not in newest[1]:
            return None
        checkpoint_id, metadata = newest
        interrupts = [
            self.serde.loads_typed((kind, bytes(data))) for kind, data in self.fetch_interrupt(thread_id, checkpoint_id)
        ]
        num_turns = metadata["lengths"]["turns"]
        if interrupts:
            return ThreadProgress(num_turns, False, str(interrupts[0][0].value), interrupts[0][0].id)
        return ThreadProgress(num_turns, "num_turns" not in metadata, None)

    # ------------------------------------------------------------ packing

    def compact(self, thread_id: str, newest_id: str) -> None:
        """Delete the steps of the turn that has just ended, and pack the checkpoint before it."""
        previous_id = self.find_last_complete(thread_id, newest_id)
        if previous_id is None:  # of a version that did not mark them
            return
        self.delete_steps(thread_id, previous_id, newest_id)
        self.pack(thread_id, previous_id)

    def store_items(self, thread_id: str, value: Any, start: int = 0, digest: str = "") -> str:
        """Store the items of a list, or of a dict in order, that are not stored yet. Return the last one's digest.

        The items before `start` are stored, and `digest` is that of the last of them.
        """
        items = list(value.items()) if isinstance(value, dict) else value
        rows = list[tuple[Any, ...]]()
        for position, item in enumerate(items[start:], start):
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
    """A SqliteSaver whose steps are in a namespace of their own, without the turns before."""

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
        query = """SELECT checkpoint_id FROM checkpoints
            WHERE thread_id = ? AND checkpoint_ns = '' AND checkpoint_id < ?
            AND json_extract(CAST(metadata AS TEXT), '$.num_turns') IS NOT NULL
            ORDER BY checkpoint_id DESC LIMIT 1"""
        rows = self.fetch_rows(query, (thread_id, before_id))
        return str(rows[0][0]) if rows else None

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

    # ------------------------------------------------------------ packing

    def prepare_packing(self, config: Any, checkpoint: Any, metadata: Any) -> None:
        """Store the packed form of a checkpoint beside it; to read it again for this would take as long as the turn."""
        thread_id, values = config["configurable"]["thread_id"], dict(checkpoint["channel_values"])
        stored = self.find_stored_items(config)
        digests = {
            channel: self.store_items(thread_id, values.pop(channel), *stored.get(channel, ()))
            for channel in GROWING_CHANNELS
            if channel in values
        }
        packed: Any = {**checkpoint, "channel_values": values}
        packed_metadata: Any = {**metadata, "packed": digests}
        SqliteSaver.put(self, move_config(config, PACKED), packed, packed_metadata, {})

    def find_stored_items(self, config: Any) -> dict[str, tuple[int, str]]:
        """Return the length of each list before the turn, and the digest of its last item, if they are stored."""
        if (base := self.find_base(config)) is None:
            return {}
        packed = "json_extract(CAST(metadata AS TEXT), '$.packed')"
        query = f"""SELECT {packed} FROM checkpoints
            WHERE thread_id = ? AND checkpoint_id = ? AND {packed} IS NOT NULL"""
        for (text,) in self.fetch_rows(query, (config["configurable"]["thread_id"], base["base"])):
            digests = json.loads(text)
            return {channel: (base["lengths"][channel], digests[channel]) for channel in APPENDED_CHANNELS}
        return {}

    def pack(self, thread_id: str, checkpoint_id: str) -> None:
        packed = f"FROM checkpoints WHERE thread_id = ?1 AND checkpoint_id = ?2 AND checkpoint_ns = '{PACKED}'"
        place = (thread_id, checkpoint_id)
        if not self.fetch_rows(f"SELECT 1 {packed}", place):  # of an older version, or packed
            config: Any = {
                "configurable": {"thread_id": thread_id, "checkpoint_ns": "", "checkpoint_id": checkpoint_id}
            }
            found = SqliteSaver.get_tuple(self, config)
            if found is None or "packed" in found.metadata:
                return
            del config["configurable"]["checkpoint_id"]
            self.prepare_packing(config, found.checkpoint, found.metadata)
        columns = "type, checkpoint, metadata"
        statement = f"""UPDATE checkpoints SET ({columns}) = (SELECT {columns} {packed})
            WHERE thread_id = ?1 AND checkpoint_id = ?2 AND checkpoint_ns = ''"""
        self.fetch_rows(statement, place)
        self.fetch_rows(f"DELETE {packed}", place)

    # ------------------------------------------------------------ steps

    def put_step(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        """Write a step without what the checkpoint before the turn has, whose id is "base" in its metadata."""
        base = self.find_base(config)
        if base is None:
            return super().put_step(config, checkpoint, metadata, new_versions)
        values = dict(checkpoint["channel_values"])
        for channel in values.keys() & base["lengths"].keys():
            values[channel] = values[channel][base["lengths"][channel] :]
        step = {**checkpoint, "channel_values": values}
        return move_config(super().put_step(move_config(config, STEPS), step, {**metadata, **base}, new_versions), "")

    def find_base(self, config: Any) -> dict[str, Any] | None:
        """Return the id and the lengths of the checkpoint before the turn, of which `config` names the last one.

        Returns None if an older version has written it, which did not store the lengths.
        """
        query = "SELECT metadata FROM checkpoints WHERE thread_id = ? AND checkpoint_id = ?"
        parent_id = config["configurable"].get("checkpoint_id")
        for (text,) in self.fetch_rows(query, (config["configurable"]["thread_id"], parent_id)):
            metadata = json.loads(text)
            base_id = parent_id if "num_turns" in metadata else metadata.get("base")
            if base_id and "lengths" in metadata:
                return {"base": base_id, "lengths": metadata["lengths"]}
        return None

    def put_writes(self, config: Any, writes: Sequence[tuple[str, Any]], *arguments: Any, **options: Any) -> None:
        """Store what a step has written. A step that asks becomes complete, as an older version may get the reply."""
        thread_id, checkpoint_id = (config["configurable"][name] for name in ("thread_id", "checkpoint_id"))
        if any(channel == INTERRUPT_CHANNEL for channel, _ in writes) and (
            step := self.load_step(thread_id, checkpoint_id)
        ):
            statement = f"""UPDATE checkpoints SET checkpoint_ns = '', type = ?, checkpoint = ?
                WHERE thread_id = ? AND checkpoint_ns = '{STEPS}' AND checkpoint_id = ?"""
            self.fetch_rows(statement, (*self.serde.dumps_typed(step.checkpoint), thread_id, checkpoint_id))
        super().put_writes(config, writes, *arguments, **options)

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        thread_id, checkpoint_id = config["configurable"]["thread_id"], config["configurable"].get("checkpoint_id")
        step_id = checkpoint_id or self.find_newest_step(thread_id)
        return (step_id and self.load_step(thread_id, step_id)) or super().get_tuple(config)

    def load_step(self, thread_id: str, step_id: str) -> CheckpointTuple | None:
        """Return a step with all of its values, or None if there is no such step."""
        place = {"configurable": {"thread_id": thread_id, "checkpoint_ns": STEPS, "checkpoint_id": step_id}}
        step = super().get_tuple(place)
        base = step and super().get_tuple(move_config(place, "", step.metadata["base"]))  # type: ignore[typeddict-item]
        if not step or not base:  # the thread is being deleted
            return None
        values = step.checkpoint["channel_values"]
        for channel in values.keys() & set(APPENDED_CHANNELS):
            values[channel] = [*base.checkpoint["channel_values"].get(channel, []), *values[channel]]
        with translate_errors(), self.cursor(transaction=False) as cursor:
            rows = cursor.execute(pending_writes_sql(self._has_task_path), (thread_id, "", step_id))
            pending_writes = load_pending_writes(rows, self.serde)
        parent = step.parent_config and move_config(step.parent_config, "")
        return step._replace(config=move_config(place, ""), parent_config=parent, pending_writes=pending_writes)

    def find_newest_step(self, thread_id: str) -> str | None:
        """Return the id of the thread's newest checkpoint if it is a step."""
        newest = "(SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ?)"
        query = f"SELECT step FROM (SELECT {newest} AS step) WHERE step > coalesce({newest}, '')"
        return next((str(step) for (step,) in self.fetch_rows(query, (thread_id, STEPS, thread_id, ""))), None)

    def list(self, config: Any, **options: Any) -> Iterator[CheckpointTuple]:
        return (found for found in super().list(config, **options) if get_namespace(found.config) != STEPS)

    def find_newest(self, thread_id: str) -> tuple[str, dict[str, Any]] | None:
        query = """SELECT checkpoint_id, metadata FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ?
            ORDER BY checkpoint_id DESC LIMIT 1"""
        rows = [row for place in ("", STEPS) for row in self.fetch_rows(query, (thread_id, place))]
        if not rows:
            return None
        checkpoint_id, text = max(rows)
        return str(checkpoint_id), json.loads(text)

    def fetch_interrupt(self, thread_id: str, checkpoint_id: str) -> Rows:
        query = "SELECT type, value FROM writes WHERE thread_id = ? AND checkpoint_id = ? AND channel = ? LIMIT 1"
        return self.fetch_rows(query, (thread_id, checkpoint_id, INTERRUPT_CHANNEL))


def move_config(config: Any, namespace: str, checkpoint_id: str | None = None) -> Any:
    """Return a configuration that names the same checkpoint, or another one of its thread, in a namespace."""
    place = {**config["configurable"], "checkpoint_ns": namespace}
    return {"configurable": place | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def get_namespace(config: Any) -> str:
    return str(config["configurable"].get("checkpoint_ns", ""))


def open_sqlite_saver(connection: sqlite3.Connection) -> CompactSqliteSaver:
    saver = CompactSqliteSaver(connection)
    saver.setup()
    return saver
