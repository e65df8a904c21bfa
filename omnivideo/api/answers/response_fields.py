"""The fields of requests for a response, in the format of OpenAI's clients, and their messages in the chat's form."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from omnivideo.api.answers.sampling_fields import MaxTokens, NoneOf, SamplingFields
from omnivideo.api.dependencies import ID_PATTERN
from omnivideo.api.request_body import CleanText, Unsupported
from omnivideo.contracts import RequestModel
from omnivideo.errors import InvalidInput

MetadataText = Annotated[CleanText, Field(max_length=512)]


class InputPart(RequestModel):
    """A part of a message: text, a picture by its URL, or a file by its id or with its content."""

    type: Literal["input_text", "output_text", "text", "refusal", "input_image", "input_file"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_id: CleanText | None = None
    file_data: str | None = None
    filename: str = ""


class InputItem(RequestModel):
    """A message, the result of a tool, or another item of an earlier response, of which only messages count."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] = "user"
    content: str | list[InputPart] | None = None
    output: Any = None  # of a tool
    id: str | None = None


class TextFormat(RequestModel):
    """The form of an answer; the schema of "json_schema" has a name."""

    model_config = ConfigDict(title="Format")

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = Field(default="answer", max_length=64)
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")

    def to_chat_format(self) -> dict[str, Any]:
        """Return the `response_format` of a chat completion."""
        schema = {"name": self.name, "schema": self.json_schema or {}}
        return {"type": self.type} | ({"json_schema": schema} if self.type == "json_schema" else {})


class TextFields(RequestModel):
    format: TextFormat = TextFormat()


class ResponseRequest(SamplingFields):
    """`progress` says whether a stream tells how the work on a clip goes on."""

    model: str
    input: Annotated[str, Field(max_length=10**6)] | Annotated[list[InputItem], Field(min_length=1, max_length=1000)]
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
        text_format = self.text.format.model_dump(exclude_none=True, by_alias=True)
        return repeated | {
            "object": "response", "parallel_tool_calls": True, "tool_choice": self.tool_choice, "tools": [],
            "text": {"format": text_format}, "reasoning": {"effort": None, "summary": None}, "truncation": "disabled",
        }  # fmt: skip

    def to_chat_fields(self) -> dict[str, Any]:
        """Return the fields of the same request as a chat completion, without its messages."""
        fields = self.model_dump(include={"model", "progress", *SamplingFields.model_fields}, exclude={"tool_choice"})
        return fields | {
            "max_completion_tokens": self.max_output_tokens,
            "response_format": self.text.format.to_chat_format(),
        }


# ---------------------------------------------------------------- as messages


def list_input_items(request: ResponseRequest) -> list[tuple[str, InputItem]]:
    """Return the request's items, each with the name of its field; the instructions are the first."""
    instructions = [("instructions", InputItem(role="system", content=request.instructions))]
    items = [("input", InputItem(content=request.input))] if isinstance(request.input, str) else [
        (f"input.{index}", item) for index, item in enumerate(request.input)
    ]  # fmt: skip
    return (instructions if request.instructions else []) + items


def to_chat_message(item: InputItem, field: str) -> dict[str, Any]:
    """Return a message in the chat's form. Raises InvalidInput for a part without content."""
    if isinstance(item.content, str) or item.content is None:
        return {"role": item.role, "content": item.content or ""}
    parts = [to_chat_part(part, f"{field}.content.{index}") for index, part in enumerate(item.content)]
    return {"role": item.role, "content": parts}


def to_chat_part(part: InputPart, field: str) -> dict[str, Any]:
    if part.type not in ("input_image", "input_file"):
        return {"type": "text", "text": part.text or part.refusal or ""}
    name = "image_url" if part.type == "input_image" else "file_data"
    if (getattr(part, name) is None) == (part.file_id is None):
        raise InvalidInput(f"{field}.{name}", f"give either {name} or file_id")
    if part.image_url is not None:
        return {"type": "image_url", "image_url": {"url": part.image_url}}
    file = {"file_id": part.file_id, "file_data": part.file_data, "filename": part.filename}
    return {"type": "file", "file": {key: value for key, value in file.items() if value}}
