"""The consumers of a user's clip hold the frames that they use, at the size at which they use them, and no others.

Each consumer runs in a child of one process that has imported everything; its peak memory is measured above that.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from omnivideo.contracts import Artifact
from omnivideo.media.cache import ByteBoundedCache
from omnivideo.media.ingest import ingest_media
from omnivideo.media.thumbnails import create_picture_renderer
from omnivideo.storage.objects.memory import MemoryObjectStore

MAX_MEGABYTES = 150  # both files have over 220 MB of pixels
MEASURE = """
import gc, json, os, re, sys
from pathlib import Path
import omnivideo.media.read, omnivideo.media.thumbnails
from omnivideo.backends.mllm.media import read_mllm_media
from omnivideo.models.mllm import QwenVisualInput
from omnivideo.presets import get_preset
inputs = [QwenVisualInput(get_preset("tiny").mllm.vision_input)]
gc.disable()  # a frame that only the garbage collector frees may stay for long
data = Path(sys.argv[1]).read_bytes()
read_peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for name, consume in json.loads(sys.argv[2]).items():
    if (child := os.fork()) == 0:
        before = read_peak()
        eval(consume)
        print(name, (read_peak() - before) // 1024, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
CONSUMERS = {
    "thumbnail": "omnivideo.media.thumbnails.draw_picture(data, 'thumbnail')",
    "spritesheet": "omnivideo.media.thumbnails.draw_picture(data, 'spritesheet')",
    "animation": "omnivideo.media.thumbnails.draw_picture(data, 'animation')",
    "renderer": "omnivideo.media.read.read_fitted_media(data, 256, 256, 33, 16)",
    "mllm": "read_mllm_media(data, inputs)",
    "measuring": "omnivideo.media.read.measure_media(data)",
}


def write_clip(path: Path, width: int, height: int, frames: int) -> Path:
    """Write a video of frames that become brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            pixels = np.full((height, width, 3), 255 * index // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_gif(path: Path, width: int, height: int, frames: int) -> Path:
    """Write an animation whose frames are black and white in turn."""
    images = [Image.new("P", (width, height), index % 2) for index in range(frames)]
    for image in images:
        image.putpalette([0, 0, 0, 255, 255, 255])
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    return path


@pytest.fixture(scope="module")
def bombs(tmp_path_factory) -> dict[str, Path]:
    """Return files of some kilobytes with over 220 MB of pixels."""
    folder = tmp_path_factory.mktemp("bombs")
    return {
        "mp4": write_clip(folder / "a.mp4", 1280, 720, 80),
        "gif": write_gif(folder / "a.gif", 2000, 1150, 35),
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {"mp4": write_clip(folder / "a.mp4", 320, 180, 60), "gif": write_gif(folder / "a.gif", 400, 230, 20)}


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_a_small_file_with_many_pixels_takes_little_memory(bombs, kind):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(bombs[kind]), json.dumps(CONSUMERS)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    print(kind, done.stdout)
    megabytes = {name: int(peak) for name, peak in map(str.split, done.stdout.splitlines())}
    assert megabytes.keys() == CONSUMERS.keys()
    assert max(megabytes.values()) < MAX_MEGABYTES, megabytes


def test_a_gif_is_refused_before_it_is_decoded(bombs, monkeypatch):
    """The pixels of all its frames are counted from its blocks; 35 frames of 2,000 x 1,150 are 241.5 MB."""
    from omnivideo.errors import UnreadableMedia
    from omnivideo.media.limits import MediaLimits
    from omnivideo.media.read import measure_media

    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(UnreadableMedia, match="has 241500000 bytes of pixels; allowed: 1 to 200000000"):
        measure_media(bombs["gif"], MediaLimits(max_decoded_bytes=200_000_000))


def test_pictures_show_the_middle_and_sixteen_evenly_spaced_frames():
    store = MemoryObjectStore()
    out = io.BytesIO()
    images = [Image.new("RGB", (40, 20), (index * 8, 0, 0)) for index in range(32)]
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=100)
    render = create_picture_renderer(store)
    artifact: Artifact = ingest_media(store, out.getvalue(), "user")
    data, suffix = render(artifact, "thumbnail")
    middle = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert suffix == "webp" and middle.shape == (20, 40, 3) and abs(int(middle[10, 20, 0]) - 128) <= 4
    data, suffix = render(artifact, "spritesheet")
    sheet = np.asarray(Image.open(io.BytesIO(data)))
    shown = sheet[10::20, 20::40, 0].astype(int).ravel()
    assert suffix == "jpg" and np.abs(shown - np.linspace(0, 31, 16).round() * 8).max() <= 6


def test_a_cache_is_bounded_by_bytes():
    cache = ByteBoundedCache[str, bytes](100, len)
    computed = []

    def get(key: str, size: int) -> bytes:
        def compute() -> bytes:
            computed.append(key)
            return bytes(size)

        return cache.get_or_compute(key, compute)

    for key in "aabac":
        get(key, 40)
    assert computed == ["a", "b", "c"] and list(cache.values) == ["a", "c"] and cache.held_bytes == 80
    assert len(get("large", 1000)) == 1000 and cache.held_bytes <= 100


@pytest.mark.parametrize("kind", ["mp4", "gif"])
@pytest.mark.parametrize("preset", ["tiny", "omnivideo2-a14b"])
def test_the_language_model_gets_the_patches_of_the_whole_clip(clips, kind, preset):
    """A model with several visual inputs gets those of each, from one decoding."""
    from omnivideo.backends.mllm.media import read_mllm_media
    from omnivideo.media.read import read_media
    from omnivideo.models.mllm import MLLMMedia, QwenVisualInput, encode_media
    from omnivideo.models.qwen3_vl import list_visual_inputs
    from omnivideo.presets import get_preset

    config = get_preset(preset).mllm
    assert len(list_visual_inputs(config)) == (1 if preset == "tiny" else 3)
    media = read_media(clips[kind])
    found_media = read_mllm_media(clips[kind], list_visual_inputs(config))
    for visual_input in list_visual_inputs(config):
        assert isinstance(visual_input, QwenVisualInput)
        text, patches, grid = encode_media(MLLMMedia(media.frames, media.fps or 1.0), visual_input.config)
        found_text, found_patches, found_grid = encode_media(found_media, visual_input.config)
        assert (found_text, found_grid) == (text, grid) and (found_patches == patches).all()


@pytest.mark.parametrize("kind", ["mp4", "gif"])
@pytest.mark.parametrize("mode", ["pad", "resize"])
def test_vila_gets_the_pixels_of_the_whole_clip(clips, kind, mode):
    from omnivideo.backends.mllm.media import read_mllm_media
    from omnivideo.media.read import read_media
    from omnivideo.models.mllm import MLLMMedia, fit_frames
    from omnivideo.models.vila_requests import VilaImageConfig, VilaVisualInput

    vila_input = VilaVisualInput(VilaImageConfig(48, 64, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3, mode))
    media = read_media(clips[kind])
    indices, frames = fit_frames(MLLMMedia(media.frames, media.fps or 1.0), vila_input)
    found_indices, found_frames = fit_frames(read_mllm_media(clips[kind], [vila_input]), vila_input)
    assert found_indices == indices and len(indices) == 8 and (np.stack(found_frames) == np.stack(frames)).all()
