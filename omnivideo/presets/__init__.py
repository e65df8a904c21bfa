"""Named, frozen model architectures. This package reads no environment variables and no files.

Everything in which the models differ is a field of `Preset` (`fields.py`); each model is an instance of it.
"""

from omnivideo.errors import InvalidInput
from omnivideo.presets.fields import (
    ConditionConfig,
    ConditionPart,
    ContinuationTask,
    DtypeName,
    EditKind,
    ExpertsConfig,
    HubRepository,
    MLLMConfig,
    NullConfig,
    Precision,
    Preset,
    QueryTransformerConfig,
    SamplingDefaults,
    SourceConfig,
    StandardTask,
    Task,
    TextConfig,
    TrainedShapes,
    VisionInputConfig,
    VisualContextConfig,
)
from omnivideo.presets.omni_video import OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B, OMNIVIDEO_1_3B, QWEN3_VL_INPUT
from omnivideo.presets.tiny import TINY

__all__ = [
    "OMNIVIDEO2_1_3B",
    "OMNIVIDEO2_A14B",
    "OMNIVIDEO_1_3B",
    "PRESETS",
    "QWEN3_VL_INPUT",
    "TINY",
    "ConditionConfig",
    "ConditionPart",
    "ContinuationTask",
    "DtypeName",
    "EditKind",
    "ExpertsConfig",
    "HubRepository",
    "MLLMConfig",
    "NullConfig",
    "Precision",
    "Preset",
    "QueryTransformerConfig",
    "SamplingDefaults",
    "SourceConfig",
    "StandardTask",
    "Task",
    "TextConfig",
    "TrainedShapes",
    "VisionInputConfig",
    "VisualContextConfig",
    "get_animation_task",
    "get_preset",
    "get_sampling_defaults",
    "get_vision_input",
]

PRESETS = {preset.name: preset for preset in (TINY, OMNIVIDEO_1_3B, OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B)}


def get_preset(name: str) -> Preset:
    """Return the preset of this name; raises InvalidInput for an unknown one."""
    if name not in PRESETS:
        raise InvalidInput("preset", f"{name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def get_sampling_defaults(preset: Preset, task: Task, field: str = "task") -> SamplingDefaults:
    """Return the defaults of a task; raises an InvalidInput with the field if the preset's weights cannot do it."""
    if task not in preset.sampling:
        raise InvalidInput(field, f"{preset.name} cannot do {task}; its tasks are {', '.join(preset.sampling)}")
    return preset.sampling[task]


def get_animation_task(preset: Preset) -> Task:
    """Return the task that makes a clip of a picture: an edit if the preset has only that, otherwise its own task."""
    is_edit = preset.animates_pictures and "image-to-video" not in preset.sampling
    return "video-editing" if is_edit else "image-to-video"


def get_vision_input(patch_size: int, merge_size: int, temporal_patch_size: int) -> VisionInputConfig:
    """Return the vision input of the preset whose MLLM uses this patching; raises InvalidInput if no preset does."""
    patching = (patch_size, merge_size, temporal_patch_size)
    for preset in PRESETS.values():
        known = preset.mllm.vision_input
        if (known.patch_size, known.merge_size, known.temporal_patch_size) == patching:
            return known
    raise InvalidInput("preset", f"no preset has an MLLM with the patching {patching}")
