"""What a person reads of an answer that arrives in pieces: reasoning is separated, and stop sequences end the text."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from omnivideo.contracts import THINK_END, THINK_START

AnswerPiece = tuple[Literal["thinking", "text"], str]


def separate_reasoning(pieces: Iterable[str]) -> Iterator[AnswerPiece]:
    """Yield an answer's pieces as reasoning or text, without the marks, which may be split over several pieces.

    The text begins with its first visible character. A closing mark without an opening one is dropped.
    """
    is_thinking, has_text, pending = False, False, ""
    for piece in append_end(pieces):
        pending += piece or ""
        while pending:
            mark_start, mark = find_first_mark(pending)
            # A mark may continue in the next piece.
            ready = mark_start if mark else len(pending) - (0 if piece is None else count_mark_prefix(pending))
            visible, pending = pending[:ready], pending[ready:].removeprefix(mark)
            visible = visible if is_thinking or has_text else visible.lstrip()
            if visible:
                has_text = has_text or not is_thinking
                yield ("thinking" if is_thinking else "text"), visible
            if not mark:
                break
            is_thinking = mark == THINK_START


def append_end(pieces: Iterable[str]) -> Iterator[str | None]:
    yield from pieces
    yield None


def find_first_mark(text: str) -> tuple[int, str]:
    """Return where the first mark begins, and the mark; an empty mark if there is none."""
    found = [(text.find(mark), mark) for mark in (THINK_START, THINK_END) if mark in text]
    return min(found) if found else (len(text), "")


def count_mark_prefix(text: str) -> int:
    """Return the length of the longest end of the text that begins a mark."""
    lengths = range(min(len(text), len(THINK_END) - 1), 0, -1)
    return next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in (THINK_START, THINK_END))), 0)


def remove_reasoning(text: str) -> str:
    return "".join(piece for kind, piece in separate_reasoning([text]) if kind == "text").strip()


def end_at_stop(pieces: Iterable[AnswerPiece], stop: Sequence[str]) -> Iterator[AnswerPiece]:
    """Yield the pieces until the text contains one of the `stop` sequences, which is left out."""
    if not stop:
        yield from pieces
        return
    pending, longest = "", max(map(len, stop))
    for kind, piece in pieces:
        if kind == "thinking":
            yield kind, piece
            continue
        pending += piece
        found = [pending.find(sequence) for sequence in stop if sequence in pending]
        ready = min(found) if found else max(0, len(pending) - longest + 1)
        if ready:
            yield "text", pending[:ready]
        if found:
            return
        pending = pending[ready:]
    if pending:
        yield "text", pending


def split_rewrite(text: str) -> tuple[str, str]:
    """Split a think-mode answer into its reasoning and its rewrite, which is empty if the reasoning does not end."""
    before, mark, after = text.partition(THINK_END)
    return before.replace(THINK_START, "").strip(), remove_reasoning(after) if mark else ""
