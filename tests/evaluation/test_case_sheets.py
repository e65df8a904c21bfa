"""Contact sheets of judged cases."""

import numpy as np
from PIL import Image

from omnivideo.evaluation import case_sheets
from omnivideo.evaluation.case_sheets import CaseSheets
from omnivideo.evaluation.suite import JudgedCase


def make_case(task: str, number: int, frames: int = 9) -> JudgedCase:
    clip = np.full((frames, 64, 64, 3), number % 256, np.uint8)
    return JudgedCase(task, "recolour", f"make it {number}", clip, number % 2 == 0, clip[:1])


def test_each_task_has_a_sheet_of_a_random_sample(tmp_path):
    sheets = CaseSheets(count=8)
    for number in range(100):
        sheets.record(make_case("video-editing", number))
    sheets.record(make_case("image-editing", 3, frames=1))
    kept = [case.result[0, 0, 0, 0] for case in sheets.cases["video-editing"]]
    assert len(set(kept)) == 8 and max(kept) > 50 and sheets.seen["video-editing"] == 100
    paths = sheets.write(tmp_path / "new")
    assert [path.name for path in paths] == ["video-editing.png", "image-editing.png"]
    with Image.open(paths[0]) as sheet, Image.open(paths[1]) as single:
        assert sheet.width > 3 * single.width > 0 and sheet.height > single.height


def test_a_case_says_what_was_requested_and_whether_it_is_right():
    assert case_sheets.describe_case(make_case("video-editing", 3)) == "WRONG, recolour: make it 3"
    assert case_sheets.describe_case(make_case("video-editing", 4)).startswith("right, ")
    assert len(case_sheets.show_case(make_case("video-editing", 4))) == 1 + 5  # the source is a still
