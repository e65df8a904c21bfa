"""Print what each preset generates and delivers for the sizes and lengths that clients ask for, as Markdown.

    python -m benchmarks.delivered_shapes

The table of docs/service.md is this output; tests/api/test_shapes.py compares them, and checks the files of tiny.
"""

from typing import Any

from omnivideo.contracts import resolve_sampling_params
from omnivideo.errors import InvalidInput
from omnivideo.presets import PRESETS, Preset, Task

REQUESTS: tuple[tuple[Task, dict[str, Any]], ...] = (
    ("text-to-video", {}),
    ("text-to-video", {"seconds": 4}),
    ("text-to-video", {"seconds": 8}),
    ("text-to-video", {"seconds": 12}),
    ("text-to-video", {"seconds": 60}),
    ("text-to-video", {"seconds": 1, "fps": 8}),
    ("text-to-video", {"seconds": 4, "frames": 9}),
    ("text-to-video", {"frames": 5}),
    ("text-to-video", {"frames": 33}),
    ("text-to-video", {"width": 640, "height": 360}),
    ("text-to-video", {"width": 1280, "height": 720}),
    ("text-to-video", {"width": 720, "height": 1280}),
    ("video-editing", {}),
    ("text-to-image", {}),
    ("text-to-image", {"width": 1024, "height": 1024}),
    ("text-to-image", {"width": 1536, "height": 1024}),
    ("image-editing", {}),
)
FIELD_NAMES = {"frames": "num_frames"}


def describe_request(overrides: dict[str, Any]) -> str:
    """Return a request's size and length in the words of the API."""
    fields = {FIELD_NAMES.get(name, name): value for name, value in overrides.items()}
    if "width" in fields:
        fields = {"size": f"{fields.pop('width')}x{fields.pop('height')}"} | fields
    return ", ".join(f"{name} {value}" for name, value in fields.items()) or "nothing"


def describe_shapes(preset: Preset, task: Task, overrides: dict[str, Any]) -> tuple[str, str]:
    """Return what is generated and what is delivered, or why the request is refused."""
    try:
        params = resolve_sampling_params(preset, task, **overrides)
    except InvalidInput as error:
        return "refused", str(error).replace("frames:", "num_frames:", 1)
    file = params.delivered_shape
    if params.frames == 1:
        return f"{params.width}x{params.height}", f"{file.width}x{file.height}"
    length = f"{file.frames} frames at {params.fps:g} fps, {file.frames / params.fps:.4g} s"
    return f"{params.width}x{params.height}x{params.frames}", f"{file.width}x{file.height}, {length}"


def build_table() -> str:
    """Return the table; presets with the same rows share them."""
    presets_by_rows: dict[tuple[str, ...], list[str]] = {}
    for preset in PRESETS.values():
        rows = tuple(
            f"{task} | {describe_request(overrides)} | {' | '.join(describe_shapes(preset, task, overrides))} |"
            for task, overrides in REQUESTS
            if task in preset.sampling
        )
        presets_by_rows.setdefault(rows, []).append(preset.name)
    lines = ["| preset | task | requested | generated | delivered |", "|---|---|---|---|---|"]
    for rows, names in presets_by_rows.items():
        lines += [f"| {', '.join(names)} | {row}" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    print(build_table())
