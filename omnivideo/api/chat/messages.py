"""The messages of a chat, as clients send them, and the conversation that they show."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from omnivideo.api.chat.links import ArtifactLink, find_artifact_links, remove_addresses, remove_artifact_addresses
from omnivideo.api.chat.wrappers import Document, NamedFile, split_wrappers
from omnivideo.contracts import RequestModel

REASONING = re.compile(r"<think>.*?(?:</think>|\Z)|<details\b[^>]*type=\"reasoning\".*?</details>", re.DOTALL)
DIGEST_SUFFIX_TURNS = 2  # a history without its beginning is recognised by its last two turns


# ---------------------------------------------------------------- as clients send them


class MediaUrl(RequestModel):
    url: str


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ImagePart(RequestModel):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(RequestModel):
    type: Literal["video_url"]
    video_url: MediaUrl


class ChatFile(RequestModel):
    """A file of a message: its content as a data URL (`file_data`), or the id of an uploaded file."""

    filename: str = Field(default="", max_length=255)
    file_data: str | None = None
    file_id: str | None = Field(default=None, max_length=64)


class FilePart(RequestModel):
    type: Literal["file"]
    file: ChatFile


ContentPart = Annotated[TextPart | ImagePart | VideoPart | FilePart, Field(discriminator="type")]


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None

    @property
    def parts(self) -> list[Any]:
        if isinstance(self.content, list):
            return self.content
        return [TextPart(type="text", text=self.content)] if self.content else []

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))

    def list_media(self) -> list[tuple[str, str]]:
        """Return the message's images and clips: the name of the field, such as `content.1.image_url`, and the URL."""
        media = []
        for index, part in enumerate(self.parts):
            if isinstance(part, ImagePart):
                media.append((f"content.{index}.image_url", part.image_url.url))
            elif isinstance(part, VideoPart):
                media.append((f"content.{index}.video_url", part.video_url.url))
        return media

    def list_files(self) -> list[tuple[str, ChatFile]]:
        return [
            (f"content.{index}.file", part.file) for index, part in enumerate(self.parts) if isinstance(part, FilePart)
        ]


# ---------------------------------------------------------------- as a conversation


@dataclass(frozen=True)
class UserTurn:
    """What a user has said at once: words, media as (field, URL), files as (field, file), and what was wrapped around.

    `links` are artifacts of ours whose addresses stand in the words.
    """

    words: str
    media: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, ChatFile], ...] = ()
    documents: tuple[Document, ...] = ()
    named_files: tuple[NamedFile, ...] = ()
    links: tuple[ArtifactLink, ...] = ()

    @property
    def has_text(self) -> bool:
        return bool(self.words)

    @property
    def is_empty(self) -> bool:
        return not (self.words or self.media or self.files or self.documents or self.links or self.named_files)


@dataclass(frozen=True)
class Exchange:
    """A user's turn of the history and its answer; `is_answered` is False if an error or a stop came instead."""

    user: UserTurn
    answer: str = ""
    is_answered: bool = False

    @property
    def links(self) -> list[ArtifactLink]:
        return find_artifact_links(self.answer)


@dataclass(frozen=True)
class ShownConversation:
    """The conversation that the messages of one request show.

    `turn` is what the user has said last. `ending` is the role of the last message: "system" for a request about the
    conversation, "assistant" for an answer that is to be continued (`unfinished_answer`), "tool" for the result of a
    tool (`tool_results`).
    """

    instructions: str
    history: tuple[Exchange, ...]
    turn: UserTurn
    ending: Literal["user", "assistant", "tool", "system"]
    unfinished_answer: str = ""
    tool_results: tuple[str, ...] = ()


@dataclass
class ConversationReader:
    """Reads messages one after the other into exchanges."""

    instructions: list[str] = field(default_factory=list)
    history: list[Exchange] = field(default_factory=list)
    open_turns: list[UserTurn] = field(default_factory=list)  # of the user's messages since the last answer
    tool_results: list[str] = field(default_factory=list)

    def read(self, messages: Sequence[ChatMessage]) -> ShownConversation:
        last_role = messages[-1].role
        for index, message in enumerate(messages):
            if message.role in ("system", "developer"):
                self.instructions.append(message.text.strip())
            elif message.role == "user":
                self.tool_results.clear()
                self.open_turns.append(read_user_turn(message, f"messages.{index}"))
            elif message.role == "assistant":
                self.close_turn(message.text)
            else:
                self.tool_results.append(message.text.strip())
        if last_role == "user":
            return self.finish("user")
        if last_role in ("system", "developer"):
            task = UserTurn(self.instructions.pop())
            self.close_turn(None)
            return replace(self.finish("system"), turn=task)
        # The last exchange is still going on: its answer is unfinished, or waits for the result of a tool.
        last = self.history.pop() if self.history and not self.open_turns else Exchange(UserTurn(""))
        self.open_turns = self.open_turns or [last.user]
        shown = self.finish("assistant" if last_role == "assistant" else "tool")
        return replace(shown, unfinished_answer=last.answer if last_role == "assistant" else "")

    def finish(self, ending: Literal["user", "assistant", "tool", "system"]) -> ShownConversation:
        turns = join_turns(self.open_turns)
        turn = turns.pop() if turns else UserTurn("")
        self.history += [Exchange(unanswered) for unanswered in turns]
        instructions = "\n\n".join(text for text in self.instructions if text)
        return ShownConversation(instructions, tuple(self.history), turn, ending, tool_results=tuple(self.tool_results))

    def close_turn(self, answer: str | None) -> None:
        """End the user's turn with an answer, or with None for none. A further answer is added to the last one."""
        turns = join_turns(self.open_turns)
        self.open_turns = []
        if not turns:
            if self.history and answer:
                last = self.history.pop()
                self.history.append(Exchange(last.user, f"{last.answer}\n{answer}".strip(), True))
            elif answer and find_artifact_links(answer):  # the beginning of the history is missing
                self.history.append(Exchange(UserTurn(""), answer, True))
            return
        self.history += [Exchange(unanswered) for unanswered in turns[:-1]]
        self.history.append(Exchange(turns[-1], answer or "", answer is not None))


def read_conversation(messages: Sequence[ChatMessage]) -> ShownConversation:
    """Return the conversation that messages show."""
    return ConversationReader().read(messages)


def read_user_turn(message: ChatMessage, field_name: str) -> UserTurn:
    """Return one message of a user, with its wrappers split off."""
    split = split_wrappers(message.text)
    media = [(f"{field_name}.{name}", url) for name, url in message.list_media()]
    addresses = {url for _, url in media}
    for file in split.named_files:  # a tag may contain the file itself
        if file.is_media and (file.address.startswith("data:") or find_artifact_links(file.address)):
            media += [(f"{field_name}.content", file.address)] * (file.address not in addresses)
    links = find_artifact_links(split.words)
    return UserTurn(
        words=remove_artifact_addresses(split.words).strip() if links else split.words,
        media=tuple(media),
        files=tuple((f"{field_name}.{name}", file) for name, file in message.list_files()),
        documents=split.documents,
        named_files=split.named_files,
        links=tuple(links),
    )


def join_turns(messages: Sequence[UserTurn]) -> list[UserTurn]:
    """Join a user's consecutive messages: those without words belong to the next one with words.

    Some clients send a picture and the words about it as two messages. Messages without words at the end belong to the
    last one with words.
    """
    turns: list[UserTurn] = []
    pending: list[UserTurn] = []
    for message in messages:
        pending.append(message)
        if message.has_text:
            turns.append(merge_turns(pending))
            pending = []
    if pending:
        turns.append(merge_turns([*([turns.pop()] if turns else []), *pending]))
    return turns


def merge_turns(messages: Sequence[UserTurn]) -> UserTurn:
    """Return several messages as one turn."""
    if len(messages) == 1:
        return messages[0]

    def chain(name: str) -> tuple[Any, ...]:
        return tuple(item for message in messages for item in getattr(message, name))

    words = "\n".join(message.words for message in messages if message.words)
    return UserTurn(words, *(chain(name) for name in ("media", "files", "documents", "named_files", "links")))


# ---------------------------------------------------------------- what stays the same in every client's form


def normalize_words(text: str) -> str:
    """Return a text as it is compared: without reasoning, addresses, case and differences of white space."""
    return " ".join(remove_addresses(REASONING.sub(" ", text)).split()).casefold()


def list_media_marks(turn: UserTurn) -> list[str]:
    """Return what identifies each of a turn's media, in order: the artifact's key, or a digest of its URL."""
    links = [link for _, url in turn.media for link in find_artifact_links(url)]
    others = [url for _, url in turn.media if not find_artifact_links(url)]
    files = [file.file_id or file.file_data or file.filename for _, file in turn.files]
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in (*others, *files)]
    return [link.key for link in (*links, *turn.links)] + digests


def digest_turns(turns: Iterable[UserTurn]) -> str:
    """Return a digest of what the user has said and shown.

    The answers do not count, since clients change them most: they cut them off, remove links, or keep reasoning.
    """
    content = [[normalize_words(turn.words), list_media_marks(turn)] for turn in turns]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def list_history_digests(turns: Sequence[UserTurn]) -> list[str]:
    """Return the digests under which a history is found: of all its turns, then of the last ones alone."""
    digests = [digest_turns(turns)]
    if len(turns) >= DIGEST_SUFFIX_TURNS:
        digests.append("..." + digest_turns(turns[-DIGEST_SUFFIX_TURNS:])[3:])
    return digests
