"""What travels between the planner and a language model server, whichever of the two it is.

    POST /v1/route          MLLMPayload          -> Route
    POST /v1/agreement      MLLMPayload          -> AgreementResponse
    POST /v1/write          WriteRequest         -> one JSON string a line, then null
    POST /v1/visual_tokens  VisualTokensRequest  -> the bytes of a safetensors file: visual_tokens [1, Q, E] of float32
    GET  /health                                 -> 200 where it answers

What cannot be answered, whoever asks, is a 400 with RefusalResponse.  A medium travels as the bytes of its file: that
is a
tenth of its pixels, and the server reads it just as the planner's own process would.
"""

import base64
import binascii
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

from omnivideo.contracts import FrozenModel, Medium

MAX_MEDIA_BYTES = 512 * 2**20  # of one medium: the most that the service takes for an upload


def decode_base64(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("it is not base64") from None


def encode_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


# By hand, not by pydantic's `val_json_bytes`: that holds only where JSON is validated as it is read.
Base64Bytes = Annotated[bytes, BeforeValidator(decode_base64), PlainSerializer(encode_base64, when_used="json")]


class MediaPayload(FrozenModel):
    """An image or a clip: the bytes of the file, its type, and how fast it is played."""

    data: Base64Bytes = Field(max_length=MAX_MEDIA_BYTES)
    suffix: str = Field(pattern=r"^[a-z0-9]{1,16}$")
    medium: Medium
    fps: float = Field(gt=0, allow_inf_nan=False)


class MLLMPayload(FrozenModel):
    text: str
    media: tuple[MediaPayload, ...] = ()
    system: str | None = None


class WriteRequest(FrozenModel):
    """`max_tokens` is the number of tokens at which the answer is cut."""

    payload: MLLMPayload
    max_tokens: int = Field(ge=1, le=32_768)


class VisualTokensRequest(FrozenModel):
    payload: MLLMPayload
    medium: Medium


class AgreementResponse(FrozenModel):
    agreement: float


class RefusalResponse(FrozenModel):
    """What is wrong with a request: the field and why, as in InvalidInput."""

    field: str
    message: str
