"""Every error of the tree has one HTTP status, code and Retry-After, in answers, turns and batch lines alike."""

import inspect
import json

import pytest

from omnivideo import errors
from omnivideo.api.errors import HTTP_MAPPINGS, INTERNAL_ERROR_MESSAGE, APIError, error_from_turn, to_api_error
from omnivideo.api.routes.batches import BatchLineHandler
from omnivideo.turns import TurnRecord

CASES = [
    (errors.InvalidInput("size", "it is odd"), 400, "invalid_value", "size", None),
    (errors.UnreadableMedia("file", "it is cut short"), 400, "invalid_value", "file", None),
    (errors.TextTooLong("text", "it has 5000 characters"), 400, "invalid_value", "text", None),
    (errors.ConditionTooLong("prompt", "it has 79 tokens"), 400, "invalid_value", "prompt", None),
    (errors.ArtifactNotFound("there is none"), 404, "not_found", None, None),
    (errors.StoreError("it is unavailable"), 503, "unavailable", None, "5"),
    (errors.ModelUnavailable("it is unavailable"), 503, "unavailable", None, "5"),
    (errors.ServiceBusy("it is full", retry_after_seconds=0.2), 429, "queue_full", None, "1"),
    (errors.ServiceBusy("it is full", retry_after_seconds=60), 429, "queue_full", None, "60"),
    (errors.DecodingBusy("it is busy", retry_after_seconds=10), 503, "unavailable", None, "10"),
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
def test_a_turn_of_an_older_version_has_the_body_of_its_error(error, status):
    body = None if error is None else to_api_error(error).to_body()["error"]
    turn = TurnRecord(
        id="a", thread_id="b", owner="c", state="failed", number=1, body={}, attempt=1, error=body, created_at=0.0
    )
    api_error = error_from_turn(turn)
    assert api_error.status_code == status
    assert error is None or api_error.to_body()["error"] == body


@pytest.mark.parametrize("error", [case[0] for case in CASES], ids=str)
def test_a_turn_keeps_the_whole_mapping_of_its_error(error):
    mapped = to_api_error(error)
    fields = {"id": "a", "thread_id": "b", "owner": "c", "state": "failed", "number": 1, "body": {}, "attempt": 1}
    kept = error_from_turn(TurnRecord(**fields, error=json.loads(json.dumps(mapped.to_record())), created_at=0.0))
    assert vars(kept) == vars(mapped) and kept.to_event() == mapped.to_event()
    assert (kept.explanation is not None) == isinstance(error, errors.InvalidInput)


def test_a_failed_clip_has_the_error_that_its_worker_had():
    error = errors.build_job_error("invalid_input", "prompt: it has 79 tokens; allowed: 1 to 64")
    assert isinstance(error, errors.InvalidInput) and error.field == "prompt"
    explanation = to_api_error(error).explanation
    assert explanation == (
        "That is too much for one request: it has 79 tokens; allowed: 1 to 64. Please say it in fewer words."
    )
    failed = errors.build_job_error("out_of_memory", "it is too large")
    assert isinstance(failed, errors.JobFailed) and failed.code == "out_of_memory"
