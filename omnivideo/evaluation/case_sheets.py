"""Contact sheets of held-out cases: what was requested, what the model made of it, and whether that is right."""

import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from omnivideo.evaluation.suite import JudgedCase
from omnivideo.media.contact_sheet import PAPER_COLOR, make_contact_sheet
from omnivideo.media.resample import spread_frame_indices

CASES_PER_SHEET, COLUMNS = 64, 4
MAX_SHOWN_FRAMES = {"source": 3, "result": 5}


class CaseSheets:
    """A random sample of the cases of each task, and the sheets of them."""

    def __init__(self, count: int = CASES_PER_SHEET):
        self.count = count
        self.rng = random.Random("case sheets")
        self.cases: dict[str, list[JudgedCase]] = defaultdict(list)
        self.seen: dict[str, int] = defaultdict(int)

    def record(self, case: JudgedCase) -> None:
        """Keep a case with the same probability as every other of its task (reservoir sampling)."""
        kept = self.cases[case.task]
        self.seen[case.task] += 1
        if len(kept) < self.count:
            kept.append(case)
        elif (index := self.rng.randrange(self.seen[case.task])) < self.count:
            kept[index] = case

    def write(self, folder: Path) -> list[Path]:
        """Write one PNG for each task and return the files."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{task}.png" for task in self.cases]
        for path, cases in zip(paths, self.cases.values(), strict=True):
            # A palette halves the size and does not change the world's few colours visibly.
            make_case_sheet(cases).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        return paths


def make_case_sheet(cases: list[JudgedCase]) -> Image.Image:
    """Return a page of cases in columns, in their order from top to bottom."""
    height = -(-len(cases) // COLUMNS)
    columns = [cases[first : first + height] for first in range(0, len(cases), height)]
    sheets = [make_contact_sheet([*map(show_case, column)], [*map(describe_case, column)], 1) for column in columns]
    page = Image.new("RGB", (sum(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)), PAPER_COLOR)
    x = 0
    for sheet in sheets:
        page.paste(sheet, (x, 0))
        x += sheet.width
    return page


def show_case(case: JudgedCase) -> list[np.ndarray]:
    """Return some frames of the source, if there is one, and of the result."""
    frames = []
    for name, clip in (("source", case.source), ("result", case.result)):
        if clip is not None:
            frames += [clip[index] for index in spread_frame_indices(len(clip), MAX_SHOWN_FRAMES[name])]
    return frames


def describe_case(case: JudgedCase) -> str:
    return f"{'right' if case.is_right else 'WRONG'}, {case.kind}: {case.text}"
