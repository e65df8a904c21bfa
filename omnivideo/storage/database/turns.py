"""The service's threads: whose they are, the turns that run in them, and every event that a turn told.

A turn is run by one process at a time, which says that it lives; one that fell silent is taken over by another.  As
with jobs, what a process writes carries the number of its attempt.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

from sqlalchemy import Row, and_, exists, insert, literal, select, update
from sqlalchemy.exc import IntegrityError

from omnivideo.contracts import Change, TurnEvents, TurnRecord
from omnivideo.errors import InvalidInput
from omnivideo.storage.database.notifications import AsyncWatch, turn_topic
from omnivideo.storage.database.repository import Repository, select_values, unix_now
from omnivideo.storage.database.schema import chat_threads, threads, turn_events, turns

OPEN_STATES = ("queued", "running")
NumberedEvent = tuple[int, dict[str, Any]]  # numbers begin at 1


class TurnRepository(Repository):
    # ------------------------------------------------------------ threads

    def create_thread(self, thread_id: str, owner: str) -> None:
        """Raises InvalidInput where the id is taken."""
        try:
            self.fetch_all(insert(threads).values(id=thread_id, owner=owner, created_at=unix_now(), deleted=False))
        except IntegrityError:
            raise InvalidInput("thread", "that id is taken; give another, or none") from None

    def has_thread(self, thread_id: str, owner: str) -> bool:
        mine = and_(threads.c.id == thread_id, threads.c.owner == owner, threads.c.deleted.is_(False))
        return bool(self.fetch_all(select(threads.c.id).where(mine)))

    def list_threads(self, owner: str, limit: int) -> list[dict[str, Any]]:
        """The newest first."""
        mine = and_(threads.c.owner == owner, threads.c.deleted.is_(False))
        wanted = (
            select(threads.c.id, threads.c.created_at).where(mine).order_by(threads.c.created_at.desc(), threads.c.id)
        )
        return [dict(row._mapping) for row in self.fetch_all(wanted.limit(limit))]

    def delete_thread(self, thread_id: str) -> None:
        self.fetch_all(update(threads).where(threads.c.id == thread_id).values(deleted=True))

    def list_deleted_threads(self) -> list[str]:
        return [row.id for row in self.fetch_all(select(threads.c.id).where(threads.c.deleted))]

    # ------------------------------------------------------------ turns

    def create_turn(
        self, turn_id: str, thread_id: str, owner: str, number: int, body: dict[str, Any]
    ) -> TurnRecord | None:
        """The new turn, or None while another one of the thread is open (one at a time), or where it is there."""
        busy = exists().where(turns.c.thread_id == thread_id, turns.c.state.in_(OPEN_STATES))
        values = {
            "id": turn_id, "thread_id": thread_id, "owner": owner, "state": "queued",
            "number": number, "body": body, "attempt": 0,
            "cancel_requested": False, "heartbeat_at": unix_now(), "created_at": unix_now(),
        }  # fmt: skip
        new = self.insert_into(turns).from_select(list(values), select_values(turns, values).where(~busy))
        made = new.on_conflict_do_nothing().returning(turns)
        rows = self.fetch_all(made)
        return turn_from_row(rows[0]) if rows else None

    def get_turn(self, turn_id: str, owner: str) -> TurnRecord | None:
        rows = self.fetch_all(select(turns).where(turns.c.id == turn_id, turns.c.owner == owner))
        return turn_from_row(rows[0]) if rows else None

    def list_turns(self, thread_id: str) -> list[TurnRecord]:
        return [
            turn_from_row(row)
            for row in self.fetch_all(select(turns).where(turns.c.thread_id == thread_id).order_by(turns.c.created_at))
        ]

    def claim_turn(self, turn_id: str) -> TurnRecord | None:
        """The turn for this process to run, or None where another one has it."""
        return self.claim_where(and_(turns.c.id == turn_id, turns.c.state == "queued"))

    def claim_lost_turn(self, heartbeat_timeout_seconds: float) -> TurnRecord | None:
        """A turn whose process has been silent for so many seconds, now this one's."""
        lost = and_(turns.c.state.in_(OPEN_STATES), turns.c.heartbeat_at < unix_now() - heartbeat_timeout_seconds)
        first = select(turns.c.id).where(lost).limit(1).with_for_update(skip_locked=True).scalar_subquery()
        return self.claim_where(and_(turns.c.id == first, lost))

    def claim_where(self, condition: Any) -> TurnRecord | None:
        values = {"state": "running", "attempt": turns.c.attempt + 1, "heartbeat_at": unix_now()}
        rows = self.fetch_all(update(turns).where(condition).values(values).returning(turns))
        return turn_from_row(rows[0]) if rows else None

    def heartbeat(self, turn: TurnRecord) -> Literal["wanted", "cancelled", "lost"]:
        """This process lives and runs the turn; what became of it meanwhile."""
        rows = self.fetch_all(
            update(turns).where(match_attempt(turn)).values(heartbeat_at=unix_now()).returning(turns.c.cancel_requested)
        )
        return "lost" if not rows else "cancelled" if rows[0].cancel_requested else "wanted"

    def cancel_turn(self, turn_id: str) -> None:
        self.fetch_all(
            update(turns).where(turns.c.id == turn_id, turns.c.state.in_(OPEN_STATES)).values(cancel_requested=True)
        )

    def end_turn(self, turn: TurnRecord, state: str, error: dict[str, Any] | None = None) -> bool:
        """Whether it was this attempt's to end."""
        ending = update(turns).where(match_attempt(turn)).values(state=state, error=error, heartbeat_at=unix_now())
        notification = self.notifier.build_notification(literal("turn ") + turns.c.id)
        has_ended = bool(self.fetch_all(ending.returning(turns.c.id, notification)))
        self.notifier.publish(Change(topic=turn_topic(turn.id)))
        return has_ended

    # ------------------------------------------------------------ events

    def append_event(self, turn: TurnRecord, event: dict[str, Any]) -> bool:
        """Append an event under the turn's next number. Return False if another process runs the turn by now."""
        return self.append_turn_event(turns.c.id, turns, match_attempt(turn), event)

    def list_events(self, turn_id: str, after_number: int = 0) -> list[NumberedEvent]:
        """Return the events of a turn with a number above `after_number`, in order."""
        return list(self.read_events(turn_id, after_number).events)

    def read_events(self, turn_id: str, after_number: int = 0) -> TurnEvents:
        """Return the turn's later events, and whether more may follow, as they were at one moment."""
        is_later = and_(turn_events.c.turn_id == turns.c.id, turn_events.c.number > after_number)
        columns = select(turns.c.state, turn_events.c.number, turn_events.c.body)
        query = columns.select_from(turns.outerjoin(turn_events, is_later)).where(turns.c.id == turn_id)
        rows = self.fetch_all(query.order_by(turn_events.c.number))
        is_open = bool(rows) and rows[0].state in OPEN_STATES
        events = tuple((row.number, row.body) for row in rows if row.number is not None)
        return TurnEvents(is_open=is_open, events=events)

    def watch_events(self, turn_id: str) -> AbstractContextManager[AsyncWatch]:
        """Follow the turn in the running event loop; its events come with their numbers."""
        return self.notifier.watch_async(turn_topic(turn_id))

    def wait_for_end(self, turn_id: str, owner: str) -> None:
        """Wait until the turn is not open any more."""
        with self.notifier.watch(turn_topic(turn_id)) as watch:
            while (turn := self.get_turn(turn_id, owner)) is not None and turn.state in OPEN_STATES:
                watch.wait()

    def collect_referenced_keys(self) -> set[str]:
        """Return the object keys of the previews of open turns. Those of ended turns may be swept."""
        kind, key = turn_events.c.body["kind"].as_string(), turn_events.c.body["key"].as_string()
        is_shown = and_(turns.c.state.in_(OPEN_STATES), kind == "preview")
        query = select(key).select_from(turn_events.join(turns, turns.c.id == turn_events.c.turn_id)).where(is_shown)
        return {row[0] for row in self.fetch_all(query)}

    # ------------------------------------------------------------ chats

    def find_chat_thread(self, owner: str, digest: str) -> tuple[str, int] | None:
        """The thread that these messages belong to, and how many turns it had then."""
        rows = self.fetch_all(
            select(chat_threads).where(chat_threads.c.owner == owner, chat_threads.c.messages_digest == digest)
        )
        return (rows[0].thread_id, rows[0].turn_count) if rows else None

    def save_chat_thread(self, owner: str, digest: str, thread_id: str, turn_count: int) -> None:
        values = {
            "owner": owner, "messages_digest": digest, "thread_id": thread_id, "turn_count": turn_count,
            "created_at": unix_now(),
        }  # fmt: skip
        kept = self.insert_into(chat_threads).values(values)
        which = [chat_threads.c.owner, chat_threads.c.messages_digest]
        self.fetch_all(
            kept.on_conflict_do_update(index_elements=which, set_={"thread_id": thread_id, "turn_count": turn_count})
        )


def match_attempt(turn: TurnRecord) -> Any:
    return and_(turns.c.id == turn.id, turns.c.attempt == turn.attempt, turns.c.state == "running")


def turn_from_row(row: Row[Any]) -> TurnRecord:
    return TurnRecord(**{name: getattr(row, name) for name in TurnRecord.model_fields})
