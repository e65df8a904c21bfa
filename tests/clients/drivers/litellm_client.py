"""LiteLLM's functions, as its proxy calls them too."""

import base64
import json
import time

import litellm
from observe import (
    BASE_URL,
    CONVERSATION,
    FOLDER,
    KEY,
    MODEL,
    OVER_LONG,
    TITLE_REQUEST,
    TOOL_NAME,
    TOOL_RESULT,
    describe_bytes,
    encode_picture,
    hold,
    observe,
    read_picture,
)
from pydantic import BaseModel

OPTIONS = {"api_base": BASE_URL, "api_key": KEY, "max_retries": 0, "timeout": 120}
CHAT = OPTIONS | {"model": f"openai/{MODEL}"}
FILES = OPTIONS | {"custom_llm_provider": "openai"}
TOOLS = [{"type": "function", "function": {"name": TOOL_NAME, "parameters": {"type": "object", "properties": {}}}}]
history = []


class Title(BaseModel):
    title: str


@observe("conversation")
def converse():
    def answer(messages):
        history[:] = messages
        return litellm.completion(messages=messages, **CHAT).choices[0].message.content

    return hold(answer)


@observe("streaming")
def stream():
    counts = []

    def answer(messages):
        chunks = list(litellm.completion(messages=messages, stream=True, **CHAT))
        counts.append(len(chunks))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    return hold(answer) | {"chunks": counts}


@observe("usage")
def count_tokens():
    messages = [{"role": "user", "content": "hello"}]
    whole = litellm.completion(messages=messages, **CHAT).usage
    chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **CHAT))
    return [[usage.prompt_tokens, usage.completion_tokens] for usage in (whole, chunks[-1].usage)]


@observe("picture")
def describe_picture():
    parts = [{"type": "text", "text": "describe this"}, {"type": "image_url", "image_url": {"url": encode_picture()}}]
    return litellm.completion(messages=[{"role": "user", "content": parts}], **CHAT).choices[0].message.content


@observe("responses")
def respond():
    previous, answers = None, []
    for words in CONVERSATION:
        response = litellm.responses(input=words, previous_response_id=previous, **CHAT)
        previous = response.id
        answers.append(response.output_text)
    return {"answers": answers}


@observe("tools")
def offer_tools():
    messages = [{"role": "user", "content": "what colour is it?"}]
    offered = litellm.completion(messages=messages, tools=TOOLS, **CHAT).choices[0].message
    call = {"id": "call_1", "type": "function", "function": {"name": TOOL_NAME, "arguments": "{}"}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": TOOL_RESULT})
    told = litellm.completion(messages=messages, tools=TOOLS, **CHAT).choices[0].message
    return {"answer": offered.content, "calls": len(offered.tool_calls or ()), "told": told.content}


@observe("forced tool")
def force_tool():
    messages = [{"role": "user", "content": "what colour is it?"}]
    return litellm.completion(messages=messages, tools=TOOLS, tool_choice="required", **CHAT).choices[0].message.content


@observe("structured output")
def ask_for_json():
    messages = [*history, {"role": "user", "content": TITLE_REQUEST}]
    return json.loads(litellm.completion(messages=messages, response_format=Title, **CHAT).choices[0].message.content)


@observe("title")
def ask_for_title():
    messages = [*history, {"role": "user", "content": TITLE_REQUEST}]
    return litellm.completion(messages=messages, **CHAT).choices[0].message.content


@observe("images")
def make_image():
    made = litellm.image_generation(prompt="a red circle", **CHAT)
    data = base64.b64decode(made.data[0].b64_json)
    (FOLDER / "made.png").write_bytes(data)
    with (FOLDER / "made.png").open("rb") as file:
        edited = litellm.image_edit(image=file, prompt="make it blue", **CHAT)
    return [describe_bytes(data), describe_bytes(base64.b64decode(edited.data[0].b64_json))]


def download(video_id):
    """Wait for a video and return a description of its bytes."""
    for _ in range(300):
        status = litellm.video_status(video_id=video_id, **OPTIONS).status
        if status == "completed":
            return describe_bytes(litellm.video_content(video_id=video_id, **OPTIONS))
        time.sleep(0.2)
    raise TimeoutError(status)


@observe("videos")
def make_video():
    video = litellm.video_generation(prompt=CONVERSATION[0], size="64x64", **CHAT)
    clip = download(video.id)
    return [clip, download(litellm.video_remix(video_id=video.id, prompt="make it blue", **OPTIONS).id)]


@observe("files")
def keep_file():
    data = read_picture()
    file = litellm.create_file(file=("square.png", data), purpose="vision", **FILES)
    same = litellm.file_content(file_id=file.id, **FILES).content == data
    listed = file.id in [item.id for item in litellm.file_list(**FILES)]
    return {"same": same, "listed": listed, "deleted": litellm.file_delete(file_id=file.id, **FILES).deleted}


@observe("batches")
def run_batch():
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = litellm.create_file(file=("lines.jsonl", json.dumps(line).encode()), purpose="batch", **FILES)
    batch = litellm.create_batch(
        completion_window="24h", endpoint="/v1/chat/completions", input_file_id=file.id, **FILES
    )
    for _ in range(300):
        batch = litellm.retrieve_batch(batch_id=batch.id, **FILES)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            break
        time.sleep(0.2)
    lines = litellm.file_content(file_id=batch.output_file_id, **FILES).content.splitlines()
    return {"status": batch.status, "lines": [json.loads(line)["response"]["status_code"] for line in lines]}


@observe("over-long text")
def send_too_long():
    return litellm.completion(messages=[{"role": "user", "content": OVER_LONG}], **CHAT).choices[0].message.content
