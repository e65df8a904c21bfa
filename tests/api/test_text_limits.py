"""Texts are counted in the models' tokens at every entrance, in milliseconds, under the request's own name."""

import time

import pytest

from omnivideo.contracts import MLLMRequest, resolve_sampling_params
from omnivideo.errors import InvalidInput
from omnivideo.models.text_limits import TokenLimits
from omnivideo.models.weights.shipped import find_shipped_weights, find_weights
from omnivideo.presets import OMNIVIDEO2_1_3B, OMNIVIDEO_1_3B, TINY
from tests.support.openai_service import QUICK, make_png

EMOJI = "\N{LARGE RED CIRCLE}" * 4000
WORDS = "word " * 120
IN_ENCODER = "it has 16002 tokens; the text encoder takes 1 to 64"
WORDS_IN_ENCODER = "it has 481 tokens; the text encoder takes 1 to 64"


def assert_refused_quickly(response_of, field: str, message: str) -> None:
    cpu_seconds_before = time.process_time()  # of the service too, which runs in this process
    error = response_of().json()["error"]
    assert (error["param"], error["message"]) == (field, f"{field}: {message}")
    assert time.process_time() - cpu_seconds_before < 1


@pytest.mark.parametrize(("text", "message"), [(EMOJI, IN_ENCODER), (WORDS, WORDS_IN_ENCODER)], ids=["emoji", "words"])
@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/v1/videos", QUICK), ("/v1/videos/sync", QUICK), ("/v1/images/generations", {}),
    ],
)  # fmt: skip
def test_a_long_prompt_is_refused_with_both_numbers(http, path, extra, text, message):
    assert_refused_quickly(lambda: http.post(path, json={"prompt": text} | extra), "prompt", message)
    body = {"prompt": "a ball", "negative_prompt": text} | extra
    assert_refused_quickly(lambda: http.post(path, json=body), "negative_prompt", message)


def test_a_long_prompt_of_an_edit_is_refused(http):
    data, files = {"prompt": WORDS}, {"image": ("a.png", make_png())}
    assert_refused_quickly(lambda: http.post("/v1/images/edits", data=data, files=files), "prompt", WORDS_IN_ENCODER)


def test_a_long_turn_is_refused_against_the_language_models_bound(http):
    http.post("/v1/threads", json={"id": "long"})
    message = "it has 16000 tokens; the language model takes 1 to 4096"
    assert_refused_quickly(lambda: http.post("/v1/threads/long/turns", json={"text": EMOJI}), "text", message)


def test_a_line_of_a_batch_is_refused(client, context):
    from tests.support.openai_service import create_batch, download_lines, make_lines, make_runner, wait_for_batch

    runner = make_runner(context).start()
    try:
        lines = make_lines(1) + make_lines(1, prompt=EMOJI).replace(b"line 0", b"long")
        (line,) = download_lines(client, wait_for_batch(client, create_batch(client, lines)).error_file_id)
    finally:
        runner.stop()
    assert line["response"]["body"]["error"]["message"] == f"prompt: {IN_ENCODER}"


def test_the_mllm_refuses_above_its_own_bound(omni, tmp_path):
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.storage.objects.local import LocalObjectStore

    mllm = LocalMLLM(omni, LocalObjectStore(tmp_path))
    started_at = time.monotonic()
    for call in (mllm.route, mllm.score_agreement, lambda request: list(mllm.stream_text(request))):
        with pytest.raises(InvalidInput, match=r"text: .* tokens; the language model takes 1 to 4096"):
            call(MLLMRequest(text=EMOJI))
    with pytest.raises(InvalidInput, match=r"the language model takes 1 to 4096"):
        mllm.predict_visual_tokens(MLLMRequest(text=EMOJI), "video")
    assert time.monotonic() - started_at < 5


def test_the_command_line_and_the_sdk_refuse(monkeypatch, tmp_path, weights):
    from omnivideo.cli import app as cli
    from omnivideo.sdk.studio import Studio

    params = resolve_sampling_params(TINY, "text-to-video", negative_prompt=WORDS)
    with pytest.raises(InvalidInput, match=f"instruction: {WORDS_IN_ENCODER}"):
        cli.check_clip_texts("tiny", None, params, "instruction", WORDS)
    with pytest.raises(InvalidInput, match=f"negative prompt: {WORDS_IN_ENCODER}"):
        cli.check_clip_texts("tiny", None, params, "prompt", "a ball")
    studio = Studio(home=tmp_path)
    with pytest.raises(InvalidInput, match=f"prompt: {WORDS_IN_ENCODER}"):
        studio.generate(WORDS, image=False)
    with pytest.raises(InvalidInput, match=f"negative_prompt: {WORDS_IN_ENCODER}"):
        studio.generate("a ball", image=False, negative_prompt=WORDS)
    with pytest.raises(InvalidInput, match="text: it has 16000 tokens"):
        list(studio.open_thread().send(EMOJI))


def test_text_that_fits_is_accepted_whatever_its_characters():
    limits = TokenLimits(TINY, find_shipped_weights("tiny"))
    params = resolve_sampling_params(TINY, "text-to-video")
    assert limits.check_prompt("prompt", " a red circle ", params) == "a red circle"
    assert limits.check_prompt("prompt", "a red" + " " * 3000 + "circle", params)


def test_an_edit_of_version_1_leaves_room_for_its_source():
    """2560 tokens: 1024 of the adapter, 1100 of the source, 6 markers; the rest is the prompt's."""
    limits = TokenLimits(OMNIVIDEO_1_3B, None)
    assert limits.count_text_room(resolve_sampling_params(OMNIVIDEO_1_3B, "video-editing")) == 430
    assert limits.count_text_room(resolve_sampling_params(OMNIVIDEO_1_3B, "text-to-video")) == 512
    other = TokenLimits(OMNIVIDEO2_1_3B, None)
    assert other.count_text_room(resolve_sampling_params(OMNIVIDEO2_1_3B, "video-editing")) == 512


def test_without_weights_texts_are_counted_where_the_models_are(tmp_path):
    assert find_weights("omnivideo-1.3b", "") is None and find_weights("tiny", str(tmp_path)) is None
    limits = TokenLimits(OMNIVIDEO_1_3B, None)
    assert limits.check_message("text", EMOJI) == EMOJI
