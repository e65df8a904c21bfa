"""The stages over a folder: survey every file, measure every scene, drop the duplicates, caption, write.

Dask runs the tasks, on this machine's cores or on a cluster (whose machines see both folders under the same path).
Each result is in a journal before it counts, so a run that was killed goes on after the last one, to the same result.
"""

import hashlib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omnivideo.contracts import Message
from omnivideo.errors import InvalidInput, OmniVideoError, StoreError, UnreadableMedia
from omnivideo.training.curation import measures
from omnivideo.training.curation.bounds import STAGES, UNREADABLE, Bounds
from omnivideo.training.curation.captions import SHOWN_FPS, Caption
from omnivideo.training.curation.journal import Journal, write_whole
from omnivideo.training.curation.reading import (
    SAMPLED_FPS,
    SUFFIXES,
    Sampled,
    header,
    needed,
    sample,
    survey,
    write_clip,
)

AHEAD = 4  # tasks given out for each worker: enough to keep them busy, few enough to stop at once
SHOWN = 3  # frames of a thumbnail
THUMB = 220  # px, the longer side of each
ASKING = 8  # captions asked for at a time: the server batches them

Tell = Callable[[str, int, int], None]  # phase, done, of


class Settings(Message):
    """All that the result hangs on; a folder takes up only a run of the same."""

    bounds: Bounds = Bounds()
    ocr: bool = True
    aesthetic: str | None = None


@dataclass
class Curated:
    """What a run came to: records of files and clips, those that were kept, and stages that could not be asked."""

    files: dict[str, dict]
    clips: dict[str, dict]
    kept: list[dict]
    absent: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- one task each


def survey_file(folder: str, name: str, bounds: Bounds) -> dict:
    """A file's record: its size and scenes, or why it is dropped."""
    path = Path(folder) / name
    width, height = header(path)
    record: dict = {"width": width, "height": height, "scores": {}}
    short, long = sorted((width, height))
    for stage, value in (("resolution", short), ("aspect", round(long / short, 4))):
        record["scores"][stage] = value
        if dropped := STAGES[stage].dropped(bounds, value):
            return record | {"dropped": dropped}
    return record | asdict(survey(path, bounds.max_seconds)) | {"dropped": None}


def measure_clip(folder: str, out: str, clip: dict, settings: Settings) -> dict:
    """A clip's record with a figure for each stage up to the one that drops it."""
    path, span = Path(folder) / clip["source"], clip["span"]
    record = clip | {"scores": {"length": round(span[1] - span[0], 4)}, "words": "", "hashes": [], "dropped": None}
    shown = sample(path, span)
    thumbnail(shown, Path(out) / "thumbs" / f"{clip['clip']}.jpg")
    for stage, value in figures(shown, settings, record):
        record["scores"][stage] = None if value is None else round(float(value), 5)
        if value is not None and (dropped := STAGES[stage].dropped(settings.bounds, value)):
            return record | {"dropped": dropped | ({"words": record["words"]} if stage == "text" else {})}
    return record | {"hashes": measures.hashes(shown.looks)}


def figures(shown: Sampled, settings: Settings, record: dict) -> Iterator[tuple[str, float | None]]:
    """Stage by stage, so that what is dropped early costs little."""
    yield "length", record["scores"]["length"]
    yield "bars", measures.bars(shown.looks)
    moved = measures.motion(shown.small)
    yield "motion", moved.fastest
    yield "shake", moved.shake
    yield "overlay", measures.overlay(shown.looks, moved.travel)
    if settings.ocr:
        share, record["words"] = measures.text(shown.looks)
        yield "text", share
    if settings.aesthetic:
        from omnivideo.training.curation.aesthetic import score

        yield "aesthetic", score(settings.aesthetic, shown.looks)


def thumbnail(shown: Sampled, path: Path) -> None:
    """A few frames side by side."""
    chosen = shown.looks[:: max(1, len(shown.looks) // SHOWN)][:SHOWN]
    strip = np.concatenate([measures.shrunk(look, THUMB) for look in chosen], axis=1)
    Image.fromarray(strip).save(path, quality=72)


def write_kept(folder: str, out: str, clip: dict) -> dict:
    return write_clip(Path(folder) / clip["source"], clip["span"], Path(out) / "clips" / f"{clip['clip']}.mp4")


def attempted(task: Callable[[dict], dict], item: dict) -> dict:
    """The task's record; what goes wrong with one file or clip is its reason, what would with all is raised."""
    try:
        return task(item)
    except InvalidInput as error:
        return unreadable(reason(error))
    except (OmniVideoError, ImportError):
        raise
    except Exception as error:  # decoders and OpenCV raise whatever they like on odd pixels
        if isinstance(error, OSError) and error.strerror:  # a source's own is UnreadableMedia by now
            raise StoreError(f"the output folder cannot be written: {error.strerror}") from None
        said = " ".join(word for word in str(error).split() if not set(word) & set("/\\"))  # no path
        return unreadable(f"cannot be used ({type(error).__name__}: {said[:200]}); allowed: a whole file")


def unreadable(why: str) -> dict:
    return {"scores": {}, "dropped": {"stage": UNREADABLE, "value": None, "why": why}}


def reason(error: InvalidInput) -> str:
    return str(error).removeprefix(f"{error.field}: ")


# ---------------------------------------------------------------- all of them


@contextmanager
def workers(count: int, address: str | None) -> Iterator[Any]:
    """Dask's client: of a cluster, or of `count` processes here that end with this one."""
    distributed = needed("distributed", "dask[distributed]")
    with deaf():
        cluster = nullcontext(address) if address else distributed.LocalCluster(
            n_workers=count, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0, silence_logs=40
        )  # fmt: skip
    with cluster as where, distributed.Client(where) as client:
        yield client


@contextmanager
def deaf() -> Iterator[None]:
    """Processes begun in here do not hear Ctrl-C, which a terminal sends to all: this one ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def spread(client: Any, task: Callable, items: Iterable[dict]) -> Iterator[tuple[dict, dict]]:
    """Items with their records, as they are done; one that fails, or takes its worker down, is said as unreadable."""
    distributed = needed("distributed", "dask[distributed]")
    left = iter(items)
    running: dict[Any, dict] = {}
    room = AHEAD * max(1, len(client.scheduler_info()["workers"]))
    try:
        while True:
            for item in islice(left, room - len(running)):
                running[client.submit(attempted, task, item, pure=False)] = item
            if not running:
                return
            done = distributed.wait(list(running), return_when="FIRST_COMPLETED").done
            for future in done:
                yield running.pop(future), result_of(future, distributed)
    finally:
        client.cancel(list(running))


def result_of(future: Any, distributed: Any) -> dict:
    try:
        return future.result()
    except distributed.KilledWorker:
        return unreadable("took the decoder down; allowed: a whole file")


def curate(
    folder: Path, out: Path, settings: Settings, caption: Caption | None = None, *,
    count: int = 1, cluster: str | None = None, tell: Tell = lambda phase, done, of: None,
) -> Curated:  # fmt: skip
    """Kept clips in `out`/clips and their lines in `out`/clips.jsonl; what a run before did stays."""
    names, absent = sources(folder, out), without(settings, caption)
    settings = settings.model_copy(update={"ocr": settings.ocr and "text" not in absent})
    prepare(out, settings)
    with ExitStack() as held:
        files, clips, captions = (
            held.enter_context(closing(Journal(out / f"{name}.jsonl"))) for name in ("files", "measured", "captions")
        )
        client = held.enter_context(workers(count, cluster))
        survey_all(client, folder, names, settings.bounds, files, tell)
        wanted = [clip for name in names for clip in clips_of(name, files.records[name])]
        measure_all(client, folder, out, wanted, settings, clips, tell)
        found = {clip["clip"]: dict(clips.records[clip["clip"]]) for clip in wanted}
        kept = without_duplicates(found, files.records, settings.bounds, tell)
        if caption:
            caption_all(folder, kept, caption, captions, tell)
        lines = write_all(client, folder, out, kept, tell)
    for line in lines:
        name = line["file"][6:-4]
        said = captions.records.get(name, {})
        line["caption"], found[name]["uncaptioned"] = said.get("caption"), said.get("why")
    write_whole(out / "clips.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return Curated({name: files.records[name] for name in names}, found, lines, absent)


def sources(folder: Path, out: Path) -> list[str]:
    """The videos under the folder, by their path in it."""
    if not folder.is_dir():
        raise InvalidInput("folder", "there is no such folder; allowed: a folder of videos")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = [path.relative_to(folder).as_posix() for path in found if out.resolve() not in path.resolve().parents]
    if not names:
        raise InvalidInput("folder", f"no video is in it; allowed: {', '.join(SUFFIXES)}")
    return names


def without(settings: Settings, caption: Caption | None) -> dict[str, str]:
    """The stages that are not asked, and what would bring them."""
    absent = {}
    try:
        if settings.ocr:
            needed("rapidocr_onnxruntime")
        else:
            absent["text"] = "switched off (--no-ocr)"
    except OmniVideoError:
        absent["text"] = "not installed: pip install rapidocr-onnxruntime"
    if not settings.aesthetic:
        absent["aesthetic"] = "no model given: --aesthetic FOLDER"
    if caption is None:
        absent["captions"] = "no language model given: --captions URL"
    return absent


def prepare(out: Path, settings: Settings) -> None:
    """The folder's parts; a run with other settings is refused, since its records would be mixed with ours."""
    try:
        for part in ("clips", "thumbs"):
            (out / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput("output", f"the folder cannot be made: {error.strerror}") from None
    file, text = out / "settings.json", settings.model_dump_json(indent=1)
    if file.exists() and file.read_text() != text:
        raise InvalidInput("output", "it holds a run with other settings (settings.json); use another folder")
    write_whole(file, text)


def stamp(path: Path) -> list[int]:
    """A file that changes between two runs is taken for another one."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def survey_all(client: Any, folder: Path, names: list[str], bounds: Bounds, files: Journal, tell: Tell) -> None:
    stamps = {name: stamp(folder / name) for name in names}
    left = [{"name": name} for name in names if files.records.get(name, {}).get("stamp") != stamps[name]]
    task = partial(on_name, str(folder), bounds)
    for done, (item, record) in enumerate(spread(client, task, left), len(names) - len(left) + 1):
        files.put(item["name"], record | {"stamp": stamps[item["name"]]})
        tell("files", done, len(names))


def on_name(folder: str, bounds: Bounds, item: dict) -> dict:
    return survey_file(folder, item["name"], bounds)


def clips_of(name: str, file: dict) -> list[dict]:
    """A surveyed file's scenes, each under a name that says where it comes from and is nobody else's."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-")[:40]
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return [
        {"clip": f"{plain}-{mark}-{at:04d}", "source": name, "span": list(span), "stamp": file["stamp"]}
        for at, span in enumerate(file.get("spans", ()))
    ]


def measure_all(
    client: Any, folder: Path, out: Path, wanted: list[dict], settings: Settings, clips: Journal, tell: Tell
) -> None:
    left = [clip for clip in wanted if clips.records.get(clip["clip"], {}).get("stamp") != clip["stamp"]]
    task = partial(on_clip, str(folder), str(out), settings)
    for done, (clip, record) in enumerate(spread(client, task, left), len(wanted) - len(left) + 1):
        clips.put(clip["clip"], clip | record)
        tell("clips", done, len(wanted))


def on_clip(folder: str, out: str, settings: Settings, clip: dict) -> dict:
    return measure_clip(folder, out, clip, settings)


def without_duplicates(found: dict[str, dict], files: dict[str, dict], bounds: Bounds, tell: Tell) -> list[dict]:
    """Those that no stage dropped and no better one is like; the others' records say which one they are like.

    Better is: more pixels, then more bytes a second, then the name.
    """

    def rank(clip: dict) -> tuple:
        file = files[clip["source"]]
        return (-file["width"] * file["height"], -file["stamp"][0] / file["seconds"], clip["clip"])

    passed = sorted((clip for clip in found.values() if not clip["dropped"]), key=rank)
    kept: list[dict] = []
    table = np.zeros((len(passed), widest(passed)), dtype=np.uint64)
    for done, clip in enumerate(passed, 1):
        mine = np.array(clip["hashes"], dtype=np.uint64)
        away = measures.distances(mine, table[: len(kept)]) if kept else np.array([64.0])
        nearest = int(away.argmin())
        clip["scores"]["duplicates"] = round(float(away[nearest]), 3)
        if away[nearest] <= bounds.max_alike:
            twin = kept[nearest]["clip"]
            why = f"{away[nearest]:.3g} bits of 64 from {twin}; allowed: more than {bounds.max_alike:g}"
            clip["dropped"] = {"stage": "duplicates", "value": float(away[nearest]), "why": why, "like": twin}
        else:
            table[len(kept)] = np.resize(mine, table.shape[1])
            kept.append(clip)
        tell("duplicates", done, len(passed))
    return sorted(kept, key=lambda clip: (clip["source"], clip["span"]))


def widest(passed: list[dict]) -> int:
    return max((len(clip["hashes"]) for clip in passed), default=1)


def caption_all(folder: Path, kept: list[dict], caption: Caption, captions: Journal, tell: Tell) -> None:
    """Those that have none yet; one that was refused is asked for again by the next run: the server may be another."""
    left = [clip for clip in kept if not is_captioned(clip, captions)]

    def asked(clip: dict) -> dict:
        try:
            small = sample(folder / clip["source"], tuple(clip["span"])).small
            return {"caption": caption(small[:: int(SAMPLED_FPS / SHOWN_FPS)])}
        except UnreadableMedia as error:
            return {"caption": None, "why": reason(error)}

    with ThreadPoolExecutor(ASKING) as pool:
        try:
            for done, (clip, said) in enumerate(
                zip(left, pool.map(asked, left), strict=True), len(kept) - len(left) + 1
            ):
                captions.put(clip["clip"], said | {"stamp": clip["stamp"]})
                tell("captions", done, len(kept))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def is_captioned(clip: dict, captions: Journal) -> bool:
    said = captions.records.get(clip["clip"], {})
    return said.get("stamp") == clip["stamp"] and said["caption"] is not None


def write_all(client: Any, folder: Path, out: Path, kept: list[dict], tell: Tell) -> list[dict]:
    """The kept clips' files, and a line for each; one whose file cannot be written is dropped."""
    written = Journal(out / "written.jsonl")
    left = [clip for clip in kept if not is_written(out, clip, written)]
    for done, (clip, made) in enumerate(
        spread(client, partial(write_kept, str(folder), str(out)), left), len(kept) - len(left) + 1
    ):
        written.put(clip["clip"], made | {"stamp": clip["stamp"]})
        clip["dropped"] = made.get("dropped")
        tell("written", done, len(kept))
    written.close()
    kept = [clip for clip in kept if not clip["dropped"]]
    for path in set((out / "clips").glob("*")) - {out / "clips" / f"{clip['clip']}.mp4" for clip in kept}:
        path.unlink()  # of a file that has changed since, or cut by a kill
    return [line_of(clip, written.records[clip["clip"]]) for clip in kept]


def is_written(out: Path, clip: dict, written: Journal) -> bool:
    same = written.records.get(clip["clip"], {}).get("stamp") == clip["stamp"]
    return same and (out / "clips" / f"{clip['clip']}.mp4").exists()


def line_of(clip: dict, made: dict) -> dict:
    shape = {name: made[name] for name in ("width", "height", "fps", "frames")}
    source = {"source": clip["source"], "start": clip["span"][0], "stop": clip["span"][1]}
    return {"file": f"clips/{clip['clip']}.mp4", "caption": None} | shape | source | {"scores": clip["scores"]}
