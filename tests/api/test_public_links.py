"""Where links lead, which pages may call the service, and whose X-Forwarded headers are believed."""

import logging
from contextlib import contextmanager

import httpx
import pytest

from omnivideo.api.app import create_app
from tests.support.api_server import build_scripted_wiring
from tests.support.openai_service import KEY, run_service

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a red ball moving right"}], "steps": 1, "seed": 1}


@contextmanager
def connect(folder, omni, **settings):
    with run_service(folder, omni, **settings) as (_, context, address):
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=address, headers=headers, trust_env=False, timeout=60) as http:
            yield http, context


def test_every_link_begins_with_the_public_address(omni, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with connect(tmp_path, omni, public_url="https://clips.example.com/video/") as (http, _):
        text = http.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
        assert text.count("(https://clips.example.com/video/v1/threads/") == 1
        assert text.count("<https://clips.example.com/video/v1/threads/") == 1 and "127.0.0.1" not in text
        image = {"prompt": "a ball", "response_format": "url", "size": "32x32", "num_inference_steps": 1}
        url = http.post("/v1/images/generations", json=image).json()["data"][0]["url"]
        assert url.startswith("https://clips.example.com/video/v1/images/")
        path = url.removeprefix("https://clips.example.com/video")
        assert httpx.get(f"{str(http.base_url).rstrip('/')}{path}", trust_env=False).content.startswith(b"\x89PNG")
    assert "OMNIVIDEO_PUBLIC_URL" not in caplog.text


@pytest.mark.parametrize(("admin_key", "warned"), [(KEY, True), ("", False)])
def test_a_missing_public_address_is_warned_about_if_keys_are_required(omni, tmp_path, caplog, admin_key, warned):
    caplog.set_level(logging.WARNING)
    wiring = build_scripted_wiring(tmp_path, omni, admin_key=admin_key)
    create_app(wiring.build_service_context())
    wiring.close()
    assert ("OMNIVIDEO_PUBLIC_URL is empty" in caplog.text) == warned


def test_pages_of_allowed_origins_may_call(omni, tmp_path):
    preflight = {"Origin": "https://chat.example.com", "Access-Control-Request-Method": "POST"}
    with connect(tmp_path / "one", omni, cors_origins=("https://chat.example.com",)) as (http, _):
        allowed = http.options("/v1/chat/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example.com"
        answer = http.get("/v1/models", headers={"Origin": "https://chat.example.com"})
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = http.get("/v1/models", headers={"Origin": "https://other.example.com"})
        assert "access-control-allow-origin" not in other.headers
    with connect(tmp_path / "two", omni) as (http, _):
        assert "access-control-allow-origin" not in http.options("/v1/chat/completions", headers=preflight).headers


def test_a_page_can_read_every_refusal(omni, tmp_path):
    origin = {"Origin": "https://chat.example.com"}
    settings = {"cors_origins": ("https://chat.example.com",), "max_upload_bytes": 2**10}
    with connect(tmp_path, omni, **settings) as (http, context):

        def fail(*arguments: object) -> None:
            raise RuntimeError

        context.files.list_files = fail
        no_key, form = origin | {"Authorization": ""}, {"file": ("a", b"1" * 2**11)}
        for response, status in (
            (http.post("/v1/threads", headers=no_key), 401), (http.get("/v1/threads", headers=no_key), 401),
            (http.post("/v1/files", files=form, headers=origin), 413), (http.get("/v1/files", headers=origin), 500),
            (http.get("/v1/files/none", headers=origin), 404), (http.put("/v1/files", headers=origin), 405),
        ):  # fmt: skip
            assert response.status_code == status and response.json()["error"]["message"], response.text
            assert response.headers["access-control-allow-origin"] == origin["Origin"]
            assert len(response.headers["x-request-id"]) == 32


def test_forwarded_headers_are_believed_from_trusted_proxies_only(omni, tmp_path):
    headers = {"X-Forwarded-Proto": "https", "Host": "clips.example.com"}
    for proxies, scheme in ((("127.0.0.1",), "https"), ((), "http")):
        with connect(tmp_path / scheme, omni, trusted_proxies=proxies) as (http, _):
            text = http.post("/v1/chat/completions", json=CHAT, headers=headers).json()["choices"][0]["message"]
            assert f"({scheme}://clips.example.com/v1/threads/" in text["content"]
