"""Contact sheets show frames enlarged, under captions that are broken into lines."""

import numpy as np

from omnivideo.media.contact_sheet import make_contact_sheet
from tests.support.clips import make_clip


def test_a_contact_sheet_shows_each_frame_enlarged():
    sheet = make_contact_sheet(
        [make_clip(), make_clip(1), make_clip(30)], ["a clip", "a still", "a longer clip"], scale=2
    )
    colours = np.asarray(sheet).reshape(-1, 3)
    discs = (np.abs(colours.astype(int) - (40, 80, 230)).sum(1) == 0).sum()
    assert discs == (9 + 1 + 9) * 14 * 14 * 2 * 2
    assert sheet.width > 9 * 128 and sheet.height > 3 * 128


def test_a_long_caption_is_broken_into_lines():
    short, long = (make_contact_sheet([make_clip(2)], [text]) for text in ("word", "word " * 100))
    assert long.width == short.width and long.height > short.height
