"""A service that accepts small uploads only and whose webhooks may not reach internal hosts."""

from functools import partial

import pytest

from omnivideo.backends.webhooks import check_reachable
from tests.support.attacks import MAX_UPLOAD_BYTES, assert_reveals_nothing
from tests.support.openai_service import make_http_client, run_service


@pytest.fixture(scope="module")
def service(omni, tmp_path_factory):
    with run_service(tmp_path_factory.mktemp("attacked"), omni, max_upload_bytes=MAX_UPLOAD_BYTES) as parts:
        parts[1].check_webhook_url = partial(check_reachable, internal_hosts=())
        yield parts


@pytest.fixture(scope="module")
def http(service):
    """A client that checks every error: none may be an internal error or reveal internal details."""
    with make_http_client(service, event_hooks={"response": [assert_reveals_nothing]}) as http:
        yield http
