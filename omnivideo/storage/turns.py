"""The service's threads: whose they are, the turns that run in them, and every event that a turn told.

A turn is run by one process at a time, which says that it lives; one that fell silent is taken over by another.  As
with jobs, what a process writes carries the number of its attempt.
"""

from collections.abc import Collection
from typing import Any, Literal

from sqlalchemy import Row, and_, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from omnivideo.contracts import Message
from omnivideo.errors import InvalidInput
from omnivideo.storage.database import Book, as_row, chats, events, now, threads, turns

OPEN = ("queued", "running")


class TurnRow(Message):
    """A turn as the service keeps it; `attempt` counts the processes that have run it."""

    id: str
    thread: str
    owner: str
    state: str
    number: int
    body: dict[str, Any]
    attempt: int
    error: dict[str, Any] | None
    made: float


class Turns(Book):
    # ------------------------------------------------------------ threads

    def add_thread(self, name: str, owner: str) -> None:
        """Raises InvalidInput where the id is taken."""
        try:
            self.all(insert(threads).values(id=name, owner=owner, made=now(), deleted=False))
        except IntegrityError:
            raise InvalidInput("thread", "that id is taken; give another, or none") from None

    def has_thread(self, name: str, owner: str) -> bool:
        mine = and_(threads.c.id == name, threads.c.owner == owner, threads.c.deleted.is_(False))
        return bool(self.all(select(threads.c.id).where(mine)))

    def threads_of(self, owner: str, limit: int) -> list[dict[str, Any]]:
        """The newest first."""
        mine = and_(threads.c.owner == owner, threads.c.deleted.is_(False))
        wanted = select(threads.c.id, threads.c.made).where(mine).order_by(threads.c.made.desc(), threads.c.id)
        return [dict(row._mapping) for row in self.all(wanted.limit(limit))]

    def drop_thread(self, name: str) -> None:
        self.all(update(threads).where(threads.c.id == name).values(deleted=True))

    def dropped(self) -> list[str]:
        return [row.id for row in self.all(select(threads.c.id).where(threads.c.deleted))]

    # ------------------------------------------------------------ turns

    def add(self, name: str, thread: str, owner: str, number: int, body: dict[str, Any]) -> TurnRow | None:
        """The new turn, or None while another one of the thread is open (one at a time), or where it is there."""
        busy = exists().where(turns.c.thread == thread, turns.c.state.in_(OPEN))
        values = {
            "id": name, "thread": thread, "owner": owner, "state": "queued",
            "number": number, "body": body, "attempt": 0, "cancel": False, "beat": now(), "made": now(),
        }  # fmt: skip
        new = self.insert(turns).from_select(list(values), as_row(turns, values).where(~busy))
        made = new.on_conflict_do_nothing().returning(turns)
        rows = self.all(made)
        return row_of(rows[0]) if rows else None

    def get(self, turn: str, owner: str) -> TurnRow | None:
        rows = self.all(select(turns).where(turns.c.id == turn, turns.c.owner == owner))
        return row_of(rows[0]) if rows else None

    def of_thread(self, thread: str) -> list[TurnRow]:
        return [row_of(row) for row in self.all(select(turns).where(turns.c.thread == thread).order_by(turns.c.made))]

    def claim(self, turn: str) -> TurnRow | None:
        """The turn for this process to run, or None where another one has it."""
        return self.take(and_(turns.c.id == turn, turns.c.state == "queued"))

    def claim_lost(self, silent: float) -> TurnRow | None:
        """A turn whose process has been silent for so many seconds, now this one's."""
        lost = and_(turns.c.state.in_(OPEN), turns.c.beat < now() - silent)
        first = select(turns.c.id).where(lost).limit(1).with_for_update(skip_locked=True).scalar_subquery()
        return self.take(and_(turns.c.id == first, lost))

    def take(self, which: Any) -> TurnRow | None:
        values = {"state": "running", "attempt": turns.c.attempt + 1, "beat": now()}
        rows = self.all(update(turns).where(which).values(values).returning(turns))
        return row_of(rows[0]) if rows else None

    def beat(self, turn: TurnRow) -> Literal["wanted", "cancelled", "lost"]:
        """This process lives and runs the turn; what became of it meanwhile."""
        rows = self.all(update(turns).where(fenced(turn)).values(beat=now()).returning(turns.c.cancel))
        return "lost" if not rows else "cancelled" if rows[0].cancel else "wanted"

    def cancel(self, turn: str) -> None:
        self.all(update(turns).where(turns.c.id == turn, turns.c.state.in_(OPEN)).values(cancel=True))

    def end(self, turn: TurnRow, state: str, error: dict[str, Any] | None = None) -> bool:
        """Whether it was this attempt's to end."""
        ended = update(turns).where(fenced(turn)).values(state=state, error=error, beat=now())
        return bool(self.all(ended.returning(turns.c.id)))

    # ------------------------------------------------------------ events

    def told(self, turn: TurnRow, number: int, event: dict[str, Any]) -> None:
        """Keeps the turn's event of that number; one that is there already stays as it is."""
        values = {"turn": turn.id, "number": number, "body": event, "made": now()}
        self.all(self.insert(events).values(values).on_conflict_do_nothing())

    def events_of(self, turn: str, after: int = 0) -> list[tuple[int, dict[str, Any]]]:
        wanted = select(events.c.number, events.c.body).where(events.c.turn == turn, events.c.number > after)
        return [(row.number, row.body) for row in self.all(wanted.order_by(events.c.number))]

    def fresh(self, which: Collection[str], seconds: float) -> tuple[list[tuple[str, int, dict[str, Any]]], set[str]]:
        """The last seconds' events of these turns, and which of the turns are not open any more."""
        young = and_(events.c.turn.in_(which), events.c.made > now() - seconds)
        # In this order: a turn that has ended has told all of its events before.
        closed = {
            row.id for row in self.all(select(turns.c.id).where(turns.c.id.in_(which), turns.c.state.not_in(OPEN)))
        }
        wanted = select(events.c.turn, events.c.number, events.c.body).where(young).order_by(events.c.number)
        return [(row.turn, row.number, row.body) for row in self.all(wanted)], closed

    # ------------------------------------------------------------ chats

    def chat(self, owner: str, digest: str) -> tuple[str, int] | None:
        """The thread that these messages belong to, and how many turns it had then."""
        rows = self.all(select(chats).where(chats.c.owner == owner, chats.c.digest == digest))
        return (rows[0].thread, rows[0].turns) if rows else None

    def keep_chat(self, owner: str, digest: str, thread: str, number: int) -> None:
        values = {"owner": owner, "digest": digest, "thread": thread, "turns": number, "made": now()}
        kept = self.insert(chats).values(values)
        which = [chats.c.owner, chats.c.digest]
        self.all(kept.on_conflict_do_update(index_elements=which, set_={"thread": thread, "turns": number}))


def fenced(turn: TurnRow) -> Any:
    return and_(turns.c.id == turn.id, turns.c.attempt == turn.attempt, turns.c.state == "running")


def row_of(row: Row[Any]) -> TurnRow:
    return TurnRow(**{name: getattr(row, name) for name in TurnRow.model_fields})
