"""What chat clients receive: previews, progress, words for errors about words, usage, and refused fields."""

import io
import re

import httpx
import openai
import pytest
from PIL import Image

FIXED = {"seed": 5, "extra_body": {"steps": 2}}
MARKUP = re.compile(r"!\[([^\]]*)\]\((\S+)\)(?:\n\n<(\S+)>)?")


def ask(client, *texts: str, **options):
    """Send a conversation whose answers are written by the service, and return the last completion."""
    messages: list[dict] = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        completion = client.chat.completions.create(model="tiny", messages=messages, **(FIXED | options))
        messages.append({"role": "assistant", "content": completion.choices[0].message.content})
    return completion


def stream(client, text: str, **options) -> list:
    return list(
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": text}], stream=True, **(FIXED | options)
        )
    )


def join(chunks, name: str = "content") -> str:
    return "".join(getattr(chunk.choices[0].delta, name, None) or "" for chunk in chunks if chunk.choices)


def test_a_clip_is_an_animated_picture_with_words_and_its_address(client):
    text = ask(client, "a red ball moving right").choices[0].message.content
    assert text.startswith("Here is the clip: a red ball moving right\n\n")
    alt, preview, clip = MARKUP.search(text).groups()
    assert alt == "a red ball moving right"
    picture = httpx.get(preview, trust_env=False)  # signed: an <img> sends no key
    assert picture.status_code == 200 and picture.headers["content-type"] == "image/webp"
    image = Image.open(io.BytesIO(picture.content))
    assert image.is_animated and image.n_frames == 9 and len(picture.content) <= 2**20
    video = httpx.get(clip, trust_env=False)
    assert video.headers["content-type"] == "video/mp4" and video.content[4:8] == b"ftyp"


def test_the_preview_is_made_once_beside_the_clip(client, context):
    text = ask(client, "a red ball moving right").choices[0].message.content
    thread_id, key = re.search(r"threads/(\w+)/artifacts/(\w+\.mp4)", text).groups()
    artifacts = context.turn_runner.get_thread("admin", thread_id).get_artifacts()
    preview = next(artifact.preview for artifact in artifacts if artifact.key == key)
    assert context.store.has(preview) and preview.endswith(".webp")
    assert preview in context.conversations.collect_referenced_keys() | context.jobs.collect_referenced_keys(3600)


def test_a_picture_is_a_picture(client):
    text = ask(client, "a picture of a red ball").choices[0].message.content
    _, link, clip = MARKUP.search(text).groups()
    assert clip is None and httpx.get(link, trust_env=False).content.startswith(b"\x89PNG")


def test_links_are_signed_for_one_path_and_expire(client, service, http):
    link = MARKUP.search(ask(client, "a red ball moving right").choices[0].message.content)[3]
    assert httpx.get(link, trust_env=False).status_code == 200
    bare, _, query = link.partition("?")
    assert httpx.get(bare, trust_env=False).status_code == 401
    assert http.get(bare).status_code == 200, "the key is enough without a signature"
    assert httpx.get(f"{bare}/preview.webp?{query}", trust_env=False).json()["error"]["code"] == "invalid_link"
    for forged in (link.replace("owner=admin", "owner=other"), link[:-1] + ("0" if link[-1] != "0" else "1")):
        assert httpx.get(forged, trust_env=False).status_code == 403
    later = re.sub(r"expires=\d+", "expires=99999999999", link)
    assert httpx.get(later, trust_env=False).status_code == 403


def test_a_stream_tells_how_the_work_goes_on(client):
    chunks = stream(client, "a red ball moving right", extra_body={"steps": 10})
    news = join(chunks, "reasoning_content")
    assert news.startswith("Generating a clip: a red ball moving right\n")
    lines = news.splitlines()
    assert lines[1:3] == [line for line in lines[1:3] if re.fullmatch(r"\d+ %, about \d+ s left", line)]
    assert len([line for line in lines if "%" in line]) == 10, "one for each tenth"
    events = [chunk.model_extra["event"] for chunk in chunks if "event" in chunk.model_extra]
    assert [event["data"]["description"] for event in events] == lines
    assert [event["data"]["done"] for event in events] == [False] * (len(events) - 1) + [True]
    assert "![a red ball moving right](" in join(chunks)
    quiet = stream(client, "a red ball moving right", extra_body={"steps": 10, "progress": False})
    assert join(quiet, "reasoning_content") == "" and not any("event" in chunk.model_extra for chunk in quiet)


def test_news_stand_on_lines_of_their_own_among_the_reasoning(client):
    chunks = stream(client, "a red ball moving right", extra_body={"steps": 2, "think": "on"})
    news = join(chunks, "reasoning_content")
    assert news.startswith("because\nGenerating a clip: plainly a red ball moving right\n50 %")


def test_a_long_text_is_answered_in_words(client, context):
    jobs = context.jobs.count_by_lane_and_state()
    for options in ({}, {"stream": True}):
        result = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a red ball " * 500}], **(FIXED | options)
        )
        chunks = list(result) if options else []
        text = join(chunks) if options else result.choices[0].message.content
        reason = chunks[-1].choices[0].finish_reason if options else result.choices[0].finish_reason
        assert text == (
            "That message is too long: it has 5499 characters; give 1 to 4000. Please say it in fewer words."
        )
        assert reason == "stop"
    assert context.jobs.count_by_lane_and_state() == jobs, "nothing was generated"
    after = ask(client, "a red ball moving right", "a red ball " * 500, "how many balls are there?")
    assert "a red ball moving right" in after.choices[0].message.content, "the conversation goes on"


def test_an_unreadable_file_is_answered_in_words(client):
    broken = "data:image/png;base64,AAAA"
    content = [{"type": "text", "text": "describe this"}, {"type": "image_url", "image_url": {"url": broken}}]
    completion = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content.startswith("I cannot read the file that you sent: ")


def test_usage(client, context):
    count = context.conversations.mllm.count_tokens
    expected = (count("how are you?"), count("it is me"))
    usage = ask(client, "how are you?").usage
    assert (usage.prompt_tokens, usage.completion_tokens) == expected and min(expected) > 0
    assert usage.total_tokens == sum(expected) and usage.completion_tokens_details.reasoning_tokens == 0
    chunks = stream(client, "how are you?", stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage == usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in stream(client, "how are you?"))
    clip = ask(client, "a red ball moving right").usage
    assert clip.completion_tokens == count("Here is the clip: a red ball moving right\n\n"), "links do not count"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 2}, "n", "allowed: 1"),
        ({"temperature": 3}, "temperature", "allowed: 0 to 2"),
        ({"top_p": -1}, "top_p", "allowed: 0 to 1"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "4"),
        ({"tool_choice": "required"}, "tool_choice", "allowed: none, auto"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "allowed: none, auto"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "allowed: 0"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"logit_bias": {"50": 1}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "allowed: text, json_object, json_schema"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "not supported"),
    ],
)
def test_fields_that_cannot_be_honoured_are_refused_by_name(client, fields, param, message):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "how are you?", extra_body=fields)
    assert refused.value.param.startswith(param) and message in str(refused.value)


def test_fields_that_change_nothing_here_are_accepted(client):
    tools = [{"type": "function", "function": {"name": "x", "parameters": {}}}]
    fields = {"tools": tools, "tool_choice": "auto", "frequency_penalty": 0, "logprobs": False, "logit_bias": {}}
    assert ask(client, "how are you?", extra_body=fields | {"user": "ann"}).choices[0].message.content == "it is me"


def test_an_answer_ends_at_a_stop_sequence_and_at_the_limit_of_tokens(client, context):
    length = context.conversations.mllm.count_tokens("it is me")
    stopped = ask(client, "how are you?", stop=" me").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("it is", "stop")
    assert join(stream(client, "how are you?", stop=["is m"])) == "it "
    assert ask(client, "how are you?", max_tokens=length).choices[0].finish_reason == "length"
    assert ask(client, "how are you?", max_completion_tokens=length + 1).choices[0].finish_reason == "stop"


def test_reasoning_is_not_in_the_content(client, monkeypatch, context):
    mllm = context.conversations.mllm
    for pieces, content in (
        (("<th", "ink>let me", " see</thi", "nk>\n\n", "a poem"), "a poem"),
        (("<think>", "nothing else"), "I have no answer to that. What would you like to see, or to know?"),
        ((), "I have no answer to that. What would you like to see, or to know?"),
    ):
        monkeypatch.setattr(mllm.script, "stream_text", lambda request, pieces=pieces: iter(pieces))
        completion = ask(client, "how are you?").choices[0]
        assert completion.message.content == content and completion.finish_reason == "stop"
        chunks = stream(client, "how are you?")
        assert join(chunks) == content
        assert join(chunks, "reasoning_content") == getattr(completion.message, "reasoning_content", "")


def test_a_full_queue_is_the_same_error_in_both_forms(client, context, monkeypatch, http):
    monkeypatch.setattr(context.jobs, "max_queued_jobs", 0)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a red ball moving right"}]}
    refused = http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 429 and refused.headers["retry-after"] == "5"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    streamed = http.post("/v1/chat/completions", json=body | {"stream": True})
    assert (streamed.status_code, streamed.headers["retry-after"]) == (429, "5") and streamed.json()["error"] == error
    assert not context.turns.has_open_turn("admin", exclude_lane="batch")


def test_a_request_that_found_the_queue_full_is_repeated_with_its_key(context, monkeypatch, http):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a red ball"}], "steps": 1}
    headers = {"Idempotency-Key": "full"}
    with monkeypatch.context() as patch:
        patch.setattr(context.jobs, "max_queued_jobs", 0)
        for fields in ({}, {}):
            assert http.post("/v1/chat/completions", json=body | fields, headers=headers).status_code == 429
    repeated = http.post("/v1/chat/completions", json=body, headers=headers)
    assert repeated.status_code == 200 and "Here is" in repeated.json()["choices"][0]["message"]["content"]


def test_a_long_text_of_the_text_model_is_answered_in_words_too(client):
    completion = client.chat.completions.create(
        model="tiny-text", messages=[{"role": "user", "content": [{"type": "text", "text": "zero " * 9000}]}]
    )
    assert completion.choices[0].finish_reason == "stop" and completion.choices[0].message.content


def test_a_refused_text_is_stored_under_the_requests_name(client, context, http):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a red ball " * 500}]
    names = http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages}).json()["omnivideo"]
    assert context.turns.get_turn(names["turn"], "admin").error["param"] == "messages.1.content"
    response = http.post("/v1/responses", json={"model": "tiny", "input": "a red ball " * 500}).json()
    assert context.turns.get_turn(response["omnivideo"]["turn"], "admin").error["param"] == "input"
