"""The planner: a turn of a conversation through think, route, understand | generate | edit, check.

    plan -> refer -> think -> route -> understand | decline --> next action, or answer
                                    -> ask -> refer
                                    -> generate | edit -> check -> next candidate, next action, or answer

`refer` finds the artifact that an action refers to; if that is unclear, it interrupts the turn to ask the user. The
thread is checkpointed after every node, so a killed process loses at most one step. The planner knows only ports, and
emits events while a turn runs.
"""

import hashlib
import time
from typing import Any, Literal

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.config import get_config, get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from omnivideo.agent import english_rules
from omnivideo.agent.capabilities import build_refusal, get_task, reconcile_route
from omnivideo.agent.mllm_plan import LAST, NEW, build_plan_request, build_plan_schema, parse_plan
from omnivideo.agent.planner_prompts import load_prompts
from omnivideo.agent.references import ReferenceSearch
from omnivideo.agent.state import PlannerState
from omnivideo.contracts import (
    MAX_SEED,
    THINK_END,
    THINK_START,
    Artifact,
    Job,
    Medium,
    MLLMRequest,
    Route,
    get_editing_task,
    get_generation_task,
    get_source_length,
    resolve_sampling_params,
)
from omnivideo.ports import CHARACTER_LIMITS, MLLM, JobQueue, TextLimits
from omnivideo.presets import Preset
from omnivideo.turns import (
    Action,
    ActionResult,
    ArtifactReady,
    Candidate,
    Goal,
    Plan,
    PlanReady,
    PromptRewritten,
    TextDelta,
    ThinkingDelta,
    ThinkTrace,
    Turn,
    TurnCompleted,
    TurnEvent,
    TurnOptions,
)

# The names of the nodes are part of every stored checkpoint: a turn that waits for a reply resumes by these names. This
# node's name is older than its method's name.
REFERENCE_NODE = "refer"
MIN_ROUTE_PROBABILITY = 0.5  # below this probability, the user is asked
MIN_AGREEMENT = 0.5  # a candidate with this agreement is accepted
NOTHING_TO_EDIT_QUESTION = "There is nothing to change yet. What should I create?"
ROUTE_QUESTION = "I am not sure what you would like: a picture, a clip, or an answer in words?"
UNCLEAR_QUESTION = "I am not sure what you mean. What exactly should I make?"
DECLINE_MESSAGE = "I cannot help with that; I make and change clips and pictures, and answer questions about them."
MAX_QUESTIONS = 3  # about unclear requests, in one turn


def emit_event(event: TurnEvent) -> None:
    get_stream_writer()(event)


def derive_seed(*parts: object) -> int:
    """Return a seed derived from what it is used for, such as a thread, turn and action."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)


def split_reasoning(text: str) -> tuple[str, str]:
    """Split a think-mode answer into its reasoning and its rewrite, which is empty if the reasoning does not end."""
    before, mark, after = text.partition(THINK_END)
    return before.replace(THINK_START, "").strip(), after.strip() if mark else ""


class Planner:
    """The nodes of the graph. A node takes the thread's state and returns its updates."""

    def __init__(self, mllm: MLLM, queue: JobQueue, preset: Preset, text_limits: TextLimits = CHARACTER_LIMITS):
        self.mllm = mllm
        self.queue = queue
        self.preset = preset
        self.text_limits = text_limits
        self.prompts = load_prompts(preset)

    def build_graph(self, checkpointer: BaseCheckpointSaver[Any]) -> Any:
        builder = StateGraph(PlannerState)
        for name in ("plan", "think", "route", "understand", "generate", "edit", "ask", "decline", "check", "answer"):
            builder.add_node(name, getattr(self, name))
        builder.add_node(REFERENCE_NODE, self.resolve_reference)
        builder.add_edge(START, "plan")
        builder.add_edge("plan", REFERENCE_NODE)
        builder.add_conditional_edges(
            REFERENCE_NODE, choose_node_after_reference, ["think", "ask", "decline", REFERENCE_NODE, "answer"]
        )
        builder.add_edge("think", "route")
        builder.add_conditional_edges("route", choose_goal_node, ["understand", "generate", "edit", "ask", "decline"])
        builder.add_conditional_edges("understand", choose_next_node, [REFERENCE_NODE, "answer"])
        builder.add_conditional_edges("decline", choose_next_node, [REFERENCE_NODE, "answer"])
        builder.add_edge("ask", REFERENCE_NODE)
        builder.add_edge("generate", "check")
        builder.add_edge("edit", "check")
        builder.add_conditional_edges("check", choose_node_after_check, ["generate", "edit", REFERENCE_NODE, "answer"])
        builder.add_edge("answer", END)
        return builder.compile(checkpointer=checkpointer)

    # ------------------------------------------------------------ planning and resolving references

    def plan(self, state: PlannerState) -> dict[str, Any]:
        actions = self.split_actions(state)
        emit_event(PlanReady(plan=Plan(actions=tuple(Action(text=action["text"]) for action in actions))))
        attachments = state["attachments"]
        return {
            "action_texts": [action["text"] for action in actions],
            "action_references": [action["reference"] for action in actions],
            "action_goals": [action["goal"] for action in actions],
            "action_messages": [action["message"] for action in actions],
            "action_index": 0,
            "clarifications": [],
            "results": [],
            "artifacts": attachments,
            "current_key": attachments[-1]["key"] if attachments else state.get("current_key"),
            "descriptions": state.get("descriptions", {}),
        }

    def split_actions(self, state: PlannerState) -> list[dict[str, str]]:
        """Return each action's text, and its reference, goal and message to the user; "" if the plan does not say.

        An MLLM that can plan does this itself. Its plan is valid unless it is cut off before the first action is
        complete; the turn is then one action about the last artifact.
        """
        unplanned = {"reference": "", "goal": "", "message": ""}
        if self.prompts.plan is None:
            return [unplanned | {"text": text} for text in english_rules.split_actions(state["text"])]
        artifacts = [Artifact(**artifact) for artifact in state.get("artifacts", []) + state["attachments"]]
        request = MLLMRequest(
            text=build_plan_request(state["text"], artifacts),
            system=self.prompts.plan,
            json_schema=build_plan_schema(len(artifacts)),
        )
        planned_actions = parse_plan("".join(self.mllm.stream_text(request)), len(artifacts))
        if not planned_actions:
            return [unplanned | {"text": state["text"], "reference": LAST if artifacts else NEW}]
        return [
            {"text": action.do.strip(), "reference": action.about, "goal": action.action,
             "message": getattr(action, "say", "")}
            for action in planned_actions
        ]  # fmt: skip

    def resolve_reference(self, state: PlannerState) -> dict[str, Any]:
        """Find the artifact that the action refers to; ask the user if that is unclear."""
        search = ReferenceSearch(
            self.mllm,
            self.prompts.describe,
            [Artifact(**artifact) for artifact in state["artifacts"]],
            dict(state["descriptions"]),
            [],
        )
        text, goal = state["action_texts"][state["action_index"]], get_planned(state, "action_goals")
        source: Artifact | None = None
        if goal not in ("ask", "decline"):
            source = self.find_referenced_artifact(state, text, search)
            if source is None and not search.artifacts and self.is_edit(state, goal, text):
                # The reply replaces the request.
                text = search.ask_user(NOTHING_TO_EDIT_QUESTION)
        action = Action(text=text, source=None if source is None else source.key)
        updates = {
            "action": action.model_dump(), "trace": None, "statement": None, "candidates": [], "action_done": False,
            "message": get_planned(state, "action_messages"),
            "clarifications": state["clarifications"] + search.clarifications, "descriptions": search.descriptions,
        }  # fmt: skip
        if source is None or not english_rules.is_go_back_request(text):
            return updates
        emit_event(ArtifactReady(artifact=source))
        route = Route(kind="text", probability=1.0)
        result = ActionResult(action=action, goal="understand", route=route, trace=None, artifact=source)
        return updates | {"current_key": source.key} | close_action(state, result)

    def is_edit(self, state: PlannerState, goal: str, text: str) -> bool:
        """Return whether the plan, or without one the words, say that something is to be changed."""
        if goal or (self.prompts.plan and state["clarifications"]):  # a clarified request begins as it did
            return goal == "edit"
        return english_rules.is_change_request(text)

    def find_referenced_artifact(self, state: PlannerState, text: str, search: ReferenceSearch) -> Artifact | None:
        if state["action_index"] == 0 and state["attachments"]:
            return search.artifacts[-1]
        if reference := state["action_references"][state["action_index"]]:
            return search.artifact_from_plan(reference)
        return search.resolve_by_words(text, state["current_key"])

    # ------------------------------------------------------------ think and route

    def think(self, state: PlannerState) -> dict[str, Any]:
        """Route the request; in think mode, also rewrite it by reasoning before anything is rendered."""
        request, source = self.build_request(state), self.find_source(state)
        route = reconcile_route(self.preset, get_planned(state, "action_goals"), self.mllm.route(request), source)
        if route.kind == "ask" and len(state["clarifications"]) >= MAX_QUESTIONS:
            route = Route(kind="text", probability=1.0)
        updates: dict[str, Any] = {"detected_route": route.model_dump(), "trace": None}
        if message := self.write_message(request, route, source):
            return updates | {"message": message}
        options = TurnOptions(**state["options"])
        should_think = options.think == "on" or (options.think == "auto" and self.needs_thinking(request.text))
        if should_think and get_task(route, source):
            trace = self.rewrite_prompt(request)
            emit_event(PromptRewritten(trace=trace))
            updates["trace"] = trace.model_dump()
        return updates

    def write_message(self, request: MLLMRequest, route: Route, source: Artifact | None) -> str:
        """Return what the user is told or asked instead of a result; "" if there will be one."""
        system = {"ask": self.prompts.ask, "decline": self.prompts.decline}.get(route.kind)
        if route.kind in ("ask", "decline"):
            written = system and "".join(self.mllm.stream_text(request.model_copy(update={"system": system}))).strip()
            return written or (UNCLEAR_QUESTION if route.kind == "ask" else DECLINE_MESSAGE)
        return build_refusal(self.preset, route, source) or ""

    def needs_thinking(self, text: str) -> bool:
        """Return whether a request describes things instead of naming them, or is not in the MLLM's own words."""
        has_closed_vocabulary = self.prompts.plan is None
        return english_rules.is_indirect(text) or (has_closed_vocabulary and english_rules.has_other_words(text))

    def rewrite_prompt(self, request: MLLMRequest) -> ThinkTrace:
        started, text = time.perf_counter(), ""
        for piece in self.mllm.stream_text(request.model_copy(update={"system": self.prompts.think})):
            text += piece
            if THINK_END not in text and (visible := piece.replace(THINK_START, "")):
                emit_event(ThinkingDelta(delta=visible))
        reasoning, rewrite = split_reasoning(text)
        seconds = round(time.perf_counter() - started, 3)
        return ThinkTrace(request=request.text, reasoning=reasoning, rewrite=rewrite or request.text, seconds=seconds)

    def route(self, state: PlannerState) -> dict[str, Any]:
        """Keep the route of the MLLM's first token; if that is uncertain, ask the user."""
        route = Route(**state["detected_route"])
        if route.probability >= MIN_ROUTE_PROBABILITY:
            return {}
        reply = interrupt(ROUTE_QUESTION)
        kind: Literal["text", "image", "video"] = (
            "image" if any(word in reply.lower() for word in ("picture", "image", "photo", "still"))
            else "video" if any(word in reply.lower() for word in ("clip", "video", "animation", "movie")) else "text"
        )  # fmt: skip
        clarifications = [*state["clarifications"], (ROUTE_QUESTION, reply)]
        chosen = Route(kind=kind, probability=1.0)
        message = build_refusal(self.preset, chosen, self.find_source(state)) or ""
        return {"detected_route": chosen.model_dump(), "clarifications": clarifications, "message": message}

    # ------------------------------------------------------------ words instead of a result

    def ask(self, state: PlannerState) -> dict[str, Any]:
        """Interrupt the turn for a question; the reply is added to the request, which is then routed."""
        question, index = state["message"], state["action_index"]
        reply = str(interrupt(question))
        updates: dict[str, Any] = {"clarifications": [*state["clarifications"], (question, reply)]}
        answered = {"action_texts": f"{state['action']['text']}\n{reply}", "action_goals": "", "action_messages": ""}
        for key, value in answered.items():
            values = list(state.get(key) or [""] * len(state["action_texts"]))  # type: ignore[call-overload]
            updates[key] = [*values[:index], value, *values[index + 1 :]]
        return updates

    def decline(self, state: PlannerState) -> dict[str, Any]:
        """Answer with the refusal; nothing is rendered."""
        emit_event(TextDelta(delta=state["message"]))
        action, route = Action(**state["action"]), Route(kind="decline", probability=1.0)
        return close_action(
            state, ActionResult(action=action, goal="decline", route=route, trace=None, answer=state["message"])
        )

    # ------------------------------------------------------------ the three goals

    def understand(self, state: PlannerState) -> dict[str, Any]:
        answer = ""
        for piece in self.mllm.stream_text(self.build_request(state)):
            answer += piece
            emit_event(TextDelta(delta=piece))
        return close_action(state, ActionResult(**self.build_result_fields(state, "understand"), answer=answer.strip()))

    def generate(self, state: PlannerState) -> dict[str, Any]:
        return self.render_candidate(state, None)

    def edit(self, state: PlannerState) -> dict[str, Any]:
        return self.render_candidate(state, self.find_source(state))

    def render_candidate(self, state: PlannerState, source: Artifact | None) -> dict[str, Any]:
        """Render the next candidate: predict the prompt's visual tokens, then run a job with the next seed."""
        options, candidates = TurnOptions(**state["options"]), list(state["candidates"])
        turn_number, action_index, attempt = len(state["turns"]) + 1, state["action_index"], len(candidates)
        base_seed = options.seed
        if base_seed is None or base_seed == -1:
            base_seed = derive_seed(state["seed"], turn_number, action_index)
        medium: Medium = source.medium if source else "image" if state["detected_route"]["kind"] == "image" else "video"
        params = resolve_sampling_params(
            self.preset,
            get_editing_task(medium) if source else get_generation_task(medium),
            None if source is None else get_source_length(self.preset, source),
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            seed=(base_seed + attempt) % (MAX_SEED + 1),
        )
        prompt = self.text_limits.check_prompt("text", self.get_prompt(state), params)
        # A turn that failed may be sent again; its jobs need new ids.
        retry_suffix = f".{state['failed_turns']}" if state.get("failed_turns") else ""
        job = Job(
            id=f"{get_thread_id()}/{turn_number}.{action_index + 1}.{attempt + 1}{retry_suffix}",
            prompt=prompt,
            visual_tokens=self.mllm.predict_visual_tokens(
                MLLMRequest(text=prompt, artifacts=(source,) if source else ()), medium
            ),
            source=source,
            params=params,
            preset=self.preset.name,
        )
        artifact = self.follow_job(job, final=options.check == 1)
        return {"candidates": [*candidates, Candidate(seed=job.seed, artifact=artifact).model_dump()]}

    def follow_job(self, job: Job, final: bool) -> Artifact:
        for event in self.queue.run(job):
            if isinstance(event, Artifact):
                emit_event(ArtifactReady(artifact=event, final=final))
                return event
            emit_event(event)
        raise AssertionError("a job must end with an artifact")

    # ------------------------------------------------------------ check and answer

    def check(self, state: PlannerState) -> dict[str, Any]:
        """Inference-time scaling: let the MLLM judge the candidate, and render another one if it disagrees."""
        options = TurnOptions(**state["options"])
        candidates = [Candidate(**candidate) for candidate in state["candidates"]]
        if options.check == 1:
            return self.select_best(state, candidates)
        statement = state["statement"] or self.build_statement(state)
        question = self.prompts.check.format(prompt=statement)
        agreement = self.mllm.score_agreement(MLLMRequest(text=question, artifacts=(candidates[-1].artifact,)))
        candidates[-1] = candidates[-1].model_copy(update={"agreement": round(agreement, 4)})
        if agreement < MIN_AGREEMENT and len(candidates) < options.check:
            return {"candidates": [candidate.model_dump() for candidate in candidates], "statement": statement}
        return self.select_best(state, candidates)

    def build_statement(self, state: PlannerState) -> str:
        """Return what the result should show. An edit's instruction names only the change, so it is rewritten first."""
        trace = state["trace"]
        if trace is None and state["action"]["source"]:
            trace = self.rewrite_prompt(self.build_request(state)).model_dump()
        statement: str = trace["rewrite"] if trace else state["action"]["text"]
        return statement.removeprefix("picture of ").removeprefix("video of ")

    def select_best(self, state: PlannerState, candidates: list[Candidate]) -> dict[str, Any]:
        best = max(candidates, key=lambda candidate: candidate.agreement or 0.0).artifact
        if len(candidates) > 1 or candidates[0].agreement is not None:
            emit_event(ArtifactReady(artifact=best))
        goal: Goal = "edit" if best.source else "generate"
        result = ActionResult(**self.build_result_fields(state, goal), candidates=tuple(candidates), artifact=best)
        updates: dict[str, Any] = {"artifacts": [best.model_dump()], "current_key": best.key}
        return (
            updates | {"candidates": [candidate.model_dump() for candidate in candidates]} | close_action(state, result)
        )

    def answer(self, state: PlannerState) -> dict[str, Any]:
        turn = Turn(
            number=len(state["turns"]) + 1,
            text=state["text"],
            attachments=tuple(Artifact(**artifact) for artifact in state["attachments"]),
            clarifications=tuple((question, reply) for question, reply in state["clarifications"]),
            results=tuple(ActionResult(**result) for result in state["results"]),
        )
        emit_event(TurnCompleted(turn=turn))
        return {"turns": [turn.model_dump()]}

    # ------------------------------------------------------------ helpers of several nodes

    def find_source(self, state: PlannerState) -> Artifact | None:
        key = state["action"]["source"]
        return next((Artifact(**artifact) for artifact in reversed(state["artifacts"]) if artifact["key"] == key), None)

    def build_request(self, state: PlannerState) -> MLLMRequest:
        source = self.find_source(state)
        return MLLMRequest(text=state["action"]["text"], artifacts=(source,) if source else ())

    def get_prompt(self, state: PlannerState) -> str:
        prompt: str = state["trace"]["rewrite"] if state["trace"] else state["action"]["text"]
        return prompt

    def build_result_fields(self, state: PlannerState, goal: Goal) -> dict[str, Any]:
        return {"action": state["action"], "goal": goal, "route": state["detected_route"], "trace": state["trace"]}


def get_thread_id() -> str:
    return str(get_config()["configurable"]["thread_id"])


def close_action(state: PlannerState, result: ActionResult) -> dict[str, Any]:
    return {
        "results": [*state["results"], result.model_dump()],
        "action_index": state["action_index"] + 1,
        "action_done": True,
    }


def choose_next_node(state: PlannerState) -> str:
    return REFERENCE_NODE if state["action_index"] < len(state["action_texts"]) else "answer"


def get_planned(state: PlannerState, key: Literal["action_goals", "action_messages"]) -> str:
    """Return what the plan says of the current action; "" if there is no plan, or the turn began before there were."""
    values = state.get(key)
    return values[state["action_index"]] if values else ""


def choose_node_after_reference(state: PlannerState) -> str:
    """Return the node after a resolved reference; an action that only returns to an artifact is already done."""
    if state["action_done"]:
        return choose_next_node(state)
    goal = get_planned(state, "action_goals")
    return goal if goal in ("ask", "decline") else "think"


def choose_goal_node(state: PlannerState) -> str:
    kind = state["detected_route"]["kind"]
    if kind == "ask":
        return "ask"
    if state.get("message"):
        return "decline"
    if kind == "text":
        return "understand"
    return "edit" if state["action"]["source"] else "generate"


def choose_node_after_check(state: PlannerState) -> str:
    """Return the node that renders the next candidate, or the node of the next action if this one is done."""
    return choose_next_node(state) if state["action_done"] else choose_goal_node(state)
