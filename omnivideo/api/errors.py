"""Errors over HTTP: how each error of omnivideo/errors.py appears in responses, streams, turns and batch lines.

The body is {"error": {"message", "type", "param", "code"}}; it never contains internal details.
"""

import logging
import math
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from starlette.exceptions import HTTPException
from starlette.routing import Match

from omnivideo.agent.capabilities import explain_invalid_input
from omnivideo.contracts import JobStatus
from omnivideo.errors import (
    LIMIT_CODE,
    ArtifactNotFound,
    DecodingBusy,
    InvalidInput,
    JobCancelled,
    JobFailed,
    LimitReached,
    ModelUnavailable,
    OmniVideoError,
    PoolBusy,
    ServiceBusy,
    ServiceStopping,
    StoreError,
    build_job_error,
    describe_database_failure,
)
from omnivideo.turns import TurnRecord
from omnivideo.validation import describe_errors, find_models

log = logging.getLogger("omnivideo.api")
INTERNAL_ERROR_MESSAGE = "something went wrong on our side; the request id is in the header x-request-id"


class APIError(Exception):
    """An HTTP error with its status; `param` is the name of the field at fault."""

    def __init__(self, status_code: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status_code, self.message, self.param, self.code = status_code, message, param, code
        self.headers: dict[str, str] = {}
        self.explanation: str | None = None  # what a chat tells a person, if the error is about their words or files

    @property
    def error_type(self) -> str:
        """The `type` that OpenAI's clients expect with this status."""
        error_type = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return error_type.get(self.status_code, default)

    def to_body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.error_type, "param": self.param, "code": self.code}
        return {"error": error}

    def to_event(self) -> dict[str, Any]:
        """Return the body for a stream, in which the status and the headers can no longer be sent."""
        retry_after = {"retry_after": int(self.headers["Retry-After"])} if "Retry-After" in self.headers else {}
        return {"error": self.to_body()["error"] | {"status": self.status_code} | retry_after}

    def to_record(self) -> dict[str, Any]:
        """Return what a turn stores of the error, from which `error_from_turn` builds it again."""
        body: dict[str, Any] = self.to_body()["error"]
        return body | {"status": self.status_code, "headers": self.headers, "explanation": self.explanation}


class BodyError(HTTPException):
    """An error that is raised while FastAPI reads a body; FastAPI replaces all but its own exceptions."""

    def __init__(self, api_error: APIError):
        super().__init__(api_error.status_code, api_error.message)
        self.api_error = api_error


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response with a status of 400 or above."""

    error: ErrorBody


# How routers document their errors in the OpenAPI document.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "Refused: `param` names the field at fault"},
    "5XX": {"model": ErrorResponse, "description": "Unavailable at the moment, or an internal error"},
}


# ---------------------------------------------------------------- the mapping


class HTTPMapping(NamedTuple):
    """`code` is None if the error has its own; `retry_after_seconds` is None if a retry will not help."""

    status_code: int
    code: str | None = None
    retry_after_seconds: float | None = None


# An error that is not listed is mapped like its nearest base class.
HTTP_MAPPINGS: dict[type[BaseException], HTTPMapping] = {
    OmniVideoError: HTTPMapping(400),
    InvalidInput: HTTPMapping(400, "invalid_value"),
    StoreError: HTTPMapping(503, "unavailable", retry_after_seconds=5),
    ArtifactNotFound: HTTPMapping(404, "not_found"),
    ServiceBusy: HTTPMapping(429, "queue_full"),  # the error says when to retry
    LimitReached: HTTPMapping(429, LIMIT_CODE),  # so do these
    DecodingBusy: HTTPMapping(503, "unavailable"),
    PoolBusy: HTTPMapping(503, "unavailable"),
    ServiceStopping: HTTPMapping(503, "unavailable"),
    ModelUnavailable: HTTPMapping(503, "unavailable", retry_after_seconds=5),
    JobFailed: HTTPMapping(500),  # the error has the job's code
    JobCancelled: HTTPMapping(409, "cancelled"),
}


def to_api_error(error: BaseException) -> APIError:
    """Return the HTTP error for any exception; one that is not ours becomes an internal error without details."""
    if isinstance(error, APIError):
        return error
    if not isinstance(error, OmniVideoError):
        return APIError(500, INTERNAL_ERROR_MESSAGE, None, "internal")
    mapping = next(HTTP_MAPPINGS[base] for base in type(error).__mro__ if base in HTTP_MAPPINGS)
    param = error.field if isinstance(error, InvalidInput) else None
    code = error.code if isinstance(error, JobFailed) else mapping.code
    api_error = APIError(mapping.status_code, str(error), param, code)
    retry_after = error.retry_after_seconds if isinstance(error, ServiceBusy) else mapping.retry_after_seconds
    if retry_after is not None:
        api_error.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if isinstance(error, LimitReached) and error.limit:
        retry_seconds = math.ceil(error.retry_after_seconds)
        api_error.headers |= format_quota(error.limit, error.quota, error.window_seconds, 0, retry_seconds)
    if isinstance(error, InvalidInput):
        api_error.explanation = explain_invalid_input(error)
    return api_error


def format_quota(limit: str, quota: float, window_seconds: int, left: float, seconds: int) -> dict[str, str]:
    """Return the headers RateLimit-Policy and RateLimit of draft-ietf-httpapi-ratelimit-headers-10.

    `left` is what remains of the quota, and `seconds` when it is available again.
    """
    units = {"open-jobs": ';qu="concurrent-requests"', "stored-bytes": ';qu="content-bytes"'}
    window = f";w={window_seconds}" if window_seconds else ""
    policy = f'"{limit}";q={math.floor(quota)}{units.get(limit, "")}{window}'
    return {"RateLimit-Policy": policy, "RateLimit": f'"{limit}";r={math.floor(left)};t={seconds}'}


def log_if_internal(error: BaseException, subject: str) -> None:
    """Log the traceback of an exception whose details the client does not receive."""
    if not isinstance(error, APIError | OmniVideoError):
        log.error("%s", subject, exc_info=error)


def error_from_job(status: JobStatus) -> OmniVideoError:
    """Return the error that ended a failed or cancelled job."""
    if status.state == "cancelled":
        return JobCancelled("it was cancelled")
    return build_job_error(*describe_job_failure(status))


def describe_job_failure(status: JobStatus) -> tuple[str, str]:
    """Return the code and the message of a failed job."""
    return status.code or "internal", status.error or "it could not be rendered"


def error_from_turn(turn: TurnRecord) -> APIError:
    """Return the error that ended a failed or cancelled turn."""
    if turn.error is None:
        return APIError(409, "the turn was cancelled", None, "cancelled")
    # Turns of older versions have the error's body only.
    default_status = 500 if turn.error.get("type") == "server_error" else 400
    message, param, code = (turn.error[name] for name in ("message", "param", "code"))
    error = APIError(turn.error.get("status", default_status), message, param, code)
    error.headers.update(turn.error.get("headers", {}))
    error.explanation = turn.error.get("explanation")
    return error


# ---------------------------------------------------------------- errors that several routes raise


def build_not_found_error(resource: str, resource_id: str) -> APIError:
    return APIError(404, f"there is no {resource} {resource_id[:100]!r}", "id", "not_found")


def build_key_reused_error() -> APIError:
    message = "Idempotency-Key: it was used for a different request; use a new one"
    return APIError(422, message, "Idempotency-Key", "idempotency_key_reused")


def build_key_in_use_error() -> APIError:
    message = "Idempotency-Key: another request with it is still being processed; try again"
    error = APIError(409, message, "Idempotency-Key", "idempotency_key_in_use")
    error.headers["Retry-After"] = "1"
    return error


def build_body_too_large_error(max_bytes: int, advice: str = "") -> APIError:
    return APIError(413, f"the body is larger than {max_bytes} bytes{advice}", "body", "too_large")


def error_from_validation(request: Request, error: RequestValidationError) -> APIError:
    """Return the error of a request's first invalid field."""
    errors: list[Any] = [dict(details) | {"loc": details["loc"][1:]} for details in error.errors()]
    place = error.errors()[0]["loc"][0]
    if errors[0]["type"] == "json_invalid":
        errors[0]["loc"] = ()
    given = error.body if place == "body" else {details["loc"][0]: None for details in errors if details["loc"]}
    field, message = describe_errors(errors, given, find_route_fields(request))
    return APIError(400, f"{field or 'body'}: {message}", field or None, "invalid_value")


def find_route_fields(request: Request) -> dict[str, FieldInfo]:
    """Return the definitions of the route's parameters, and of the fields of its body."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute):
        return {}
    dependant, fields = route.dependant, dict[str, FieldInfo]()
    for parameter in (*dependant.path_params, *dependant.query_params, *dependant.header_params):
        fields[parameter.alias] = parameter.field_info
    for model in find_models(route.body_field.field_info.annotation) if route.body_field else ():
        fields |= model.model_fields
    return fields


# ---------------------------------------------------------------- responses


def to_json_response(error: APIError) -> JSONResponse:
    return JSONResponse(error.to_body(), status_code=error.status_code, headers=error.headers)


def find_allowed_methods(request: Request) -> set[str]:
    """Return the methods of all routes with the request's path."""
    methods = {
        method
        for route in request.app.state.api_routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods
    }
    return methods | {"HEAD"} if "GET" in methods else methods


def register_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    @app.exception_handler(OmniVideoError)
    async def handle_known_error(request: Request, error: APIError | OmniVideoError) -> JSONResponse:
        return to_json_response(to_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return to_json_response(error_from_validation(request, error))

    @app.exception_handler(HTTPException)
    async def handle_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, BodyError):
            return to_json_response(error.api_error)
        api_error = APIError(error.status_code, str(error.detail).lower())
        api_error.headers.update(error.headers or {})
        if error.status_code == 405:
            api_error.headers["Allow"] = ", ".join(sorted(find_allowed_methods(request)))
        return to_json_response(api_error)


def may_repeat(turn: TurnRecord) -> bool:
    """Return whether the turn has failed with an error that says when to try again, such as a full queue."""
    return turn.state == "failed" and "Retry-After" in error_from_turn(turn).headers


def is_transient(error: Exception) -> bool:
    """Return whether the error means that the store, the MLLM or the database (also LangGraph's) is unavailable.

    An error that a retry cannot fix, such as a value that the database cannot store, is not transient.
    """
    if isinstance(error, ArtifactNotFound):
        return False
    return isinstance(error, StoreError | ModelUnavailable) or describe_database_failure(error) is not None
