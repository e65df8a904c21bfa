"""What the messages of chat programs mean: wrappers, consecutive messages, and requests about a conversation."""

import json
import random
from pathlib import Path

import pytest

from omnivideo.agent.media_words import find_requested_medium
from omnivideo.api.chat.links import find_artifact_links, remove_addresses
from omnivideo.api.chat.messages import ChatMessage, read_conversation
from omnivideo.api.chat.task_answers import answer_by_rule
from omnivideo.api.chat.tasks import find_task
from omnivideo.api.chat.wrappers import split_wrappers
from omnivideo.evaluation.prompts import sample_prompts
from omnivideo.synthetic.edits import sample_edit

FIXTURES = Path(__file__).parent / "fixtures"
REQUESTS = json.loads((FIXTURES / "chat_program_requests.json").read_text())
WRAPPED = [
    case
    for name in ("wrapped_messages.json", "more_wrapped_messages.json")  # the first are also sent to services
    for case in json.loads((FIXTURES / name).read_text())
]
KEY = "a" * 64 + ".mp4"


def read(*messages: tuple) -> object:
    return read_conversation([ChatMessage(role=role, content=content) for role, content in messages])


def find_task_in(case: dict):
    messages = [ChatMessage(**message) for message in case["messages"]]
    return find_task(read_conversation(messages), messages[-1].text, case.get("response_format"))


# ---------------------------------------------------------------- wrappers


@pytest.mark.parametrize("case", WRAPPED, ids=lambda case: case["name"])
def test_wrappers_are_context_and_not_words(case):
    split = split_wrappers(case["text"].replace("{filler}", "one two three. " * 400))
    assert split.words == case["words"]
    assert [document.name for document in split.documents] == case.get("documents", [])
    assert all("zero" in document.text and "red" not in document.text for document in split.documents)
    assert bool(split.named_files) == case.get("with_picture", False)


def test_a_file_that_is_named_without_its_content_is_known():
    tag = '<attached_files>\n<file type="{}" url="u" name="{}"/>\n</attached_files>\n\ndescribe this'
    (picture,) = split_wrappers(tag.format("image", "cat.png")).named_files
    (notes,) = split_wrappers(tag.format("file", "notes.txt")).named_files
    assert (picture.name, picture.is_media, notes.name, notes.is_media) == ("cat.png", True, "notes.txt", False)
    listed = split_wrappers("<attached_files>\n- uploads/cat.png\n</attached_files>\nanimate it")
    assert [file.name for file in listed.named_files] == ["uploads/cat.png"] and listed.words == "animate it"


@pytest.mark.parametrize(
    "text",
    [
        "a red circle", "make it <b>bold</b> and blue", "a < b and b > c", "draw a sign that says <stop>",
        "a circle\n\nand a star", "# a heading\na red circle", "what is the context of this picture?",
        "a clip of a question: is it red?",
    ],
)  # fmt: skip
def test_a_persons_own_words_are_left_alone(text):
    split = split_wrappers(text)
    assert split.words == text and not split.documents and not split.named_files


# ---------------------------------------------------------------- turns


def test_a_picture_and_the_words_about_it_are_one_turn():
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    for messages in ((("user", picture), ("user", "describe it")), (("user", "describe it"), ("user", picture))):
        shown = read(*messages)
        assert shown.turn.words == "describe it" and len(shown.turn.media) == 1 and not shown.history


def test_a_message_without_an_answer_is_context():
    shown = read(("user", "a red circle"), ("user", "a blue star"), ("user", "make it green"))
    assert shown.turn.words == "make it green"
    assert [(exchange.user.words, exchange.is_answered) for exchange in shown.history] == [
        ("a red circle", False), ("a blue star", False),
    ]  # fmt: skip


def test_every_ending_of_a_history_is_read():
    begin = (("system", "be brief"), ("user", "a circle"), ("assistant", "Here is the clip"))
    assert read(*begin[:2]).ending == "user" and read(*begin[:2]).instructions == "be brief"
    continued = read(*begin)
    assert (continued.ending, continued.unfinished_answer, continued.turn.words) == (
        "assistant", "Here is the clip", "a circle",
    )  # fmt: skip
    tool = read(*begin, ("user", "what is the time?"), ("assistant", None), ("tool", "10:00"))
    assert (tool.ending, tool.tool_results, tool.turn.words) == ("tool", ("10:00",), "what is the time?")
    task = read(*begin, ("system", "Summarize the discussion"))
    assert (task.ending, task.turn.words, task.instructions) == ("system", "Summarize the discussion", "be brief")
    assert len(task.history) == 1


def test_artifacts_are_found_by_any_form_of_their_address():
    path = f"v1/threads/t1/artifacts/{KEY}"
    for text in (
        f"![a](http://h:8/{path})", f"<https://h/{path}?owner=a&expires=1&signature=b>", f"/{path}/preview",
        f"https://proxy/get?url=http%3A%2F%2Fh%2F{path.replace('/', '%2F')}", f"[clip]({path})",
    ):  # fmt: skip
        assert find_artifact_links(text) == [("t1", KEY)]
    assert not find_artifact_links("v1/threads/t1/artifacts/x.mp4")
    answer = f"Here: ![a b](http://h/{path}/preview)\n\n<http://h/{path}> end"
    assert remove_addresses(answer).split() == ["Here:", "end"]


# ---------------------------------------------------------------- requests about a conversation


@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case["name"])
def test_a_chat_programs_own_request_is_answered_in_its_form(case):
    task = find_task_in(case)
    assert task is not None and task.kind == case["kind"]
    answer = answer_by_rule(task)
    assert answer.strip() and len(answer) <= case.get("max_chars", 10_000)
    if key := case.get("json_key"):
        value = json.loads(answer)[key]
        assert isinstance(value, list if case["kind"] in ("tags", "follow_ups", "queries") else str)
    if case["kind"] == "title":
        assert any(word in answer for word in ("Red", "Blue"))


@pytest.mark.parametrize(
    "text",
    [
        "a red circle", "summarize the picture", "make a clip of a conversation with the title 'hello'",
        "title: a star",
        "name the shapes in this picture", "describe the chat bubble in the image", "tell me a short summary",
        "### a red circle", "give it a tag that says hello", "what is the name of this shape?",
    ],
)  # fmt: skip
def test_a_persons_request_is_no_request_about_the_conversation(text):
    assert find_task_in({"messages": [{"role": "user", "content": text}]}) is None


def test_no_plain_prompt_is_taken_for_a_request_about_the_conversation():
    for prompt in sample_prompts(20):
        assert find_task_in({"messages": [{"role": "user", "content": prompt.text}]}) is None
        assert split_wrappers(prompt.text).words == prompt.text


# ---------------------------------------------------------------- the medium that words ask for


@pytest.mark.parametrize(
    ("text", "source", "medium"),
    [
        ("animate this", "image", "video"), ("make it move right", "image", "video"),
        ("set the circle in motion", "image", "video"), ("turn this into a clip", "image", "video"),
        ("let the ball fall", "image", "video"), ("a video of it", "image", "video"),
        ("a picture of its last frame", "video", "image"), ("turn the clip into a picture", "video", "image"),
        ("show me the first frame", "video", "image"), ("a still of this", "video", "image"),
        ("make it blue", "image", None), ("make it blue", "video", None), ("make it move right", "video", None),
        ("move it to the left", "image", None), ("a picture of a star", "video", None),
    ],
)  # fmt: skip
def test_words_decide_the_medium_of_the_result(text, source, medium):
    assert find_requested_medium(text, source) == medium


@pytest.mark.parametrize("medium", ["image", "video"])
def test_no_edit_of_the_synthetic_world_asks_for_another_medium(medium):
    rng = random.Random(0)
    for _ in range(300):
        instruction = sample_edit(rng, medium == "video").instruction
        assert find_requested_medium(instruction, medium) is None, instruction
