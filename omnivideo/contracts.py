"""The frozen messages that cross rooms."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnivideo.errors import InvalidInput
from omnivideo.presets import Preset, Task, latent_grid

MOST_SEED = 2**63 - 1
MOST_PIXELS = 1280 * 720 * 121  # of a whole clip: above what any preset was made for


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(Message):
    """How one clip is drawn.  Sizes in px; `seed` fixes every byte of the result."""

    task: Task
    width: int = Field(ge=16, le=1280)
    height: int = Field(ge=16, le=1280)
    frames: Annotated[int, Field(ge=1, le=241)]
    fps: int = Field(ge=1, le=60)
    steps: int = Field(ge=1, le=200)
    guidance_scale: float = Field(ge=0, le=30, allow_inf_nan=False)
    flow_shift: float = Field(gt=0, le=100, allow_inf_nan=False)
    negative_prompt: str = Field(max_length=4000)
    seed: int = Field(ge=0, le=MOST_SEED)


class Step(Message):
    """Denoising step `step` of `steps` is done; `left` is the expected time to the last one, in seconds."""

    kind: Literal["step"] = "step"
    step: int
    steps: int
    left: float


class Manifest(Message):
    """What a file was made from: enough to make the same bytes again."""

    prompt: str
    task: Task
    settings: Settings
    source: str | None
    preset: str
    weights: str
    versions: dict[str, str]
    seconds: dict[str, float]


def settings(preset: Preset, task: Task, **given: object) -> Settings:
    """The preset's defaults for a task with what is given in place; None leaves a default.

    Raises InvalidInput that names the field and the allowed range.
    """
    defaults = preset.sampling[task].model_dump() | {"negative_prompt": preset.negative_prompt, "seed": 0}
    wanted = {name: value for name, value in given.items() if value is not None}
    try:
        made = Settings(task=task, **(defaults | wanted))
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "settings"
        raise InvalidInput(field, first["msg"][0].lower() + first["msg"][1:]) from None
    latent_grid(made.width, made.height, made.frames)
    if made.width * made.height * made.frames > MOST_PIXELS:
        raise InvalidInput("size", f"width x height x frames is above {MOST_PIXELS}")
    if (made.frames == 1) != (task in ("text-to-image", "image-editing")):
        raise InvalidInput("frames", f"{made.frames} does not fit {task}: an image has 1, a video 5 or more")
    return made


def check_prompt(field: str, text: str) -> str:
    """The text without outer blanks; raises InvalidInput where nothing or too much is left."""
    text = text.strip()
    if not text:
        raise InvalidInput(field, "it is empty; give 1 to 4000 characters")
    if len(text) > 4000:
        raise InvalidInput(field, f"it has {len(text)} characters; give 1 to 4000")
    return text
