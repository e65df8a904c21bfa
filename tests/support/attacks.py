"""Checks for the tests of attacks: how an answer must refuse, and what no answer may contain."""

import re

import httpx

MAX_UPLOAD_BYTES = 2 * 2**20
# Hosts inside the operator's network, in several spellings.
INTERNAL_HOSTS = [
    "127.0.0.1",
    "localhost",
    "[::1]",
    "169.254.169.254",
    "10.0.0.1",
    "[::ffff:127.0.0.1]",
    "2130706433",
    "0x7f.1",
]
INTERNAL_DETAIL = re.compile(
    r"0x[0-9a-f]{6,}|Traceback|File \"|/work/|/tmp/|site-packages|sqlalchemy|\.py\b|127\.0\.0\.1"
)


def assert_reveals_nothing(response: httpx.Response) -> None:
    """Check that an error is not one of ours and contains no internal detail."""
    if response.status_code >= 400:
        response.read()
        assert response.status_code < 500 and not INTERNAL_DETAIL.search(response.text), response.text


def assert_refused(response: httpx.Response, field: str, status: int = 400) -> str:
    """Check that the request was refused because of the field, and return the message."""
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, field), response.text
    return error["message"]
