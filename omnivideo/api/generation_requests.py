"""The fields of requests for images and clips, with the names that OpenAI's clients and other servers use."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from omnivideo.api.media import MediaReference
from omnivideo.api.request_body import CleanText, Seed, Unsupported, UnsupportedNumber, UnsupportedSwitch
from omnivideo.contracts import RequestModel, SamplingParams
from omnivideo.errors import InvalidInput
from omnivideo.presets.shapes import RequestedShape

ImageFormat = Literal["png", "jpeg", "webp"]


def get_constraints(field: str) -> list[Any]:
    """Return the bounds of a setting, which contracts.RequestedShape and contracts.SamplingParams define."""
    return (SamplingParams.model_fields | RequestedShape.model_fields)[field].metadata


class GenerationRequest(RequestModel):
    """The fields that requests for images and clips share. A size is WIDTHxHEIGHT in pixels, or auto.

    `width` and `height` are the same size as two numbers; an empty size is none. Any size is generated at the nearest
    one that the model was trained on, then scaled and cropped centrally. A field that is not listed is refused, because
    it may change the result; `user`, `metadata` and `moderation` cannot, and neither can a switch that is off.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: CleanText = Field(min_length=1, max_length=4000)
    model: CleanText | None = None
    n: int = Field(default=1, ge=1, le=8)
    size: Annotated[str | None, BeforeValidator(lambda size: size or None)] = Field(
        default=None,
        pattern=r"^(\d{1,5}x\d{1,5}|auto)$",
        description="a width and a height in pixels, such as 640x384, or auto",
    )
    width: Annotated[int | None, *get_constraints("width")] = None
    height: Annotated[int | None, *get_constraints("height")] = None
    num_inference_steps: Annotated[int | None, *get_constraints("steps")] = None
    guidance_scale: Annotated[float | None, *get_constraints("guidance_scale")] = None
    flow_shift: Annotated[float | None, *get_constraints("flow_shift")] = None
    seed: Seed = None
    negative_prompt: Annotated[CleanText | None, *get_constraints("negative_prompt")] = None
    lora: Unsupported = None
    lora_path: Unsupported = None
    lora_scale: Unsupported = None
    guidance_scale_2: Unsupported = None
    true_cfg_scale: Unsupported = None
    strength: Unsupported = None
    enable_teacache: UnsupportedSwitch = None
    enable_upscaling: UnsupportedSwitch = None
    rollout: UnsupportedSwitch = None
    quality: Literal["auto", "standard"] | None = None
    style: Unsupported = None
    user: CleanText | None = None
    metadata: Any = None
    moderation: Literal["auto", "low"] | None = None


def take_only_item(value: Any) -> Any:
    """Return the item of a list of one; raise ValueError for a longer list, such as of several files of a form."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ValueError(f"{len(value)} are given; give one")
    return value[0]


Source = Annotated[MediaReference, BeforeValidator(take_only_item)]


class ClipRequest(GenerationRequest):
    """Any two of `seconds`, `num_frames` and `fps` determine the third; `seconds` alone chooses the frame rate.

    With `n`, several videos are made, with consecutive seeds.
    """

    seconds: Annotated[float | None, *get_constraints("seconds")] = None
    num_frames: Annotated[int | None, *get_constraints("frames")] = None
    fps: Annotated[float | None, *get_constraints("fps")] = None
    last_image: Unsupported = None
    enable_frame_interpolation: UnsupportedSwitch = None
    generate_sound: UnsupportedSwitch = None


class VideoRequest(ClipRequest):
    """A clip, which may be made from a reference, and may end with `last_image` if it begins with one.

    `image_reference`, `video_reference` and `reference_url` are other servers' names of `input_reference`. A picture is
    animated if the model can do that, and edited otherwise; `task` requires one of the two.
    """

    input_reference: Source | None = None
    image_reference: Source | None = None
    video_reference: Source | None = None
    reference_url: Annotated[CleanText, BeforeValidator(take_only_item)] | None = None
    last_image: Source | None = None
    task: Literal["image-to-video", "video-editing"] | None = None

    def get_reference(self) -> tuple[str, MediaReference] | None:
        """Return the reference and the name of its field, or None. Raises InvalidInput if there are several."""
        url_reference = None if self.reference_url is None else MediaReference(image_url=self.reference_url)
        references = {
            "input_reference": self.input_reference, "image_reference": self.image_reference,
            "video_reference": self.video_reference, "reference_url": url_reference,
        }  # fmt: skip
        given = [(field, reference) for field, reference in references.items() if reference is not None]
        if len(given) > 1:
            raise InvalidInput(given[1][0], f"{given[0][0]} is given too; give one of them")
        return given[0] if given else None


class VideoEditRequest(ClipRequest):
    video: Source


class VideoExtensionRequest(ClipRequest):
    """A clip that continues `video`: `seconds` or `num_frames` are added, at its size and frame rate."""

    video: Source


class ImageRequest(GenerationRequest):
    """`output_compression` is the quality of a jpeg or a webp, 0 to 100; a webp of 100 is exact."""

    response_format: Literal["b64_json", "url"] | None = None
    output_format: ImageFormat | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    stream: UnsupportedSwitch = None
    partial_images: UnsupportedNumber = None
    background: Literal["auto", "opaque"] | None = None
    input_fidelity: Unsupported = None

    def check_compression(self) -> None:
        """Raise InvalidInput for a compression of a png, which has none."""
        if self.output_compression not in (None, 100) and self.output_format in (None, "png"):
            raise InvalidInput("output_compression", "it applies to an output_format of jpeg or webp")


def wrap_in_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class ImageGenerationRequest(ImageRequest):
    mask: Unsupported = None


class ImageEditRequest(ImageRequest):
    """Edits an image: `image`, an item of `images`, or `url`, which other servers use for its address.

    With a `mask` of the image's size, only pixels where its alpha is 0 may change.
    """

    image: Annotated[list[MediaReference], BeforeValidator(wrap_in_list)] = Field(default=[])
    images: list[MediaReference] = Field(default=[])
    url: Annotated[list[CleanText], BeforeValidator(wrap_in_list)] = Field(default=[])
    mask: Source | None = None

    def get_source(self) -> tuple[str, MediaReference]:
        """Return the image and the name of its field. Raises InvalidInput unless there is exactly one."""
        sources = [("image", reference) for reference in self.image]
        sources += [(f"images.{index}", reference) for index, reference in enumerate(self.images)]
        sources += [("url", MediaReference(image_url=url)) for url in self.url]
        if not sources:
            raise InvalidInput("image", "it is required")
        if len(sources) > 1:
            raise InvalidInput(sources[1][0], f"{len(sources)} images are given; this model edits 1 at a time")
        return sources[0]
