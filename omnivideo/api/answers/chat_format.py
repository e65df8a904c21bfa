"""Answers in the format of OpenAI's chat completions: whole, or as the chunks of a stream."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from omnivideo.api.answers.answer import AnswerPart, Usage
from omnivideo.api.errors import APIError

FinishReason = Literal["stop", "length"]
ServerSentEvent = dict[str, str]


def to_chat_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


@dataclass(frozen=True)
class ChatFormat:
    """What all chunks of one completion share. With `shows_progress`, a stream tells how the work goes on.

    `extra_fields` are ours, beside those of OpenAI.
    """

    id: str
    created_at: int
    model: str
    shows_progress: bool = True
    includes_usage: bool = False  # as the last chunk of a stream
    extra_fields: dict[str, Any] = field(default_factory=dict)

    def build_completion(
        self, text: str, reasoning: str, usage: Usage, finish_reason: FinishReason = "stop"
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})
        choice = {"message": message, "finish_reason": finish_reason}
        return self.build_envelope("chat.completion", choice) | {"usage": to_chat_usage(usage)}

    # ------------------------------------------------------------ streams

    def begin_stream(self) -> ServerSentEvent:
        return self.build_chunk({"role": "assistant", "content": ""})

    def build_chunks(self, part: AnswerPart) -> Iterator[ServerSentEvent]:
        """Yield the chunk of an answer's part: text, reasoning, or news of the work in both forms that clients show.

        The news is a line of reasoning for most clients, and a status line for Open WebUI.
        """
        if part.kind == "text":
            yield self.build_chunk({"content": part.text})
        elif part.kind == "reasoning":
            yield self.build_chunk({"reasoning_content": part.text})
        elif part.kind == "progress" and self.shows_progress:
            # Open WebUI hides the line of an action that has ended: its result follows.
            data = {"description": part.text, "done": part.is_done, "hidden": part.is_done}
            status = {"type": "status", "data": data}
            yield self.build_chunk({"reasoning_content": part.reasoning}, event=status)

    def end_stream(self, finish_reason: FinishReason, usage: Usage | None) -> Iterator[ServerSentEvent]:
        yield self.build_chunk({}, finish_reason)
        if usage is not None:
            chunk = self.build_envelope("chat.completion.chunk", None) | {"usage": to_chat_usage(usage)}
            yield {"data": json.dumps(chunk)}
        yield {"data": "[DONE]"}

    def fail_stream(self, error: APIError) -> Iterator[ServerSentEvent]:
        yield {"data": json.dumps(error.to_event())}
        yield {"data": "[DONE]"}

    def build_chunk(
        self, delta: dict[str, Any], finish_reason: FinishReason | None = None, **fields: Any
    ) -> ServerSentEvent:
        choice = {"delta": delta, "finish_reason": finish_reason}
        chunk = self.build_envelope("chat.completion.chunk", choice) | fields
        return {"data": json.dumps(chunk | ({"usage": None} if self.includes_usage else {}))}

    def build_envelope(self, kind: str, choice: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created_at, "model": self.model, "system_fingerprint": None,
            "choices": [] if choice is None else [{"index": 0, "logprobs": None, **choice}], **self.extra_fields,
        }  # fmt: skip
