"""Stages 2b and 3 of any preset over shards: `omnivideo train stage2b --data SHARDS --weights FOLDER`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import SiglipVisionModel

from omnivideo.errors import InvalidInput
from omnivideo.models.checkpoint import load
from omnivideo.training.data.batches import Mix
from omnivideo.training.data.encode import Cache, Fit, digest_of, name_of
from omnivideo.training.data.rows import ShardSource
from omnivideo.training.data.shards import Library
from omnivideo.training.recipes.stages import SIZES, Whole, flow_recipe
from omnivideo.training.tiny import Tiny
from omnivideo.training.trainer import Recipe

EARLIER = {"stage2b_generation": "stage2a", "stage2b": "stage2b_generation", "stage3": "stage2b"}
EQ1, HIGH = 0.1, {"stage3": 0.9}  # as the tiny preset's
RATE = 1e-5


def makers_over(
    library: Library, fit: Fit, name: str, tiny: Tiny, weights: Path | None
) -> dict[str, Callable[[], Recipe]]:
    """The recipes that train over a library, whose cache has been made with the same weights.

    Raises InvalidInput for a recipe that has no cached data, and where weights are not named.
    """
    if name not in EARLIER:
        raise InvalidInput("recipe", f"{name!r} does not train over shards; allowed: {', '.join(EARLIER)}")
    if weights is None:
        raise InvalidInput("weights", "shards need a folder of weights to begin with")
    return {name: partial(recipe_over, library, fit, name, tiny, weights)}


def recipe_over(library: Library, fit: Fit, name: str, tiny: Tiny, weights: Path) -> Recipe:
    """A stage, from the earlier stage's run, else from the weights.  AdamW with a cosine; on a GPU in bf16."""
    omni = load(weights, tiny.device)
    if tiny.has_run(EARLIER[name]):
        state = torch.load(tiny.stage_file(EARLIER[name]), weights_only=True, map_location=tiny.device)
        Whole(omni).load_state_dict(state["model"] | state["average"])
    encoder = tiny.part(SiglipVisionModel, "visual_encoder") if name == "stage3" else None
    stills, clips = SIZES
    # A unit would move samples of a rare shape to another one, and their latents are made.
    mix = Mix(sizes={"image": stills * tiny.times, "video": clips * tiny.times}, unit=1)
    cache = Cache(library.shelf, digest_of(name_of(weights), fit))
    source = ShardSource(name, omni, library, cache, fit, mix, encoder)
    recipe = flow_recipe(
        name, omni, source, steps=20_000, lr=10 * RATE, eq1=EQ1 if encoder else 0.0, high=HIGH.get(name, 0.5),
        workers=tiny.workers,
    )  # fmt: skip
    precision = torch.bfloat16 if tiny.device.type == "cuda" else torch.float32
    return replace(recipe, optimizer="adamw", shape="cosine", precision=precision, data=source.order.digest())
