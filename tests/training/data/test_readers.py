"""Published layouts: usable records become samples; all others are counted, named and skipped."""

import json

import pytest

from omnivideo.errors import InvalidInput
from omnivideo.training.data.readers import read_samples
from omnivideo.training.data.sample import SkipReport, TrainingSample
from tests.support.training_samples import drop_keys, make_mp4, make_png, write_files


def read_layout(layout, folder, name) -> tuple[list[TrainingSample], SkipReport]:
    skip_report = SkipReport()
    return list(read_samples(layout, folder / name, folder, skip_report)), skip_report


def talk(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(turns)]


def test_llava(tmp_path):
    write_files(tmp_path, {"coco/1.png": make_png(), "clips/2.mp4": make_mp4()})
    rows = [
        {
            "id": "1",
            "image": "coco/1.png",
            "conversations": talk("<image>\nWhat is it?", "A ball.", "Red?", "Yes."),
        },
        {
            "id": "2",
            "data_source": "x",
            "video": "clips/2.mp4",
            "conversations": talk("<video>\nHow?", "It rolls."),
        },
        {"id": "3", "image": "coco/gone.png", "conversations": talk("<image>\nWhat?", "No.")},
        {"id": "4", "image": "../../etc/passwd", "conversations": talk("<image>\nWhat?", "No.")},
        {"id": "5", "image": "coco/1.png", "conversations": talk("<image>\nWhat?")},
        {"id": "6", "conversations": talk("Hello", "Hello.")},
        "no object",
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    samples, skip_report = read_layout("llava", tmp_path, "a.json")
    assert drop_keys(samples) == drop_keys(
        [
            TrainingSample(
                "image-understanding",
                "",
                make_png(),
                turns=(("What is it?", "A ball."), ("Red?", "Yes.")),
                origin="llava",
            ),
            TrainingSample("video-understanding", "", make_mp4(), turns=(("How?", "It rolls."),), origin="llava"),
        ]
    )
    assert skip_report.count_by_kind() == {"missing file": 2, "wrong record": 3}
    assert {where for _, where, _ in skip_report.skipped_samples} == {f"a.json#{number}" for number in range(3, 8)}


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "..", "", "/etc/passwd", "\ud800.png"])
def test_invalid_file_names_are_skipped(tmp_path, name):
    write_files(tmp_path, {"1.png": make_png()})
    row = {"image": "1.png", "conversations": talk("<image>\nWhat?", "A ball.")}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row | {'image': name})}\n{'[' * 100_000}\n{json.dumps(row)}\n")
    samples, skip_report = read_layout("llava", tmp_path, "a.jsonl")
    assert len(samples) == 1
    assert [where for _, where, _ in skip_report.skipped_samples] == ["a.jsonl:1", "a.jsonl:2"]
    skip_report.write_jsonl(tmp_path / "report.jsonl")
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 2


def test_a_truncated_array_gives_the_records_before_the_cut(tmp_path):
    write_files(tmp_path, {"1.png": make_png()})
    row = {"id": "1", "image": "1.png", "conversations": talk("<image>\nWhat?", "A ball.")}
    (tmp_path / "a.json").write_text(json.dumps([row] * 3)[:-30])
    samples, skip_report = read_layout("llava", tmp_path, "a.json")
    assert len(samples) == 2
    assert skip_report.skipped_samples[0][:2] == ("wrong record", "a.json#3")


def test_sharegpt4video(tmp_path):
    write_files(tmp_path, {"panda/1.mp4": make_mp4()})
    captions = [{"idx": "0", "content": "first"}, {"idx": "-1", "content": "A ball rolls."}]
    row = {"video_id": "1", "video_path": "panda/1.mp4", "timestamp": ["00:00:00.000"], "keyframe": [0],
           "captions": captions, "zip_folder": "panda_videos_1.zip"}  # fmt: skip
    lines = [
        json.dumps(row),
        '{"video_id": "2", "video_',
        json.dumps(row | {"captions": captions[:1]}),
        json.dumps(row),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    samples, skip_report = read_layout("sharegpt4video", tmp_path, "a.jsonl")
    assert drop_keys(samples) == drop_keys(
        [TrainingSample("text-to-video", "A ball rolls.", target=make_mp4(), origin="sharegpt4video")] * 2
    )
    assert [(kind, where) for kind, where, _ in skip_report.skipped_samples] == [
        ("wrong record", "a.jsonl:2"),
        ("wrong record", "a.jsonl:3"),
    ]


def test_senorita(tmp_path):
    write_files(tmp_path, {"obj_swap/1_org.mp4": make_mp4(), "obj_swap/1.mp4": make_mp4(6)})
    row = {"source_video_path": "./obj_swap/1_org.mp4", "target_video_path": "./obj_swap/1.mp4",
           "instruction": "swap ball", "enhanced_instruction": "Turn the ball into a cube."}  # fmt: skip
    plain = {key: value for key, value in row.items() if key != "enhanced_instruction"}
    (tmp_path / "a.json").write_text(json.dumps([row, plain, row | {"target_video_path": "./obj_swap/2.mp4"}]))
    samples, skip_report = read_layout("senorita", tmp_path, "a.json")
    edits = ["Turn the ball into a cube.", "swap ball"]
    assert drop_keys(samples) == drop_keys(
        TrainingSample("video-editing", text, make_mp4(), make_mp4(6), origin="senorita") for text in edits
    )
    assert skip_report.count_by_kind() == {"missing file": 1}


def test_anyedit_as_json(tmp_path):
    write_files(tmp_path, {"COCO_1.png": make_png(1), "edited.png": make_png(2)})
    row = {"edit": "make the ball green", "edited object": "ball", "input": "a ball", "output": "a green ball",
           "edit_type": "color_alter", "visual_input": "None", "image_file": "COCO_1.png",
           "edited_file": "edited.png"}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([row, row | {"visual_input": "other.png"}]))
    samples, skip_report = read_layout("anyedit", tmp_path, "a.json")
    wanted = TrainingSample(
        "image-editing", "make the ball green", make_png(1), make_png(2), caption="a green ball", origin="anyedit"
    )
    assert drop_keys(samples) == drop_keys([wanted])
    assert "second picture" in skip_report.skipped_samples[0][2]


def write_parquet(path, rows: list[dict]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed; parquet layouts were not tested")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)


def cell(data: bytes) -> dict:
    """Return a cell in the format in which the `datasets` package writes an image."""
    return {"bytes": data, "path": "a.png"}


def test_ultraedit(tmp_path):
    row = {"source_image": cell(make_png(1)), "edited_image": cell(make_png(2)), "source_caption": "a ball",
           "target_caption": "a blue ball", "edit_prompt": "make it blue", "clip_sim_image": 0.9}  # fmt: skip
    write_parquet(tmp_path / "FreeForm-00000.parquet", [row, row | {"edit_prompt": None}])
    samples, skip_report = read_layout("ultraedit", tmp_path, "FreeForm-00000.parquet")
    wanted = TrainingSample(
        "image-editing", "make it blue", make_png(1), make_png(2), caption="a blue ball", origin="ultraedit"
    )
    assert drop_keys(samples) == drop_keys([wanted])
    assert skip_report.count_by_kind() == {"wrong record": 1}


def test_anyedit_as_parquet(tmp_path):
    row = {"image_id": "1", "image_file": cell(make_png(1)), "edited_file": cell(make_png(2)),
           "edit_instruction": "make it blue",
           "edit_type": "color_alter", "input": "a ball", "output": "a blue ball", "visual_input": None}  # fmt: skip
    write_parquet(tmp_path / "train-0.parquet", [row])
    samples, skip_report = read_layout("anyedit", tmp_path, "train-0.parquet")
    assert drop_keys(samples) == drop_keys(
        [
            TrainingSample(
                "image-editing", "make it blue", make_png(1), make_png(2), caption="a blue ball", origin="anyedit"
            )
        ]
    )
    assert not skip_report.skipped_samples


def test_captions(tmp_path):
    write_files(tmp_path, {"3.png": make_png(3)})
    write_parquet(tmp_path / "a.parquet", [{"image": make_png(1), "caption": "one"}, {"image": None, "caption": "two"}])
    write_parquet(tmp_path / "b.parquet", [{"jpg": "3.png", "txt": "three"}])
    samples, skip_report = read_layout("captions", tmp_path, ".")
    assert [(sample.text, sample.target) for sample in samples] == [("one", make_png(1)), ("three", make_png(3))]
    assert skip_report.count_by_kind() == {"wrong record": 1}


def test_curated(tmp_path):
    """Read the clips of a curation's folder and not its journals; report rejected clips and those without a caption."""
    write_files(tmp_path, {"clips/pan-1-0000.mp4": make_mp4()})
    row = {"file": "clips/pan-1-0000.mp4", "caption": "A ball rolls.", "width": 64, "height": 64, "fps": 8.0,
           "frames": 9, "source": "pan.mp4", "start": 0.0, "stop": 1.1, "scores": {"motion": 0.1}}  # fmt: skip
    dropped = {"dropped": {"stage": "motion", "value": 0.01, "why": "0.01 sides per second; allowed: 0.02 or more"}}
    rows = [row, row | {"caption": None}, row | dropped, row | {"file": "clips/gone.mp4"}, row | {"caption": " "}]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "captions.jsonl").write_text('{"key": "pan-1-0000", "caption": "A ball rolls."}\n')
    (tmp_path / "settings.json").write_text('{"ocr": false}')
    skip_report = SkipReport()
    samples = list(read_samples("curated", tmp_path, tmp_path, skip_report))
    assert drop_keys(samples) == drop_keys(
        [TrainingSample("text-to-video", "A ball rolls.", target=make_mp4(), origin="curated")]
    )
    assert [(kind, where) for kind, where, _ in skip_report.skipped_samples] == [
        ("wrong record", "clips.jsonl:2"),
        ("wrong record", "clips.jsonl:3"),
        ("missing file", "clips.jsonl:4"),
        ("wrong record", "clips.jsonl:5"),
    ]
    assert (
        "caption: it is missing" in skip_report.skipped_samples[0][2]
        and "0.01 sides per second" in skip_report.skipped_samples[1][2]
    )
    with pytest.raises(InvalidInput, match=r"'clips' contains no clips\.jsonl"):
        list(read_samples("curated", tmp_path / "clips", tmp_path, SkipReport()))


def test_a_broken_parquet_file_is_reported(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"image": make_png(1), "caption": "one"}])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    samples, skip_report = read_layout("captions", tmp_path, ".")
    assert len(samples) == 1
    assert skip_report.skipped_samples[0][:2] == ("broken file", "b.parquet")
