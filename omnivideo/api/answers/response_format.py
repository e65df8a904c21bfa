"""Answers in the format of OpenAI's responses: the response object, its output items, and the events of a stream."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from omnivideo.api.answers.answer import AnswerPart, Usage
from omnivideo.api.errors import APIError
from omnivideo.contracts import Artifact

ServerSentEvent = dict[str, str]
LoadPicture = Callable[[Artifact], tuple[bytes, str]]  # an artifact to a picture's bytes and file suffix
STATUSES = {"queued": "queued", "running": "in_progress", "done": "completed", "asks": "completed"}
# Error codes that clients' types know; all others are "server_error".
RESPONSE_ERROR_CODES = {429: "rate_limit_exceeded"}


def to_response_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.total,
    }


@dataclass
class ResponseWriter:
    """Writes one response: `fields` are those that the request decides, `suffix` is the end of its items' ids.

    Each method yields the events of a stream, whose numbers continue from one call to the next. An output item holds
    text, reasoning or a picture; the item that is open receives further pieces of its kind.
    """

    fields: dict[str, Any]
    suffix: str
    load_picture: LoadPicture
    shows_progress: bool = True
    output: list[dict[str, Any]] = field(default_factory=list)
    open_kind: str | None = None
    sequence_number: int = 0

    # ------------------------------------------------------------ the response object

    def build_response(
        self, status: str, usage: Usage | None = None, error: APIError | None = None, is_cut: bool = False
    ) -> dict[str, Any]:
        ending = {
            "status": "incomplete" if is_cut else status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": None if usage is None else to_response_usage(usage),
            "error": None,
        }
        if error is not None:
            code = RESPONSE_ERROR_CODES.get(error.status_code, "server_error")
            ending |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return self.fields | ending | {"output": self.output}

    # ------------------------------------------------------------ streams

    def begin(self) -> Iterator[ServerSentEvent]:
        yield self.build_event("response.created", response=self.build_response("in_progress"))
        yield self.build_event("response.in_progress", response=self.build_response("in_progress"))

    def add(self, part: AnswerPart) -> Iterator[ServerSentEvent]:
        """Add an answer's part. A picture, or a clip's animated one, is read from the store."""
        if part.kind == "artifact":
            assert part.artifact is not None
            yield from self.add_picture(part.artifact)
        elif part.kind == "text":
            yield from self.add_piece("message", part.text)
        elif part.kind == "reasoning" or self.shows_progress:
            yield from self.add_piece("reasoning", part.reasoning)

    def end(self, response: dict[str, Any]) -> Iterator[ServerSentEvent]:
        """End the stream with the response, which says how it ended."""
        yield from self.close_item()
        kind = response["status"] if response["status"] in ("completed", "incomplete", "failed") else "failed"
        yield self.build_event(f"response.{kind}", response=response)

    def build_event(self, kind: str, **fields: Any) -> ServerSentEvent:
        event = {"type": kind, "sequence_number": self.sequence_number, **fields}
        self.sequence_number += 1
        return {"event": kind, "data": json.dumps(event)}

    # ------------------------------------------------------------ output items

    def add_piece(self, kind: str, delta: str) -> Iterator[ServerSentEvent]:
        if self.open_kind != kind:
            yield from self.close_item()
            yield from self.open_item(kind)
        item = self.output[-1]
        if kind == "message":
            item["content"][0]["text"] += delta
            place = {"content_index": 0, "logprobs": []}
            yield self.build_item_event("response.output_text.delta", delta=delta, **place)
        else:
            item["summary"][0]["text"] += delta
            yield self.build_item_event("response.reasoning_summary_text.delta", delta=delta, summary_index=0)

    def open_item(self, kind: str) -> Iterator[ServerSentEvent]:
        prefix = {"message": "msg", "reasoning": "rs"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{self.suffix}_{len(self.output)}", "type": kind}
        item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": []}
        self.output.append(item | {"status": "in_progress"})
        self.open_kind, item = kind, self.output[-1]
        yield self.build_event("response.output_item.added", output_index=len(self.output) - 1, item=item)
        if kind == "message":
            item["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
            yield self.build_item_event("response.content_part.added", content_index=0, part=item["content"][0])
        else:
            item["summary"].append({"type": "summary_text", "text": ""})
            yield self.build_item_event(
                "response.reasoning_summary_part.added", summary_index=0, part=item["summary"][0]
            )

    def close_item(self) -> Iterator[ServerSentEvent]:
        if self.open_kind is None:
            return
        item = self.output[-1]
        if self.open_kind == "message":
            part, place = item["content"][0], {"content_index": 0}
            yield self.build_item_event("response.output_text.done", text=part["text"], logprobs=[], **place)
            yield self.build_item_event("response.content_part.done", part=part, **place)
        else:
            part, place = item["summary"][0], {"summary_index": 0}
            yield self.build_item_event("response.reasoning_summary_text.done", text=part["text"], **place)
            yield self.build_item_event("response.reasoning_summary_part.done", part=part, **place)
        self.open_kind, item["status"] = None, "completed"
        yield self.build_event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def add_picture(self, artifact: Artifact) -> Iterator[ServerSentEvent]:
        yield from self.close_item()
        item = {"id": f"ig_{self.suffix}_{len(self.output)}", "type": "image_generation_call", "status": "in_progress"}
        self.output.append(item | {"result": None})
        item = self.output[-1]
        yield self.build_event("response.output_item.added", output_index=len(self.output) - 1, item=item)
        yield self.build_item_event("response.image_generation_call.in_progress")
        data, suffix = self.load_picture(artifact)
        item |= {
            "status": "completed",
            "result": base64.b64encode(data).decode(),
            "output_format": suffix,
            "size": f"{artifact.width}x{artifact.height}",
            "action": "edit" if artifact.source else "generate",
            "revised_prompt": artifact.caption,
        }
        yield self.build_item_event("response.image_generation_call.completed")
        yield self.build_event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def build_item_event(self, kind: str, **fields: Any) -> ServerSentEvent:
        """Return an event of the last item."""
        index = len(self.output) - 1
        return self.build_event(kind, item_id=self.output[index]["id"], output_index=index, **fields)
