"""Curate a folder: survey every file, measure every scene, drop duplicates, caption and write clips.

Dask runs the tasks, on this machine's cores or on a cluster whose machines see both folders under the same path. Each
record is written to a journal first, so a killed run continues after the last one and produces the same result.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omnivideo.contracts import FrozenModel
from omnivideo.errors import InvalidInput, OmniVideoError, UnreadableMedia
from omnivideo.training.curation import measures
from omnivideo.training.curation.bounds import STAGES, CurationBounds
from omnivideo.training.curation.captions import CAPTION_FPS, Captioner
from omnivideo.training.curation.journal import Journal, write_atomically
from omnivideo.training.curation.reading import (
    SAMPLED_FPS,
    VIDEO_SUFFIXES,
    ClipShape,
    SampledClip,
    import_optional,
    read_frame_size,
    sample_clip,
    survey_video,
    write_clip,
)
from omnivideo.training.curation.workers import connect_workers, format_reason, run_tasks

THUMBNAIL_FRAMES = 3  # frames of a thumbnail
THUMBNAIL_SIDE = 220  # px, the longer side of each
CAPTION_CONCURRENCY = 8  # concurrent requests; the server batches them

PhaseProgressCallback = Callable[[str, int, int], None]  # phase, items done, items in total


class CurationConfig(FrozenModel):
    """Everything that determines the result; a folder only continues a run with the same configuration."""

    bounds: CurationBounds = CurationBounds()
    ocr: bool = True
    aesthetic: str | None = None


@dataclass
class CurationResult:
    """The result of a run: the records of files and clips, the kept clips, and the stages that were not available."""

    files: dict[str, dict[str, Any]]
    clips: dict[str, dict[str, Any]]
    kept_clips: list[dict[str, Any]]
    missing_stages: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- tasks


def survey_file(folder: str, name: str, bounds: CurationBounds) -> dict[str, Any]:
    """Return a file's record: its size and scenes, or the reason for dropping it."""
    path = Path(folder) / name
    width, height = read_frame_size(path)
    record: dict[str, Any] = {"width": width, "height": height, "scores": {}}
    short, long = sorted((width, height))
    for stage, value in (("resolution", short), ("aspect", round(long / short, 4))):
        record["scores"][stage] = value
        if dropped := STAGES[stage].find_rejection(bounds, value):
            return record | {"dropped": dropped}
    return record | asdict(survey_video(path, bounds.max_seconds)) | {"dropped": None}


def measure_clip(folder: str, output_dir: str, clip: dict[str, Any], config: CurationConfig) -> dict[str, Any]:
    """Return a clip's record with the measurement of each stage up to the one that drops it."""
    path, span = Path(folder) / clip["source"], clip["span"]
    record = clip | {"scores": {"length": round(span[1] - span[0], 4)}, "words": "", "hashes": [], "dropped": None}
    sampled_clip = sample_clip(path, span)
    write_thumbnail(sampled_clip, Path(output_dir) / "thumbs" / f"{clip['clip']}.jpg")
    for stage, value in measure_stages(sampled_clip, config, record):
        record["scores"][stage] = None if value is None else round(float(value), 5)
        if value is not None and (dropped := STAGES[stage].find_rejection(config.bounds, value)):
            return record | {"dropped": dropped | ({"words": record["words"]} if stage == "text" else {})}
    return record | {"hashes": measures.compute_hashes(sampled_clip.full_frames)}


def measure_stages(
    sampled_clip: SampledClip, config: CurationConfig, record: dict[str, Any]
) -> Iterator[tuple[str, float | None]]:
    """Yield the measurements stage by stage, so that the costly stages run only for clips that pass the others."""
    yield "length", record["scores"]["length"]
    yield "bars", measures.measure_black_bars(sampled_clip.full_frames)
    motion = measures.measure_motion(sampled_clip.small_frames)
    yield "motion", motion.fastest_speed
    yield "shake", motion.shake
    yield "overlay", measures.measure_overlay(sampled_clip.full_frames, motion.travel)
    if config.ocr:
        share, record["words"] = measures.measure_text(sampled_clip.full_frames)
        yield "text", share
    if config.aesthetic:
        from omnivideo.training.curation.aesthetic import score_frames

        yield "aesthetic", score_frames(config.aesthetic, sampled_clip.full_frames)


def write_thumbnail(sampled_clip: SampledClip, path: Path) -> None:
    """Write a few frames side by side."""
    frames = sampled_clip.full_frames[:: max(1, len(sampled_clip.full_frames) // THUMBNAIL_FRAMES)][:THUMBNAIL_FRAMES]
    strip = np.concatenate([measures.shrink_frame(frame, THUMBNAIL_SIDE) for frame in frames], axis=1)
    Image.fromarray(strip).save(path, quality=72)


def write_clip_file(folder: str, output_dir: str, clip: dict[str, Any]) -> ClipShape:
    return write_clip(Path(folder) / clip["source"], clip["span"], Path(output_dir) / "clips" / f"{clip['clip']}.mp4")


# ---------------------------------------------------------------- the run


def curate(
    folder: Path,
    output_dir: Path,
    config: CurationConfig,
    captioner: Captioner | None = None,
    *,
    worker_count: int = 1,
    cluster: str | None = None,
    on_progress: PhaseProgressCallback = lambda phase, done, of: None,
) -> CurationResult:
    """Write the kept clips and clips.jsonl to `output_dir`; results of an earlier run are reused."""
    names, missing = list_sources(folder, output_dir), find_missing_stages(config, captioner)
    config = config.model_copy(update={"ocr": config.ocr and "text" not in missing})
    prepare_output(output_dir, config)
    with ExitStack() as stack:
        file_journal, clip_journal, caption_journal = (
            stack.enter_context(closing(Journal(output_dir / f"{name}.jsonl")))
            for name in ("files", "measured", "captions")
        )
        client = stack.enter_context(connect_workers(worker_count, cluster))
        survey_files(client, folder, names, config.bounds, file_journal, on_progress)
        scenes = [clip for name in names for clip in list_scenes(name, file_journal.records[name])]
        measure_clips(client, folder, output_dir, scenes, config, clip_journal, on_progress)
        clip_records = {clip["clip"]: dict(clip_journal.records[clip["clip"]]) for clip in scenes}
        kept_clips = drop_duplicates(clip_records, file_journal.records, config.bounds, on_progress)
        if captioner:
            caption_clips(folder, kept_clips, captioner, caption_journal, on_progress)
        lines = write_clips(client, folder, output_dir, kept_clips, on_progress)
    for line in lines:
        name = line["file"][6:-4]
        caption_record = caption_journal.records.get(name, {})
        line["caption"], clip_records[name]["uncaptioned"] = caption_record.get("caption"), caption_record.get("why")
    write_atomically(output_dir / "clips.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return CurationResult({name: file_journal.records[name] for name in names}, clip_records, lines, missing)


def list_sources(folder: Path, output_dir: Path) -> list[str]:
    """Return the videos under the folder, by their relative paths."""
    if not folder.is_dir():
        raise InvalidInput("folder", "it does not exist; allowed: a folder of videos")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    names = [
        path.relative_to(folder).as_posix() for path in paths if output_dir.resolve() not in path.resolve().parents
    ]
    if not names:
        raise InvalidInput("folder", f"it contains no video; allowed: {', '.join(VIDEO_SUFFIXES)}")
    return names


def find_missing_stages(config: CurationConfig, captioner: Captioner | None) -> dict[str, str]:
    """Return the stages that are not available, and how to enable them."""
    missing = {}
    try:
        if config.ocr:
            import_optional("rapidocr_onnxruntime")
        else:
            missing["text"] = "switched off (--no-ocr)"
    except OmniVideoError:
        missing["text"] = "not installed: pip install rapidocr-onnxruntime"
    if not config.aesthetic:
        missing["aesthetic"] = "no model given: --aesthetic FOLDER"
    if captioner is None:
        missing["captions"] = "no MLLM server given: --captions URL"
    return missing


def prepare_output(output_dir: Path, config: CurationConfig) -> None:
    """Create the folder; refuse one that contains a run with other settings, whose records would be mixed with ours."""
    try:
        for subfolder in ("clips", "thumbs"):
            (output_dir / subfolder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput("output", f"the folder cannot be created: {error.strerror}") from None
    file, text = output_dir / "settings.json", config.model_dump_json(indent=1)
    if file.exists() and file.read_text() != text:
        raise InvalidInput("output", "it contains a run with other settings (settings.json); allowed: another folder")
    write_atomically(file, text)


def fingerprint_file(path: Path) -> list[int]:
    """Return size and modification time; a file that changes between two runs counts as a new one."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def survey_files(
    client: Any,
    folder: Path,
    names: list[str],
    bounds: CurationBounds,
    journal: Journal,
    on_progress: PhaseProgressCallback,
) -> None:
    fingerprints = {name: fingerprint_file(folder / name) for name in names}
    remaining = [{"name": name} for name in names if journal.records.get(name, {}).get("stamp") != fingerprints[name]]
    task = partial(survey_item, str(folder), bounds)
    for done, (item, record) in enumerate(run_tasks(client, task, remaining), len(names) - len(remaining) + 1):
        journal.append_record(item["name"], record | {"stamp": fingerprints[item["name"]]})
        on_progress("files", done, len(names))


def survey_item(folder: str, bounds: CurationBounds, item: dict[str, Any]) -> dict[str, Any]:
    return survey_file(folder, item["name"], bounds)


def list_scenes(name: str, file: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a surveyed file's scenes, each with a unique name that shows its origin."""
    safe_stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-")[:40]
    path_digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return [
        {"clip": f"{safe_stem}-{path_digest}-{index:04d}", "source": name, "span": list(span), "stamp": file["stamp"]}
        for index, span in enumerate(file.get("spans", ()))
    ]


def measure_clips(
    client: Any,
    folder: Path,
    output_dir: Path,
    scenes: list[dict[str, Any]],
    config: CurationConfig,
    journal: Journal,
    on_progress: PhaseProgressCallback,
) -> None:
    remaining = [clip for clip in scenes if journal.records.get(clip["clip"], {}).get("stamp") != clip["stamp"]]
    task = partial(measure_item, str(folder), str(output_dir), config)
    for done, (clip, record) in enumerate(run_tasks(client, task, remaining), len(scenes) - len(remaining) + 1):
        journal.append_record(clip["clip"], clip | record)
        on_progress("clips", done, len(scenes))


def measure_item(folder: str, output_dir: str, config: CurationConfig, clip: dict[str, Any]) -> dict[str, Any]:
    return measure_clip(folder, output_dir, clip, config)


def drop_duplicates(
    clips: dict[str, dict[str, Any]],
    files: dict[str, dict[str, Any]],
    bounds: CurationBounds,
    on_progress: PhaseProgressCallback,
) -> list[dict[str, Any]]:
    """Return the clips that no stage dropped and that resemble no better clip; record which one the others resemble.

    The better clip has more pixels, then more bytes per second, then the first name.
    """

    def rank_by_quality(clip: dict[str, Any]) -> tuple[Any, ...]:
        file = files[clip["source"]]
        return (-file["width"] * file["height"], -file["stamp"][0] / file["seconds"], clip["clip"])

    candidates = sorted((clip for clip in clips.values() if not clip["dropped"]), key=rank_by_quality)
    kept_clips: list[dict[str, Any]] = []
    table = np.zeros((len(candidates), max_hash_count(candidates)), dtype=np.uint64)
    for done, clip in enumerate(candidates, 1):
        clip_hashes = np.array(clip["hashes"], dtype=np.uint64)
        distances = (
            measures.compute_hash_distances(clip_hashes, table[: len(kept_clips)]) if kept_clips else np.array([64.0])
        )
        nearest = int(distances.argmin())
        clip["scores"]["duplicates"] = round(float(distances[nearest]), 3)
        if distances[nearest] <= bounds.max_duplicate_distance:
            twin = kept_clips[nearest]["clip"]
            why = (
                f"{distances[nearest]:.3g} bits of 64 from {twin}; allowed: more than {bounds.max_duplicate_distance:g}"
            )
            clip["dropped"] = {"stage": "duplicates", "value": float(distances[nearest]), "why": why, "like": twin}
        else:
            table[len(kept_clips)] = np.resize(clip_hashes, table.shape[1])
            kept_clips.append(clip)
        on_progress("duplicates", done, len(candidates))
    return sorted(kept_clips, key=lambda clip: (clip["source"], clip["span"]))


def max_hash_count(clips: list[dict[str, Any]]) -> int:
    return max((len(clip["hashes"]) for clip in clips), default=1)


def caption_clips(
    folder: Path,
    clips: list[dict[str, Any]],
    captioner: Captioner,
    journal: Journal,
    on_progress: PhaseProgressCallback,
) -> None:
    """Caption the clips without a caption; the next run, perhaps with another server, retries refused clips."""
    remaining = [clip for clip in clips if not is_captioned(clip, journal)]

    def caption_clip(clip: dict[str, Any]) -> dict[str, Any]:
        try:
            small_frames = sample_clip(folder / clip["source"], tuple(clip["span"])).small_frames
            return {"caption": captioner(small_frames[:: int(SAMPLED_FPS / CAPTION_FPS)])}
        except UnreadableMedia as error:
            return {"caption": None, "why": format_reason(error)}

    with ThreadPoolExecutor(CAPTION_CONCURRENCY) as pool:
        try:
            for done, (clip, record) in enumerate(
                zip(remaining, pool.map(caption_clip, remaining), strict=True), len(clips) - len(remaining) + 1
            ):
                journal.append_record(clip["clip"], record | {"stamp": clip["stamp"]})
                on_progress("captions", done, len(clips))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def is_captioned(clip: dict[str, Any], journal: Journal) -> bool:
    record = journal.records.get(clip["clip"], {})
    return record.get("stamp") == clip["stamp"] and record["caption"] is not None


def write_clips(
    client: Any, folder: Path, output_dir: Path, clips: list[dict[str, Any]], on_progress: PhaseProgressCallback
) -> list[dict[str, Any]]:
    """Write the files of the kept clips and return a line for each; a clip that cannot be written is dropped."""
    journal = Journal(output_dir / "written.jsonl")
    remaining = [clip for clip in clips if not is_written(output_dir, clip, journal)]
    for done, (clip, record) in enumerate(
        run_tasks(client, partial(write_clip_file, str(folder), str(output_dir)), remaining),
        len(clips) - len(remaining) + 1,
    ):
        journal.append_record(clip["clip"], record | {"stamp": clip["stamp"]})
        clip["dropped"] = record.get("dropped")
        on_progress("written", done, len(clips))
    journal.close()
    clips = [clip for clip in clips if not clip["dropped"]]
    for path in set((output_dir / "clips").glob("*")) - {
        output_dir / "clips" / f"{clip['clip']}.mp4" for clip in clips
    }:
        path.unlink()  # of a source that has changed since, or incomplete after a kill
    return [build_output_line(clip, journal.records[clip["clip"]]) for clip in clips]


def is_written(output_dir: Path, clip: dict[str, Any], journal: Journal) -> bool:
    is_unchanged = journal.records.get(clip["clip"], {}).get("stamp") == clip["stamp"]
    return is_unchanged and (output_dir / "clips" / f"{clip['clip']}.mp4").exists()


def build_output_line(clip: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    shape = {name: record[name] for name in ("width", "height", "fps", "frames")}
    source = {"source": clip["source"], "start": clip["span"][0], "stop": clip["span"][1]}
    return {"file": f"clips/{clip['clip']}.mp4", "caption": None} | shape | source | {"scores": clip["scores"]}
