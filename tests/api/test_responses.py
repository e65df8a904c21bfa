"""/v1/responses by the unmodified openai client: whole, streamed, in the background, and continued."""

import base64
import io

import openai
import pytest
from PIL import Image

from tests.support.openai_service import make_png, pause_worker, wait_until

FAST = {"extra_body": {"steps": 1, "seed": 3}}
CLIP = "a red ball moving right"


def respond(client, text="how are you?", **options):
    return client.responses.create(model="tiny", input=text, **(FAST | options))


def test_a_whole_response(client, context):
    response = respond(client, metadata={"for": "tests"}, instructions="be brief")
    assert (response.status, response.output_text, response.error) == ("completed", "it is me", None)
    assert response.metadata == {"for": "tests"} and response.instructions == "be brief"
    count = context.conversations.mllm.count_tokens
    assert response.usage.input_tokens == count("be brief\nhow are you?")
    assert (
        response.usage.output_tokens == count("it is me") == response.usage.total_tokens - response.usage.input_tokens
    )
    assert client.responses.retrieve(response.id).output_text == "it is me"


def test_a_clip_is_text_and_an_animated_picture(client):
    response = respond(client, CLIP)
    assert [item.type for item in response.output] == ["message", "image_generation_call"]
    assert "![a red ball moving right](" in response.output_text
    call = response.output[1]
    assert call.status == "completed" and call.output_format == "webp"
    assert Image.open(io.BytesIO(base64.b64decode(call.result))).n_frames == 9
    still = respond(client, "a picture of a ball").output[1]
    assert Image.open(io.BytesIO(base64.b64decode(still.result))).format == "PNG"


def test_a_streamed_response_is_the_whole_one(client):
    with client.responses.stream(model="tiny", input=CLIP, **FAST) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert "response.reasoning_summary_text.delta" in kinds and "response.image_generation_call.completed" in kinds
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    stored = client.responses.retrieve(final.id)
    assert text == final.output_text == stored.output_text
    assert final.usage == stored.usage
    quiet = client.responses.create(
        model="tiny", input=CLIP, stream=True, extra_body=FAST["extra_body"] | {"progress": False}
    )
    assert not any("reasoning" in event.type for event in quiet)


def test_a_stream_can_be_read_again_from_a_number(client):
    with client.responses.stream(model="tiny", input="how are you?", **FAST) as stream:
        final = stream.get_final_response()
    again = list(client.responses.retrieve(final.id, stream=True))
    later = list(client.responses.retrieve(final.id, stream=True, starting_after=4))
    assert later == again[5:] and again[-1].response.output_text == "it is me"


def test_a_previous_response_is_continued_and_forked(client):
    first = respond(client, CLIP)
    second = respond(client, "make it green", previous_response_id=first.id)
    assert "![make it green](" in second.output_text and second.previous_response_id == first.id
    fork = respond(client, "how many balls are there?", previous_response_id=first.id)
    assert fork.output_text == f"it is {CLIP}", "the fork does not have the second turn"
    last = respond(client, "how many balls are there?", previous_response_id=second.id)
    assert last.output_text == "it is make it green"


def test_a_history_of_messages_is_continued(client):
    first = respond(client, CLIP)
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": CLIP}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": first.output_text}]},
        {"role": "user", "content": "how many balls are there?"},
    ]
    assert respond(client, history).output_text == f"it is {CLIP}"
    by_reference = [history[0], *({"type": "item_reference", "id": item.id} for item in first.output), history[2]]
    assert respond(client, by_reference).output_text == f"it is {CLIP}"


def test_a_picture_is_described(client):
    url = f"data:image/png;base64,{base64.b64encode(make_png()).decode()}"
    file = client.files.create(file=("blue ball.png", make_png(7)), purpose="vision")
    for picture in ({"image_url": url}, {"file_id": file.id}):
        content = [{"type": "input_text", "text": "describe this"}, {"type": "input_image", **picture}]
        response = respond(client, [{"role": "user", "content": content}])
        assert response.status == "completed" and response.usage.total_tokens


def test_a_background_response_is_fetched_and_cancelled(client, service):
    with pause_worker(service[0]):
        response = respond(client, CLIP, background=True)
        assert response.status in ("queued", "in_progress") and response.output == []
        wait_until(lambda: client.responses.retrieve(response.id).status == "in_progress")
        with pytest.raises(openai.ConflictError, match="not complete"):
            respond(client, "make it green", previous_response_id=response.id)
        cancelled = client.responses.cancel(response.id)
        assert cancelled.status == client.responses.retrieve(response.id).status == "cancelled"
    done = respond(client, CLIP, background=True)
    whole = wait_until(lambda: (read := client.responses.retrieve(done.id)).status == "completed" and read)
    assert "![a red ball moving right](" in whole.output_text
    assert client.responses.cancel(done.id).status == "completed"


def test_words_and_errors(client, http, context, monkeypatch):
    long = respond(client, "a red ball " * 500)
    assert long.status == "completed" and long.output_text.startswith("That message is too long: ")
    assert "empty" in respond(client, "").output_text, "no words are an answer too, as in a chat"
    cut = respond(client, max_output_tokens=context.conversations.mllm.count_tokens("it is me"))
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    for fields, param in (
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True, "store": False}, "background"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.image_url"),
        ({"input": []}, "input"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ):
        refused = http.post("/v1/responses", json={"model": "tiny", "input": "hello"} | fields)
        assert refused.status_code in (400, 404) and refused.json()["error"]["param"] == param, refused.text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_0")
    unstored = respond(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)
    monkeypatch.setattr(context.jobs, "max_queued_jobs", 0)
    with pytest.raises(openai.RateLimitError):
        respond(client, CLIP)
    with pytest.raises(openai.RateLimitError):
        respond(client, CLIP, stream=True)
    background = list(respond(client, CLIP, stream=True, background=True))
    assert background[-1].type == "response.failed"
    assert background[-1].response.error.code == "rate_limit_exceeded"


def test_the_same_key_is_the_same_response(client):
    first, second = (respond(client, extra_headers={"Idempotency-Key": "one"}) for _ in range(2))
    assert first.id == second.id
    with pytest.raises(openai.UnprocessableEntityError):
        respond(client, metadata={"other": "one"}, extra_headers={"Idempotency-Key": "one"})
