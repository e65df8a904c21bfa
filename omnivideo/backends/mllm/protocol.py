"""The protocol between the planner and a language model server, vLLM's or ours.

    POST /v1/route          MLLMPayload          -> Route
    POST /v1/agreement      MLLMPayload          -> AgreementResponse
    POST /v1/write          WriteRequest         -> one JSON string a line, then null
    POST /v1/tokens         TokensRequest        -> TokensResponse
    POST /v1/visual_tokens  VisualTokensRequest  -> the bytes of a safetensors file of models/features.py, in float32
    GET  /health                                 -> 200 if the server answers
    GET  /ready                                  -> 200 once it has routed a request of its own

Where a key is set, every request but the last two has it: `Authorization: Bearer KEY`.

A request that cannot be answered is refused with status 400 and a RefusalResponse. A medium is sent as the bytes of
its file, which are about a tenth of its pixels, and the server decodes it as the planner's own process would.
"""

import base64
import binascii
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

from omnivideo.contracts import MAX_ANSWER_TOKENS, FrozenModel, Medium, TextSampling

MAX_MEDIA_BYTES = 512 * 2**20  # of one medium, as for uploads to the service


def decode_base64(value: object) -> object:
    """Return the bytes of a base64 text, and other values unchanged. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("the value is not base64") from None


def encode_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


# pydantic's `val_json_bytes` would not do: FastAPI parses the JSON before pydantic validates it.
Base64Bytes = Annotated[bytes, BeforeValidator(decode_base64), PlainSerializer(encode_base64, when_used="json")]


class MediaPayload(FrozenModel):
    """An image or a clip: the bytes of its file, the file's suffix, and its frame rate in frames per second."""

    data: Base64Bytes = Field(max_length=MAX_MEDIA_BYTES)
    suffix: str = Field(pattern=r"^[a-z0-9]{1,16}$")
    medium: Medium
    fps: float = Field(gt=0, allow_inf_nan=False)


class MLLMPayload(FrozenModel):
    """An MLLMRequest with its media in place of references to them."""

    text: str
    media: tuple[MediaPayload, ...] = ()
    system: str | None = None
    json_schema: str | None = None


class WriteRequest(TextSampling):
    """A request for an answer in words."""

    payload: MLLMPayload
    max_tokens: int = Field(ge=1, le=MAX_ANSWER_TOKENS)

    @property
    def sampling(self) -> TextSampling:
        return TextSampling(**self.model_dump(exclude={"payload"}))


class TokensRequest(FrozenModel):
    """A request for the number of a text's tokens."""

    text: str


class TokensResponse(FrozenModel):
    count: int


class VisualTokensRequest(FrozenModel):
    """A request for the visual tokens of an image or a video."""

    payload: MLLMPayload
    medium: Medium


class AgreementResponse(FrozenModel):
    """The probability of "yes" against "no" as the answer, 0 to 1."""

    agreement: float


class RefusalResponse(FrozenModel):
    """Which field of a request is wrong, and why, as in InvalidInput."""

    field: str
    message: str
