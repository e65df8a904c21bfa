"""Threads and their owners, the turns that run in them, and the events of each turn.

A thread's own id, `threads.id`, is that of its checkpoints, its turns and its jobs. An owner may choose another id for
it, which means this thread only to that owner, and another thread once this one is deleted.

One process at a time runs a turn and sends heartbeats; when they stop, another process takes the turn over. As with
jobs, what a process writes carries the number of its attempt.
"""

import uuid
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Row,
    String,
    and_,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from omnivideo.contracts import OPEN_STATES, Change, Lane
from omnivideo.errors import InvalidInput
from omnivideo.storage.database.notifications import NEW_TURN, AsyncWatch, turn_topic
from omnivideo.storage.database.repository import Repository, find_object_keys, record_from_row, select_values, unix_now
from omnivideo.storage.database.schema import chat_threads, jobs, threads, turn_events, turns
from omnivideo.turns import MAX_PROCESS_LOSSES, ThreadRecord, TurnEvents, TurnRecord

NumberedEvent = tuple[int, dict[str, Any]]  # numbers begin at 1


def is_owned_thread(owner: str) -> ColumnElement[bool]:
    return and_(threads.c.owner == owner, threads.c.deleted.is_(False))


def thread_from_row(row: Row[Any]) -> ThreadRecord:
    return ThreadRecord(
        id=row.id,
        public_id=row.client_id or row.id,
        created_at=row.created_at,
        forked_from=row.forked_from,
        forked_after=row.forked_after,
    )


class TurnRepository(Repository):
    """The threads of all owners, with their turns and events."""

    # ------------------------------------------------------------ threads

    def create_thread(
        self,
        thread_id: str,
        owner: str,
        forked_from: str | None = None,
        forked_after: int | None = None,
        client_id: str | None = None,
    ) -> ThreadRecord:
        """Create a thread, which may begin with the turns of another one.

        Raises InvalidInput if the owner has a thread with the `client_id`. Its first checkpoint is written later; the
        row says how.
        """
        values = {
            "id": thread_id, "client_id": client_id or thread_id, "owner": owner, "created_at": unix_now(),
            "used_at": unix_now(), "deleted": False, "forked_from": forked_from, "forked_after": forked_after,
        }  # fmt: skip
        if client_id is None or self.get_thread(owner, client_id) is None:
            with suppress(IntegrityError):
                (row,) = self.fetch_all(insert(threads).values(values).returning(threads))
                return thread_from_row(row)
        raise InvalidInput("thread", "you have a thread with that id; give another, or none")

    def has_thread(self, thread_id: str, owner: str) -> bool:
        return self.get_thread(owner, thread_id) is not None

    def list_threads(
        self, owner: str, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> tuple[list[ThreadRecord], bool]:
        """Return a page of the owner's threads, and whether more follow."""
        is_cursor = and_(or_(threads.c.client_id == after, threads.c.id == after), threads.c.owner == owner)
        cursor_query = select(threads.c.created_at, threads.c.id).where(is_cursor).order_by(threads.c.deleted)
        rows, has_more = self.fetch_page(threads, is_owned_thread(owner), after, limit, newest_first, cursor_query)
        return [thread_from_row(row) for row in rows], has_more

    def get_thread(self, owner: str, thread_id: str) -> ThreadRecord | None:
        """Return the owner's thread that has this id, the owner's or its own."""
        is_named = or_(threads.c.client_id == thread_id, threads.c.id == thread_id)
        by_client_id_first = threads.c.client_id.is_(None), threads.c.client_id != thread_id
        row = self.fetch_one(select(threads).where(is_named, is_owned_thread(owner)).order_by(*by_client_id_first))
        return None if row is None else thread_from_row(row)

    def delete_thread(self, thread_id: str) -> list[TurnRecord]:
        """Mark a thread, by its own id, as deleted, which the sweep completes. Return its open turns."""
        self.fetch_all(update(threads).where(threads.c.id == thread_id).values(deleted=True))
        return [turn for turn in self.list_turns(thread_id) if turn.state in OPEN_STATES]

    # ------------------------------------------------------------ turns

    def create_turn(
        self,
        turn_id: str,
        thread_id: str,
        owner: str,
        number: int,
        body: dict[str, Any],
        error: dict[str, Any] | None = None,
    ) -> TurnRecord | None:
        """Create a turn, which has failed if `error` is given.

        Return None if the id is known or another turn of the thread is open.
        """
        has_open_turn = exists().where(turns.c.thread_id == thread_id, turns.c.state.in_(OPEN_STATES))
        values = {
            "id": turn_id, "thread_id": thread_id, "owner": owner, "state": "failed" if error else "queued",
            "error": error,
            "number": number, "body": body, "attempt": 0,
            "cancel_requested": False, "heartbeat_at": unix_now(), "created_at": unix_now(),
        }  # fmt: skip
        insertion = self.insert_into(turns).from_select(
            list(values), select_values(turns, values).where(~has_open_turn)
        )
        use = update(threads).where(threads.c.id == thread_id).values(used_at=unix_now())
        notification = self.notifier.build_notification(literal(NEW_TURN, String))
        rows = self.fetch_and_follow(insertion.on_conflict_do_nothing().returning(turns, notification), lambda _: use)
        if rows and error is None:  # otherwise there is nothing to claim
            self.notifier.publish(Change(topic=NEW_TURN))
        return record_from_row(TurnRecord, rows[0]) if rows else None

    def follow_new_turns(self, deliver: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `deliver` when any process has created a turn, until the context ends."""
        return self.notifier.subscribe((NEW_TURN,), lambda _: deliver())

    def get_turn(self, turn_id: str, owner: str) -> TurnRecord | None:
        row = self.fetch_one(select(turns).where(turns.c.id == turn_id, turns.c.owner == owner))
        return None if row is None else record_from_row(TurnRecord, row)

    def list_turns(self, thread_id: str) -> list[TurnRecord]:
        """Return the turns of a thread, the oldest first."""
        query = select(turns).where(turns.c.thread_id == thread_id).order_by(turns.c.created_at)
        return [record_from_row(TurnRecord, row) for row in self.fetch_all(query)]

    def has_open_turn(self, owner: str, exclude_lane: Lane) -> bool:
        """Return whether a turn of the owner is queued or running in another lane than this one."""
        query = select(turns.c.body).where(turns.c.owner == owner, turns.c.state.in_(OPEN_STATES))
        return any(row.body.get("lane", "interactive") != exclude_lane for row in self.fetch_all(query))

    def claim_next_turn(
        self,
        heartbeat_timeout_seconds: float,
        excluded_owners: Collection[str] = (),
        running_ids: Collection[str] = (),
    ) -> TurnRecord | None:
        """Claim a turn that is queued, or whose process has sent no heartbeat for the given time.

        Return None if there is none. Owners are served in turn: the one with the fewest running turns is first. Those
        that the caller runs itself are not lost, however late their heartbeats are. `fail_poisonous_turns` ends the
        lost ones that are not claimed.
        """
        is_lost = and_(match_lost(heartbeat_timeout_seconds), ~is_poisonous())
        is_claimable = and_(or_(turns.c.state == "queued", is_lost), turns.c.id.not_in(running_ids))
        running = turns.alias("running")
        num_running = select(func.count()).where(running.c.owner == turns.c.owner, running.c.state == "running")
        in_order = select(turns.c.id).where(is_claimable, turns.c.owner.not_in(excluded_owners))
        in_order = in_order.order_by(num_running.scalar_subquery(), turns.c.created_at, turns.c.id).limit(1)
        next_id = in_order.with_for_update(skip_locked=True).scalar_subquery()
        values = {
            "state": "running", "attempt": turns.c.attempt + 1, "heartbeat_at": unix_now(),
            "process_losses": turns.c.process_losses + case((turns.c.state == "running", 1), else_=0),
        }  # fmt: skip
        claim = update(turns).where(turns.c.id == next_id, is_claimable).values(values)
        row = self.fetch_one(claim.returning(turns))
        return None if row is None else record_from_row(TurnRecord, row)

    def fail_poisonous_turns(self, heartbeat_timeout_seconds: float, error: dict[str, Any]) -> list[str]:
        """End the lost turns that have stopped MAX_PROCESS_LOSSES processes, and return their ids."""
        ending = update(turns).where(match_lost(heartbeat_timeout_seconds), is_poisonous())
        values = {"state": "failed", "error": error, "process_losses": turns.c.process_losses + 1}
        notification = self.notifier.build_notification(literal("turn ") + turns.c.id)
        turn_ids = [row.id for row in self.fetch_all(ending.values(values).returning(turns.c.id, notification))]
        for turn_id in turn_ids:
            self.notifier.publish(Change(topic=turn_topic(turn_id)))
        return turn_ids

    def release_turn(self, turn: TurnRecord) -> None:
        """Put the turn of a process that stops back into the queue; this does not count as a loss."""
        self.fetch_all(update(turns).where(match_attempt(turn)).values(state="queued"))

    def heartbeat(self, turn: TurnRecord) -> Literal["wanted", "cancelled", "lost"]:
        """Record that this process runs the turn, and return whether it must continue."""
        heartbeat = update(turns).where(match_attempt(turn)).values(heartbeat_at=unix_now())
        row = self.fetch_one(heartbeat.returning(turns.c.cancel_requested))
        return "lost" if row is None else "cancelled" if row.cancel_requested else "wanted"

    def cancel_turn(self, turn_id: str) -> None:
        """Request the cancellation of an open turn; its process stops at its next heartbeat."""
        self.fetch_all(
            update(turns).where(turns.c.id == turn_id, turns.c.state.in_(OPEN_STATES)).values(cancel_requested=True)
        )

    def end_turn(self, turn: TurnRecord, state: str, error: dict[str, Any] | None = None) -> bool:
        """End a turn and notify its followers. Return False if another process has taken over the turn."""
        ending = update(turns).where(match_attempt(turn)).values(state=state, error=error, heartbeat_at=unix_now())
        notification = self.notifier.build_notification(literal("turn ") + turns.c.id)
        has_ended = bool(self.fetch_all(ending.returning(turns.c.id, notification)))
        self.notifier.publish(Change(topic=turn_topic(turn.id)))
        return has_ended

    def begin_deletion(self, turn: TurnRecord) -> bool:
        """Keep other turns out of the thread while an ended turn is deleted. Return False if one is open.

        If the process ends meanwhile, the turn counts as lost and has failed; it can be deleted again.
        """
        values = {"state": "running", "process_losses": MAX_PROCESS_LOSSES, "heartbeat_at": unix_now()}
        is_ended = and_(turns.c.id == turn.id, turns.c.state.not_in(OPEN_STATES))
        try:
            return bool(self.fetch_all(update(turns).where(is_ended).values(values).returning(turns.c.id)))
        except IntegrityError:  # one open turn of each thread
            return False

    def discard_turn(self, turn: TurnRecord) -> None:
        """Move a turn into a deleted thread of its own, which the sweep removes, and mark its jobs as deleted."""
        grave = {"id": f"deleted_{uuid.uuid4().hex}", "owner": turn.owner, "created_at": unix_now(), "deleted": True}
        with self.begin() as connection:
            connection.execute(insert(threads).values(grave))
            moved = {"thread_id": grave["id"], "state": "cancelled", "heartbeat_at": unix_now()}
            connection.execute(update(turns).where(turns.c.id == turn.id).values(moved))
            connection.execute(update(jobs).where(jobs.c.turn_id == turn.id).values(deleted=True))
            is_later = and_(chat_threads.c.thread_id == turn.thread_id, chat_threads.c.turn_count >= turn.number)
            connection.execute(delete(chat_threads).where(is_later))

    # ------------------------------------------------------------ events

    def append_event(self, turn: TurnRecord, event: dict[str, Any]) -> bool:
        """Append an event under the turn's next number. Return False if another process has taken over the turn."""
        return self.append_turn_event(turns.c.id, turns, match_attempt(turn), event)

    def list_events(self, turn_id: str, after_number: int = 0) -> list[NumberedEvent]:
        """Return the events of a turn with a number above `after_number`, in order."""
        return list(self.read_events(turn_id, after_number).events)

    def read_events(self, turn_id: str, after_number: int = 0) -> TurnEvents:
        """Return the turn's later events, and whether more may follow, in one consistent read."""
        is_later = and_(turn_events.c.turn_id == turns.c.id, turn_events.c.number > after_number)
        columns = select(turns.c.state, turn_events.c.number, turn_events.c.body)
        query = columns.select_from(turns.outerjoin(turn_events, is_later)).where(turns.c.id == turn_id)
        rows = self.fetch_all(query.order_by(turn_events.c.number))
        is_open = bool(rows) and rows[0].state in OPEN_STATES
        events = tuple((row.number, row.body) for row in rows if row.number is not None)
        return TurnEvents(is_open=is_open, events=events)

    def watch_events(self, turn_id: str) -> AbstractContextManager[AsyncWatch]:
        """Watch the turn in the running event loop; its events are delivered with their numbers."""
        return self.notifier.watch_async(turn_topic(turn_id))

    def wait_for_end(self, turn_id: str, owner: str) -> None:
        """Wait until the turn is no longer open."""
        with self.notifier.watch(turn_topic(turn_id)) as watch:
            while (turn := self.get_turn(turn_id, owner)) is not None and turn.state in OPEN_STATES:
                watch.wait()

    def collect_referenced_keys(self) -> set[str]:
        """Return the object keys of the previews and the attachments of open turns, and of what they have made so far.

        Those of ended turns may be swept, unless their threads refer to them.
        """
        is_open = turns.c.state.in_(OPEN_STATES)
        query = select(turn_events.c.body).join(turns, turns.c.id == turn_events.c.turn_id).where(is_open)
        bodies = [row.body for rows in (query, select(turns.c.body).where(is_open)) for row in self.fetch_all(rows)]
        return {key for body in bodies for key in find_object_keys(body)}

    # ------------------------------------------------------------ chats

    def find_chat_thread(self, owner: str, digest: str) -> tuple[str, int] | None:
        """Return the thread that a chat's messages belong to, and how many turns it had after them."""
        is_chat = and_(chat_threads.c.owner == owner, chat_threads.c.messages_digest == digest)
        row = self.fetch_one(select(chat_threads).where(is_chat))
        return None if row is None else (row.thread_id, row.turn_count)

    def save_chat_thread(self, owner: str, digest: str, thread_id: str, turn_count: int) -> None:
        values = {
            "owner": owner, "messages_digest": digest, "thread_id": thread_id, "turn_count": turn_count,
            "created_at": unix_now(),
        }  # fmt: skip
        insertion = self.insert_into(chat_threads).values(values)
        key_columns = [chat_threads.c.owner, chat_threads.c.messages_digest]
        new_values = {"thread_id": thread_id, "turn_count": turn_count, "created_at": unix_now()}
        self.fetch_all(insertion.on_conflict_do_update(index_elements=key_columns, set_=new_values))


def match_attempt(turn: TurnRecord) -> ColumnElement[bool]:
    """Match the turn as long as no other process has claimed it and it has not ended."""
    return and_(turns.c.id == turn.id, turns.c.attempt == turn.attempt, turns.c.state == "running")


def is_poisonous() -> ColumnElement[bool]:
    """Match the turns that one more loss ends."""
    return turns.c.process_losses >= MAX_PROCESS_LOSSES - 1


def match_lost(heartbeat_timeout_seconds: float) -> ColumnElement[bool]:
    """Match the running turns whose process has sent no heartbeat for the given time."""
    return and_(turns.c.state == "running", turns.c.heartbeat_at < unix_now() - heartbeat_timeout_seconds)
