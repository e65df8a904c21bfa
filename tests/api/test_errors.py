"""Every error of the tree has one HTTP status, code and Retry-After, in answers, turns and batch lines alike."""

import inspect

import pytest

from omnivideo import errors
from omnivideo.api.errors import HTTP_MAPPINGS, INTERNAL_ERROR_MESSAGE, APIError, error_from_turn, to_api_error
from omnivideo.api.routes.batches import BatchLineHandler
from omnivideo.turns import TurnRecord

CASES = [
    (errors.InvalidInput("size", "it is odd"), 400, "invalid_value", "size", None),
    (errors.UnreadableMedia("file", "it is cut short"), 400, "invalid_value", "file", None),
    (errors.ArtifactNotFound("there is none"), 404, "not_found", None, None),
    (errors.StoreError("it is unavailable"), 503, "unavailable", None, "5"),
    (errors.ModelUnavailable("it is unavailable"), 503, "unavailable", None, "5"),
    (errors.ServiceBusy("it is full", retry_after_seconds=0.2), 429, "queue_full", None, "1"),
    (errors.ServiceBusy("it is full", retry_after_seconds=60), 429, "queue_full", None, "60"),
    (errors.JobFailed("out_of_memory", "it is too large"), 500, "out_of_memory", None, None),
    (errors.JobCancelled("it was cancelled"), 409, "cancelled", None, None),
    (errors.CheckpointError("it is incomplete"), 400, None, None, None),
    (APIError(415, "it is text", "body"), 415, None, "body", None),
]


@pytest.mark.parametrize(("error", "status", "code", "param", "retry_after"), CASES, ids=lambda value: str(value)[:30])
def test_an_error_has_one_mapping(error, status, code, param, retry_after):
    api_error = to_api_error(error)
    assert (api_error.status_code, api_error.code, api_error.param) == (status, code, param)
    assert api_error.message == str(error) and api_error.headers.get("Retry-After") == retry_after
    assert BatchLineHandler(None).to_error_response(error) == (status, api_error.to_body())


def test_an_unknown_exception_is_an_internal_error_without_details():
    api_error = to_api_error(ZeroDivisionError("in line 7"))
    assert (api_error.status_code, api_error.code, api_error.message) == (500, "internal", INTERNAL_ERROR_MESSAGE)


def test_every_error_of_the_tree_is_mapped():
    tree = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(tree) > 10
    assert all(any(base in HTTP_MAPPINGS for base in error_class.__mro__) for error_class in tree)


@pytest.mark.parametrize(
    ("error", "status"), [(errors.JobFailed("internal", "x"), 500), (CASES[0][0], 400), (None, 409)]
)
def test_a_turn_keeps_the_body_of_its_error(error, status):
    body = None if error is None else to_api_error(error).to_body()["error"]
    turn = TurnRecord(
        id="a", thread_id="b", owner="c", state="failed", number=1, body={}, attempt=1, error=body, created_at=0.0
    )
    api_error = error_from_turn(turn)
    assert api_error.status_code == status
    assert error is None or api_error.to_body()["error"] == body
