"""Send every phrase of the list through a real conversation, and judge what the assistant did.

The messages before a phrase are sent first, in the same new thread. The facts of a result are read from its pixels if
the preset's world has a scorer; otherwise only the behaviour is judged.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from omnivideo.contracts import Artifact
from omnivideo.errors import OmniVideoError
from omnivideo.evaluation.phrases.entries import Capability, EntryModel, Half, Kind, Phrase, load_phrases
from omnivideo.evaluation.phrases.judge import Judgement, PhraseOutcome, ProducedArtifact, judge_phrase
from omnivideo.evaluation.suite import EvaluationProgress, Score, score_verdicts
from omnivideo.media.artifacts import load_frames
from omnivideo.presets import Preset
from omnivideo.synthetic.facts import SceneDetection
from omnivideo.synthetic.scorer import detect_scene
from omnivideo.turns import ActionResult, QuestionAsked, TextDelta, TurnCompleted, TurnEvent

ReadFacts = Callable[[Artifact], SceneDetection | None]
Reaction = Literal["made", "answered", "asked", "declined"]


class JudgedPhrase(EntryModel):
    """The judgement of one phrase. `reply` and `reason` are only kept for phrases that are not held out."""

    half: Half
    id: str
    kind: Kind
    judgement: Judgement
    reaction: Reaction
    reply: str = ""
    reason: str = ""


def list_capabilities(preset: Preset) -> frozenset[Capability]:
    """Return what the preset declares: its tasks, and, in the synthetic world, the kinds of edits that it knows."""
    every = frozenset[Capability](get_args(Capability))
    tasks: set[Capability] = {
        name for name in every if name in preset.sampling or (name == "image-to-video" and preset.animates_pictures)
    }
    if preset.prompts == "keywords":  # the words are read, and no weights are needed for it
        tasks.add("join-clips")
    if not preset.has_scorer:
        return frozenset(tasks | {name for name in every if name.startswith("edit:")}) | {
            "open-world", "other-languages",
        }  # fmt: skip
    return frozenset(tasks | {name for name in every if name.removeprefix("edit:") in preset.edits})


def iterate_judged_phrases(
    conversations: Any,
    preset: Preset,
    phrases: Sequence[tuple[Half, Phrase]],
    done: Sequence[JudgedPhrase] = (),
    **options: object,
) -> Iterator[JudgedPhrase]:
    """Judge the phrases that are not in `done`; `options` are those of every turn.

    `conversations` provides `open_thread()` and `store`.
    """
    read_facts = partial(read_artifact_facts, conversations.store) if preset.has_scorer else None
    finished = {(judged.half, judged.id) for judged in done}
    capabilities = list_capabilities(preset)
    for seed, (half, phrase) in enumerate(phrases):
        if (half, phrase.id) in finished:
            continue
        outcome = say_phrase(conversations.open_thread(), phrase, read_facts, seed=seed, **options)
        verdict = judge_phrase(phrase, outcome, capabilities)
        judged = JudgedPhrase(
            half=half, id=phrase.id, kind=phrase.kind, judgement=verdict.judgement, reaction=classify(outcome)
        )
        if half == "development":
            judged = judged.model_copy(update={"reply": outcome.reply, "reason": verdict.reason})
        yield judged


def read_artifact_facts(store: Any, artifact: Artifact) -> SceneDetection:
    return detect_scene(load_frames(store, artifact))


def classify(outcome: PhraseOutcome) -> Reaction:
    """Return what the user got: a result, or else a question, a refusal or an answer."""
    if outcome.artifacts:
        return "made"
    return "asked" if outcome.is_question else "declined" if outcome.declined else "answered"


# ---------------------------------------------------------------- one conversation


def say_phrase(thread: Any, phrase: Phrase, read_facts: ReadFacts | None, **options: object) -> PhraseOutcome:
    """Send the messages before the phrase and the phrase itself, and return what the assistant did with it."""
    for message in phrase.before:
        list(thread.send(message, **options))
    earlier = len(thread.get_artifacts())
    reply, question, results = [], "", list[ActionResult]()
    try:
        for event in thread.send(phrase.text, **options):
            reply.append(get_words(event))
            question = event.text if isinstance(event, QuestionAsked) else question
            if isinstance(event, TurnCompleted):
                results = list(event.turn.results)
    except OmniVideoError as error:  # what a user sees instead of a result
        reply.append(str(error))
    return PhraseOutcome(
        reply="".join(reply).strip(),
        is_question=bool(question),
        declined=any(result.goal == "decline" for result in results),
        commands=tuple(result.command for result in results if result.command),
        artifacts=build_produced_artifacts(thread.get_artifacts(), earlier, read_facts, find_joined(results)),
        earlier=earlier,
        current=find_number(thread.get_artifacts(), thread.get_current_key()),
    )


def get_words(event: TurnEvent) -> str:
    """Return what an event says to the user."""
    if isinstance(event, TextDelta):
        return event.delta
    return f"\n{event.text}" if isinstance(event, QuestionAsked) else ""


def find_number(artifacts: Sequence[Artifact], key: str | None) -> int:
    """Return the number, from 1, of the latest artifact with this key; 0 if there is none."""
    return max((number for number, artifact in enumerate(artifacts, start=1) if artifact.key == key), default=0)


def find_joined(results: Sequence[ActionResult]) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the clips that joined clips are made of, by the keys of the joined clips."""
    numbers = {
        result.artifact.key: (result.action.details or {}).get("joined") for result in results if result.artifact
    }
    return {key: tuple(joined) for key, joined in numbers.items() if isinstance(joined, list)}


def build_produced_artifacts(
    artifacts: Sequence[Artifact], earlier: int, read_facts: ReadFacts | None, joined: Mapping[str, tuple[int, ...]]
) -> tuple[ProducedArtifact, ...]:
    """Return the results of the turn: the artifacts after the `earlier` ones."""
    sources = {
        number: (find_number(artifacts[: number - 1], artifact.source),) if artifact.source else ()
        for number, artifact in enumerate(artifacts, start=1)
    }
    return tuple(
        ProducedArtifact(
            number=number,
            medium=artifact.medium,
            frames=artifact.frames,
            sources=joined.get(artifact.key, sources[number]),
            facts=read_facts(artifact) if read_facts else None,
        )
        for number, artifact in enumerate(artifacts, start=1)
        if number > earlier
    )


# ---------------------------------------------------------------- the whole list


def evaluate_phrases(
    conversations: Any,
    preset: Preset,
    on_progress: EvaluationProgress,
    *,
    count: int | None = None,
    log: Path | None = None,
    halves: Sequence[Half] = get_args(Half),
    **options: object,
) -> list[JudgedPhrase]:
    """Judge both halves of the list, or the first `count` phrases of each kind and half.

    A `log` receives a line for each judged phrase as it is judged, and the phrases that it already has are not
    repeated: so an interrupted run continues.
    """
    phrases = [(half, phrase) for half in halves for phrase in select_phrases(load_phrases(half), count)]
    wanted = {(half, phrase.id) for half, phrase in phrases}
    lines = log.read_text(encoding="utf-8").splitlines() if log and log.exists() else []
    done = [JudgedPhrase.model_validate_json(line) for line in lines]
    results = [judged for judged in done if (judged.half, judged.id) in wanted]
    for judged in iterate_judged_phrases(conversations, preset, phrases, results, **options):
        results.append(judged)
        if log:
            with log.open("a", encoding="utf-8") as file:
                file.write(judged.model_dump_json() + "\n")
        on_progress("phrases", len(results), len(phrases))
    return results


def select_phrases(phrases: Sequence[Phrase], count: int | None) -> list[Phrase]:
    """Return all phrases, or the first `count` of each kind."""
    kinds = [phrase.kind for phrase in phrases]
    return [phrase for index, phrase in enumerate(phrases) if count is None or kinds[:index].count(phrase.kind) < count]


def score_phrases(judged_phrases: Sequence[JudgedPhrase]) -> dict[str, Score]:
    """Return, for each half and for each kind within it, the shares of right, wrong clip, asked and declined."""
    scores: dict[str, Score] = {}
    for half in dict.fromkeys(judged.half for judged in judged_phrases):
        in_half = [judged for judged in judged_phrases if judged.half == half]
        for kind in ("", *dict.fromkeys(judged.kind for judged in in_half)):
            group = [judged for judged in in_half if kind in ("", judged.kind)]
            name = f"{half}, {kind}" if kind else half
            scores[f"{name}: right"] = score_verdicts(judged.judgement == "right" for judged in group)
            scores[f"{name}: wrong clip"] = score_verdicts(judged.judgement == "wrong_clip" for judged in group)
            scores[f"{name}: asked"] = score_verdicts(judged.reaction == "asked" for judged in group)
            scores[f"{name}: declined"] = score_verdicts(judged.reaction == "declined" for judged in group)
    return scores
