"""What a preset states: the fields in which models differ, as frozen pydantic classes."""

from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, model_validator

StandardTask = Literal["text-to-image", "text-to-video", "image-editing", "video-editing"]
# Tasks whose clips begin with given frames: animate a still, continue a clip, go from a first to a last frame.
ContinuationTask = Literal["image-to-video", "video-extension", "keyframes-to-video"]
Task = Literal[StandardTask, ContinuationTask]
EditKind = Literal[
    "recolour", "reshape", "add", "remove", "background", "motion", "resize", "replace", "swap", "place", "speed",
    "path",
]  # fmt: skip
ConditionPart = Literal["source", "visual", "hidden", "text"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Precision = Literal["preset", "float32"]  # the types that the preset states, or float32 for every part


class PresetModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingDefaults(PresetModel):
    """Defaults of one task (paper section 5.1): size in px, clip length, UniPC steps, guidance scale.

    `given_frames` of a continuation are the first ones of its `frames`: the model gets them, and generates the others.
    """

    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance_scale: float
    flow_shift: float = 5.0
    given_frames: int = 0


class TrainedShapes(PresetModel):
    """The sizes in px, as (width, height), and the numbers of frames that a task was trained on.

    `flow_shift` are the bounds within which the preset's clips were checked to be clips.
    """

    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, ...]
    flow_shift: tuple[float, float] = (0.01, 100.0)


class QueryTransformerConfig(PresetModel):
    """Vision head or adapter: input width, hidden width, learned queries, layers (each side), attention heads."""

    input_dim: int
    width: int
    num_queries: int
    num_layers: int = 4
    num_heads: int = 8


class VisualContextConfig(PresetModel):
    """Visual context adapter: width of the patch embedding, stride on the latent grid, eps of its layer norms."""

    hidden_dim: int
    kernel_size: int = 4
    eps: float = 1e-5
    absolute_positions: bool = False


class VisionInputConfig(PresetModel):
    """The MLLM's visual input: how it patches pixels, and how much of an image or a clip it sees.

    With the fit "area", a frame keeps its aspect ratio. With "square", the model sees the largest centred square, as a
    model does that was trained on squares alone; its decoder crops a source in the same way.
    """

    patch_size: int  # px
    merge_size: int  # patches along each side of one token
    temporal_patch_size: int  # frames in one patch
    min_pixels: int  # px of one frame, or of the whole clip if the budget is "clip"
    max_pixels: int
    fps: float  # frames sampled from a second of video
    min_frames: int
    max_frames: int
    budget: Literal["frame", "clip"] = "frame"
    fit: Literal["area", "square"] = "area"


class MLLMConfig(PresetModel):
    """The multimodal language model, and what the decoder gets from it.

    `vision_input` is for questions and routing; `caption_input` and `feature_input` are for the calls that describe a
    clip and that compute the decoder's features, and default to it. The features are the hidden states of the last
    layer at the kept positions: all, or those after the opening of the user's turn. `routing` says how a route is
    read: from the first token, or by comparing the likelihoods of a fixed choice. `can_plan` is False for a model that
    is too small to write the plan of a turn; English rules then split it.
    """

    family: Literal["qwen3-vl", "vila"] = "qwen3-vl"
    vision_input: VisionInputConfig
    caption_input: VisionInputConfig | None = None
    feature_input: VisionInputConfig | None = None
    hidden_states: Literal["after-norm", "before-norm"] = "after-norm"
    kept_positions: Literal["all", "after-user-start"] = "all"
    routing: Literal["tokens", "likelihoods"] = "tokens"
    can_plan: bool = True


class ConditionConfig(PresetModel):
    """The decoder's condition: the order of its parts, the markers around them, and its length after padding.

    `markers` has the name of a part's two markers; a part without one stands alone. `overflow` is the part, the last
    one, whose end is lost if the condition is longer than `max_tokens`; "refuse" cuts nothing. `text_parts`
    are the texts that are encoded one after the other; an instruction is used only if there is a source. With
    `optional_markers`, weights without any have a condition without markers.
    """

    parts: tuple[ConditionPart, ...] = ("source", "visual", "text")
    markers: dict[ConditionPart, str] = {"source": "img", "visual": "ipl", "text": "prp"}
    optional_markers: bool = False
    min_tokens: int
    max_tokens: int
    overflow: Literal["refuse"] | ConditionPart = "refuse"
    text_parts: tuple[Literal["prompt", "caption", "instruction"], ...] = ("prompt",)

    @property
    def marker_names(self) -> tuple[str, ...]:
        return tuple(f"{name}_{end}" for name in self.markers.values() for end in ("st", "ed"))

    @model_validator(mode="after")
    def check_parts(self) -> Self:
        if self.overflow not in ("refuse", self.parts[-1]):
            raise ValueError(f"overflow: only the last part, {self.parts[-1]!r}, can be cut")
        if not self.markers.keys() <= set(self.parts):
            raise ValueError(f"markers: allowed for {', '.join(self.parts)}")
        return self


class NullConfig(PresetModel):
    """What the null branch of guidance has in place of the condition; the source stays in it.

    "negative-prompt": a text alone. "context-file": hidden states and a text embedding that come with the weights, and
    no negative prompt. "negative-prompt-and-small-states": a text and a few rows of a small value as hidden states.
    """

    kind: Literal["negative-prompt", "context-file", "negative-prompt-and-small-states"] = "negative-prompt"
    negative_prompt: str = ""
    small_state_rows: int = 2
    small_state_value: float = 1e-6


class TextConfig(PresetModel):
    """The decoder's text encoder: is a text cleaned first, and what happens to one of more than `max_tokens`."""

    clean: bool = False
    max_tokens: int = 512
    overflow: Literal["refuse", "cut"] = "refuse"


class SourceConfig(PresetModel):
    """How a source becomes pixels.

    `frames`: those nearest to the clip's times, or every `stride`-th after `skip` frames; the stride shrinks until the
    source is long enough, and one that is too short is refused. `crop`: the largest centred box of the clip's aspect,
    with exact sides and a Lanczos filter, or with whole sides and a bilinear one.
    """

    frames: Literal["nearest", "stride"] = "nearest"
    skip: int = 0
    stride: int = 1
    crop: Literal["exact", "whole"] = "exact"


class ExpertsConfig(PresetModel):
    """The decoders: with two, the first denoises at timesteps of at least `boundary` (of 1000), the second below."""

    num_decoders: Literal[1, 2] = 1
    boundary: int = 0


class HubRepository(PresetModel):
    """A repository of the Hugging Face hub that holds some of a preset's parts.

    `holds` are subfolders of a complete folder of ours, `files` patterns of the files that are needed, and
    `optional_files` of those that are taken if they are there. Without a `revision`, the first download pins the commit
    that it finds. `size_bytes` is what these files take, roughly.
    """

    id: str
    revision: str | None = None
    holds: tuple[str, ...]
    files: tuple[str, ...]
    optional_files: tuple[str, ...] = ()
    size_bytes: int
    licence: str


class Preset(PresetModel):
    """The architecture of a model and its defaults.

    `version` names the published layout. `decoder` and `vae` are the configurations of diffusers'
    `WanTransformer3DModel` and `AutoencoderKLWan`. A vision head and an adapter make the condition's "visual" part, a
    normalised projection of the MLLM's hidden states its "hidden" part. The keys of `sampling` are the tasks that the
    weights can do, `trained` has the sizes and lengths of each, and `animates_pictures` says that an edit of a picture
    can be a clip. The authors' version 1 counts guidance from the condition; its scale plus
    `guidance_offset` is the usual scale, which every setting here means. Parts that `dtypes` does not name are
    float32; `autocast` is the type that the decoder and the visual context adapter compute in. `byte_rounding`
    turns decoded pixels into bytes. `max_batch_size` is the number of clips of a batch that are rendered in one
    pass, if that was measured to be faster. `prompts` is the folder of the planner's prompts. `has_scorer` is True
    if the preset's world is the synthetic one, in which pixels can be checked against a request.
    """

    name: str
    version: Literal[1, 2]
    mllm_width: int
    mllm: MLLMConfig
    text_width: int
    text: TextConfig = TextConfig()
    condition: ConditionConfig
    null: NullConfig
    guidance_offset: float = 0.0
    source: SourceConfig = SourceConfig()
    decoder: dict[str, Any]
    experts: ExpertsConfig = ExpertsConfig()
    has_scorer: bool = False
    edits: tuple[EditKind, ...] = ()
    prompts: Literal["instructions", "keywords"] = "instructions"
    max_batch_size: int = 1
    absolute_positions: bool = False
    vae: dict[str, Any] = {}
    vision_head: QueryTransformerConfig | None = None
    adapter: QueryTransformerConfig | None = None
    visual_context: VisualContextConfig
    sampling: dict[Task, SamplingDefaults]
    animates_pictures: bool = False
    trained: dict[Task, TrainedShapes] = {}
    dtypes: dict[str, DtypeName] = {}
    autocast: DtypeName | None = None
    byte_rounding: Literal["nearest", "truncate"] = "nearest"
    licence: str = ""

    @model_validator(mode="after")
    def check_given_frames(self) -> Self:
        for task, defaults in self.sampling.items():
            is_continuation = task in get_args(ContinuationTask)
            if (defaults.given_frames > 0) != is_continuation or defaults.given_frames >= defaults.frames:
                raise ValueError(f"given_frames: {defaults.given_frames} of {defaults.frames} do not fit {task}")
            if is_continuation and defaults.given_frames % 4 != 1:  # they fill whole latent frames
                raise ValueError(f"given_frames: {defaults.given_frames} is not of the form 4k + 1")
        return self

    def in_float32(self) -> "Preset":
        """Return the same model with every part in float32, as the golden tests compare it."""
        return self.model_copy(update={"dtypes": {}, "autocast": None})
