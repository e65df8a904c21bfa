"""What went wrong, in the wire's words: {"error": {message, type, param, code}}, and no trace of our insides."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from omnivideo.errors import (
    ArtifactNotFound,
    InvalidInput,
    JobCancelled,
    JobFailed,
    ModelUnavailable,
    OmniVideoError,
    ServiceBusy,
    StoreError,
)

log = logging.getLogger("omnivideo.api")
INTERNAL_ERROR = "something went wrong on our side; the request id is in the header x-request-id"


class APIError(Exception):
    """An answer that is no success; `param` names the field that is to blame."""

    def __init__(self, status_code: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status_code, self.message, self.param, self.code = status_code, message, param, code
        self.headers: dict[str, str] = {}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer of 400 and above."""

    error: ErrorBody


# What a router tells of its errors in the OpenAPI document.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "Refused: `param` names the field that is to blame"},
    "5XX": {"model": ErrorResponse, "description": "Not possible now, or a fault of ours"},
}


def build_not_found_error(resource: str, resource_id: str) -> APIError:
    return APIError(404, f"there is no {resource} {resource_id[:100]!r}", "id", "not_found")


def build_error_body(status_code: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    error_type = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status_code)
    error_type = error_type or ("server_error" if status_code >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def to_json_response(error: APIError) -> JSONResponse:
    content = build_error_body(error.status_code, error.message, error.param, error.code)
    return JSONResponse(content, status_code=error.status_code, headers=error.headers)


def to_api_error(error: OmniVideoError) -> APIError:
    """Our own errors on the wire."""
    match error:
        case InvalidInput():
            return APIError(400, str(error), error.field, "invalid_value")
        case ArtifactNotFound():
            return APIError(404, str(error), None, "not_found")
        case ServiceBusy():
            too_many_requests = APIError(429, str(error), None, "queue_full")
            too_many_requests.headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
            return too_many_requests
        case ModelUnavailable() | StoreError():
            unavailable = APIError(503, str(error), None, "unavailable")
            unavailable.headers["Retry-After"] = "5"
            return unavailable
        case JobFailed():
            return APIError(500, str(error), None, error.code)
        case JobCancelled():
            return APIError(409, str(error), None, "cancelled")
        case _:
            return APIError(400, str(error), None, None)


def api_error_from_validation(error: RequestValidationError) -> APIError:
    """A request's first wrong field."""
    first_error = error.errors()[0]
    field_path = [str(part) for part in first_error["loc"] if part not in ("body", "query", "path", "header")]
    return APIError(
        400, f"{'.'.join(field_path) or 'body'}: {first_error['msg']}", ".".join(field_path) or None, "invalid_value"
    )


def register_error_handlers(app: FastAPI) -> None:
    """Every way out of a handler that is not a success."""

    @app.exception_handler(APIError)
    async def handle_api_error(request: Request, error: APIError) -> JSONResponse:
        return to_json_response(error)

    @app.exception_handler(OmniVideoError)
    async def handle_omnivideo_error(request: Request, error: OmniVideoError) -> JSONResponse:
        return to_json_response(to_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return to_json_response(api_error_from_validation(error))

    @app.exception_handler(HTTPException)
    async def handle_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        api_error = APIError(error.status_code, str(error.detail).lower())
        api_error.headers.update(error.headers or {})
        return to_json_response(api_error)

    @app.exception_handler(Exception)
    async def handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        request_id = getattr(request.state, "request_id", "?")
        log.exception("request %s", request_id, exc_info=error)
        api_error = APIError(500, INTERNAL_ERROR, None, "internal")
        api_error.headers["x-request-id"] = (
            request_id  # this answer is made outside of the gate, which names the others
        )
        return to_json_response(api_error)
