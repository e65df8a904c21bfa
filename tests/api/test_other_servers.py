"""The request shapes of vLLM-Omni's and SGLang's own tests: each is honoured, or refused by the name of the field."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.openai_service import make_mp4, make_png

CASES = json.loads((Path(__file__).parent / "fixtures" / "other_servers_requests.json").read_text())
FILES = {"picture": ("a.png", make_png()), "clip": ("a.mp4", make_mp4()), "text": ("a.png", b"not-an-image")}
DATA_URLS = {
    f"{{{name}}}": f"data:{media_type};base64,{base64.b64encode(FILES[name][1]).decode()}"
    for name, media_type in (("picture", "image/png"), ("clip", "video/mp4"))
}


def fill(value):
    """Return a fixture's value with data URLs in place of {picture} and {clip}."""
    match value:
        case str():
            for name, url in DATA_URLS.items():
                value = value.replace(name, url)
        case list():
            return [fill(item) for item in value]
        case dict():
            return {name: fill(item) for name, item in value.items()}
    return value


def send(http, case):
    if "json" in case:
        return http.post(case["path"], json=fill(case["json"]))
    form = {"num_inference_steps": "1"} | fill(case["form"])
    # As a multipart form, which these servers' clients send even without a file.
    parts = [(name, (None, value)) for name, value in form.items()]
    return http.post(case["path"], files=parts + [(name, FILES[file]) for name, file in case.get("files", {}).items()])


def is_part_of(expected: dict, whole: dict) -> bool:
    return expected == {name: whole.get(name) for name in expected}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_request_of_another_server_is_honoured_or_refused_by_name(http, context, case):
    response = send(http, case)
    if "refuses" in case:
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"].startswith(case["refuses"])
        assert response.json()["error"]["param"] == case["refuses"].partition(":")[0]
        return
    assert response.status_code == 200, response.text
    if "media_type" in case:
        assert response.headers["content-type"] == case["media_type"]
        assert response.content[4:8] == b"ftyp" and response.headers["x-request-id"]
        return
    answer = response.json()
    assert answer["id"] and is_part_of(case.get("answers", {}), answer), answer
    if "pictures" in case:
        pictures = [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in answer["data"]]
        assert len(pictures) == case["pictures"]
        assert all(f"{picture.width}x{picture.height}" == answer["size"] for picture in pictures)
        return
    job = context.jobs.get_status(answer["id"]).job
    assert "reference" not in case or job.source.medium == case["reference"]
    assert "seed" not in case or job.seed == case["seed"]
    assert is_part_of(case.get("settings", {}), job.params.model_dump())
