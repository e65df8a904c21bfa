"""Chat as OpenAI's clients speak it.

Such a client sends all messages every time and knows nothing of threads, so the messages themselves say which thread
they belong to: after each answer the digest of all messages so far is kept with the thread and its number of turns.
Messages that lead back to an earlier answer go on from there, in a fork if the thread has grown since; messages that
were never seen here begin a new thread with the last one.
"""

import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from omnivideo.api.errors import OURS, REFUSALS, WireError, body
from omnivideo.api.events import Feed
from omnivideo.api.forms import name_for, validated
from omnivideo.api.media import Part, artifact_of
from omnivideo.api.rooms import Owner, Room, Rooms
from omnivideo.api.threads import feed_of
from omnivideo.contracts import MOST_SEED, Artifact, Think

router = APIRouter(prefix="/v1", tags=["chat"], responses=REFUSALS)


class Url(BaseModel):
    url: str


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: Url


ContentPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None

    @property
    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        shown = [part for part in self.content or [] if isinstance(part, ImagePart | VideoPart)]
        return [(part.image_url if isinstance(part, ImagePart) else part.video_url).url for part in shown]


class StreamOptions(BaseModel):
    include_usage: bool = False


class NewChat(BaseModel):
    """`think`, `check`, `seed`, `steps` and `guidance_scale` are for this turn, as in a thread."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=1)
    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30)


@router.get("/models")
def models(rooms: Room, owner: Owner) -> dict[str, Any]:
    """What may stand in `model`."""
    return {"object": "list", "data": [card(rooms.settings.preset)]}


@router.get("/models/{name}")
def model(name: str, rooms: Room, owner: Owner) -> dict[str, Any]:
    known(rooms, name)
    return card(name)


def card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "omnivideo"}


def known(rooms: Rooms, name: str) -> None:
    if name != rooms.settings.preset:
        text = f"model: there is no {name[:100]!r} here, but {rooms.settings.preset!r}"
        raise WireError(404, text, "model", "model_not_found")


def digest_of(messages: list[ChatMessage]) -> str:
    """Of the words and media of all messages; what they carry besides does not matter."""
    plain = [[one.role, one.text, one.urls] for one in messages]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


class Talk:
    """One answer: the thread it is said in, and the turn that is its making."""

    def __init__(self, rooms: Rooms, owner: str, wanted: NewChat, base: str = "/"):
        self.rooms, self.owner, self.wanted, self.base = rooms, owner, wanted, base
        self.runner = rooms.runner
        self.id, self.made = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.thread, self.turn, self.said = "", "", ""

    def begin(self) -> None:
        known(self.rooms, self.wanted.model)
        last = self.wanted.messages[-1]
        if last.role != "user" or not last.text.strip():
            raise WireError(400, "messages: the last one must be the user's, with some text", "messages")
        self.thread = self.find()
        parts = [Part(url=url) for url in last.urls]
        shown = [artifact_of(self.rooms, self.owner, part, f"{self.thread}/attached") for part in parts]
        options = self.wanted.model_dump(include={"think", "check", "seed", "steps", "guidance_scale"})
        turn = name_for("turn", self.owner, None)
        self.turn = self.runner.begin(turn, self.owner, self.thread, last.text, shown, **options).id

    def find(self) -> str:
        """The thread of the messages before the last one."""
        found = self.rooms.turns.chat(self.owner, digest_of(self.wanted.messages[:-1]))
        name = uuid.uuid4().hex[:16]
        if found is not None:
            thread = self.runner.thread(self.owner, found[0])
            if len(thread.history()) == found[1]:
                return str(found[0])
            self.rooms.turns.add_thread(name, self.owner)
            thread.fork(found[1], name)
            return name
        self.rooms.turns.add_thread(name, self.owner)
        self.rooms.conversations.thread(name, create=True, owner=self.owner)
        return name

    def words(self, event: dict[str, Any]) -> str:
        """What an event adds to the answer's text."""
        match event["kind"]:
            case "text":
                return str(event["piece"])
            case "question":
                return str(event["text"])
            case "artifact" if event["final"]:
                return self.link(Artifact(**event["artifact"]))
        return ""

    def link(self, artifact: Artifact) -> str:
        """A clip or a picture as Markdown shows it."""
        where = f"{self.base}v1/threads/{self.thread}/artifacts/{artifact.key}"
        return f"\n![{artifact.medium}]({where})\n"

    def end(self) -> None:
        """Remembers where these messages lead to; raises what ended the turn before its end."""
        row = self.rooms.turns.get(self.turn, self.owner)
        if row.state in ("failed", "cancelled"):
            error = row.error or {"message": "the turn was cancelled", "param": None, "code": "cancelled"}
            status = 500 if error.get("type") == "server_error" else 409 if row.error is None else 400
            raise WireError(status, error["message"], error["param"], error["code"])
        mine = ChatMessage(role="assistant", content=self.said)
        turns = len(self.runner.thread(self.owner, self.thread).history())
        digest = digest_of([*self.wanted.messages, mine])
        self.rooms.turns.keep_chat(self.owner, digest, self.thread, turns)

    # ------------------------------------------------------------ on the wire

    def ended(self) -> dict[str, Any]:
        """The whole answer of a turn that is over."""
        told = [event for _, event in self.rooms.turns.events_of(self.turn)]
        self.said = "".join(map(self.words, told))
        thought = "".join(event["piece"] for event in told if event["kind"] == "thinking")
        self.end()
        message = {"role": "assistant", "content": self.said}
        if thought:
            message["reasoning_content"] = thought
        return self.envelope("chat.completion", {"message": message, "finish_reason": "stop"})

    async def pieces(self, feed: Feed) -> AsyncIterator[dict[str, str]]:
        yield self.chunk({"role": "assistant", "content": ""})
        async for _, event in feed.follow(self.turn):
            if text := self.words(event):
                self.said += text
                yield self.chunk({"content": text})
            elif event["kind"] == "thinking":
                yield self.chunk({"reasoning_content": event["piece"]})
            elif event["kind"] == "waiting":  # where a person sees it
                yield self.chunk({"reasoning_content": f"\n{event['text']}\n"})
            elif event["kind"] == "step":
                yield {"comment": f"step {event['step']} of {event['steps']}"}
        try:
            await anyio.to_thread.run_sync(self.end)
        except WireError as error:
            yield {"data": json.dumps(body(error.status, error.message, error.param, error.code))}
        except Exception:
            yield {"data": json.dumps(body(500, OURS, None, "internal"))}
        else:
            yield self.chunk({}, finish="stop")
        yield {"data": "[DONE]"}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, str]:
        made = self.envelope("chat.completion.chunk", {"delta": delta, "finish_reason": finish})
        return {"data": json.dumps(made)}

    def envelope(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.made, "model": self.wanted.model,
            "choices": [{"index": 0, "logprobs": None, **choice}],
            "omnivideo": {"thread": self.thread, "turn": self.turn},
        }  # fmt: skip


@router.post("/chat/completions", response_class=JSONResponse)
async def completions(wanted: NewChat, request: Request, rooms: Room, owner: Owner) -> Response:
    """Says the last message in the conversation that the earlier ones are."""
    talk = Talk(rooms, owner, wanted, str(request.base_url))
    await anyio.to_thread.run_sync(talk.begin)
    if wanted.stream:
        return EventSourceResponse(talk.pieces(feed_of(request)), ping=15)
    async for _ in feed_of(request).follow(talk.turn):
        pass
    return JSONResponse(await anyio.to_thread.run_sync(talk.ended))


def say(rooms: Rooms, owner: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A batch's line: the answer as the route would give it, waited for here.  Raises OmniVideoError or WireError."""
    talk = Talk(rooms, owner, validated(NewChat, fields))
    talk.begin()
    while rooms.turns.get(talk.turn, owner).state in ("queued", "running"):
        time.sleep(0.05)
    return talk.ended()
