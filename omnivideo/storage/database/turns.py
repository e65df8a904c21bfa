"""The service's threads: whose they are, the turns that run in them, and every event that a turn told.

A turn is run by one process at a time, which says that it lives; one that fell silent is taken over by another.  As
with jobs, what a process writes carries the number of its attempt.
"""

from collections.abc import Collection
from typing import Any, Literal

from sqlalchemy import Row, and_, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from omnivideo.contracts import TurnRecord
from omnivideo.errors import InvalidInput
from omnivideo.storage.database.repository import Repository, select_values, unix_now
from omnivideo.storage.database.schema import chat_threads, threads, turn_events, turns

OPEN_STATES = ("queued", "running")


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
        ended = update(turns).where(match_attempt(turn)).values(state=state, error=error, heartbeat_at=unix_now())
        return bool(self.fetch_all(ended.returning(turns.c.id)))

    # ------------------------------------------------------------ events

    def append_event(self, turn: TurnRecord, number: int, event: dict[str, Any]) -> None:
        """Keeps the turn's event of that number; one that is there already stays as it is."""
        values = {"turn_id": turn.id, "number": number, "body": event, "created_at": unix_now()}
        self.fetch_all(self.insert_into(turn_events).values(values).on_conflict_do_nothing())

    def list_events(self, turn_id: str, after_number: int = 0) -> list[tuple[int, dict[str, Any]]]:
        wanted = select(turn_events.c.number, turn_events.c.body).where(
            turn_events.c.turn_id == turn_id, turn_events.c.number > after_number
        )
        return [(row.number, row.body) for row in self.fetch_all(wanted.order_by(turn_events.c.number))]

    def list_recent_events(
        self, turn_ids: Collection[str], max_age_seconds: float
    ) -> tuple[list[tuple[str, int, dict[str, Any]]], set[str]]:
        """The last seconds' events of these turns, and which of the turns are not open any more."""
        young = and_(turn_events.c.turn_id.in_(turn_ids), turn_events.c.created_at > unix_now() - max_age_seconds)
        # In this order: a turn that has ended has told all of its events before.
        closed = {
            row.id
            for row in self.fetch_all(
                select(turns.c.id).where(turns.c.id.in_(turn_ids), turns.c.state.not_in(OPEN_STATES))
            )
        }
        wanted = (
            select(turn_events.c.turn_id, turn_events.c.number, turn_events.c.body)
            .where(young)
            .order_by(turn_events.c.number)
        )
        return [(row.turn_id, row.number, row.body) for row in self.fetch_all(wanted)], closed

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
