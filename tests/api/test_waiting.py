"""Requests that wait for work raise what the work raises."""

import anyio
import pytest
from fastapi import Request

from omnivideo.api.waiting import run_unless_disconnected
from omnivideo.errors import ServiceStopping


async def stop() -> None:
    raise ServiceStopping


async def end_at_once() -> None: ...


def test_a_stop_is_not_wrapped_in_a_group_of_errors() -> None:
    request = Request({"type": "http"}, anyio.sleep_forever)
    with pytest.raises(ServiceStopping):
        anyio.run(run_unless_disconnected, request, stop)
    assert anyio.run(run_unless_disconnected, request, end_at_once)
