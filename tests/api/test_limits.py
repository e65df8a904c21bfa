"""Limits, scopes and expiry of keys, on every route, and what `/v1/usage` reports."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from omnivideo import Client
from omnivideo.errors import OmniVideoError, ServiceBusy
from tests.support.api_server import build_scripted_wiring, run_api_server
from tests.support.continuations import make_frames
from tests.support.openai_service import (
    KEY,
    QUICK,
    SMALL,
    create_batch,
    make_client,
    make_http_client,
    make_lines,
    make_png,
    make_runner,
    pause_worker,
    run_service,
    wait_until,
)

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
VIDEO = {"prompt": "a red ball", "size": "32x32", **QUICK}
RATE_LIMIT = re.compile(r'"requests";r=(\d+);t=(\d+)')


@contextmanager
def open_client(service, **key_options):
    """Yield an HTTP client with a new key, and the key's id."""
    key_id, key = service[1].api_keys.create_key("ann", **key_options)
    with make_http_client(service) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client, key_id


def read_error(response: httpx.Response) -> dict:
    assert response.status_code == 429, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(response.headers["Retry-After"]) <= 86_400
    return error


# ---------------------------------------------------------------- requests per minute


def test_requests_per_minute_hold_across_processes_and_are_told(omni, tmp_path):
    """Two API processes' applications on one database count together."""
    with run_service(tmp_path, omni, max_requests_per_minute_per_key=5) as first:
        second_wiring = build_scripted_wiring(tmp_path, omni, admin_key=KEY, max_requests_per_minute_per_key=5)
        with run_api_server(second_wiring) as second, open_client(first) as (client, _):
            answers = [client.get(f"{(first[2], second)[number % 2]}/v1/videos") for number in range(5)]
            assert [answer.status_code for answer in answers] == [200] * 5
            left = [RATE_LIMIT.fullmatch(answer.headers["RateLimit"])[1] for answer in answers]
            assert left == ["4", "3", "2", "1", "0"]
            headers = answers[1].headers
            assert headers["RateLimit-Policy"] == '"requests";q=5;w=60'
            assert headers["x-ratelimit-limit-requests"] == "5" and headers["x-ratelimit-remaining-requests"] == "3"
            assert re.fullmatch(r"\d+s", headers["x-ratelimit-reset-requests"])
            for method, path, body in (
                ("GET", "/v1/models", None), ("POST", "/v1/videos", VIDEO), ("POST", "/v1/threads", {}),
                ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}),
            ):  # fmt: skip
                refused = client.request(method, f"{second}{path}", json=body)
                assert "requests: this key may send 5 a minute" in read_error(refused)["message"]
                assert refused.headers["RateLimit"].startswith('"requests";r=0;t=')
                assert int(refused.headers["Retry-After"]) <= 60
            admin = client.get("/v1/videos", headers={"Authorization": f"Bearer {KEY}"})
            assert admin.status_code == 200 and "RateLimit" not in admin.headers
            assert client.get("/health").status_code == 200


def test_a_key_has_no_limit_unless_one_is_set(http):
    headers = http.get("/v1/videos").headers
    assert not [name for name in headers if "ratelimit" in name]


# ---------------------------------------------------------------- open jobs and shares of the day


def test_open_jobs_are_limited_on_every_route(service):
    with open_client(service, own_limits={"open_jobs": 1}) as (client, _), pause_worker(service[0]):
        video = client.post("/v1/videos", json=VIDEO).json()["id"]
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "a red ball moving right"}]}
        for path, body in (
            ("/v1/videos", VIDEO), ("/v1/videos/sync", VIDEO), ("/v1/images/generations", {"prompt": "a red ball"}),
            ("/v1/chat/completions", chat), ("/v1/responses", {"model": "tiny", "input": "a red ball moving right"}),
        ):  # fmt: skip
            refused = client.post(path, json=body)
            assert "open jobs: this key may have 1 queued or running" in read_error(refused)["message"], path
        client.post(f"/v1/videos/{video}/cancel")
        assert client.post("/v1/videos", json=VIDEO).status_code == 200


def test_a_used_up_day_refuses_clips_but_no_answers_in_words(service):
    context = service[1]
    with open_client(service, own_limits={"device_seconds_per_day": 10}) as (client, key_id):
        assert client.post("/v1/videos", json=VIDEO).status_code == 200
        context.usage.add_usage(key_id, device_seconds=11)
        refused = client.post("/v1/videos", json=VIDEO)
        assert "device seconds: this key may use 10 a day" in read_error(refused)["message"]
        assert refused.headers["RateLimit-Policy"] == '"device-seconds";q=10;w=86400'
        started_at = time.monotonic()
        key = client.headers["Authorization"].removeprefix("Bearer ")
        with Client(service[2], api_key=key) as sdk_client, pytest.raises(ServiceBusy, match="10 a day"):
            sdk_client.generate("a red ball", steps=1)
        assert time.monotonic() - started_at < 5  # it is not repeated until midnight
        thread = client.post("/v1/threads", json={}).json()["id"]
        turn = client.post(f"/v1/threads/{thread}/turns", json={"text": "a red ball moving right"}).json()
        path = f"/v1/threads/{thread}/turns/{turn['id']}"
        wait_until(lambda: client.get(path).json()["state"] == "failed")
        assert client.get(path).json()["error"]["code"] == "rate_limit_exceeded"
        words = client.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
        )
        assert words.status_code == 200


def test_stored_bytes_are_limited_for_files_and_media(service):
    png = make_png(size=64)
    quota = len(png) + 10
    with open_client(service, own_limits={"stored_bytes_per_day": quota}) as (client, _):
        form = {"data": {"purpose": "vision"}, "files": {"file": ("a.png", png)}}
        broken = client.post("/v1/files", data={"purpose": "vision"}, files={"file": ("a.png", b"no picture")})
        assert broken.status_code == 400  # what is refused is not counted
        file_id = client.post("/v1/files", **form).json()["id"]
        assert "stored bytes: this key may use" in read_error(client.post("/v1/files", **form))["message"]
        source = {"data": {"question": "what is this?"}, "files": {"source": ("a.png", png)}}
        assert client.post("/v1/understand", **source).status_code == 429
        assert client.get(f"/v1/files/{file_id}").json()["bytes"] == len(png)
        assert client.get("/v1/usage").json()["data"][0]["stored_bytes"] == len(png)


def test_joined_and_converted_clips_count_as_stored(service):
    """What a turn stores without a job or an upload is limited like them."""
    clips = [make_frames(9, seed=4), make_frames(5, seed=5)]

    def say(client: httpx.Client, *turns: tuple) -> Iterator[int]:
        """Send the turns, and yield after each what has been stored today."""
        with Client(service[2], api_key=client.headers["Authorization"].removeprefix("Bearer ")) as sdk:
            thread = sdk.open_thread()
            for turn in turns:
                list(thread.send(*turn))
                yield client.get("/v1/usage").json()["data"][0]["stored_bytes"]
            assert [artifact.frames for artifact in thread.get_artifacts()] == [9, 5, 14]

    join = "put the two clips together"
    with open_client(service) as (client, _):
        uploaded, joined, converted = say(client, ("what is this?", clips), (join,), ("as a gif",))
        assert uploaded < joined < converted
    with open_client(service, own_limits={"stored_bytes_per_day": uploaded + 10}) as (client, _):
        with pytest.raises(OmniVideoError, match="stored bytes: this key may use"):
            list(say(client, (join, clips)))
        assert client.get("/v1/usage").json()["data"][0]["stored_bytes"] == uploaded


def test_a_batch_waits_for_the_next_day(service):
    context = service[1]
    key_id, key = context.api_keys.create_key("ann", own_limits={"device_seconds_per_day": 10})
    with make_client(service, key) as client:
        batch = create_batch(client, make_lines(2))
        context.usage.add_usage(key_id, device_seconds=11)
        runner = make_runner(context)
        runner.start()
        try:
            wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
            time.sleep(0.5)
            assert client.batches.retrieve(batch.id).request_counts.completed == 0
            context.usage.add_usage(key_id, device_seconds=-11)  # as if the day had ended
            wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
        finally:
            runner.stop()


# ---------------------------------------------------------------- scopes and expiry


def test_scopes_say_what_a_key_may_do(service):
    with open_client(service, scopes=["read"]) as (reader, _), open_client(service, scopes=["generate"]) as (writer, _):
        assert reader.get("/v1/videos").status_code == 200
        for method, path in (("POST", "/v1/videos"), ("POST", "/v1/chat/completions"), ("DELETE", "/v1/files/x")):
            refused = reader.request(method, path, json={})
            assert refused.status_code == 403
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "insufficient_scope")
            assert error["message"] == "this key may only read; the request needs a key that may generate"
        assert writer.get("/v1/videos").status_code == 403
        assert writer.post("/v1/videos", json=VIDEO).status_code == 200


def test_an_expired_key_is_refused(service):
    context = service[1]
    with open_client(service, lifetime_seconds=3600) as (client, key_id):
        assert client.get("/v1/videos").status_code == 200
        context.api_keys.update_key(key_id, lifetime_seconds=-1.0)
        for answer in (client.get("/v1/videos"), client.post("/v1/videos", json=VIDEO)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


# ---------------------------------------------------------------- usage


def test_usage_counts_clips_steps_seconds_tokens_and_bytes(service):
    with (
        open_client(service, own_limits={"requests_per_minute": 500}) as (client, key_id),
        make_client(service, client.headers["Authorization"].removeprefix("Bearer ")) as openai_client,
    ):
        video = openai_client.videos.create_and_poll(prompt="a red ball", **SMALL)
        image = client.post("/v1/images/generations", json={"prompt": "a red ball", "num_inference_steps": 2})
        assert image.status_code == 200
        messages = [{"role": "user", "content": "how are you?"}]
        answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages}).json()
        day = wait_until(
            lambda: (found := client.get("/v1/usage").json()["data"][0])["answer_tokens"] and found["images"] and found
        )
        assert (day["key"], day["clips"], day["images"], day["steps"]) == (key_id, 1, 1, 3)
        assert 0 < day["device_seconds"] < 60
        assert day["prompt_tokens"] == answer["usage"]["prompt_tokens"] > 0
        assert day["answer_tokens"] == answer["usage"]["completion_tokens"] > 0
        size = len(openai_client.videos.download_content(video.id).read())
        assert day["stored_bytes"] > size and day["date"] == time.strftime("%Y-%m-%d", time.gmtime())
        limits = client.get("/v1/usage").json()["limits"]
        assert limits["requests_per_minute"] == 500 and limits["device_seconds_per_day"] is None


def test_the_use_of_other_keys_needs_the_scope_administer(service, http):
    with open_client(service) as (client, key_id):
        service[1].usage.add_usage(key_id, clips=3)
        assert client.get("/v1/usage", params={"key": key_id}).status_code == 200
        for other in ("all", "admin", "key_of_another"):
            assert client.get("/v1/usage", params={"key": other}).status_code == 403
        (day,) = http.get("/v1/usage", params={"key": key_id}).json()["data"]
        assert day["clips"] == 3
        assert key_id in {row["key"] for row in http.get("/v1/usage", params={"key": "all"}).json()["data"]}
        assert http.get("/v1/usage", params={"days": 0}).status_code == 400
