"""Execute commands about the conversation on the state of a thread."""

from collections.abc import Sequence
from typing import Any

from omnivideo.agent.commands import FILE_FORMATS
from omnivideo.agent.references import StoredArtifacts
from omnivideo.agent.state import PlannerState
from omnivideo.agent.turn_plan import PlannedAction
from omnivideo.contracts import Artifact
from omnivideo.ports import MediaTools
from omnivideo.turns import ActionResult, ExecutedCommand

NOUNS = {"image": "picture", "video": "clip"}
NOTHING_YET = "There is no result yet. What should I create?"


class CommandOutcome:
    """What a command says, the artifact that it shows, and what it changes of the state."""

    def __init__(
        self,
        message: str,
        artifact: Artifact | None = None,
        *,
        is_refused: bool = False,
        actions: Sequence[PlannedAction] = (),
        **updates: Any,
    ):
        self.message = message
        self.artifact = artifact
        self.is_refused = is_refused
        self.actions = actions
        self.updates = updates


def execute_command(
    state: PlannerState,
    command: ExecutedCommand,
    help_text: str,
    media_tools: MediaTools | None,
    max_variations: int,
) -> CommandOutcome:
    """Return the outcome of a command. Variations are not rendered here but become actions of the turn."""
    artifacts = StoredArtifacts(state["artifacts"])
    current = artifacts.find_last(state["current_key"])
    match command.name:
        case "help":
            return CommandOutcome(help_text)
        case "recap":
            return CommandOutcome(describe_turns(state))
        case "list":
            return CommandOutcome(list_artifacts(artifacts))
        case "restart":
            return CommandOutcome("We start over. What should I create?", current_key=None)
        case "cancel":
            return CommandOutcome('Nothing is being made. Say "undo" to take back the last change.')
    if current is None and not (command.name == "resend" and artifacts):
        return CommandOutcome(NOTHING_YET, is_refused=command.name != "undo")
    match command.name:
        case "undo":
            return undo_changes(artifacts, current, int(command.arguments.get("count", 1)))
        case "resend":
            return resend_artifact(artifacts, int(command.arguments.get("which", len(artifacts))))
        case "vary":
            return plan_variations(state, current, int(command.arguments.get("count", 1)), max_variations)
    number = int(command.arguments.get("which", 0))
    if not number:
        return save_artifact(current, command, media_tools)
    if number > len(artifacts):
        return CommandOutcome(f"There is no result {number}. {list_artifacts(artifacts)}", is_refused=True)
    return save_artifact(artifacts[number - 1], command, media_tools)


def undo_changes(artifacts: Sequence[Artifact], current: Artifact | None, count: int) -> CommandOutcome:
    """Return to what the current artifact was edited from, or else to the one before it, `count` times."""
    previous = current
    for _ in range(count):
        previous = find_previous(artifacts, previous) if previous else None
    if previous is None:
        return CommandOutcome("Undone. There is no result now. What should I create?", current_key=None)
    return CommandOutcome(
        f"Undone. This is the {NOUNS[previous.medium]} from before.", previous, current_key=previous.key
    )


def find_previous(artifacts: Sequence[Artifact], current: Artifact) -> Artifact | None:
    keys = [artifact.key for artifact in artifacts]
    if current.source in keys:
        return artifacts[keys.index(current.source)]
    position = max(index for index, artifact in enumerate(artifacts) if artifact == current)
    return artifacts[position - 1] if position else None


def resend_artifact(artifacts: Sequence[Artifact], number: int) -> CommandOutcome:
    if not 1 <= number <= len(artifacts):
        return CommandOutcome(f"There is no result {number}. {list_artifacts(artifacts)}", is_refused=True)
    artifact = artifacts[number - 1]
    return CommandOutcome(f"Here is result {number}, a {NOUNS[artifact.medium]}.", artifact, current_key=artifact.key)


def save_artifact(
    artifact: Artifact | None, command: ExecutedCommand, media_tools: MediaTools | None
) -> CommandOutcome:
    """Convert an artifact to the format of a file. Who follows the turn writes the file, or links to it."""
    assert artifact is not None
    allowed = FILE_FORMATS[artifact.medium]
    file = str(command.arguments.get("file") or "")
    suffix = file.rpartition(".")[2].lower() if file else str(command.arguments.get("format") or allowed[0])
    if suffix not in allowed:
        noun = NOUNS[artifact.medium]
        message = f"I cannot write {suffix} files. A {noun} can be saved as {' or '.join(allowed)}."
        return CommandOutcome(message, is_refused=True)
    if suffix != artifact.key.rpartition(".")[2]:
        if media_tools is None or artifact.manifest is None:
            return CommandOutcome("I can convert only what I have made myself.", is_refused=True)
        artifact = media_tools.convert_artifact(artifact, suffix)
    return CommandOutcome(
        f"Here is the {NOUNS[artifact.medium]}" + (f" for {file}." if file else f" as {suffix}."), artifact
    )


def list_artifacts(artifacts: Sequence[Artifact]) -> str:
    """Return a numbered list of what the thread has."""
    lines = [
        f"{number}) {NOUNS[artifact.medium]}: {artifact.caption}" for number, artifact in enumerate(artifacts, start=1)
    ]
    return "; ".join(lines) or NOTHING_YET


def describe_turns(state: PlannerState) -> str:
    """Return what was said and done so far, the last turn first."""
    sentences = []
    for turn in reversed(state["turns"][-5:]):
        done = [describe_result(ActionResult.parse_stored(result)) for result in turn["results"]]
        sentences.append(f'You said "{turn["text"]}", and I {" and ".join(filter(None, done)) or "did nothing"}.')
    return " Before that: ".join(sentences) or "I have done nothing yet. What should I create?"


def describe_result(result: ActionResult) -> str:
    """Return what an action did, in the past tense."""
    if result.goal == "generate" and result.artifact:
        return f"made a {NOUNS[result.artifact.medium]} ({result.action.text})"
    if result.goal == "edit" and result.artifact:
        return f"changed a {NOUNS[result.artifact.medium]} ({result.action.text})"
    if result.goal == "command" and result.command:
        return f"followed your command ({result.command.name})"
    if result.goal == "decline":
        return "declined"
    return f'answered "{result.answer}"' if result.answer else "showed a result"


# ---------------------------------------------------------------- variations


def plan_variations(state: PlannerState, artifact: Artifact | None, count: int, max_variations: int) -> CommandOutcome:
    """Return the actions that make an artifact again with other seeds, to be inserted after the current action."""
    assert artifact is not None
    made = find_result(state, artifact)
    details = dict[str, Any]()
    if made is not None and made.action.details:
        details.update(made.action.details.items())
    if made is None or "joined" in details:
        return CommandOutcome("I can vary only what I have made myself.", is_refused=True)
    if not 1 <= count <= max_variations:
        return CommandOutcome(f"I can make 1 to {max_variations} variations at once.", is_refused=True)
    keys = [entry["key"] for entry in state["artifacts"]]
    reference = str(keys.index(made.action.source) + 1) if made.action.source in keys else "new"
    text = made.trace.rewrite if made.trace else made.action.text
    actions = [
        PlannedAction(text, reference, made.goal, details={**details, "medium": artifact.medium, "seed_offset": number})
        for number in range(1, count + 1)
    ]
    plural = "s" if count > 1 else ""
    return CommandOutcome(f"I make {count} variation{plural} of it.", actions=actions)


def find_result(state: PlannerState, artifact: Artifact) -> ActionResult | None:
    """Return the result of the action that made an artifact; None if the user attached it."""
    results = [ActionResult.parse_stored(result) for turn in state["turns"] for result in turn["results"]]
    results += [ActionResult.parse_stored(result) for result in state["results"]]
    return next((r for r in results if r.artifact == artifact and r.goal in ("generate", "edit")), None)
