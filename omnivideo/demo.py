"""The main job in one go: a clip and a still from a sentence, each edited, each asked about, all scored.

python -m omnivideo.demo out/demo
"""

import sys
from pathlib import Path

from rich.console import Console

from omnivideo.backends.decoder.video import contact_sheet
from omnivideo.errors import OmniVideoError
from omnivideo.studio import Result, Studio
from omnivideo.training.scorer import read

TURNS = (
    ("clip.mp4", None, "a small red circle moving right"),
    ("clip-blue.mp4", "clip.mp4", "make it blue"),
    ("still.png", None, "a picture of a large yellow star and a small green square on a black background"),
    ("still-pink.png", "still.png", "change the background to pink"),
)
QUESTIONS = (("clip-blue.mp4", "how does the circle move?"), ("still-pink.png", "how many objects are there?"))


def facts(result: Result) -> str:
    """What the scorer reads off a result, as one line; "?" for what it cannot name."""
    reading = read(result.frames)
    fields = ("size", "colour", "shape", "motion") if len(result.frames) > 1 else ("size", "colour", "shape")
    things = [" ".join(getattr(thing, field) or "?" for field in fields) for thing in reading.things]
    return f"{'; '.join(things) or 'nothing'} on {reading.background or '?'}"


def main(folder: Path, out: Console) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    studio = Studio()
    rows, captions = [], []
    for name, source, words in TURNS:
        result = studio.edit(folder / source, words) if source else studio.generate(words, image=name.endswith(".png"))
        result.save(folder / name)
        seconds = sum(result.manifest.seconds.values())
        out.print(f"[bold]{words}[/bold]\n  {name}, {seconds:.1f} s; the scorer sees: {facts(result)}")
        rows.append(list(result.frames))
        captions.append(f"{source}: {words}" if source else words)
    for name, question in QUESTIONS:
        reply = studio.understand(folder / name, question)
        out.print(f"[bold]{question}[/bold] ({name})\n  {reply}")
        captions = [f"{line}   {question} - {reply}" if turn[0] == name else line
                    for line, turn in zip(captions, TURNS, strict=True)]  # fmt: skip
    contact_sheet(rows, captions).save(folder / "contact-sheet.png")
    out.print(f"all of it on one sheet: {folder / 'contact-sheet.png'}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo"), Console())
    except OmniVideoError as error:
        sys.exit(f"error: {error}")
