"""The consumers of a user's clip hold the frames that they use, at the size at which they use them, and no others.

Each case runs in a process of its own, whose peak memory is measured above that of the imports.
"""

import io
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

MAX_MEGABYTES = 250  # both files have over 550 MB of pixels
MEASURE = """
import gc, re, sys
from pathlib import Path
import omnivideo.media.read, omnivideo.media.thumbnails
{setup}
gc.disable()  # a frame that only the garbage collector frees may stay for long
data = Path(sys.argv[1]).read_bytes()
read_peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = read_peak()
{consume}
print((read_peak() - before) // 1024)
"""
SETUP_MLLM = """
from omnivideo.backends.mllm.media import read_mllm_media
from omnivideo.presets import get_preset
from omnivideo.models.mllm import QwenVisualInput
inputs = [QwenVisualInput(get_preset("tiny").mllm.vision_input)]
"""
CONSUMERS = {
    "thumbnail": ("", "omnivideo.media.thumbnails.draw_picture(data, 'thumbnail')"),
    "spritesheet": ("", "omnivideo.media.thumbnails.draw_picture(data, 'spritesheet')"),
    "animation": ("", "omnivideo.media.thumbnails.draw_picture(data, 'animation')"),
    "renderer": ("", "omnivideo.media.read.read_fitted_media(data, 256, 256, 33, 16)"),
    "mllm": (SETUP_MLLM, "read_mllm_media(data, inputs)"),
    "measuring": ("", "omnivideo.media.read.measure_media(data)"),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory) -> dict[str, Path]:
    """Return files of some kilobytes with half a gigabyte of pixels."""
    folder = tmp_path_factory.mktemp("bombs")
    with av.open(str(folder / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((720, 1280, 3), 128, np.uint8), format="rgb24")
        for _ in range(200):
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    images = [Image.new("P", (4000, 2300), index % 2) for index in range(20)]
    for image in images:
        image.putpalette([0, 0, 0, 255, 255, 255])
    images[0].save(folder / "a.gif", save_all=True, append_images=images[1:], duration=100)
    return {"mp4": folder / "a.mp4", "gif": folder / "a.gif"}


@pytest.mark.parametrize("kind", ["mp4", "gif"])
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_small_file_with_many_pixels_takes_little_memory(bombs, kind, consumer):
    setup, consume = CONSUMERS[consumer]
    program = MEASURE.format(setup=setup, consume=consume)
    done = subprocess.run(
        [sys.executable, "-c", program, str(bombs[kind])], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    print(kind, consumer, done.stdout.strip(), "MB")
    assert int(done.stdout) < MAX_MEGABYTES


def test_a_gif_is_refused_before_it_is_decoded(bombs, monkeypatch):
    """The pixels of all its frames are counted from its blocks; 20 frames of 4,000 x 2,300 are 552 MB."""
    from omnivideo.errors import UnreadableMedia
    from omnivideo.media.limits import MediaLimits
    from omnivideo.media.read import measure_media

    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(UnreadableMedia, match="has 552000000 bytes of pixels; allowed: 1 to 500000000"):
        measure_media(bombs["gif"], MediaLimits(max_decoded_bytes=500_000_000))


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
def test_the_language_model_gets_the_patches_of_the_whole_clip(bombs, kind, preset):
    """A model with several visual inputs gets those of each, from one decoding."""
    from omnivideo.backends.mllm.media import read_mllm_media
    from omnivideo.media.read import read_media
    from omnivideo.models.mllm import MLLMMedia, QwenVisualInput, encode_media
    from omnivideo.models.qwen3_vl import list_visual_inputs
    from omnivideo.presets import get_preset

    config = get_preset(preset).mllm
    assert len(list_visual_inputs(config)) == (1 if preset == "tiny" else 3)
    media = read_media(bombs[kind])
    found_media = read_mllm_media(bombs[kind], list_visual_inputs(config))
    for visual_input in list_visual_inputs(config):
        assert isinstance(visual_input, QwenVisualInput)
        text, patches, grid = encode_media(MLLMMedia(media.frames, media.fps or 1.0), visual_input.config)
        found_text, found_patches, found_grid = encode_media(found_media, visual_input.config)
        assert (found_text, found_grid) == (text, grid) and (found_patches == patches).all()


@pytest.mark.parametrize("kind", ["mp4", "gif"])
@pytest.mark.parametrize("mode", ["pad", "resize"])
def test_vila_gets_the_pixels_of_the_whole_clip(bombs, kind, mode):
    from omnivideo.backends.mllm.media import read_mllm_media
    from omnivideo.media.read import read_media
    from omnivideo.models.mllm import MLLMMedia, fit_frames
    from omnivideo.models.vila_requests import VilaImageConfig, VilaVisualInput

    vila_input = VilaVisualInput(VilaImageConfig(48, 64, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3, mode))
    media = read_media(bombs[kind])
    indices, frames = fit_frames(MLLMMedia(media.frames, media.fps or 1.0), vila_input)
    found_indices, found_frames = fit_frames(read_mllm_media(bombs[kind], [vila_input]), vila_input)
    assert found_indices == indices and len(indices) == 8 and (np.stack(found_frames) == np.stack(frames)).all()
