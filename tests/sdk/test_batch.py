"""Batches in this process: what a line may be, and the results in a folder from which another run continues."""

import json
import time

import pytest

from omnivideo.errors import InvalidInput
from omnivideo.presets import TINY
from omnivideo.sdk.batch import BatchFolder
from omnivideo.sdk.batch_items import BatchItem, parse_items, parse_text
from omnivideo.sdk.studio import Studio


@pytest.fixture(scope="module")
def studio(weights, tmp_path_factory) -> Studio:
    return Studio(weights=weights, home=tmp_path_factory.mktemp("home"), device="cpu")


def read_results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_batch_resumes_with_the_remaining_items(studio, tmp_path):
    lines = [{"id": name, "prompt": f"a {name}", "image": True, "steps": 1} for name in ("ball", "star")]
    running = studio.batch(lines, tmp_path)
    assert next(running).file == "ball.png"
    running.close()
    with (tmp_path / "results.jsonl").open("a") as results:
        results.write('{"id": "star", "fi')  # as a process that is killed while it writes
    started_at = time.time()
    outcomes = list(studio.batch(lines, tmp_path))
    assert [outcome.file for outcome in outcomes] == [None, "star.png"]
    assert (tmp_path / "ball.png").stat().st_mtime < started_at
    assert [line["id"] for line in read_results(tmp_path)] == ["ball", "star"]


def test_an_inserted_line_generates_only_its_own_clip(studio, tmp_path):
    """Lines without ids are recognised by their request, wherever they stand; a repeated one is a clip of its own."""
    lines = [{"prompt": prompt, "image": True, "steps": 1} for prompt in ("a ball", "a star", "a square", "a star")]
    first = {outcome.id: outcome.file for outcome in studio.batch(lines[:2], tmp_path)}
    outcomes = list(studio.batch([lines[2], *lines[:2], lines[3]], tmp_path))
    assert [outcome.file is not None for outcome in outcomes] == [True, False, False, True]
    assert {outcome.id for outcome in outcomes[1:3]} == set(first)
    results = read_results(tmp_path)
    assert sorted(line["prompt"] for line in results) == ["a ball", "a square", "a star", "a star"]
    assert len({line["file"] for line in results}) == 4


def test_a_changed_request_is_generated_anew_in_place_of_the_old_result(studio, tmp_path):
    line = {"id": "one", "prompt": "a ball", "image": True, "steps": 1}
    for changes in ({}, {"prompt": "a star"}, {"steps": 2}, {"seed": 4}):
        line |= changes
        assert [outcome.file for outcome in studio.batch([line], tmp_path)] == ["one.png"]
        assert [outcome.file for outcome in studio.batch([line], tmp_path)] == [None]
    (result,) = read_results(tmp_path)
    assert result["prompt"] == "a star" and result["file"] == "one.png"
    manifest = json.loads((tmp_path / "one.png.json").read_text())
    assert manifest["prompt"] == "a star" and manifest["settings"]["seed"] == 4


class FailingGenerator:
    """A studio that refuses one prompt."""

    def __init__(self, studio):
        self.studio, self.model = studio, studio.model

    def generate(self, prompt, **options):
        if prompt == "fail":
            raise InvalidInput("prompt", "it is refused")
        return self.studio.generate(prompt, **options)


def test_a_failed_item_stops_no_other_and_has_one_result_however_often_it_is_tried(studio, tmp_path):
    from omnivideo.sdk.batch import run_batch

    items = parse_items([{"id": name, "prompt": name, "image": True, "steps": 1} for name in ("fail", "star")])
    for tries in (1, 2):
        outcomes = list(run_batch(FailingGenerator(studio), items, tmp_path))
        assert outcomes[0].error == "prompt: it is refused", tries
    assert [(line["id"], line["file"]) for line in read_results(tmp_path)] == [("fail", None), ("star", "star.png")]


def test_results_of_other_versions_are_kept_but_not_trusted(tmp_path):
    old = {"id": "000001", "file": "000001.png", "error": None, "prompt": "a ball"}
    (tmp_path / "000001.png").touch()
    (tmp_path / "results.jsonl").write_text(json.dumps(old) + "\n")
    assert not BatchFolder(tmp_path).is_done(BatchItem(id="000001", prompt="a ball"))
    assert read_results(tmp_path) == [old]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{no json"], "line 1: it is not valid JSON"),
        (['{"prompt": ""}'], "line 1, prompt: it is empty"),
        (['{"prompt": "x", "colour": 1}'], "line 1, colour: there is no such field"),
        (['{"id": "../x", "prompt": "x"}'], "line 1, id: it names a file"),
        ([{"id": "é" * 101, "prompt": "x"}], "line 1, id: it is longer than 200 bytes"),
        (['{"id": "a", "prompt": "x"}', '{"id": "a", "prompt": "x"}'], "line 2: the id 'a' is not unique"),
        (['{"prompt": "x\\u0000"}'], "line 1, prompt: it contains invalid characters"),
        ([{"prompt": "x", "frames": 10}], "line 1, frames: 10 is more than this model was trained"),
        (["[1]", "{}"], "line 2, prompt: it is required"),
        ([], "prompts: the batch is empty"),
    ],
)
def test_an_invalid_line_is_reported_before_any_generation(lines, message):
    with pytest.raises(InvalidInput) as caught:
        parse_items(lines, TINY)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_bad_lines_are_reported_at_once_with_their_numbers_in_the_file():
    text = 'a ball\n\n{"prompt": "x", "steps": 0, "seed": "many"}\n\n{bad\na star\n{"prompt": "x", "width": 15}\n'
    with pytest.raises(InvalidInput) as caught:
        parse_text(text, TINY)
    head, *problems = str(caught.value).splitlines()
    assert head == "prompts: 3 problems; nothing was generated"
    assert [problem.strip().partition(": ")[0] for problem in problems] == ["line 3, seed", "line 5", "line 7, width"]
    many = "\n".join(["{bad"] * 50)
    with pytest.raises(InvalidInput, match="and 30 more"):
        parse_text(many)


def test_ids_may_be_of_any_script(studio, tmp_path):
    names = ["été", "红色圆圈", "लाल गेंद", "a.b-c_d"]
    lines = [json.dumps({"id": name, "prompt": "x", "image": True, "steps": 1}) for name in names]
    assert [outcome.file for outcome in studio.batch(lines, tmp_path)] == [f"{name}.png" for name in names]
    assert [outcome.file for outcome in studio.batch(lines, tmp_path)] == [None] * 4
    assert "红色圆圈" in (tmp_path / "results.jsonl").read_text(encoding="utf-8")
