"""Data URLs and their limits."""

import base64

import pytest

from omnivideo.errors import InvalidInput
from omnivideo.media.ingest import decode_data_url


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:video/mp4;base64,", "DATA:image/svg+xml;BASE64,"])
def test_a_data_url_is_decoded(head):
    for data in (b"a", b"ab", b"abc", bytes(range(256))):
        assert decode_data_url(head + base64.b64encode(data).decode(), max_bytes=len(data)) == data


@pytest.mark.parametrize(
    "text",
    [
        "", "data:", "data:,abcd", "data:image/png,abcd", "data:text/html;base64,YWJj", "data:image;base64,YWJj",
        "data:image/png;charset=utf-8;base64,YWJj", " data:image/png;base64,YWJj", "data:image/png;base64,",
        "data:image/png;base64,YWJ", "data:image/png;base64,YW Jj", "data:image/png;base64,YWJj\n",
        "data:image/png;base64,YWJj====", "data:image/png;base64,YQ==YQ==", "data:image/png;base64,YW%4aj",
        "data:image/png;base64,YWJ\u0130", "data:image/../../etc;base64,YWJj", "file:///etc/passwd",
        "data:image/png;base64;base64,YWJj", f"data:image/{'a' * 300};base64,YWJj",
    ],
)  # fmt: skip
def test_attack_invalid_data_url(text):
    with pytest.raises(InvalidInput, match=r"^image_url: [^\n]*allowed: ") as caught:
        decode_data_url(text, field="image_url")
    assert caught.value.field == "image_url" and "passwd" not in str(caught.value)


def test_attack_data_url_above_the_cap_is_not_decoded(monkeypatch):
    text = "data:image/png;base64," + base64.b64encode(bytes(1000)).decode()
    with pytest.raises(InvalidInput, match="holds 1000 bytes; allowed: 1 to 999"):
        decode_data_url(text, 999)
    monkeypatch.setattr("omnivideo.media.ingest.binascii", None)
    with pytest.raises(InvalidInput, match="holds 1000 bytes; allowed: 1 to 900"):
        decode_data_url(text, 900)
