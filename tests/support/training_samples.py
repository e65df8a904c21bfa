"""Make small training samples of every task, and the media in them."""

import functools
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from omnivideo.training.data.sample import TrainingSample


def make_png(shade: int = 0, size: tuple[int, int] = (32, 16)) -> bytes:
    """Return a png of one colour; `size` is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 160)).save(file, "PNG")
    return file.getvalue()


@functools.cache
def make_mp4(count: int = 5, size: tuple[int, int] = (32, 32), fps: int = 8, index_first: bool = True) -> bytes:
    """Return a clip of noise; `index_first` puts the index before the frames, as browsers prefer."""
    rng, options = np.random.default_rng(count), {"movflags": "faststart"} if index_first else {}
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w", options=options) as container:
            stream = container.add_stream("libx264", rate=fps, width=size[0], height=size[1], pix_fmt="yuv420p")
            for _ in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(stream.encode())
        return file.read()


def make_samples() -> list[TrainingSample]:
    """Return a sample of every task."""
    turns = (("what is it?", "a ball"), ("which colour?", "red"))
    return [
        TrainingSample("image-understanding", source=make_png(1), turns=turns),
        TrainingSample("video-understanding", source=make_mp4(), turns=turns[:1]),
        TrainingSample("text-to-image", "a red ball — rot", target=make_png(2)),
        TrainingSample("text-to-video", "a red ball rolls", target=make_mp4(9)),
        TrainingSample("image-editing", "make it blue", make_png(3), make_png(4), caption="a blue ball"),
        TrainingSample("video-editing", "make it blue", make_mp4(6), make_mp4(7), origin="made"),
    ]


def drop_keys(samples: Iterable[TrainingSample]) -> list[dict[str, object]]:
    """Return the samples' fields without their keys, which depend on their place in a data set."""
    return [{name: value for name, value in vars(sample).items() if name != "key"} for sample in samples]


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by their path in the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
