"""A conversation continues whatever a chat program has made of its history."""

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.openai_service import make_http_client, run_service, wait_until

OPTIONS = {"model": "tiny", "steps": 1}


def post(http: httpx.Client, messages: list, **fields) -> httpx.Response:
    return http.post("/v1/chat/completions", json=OPTIONS | {"messages": messages} | fields)


def chat(http: httpx.Client, messages: list, **fields) -> dict:
    """Send messages and return the answer, which must be one."""
    response = post(http, messages, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def say(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def last_result(http: httpx.Client, answer: dict) -> dict:
    """Return the last result of an answer's turn."""
    names = answer["omnivideo"]
    return http.get(f"/v1/threads/{names['thread']}/turns/{names['turn']}").json()["turn"]["results"][-1]


def make_picture_url(colour=(200, 30, 30), size=(64, 64)) -> str:
    out = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), colour, dtype=np.uint8)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


@pytest.fixture(scope="module")
def service(omni, tmp_path_factory):
    with run_service(tmp_path_factory.mktemp("service"), omni, disconnect_grace_seconds=0.5) as service:
        yield service


@pytest.fixture(scope="module")
def chat_history(http) -> tuple[list[dict], str]:
    """Return the messages of a conversation of two turns, and the key of its last clip."""
    first = chat(http, [say("system", "It is 10:00"), say("user", "a red ball"),])  # fmt: skip
    messages = [say("system", "It is 10:00"), say("user", "a red ball"), say("assistant", text_of(first))]
    second = chat(http, [*messages, say("user", "make it blue")])
    assert last_result(http, second)["artifact"]["source"] == last_result(http, first)["artifact"]["key"]
    messages += [say("user", "make it blue"), say("assistant", text_of(second))]
    return messages, last_result(http, second)["artifact"]["key"]


def map_answers(change):
    return lambda messages: [
        say("assistant", change(message["content"])) if message["role"] == "assistant" else message
        for message in messages
    ]


def map_all(change):
    return lambda messages: [say(message["role"], change(message["content"])) for message in messages]


def find_addresses(text: str) -> list[str]:
    return re.findall(r"https?://[^\s)>]+", text)


def to_parts(message: dict) -> dict:
    return say(message["role"], [{"type": "text", "text": message["content"]}])


MANGLED = {
    "as sent": lambda messages: messages,
    "stripped": map_answers(str.strip),
    "surrounded by space": map_all(lambda text: f"\n {text}\n\n"),
    "CRLF": map_all(lambda text: text.replace("\n", "\r\n")),
    "spaces in place of line breaks": map_all(lambda text: " ".join(text.split())),
    "another time in the system text": lambda messages: [say("system", "It is 10:01"), *messages[1:]],
    "no system text": lambda messages: messages[1:],
    "a developer text": lambda messages: [say("developer", "Be brief"), *messages[1:]],
    "a further system text": lambda messages: [*messages[:3], say("system", "recap"), *messages[3:]],
    "the last two messages": lambda messages: messages[-2:],
    "the last answer": lambda messages: messages[-1:],
    "links only": map_answers(lambda text: "\n".join(find_addresses(text))),
    "links without a host": map_answers(lambda text: re.sub(r"https?://[^/]+", "", text)),
    "links of another host": map_answers(lambda text: re.sub(r"https?://[^/]+", "https://chat.example", text)),
    "links without signatures": map_answers(lambda text: re.sub(r"\?[^)>\s]*", "", text)),
    "links through a proxy": map_answers(
        lambda text: re.sub(r"https?://[^\s)>]+", lambda url: f"https://p.example/?u={quote(url[0], safe='')}", text)
    ),
    "links without Markdown": map_answers(lambda text: re.sub(r"[!<>\[\]()]", " ", text)),
    "HTML": map_answers(lambda text: "".join(f'<video src="{url}"></video>' for url in find_addresses(text))),
    "no links": map_answers(lambda text: re.sub(r"!?\[[^\]]*\]\([^)]*\)|<http[^>]*>", "", text)),
    "empty answers": map_answers(lambda text: ""),
    "cut off answers": map_answers(lambda text: text[:9]),
    "reasoning in the answers": map_answers(lambda text: f"<think>let me see</think>\n{text}"),
    "reasoning as a detail": map_answers(
        lambda text: f'<details type="reasoning" done="true"><summary>Thought</summary>\n> hm\n</details>\n{text}'
    ),
    "parts": lambda messages: [to_parts(message) for message in messages],
    "other upper case": lambda messages: [
        say(message["role"], message["content"].title() if message["role"] == "user" else message["content"])
        for message in messages
    ],
    "a greeting first": lambda messages: [messages[0], say("assistant", "How can I help?"), *messages[1:]],
    "an unanswered message": lambda messages: [*messages, say("user", "a green star")],
    "wrapped words": lambda messages: [
        say("user", f"<context>\nold notes\n</context>\n{message['content']}") if message["role"] == "user" else message
        for message in messages
    ],
}


@pytest.mark.parametrize("form", MANGLED)
def test_a_conversation_continues_in_any_form_of_its_history(http, chat_history, form):
    messages, key = chat_history
    answer = chat(http, [*MANGLED[form](messages), say("user", "make it green")])
    assert last_result(http, answer)["artifact"]["source"] == key


def test_two_conversations_of_the_same_words_are_kept_apart(http):
    messages = [say("user", "a yellow star")]
    answers = [chat(http, messages) for _ in range(2)]
    for answer in answers:
        history = [*messages, say("assistant", text_of(answer).strip()), say("user", "make it blue")]
        assert (
            last_result(http, chat(http, history))["artifact"]["source"] == last_result(http, answer)["artifact"]["key"]
        )


def test_words_after_the_last_link_are_part_of_the_conversation(http):
    messages = [say("user", "a white ball")]
    for text in ("how many balls are there?", "make it blue"):
        answer = chat(http, messages)
        messages += [say("assistant", text_of(answer)), say("user", text)]
        thread = answer["omnivideo"]["thread"]
    edited = chat(http, messages)
    assert edited["omnivideo"]["thread"] == thread and last_result(http, edited)["artifact"]["source"]
    # An edited question is another branch; its answer has no link, so the conversation after it is found by its words.
    branch = chat(http, [*messages[:2], say("user", "how many things are there?")])
    assert branch["omnivideo"]["thread"] != thread
    messages[2:4] = [say("user", "how many things are there?"), say("assistant", text_of(branch))]
    assert chat(http, messages)["omnivideo"]["thread"] == branch["omnivideo"]["thread"]


def test_the_reply_to_a_question_is_a_reply_and_an_edited_request_is_not(http):
    first = [say("user", "make it purple")]
    asked = chat(http, first)
    assert "nothing" in text_of(asked).lower()
    history = [*first, say("assistant", text_of(asked).strip()), say("user", "a purple ball")]
    replied = chat(http, history)
    assert replied["omnivideo"]["thread"] == asked["omnivideo"]["thread"]
    assert last_result(http, replied)["artifact"]
    again = chat(http, [say("user", "make it orange"), say("assistant", text_of(asked)), say("user", "a star")])
    assert again["omnivideo"]["thread"] != asked["omnivideo"]["thread"]


def test_a_foreign_history_is_rebuilt_with_its_pictures(http):
    picture = {"type": "image_url", "image_url": {"url": make_picture_url()}}
    history = [
        say("user", [{"type": "text", "text": "what do you think of this?"}, picture]),
        say("assistant", "A fine red."),
        say("user", "make it blue"),
    ]
    result = last_result(http, chat(http, history))
    assert result["goal"] == "edit" and result["artifact"]["source"] and result["artifact"]["medium"] == "image"


def test_a_link_of_another_owner_is_no_link(service, chat_history):
    messages, _ = chat_history
    _, other_key = service[1].api_keys.create_key("somebody else")
    with make_http_client(service) as other:
        other.headers["Authorization"] = f"Bearer {other_key}"
        answer = chat(other, [*messages, say("user", "make it green")])
        assert "nothing to change" in text_of(answer)


def test_a_picture_and_its_words_may_be_two_messages(http):
    picture = say("user", [{"type": "image_url", "image_url": {"url": make_picture_url((30, 30, 200))}}])
    result = last_result(http, chat(http, [picture, say("user", "make it green")]))
    assert result["goal"] == "edit" and result["artifact"]["source"]
    alone = chat(http, [picture])
    assert last_result(http, alone)["goal"] == "understand"


# ---------------------------------------------------------------- endings, parallel requests, and stopped ones


def count_jobs(context) -> int:
    return sum(count for *_, count in context.jobs.count_by_lane_and_state())


def test_an_answer_is_continued_in_words(http, context, chat_history):
    messages, _ = chat_history
    before = count_jobs(context)
    continued = chat(http, messages)
    assert text_of(continued).startswith("\n\n"), "a program appends it to an answer that is complete"
    assert continued["omnivideo"] == {"thread": None, "turn": None}
    tool = [
        say("user", "what is the time?"),
        say("assistant", None),
        {"role": "tool", "tool_call_id": "1", "content": "It is 10:00"},
    ]
    assert text_of(chat(http, tool)) == "It is 10:00"
    assert count_jobs(context) == before


def test_parallel_continuations_fork(http, chat_history, service):
    messages, key = chat_history
    with make_http_client(service) as client, ThreadPoolExecutor(3) as pool:
        texts = ("make it green", "make it white", "make it orange")
        answers = list(pool.map(lambda text: chat(client, [*messages, say("user", text)], steps=6), texts))
    assert len({answer["omnivideo"]["thread"] for answer in answers}) == 3
    assert {last_result(http, answer)["artifact"]["source"] for answer in answers} == {key}


def test_a_closed_stream_cancels_its_work_and_the_next_message_is_answered(http, context, service):
    messages = [say("user", "a slow purple ball")]
    body = OPTIONS | {"messages": messages, "stream": True, "steps": 200}
    with make_http_client(service) as client, client.stream("POST", "/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())
    threads = http.get("/v1/threads?limit=1").json()["data"]
    rows = context.turns.list_turns(threads[0]["id"])
    answer = chat(http, [*messages, say("user", "a red ball")])
    assert last_result(http, answer)["artifact"]
    wait_until(lambda: context.turns.get_turn(rows[-1].id, "admin").state == "cancelled")
