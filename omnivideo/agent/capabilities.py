"""What a request asks for against what the weights can do, and a plan against the MLLM's route."""

from omnivideo.contracts import Artifact, Medium, Route, get_editing_task, get_generation_task
from omnivideo.errors import InvalidInput, TextTooLong, UnreadableMedia
from omnivideo.presets import ContinuationTask, Preset, Task, get_animation_task

TASK_PHRASES: dict[Task, str] = {
    "text-to-image": "make pictures",
    "text-to-video": "make clips",
    "image-editing": "change pictures",
    "video-editing": "change clips",
    "image-to-video": "animate pictures",
    "video-extension": "make clips longer",
    "keyframes-to-video": "make a clip from one picture to another",
}


def get_task(
    preset: Preset, route: Route, source: Artifact | None, requested: ContinuationTask | None = None
) -> Task | None:
    """Return the task of a routed request, or None if nothing is to be rendered.

    The route's kind is the medium of the result. A clip of a picture begins with it, or is an edit of a still if the
    preset has only that; a picture of a clip is one of the clip's frames, which needs no model. `requested` is what the
    words ask for, if it is more than the route says.
    """
    if route.kind not in ("image", "video") or is_frame_request(route, source):
        return None
    if source is None:
        return get_generation_task("image" if route.kind == "image" else "video")
    if requested == "video-extension" and source.medium == "video":
        return "video-extension"
    if is_animation_request(route, source):
        return "keyframes-to-video" if requested == "keyframes-to-video" else get_animation_task(preset)
    return get_editing_task("video" if route.kind == "video" else "image")


def is_frame_request(route: Route, source: Artifact | None) -> bool:
    """Return whether a still of a clip is requested."""
    return route.kind == "image" and source is not None and source.medium == "video"


def is_animation_request(route: Route, source: Artifact | None) -> bool:
    """Return whether a clip of a picture is requested."""
    return route.kind == "video" and source is not None and source.medium == "image"


def build_refusal(preset: Preset, route: Route, source: Artifact | None) -> str | None:
    """Return one sentence for a request that the preset's weights cannot do, or None if they can."""
    task = get_task(preset, route, source)
    if task is None or task in preset.sampling:
        return None
    possible = " and ".join(TASK_PHRASES[name] for name in preset.sampling)
    impossible = "set a picture in motion" if task == "image-to-video" else TASK_PHRASES[task]
    return f"This model cannot {impossible}; it can {possible}."


def reconcile_route(preset: Preset, planned_goal: str, route: Route, source: Artifact | None) -> Route:
    """Return the route of a planned action: the plan's goal, with the probability that the route gives it at most.

    A route that agrees with the plan is returned unchanged, as is any route if there is no plan.
    """
    wants_pixels = planned_goal in ("generate", "edit")
    allowed_kinds = ("image", "video") if wants_pixels else ("text",)
    if not planned_goal or route.kind in allowed_kinds:
        return route
    if not wants_pixels:
        return Route(kind="text", probability=1 - route.probability)
    medium: Medium = source.medium if source else "video" if "text-to-video" in preset.sampling else "image"
    return Route(kind=medium, probability=1 - route.probability)


def choose_result_medium(route: Route, source: Artifact | None, worded_medium: Medium | None) -> Route:
    """Return the route of an MLLM that follows no instructions, with the medium of the result.

    Such an MLLM only knows edits that keep the source's medium. Where the words ask for the other one, they decide.
    """
    if source is None:
        return route
    if worded_medium is not None:
        return Route(kind=worded_medium, probability=1.0)
    return route.model_copy(update={"kind": source.medium}) if route.kind in ("image", "video") else route


def explain_invalid_input(error: InvalidInput) -> str:
    """Return what a person is told whose words or files cannot be used."""
    problem = str(error).removeprefix(f"{error.field}: ").rstrip(".")
    if isinstance(error, UnreadableMedia):
        return f"I cannot read the file that you sent: {problem}."
    if isinstance(error, TextTooLong):
        return f"That message is too long: {problem}. Please say it in fewer words."
    if error.field == "prompt":  # of a clip: it has more tokens than the decoder takes
        return f"That is too much for one request: {problem}. Please say it in fewer words."
    return f"I cannot do that: {problem}."
