"""The fields of chat requests that say how an answer is sampled: each is honoured, or refused by its name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from omnivideo.api.request_body import CleanText, Seed
from omnivideo.contracts import MAX_ANSWER_TOKENS, RequestModel
from omnivideo.turns import Think

MIN_TOP_P = 1e-4  # nucleus sampling needs a nucleus; this one holds the most likely token only


def wrap_in_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def check_tool_choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    if choice not in ("none", "auto"):
        raise ValueError("this service calls no tools of the client; allowed: none, auto")
    return choice


def check_response_format(response_format: dict[str, Any]) -> dict[str, Any]:
    if response_format.get("type") not in ("text", "json_object", "json_schema"):
        raise ValueError("its type is not known here; allowed: text, json_object, json_schema")
    return response_format


def refuse_unless_empty(value: Any) -> Any:
    if value:
        raise ValueError("it is not supported here; leave it out")
    return value


MaxTokens = Annotated[int | None, Field(ge=1)]
StopSequences = Annotated[
    list[Annotated[CleanText, Field(min_length=1, max_length=200)]], BeforeValidator(wrap_in_list), Field(max_length=4)
]
# Tools may be offered: with "auto", the model decides whether it calls one, and this one never does.
Tools = Annotated[list[dict[str, Any]], Field(max_length=1000)]
ToolChoice = Annotated[str | dict[str, Any], AfterValidator(check_tool_choice)]
ResponseFormat = Annotated[dict[str, Any], AfterValidator(check_response_format)]
Zero = Annotated[float, Field(ge=0, le=0)]
NoneOf = Annotated[Any, AfterValidator(refuse_unless_empty)]


class SamplingFields(RequestModel):
    """`think`, `check`, `steps` and `guidance_scale` are ours: they apply to this turn, as in a thread."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    seed: Seed = None
    tools: Tools = Field(default=[])
    tool_choice: ToolChoice = "auto"
    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30)

    @property
    def token_limit(self) -> int | None:
        """The largest number of tokens of an answer in words."""
        return None

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        return ()

    def to_turn_options(self) -> dict[str, Any]:
        """Return the options of the turn that answers the request."""
        options = self.model_dump(include={"think", "check", "seed", "steps", "guidance_scale", "temperature"})
        max_tokens = None if self.token_limit is None else min(self.token_limit, MAX_ANSWER_TOKENS)
        return options | {"max_tokens": max_tokens, "top_p": max(self.top_p, MIN_TOP_P), "stop": self.stop_sequences}


class ChatSamplingFields(SamplingFields):
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    stop: StopSequences = Field(default=[])
    n: int = Field(default=1, ge=1, le=1)
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0
    logit_bias: NoneOf = None
    logprobs: NoneOf = None
    top_logprobs: NoneOf = None
    functions: Tools = Field(default=[])
    function_call: ToolChoice = "auto"
    modalities: list[Literal["text"]] = Field(default=["text"])
    audio: NoneOf = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        return tuple(self.stop)
