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
from dataclasses import replace
from typing import Any, Literal

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.config import get_config
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from omnivideo.agent import english_rules
from omnivideo.agent.capabilities import build_refusal, get_task, reconcile_route
from omnivideo.agent.command_results import ConvertArtifact, execute_command
from omnivideo.agent.planner_prompts import load_prompts
from omnivideo.agent.references import ReferenceSearch
from omnivideo.agent.small_world import replies
from omnivideo.agent.small_world.facts import answer_fact
from omnivideo.agent.small_world.turn_reading import resolve_reply
from omnivideo.agent.state import PlannerState
from omnivideo.agent.transitions import (
    GOALS_WITHOUT_SOURCE,
    REFERENCE_NODE,
    choose_goal_node,
    choose_next_node,
    choose_node_after_check,
    choose_node_after_reference,
    close_action,
    emit_event,
    get_planned,
)
from omnivideo.agent.turn_plan import PlannedAction, get_details, plan_turn, reads_words, splice_actions, to_state
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
    ExecutedCommand,
    Goal,
    Plan,
    PlanReady,
    PromptRewritten,
    TextDelta,
    ThinkingDelta,
    ThinkTrace,
    Turn,
    TurnCompleted,
    TurnOptions,
)

MIN_ROUTE_PROBABILITY = 0.5  # below this probability, the user is asked
MIN_AGREEMENT = 0.5  # a candidate with this agreement is accepted
NOTHING_TO_EDIT_QUESTION = "There is nothing to change yet. What should I create?"
ROUTE_QUESTION = "I am not sure what you would like: a picture, a clip, or an answer in words?"
UNCLEAR_QUESTION = "I am not sure what you mean. What exactly should I make?"
DECLINE_MESSAGE = "I cannot help with that; I make and change clips and pictures, and answer questions about them."
MAX_QUESTIONS = 3  # about unclear requests, in one turn


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

    def __init__(
        self,
        mllm: MLLM,
        queue: JobQueue,
        preset: Preset,
        text_limits: TextLimits = CHARACTER_LIMITS,
        convert_artifact: ConvertArtifact | None = None,
    ):
        self.convert_artifact = convert_artifact
        self.mllm = mllm
        self.queue = queue
        self.preset = preset
        self.text_limits = text_limits
        self.prompts = load_prompts(preset)

    def build_graph(self, checkpointer: BaseCheckpointSaver[Any]) -> Any:
        builder = StateGraph(PlannerState)
        for name in (
            "plan",
            "think",
            "route",
            "understand",
            "generate",
            "edit",
            "ask",
            "decline",
            "command",
            "check",
            "answer",
        ):
            builder.add_node(name, getattr(self, name))
        builder.add_node(REFERENCE_NODE, self.resolve_reference)
        builder.add_edge(START, "plan")
        builder.add_edge("plan", REFERENCE_NODE)
        builder.add_conditional_edges(
            REFERENCE_NODE, choose_node_after_reference, ["think", *GOALS_WITHOUT_SOURCE, REFERENCE_NODE, "answer"]
        )
        builder.add_edge("think", "route")
        builder.add_conditional_edges("route", choose_goal_node, ["understand", "generate", "edit", "ask", "decline"])
        builder.add_conditional_edges("understand", choose_next_node, [REFERENCE_NODE, "answer"])
        builder.add_conditional_edges("decline", choose_next_node, [REFERENCE_NODE, "answer"])
        builder.add_conditional_edges("command", choose_next_node, [REFERENCE_NODE, "answer"])
        builder.add_edge("ask", REFERENCE_NODE)
        builder.add_edge("generate", "check")
        builder.add_edge("edit", "check")
        builder.add_conditional_edges("check", choose_node_after_check, ["generate", "edit", REFERENCE_NODE, "answer"])
        builder.add_edge("answer", END)
        return builder.compile(checkpointer=checkpointer)

    # ------------------------------------------------------------ planning and resolving references

    def plan(self, state: PlannerState) -> dict[str, Any]:
        descriptions = dict(state.get("descriptions", {}))
        actions = plan_turn(self.mllm, self.preset, self.prompts, state, state["text"], descriptions)
        emit_event(PlanReady(plan=Plan(actions=tuple(Action(text=action.text) for action in actions))))
        attachments = state["attachments"]
        return to_state(actions) | {
            "action_index": 0,
            "clarifications": [],
            "results": [],
            "artifacts": attachments,
            "current_key": attachments[-1]["key"] if attachments else state.get("current_key"),
            "descriptions": descriptions,
        }

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
        if goal not in GOALS_WITHOUT_SOURCE:
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
            return search.artifact_from_plan(reference, state["current_key"])
        return search.resolve_by_words(text, state["current_key"])

    # ------------------------------------------------------------ think and route

    def think(self, state: PlannerState) -> dict[str, Any]:
        """Route the request; in think mode, also rewrite it by reasoning before anything is rendered."""
        request, source = self.build_request(state), self.find_source(state)
        if medium := get_details(state).get("medium"):  # the words say it
            route = Route(kind=medium, probability=1.0)
        else:
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
        request = state["action"]["text"]
        actions = [PlannedAction(f"{request}\n{reply}", state["action_references"][index])]
        if reads_words(self.preset):  # the MLLM knows only its own wording, so the reply is read anew
            descriptions = dict(state["descriptions"])
            actions = plan_turn(
                self.mllm, self.preset, self.prompts, state, resolve_reply(request, question, reply), descriptions
            )
            if len(updates["clarifications"]) >= MAX_QUESTIONS:
                actions = [replace(action, goal=action.goal.replace("ask", "decline")) for action in actions]
            updates["descriptions"] = descriptions
        return updates | splice_actions(state, index, index + 1, actions)

    def decline(self, state: PlannerState) -> dict[str, Any]:
        """Answer with the refusal; nothing is rendered."""
        emit_event(TextDelta(delta=state["message"]))
        action, route = Action(**state["action"]), Route(kind="decline", probability=1.0)
        return close_action(
            state, ActionResult(action=action, goal="decline", route=route, trace=None, answer=state["message"])
        )

    def command(self, state: PlannerState) -> dict[str, Any]:
        """Execute a command about the conversation, without the MLLM."""
        command = ExecutedCommand(**get_details(state)["command"])
        help_text = replies.build_help() if reads_words(self.preset) else replies.HELP_OPEN
        outcome = execute_command(state, command, help_text, self.convert_artifact)
        emit_event(TextDelta(delta=outcome.message))
        if outcome.artifact is not None:
            emit_event(ArtifactReady(artifact=outcome.artifact))
        goal: Goal = "decline" if outcome.is_refused else "command"
        action, route = Action(**state["action"]), Route(kind="text", probability=1.0)
        result = ActionResult(
            action=action, goal=goal, route=route, trace=None, artifact=outcome.artifact, answer=outcome.message,
            command=None if outcome.is_refused else command,
        )  # fmt: skip
        following = state["action_index"] + 1
        added = splice_actions(state, following, following, outcome.actions) if outcome.actions else {}
        return close_action(state, result) | added | outcome.updates

    # ------------------------------------------------------------ the three goals

    def understand(self, state: PlannerState) -> dict[str, Any]:
        answer = ""
        for piece in self.answer_fact(state) or self.mllm.stream_text(self.build_request(state)):
            answer += piece
            emit_event(TextDelta(delta=piece))
        return close_action(state, ActionResult(**self.build_result_fields(state, "understand"), answer=answer.strip()))

    def answer_fact(self, state: PlannerState) -> list[str]:
        """Return the answer to a question about what the file, the world or the thread says; [] for another."""
        details, source = get_details(state), self.find_source(state)
        if say := details.get("say"):
            return [say]
        fact = details.get("fact")
        if fact is None or source is None:
            return []
        artifacts = [Artifact(**artifact) for artifact in state["artifacts"]]
        search = ReferenceSearch(self.mllm, self.prompts.describe, artifacts, dict(state["descriptions"]), [])
        return [answer_fact(fact, source, artifacts, search.describe_artifact)]

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
            seed=(base_seed + attempt + get_details(state).get("seed_offset", 0)) % (MAX_SEED + 1),
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
