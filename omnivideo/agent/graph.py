"""The planner: a turn of a conversation through think, route, understand | generate | edit, check.

    plan -> search -> refer -> think -> route -> understand | decline --> next action, or answer
                                              -> ask -> search
                                              -> generate | edit -> check -> next candidate, next action, or answer

If a turn asks for too much, `plan` is followed by `limit`, which asks about it.

`search` finds the artifact that an action refers to; if that is unclear, `refer` interrupts the turn to ask the user. A
node that interrupts runs again when the user replies, so it calls no model before. The thread is checkpointed after
every node. The planner knows only ports, and emits events while a turn runs.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from omnivideo.agent import english_rules, media_words
from omnivideo.agent.answer_text import end_at_stop, remove_reasoning, separate_reasoning
from omnivideo.agent.capabilities import (
    build_refusal,
    choose_result_medium,
    is_frame_request,
    reconcile_route,
)
from omnivideo.agent.command_results import execute_command
from omnivideo.agent.references import (
    ReferenceQuestion,
    ReferenceSearch,
    StoredArtifacts,
    ask_user,
    ask_which_artifact,
)
from omnivideo.agent.rendering import RenderingNodes, emit_action, emit_event
from omnivideo.agent.small_world import replies
from omnivideo.agent.small_world.facts import answer_fact
from omnivideo.agent.small_world.turn_reading import resolve_reply
from omnivideo.agent.state import PlannerState
from omnivideo.agent.transitions import (
    GOALS_WITHOUT_SOURCE,
    REFERENCE_NODE,
    SEARCH_NODE,
    choose_goal_node,
    choose_next_node,
    choose_node_after_check,
    choose_node_after_limit,
    choose_node_after_plan,
    choose_node_after_reference,
    close_action,
    get_planned,
)
from omnivideo.agent.turn_plan import (
    ACTIONS_ADAPTER,
    PlannedAction,
    build_limit_question,
    get_details,
    is_agreement,
    keep_first_generations,
    plan_turn,
    reads_words,
    splice_actions,
    to_state,
)
from omnivideo.contracts import (
    Artifact,
    MLLMRequest,
    Route,
    TextSampling,
)
from omnivideo.presets import Task
from omnivideo.turns import (
    Action,
    ActionDetail,
    ActionResult,
    ArtifactReady,
    ExecutedCommand,
    Plan,
    PlanReady,
    PromptRewritten,
    TextDelta,
    ThinkingDelta,
    Turn,
    TurnCompleted,
    TurnOptions,
)

NODES = (
    "plan",
    "limit",
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
)
ACTION_DETAILS: tuple[ActionDetail, ...] = get_args(ActionDetail)
MIN_ROUTE_PROBABILITY = 0.5  # below this probability, the user is asked
NOTHING_TO_EDIT_QUESTION = "There is nothing to change yet. What should I create?"
ROUTE_QUESTION = "I am not sure what you would like: a picture, a clip, or an answer in words?"
UNCLEAR_QUESTION = "I am not sure what you mean. What exactly should I make?"
NO_ANSWER_QUESTION = "I have no answer to that. What would you like to see, or to know?"
DECLINE_MESSAGE = "I cannot help with that; I make and change clips and pictures, and answer questions about them."
MAX_QUESTIONS = 3  # about unclear requests, in one turn


class Planner(RenderingNodes):
    """The nodes of the graph. A node takes the thread's state and returns its updates."""

    def build_graph(self, checkpointer: BaseCheckpointSaver[Any]) -> Any:
        builder = StateGraph(PlannerState)
        for name in NODES:
            builder.add_node(name, getattr(self, name))
        builder.add_node(SEARCH_NODE, self.search_reference)
        builder.add_node(REFERENCE_NODE, self.resolve_reference)
        builder.add_edge(START, "plan")
        builder.add_conditional_edges("plan", choose_node_after_plan, ["limit", SEARCH_NODE])
        builder.add_conditional_edges("limit", choose_node_after_limit, ["plan", SEARCH_NODE])
        builder.add_edge(SEARCH_NODE, REFERENCE_NODE)
        builder.add_conditional_edges(
            REFERENCE_NODE, choose_node_after_reference, ["think", *GOALS_WITHOUT_SOURCE, SEARCH_NODE, "answer"]
        )
        builder.add_edge("think", "route")
        builder.add_conditional_edges("route", choose_goal_node, ["understand", "generate", "edit", "ask", "decline"])
        for name in ("understand", "decline", "command"):
            builder.add_conditional_edges(name, choose_next_node, [SEARCH_NODE, "answer"])
        builder.add_edge("ask", SEARCH_NODE)
        builder.add_edge("generate", "check")
        builder.add_edge("edit", "check")
        builder.add_conditional_edges("check", choose_node_after_check, ["generate", "edit", SEARCH_NODE, "answer"])
        builder.add_edge("answer", END)
        return builder.compile(checkpointer=checkpointer)

    # ------------------------------------------------------------ planning and resolving references

    def plan(self, state: PlannerState) -> dict[str, Any]:
        """Split the turn into actions. If they would generate too much, the node `limit` asks the user first."""
        reply, descriptions = state.get("limit_reply") or "", dict(state.get("descriptions", {}))
        actions = self.plan_actions(state, descriptions, reply or state["text"])
        # Few actions are not looked at, because they are within the limit.
        is_short = len(actions) <= self.max_generations
        renders = [not is_short and self.is_generation(action) for action in actions]
        kept = keep_first_generations(actions, renders, self.max_generations)
        if reply:
            return self.start_actions(state, kept, [(state["limit_question"], reply)], descriptions)
        if len(kept) == len(actions):
            return self.start_actions(state, actions, [], descriptions)
        question = build_limit_question(sum(renders), self.max_generations)
        return {
            "limit_question": question, "limited_actions": list(map(asdict, kept)), "descriptions": descriptions
        }  # fmt: skip

    def limit(self, state: PlannerState) -> dict[str, Any]:
        """Interrupt the turn to ask about its length. The reply agrees to the first actions, or replaces all."""
        question = state["limit_question"]
        reply = str(interrupt(question))
        if is_agreement(reply):
            actions = ACTIONS_ADAPTER.validate_python(state["limited_actions"], extra="ignore")
            return self.start_actions(state, actions, [(question, reply)], state["descriptions"])
        return {"limit_reply": reply}

    def start_actions(
        self,
        state: PlannerState,
        actions: list[PlannedAction],
        clarifications: list[tuple[str, str]],
        descriptions: dict[str, str],
    ) -> dict[str, Any]:
        """Return the updates that begin with the first of the planned actions."""
        emit_event(PlanReady(plan=Plan(actions=tuple(Action(text=action.text) for action in actions))))
        attachments = state["attachments"]
        return to_state(actions) | {
            "action_index": 0,
            "limit_question": "",
            "limit_reply": "",
            "limited_actions": [],
            "clarifications": clarifications,
            "results": [],
            "current_key": attachments[-1]["key"] if attachments else state.get("current_key"),
            "descriptions": descriptions,
            **({"artifacts": attachments} if attachments else {}),  # a new version is written whole
        }

    def is_generation(self, action: PlannedAction) -> bool:
        """Return whether an action renders something, by the plan or, without one, by the MLLM's route."""
        if action.goal:
            return action.goal in ("generate", "edit")
        return self.mllm.route(MLLMRequest(text=action.text)).kind in ("image", "video")

    def plan_actions(self, state: PlannerState, descriptions: dict[str, str], text: str) -> list[PlannedAction]:
        return plan_turn(self.mllm, self.preset, self.prompts, state, text, descriptions)

    def search_reference(self, state: PlannerState) -> dict[str, Any]:
        """Find the artifact that the action refers to, or the question that must be asked to find it."""
        artifacts = StoredArtifacts(state["artifacts"])
        search = ReferenceSearch(self.mllm, self.prompts.describe, artifacts, dict(state["descriptions"]))
        text, goal = state["action_texts"][state["action_index"]], get_planned(state, "action_goals")
        found: Artifact | ReferenceQuestion | None = None
        if goal not in GOALS_WITHOUT_SOURCE:
            found = self.find_referenced_artifact(state, text, search)
            if found is None and not artifacts and self.is_edit(state, goal, text):
                found = ReferenceQuestion(NOTHING_TO_EDIT_QUESTION)
        question = found.text if isinstance(found, ReferenceQuestion) else ""
        key = found.key if isinstance(found, Artifact) else None
        return {"reference": {"key": key, "question": question}, "descriptions": search.descriptions}

    def resolve_reference(self, state: PlannerState) -> dict[str, Any]:
        """Take the artifact that was found; if that is unclear, ask the user."""
        if "reference" not in state:  # a checkpoint of a version that searched here
            state = state | self.search_reference(state)  # type: ignore[assignment]
        question, key = state["reference"]["question"], state["reference"]["key"]
        text, clarifications = state["action_texts"][state["action_index"]], list(state["clarifications"])
        artifacts = StoredArtifacts(state["artifacts"])
        source = artifacts.find_last(key)
        if question and artifacts:
            source = ask_which_artifact(question, artifacts, state["descriptions"], clarifications)
        elif question:
            text = ask_user(question, clarifications)  # the reply replaces the request
        planned = get_details(state)
        details = {name: planned[name] for name in ACTION_DETAILS if name in planned}
        action = Action(text=text, source=None if source is None else source.key, details=details or None)
        updates = {
            "action": action.model_dump(), "trace": None, "statement": None, "candidates": [], "action_done": False,
            "message": get_planned(state, "action_messages"),
            "clarifications": clarifications, "descriptions": state["descriptions"],
        }  # fmt: skip
        if source is None or not english_rules.is_go_back_request(text):
            return updates
        emit_action(state, "understand", text)
        emit_event(ArtifactReady(artifact=source))
        route = Route(kind="text", probability=1.0)
        result = ActionResult(action=action, goal="understand", route=route, trace=None, artifact=source)
        return updates | {"current_key": source.key} | close_action(state, result)

    def is_edit(self, state: PlannerState, goal: str, text: str) -> bool:
        """Return whether the plan, or without one the words, say that something is to be changed."""
        if goal or (self.prompts.plan and state["clarifications"]):  # a clarified request begins as it did
            return goal == "edit"
        return english_rules.is_change_request(text)

    def find_referenced_artifact(
        self, state: PlannerState, text: str, search: ReferenceSearch
    ) -> Artifact | ReferenceQuestion | None:
        reference = state["action_references"][state["action_index"]]
        if state["action_index"] == 0 and state["attachments"] and not reference.isdigit():
            return search.artifacts[-1]
        if reference:
            return search.artifact_from_plan(reference, state["current_key"])
        return search.resolve_by_words(text, state["current_key"])

    # ------------------------------------------------------------ think and route

    def think(self, state: PlannerState) -> dict[str, Any]:
        """Route the request; in think mode, also rewrite it by reasoning before anything is rendered."""
        request, source = self.build_request(state), self.find_source(state)
        route = self.choose_route(state, request, source)
        if route.kind == "ask" and len(state["clarifications"]) >= MAX_QUESTIONS:
            route = Route(kind="text", probability=1.0)
        updates: dict[str, Any] = {"detected_route": route.model_dump(), "trace": None}
        if message := self.write_message(request, route, source):
            return updates | {"message": message}
        options = TurnOptions.parse_stored(state["options"])
        task = self.find_task(state, route, source)
        should_think = options.think == "on" or (options.think == "auto" and self.needs_thinking(request.text, task))
        # The MLLM sees only the first of two pictures, and is not needed for clips that are joined.
        if should_think and task and task != "keyframes-to-video" and "joined" not in get_details(state):
            trace = self.rewrite_prompt(state, request)
            emit_event(PromptRewritten(trace=trace))
            updates["trace"] = trace.model_dump()
        return updates

    def choose_route(self, state: PlannerState, request: MLLMRequest, source: Artifact | None) -> Route:
        """Return the MLLM's route, within the plan; without a plan, English words may ask for another medium."""
        if medium := get_details(state).get("medium"):  # the words say it
            return Route(kind=medium, probability=1.0)
        route = self.mllm.route(request)
        if self.prompts.plan is not None:
            return reconcile_route(self.preset, get_planned(state, "action_goals"), route, source)
        worded_medium = None if source is None else media_words.find_requested_medium(request.text, source.medium)
        return choose_result_medium(route, source, worded_medium)

    def write_message(self, request: MLLMRequest, route: Route, source: Artifact | None) -> str:
        """Return what the user is told or asked instead of a result; "" if there will be one."""
        system = {"ask": self.prompts.ask, "decline": self.prompts.decline}.get(route.kind)
        if route.kind in ("ask", "decline"):
            pieces = self.mllm.stream_text(request.model_copy(update={"system": system})) if system else ()
            return remove_reasoning("".join(pieces)) or (UNCLEAR_QUESTION if route.kind == "ask" else DECLINE_MESSAGE)
        if is_frame_request(route, source) and self.media_tools is None:
            return "I cannot take a picture out of a clip here."
        return build_refusal(self.preset, route, source) or ""

    def needs_thinking(self, text: str, task: Task | None) -> bool:
        """Return whether a request describes things instead of naming them, or is not in the MLLM's own words.

        "Make it longer" says nothing of what is shown, and a prompt must.
        """
        if task in ("image-to-video", "video-extension"):
            return True
        has_closed_vocabulary = self.prompts.plan is None
        return english_rules.is_indirect(text) or (has_closed_vocabulary and english_rules.has_other_words(text))

    def route(self, state: PlannerState) -> dict[str, Any]:
        """Keep the route of the MLLM's first token; if that is uncertain, ask the user."""
        route = Route.parse_stored(state["detected_route"])
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
            actions = self.plan_actions(state, descriptions, resolve_reply(request, question, reply))
            if len(updates["clarifications"]) >= MAX_QUESTIONS:
                actions = [replace(action, goal=action.goal.replace("ask", "decline")) for action in actions]
            updates["descriptions"] = descriptions
        return updates | splice_actions(state, index, index + 1, actions)

    def decline(self, state: PlannerState) -> dict[str, Any]:
        """Answer with the refusal; nothing is rendered."""
        return self.answer_in_words(state, state["message"])

    def command(self, state: PlannerState) -> dict[str, Any]:
        """Execute a command about the conversation, without the MLLM."""
        command = ExecutedCommand.parse_stored(get_details(state)["command"])
        help_text = replies.build_help() if reads_words(self.preset) else replies.HELP_OPEN
        outcome = execute_command(state, command, help_text, self.media_tools, self.max_generations)
        if outcome.is_refused:
            return self.answer_in_words(state, outcome.message)
        emit_action(state, "command", state["action"]["text"])
        emit_event(TextDelta(delta=outcome.message))
        if outcome.artifact is not None:
            emit_event(ArtifactReady(artifact=outcome.artifact))
        action, route = Action.parse_stored(state["action"]), Route(kind="text", probability=1.0)
        result = ActionResult(
            action=action, goal="command", route=route, trace=None, artifact=outcome.artifact, answer=outcome.message,
            command=command,
        )  # fmt: skip
        following = state["action_index"] + 1
        added = splice_actions(state, following, following, outcome.actions) if outcome.actions else {}
        return close_action(state, result) | added | outcome.updates

    def understand(self, state: PlannerState) -> dict[str, Any]:
        """Answer in words. An answer that is nothing but reasoning becomes a question."""
        request, options, answer = self.build_request(state), TurnOptions.parse_stored(state["options"]), ""
        emit_action(state, "understand", request.text)
        sampling = TextSampling(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=self.choose_seed(state) % 2**31 if options.temperature else 0,
        )
        system = self.prompts.add_background(None, options.background)
        pieces: Iterable[str] = self.answer_fact(state)
        pieces = pieces or self.mllm.stream_text(request.model_copy(update={"sampling": sampling, "system": system}))
        for kind, piece in end_at_stop(separate_reasoning(pieces), options.stop):
            emit_event(ThinkingDelta(delta=piece) if kind == "thinking" else TextDelta(delta=piece))
            answer += piece if kind == "text" else ""
        if not answer.strip():
            answer = NO_ANSWER_QUESTION
            emit_event(TextDelta(delta=answer))
        return close_action(state, self.build_result(state, "understand", answer=answer.strip()))

    def answer_fact(self, state: PlannerState) -> list[str]:
        """Return the answer to a question about what the file, the world or the thread says; [] for another."""
        details, source = get_details(state), self.find_source(state)
        if say := details.get("say"):
            return [say]
        fact = details.get("fact")
        if fact is None or source is None:
            return []
        artifacts = StoredArtifacts(state["artifacts"])
        search = ReferenceSearch(self.mllm, self.prompts.describe, artifacts, dict(state["descriptions"]))
        return [answer_fact(fact, source, artifacts, search.describe_artifact, state["action"]["text"])]

    def answer(self, state: PlannerState) -> dict[str, Any]:
        turn = Turn(
            number=len(state["turns"]) + 1,
            text=state["text"],
            attachments=tuple(Artifact.parse_stored(artifact) for artifact in state["attachments"]),
            clarifications=tuple((question, reply) for question, reply in state["clarifications"]),
            results=tuple(ActionResult.parse_stored(result) for result in state["results"]),
        )
        emit_event(TurnCompleted(turn=turn))
        return {"turns": [turn.model_dump()]}
