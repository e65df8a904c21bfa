"""The list of phrases through real conversations of an untrained model: behaviour, progress and the report."""

import json

import pytest

from omnivideo.evaluation.phrases.entries import load_phrases
from omnivideo.evaluation.phrases.runner import (
    JudgedPhrase,
    evaluate_phrases,
    list_capabilities,
    say_phrase,
    score_phrases,
)
from omnivideo.evaluation.report import build_phrase_table
from omnivideo.presets import OMNIVIDEO2_A14B, TINY
from omnivideo.sdk.studio import Studio


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Return a studio with the shipped weights: untrained ones take another route."""
    return Studio(home=tmp_path_factory.mktemp("home"), device="cpu")


def find_phrase(name):
    return next(phrase for phrase in load_phrases("development") if phrase.id == name)


def test_capabilities_are_what_the_preset_declares():
    tiny, large = list_capabilities(TINY), list_capabilities(OMNIVIDEO2_A14B)
    assert {"text-to-image", "edit:recolour"} <= tiny and not {"edit:resize", "open-world"} & tiny
    assert {"open-world", "other-languages", "edit:resize", *OMNIVIDEO2_A14B.sampling} <= large
    assert "join-clips" in tiny - large


def test_a_joined_clip_is_made_from_all_of_its_clips(studio):
    joined = say_phrase(studio.open_thread(), find_phrase("new-task-14"), None, steps=1)
    assert [(artifact.number, artifact.sources, artifact.frames) for artifact in joined.artifacts] == [(3, (2, 1), 18)]


def test_the_outcome_has_what_the_assistant_did(studio):
    undone = say_phrase(studio.open_thread(), find_phrase("command-01"), None, steps=1)
    assert undone.commands[0].name == "undo" and (undone.earlier, undone.current) == (2, 1)
    declined = say_phrase(studio.open_thread(), find_phrase("impossible-08"), None, steps=1)
    assert declined.declined and "hexagon" in declined.reply and not declined.artifacts
    asked = say_phrase(studio.open_thread(), find_phrase("contradictory-01"), None, steps=1)
    assert asked.is_question and asked.reply.endswith("?")
    edited = say_phrase(studio.open_thread(), find_phrase("elliptical-04"), None, steps=1)
    assert [(artifact.number, artifact.sources) for artifact in edited.artifacts] == [(2, (1,))]


def test_a_run_continues_after_the_last_line_of_its_log(studio, tmp_path):
    log, seen = tmp_path / "log.jsonl", []
    arguments = (studio.conversations, TINY, lambda name, done, total: seen.append((done, total)))
    first = evaluate_phrases(*arguments, count=1, log=log, halves=("development",), steps=1)
    assert len(first) == 14 and seen == [(number, 14) for number in range(1, 15)]
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n")
    again = evaluate_phrases(*arguments, count=1, log=log, halves=("development",), steps=1)
    assert seen[14:] == [(14, 14)] and again == first
    assert set(json.loads(lines[0])) >= {"id", "judgement", "reaction", "reply"}


def test_nothing_of_a_held_out_phrase_is_kept_but_its_judgement(studio, tmp_path):
    log = tmp_path / "log.jsonl"
    evaluate_phrases(
        studio.conversations, TINY, lambda *progress: None, count=1, log=log, halves=("held_out",), steps=1
    )
    assert all(not line["reply"] and not line["reason"] for line in map(json.loads, log.read_text().splitlines()))


def test_scores_by_half_and_kind():
    fields = {"half": "development", "reaction": "asked"}
    judged = [
        JudgedPhrase(id=str(index), kind=kind, judgement=judgement, **fields)
        for index, (kind, judgement) in enumerate((("vague", "right"), ("vague", "wrong_clip"), ("command", "right")))
    ]
    scores = score_phrases(judged)
    assert scores["development: right"].mean == pytest.approx(2 / 3)
    assert scores["development, vague: wrong clip"].mean == 0.5 and scores["development, vague: wrong clip"].count == 2
    assert scores["development: asked"].mean == 1.0
    assert build_phrase_table(scores).row_count == 3
