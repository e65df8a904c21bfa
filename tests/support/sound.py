"""Make clips with sound."""

import io

import av
import numpy as np

RATE, FPS = 48_000, 8


def encode_with_sound(kind: str, video_codec: str, sound_codec: str, seconds: float = 2) -> bytes:
    """Return a clip with a tone in its first second and silence after it."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        video = container.add_stream(video_codec, rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream(sound_codec, rate=RATE, layout="mono")
        for index in range(round(seconds * FPS)):
            pixels = np.full((48, 64, 3), 40 + index, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        times = np.arange(round(RATE * seconds)) / RATE
        wave = (np.sin(2 * np.pi * 440 * times) * (times < 1) / 2).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        size = sound.codec_context.frame_size or 1024
        resampler = av.AudioResampler(sound.codec_context.format, "mono", RATE, frame_size=size)
        for piece in resampler.resample(frame) + resampler.resample(None):
            container.mux(sound.encode(piece))
        container.mux(sound.encode())
    return out.getvalue()
