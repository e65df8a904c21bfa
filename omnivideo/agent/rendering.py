"""The nodes that render an action's result, one candidate after the other, and choose the best."""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from langgraph.config import get_config, get_stream_writer

from omnivideo.agent import media_words
from omnivideo.agent.answer_text import split_rewrite
from omnivideo.agent.capabilities import explain_invalid_input, get_task, is_frame_request
from omnivideo.agent.planner_prompts import load_prompts
from omnivideo.agent.references import StoredArtifacts
from omnivideo.agent.state import PlannerState
from omnivideo.agent.transitions import close_action
from omnivideo.agent.turn_plan import get_details
from omnivideo.contracts import (
    MAX_SEED,
    THINK_END,
    THINK_START,
    Artifact,
    Job,
    Medium,
    MLLMRequest,
    Route,
    StepProgress,
    get_source_length,
    get_task_medium,
    resolve_sampling_params,
)
from omnivideo.errors import InvalidInput, JobCancelled
from omnivideo.ports import CHARACTER_LIMITS, MLLM, JobQueue, MediaTools, TextLimits
from omnivideo.presets import Preset, Task
from omnivideo.turns import (
    Action,
    ActionResult,
    ActionStarted,
    ArtifactReady,
    Candidate,
    Goal,
    TextDelta,
    ThinkingDelta,
    ThinkTrace,
    TurnEvent,
    TurnOptions,
)

MIN_AGREEMENT = 0.5  # a candidate with this agreement is accepted
CANCEL_REQUESTED = "cancel_requested"  # in a turn's configuration: the threading.Event of its thread
MAX_GENERATIONS = 4  # in one turn, unless the service's settings say otherwise


def emit_event(event: TurnEvent) -> None:
    """Send an event to who follows the turn. Raises JobCancelled if `Thread.cancel` was called."""
    cancel_requested = get_config()["configurable"].get(CANCEL_REQUESTED)
    if cancel_requested is not None and cancel_requested.is_set():
        raise JobCancelled("the turn was cancelled")
    get_stream_writer()(event)


def emit_action(state: PlannerState, goal: Goal, prompt: str, medium: Medium | None = None) -> None:
    emit_event(ActionStarted(index=state["action_index"], goal=goal, medium=medium, prompt=prompt))


def build_join_progress(count: int) -> Callable[[int], None]:
    """Return a function that reports how many of `count` clips have been read, and raises JobCancelled if it must."""
    begin = time.monotonic()

    def report(number: int) -> None:
        eta_seconds = (time.monotonic() - begin) / number * (count - number)
        emit_event(StepProgress(step=number, steps=count, eta_seconds=eta_seconds))

    return report


def derive_seed(*parts: object) -> int:
    """Return a seed derived from what it is used for, such as a thread, turn and action."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)


def build_job_id(state: PlannerState) -> str:
    """Return the id of the next candidate's job: of the thread, turn, action and attempt."""
    thread_id = get_config()["configurable"]["thread_id"]
    numbers = (len(state["turns"]) + 1, state["action_index"] + 1, len(state["candidates"]) + 1)
    # A turn that failed may be sent again; its jobs need new ids.
    retry_suffix = f".{state['failed_turns']}" if state.get("failed_turns") else ""
    return f"{thread_id}/{'.'.join(map(str, numbers))}{retry_suffix}"


def get_background(state: PlannerState) -> str:
    return TurnOptions.parse_stored(state["options"]).background


class RenderingNodes:
    """The planner's ports, and the nodes `generate`, `edit` and `check`."""

    def __init__(
        self,
        mllm: MLLM,
        queue: JobQueue,
        preset: Preset,
        media_tools: MediaTools | None = None,
        max_generations: int = MAX_GENERATIONS,
        text_limits: TextLimits = CHARACTER_LIMITS,
    ):
        self.mllm = mllm
        self.queue = queue
        self.preset = preset
        self.media_tools = media_tools
        self.max_generations = max_generations
        self.text_limits = text_limits
        self.prompts = load_prompts(preset)

    def generate(self, state: PlannerState) -> dict[str, Any]:
        return self.render_candidate(state, None)

    def edit(self, state: PlannerState) -> dict[str, Any]:
        source = self.find_source(state)
        assert source is not None, "an edit has a source"
        if numbers := get_details(state).get("joined"):
            return self.show_joined_clips(state, numbers)
        if self.media_tools is None or not self.needs_no_model(state):
            return self.render_candidate(state, source)
        position = media_words.find_frame_position(state["action"]["text"])
        emit_action(state, "edit", state["action"]["text"], "image")
        artifact = self.media_tools.extract_frame(source, position, build_job_id(state))
        emit_event(ArtifactReady(artifact=artifact))
        return {"candidates": [Candidate(seed=0, artifact=artifact).model_dump()]}

    def show_joined_clips(self, state: PlannerState, numbers: Sequence[int]) -> dict[str, Any]:
        """Make one clip of those with these numbers."""
        if self.media_tools is None:
            return self.answer_in_words(state, "I cannot join clips here.")
        clips = [Artifact.parse_stored(state["artifacts"][number - 1]) for number in numbers]
        if any(clip.medium != "video" for clip in clips):
            return self.answer_in_words(state, "I can join clips only, and not pictures.")
        emit_action(state, "edit", state["action"]["text"], "video")
        try:
            artifact = self.media_tools.join_clips(clips, build_job_id(state), build_join_progress(len(clips)))
        except InvalidInput as error:
            return self.answer_in_words(state, explain_invalid_input(error))
        emit_event(ArtifactReady(artifact=artifact))
        return {"candidates": [Candidate(seed=0, artifact=artifact).model_dump()]}

    def needs_no_model(self, state: PlannerState) -> bool:
        """Return whether the result is made of what there is: a frame of a clip, or several clips in one."""
        route = Route.parse_stored(state["detected_route"])
        return "joined" in get_details(state) or is_frame_request(route, self.find_source(state))

    def render_candidate(self, state: PlannerState, source: Artifact | None) -> dict[str, Any]:
        """Render the next candidate. What the model cannot render, such as a prompt that is too long, is explained."""
        try:
            artifact, seed = self.render_artifact(state, source)
        except InvalidInput as error:
            return self.answer_in_words(state, explain_invalid_input(error))
        return {"candidates": [*state["candidates"], Candidate(seed=seed, artifact=artifact).model_dump()]}

    def render_artifact(self, state: PlannerState, source: Artifact | None) -> tuple[Artifact, int]:
        """Predict the prompt's visual tokens, then run a job with the next seed. Return the artifact and the seed."""
        options, attempt = TurnOptions.parse_stored(state["options"]), len(state["candidates"])
        task = self.find_task(state, Route.parse_stored(state["detected_route"]), source)
        assert task is not None, "the route is one of pixels"
        params = resolve_sampling_params(
            self.preset,
            task,
            get_source_length(self.preset, task, source),
            **self.choose_shape(state, task, source),
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            seed=(self.choose_seed(state) + attempt + get_details(state).get("seed_offset", 0)) % (MAX_SEED + 1),
        )
        prompt = self.text_limits.check_prompt("text", self.get_prompt(state), params)
        emit_action(state, "edit" if source else "generate", prompt, get_task_medium(task))
        job = Job(
            id=build_job_id(state),
            prompt=prompt,
            visual_tokens=self.mllm.predict_visual_tokens(
                MLLMRequest(text=prompt, artifacts=(source,) if source else ()), get_task_medium(task)
            ),
            source=source,
            params=params,
            last_frame=self.find_last_frame(state) if task == "keyframes-to-video" else None,
            preset=self.preset.name,
        )
        return self.follow_job(job, final=options.check == 1), job.seed

    def choose_shape(self, state: PlannerState, task: Task, source: Artifact | None) -> dict[str, float | None]:
        """Return the size of a clip that is extended, and the seconds that are added; others have the default shape."""
        if source is None or task != "video-extension":
            return {}
        return {"width": source.width, "height": source.height, "seconds": get_details(state).get("seconds")}

    def choose_seed(self, state: PlannerState) -> int:
        """Return the turn's seed, or one of this action."""
        seed: int | None = state["options"].get("seed")
        if seed is None or seed == -1:
            return derive_seed(state["seed"], len(state["turns"]) + 1, state["action_index"])
        return seed

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
        if state["action_done"]:  # it was answered in words
            return {}
        options = TurnOptions.parse_stored(state["options"])
        candidates = [Candidate.parse_stored(candidate) for candidate in state["candidates"]]
        if options.check == 1 or self.needs_no_model(state):
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
            trace = self.rewrite_prompt(state, self.build_request(state)).model_dump()
        statement: str = trace["rewrite"] if trace else state["action"]["text"]
        return statement.removeprefix("picture of ").removeprefix("video of ")

    def select_best(self, state: PlannerState, candidates: list[Candidate]) -> dict[str, Any]:
        best = max(candidates, key=lambda candidate: candidate.agreement or 0.0).artifact
        if len(candidates) > 1 or candidates[0].agreement is not None:
            emit_event(ArtifactReady(artifact=best))
        goal: Goal = "edit" if best.source else "generate"
        result = self.build_result(state, goal, candidates=candidates, artifact=best)
        updates: dict[str, Any] = {"artifacts": [best.model_dump()], "current_key": best.key}
        return (
            updates | {"candidates": [candidate.model_dump() for candidate in candidates]} | close_action(state, result)
        )

    def rewrite_prompt(self, state: PlannerState, request: MLLMRequest) -> ThinkTrace:
        started, text = time.perf_counter(), ""
        system = self.prompts.add_background(self.prompts.think, get_background(state))
        for piece in self.mllm.stream_text(request.model_copy(update={"system": system})):
            text += piece
            if THINK_END not in text and (visible := piece.replace(THINK_START, "")):
                emit_event(ThinkingDelta(delta=visible))
        reasoning, rewrite = split_rewrite(text)
        seconds = round(time.perf_counter() - started, 3)
        return ThinkTrace(request=request.text, reasoning=reasoning, rewrite=rewrite or request.text, seconds=seconds)

    def answer_in_words(self, state: PlannerState, message: str) -> dict[str, Any]:
        action, route = Action.parse_stored(state["action"]), Route(kind="decline", probability=1.0)
        emit_action(state, "decline", message)
        emit_event(TextDelta(delta=message))
        result = ActionResult(action=action, goal="decline", route=route, trace=None, answer=message)
        return close_action(state, result)

    # ------------------------------------------------------------ helpers of several nodes

    def find_source(self, state: PlannerState) -> Artifact | None:
        return StoredArtifacts(state["artifacts"]).find_last(state["action"]["source"])

    def find_task(self, state: PlannerState, route: Route, source: Artifact | None) -> Task | None:
        """Return the task of the current action: as its words were read, or as an MLLM that plans leaves them."""
        requested = get_details(state).get("task")
        if self.prompts.plan and "video-extension" in self.preset.sampling:
            text = state["action"]["text"]
            requested = "video-extension" if media_words.is_extension_request(text) else requested
        return get_task(self.preset, route, source, requested)

    def find_last_frame(self, state: PlannerState) -> Artifact:
        """Return the picture that the clip of the current action ends with."""
        return Artifact.parse_stored(state["artifacts"][get_details(state)["last_frame"] - 1])

    def build_request(self, state: PlannerState) -> MLLMRequest:
        source = self.find_source(state)
        return MLLMRequest(text=state["action"]["text"], artifacts=(source,) if source else ())

    def get_prompt(self, state: PlannerState) -> str:
        prompt: str = state["trace"]["rewrite"] if state["trace"] else state["action"]["text"]
        return prompt

    def build_result(self, state: PlannerState, goal: Goal, **fields: object) -> ActionResult:
        """Return the result of the current action, of which an earlier step may have stored more than is known here."""
        stored = {"action": state["action"], "route": state["detected_route"], "trace": state["trace"]}
        return ActionResult.parse_stored(stored | {"goal": goal} | fields)
