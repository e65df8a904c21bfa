"""Files of users: small valid files in many formats, and the refusals of invalid ones."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from omnivideo.errors import UnreadableMedia
from omnivideo.media.ingest import ingest_media
from omnivideo.storage.objects.memory import MemoryObjectStore

NOISE = np.random.default_rng(0).integers(0, 256, (9, 64, 48, 3), np.uint8)


def encode_still(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(NOISE[0]).save(out, kind)
    return out.getvalue()


def encode_animation(kind: str) -> bytes:
    out = io.BytesIO()
    images = [Image.fromarray(pixels) for pixels in NOISE]
    images[0].save(out, kind, save_all=True, append_images=images[1:], duration=100)
    return out.getvalue()


def encode_clip(
    kind: str = "mp4", codec: str = "libx264", *, times=range(9), unit=Fraction(1, 8), streams: int = 1
) -> bytes:
    """Return a clip with frames at `times`, in units of `unit` seconds."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        video_streams = []
        for _ in range(streams):
            stream = container.add_stream(codec, rate=8)
            stream.height, stream.width, stream.pix_fmt = *NOISE.shape[1:3], "yuv420p"
            stream.codec_context.time_base, stream.codec_context.max_b_frames = unit, 0
            video_streams.append(stream)
        for index, time in enumerate(times):
            for stream in video_streams:
                frame = av.VideoFrame.from_ndarray(NOISE[index % 9], format="rgb24")
                frame.pts, frame.time_base = time, unit
                container.mux(stream.encode(frame))
        for stream in video_streams:
            container.mux(stream.encode())
    return out.getvalue()


def ingest_refusal(data: bytes, name: str = "clip.mp4", **options: object) -> str:
    """Return the text of the refusal; check that it is one line that names the field, and that nothing is stored."""
    store = MemoryObjectStore()
    with pytest.raises(UnreadableMedia) as caught:
        ingest_media(store, data, "user", name, **options)
    text = str(caught.value)
    assert not store.objects and caught.value.field == "source"
    assert text.startswith("source: ") and "\n" not in text and "0x" not in text and "/proc" not in text
    return text
