"""The bodies that chat programs send, against a service: nothing is generated that nobody asked for."""

import json
import time
from pathlib import Path

import pytest

from omnivideo.agent.planner_prompts import load_prompts
from omnivideo.api.routes.chat import run_chat_request
from omnivideo.contracts import MLLMRequest, Route
from omnivideo.presets import TINY
from tests.api.test_chat_histories import OPTIONS, chat, count_jobs, last_result, make_picture_url, post, say, text_of
from tests.support.openai_service import make_http_client, run_service

FIXTURES = Path(__file__).parent / "fixtures"
REQUESTS = json.loads((FIXTURES / "chat_program_requests.json").read_text())
WRAPPED = json.loads((FIXTURES / "wrapped_messages.json").read_text())
SHAPES = json.loads((FIXTURES / "message_shapes.json").read_text())
FILLER = "one two three. " * 400  # 6,000 characters


def send_case(http, case: dict, **fields) -> dict:
    body = {name: case[name] for name in ("messages", "response_format") if name in case}
    return chat(http, body.pop("messages"), **body, **fields)


# ---------------------------------------------------------------- a model that cannot plan


@pytest.mark.parametrize("model", ["tiny", "tiny-text"])
@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case["name"])
def test_requests_about_a_conversation_are_answered_in_words_and_kept_in_no_thread(http, context, case, model):
    before = count_jobs(context), context.turns.list_threads("admin", None, 1000)
    started_at = time.perf_counter()
    answer = send_case(http, case, model=model)
    assert time.perf_counter() - started_at < 1
    assert answer["omnivideo"] == {"thread": None, "turn": None} and answer["usage"]["completion_tokens"]
    if key := case.get("json_key"):
        assert key in json.loads(text_of(answer))
    assert (count_jobs(context), context.turns.list_threads("admin", None, 1000)) == before


def send_shape(http, case: dict) -> dict:
    """Send a case's body, and return the answer's names: the thread and turn that it belongs to, if any."""
    body = json.loads(json.dumps(case["body"]).replace("{picture}", make_picture_url()))
    answer = http.post(case["path"], json=body | {"model": "tiny", "steps": 1})
    assert answer.status_code == 200, answer.text
    return answer.json()


def check_branch(http, context, case: dict) -> None:
    """Check that a case's body is answered in words alone, or generates what it asks for."""
    before = count_jobs(context)
    answer = send_shape(http, case)
    if case["reaches"] == "words":
        assert count_jobs(context) == before and not answer.get("omnivideo", {}).get("thread")
    else:
        result = last_result(http, answer)
        assert (result["goal"], bool(result["artifact"]["source"])) == (case["reaches"], case["reaches"] == "edit")
        assert count_jobs(context) == before + 1


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case["name"])
def test_every_shape_of_messages_reaches_its_branch(http, context, case):
    check_branch(http, context, case)


def test_the_text_model_never_generates(http, context):
    before = count_jobs(context)
    for message in ("a red circle", [{"type": "text", "text": "describe this"}, picture_part()]):
        assert text_of(chat(http, [say("user", message)], model="tiny-text"))
    assert count_jobs(context) == before
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny", "tiny-text"]


def picture_part() -> dict:
    return {"type": "image_url", "image_url": {"url": make_picture_url()}}


@pytest.mark.parametrize("case", WRAPPED, ids=lambda case: case["name"])
def test_wrapped_words_are_the_prompt(http, case):
    content = [{"type": "text", "text": case["text"].replace("{filler}", FILLER)}]
    answer = chat(http, [say("user", content + [picture_part()] * case.get("with_picture", False))])
    assert last_result(http, answer)["action"]["text"] == case.get("read_as", case["words"])


def test_a_named_file_that_did_not_come_is_said_so(http, context):
    before = count_jobs(context)
    (case,) = [case for case in WRAPPED if case.get("with_picture")]
    answer = chat(http, [say("user", case["text"])])
    assert text_of(answer).startswith("Disc.png was named, but did not arrive") and count_jobs(context) == before


def test_a_file_part_is_a_document_or_a_picture(http):
    data = "data:text/plain;base64,emVybyB6ZXJv"
    parts = [
        {"type": "file", "file": {"filename": "notes.txt", "file_data": data}},
        {"type": "text", "text": "a red star"},
    ]
    assert last_result(http, chat(http, [say("user", parts)]))["action"]["text"] == "a red star"
    parts = [{"type": "file", "file": {"file_data": make_picture_url()}}, {"type": "text", "text": "make it green"}]
    assert last_result(http, chat(http, [say("user", parts)]))["artifact"]["source"]
    assert post(http, [say("user", [{"type": "file", "file": {"file_id": "x"}}])]).status_code == 400


def test_more_generations_than_allowed_are_asked_about_first(http, context):
    before = count_jobs(context)
    message = say(
        "user", ". ".join(f"draw a {colour} square" for colour in ["red", "blue", "green", "white", "cyan"] * 2)
    )
    asked = chat(http, [message])
    assert "10 pictures and clips" in text_of(asked) and count_jobs(context) == before
    done = chat(http, [message, say("assistant", text_of(asked)), say("user", "yes")])
    assert text_of(done).count("Here is") == 4 and count_jobs(context) == before + 4


def test_a_picture_is_not_set_in_motion_by_weights_that_cannot(http, context):
    before = count_jobs(context)
    for words in ("animate this", "make it move right"):
        answer = chat(http, [say("user", [{"type": "text", "text": words}, picture_part()])])
        assert text_of(answer).startswith("I cannot animate pictures") and count_jobs(context) == before


def test_a_still_of_a_clip_is_one_of_its_frames(http, context):
    made = chat(http, [say("user", "a red ball")])
    before = count_jobs(context)
    answer = chat(
        http, [say("user", "a red ball"), say("assistant", text_of(made)), say("user", "a picture of its last frame")]
    )
    artifact = last_result(http, answer)["artifact"]
    assert (artifact["medium"], artifact["frames"]) == ("image", 1) and count_jobs(context) == before
    assert artifact["source"] == last_result(http, made)["artifact"]["key"]


def test_clips_of_a_chat_in_a_batch_are_rendered_in_the_batch_lane(context):
    def count_batch_jobs() -> int:
        return sum(count for lane, _, count in context.jobs.count_by_lane_and_state() if lane == "batch")

    before = count_batch_jobs()
    answer = run_chat_request(context, "admin", OPTIONS | {"messages": [say("user", "a red ball")]}, "line")
    assert text_of(answer).startswith("Here is") and count_batch_jobs() == before + 1


# ---------------------------------------------------------------- a model that plans

PLANNING = TINY.model_copy(
    update={
        "mllm": TINY.mllm.model_copy(update={"can_plan": True}), "prompts": "instructions", "animates_pictures": True,
    }
)  # fmt: skip
PROMPTS = load_prompts(PLANNING)


class PlanScript:
    """A model that plans one action for each message, by the message's first word."""

    def __init__(self) -> None:
        self.requests: list[MLLMRequest] = []

    def route(self, request: MLLMRequest) -> Route:
        kind = "video" if "move" in request.text or not request.artifacts else "image"
        return Route(kind="text" if request.text.startswith("describe") else kind, probability=0.99)

    def stream_text(self, request: MLLMRequest):
        self.requests.append(request)
        if not (request.system or "").startswith(PROMPTS.plan):
            yield json.dumps({"title": "A Title"}) if request.json_schema else "in words"
            return
        words = request.text.rpartition("The user says: ")[2]
        has_artifacts = "Made so far:\nnothing" not in request.text
        goal = "understand" if words.startswith("describe") else "edit" if words.startswith("make") else "generate"
        about = "new" if goal == "generate" or not has_artifacts else "last"
        yield json.dumps({"actions": [{"action": goal, "do": words[:300], "about": about}]})

    def score_agreement(self, request: MLLMRequest) -> float:
        return 0.9


@pytest.fixture(scope="module")
def planning(omni, tmp_path_factory):
    with run_service(tmp_path_factory.mktemp("planning"), omni) as service:
        wiring, context, _ = service
        wiring.mllm.script = script = PlanScript()
        context.conversations.preset = PLANNING
        context.conversations.get_graph.cache_clear()
        with make_http_client(service) as http:
            yield http, context, script


@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case["name"])
def test_a_planning_model_answers_requests_about_a_conversation(planning, case):
    http, context, script = planning
    before, num_requests = count_jobs(context), len(script.requests)
    answer = send_case(http, case)
    assert text_of(answer) in ("in words", '{"title": "A Title"}') and count_jobs(context) == before
    (request,) = script.requests[num_requests:]
    assert bool(request.json_schema) == ("json_key" in case)
    assert case["messages"][-1]["content"] in request.text


@pytest.mark.parametrize("case", WRAPPED, ids=lambda case: case["name"])
def test_a_planning_model_reads_wrappers_as_background(planning, case):
    http, _, script = planning
    content = [{"type": "text", "text": case["text"].replace("{filler}", FILLER)}]
    chat(http, [say("system", "be brief"), say("user", content + [picture_part()] * case.get("with_picture", False))])
    request = next(request for request in reversed(script.requests) if request.system.startswith(PROMPTS.plan))
    assert request.text.endswith(f"The user says: {case['words']}") and "be brief" in request.system
    assert ("zero zero" in request.system) == bool(case.get("documents"))


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case["name"])
def test_a_planning_model_reads_every_shape_of_messages(planning, case):
    http, context, script = planning
    num_requests = len(script.requests)
    check_branch(http, context, case)
    requests = script.requests[num_requests:]
    assert any(case.get("told", "") in (request.system or "") for request in requests)
    assert any(case.get("asked", "") in request.text for request in requests)


def test_a_request_about_a_conversation_lets_the_owners_turns_go_first(planning):
    http, context, _ = planning
    thread = http.post("/v1/threads").json()["id"]
    turn = http.post(f"/v1/threads/{thread}/turns", json={"text": "a red ball", "steps": 30}).json()["id"]
    assert text_of(send_case(http, REQUESTS[0]))
    assert context.turns.get_turn(turn, "admin").state == "done"


def test_a_planning_model_sets_a_picture_in_motion(planning):
    http, _, _ = planning
    moved = chat(http, [say("user", [{"type": "text", "text": "make it move right"}, picture_part()])])
    artifact = last_result(http, moved)["artifact"]
    assert artifact["medium"] == "video" and artifact["source"]
    still = chat(http, [say("user", [{"type": "text", "text": "make it blue"}, picture_part()])])
    assert last_result(http, still)["artifact"]["medium"] == "image"


def test_a_planning_model_is_told_the_history_and_the_result_of_a_tool(planning):
    http, _, script = planning
    chat(http, [say("user", "a red ball"), say("assistant", "Foreign words"), say("user", "describe it")])
    assert any("Foreign words" in (request.system or "") for request in script.requests[-2:])
    tool = {"role": "tool", "tool_call_id": "1", "content": "It is 10:00"}
    answer = chat(http, [say("user", "what is the time?"), say("assistant", None), tool])
    assert text_of(answer) == "in words" and "It is 10:00" in script.requests[-1].system
    continued = chat(http, [say("user", "a poem"), say("assistant", "Roses are")])
    assert text_of(continued) == "in words" and script.requests[-1].text.endswith("Roses are")
