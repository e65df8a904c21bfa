"""Read the published layouts of the paper's data sets into training samples.

    llava             JSON or JSONL: image or video, conversations [{from: human | gpt, value}]
    sharegpt4video    JSONL: video_path, captions [{idx, content}]; idx "-1" is the caption of the whole clip
    ultraedit         parquet: source_image, edited_image, edit_prompt, target_caption
    anyedit           parquet or JSON: image_file, edited_file, edit_instruction (in JSON "edit"), output
    senorita          JSON: source_video_path, target_video_path, instruction, enhanced_instruction
    captions          parquet: image and caption columns
    curated           JSONL of `omnivideo data curate`: file, caption

A parser takes a record and the folder of its media. Records that cannot be used are added to a skip report. Pictures in
parquet are bytes, or {bytes, path} as the `datasets` package writes them.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omnivideo.contracts import get_editing_task
from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.training.data.sample import SkipReport, TrainingSample, is_clip

Record = dict[str, Any]
IMAGE_FIELDS = ("image", "jpg", "png", "image_bytes", "image_file")
CAPTION_FIELDS = ("caption", "text", "txt", "recaption", "prompt")


# ---------------------------------------------------------------- records


def read_records(path: Path, skip_report: SkipReport) -> Iterator[tuple[str, Record]]:
    """Yield the location and content of each record of a .json (an array), .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        rows = read_parquet_rows(path, skip_report)
    else:
        text = read_text(path)
        rows = (
            parse_json_array(path, text, skip_report)
            if text.lstrip().startswith("[")
            else parse_json_lines(path, text, skip_report)
        )
    for name, row in rows:
        if isinstance(row, dict):
            yield name, row
        else:
            skip_report.add_skip("wrong record", name, "it is not a JSON object")


def read_text(path: Path) -> str:
    """Return a file's text; raise InvalidInput if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidInput("annotations", f"{path.name!r} cannot be read: {error.strerror}") from None


def parse_json_lines(path: Path, text: str, skip_report: SkipReport) -> Iterator[tuple[str, Any]]:
    """Yield the location and value of each line of a .jsonl file."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                skip_report.add_skip("wrong record", name, f"it is not JSON: {error}")
                continue
            yield name, row


def parse_json_array(path: Path, text: str, skip_report: SkipReport) -> Iterator[tuple[str, Any]]:
    """Yield elements one by one, so that a truncated file gives all those before the cut."""
    decoder, element_start = json.JSONDecoder(), re.compile(r"[^\s,]|$")
    position, number = text.index("[") + 1, 0
    while match := element_start.search(text, position):
        position = match.start()
        if text.startswith("]", position):
            return
        number += 1
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            skip_report.add_skip(
                "wrong record", f"{path.name}#{number}", f"it is not JSON, and the rest of the file is lost: {error}"
            )
            return
        yield f"{path.name}#{number}", row


def read_parquet_rows(path: Path, skip_report: SkipReport) -> Iterator[tuple[str, Any]]:
    """Yield the location and content of each row of a parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingDependency("parquet files need pyarrow: pip install 'pyarrow>=20'") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}#{number}", row
    except FileNotFoundError:
        raise InvalidInput("annotations", f"the file {path.name!r} does not exist") from None
    except (ArrowException, OSError) as error:
        detail = str(error).strip().splitlines()[0][:200]
        skip_report.add_skip("broken file", path.name, f"after {number} rows: {detail}")


# ---------------------------------------------------------------- fields


def read_text_field(row: Record, *names: str) -> str:
    """Return the first of these fields that contains text; raise InvalidInput if none does."""
    for name in names:
        if isinstance(value := row.get(name), str) and value.strip():
            return value.strip()
    raise InvalidInput(names[0], f"missing (also looked for: {', '.join(names[1:]) or 'nothing else'})")


def read_media_field(row: Record, media: Path, *names: str) -> bytes:
    """Return the bytes of the first of these fields that names a file under `media`, or contains its content."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str) and value:
            return read_file_in_folder(media, value)
        if value is not None:
            raise InvalidInput(name, "it must be one file name, or the bytes of a file")
    raise InvalidInput(names[0], f"missing (also looked for: {', '.join(names[1:]) or 'nothing else'})")


def read_file_in_folder(folder: Path, name: str) -> bytes:
    """Return a file's bytes; raise InvalidInput for a name outside the folder."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise InvalidInput("file", f"{name!r} is outside the media folder")
        return path.read_bytes()
    except FileNotFoundError:
        raise InvalidInput("file", f"{name!r} is missing") from None
    except (OSError, ValueError, RuntimeError):  # no permission, an invalid file name, a loop of links
        raise InvalidInput("file", f"{name[:200]!r} cannot be read") from None


# ---------------------------------------------------------------- layouts


def parse_llava(row: Record, media: Path) -> TrainingSample:
    """Return the sample of a question-and-answer record of LLaVA."""
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        raise InvalidInput("conversations", "missing, or not a list of turns")
    marker = re.compile(r"(?:(?<!\s)\s++)?<(image|video)>\s*+")
    texts = [marker.sub("", read_text_field(turn, "value")) for turn in conversation]
    roles = [turn.get("from") for turn in conversation]
    if roles != ["human", "gpt"] * (len(conversation) // 2):
        raise InvalidInput("conversations", "human and gpt must alternate")
    source = read_media_field(row, media, "video", "image")
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    return TrainingSample(
        "video-understanding" if is_clip(source) else "image-understanding", source=source, turns=turns
    )


def parse_sharegpt4video(row: Record, media: Path) -> TrainingSample:
    """Return the sample of a captioned clip of ShareGPT4Video."""
    captions = row.get("captions")
    if not isinstance(captions, list):
        raise InvalidInput("captions", "missing, or not a list")
    full_captions = [caption for caption in captions if isinstance(caption, dict) and str(caption.get("idx")) == "-1"]
    if not full_captions:
        raise InvalidInput("captions", "the caption of the whole clip (idx -1) is missing")
    return TrainingSample(
        "text-to-video", read_text_field(full_captions[0], "content"), target=read_media_field(row, media, "video_path")
    )


def parse_ultraedit(row: Record, media: Path) -> TrainingSample:
    """Return the sample of an edit of UltraEdit."""
    return parse_edit(row, media, ("source_image",), ("edited_image",), ("edit_prompt",), ("target_caption",))


def parse_anyedit(row: Record, media: Path) -> TrainingSample:
    """Return the sample of an edit of AnyEdit."""
    if row.get("visual_input") not in (None, "", "None"):
        raise InvalidInput("visual_input", "edits guided by a second picture are not one of the six tasks")
    return parse_edit(row, media, ("image_file",), ("edited_file",), ("edit_instruction", "edit"), ("output",))


def parse_senorita(row: Record, media: Path) -> TrainingSample:
    """Return the sample of an edit of Señorita-2M."""
    instruction = ("enhanced_instruction", "instruction")
    return parse_edit(row, media, ("source_video_path",), ("target_video_path",), instruction, ("target_prompt",))


def parse_edit(
    row: Record, media: Path, source_fields: tuple[str, ...], target_fields: tuple[str, ...],
    text_fields: tuple[str, ...], caption_fields: tuple[str, ...],
) -> TrainingSample:  # fmt: skip
    """Return the sample of an edit from the fields of its source, target, instruction and target caption."""
    before, after = read_media_field(row, media, *source_fields), read_media_field(row, media, *target_fields)
    target_caption = next((row[name].strip() for name in caption_fields if isinstance(row.get(name), str)), "")
    task = get_editing_task("video" if is_clip(after) else "image")
    return TrainingSample(task, read_text_field(row, *text_fields), before, after, caption=target_caption)


def parse_captions(row: Record, media: Path) -> TrainingSample:
    """Return the sample of a captioned image."""
    return TrainingSample(
        "text-to-image", read_text_field(row, *CAPTION_FIELDS), target=read_media_field(row, media, *IMAGE_FIELDS)
    )


def parse_curated(row: Record, media: Path) -> TrainingSample:
    """Return the sample of a captioned clip of `omnivideo data curate`."""
    if dropped := row.get("dropped"):
        raise InvalidInput("dropped", f"curation rejected the clip: {json.dumps(dropped)[:200]}")
    if row.get("caption") is None:
        raise InvalidInput("caption", "it is missing; run `omnivideo data curate` with --captions")
    return TrainingSample("text-to-video", read_text_field(row, "caption"), target=read_media_field(row, media, "file"))


LAYOUT_PARSERS: dict[str, Callable[[Record, Path], TrainingSample]] = {
    "llava": parse_llava,
    "sharegpt4video": parse_sharegpt4video,
    "ultraedit": parse_ultraedit,
    "anyedit": parse_anyedit,
    "senorita": parse_senorita,
    "captions": parse_captions,
    "curated": parse_curated,
}
FILE_PATTERNS = {"curated": "clips.jsonl"}  # the other .jsonl files in the folder are journals


def read_samples(layout: str, path: Path, media: Path, skip_report: SkipReport) -> Iterator[TrainingSample]:
    """Yield the samples of a file, or of all .json, .jsonl and .parquet files of a folder, in a layout."""
    if layout not in LAYOUT_PARSERS:
        raise InvalidInput("layout", f"{layout!r} is not one of {', '.join(LAYOUT_PARSERS)}")
    for file in list_annotation_files(path, layout):
        for name, row in read_records(file, skip_report):
            with skip_report.skip_on_error(name):
                sample = LAYOUT_PARSERS[layout](row, media)
                yield TrainingSample(**vars(sample) | {"origin": layout, "key": name})


def list_annotation_files(path: Path, layout: str) -> list[Path]:
    """Return the file itself, or the annotation files of a folder; raise InvalidInput if it has none."""
    if not path.is_dir():
        return [path]
    files = sorted(
        file for file in path.rglob(FILE_PATTERNS.get(layout, "*")) if file.suffix in (".json", ".jsonl", ".parquet")
    )
    if not files:
        expected = FILE_PATTERNS.get(layout, ".json, .jsonl or .parquet file")
        raise InvalidInput("annotations", f"{path.name!r} contains no {expected}")
    return files
