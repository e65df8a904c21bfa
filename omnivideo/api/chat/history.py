"""Find the thread that a chat's history belongs to, whatever the client has made of the history.

In this order: the addresses in our answers, which name the thread and the artifact; a digest of what the user has said;
and a new thread, rebuilt from what the messages show. A history that ends before the thread does continues in a fork.
"""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from omnivideo.agent.thread import Thread
from omnivideo.api.chat.links import ArtifactLink
from omnivideo.api.chat.media import find_artifact, read_turn_media
from omnivideo.api.chat.messages import Exchange, ShownConversation, UserTurn, list_history_digests, normalize_words
from omnivideo.api.dependencies import ServiceContext
from omnivideo.contracts import Artifact
from omnivideo.errors import OmniVideoError
from omnivideo.turns import Turn

MAX_REBUILT_EXCHANGES, MAX_LINKS_PER_ANSWER = 50, 16  # of a history whose media is read


@dataclass(frozen=True)
class KnownTurn:
    """What a user has said in a thread. `num_turns` is the number of turns that it completes, or None for a request
    that led to a question; `is_open` says that the question still waits for its reply."""

    words: str
    num_turns: int | None
    is_open: bool = False


@dataclass(frozen=True)
class Position:
    """A place in a thread: after `num_turns` turns, or at the open question that follows them.

    `unmatched` are the exchanges of the history that the thread does not have.
    """

    thread_id: str
    num_turns: int
    at_question: bool = False
    unmatched: tuple[Exchange, ...] = ()


class ThreadFinder:
    """Finds or creates the thread in which an owner's conversation continues."""

    def __init__(self, context: ServiceContext, owner: str):
        self.context, self.owner = context, owner

    def open_thread(self, conversation: ShownConversation, may_continue: bool = True) -> str:
        """Return the id of a thread in which the conversation's history has just happened.

        It is an existing thread only if `may_continue` is set and nothing else has happened in it.
        """
        position = self.find_position(conversation.history)
        new_media = self.collect_media(position.unmatched if position else conversation.history)
        if position is not None and may_continue and not new_media and self.is_current(position):
            return position.thread_id
        new_id = uuid.uuid4().hex[:16]
        if position is None:
            self.context.turns.create_thread(new_id, self.owner)
        else:
            self.context.turns.create_thread(new_id, self.owner, position.thread_id, position.num_turns)
        thread = self.get_thread(new_id)
        if new_media:
            thread.ensure_state().add_artifacts(new_media)
        return new_id

    def remember(self, conversation: ShownConversation, thread_id: str, num_turns: int) -> None:
        """Store that a thread has this conversation, including its last turn."""
        turns = [*answered_turns(conversation.history), conversation.turn]
        for digest in list_history_digests(turns):
            self.context.turns.save_chat_thread(self.owner, digest, thread_id, num_turns)

    def find_turn(self, conversation: ShownConversation) -> Turn | None:
        """Return the completed turn of the conversation's last message and its answer, or None if there is none."""
        shown = Exchange(conversation.turn, conversation.unfinished_answer, True)
        position = self.find_position([*conversation.history, shown])
        if position is None or position.unmatched or not position.num_turns:
            return None
        return self.get_thread(position.thread_id).get_turn(position.num_turns)

    def get_thread(self, thread_id: str) -> Thread:
        return self.context.turn_runner.get_thread(self.owner, thread_id)

    # ------------------------------------------------------------ finding

    def find_position(self, history: Sequence[Exchange]) -> Position | None:
        """Return where the history ends, or None if no thread has any of it."""
        by_address = self.find_by_address(history)
        if by_address is not None and not any(exchange.is_answered for exchange in by_address.unmatched):
            return by_address
        return self.find_by_digest(history) or by_address

    def find_by_address(self, history: Sequence[Exchange]) -> Position | None:
        """Return the position after the last answer with an address of ours, moved on by the exchanges after it."""
        for index in range(len(history) - 1, -1, -1):
            for link in reversed(history[index].links[:MAX_LINKS_PER_ANSWER]):
                known = self.list_known_turns(link.thread_id)
                if (start := find_turn_with_artifact(known, link)) is not None:
                    return follow_history(known.thread_id, known.turns, start, history[index + 1 :])
        return None

    def find_by_digest(self, history: Sequence[Exchange]) -> Position | None:
        turns = answered_turns(history)
        if not turns:
            return None
        unanswered = tuple(exchange for exchange in history if not exchange.is_answered)
        for digest in list_history_digests(turns):
            found = self.context.turns.find_chat_thread(self.owner, digest)
            if found is not None and self.context.turns.has_thread(found[0], self.owner):
                known = self.list_known_turns(found[0]).turns
                last_words = normalize_words(turns[-1].words)
                at_question = bool(known) and known[-1].is_open and normalize_words(known[-1].words) == last_words
                return Position(found[0], found[1], at_question, unanswered)
        return None

    def is_current(self, position: Position) -> bool:
        """Return whether the thread stands at the position; a running turn is found when the next one is created."""
        progress = self.get_thread(position.thread_id).get_progress()
        return (progress.num_turns, progress.question is not None) == (position.num_turns, position.at_question)

    def list_known_turns(self, thread_id: str) -> "KnownThread":
        """Return what was said and made in a thread of the owner; nothing for any other thread."""
        if not self.context.turns.has_thread(thread_id, self.owner):
            return KnownThread(thread_id, (), ())
        thread = self.get_thread(thread_id)
        known, keys = list[KnownTurn](), list[tuple[str, int]]()
        completed = thread.get_turns()
        for turn in completed:
            known += [KnownTurn(text, None) for text in (turn.text, *(reply for _, reply in turn.clarifications))]
            known[-1] = KnownTurn(known[-1].words, turn.number)
            artifacts = [*turn.attachments, *(result.artifact for result in turn.results if result.artifact)]
            keys += [(artifact.key, len(known) - 1) for artifact in artifacts]
        if thread.get_open_question() is not None:
            rows = self.context.turns.list_turns(thread.id)
            asked = [row for row in rows if row.state == "asks" and row.number == len(completed) + 1]
            known += [KnownTurn(row.body["text"], None, is_open=row is asked[-1]) for row in asked]
        return KnownThread(thread.id, tuple(known), tuple(keys))

    # ------------------------------------------------------------ rebuilding

    def collect_media(self, exchanges: Sequence[Exchange]) -> list[Artifact]:
        """Return the media that exchanges show, in order. Media that cannot be read any more is left out."""
        artifacts = list[Artifact]()
        for exchange in exchanges[-MAX_REBUILT_EXCHANGES:]:
            with suppress(OmniVideoError):  # the request is about the last message; an old picture may be gone
                artifacts += read_turn_media(self.context, self.owner, exchange.user, "chat/history")
            for link in exchange.links[:MAX_LINKS_PER_ANSWER]:
                if (artifact := find_artifact(self.context, self.owner, link)) is not None:
                    artifacts.append(artifact)
        return list({artifact.key: artifact for artifact in artifacts}.values())


@dataclass(frozen=True)
class KnownThread:
    """What was said in a thread, and after which of its `turns` each artifact existed, as (key, index)."""

    thread_id: str
    turns: tuple[KnownTurn, ...]
    artifact_turns: tuple[tuple[str, int], ...]


def answered_turns(history: Sequence[Exchange]) -> list[UserTurn]:
    return [exchange.user for exchange in history if exchange.is_answered and not exchange.user.is_empty]


def find_turn_with_artifact(known: KnownThread, link: ArtifactLink) -> int | None:
    """Return the index of the turn that an artifact belongs to, or None if the thread does not have it."""
    return next((index for key, index in known.artifact_turns if key == link.key), None)


def follow_history(
    thread_id: str, known: Sequence[KnownTurn], start: int, later_exchanges: Sequence[Exchange]
) -> Position:
    """Return the position that exchanges lead to after the turn `start`, as far as the thread has them."""
    index, unmatched = start, list[Exchange]()
    for exchange in later_exchanges:
        is_next = index + 1 < len(known) and same_words(known[index + 1].words, exchange.user.words)
        if exchange.is_answered and is_next and not any(earlier.is_answered for earlier in unmatched):
            index += 1
        else:
            unmatched.append(exchange)
    if known[index].is_open:
        return Position(thread_id, count_turns(known, index), True, tuple(unmatched))
    return Position(thread_id, count_turns(known, index), False, tuple(unmatched))


def count_turns(known: Sequence[KnownTurn], index: int) -> int:
    """Return the number of turns that are complete once the user has said `known[index]`."""
    return next((turn.num_turns for turn in reversed(known[: index + 1]) if turn.num_turns is not None), 0)


def same_words(first: str, second: str) -> bool:
    return normalize_words(first) == normalize_words(second)
