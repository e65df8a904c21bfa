"""openai-python: every route that the service has in common with OpenAI's."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
from observe import (
    BASE_URL,
    CONVERSATION,
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

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=120)
TOOLS = [{"type": "function", "function": {"name": TOOL_NAME, "parameters": {"type": "object", "properties": {}}}}]
history: list = []


class Title(BaseModel):
    title: str


@observe("models")
def list_models():
    return [model.id for model in client.models.list()]


@observe("conversation")
def converse():
    def answer(messages):
        history[:] = messages
        return client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content

    return hold(answer)


@observe("streaming")
def stream():
    counts = []

    def answer(messages):
        chunks = list(client.chat.completions.create(model=MODEL, messages=messages, stream=True))
        texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
        counts.append(len(chunks))
        return "".join(texts)

    return hold(answer) | {"chunks": counts}


@observe("usage")
def count_tokens():
    message = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model=MODEL, messages=message).usage
    options = {"include_usage": True}
    *_, last = client.chat.completions.create(model=MODEL, messages=message, stream=True, stream_options=options)
    return [[usage.prompt_tokens, usage.completion_tokens] for usage in (whole, last.usage)]


@observe("picture")
def describe_picture():
    parts = [{"type": "text", "text": "describe this"}, {"type": "image_url", "image_url": {"url": encode_picture()}}]
    messages = [{"role": "user", "content": parts}]
    return client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content


@observe("responses")
def respond():
    previous, answers = None, []
    for words in CONVERSATION:
        response = client.responses.create(model=MODEL, input=words, previous_response_id=previous)
        previous = response.id
        answers.append(response.output_text)
    return {"answers": answers}


@observe("tools")
def offer_tools():
    messages = [{"role": "user", "content": "what colour is it?"}]
    offered = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
    call = {"id": "call_1", "type": "function", "function": {"name": TOOL_NAME, "arguments": "{}"}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": TOOL_RESULT})
    told = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
    return {"answer": offered.content, "calls": len(offered.tool_calls or ()), "told": told.content}


@observe("forced tool")
def force_tool():
    messages = [{"role": "user", "content": "what colour is it?"}]
    client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, tool_choice="required")


@observe("structured output")
def ask_for_json():
    messages = [*history, {"role": "user", "content": TITLE_REQUEST}]
    parsed = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Title)
    return parsed.choices[0].message.parsed.model_dump()


@observe("title")
def ask_for_title():
    messages = [*history, {"role": "user", "content": TITLE_REQUEST}]
    return client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content


@observe("images")
def make_image():
    import base64

    made = client.images.generate(model=MODEL, prompt="a red circle", response_format="b64_json")
    data = base64.b64decode(made.data[0].b64_json)
    edited = client.images.edit(model=MODEL, image=("a.png", data), prompt="make it blue", response_format="b64_json")
    return [describe_bytes(data), describe_bytes(base64.b64decode(edited.data[0].b64_json))]


@observe("videos")
def make_video():
    video = client.videos.create_and_poll(prompt=CONVERSATION[0], size="64x64", poll_interval_ms=200)
    assert video.status == "completed", video
    remix = client.videos.remix(video.id, prompt="make it blue")
    remix = client.videos.poll(remix.id, poll_interval_ms=200)
    return [describe_bytes(client.videos.download_content(item.id).read()) for item in (video, remix)]


@observe("files")
def keep_file():
    data = read_picture()
    file = client.files.create(file=("square.png", data), purpose="vision")
    same = client.files.content(file.id).read() == data
    listed = file.id in [item.id for item in client.files.list()]
    return {"same": same, "listed": listed, "deleted": client.files.delete(file.id).deleted}


@observe("batches")
def run_batch():
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.files.create(file=("lines.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    for _ in range(600):
        batch = client.batches.retrieve(batch.id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            break
        threading.Event().wait(0.1)
    lines = client.files.content(batch.output_file_id).read().splitlines()
    return {"status": batch.status, "lines": [json.loads(line)["response"]["status_code"] for line in lines]}


@observe("webhooks")
def receive_webhook():
    received = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            received.append((body, dict(self.headers)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/hook"
    hook = client.post("/webhooks", cast_to=dict, body={"url": url, "event_types": ["video.completed"]})
    video = client.videos.create_and_poll(prompt="a red ball", size="64x64", poll_interval_ms=200)
    for _ in range(300):
        if received:
            break
        threading.Event().wait(0.1)
    body, headers = received[0]
    event = client.webhooks.unwrap(body, headers, secret=hook["secret"])
    client.delete(f"/webhooks/{hook['id']}", cast_to=dict)
    return {"type": event.type, "same": event.data.id == video.id}


@observe("over-long text")
def send_too_long():
    return (
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": OVER_LONG}])
        .choices[0]
        .message.content
    )
