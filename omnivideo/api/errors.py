"""What went wrong, in the wire's words: {"error": {message, type, param, code}}, and no trace of our insides."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from omnivideo.errors import (
    Busy,
    InvalidInput,
    JobCancelled,
    JobFailed,
    ModelAway,
    NotStored,
    OmniVideoError,
    StoreError,
)

log = logging.getLogger("omnivideo.api")
OURS = "something went wrong on our side; the request id is in the header x-request-id"


class WireError(Exception):
    """An answer that is no success; `param` names the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}


class Refused(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    """Every answer of 400 and above."""

    error: Refused


# What a router tells of its errors in the OpenAPI document.
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Refusal, "description": "Refused: `param` names the field that is to blame"},
    "5XX": {"model": Refusal, "description": "Not possible now, or a fault of ours"},
}


def not_found(what: str, name: str) -> WireError:
    return WireError(404, f"there is no {what} {name[:100]!r}", "id", "not_found")


def body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: WireError) -> JSONResponse:
    content = body(error.status, error.message, error.param, error.code)
    return JSONResponse(content, status_code=error.status, headers=error.headers)


def of(error: OmniVideoError) -> WireError:
    """Our own errors on the wire."""
    match error:
        case InvalidInput():
            return WireError(400, str(error), error.field, "invalid_value")
        case NotStored():
            return WireError(404, str(error), None, "not_found")
        case Busy():
            busy = WireError(429, str(error), None, "queue_full")
            busy.headers["Retry-After"] = str(max(1, round(error.after)))
            return busy
        case ModelAway() | StoreError():
            away = WireError(503, str(error), None, "unavailable")
            away.headers["Retry-After"] = "5"
            return away
        case JobFailed():
            return WireError(500, str(error), None, error.code)
        case JobCancelled():
            return WireError(409, str(error), None, "cancelled")
        case _:
            return WireError(400, str(error), None, None)


def first_fault(error: RequestValidationError) -> WireError:
    """A request's first wrong field."""
    fault = error.errors()[0]
    where = [str(part) for part in fault["loc"] if part not in ("body", "query", "path", "header")]
    return WireError(400, f"{'.'.join(where) or 'body'}: {fault['msg']}", ".".join(where) or None, "invalid_value")


def handle_all(app: FastAPI) -> None:
    """Every way out of a handler that is not a success."""

    @app.exception_handler(WireError)
    async def wire(request: Request, error: WireError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(OmniVideoError)
    async def ours(request: Request, error: OmniVideoError) -> JSONResponse:
        return answer(of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(first_fault(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        made = WireError(error.status_code, str(error.detail).lower())
        made.headers.update(error.headers or {})
        return answer(made)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        name = getattr(request.state, "request_id", "?")
        log.exception("request %s", name, exc_info=error)
        made = WireError(500, OURS, None, "internal")
        made.headers["x-request-id"] = name  # this answer is made outside of the gate, which names the others
        return answer(made)
