"""The published layouts of the paper's sources, each read into the same samples.

    llava             JSON or JSONL: image or video, conversations [{from: human | gpt, value}]
    sharegpt4video    JSONL: video_path, captions [{idx, content}]; idx "-1" is the whole clip's
    ultraedit         parquet: source_image, edited_image, edit_prompt, target_caption
    anyedit           parquet or JSON: image_file, edited_file, edit_instruction (in JSON "edit"), output
    senorita          JSON: source_video_path, target_video_path, instruction, enhanced_instruction
    captions          parquet: image and caption columns
    curated           JSONL of `omnivideo data curate`: file, caption

A reader is a function of the file, the folder that its media stand in, and the problems; what cannot be used is noted
there and skipped.  Pictures in parquet are bytes, or {bytes, path} as the `datasets` package writes them.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omnivideo.errors import InvalidInput, NotInstalled
from omnivideo.training.data.sample import Problems, Sample, is_clip

Record = dict[str, Any]
PICTURES = ("image", "jpg", "png", "image_bytes", "image_file")
CAPTIONS = ("caption", "text", "txt", "recaption", "prompt")


# ---------------------------------------------------------------- records


def records(path: Path, problems: Problems) -> Iterator[tuple[str, Record]]:
    """Name and content of each record of a .json (an array), .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        rows = parquet_rows(path, problems)
    else:
        text = text_of(path)
        rows = array_rows(path, text, problems) if text.lstrip().startswith("[") else line_rows(path, text, problems)
    for name, row in rows:
        if isinstance(row, dict):
            yield name, row
        else:
            problems.add("wrong record", name, "it is not an object")


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidInput("annotations", f"{path.name!r} cannot be read: {error.strerror}") from None


def line_rows(path: Path, text: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.add("wrong record", name, f"it is not JSON: {error}")
                continue
            yield name, row


def array_rows(path: Path, text: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Elements one by one, so that a file cut short gives what comes before the cut."""
    decoder, next_one = json.JSONDecoder(), re.compile(r"[^\s,]|$")
    at, number = text.index("[") + 1, 0
    while found := next_one.search(text, at):
        at = found.start()
        if text.startswith("]", at):
            return
        number += 1
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            problems.add("wrong record", f"{path.name}#{number}", f"it is not JSON, and the rest is lost: {error}")
            return
        yield f"{path.name}#{number}", row


def parquet_rows(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise NotInstalled("parquet files need pyarrow: pip install 'pyarrow>=20'") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}#{number}", row
    except FileNotFoundError:
        raise InvalidInput("annotations", f"there is no {path.name!r}") from None
    except (ArrowException, OSError) as error:
        what = str(error).strip().splitlines()[0][:200]
        problems.add("broken file", path.name, f"after {number} rows: {what}")


# ---------------------------------------------------------------- fields


def text_in(row: Record, *names: str) -> str:
    """The first of these fields that holds text."""
    for name in names:
        if isinstance(value := row.get(name), str) and value.strip():
            return value.strip()
    raise InvalidInput(names[0], f"missing (also looked for: {', '.join(names[1:]) or 'nothing else'})")


def medium(row: Record, media: Path, *names: str) -> bytes:
    """The first of these fields that names a file under `media`, or holds its bytes."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str) and value:
            return file_in(media, value)
        if value is not None:
            raise InvalidInput(name, "one file, or the bytes of one, is wanted")
    raise InvalidInput(names[0], f"missing (also looked for: {', '.join(names[1:]) or 'nothing else'})")


def file_in(folder: Path, name: str) -> bytes:
    """A file's bytes; never one outside of the folder, whatever the record says."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise InvalidInput("file", f"{name!r} is outside of the media folder")
        return path.read_bytes()
    except FileNotFoundError:
        raise InvalidInput("file", f"{name!r} is missing") from None
    except (OSError, ValueError, RuntimeError):  # no permission, no file name at all, a ring of links
        raise InvalidInput("file", f"{name[:200]!r} cannot be read") from None


# ---------------------------------------------------------------- layouts


def llava(row: Record, media: Path) -> Sample:
    said = row.get("conversations")
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise InvalidInput("conversations", "missing, or not a list of turns")
    texts = [re.sub(r"\s*<(image|video)>\s*", "", text_in(turn, "value")) for turn in said]
    roles = [turn.get("from") for turn in said]
    if roles != ["human", "gpt"] * (len(said) // 2):
        raise InvalidInput("conversations", "human and gpt are to take turns")
    source = medium(row, media, "video", "image")
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Sample("video-understanding" if is_clip(source) else "image-understanding", source=source, turns=turns)


def sharegpt4video(row: Record, media: Path) -> Sample:
    captions = row.get("captions")
    if not isinstance(captions, list):
        raise InvalidInput("captions", "missing, or not a list")
    whole = [one for one in captions if isinstance(one, dict) and str(one.get("idx")) == "-1"]
    if not whole:
        raise InvalidInput("captions", "there is none of the whole clip (idx -1)")
    return Sample("text-to-video", text_in(whole[0], "content"), target=medium(row, media, "video_path"))


def ultraedit(row: Record, media: Path) -> Sample:
    return edit(row, media, ("source_image",), ("edited_image",), ("edit_prompt",), ("target_caption",))


def anyedit(row: Record, media: Path) -> Sample:
    if row.get("visual_input") not in (None, "", "None"):
        raise InvalidInput("visual_input", "edits by a second picture are not among the six tasks")
    return edit(row, media, ("image_file",), ("edited_file",), ("edit_instruction", "edit"), ("output",))


def senorita(row: Record, media: Path) -> Sample:
    instruction = ("enhanced_instruction", "instruction")
    return edit(row, media, ("source_video_path",), ("target_video_path",), instruction, ("target_prompt",))


def edit(
    row: Record, media: Path, source: tuple[str, ...], target: tuple[str, ...], text: tuple[str, ...],
    caption: tuple[str, ...],
) -> Sample:  # fmt: skip
    before, after = medium(row, media, *source), medium(row, media, *target)
    shown = next((row[name].strip() for name in caption if isinstance(row.get(name), str)), "")
    task = "video-editing" if is_clip(after) else "image-editing"
    return Sample(task, text_in(row, *text), before, after, caption=shown)  # type: ignore[arg-type]


def captions(row: Record, media: Path) -> Sample:
    return Sample("text-to-image", text_in(row, *CAPTIONS), target=medium(row, media, *PICTURES))


def curated(row: Record, media: Path) -> Sample:
    if dropped := row.get("dropped"):
        raise InvalidInput("dropped", f"the curation rejected it: {json.dumps(dropped)[:200]}")
    if row.get("caption") is None:
        raise InvalidInput("caption", "there is none: curate with --captions")
    return Sample("text-to-video", text_in(row, "caption"), target=medium(row, media, "file"))


LAYOUTS: dict[str, Callable[[Record, Path], Sample]] = {
    "llava": llava,
    "sharegpt4video": sharegpt4video,
    "ultraedit": ultraedit,
    "anyedit": anyedit,
    "senorita": senorita,
    "captions": captions,
    "curated": curated,
}
ONLY = {"curated": "clips.jsonl"}  # of its folder: the files beside it are journals


def read(layout: str, path: Path, media: Path, problems: Problems) -> Iterator[Sample]:
    """The samples of a file, or of all .json, .jsonl and .parquet files of a folder, in this layout."""
    if layout not in LAYOUTS:
        raise InvalidInput("layout", f"{layout!r} is not one of {', '.join(LAYOUTS)}")
    for file in files_of(path, layout):
        for name, row in records(file, problems):
            with problems.skipping(name):
                found = LAYOUTS[layout](row, media)
                yield Sample(**vars(found) | {"origin": layout, "key": name})


def files_of(path: Path, layout: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob(ONLY.get(layout, "*")) if file.suffix in (".json", ".jsonl", ".parquet"))
    if not found:
        wanted = ONLY.get(layout, ".json, .jsonl or .parquet file")
        raise InvalidInput("annotations", f"{path.name!r} holds no {wanted}")
    return found
