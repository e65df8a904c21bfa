"""Measure how well the tiny preset's language model describes one shape in pictures of several sizes.

    python -m benchmarks.picture_sizes

Each picture shows one centred shape; its description counts if it names that shape and its colour and nothing else.
"""

import numpy as np
from PIL import Image, ImageDraw

from omnivideo.models.device import pick_device
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.shipped import find_shipped_weights
from omnivideo.synthetic.rendering import compute_outline
from omnivideo.synthetic.scenes import BACKGROUNDS, COLOURS, SHAPES

SIZES = ((64, 64), (640, 480), (480, 640), (1080, 2340), (1920, 1080))
NOUNS = {
    "circle": {"circle", "ball", "disc", "dot"},
    "square": {"square", "box", "block"},
    "triangle": {"triangle"},
    "star": {"star"},
}
OTHER_OBJECTS = {"two", "three", "four", "and"}
VARIANTS = (("white", 13 / 64), ("black", 7 / 64), ("grey", 13 / 64))  # background, radius by the shorter side
SUPERSAMPLING = 3


def draw_shape(shape: str, colour: str, background: str, size: tuple[int, int], radius: float) -> np.ndarray:
    """Return a picture [H, W, 3] with one shape in its middle."""
    width, height = size
    pixels = radius * min(size) * SUPERSAMPLING
    centre_x, centre_y = width * SUPERSAMPLING / 2, height * SUPERSAMPLING / 2
    picture = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), BACKGROUNDS[background])
    canvas = ImageDraw.Draw(picture)
    if shape == "circle":
        canvas.ellipse([centre_x - pixels, centre_y - pixels, centre_x + pixels, centre_y + pixels], COLOURS[colour])
    else:
        corners = compute_outline(shape, pixels)
        canvas.polygon([(centre_x + x, centre_y + y) for x, y in corners], COLOURS[colour])
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))


def is_correct(description: str, shape: str, colour: str) -> bool:
    words = set(description.replace(",", " ").split())
    named = [name for name, nouns in NOUNS.items() if words & nouns]
    return named == [shape] and colour in words and not words & OTHER_OBJECTS


def main() -> None:
    omni = checkpoint.load(find_shipped_weights("tiny"), pick_device("cpu"), "preset")
    for size in SIZES:
        outcomes = []
        for shape in SHAPES:
            for colour in ("red", "blue", "yellow", "green"):
                for background, radius in VARIANTS:
                    picture = draw_shape(shape, colour, background, size, radius)
                    message = MLLMMessage("describe the picture", (MLLMMedia(picture[None], 1.0, False),))
                    answer = "".join(omni.bound_mllm.stream_text(message, temperature=0.0, max_tokens=40))
                    outcomes.append(is_correct(answer, shape, colour))
        print(f"{size[0]}x{size[1]}: {sum(outcomes)} of {len(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
