"""The stages of any preset over shards: `omnivideo train stage2b --data SHARDS --weights FOLDER`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from omnivideo.errors import InvalidInput
from omnivideo.models.omni import Omni
from omnivideo.training.data.batches import PAPER, Mix
from omnivideo.training.data.encode import Cache, Fit, digest_of, name_of
from omnivideo.training.data.rows import Epochs, Lessons, ShardSource
from omnivideo.training.data.shards import Library
from omnivideo.training.loading import Loader
from omnivideo.training.recipes.stages import SIZES, Whole, flow_recipe, stage1_over, stage2a_over
from omnivideo.training.tiny import Tiny
from omnivideo.training.trainer import Recipe

EARLIER = {
    "stage1": "", "stage2a": "stage1", "stage2b_generation": "stage2a", "stage2b": "stage2b_generation",
    "stage3": "stage2b",
}  # fmt: skip
EQ1 = 0.1
RATE = 1e-5  # AdamW's; stages 1 and 2a, which begin at random, take ten times as much
STEPS = 20_000
UNIT = 8  # processes that have equal parts of nearly every batch


def mix_of(
    stills: int | None = None, clips: int | None = None, times: int = 1, ratio: Sequence[str] = (),
    weights: Sequence[str] = (), seed: int = 0,
) -> Mix:  # fmt: skip
    """How the stages mix: batches of so many samples (None: as over the rendered world), and shares as NAME=NUMBER, of
    tasks (none: Table 1's) and of the groups' batches (none: as the tasks' shares have it); the order is the seed's.
    Raises InvalidInput.

    Nothing is cropped to another bucket than the one that its latents are of.
    """
    sizes = {
        "image": (SIZES[0] if stills is None else stills) * times,
        "video": (SIZES[1] if clips is None else clips) * times,
    }
    shares, turns = named("ratio", ratio) or PAPER, named("weights", weights)
    unit = max(1, math.gcd(UNIT, *sizes.values()))
    return Mix(shares, sizes, turns or None, unit, fold=False, seed=seed)  # type: ignore[arg-type]


def named(field: str, given: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in given:
        name, _, number = one.partition("=")
        try:
            value = float(number)
        except ValueError:
            raise InvalidInput(field, f"{one!r} is not NAME=NUMBER") from None
        if name in found:
            raise InvalidInput(field, f"{name!r} is given twice")
        found[name] = value
    return found


def makers_over(
    library: Library,
    fit: Fit,
    name: str,
    tiny: Tiny,
    weights: Path | None,
    mix: Mix,
    micro: int | None = None,
    precision: torch.dtype | None = None,
) -> dict[str, Callable[[], Recipe]]:
    """The recipes that train over a library; its cache (from stage 2a on) counts where it is of the same weights.

    `micro`: samples of one process's forward and backward pass at the most (None: all that it has of a batch).
    Raises InvalidInput for a recipe that is no stage, and where weights are not named.
    """
    if name not in EARLIER:
        raise InvalidInput("recipe", f"{name!r} does not train over shards; allowed: {', '.join(EARLIER)}")
    if weights is None:
        raise InvalidInput("weights", "shards need a folder of weights to begin with")
    return {name: partial(recipe_over, library, fit, name, tiny, weights, mix, micro, precision)}


def recipe_over(
    library: Library, fit: Fit, name: str, tiny: Tiny, weights: Path, mix: Mix, micro: int | None = None,
    precision: torch.dtype | None = None,
) -> Recipe:  # fmt: skip
    """A stage, from the earlier stage's run, else from the weights.  AdamW with a cosine; on a GPU in bf16, if no other
    `precision` is asked for."""
    precision = precision or (torch.bfloat16 if tiny.device.type == "cuda" else torch.float32)
    loader = Loader(name, weights, tiny.device, precision)
    omni = loader.omni()
    if EARLIER[name] and tiny.has_run(EARLIER[name]):
        state = torch.load(tiny.stage_file(EARLIER[name]), weights_only=True, map_location="cpu", mmap=True)
        Whole(omni).load_state_dict(state["model"] | state["average"])
    source, recipe = (lessons if name == "stage1" else flow)(library, fit, name, tiny, loader, omni, mix)
    source.micro = micro
    return replace(recipe, optimizer="adamw", shape="cosine", precision=precision, data=source.digest())


def lessons(
    library: Library, fit: Fit, name: str, tiny: Tiny, loader: Loader, omni: Omni, mix: Mix
) -> tuple[Epochs, Recipe]:
    """Stage 1."""
    encoder = loader.visual_encoder()
    source = Lessons(omni, library, fit, mix, encoder)
    recipe = stage1_over(omni, encoder, source.draw, STEPS, source.samples, tiny.workers, source.ready)
    return source, replace(recipe, lr=100 * RATE, adam_lr=10 * RATE)


def flow(
    library: Library, fit: Fit, name: str, tiny: Tiny, loader: Loader, omni: Omni, mix: Mix
) -> tuple[Epochs, Recipe]:
    """From stage 2a on: over latents and text of the cache, where it has them."""
    encoder = loader.visual_encoder() if name == "stage3" else None
    cache = Cache(library.shelf, digest_of(name_of(loader.weights), fit))
    source = ShardSource(name, omni, library, cache, fit, mix, encoder)
    if name == "stage2a":
        recipe = replace(stage2a_over(omni, source, STEPS, tiny.workers), lr=100 * RATE, adam_lr=10 * RATE)
        return source, recipe
    eq1, high = (EQ1, 0.9) if name == "stage3" else (0.0, 0.5)  # as the tiny preset's
    return source, flow_recipe(name, omni, source, STEPS, lr=10 * RATE, eq1=eq1, high=high, workers=tiny.workers)
