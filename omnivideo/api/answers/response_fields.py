"""The fields of requests for a response, in the format of OpenAI's clients, and their messages in the chat's form."""

import base64
from typing import Annotated, Any, Literal

from pydantic import Field

from omnivideo.api.answers.sampling_fields import MaxTokens, NoneOf, SamplingFields
from omnivideo.api.dependencies import ID_PATTERN, ServiceContext
from omnivideo.api.media import MEDIA_TYPES, artifact_from_file
from omnivideo.api.request_body import CleanText, Unsupported
from omnivideo.contracts import RequestModel
from omnivideo.errors import InvalidInput

MetadataText = Annotated[CleanText, Field(max_length=512)]


class InputPart(RequestModel):
    """A part of a message: text, or a picture by its URL or by the id of an uploaded file."""

    type: Literal["input_text", "output_text", "text", "refusal", "input_image"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_id: CleanText | None = None


class InputItem(RequestModel):
    """A message, the result of a tool, or another item of an earlier response, of which only messages count."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] = "user"
    content: str | list[InputPart] | None = None
    output: Any = None  # of a tool
    id: str | None = None


class TextFormat(RequestModel):
    type: Literal["text"] = "text"


class TextFields(RequestModel):
    format: TextFormat = TextFormat()


class ResponseRequest(SamplingFields):
    """`progress` says whether a stream tells how the work on a clip goes on."""

    model: str
    input: str | list[InputItem] = Field(min_length=1, max_length=1_000_000)
    instructions: str | None = None
    previous_response_id: Annotated[str | None, Field(pattern=ID_PATTERN, description="the id of a response")] = None
    stream: bool = False
    background: bool = False
    store: bool = True
    metadata: dict[MetadataText, MetadataText] = Field(default={}, max_length=16)
    max_output_tokens: MaxTokens = None
    text: TextFields = TextFields()
    progress: bool = True
    conversation: Unsupported = None
    prompt: Unsupported = None
    top_logprobs: NoneOf = None

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    def to_response_fields(self) -> dict[str, Any]:
        """Return what the response repeats of the request."""
        names = ("model", "instructions", "previous_response_id", "background", "store", "metadata")
        repeated = {name: getattr(self, name) for name in (*names, "max_output_tokens", "temperature", "top_p")}
        return repeated | {
            "object": "response", "parallel_tool_calls": True, "tool_choice": self.tool_choice, "tools": [],
            "text": {"format": {"type": "text"}}, "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
        }  # fmt: skip

    def to_chat_fields(self) -> dict[str, Any]:
        """Return the fields of the same request as a chat completion, without its messages."""
        fields = self.model_dump(include={"model", "progress", *SamplingFields.model_fields}, exclude={"tool_choice"})
        return fields | {"max_completion_tokens": self.max_output_tokens}


# ---------------------------------------------------------------- as messages


def list_input_items(request: ResponseRequest) -> list[tuple[str, InputItem]]:
    """Return the request's items, each with the name of its field; the instructions are the first."""
    instructions = [("instructions", InputItem(role="system", content=request.instructions))]
    items = [("input", InputItem(content=request.input))] if isinstance(request.input, str) else [
        (f"input.{index}", item) for index, item in enumerate(request.input)
    ]  # fmt: skip
    return (instructions if request.instructions else []) + items


def to_chat_message(context: ServiceContext, owner: str, item: InputItem, field: str) -> dict[str, Any]:
    """Return a message in the chat's form. Raises InvalidInput for a picture that cannot be used."""
    if isinstance(item.content, str) or item.content is None:
        return {"role": item.role, "content": item.content or ""}
    parts = [to_chat_part(context, owner, part, f"{field}.content.{index}") for index, part in enumerate(item.content)]
    return {"role": item.role, "content": parts}


def to_chat_part(context: ServiceContext, owner: str, part: InputPart, field: str) -> dict[str, Any]:
    if part.type != "input_image":
        return {"type": "text", "text": part.text or part.refusal or ""}
    if (part.image_url is None) == (part.file_id is None):
        raise InvalidInput(f"{field}.image_url", "give either image_url or file_id")
    url = part.image_url or build_data_url(context, owner, str(part.file_id), f"{field}.file_id")
    return {"type": "image_url", "image_url": {"url": url}}


def build_data_url(context: ServiceContext, owner: str, file_id: str, field: str) -> str:
    """Return an uploaded picture as a URL that contains it."""
    try:
        artifact = artifact_from_file(context, owner, file_id)
    except InvalidInput as error:
        raise InvalidInput(field, str(error).removeprefix(f"{error.field}: ")) from None
    media_type = MEDIA_TYPES.get(artifact.key.rpartition(".")[2], "application/octet-stream")
    return f"data:{media_type};base64,{base64.b64encode(context.store.get(artifact.key)).decode()}"
