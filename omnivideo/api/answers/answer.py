"""An answer to a chat client, built from the events of its turn: text, reasoning, and news of the work."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from omnivideo.agent.graph import NO_ANSWER_QUESTION
from omnivideo.api.answers.links import LinkBuilder
from omnivideo.api.answers.markup import describe_action, describe_artifact, describe_step, to_markdown
from omnivideo.api.errors import error_from_turn
from omnivideo.contracts import Artifact
from omnivideo.turns import TurnRecord

IDLE_SECONDS = 12.0  # without an event, until the client hears that the turn still runs


@dataclass(frozen=True)
class AnswerPart:
    """A piece of an answer. A "progress" is one line of news; `is_done` says that its action has ended.

    `interrupts_line` says that the reasoning before the news has not ended its line.
    """

    kind: Literal["text", "reasoning", "progress", "artifact"]
    text: str = ""
    is_done: bool = False
    interrupts_line: bool = False
    artifact: Artifact | None = None

    @property
    def reasoning(self) -> str:
        """The text as a client shows it among the reasoning."""
        if self.kind == "reasoning":
            return self.text
        return ("\n" if self.interrupts_line else "") + f"{self.text}\n"


class Usage(NamedTuple):
    """The numbers of tokens that clients are told. Links to media are not counted."""

    prompt: int
    text: int
    reasoning: int

    @property
    def completion(self) -> int:
        return self.text + self.reasoning

    @property
    def total(self) -> int:
        return self.prompt + self.completion


class ChatAnswer:
    """The answer so far.

    A turn that continues after an interruption repeats events: a plan begins the whole answer again, an action event
    its action. `position` is where in `text` the next text belongs; text that is there already is not added again.
    """

    def __init__(self, thread_id: str, links: LinkBuilder):
        self.thread_id, self.links = thread_id, links
        self.text, self.reasoning = "", ""
        self.artifacts: list[Artifact] = []
        self.position, self.needs_separator = 0, False
        self.action_positions: dict[int, int] = {}
        self.words_by_action: dict[int, str] = {}  # of the actions that are answered in words
        self.answered_index: int | None = None
        self.announced_tenth = 0
        self.is_within_line = False  # of the reasoning, with the news among it

    def read_events(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            for _ in self.read_event(event):
                pass

    def read_event(self, event: dict[str, Any]) -> Iterator[AnswerPart]:
        """Add an event to the answer, and yield what is new."""
        match event["kind"]:
            case "plan":
                self.position, self.needs_separator = 0, False
            case "action":
                yield from self.begin_action(event)
            case "thinking":
                self.reasoning += event["delta"]
                self.is_within_line = not event["delta"].endswith("\n")
                yield AnswerPart("reasoning", event["delta"])
            case "waiting":
                yield self.report_news(event["text"])
            case "idle":
                yield self.report_news(f"no news for {event['seconds']} s; still waiting")
            case "step" if 10 * event["step"] // event["steps"] > self.announced_tenth:
                self.announced_tenth = 10 * event["step"] // event["steps"]
                yield self.report_news(describe_step(event))
            case "text":
                if self.answered_index is not None:
                    self.words_by_action[self.answered_index] += event["delta"]
                yield from self.add_text(event["delta"])
            case "question":
                yield from self.add_block(event["text"])
            case "artifact" if event["final"]:
                yield from self.add_artifact(Artifact.parse_stored(event["artifact"]))

    def report_news(self, news: str, is_done: bool = False) -> AnswerPart:
        part = AnswerPart("progress", news, is_done, interrupts_line=self.is_within_line)
        self.is_within_line = False
        return part

    def begin_action(self, event: dict[str, Any]) -> Iterator[AnswerPart]:
        index = event["index"]
        self.position = self.action_positions.setdefault(index, self.position)
        self.needs_separator, self.announced_tenth = self.position > 0, 0
        self.answered_index = index if event["goal"] == "understand" else None
        self.words_by_action[index] = ""
        if event["goal"] in ("generate", "edit"):
            yield self.report_news(describe_action(event))

    def add_artifact(self, artifact: Artifact) -> Iterator[AnswerPart]:
        yield self.report_news("done", is_done=True)
        yield from self.add_block(describe_artifact(artifact))
        yield from self.add_block(to_markdown(artifact, self.thread_id, self.links))
        if artifact not in self.artifacts:
            self.artifacts.append(artifact)
            yield AnswerPart("artifact", artifact=artifact)

    def add_block(self, text: str) -> Iterator[AnswerPart]:
        """Add a paragraph of its own."""
        self.needs_separator = self.position > 0
        yield from self.add_text(text)
        self.needs_separator = True

    def add_text(self, delta: str) -> Iterator[AnswerPart]:
        delta, self.needs_separator = ("\n\n" if self.needs_separator else "") + delta, False
        given = self.text[self.position : self.position + len(delta)]
        if not delta.startswith(given):  # the repeated events differ from the first ones
            given, delta, self.position = "", f"\n\n{delta.lstrip()}", len(self.text)
        new = delta[len(given) :]
        self.text += new
        self.position += len(delta)
        if new:
            yield AnswerPart("text", new)

    def end(self, turn: TurnRecord) -> Iterator[AnswerPart]:
        """End the answer with the turn, and yield what is new: an error about a person's words, or a question.

        Raises the APIError of a turn that has failed for another reason, or that was cancelled.
        """
        if turn.state in ("failed", "cancelled"):
            error = error_from_turn(turn)
            if error.explanation is None:
                raise error
            yield from self.add_block(error.explanation)
        if not self.text.strip():
            yield from self.add_text(NO_ANSWER_QUESTION)

    # ------------------------------------------------------------ what clients are told about it

    def count_usage(self, prompt_tokens: int, count_tokens: Callable[[str], int]) -> Usage:
        text = self.text
        for artifact in self.artifacts:
            text = text.replace(to_markdown(artifact, self.thread_id, self.links), "")
        return Usage(prompt_tokens, *(count_tokens(part) if part else 0 for part in (text, self.reasoning)))

    def is_cut(self, max_tokens: int | None, count_tokens: Callable[[str], int]) -> bool:
        """Return whether an answer in words has ended because of the request's limit."""
        return max_tokens is not None and any(
            count_tokens(words) >= max_tokens for words in self.words_by_action.values() if words
        )
