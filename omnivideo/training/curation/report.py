"""The report: one self-contained HTML file with the kept and dropped clips, the stages and the reasons."""

import base64
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from omnivideo.training.curation.bounds import STAGES, UNREADABLE, CurationBounds
from omnivideo.training.curation.journal import write_atomically
from omnivideo.training.curation.pipeline import CurationResult

MAX_THUMBNAILS = 200  # per section; a page with a million clips would not open
STYLE = """
:root { color-scheme: light dark; --ink: #222; --dim: #667; --paper: #fafaf8; --card: #fff; --line: #ddd;
        --good: #177245; --bad: #a8321e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --dim: #99a; --paper: #16171a; --card: #202126;
        --line: #383a42; --good: #5fca95; --bad: #f08d78; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .25rem .9rem .25rem 0;
       border-bottom: 1px solid var(--line); text-align: left } .n { text-align: right } .dim { color: var(--dim) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: .8rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem; min-width: 0;
        overflow-wrap: anywhere; font-size: .86rem } .card img { width: 100%; height: auto; display: block;
        border-radius: 3px; margin-bottom: .4rem } .card p { margin: .15rem 0 }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
"""


def write_report(result: CurationResult, bounds: CurationBounds, output_dir: Path) -> Path:
    path = output_dir / "report.html"
    write_atomically(path, "".join(render_page(result, bounds, output_dir)))
    return path


def render_page(result: CurationResult, bounds: CurationBounds, output_dir: Path) -> Iterator[str]:
    files, clips = result.files.values(), result.clips.values()
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation</title><style>{STYLE}</style>'
    yield '<meta name="viewport" content="width=device-width">'
    seconds = sum(line["stop"] - line["start"] for line in result.kept_clips)
    scenes, sources = format_count(len(clips), "scene"), format_count(len(files), "file")
    yield f"<h1>{len(result.kept_clips)} clips kept of {scenes} in {sources}</h1>"
    yield f'<p class="dim">{seconds:.1f} s of video; a scene passes through the stages until one drops it.</p>'
    yield from render_stage_table(result, bounds)
    yield from render_dropped_files(result)
    for stage in (UNREADABLE, *STAGES):
        dropped = [clip for clip in clips if clip["dropped"] and clip["dropped"]["stage"] == stage]
        yield from render_section(f"Dropped: {stage}", dropped, output_dir)
    captions = {line["file"][6:-4]: line["caption"] for line in result.kept_clips}
    yield from render_section(
        "Kept", [clip | {"caption": captions[clip["clip"]]} for clip in clips if clip["clip"] in captions], output_dir
    )


def format_count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def render_stage_table(result: CurationResult, bounds: CurationBounds) -> Iterator[str]:
    """Yield a table of the scenes that each stage checked, dropped and could not measure."""
    records = [*result.files.values(), *result.clips.values()]
    yield "<h2>Stages</h2><table><tr><th>stage<th>measures<th>allowed<th class=n>checked<th class=n>dropped"
    for stage in STAGES.values():
        measured_records = [record for record in records if stage.name in record["scores"]]
        dropped = sum(
            bool(record["dropped"]) and record["dropped"]["stage"] == stage.name for record in measured_records
        )
        unmeasurable = sum(record["scores"][stage.name] is None for record in measured_records)
        note = (
            f' <span class="dim">({unmeasurable} not measurable: the camera is static)</span>' if unmeasurable else ""
        )
        if stage.name in result.missing_stages:
            note = f' <span class="bad">not checked: {escape(result.missing_stages[stage.name])}</span>'
        yield f"<tr><td><b>{stage.name}</b><td>{stage.description}{note}<td>{format_allowed_range(stage.name, bounds)}"
        yield f"<td class=n>{len(measured_records)}<td class=n>{dropped}"
    if "captions" in result.missing_stages:
        why = escape(result.missing_stages["captions"])
        yield f'<tr><td><b>captions</b><td><span class="bad">none: {why}</span><td><td><td>'
    if uncaptioned := sum(bool(clip.get("uncaptioned")) for clip in result.clips.values()):
        missing = format_count(uncaptioned, "clip")
        yield f'<tr><td><b>captions</b><td><span class="bad">{missing} without one</span><td><td><td>'
    yield "</table>"


def format_allowed_range(name: str, bounds: CurationBounds) -> str:
    if name == "duplicates":
        return f"more than {bounds.max_duplicate_distance:g} bits of 64"
    stage = STAGES[name]
    low, high = (getattr(bounds, field) if field else None for field in (stage.min_field, stage.max_field))
    return f"{low:g} {stage.unit} or more" if high is None else f"at most {high:g} {stage.unit}"


def render_dropped_files(result: CurationResult) -> Iterator[str]:
    """Yield a table of the files that were dropped before they were split into scenes."""
    dropped = [(name, file["dropped"]) for name, file in result.files.items() if file["dropped"]]
    if dropped:
        yield "<h2>Files dropped completely</h2><table><tr><th>file<th>stage<th>why"
    for name, why in dropped:
        yield f'<tr><td>{escape(name)}<td class="bad">{why["stage"]}<td>{escape(why["why"])}'
    if dropped:
        yield "</table>"


def render_section(title: str, clips: list[dict[str, Any]], output_dir: Path) -> Iterator[str]:
    if clips:
        limit_note = f", {MAX_THUMBNAILS} of them shown" if len(clips) > MAX_THUMBNAILS else ""
        yield f'<h2>{title} <span class="dim">({len(clips)}{limit_note})</span></h2><div class="cards">'
        yield from map(
            render_card, clips[:MAX_THUMBNAILS], (render_thumbnail(output_dir, clip["clip"]) for clip in clips)
        )
        yield "</div>"


def render_thumbnail(output_dir: Path, name: str) -> str:
    path = output_dir / "thumbs" / f"{name}.jpg"
    if not path.exists():
        return ""
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def render_card(clip: dict[str, Any], image: str) -> str:
    start, stop = clip["span"]
    lines = [f'<b>{escape(clip["source"])}</b> <span class="dim">{start:.2f} to {stop:.2f} s</span>']
    if why := clip["dropped"]:
        lines.append(f'<span class="bad">{why["stage"]}: {escape(why["why"])}</span>')
    if clip.get("words"):
        lines.append(f"reads: {escape(clip['words'])}")
    if clip.get("caption"):
        lines.append(f'<span class="good">{escape(clip["caption"])}</span>')
    if clip.get("uncaptioned"):
        lines.append(f'<span class="bad">no caption: {escape(clip["uncaptioned"])}</span>')
    lines.append(f'<span class="dim">{escape(", ".join(format_scores(clip["scores"].items())))}</span>')
    return f'<div class="card">{image}{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def format_scores(scores: Iterable[tuple[str, float | None]]) -> Iterator[str]:
    for name, value in scores:
        yield f"{name} {'not measurable' if value is None else format(value, '.4g')}"
