"""Invalid requests are refused in words, under the request's own names; forms and nulls are read as meant."""

import itertools

import pytest

from tests.support.openai_service import QUICK, make_png

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
TEXT_PART = {"type": "text", "text": "a"}
PART = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}
EMPTY_PART = {"type": "image_url", "image_url": {}}
SIZE = "give a width and a height in pixels, such as 640x384, or auto"
THREAD_ID = "give 1 to 64 letters, digits, dots, dashes or underscores, the first a letter or a digit"
PART_TYPE = "its type is not known; allowed: text, image_url, video_url, file"
FORMATS = "allowed: b64_json, url"
FORM_ROUTES = [
    "/v1/videos", "/v1/videos/edits", "/v1/videos/x/remix", "/v1/images/generations", "/v1/images/edits", "/v1/files",
    "/v1/batches", "/v1/webhooks", "/v1/webhook_endpoints",
]  # fmt: skip


def chat_with(content) -> dict:
    return CHAT | {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("/v1/videos", {}, "prompt", "it is required"),
        ("/v1/videos", {"prompt": 7}, "prompt", "give text"),
        ("/v1/videos", {"prompt": "a", "size": "32"}, "size", SIZE),
        ("/v1/videos", {"prompt": "a", "size": "5000x32"}, "size", "its width is not possible; allowed: 16 to 4096"),
        ("/v1/videos", {"prompt": "a", "fps": 0}, "fps", "allowed: 0.5 to 60"),
        ("/v1/videos", {"prompt": "a", "fps": "x"}, "fps", "give a number; allowed: 0.5 to 60"),
        ("/v1/videos", {"prompt": "a", "seed": -2}, "seed", "allowed: -1 to 9223372036854775807"),
        ("/v1/videos", {"prompt": "a", "seconds": 0}, "seconds", "allowed: above 0 and at most 3600"),
        ("/v1/videos", {"prompt": "a", "input_reference": "x"}, "input_reference", "give an object"),
        ("/v1/images/generations", {"prompt": "a", "response_format": "x"}, "response_format", FORMATS),
        ("/v1/images/edits", {"prompt": "a", "image": []}, "image", "it is required"),
        ("/v1/webhooks", {"url": "http://a", "event_types": ["x"]}, "event_types.0", None),
        ("/v1/files", {"purpose": "batch"}, "file", "it is required"),
        ("/v1/threads", {"id": "-"}, "id", THREAD_ID),
        ("/v1/chat/completions", chat_with(7), "messages.0.content", "give text"),
        ("/v1/chat/completions", chat_with([{"type": "text"}]), "messages.0.content.0.text", "it is required"),
        ("/v1/chat/completions", chat_with([{"type": "sound"}]), "messages.0.content.0", PART_TYPE),
        ("/v1/chat/completions", chat_with([EMPTY_PART]), "messages.0.content.0.image_url.url", "it is required"),
        ("/v1/chat/completions", chat_with([TEXT_PART, PART]), "messages.0.content.1.image_url", None),
        ("/v1/chat/completions", CHAT | {"n": 2}, "n", "allowed: 1"),
        ("/v1/chat/completions", CHAT | {"presence_penalty": 1}, "presence_penalty", "allowed: 0"),
        ("/v1/chat/completions", CHAT | {"stop": [""]}, "stop.0", "it is empty"),
        ("/v1/chat/completions", CHAT | {"stop": "a" * 201}, "stop", "it has 201 characters; allowed: at most 200"),
        ("/v1/chat/completions", CHAT | {"stop": ["a"] * 5}, "stop", "it has 5 items; allowed: at most 4"),
        ("/v1/responses", {"model": "tiny", "input": []}, "input", "it has 0 items; allowed: at least 1"),
    ],
)  # fmt: skip
def test_a_field_is_refused_in_words(http, path, body, field, message):
    response = http.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field), error
    assert message is None or error["message"] == f"{field}: {message}"
    assert not any(sign in error["message"] for sign in ("Input should", "pattern", "^", "str", "tagged-union"))


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/videos?limit=x", "limit"), ("/v1/videos?after=%20", "after"), ("/v1/videos/%20", "video_id")],
)
def test_a_parameter_is_refused_in_words(http, path, field):
    response = http.get(path)
    assert response.status_code == 400 and response.json()["error"]["param"] == field
    allowed = "1 to 100" if field == "limit" else "1 to 200 letters"
    assert allowed in response.json()["error"]["message"] and "^" not in response.text


def test_the_media_of_a_turn_is_refused_under_its_name(http):
    thread = http.post("/v1/threads").json()["id"]
    for attachment, field in (
        ({"url": "http://example.com/a.png"}, "attachments.0.url"), ({"file_id": "x"}, "attachments.0.file_id"),
        ({"url": "data:image/png;base64,aGVsbG8="}, "attachments.0.url"),
    ):  # fmt: skip
        response = http.post(f"/v1/threads/{thread}/turns", json={"text": "x", "attachments": [attachment]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, field), response.text


# ---------------------------------------------------------------- names of form fields


@pytest.mark.parametrize("path", FORM_ROUTES)
@pytest.mark.parametrize(
    "names",
    [*itertools.permutations(["seed", "seed[]"], 2), *itertools.permutations(["image", "image[]", "image[a]"], 3),
     ("prompt[x]", "prompt[]"), ("prompt[]", "prompt[x]"), ("prompt", "prompt"), ("a[b][c]",), ("[]",), ("prompt[",),
     ("file[]", "file[upload]"), ("metadata[a]", "metadata[a]"), ("url", "url[]")],
    ids=" ".join,
)  # fmt: skip
def test_no_name_of_a_form_field_is_an_internal_error(http, path, names):
    fields = [("prompt", "a"), ("purpose", "batch"), *[(name, "1") for name in names]]
    forms = [[(name, (None, value)) for name, value in fields]]
    forms += [[*forms[0], *[(name, ("a.png", make_png())) for name in names]]]
    for form in forms:
        response = http.post(path, files=form)
        assert response.status_code < 500 and response.status_code in (200, 400, 404), response.text


def test_a_form_field_that_is_given_twice_is_refused_by_name(http):
    for names, field in (
        (("seed", "seed[]"), "seed"),
        (("prompt[x]", "prompt[]"), "prompt"),
        (("size", "size"), "size"),
    ):
        form = [("prompt", (None, "a"))] * (field != "prompt") + [(name, (None, "1")) for name in names]
        response = http.post("/v1/videos", files=form)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field), response.text


@pytest.mark.parametrize("name", ["loras[0][path]", "prompt[", "a b", "[]"])
def test_a_form_field_that_does_not_exist_is_refused_by_name(http, name):
    """Before, a name of another form than our fields' was dropped silently."""
    response = http.post("/v1/videos", files=[("prompt", (None, "a")), (name, (None, "1"))])
    assert response.status_code == 400 and "no such field" in response.text, response.text


def test_an_input_of_a_form_that_is_left_empty_is_absent(http):
    empty = dict.fromkeys(["n", "seed", "size", "width", "mask", "background", "response_format", "guidance_scale"], "")
    form = {"prompt": "a", "num_inference_steps": "1"} | empty
    for image in ("image", "image[]", "image[0]"):
        response = http.post("/v1/images/edits", data=form, files={image: ("a.png", make_png())})
        assert response.status_code == 200, response.text
    for fields, name in (({"prompt": ""}, "prompt"), ({"prompt": "a", "image": ""}, "image")):
        response = http.post("/v1/images/edits", data=fields, files={"mask": ("a.png", make_png())})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name), response.text
    refused = http.post("/v1/images/generations", json={"prompt": "a", "n": ""})
    assert refused.status_code == 400, "JSON has null for an absent field"


# ---------------------------------------------------------------- null and -1


def test_null_means_absent(http):
    nulls = [
        "model", "size", "num_inference_steps", "guidance_scale", "flow_shift", "seed", "negative_prompt", "seconds",
        "num_frames", "fps", "input_reference",
    ]  # fmt: skip
    created = http.post("/v1/videos", json=dict.fromkeys(nulls) | {"prompt": "a", "size": "32x32"} | QUICK)
    assert created.status_code == 200, created.text
    image = dict.fromkeys(["n", "response_format", "output_format", "stream", "mask", "seed"])
    image |= {"prompt": "a", "size": "32x32", "num_inference_steps": 1}
    assert http.post("/v1/images/generations", json=image).status_code == 200
    hook = http.post("/v1/webhooks", json={"url": "http://localhost/", "name": None, "event_types": None})
    assert hook.status_code == 200 and http.delete(f"/v1/webhooks/{hook.json()['id']}").status_code == 200
    thread = http.post("/v1/threads", json={"id": None}).json()["id"]
    turn = dict.fromkeys(["attachments", "think", "check", "seed", "steps", "guidance_scale", "stream"])
    assert http.post(f"/v1/threads/{thread}/turns", json=turn | {"text": "a red ball", "steps": 1}).status_code == 202
    chat = dict.fromkeys(["stream", "stream_options", "n", "think", "check", "seed", "guidance_scale"])
    assert http.post("/v1/chat/completions", json=CHAT | chat | {"steps": 1}).status_code == 200
    refused = http.post("/v1/videos", json={"prompt": None})
    assert refused.json()["error"]["message"] == "prompt: it is required"


def test_a_seed_of_minus_one_is_any_seed(http, context):
    body = {"prompt": "a", "size": "32x32", "seed": -1} | QUICK
    seeds = {context.jobs.get_status(http.post("/v1/videos", json=body).json()["id"]).job.seed for _ in range(2)}
    assert len(seeds) == 2 and min(seeds) >= 0
    image = {"prompt": "a", "size": "32x32", "num_inference_steps": 1, "seed": -1}
    assert http.post("/v1/images/generations", json=image).status_code == 200
    assert http.post("/v1/chat/completions", json=CHAT | {"seed": -1, "steps": 1}).status_code == 200
    thread = http.post("/v1/threads").json()["id"]
    turn = {"text": "a red ball", "seed": -1, "steps": 1}
    assert http.post(f"/v1/threads/{thread}/turns", json=turn).status_code == 202
