"""Write another golden set in the same form: other weights, inputs and texts, with the outputs of our own code.

    python -m tests.support.golden_variant FOLDER

The authors' code is not here, so this set says nothing about ours; the first one does that. It shows whether the golden
tests take everything from their folder: a test that has a value of the first set built in fails on this one.
"""

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnivideo.media.read import DecodedMedia, fit_media
from omnivideo.models.conditions import tokenize_prompts
from omnivideo.models.mllm import MLLMMessage, tokenize_message
from omnivideo.models.omni import MLLMFeatures
from omnivideo.models.sampling import Expert, create_scheduler, denoise
from omnivideo.models.vae import decode_latents, encode_pixels, pixels_from_bytes, pixels_to_bytes
from omnivideo.presets import OMNIVIDEO_1_3B
from tests.support.golden import DEFAULT_FOLDER
from tests.support.golden_models import load_golden_model

GENERATOR = torch.Generator().manual_seed(7)
CHECKPOINTS = ("v1_checkpoint", "v2_checkpoint_single", "v2_checkpoint_high", "v2_checkpoint_low")
WEIGHTS = (
    *CHECKPOINTS, "v1_side_files", "v2_side_files", "qwen3vl/model", "vila_ar_model/llm/model",
    "vila_ar_model/vision_tower/model", "vila_ar_model/mm_projector/model",
)  # fmt: skip
BOUNDARY = 875


def change_weights(value: Tensor) -> Tensor:
    spread = 0.3 * float(value.std(correction=0)) or 0.05
    return value + spread * torch.randn(value.shape, generator=GENERATOR)


def draw_like(value: Tensor) -> Tensor:
    """Return random values of the same type and shape."""
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, value.shape, generator=GENERATOR, dtype=torch.uint8)
    if not value.is_floating_point():
        return torch.randint(1, 999, value.shape, generator=GENERATOR, dtype=value.dtype)
    return float(value.std(correction=0)) * torch.randn(value.shape, generator=GENERATOR)


def write_variant(folder: Path) -> None:
    """Write the whole set; `OMNIVIDEO_GOLDEN` names it in this process from now on."""
    shutil.copytree(DEFAULT_FOLDER, folder)
    os.environ["OMNIVIDEO_GOLDEN"] = str(folder)
    for name in WEIGHTS:
        tensors = load_file(folder / f"{name}.safetensors")
        changed = {key: change_weights(value) for key, value in tensors.items()}
        save_file(changed, folder / f"{name}.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        for name, writer in WRITERS:
            rewrite(folder, name, writer)


def rewrite(folder: Path, name: str, writer: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors = load_file(folder / f"{name}.safetensors")
    about = json.loads((folder / f"{name}.json").read_text())
    writer(tensors, about)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(about))


def change_states(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Change the weights in a file that has inputs and outputs too."""
    if "prompts" in about:
        about["prompts"] = ["the big blue square", " a  cat &amp; a dog\n in the snow ", "it", "rain and snow ! " * 9]
    tensors |= {key: change_weights(value) for key, value in tensors.items() if key.startswith("state.")}


def change_inputs(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    tensors |= {key: draw_like(value) for key, value in tensors.items() if key.startswith("in.")}


# ---------------------------------------------------------------- parts


def write_vae(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    vae = load_golden_model("v1").vae
    for name in ("video", "image"):
        tensors[f"in.{name}"] = 2 * torch.rand(tensors[f"in.{name}"].shape, generator=GENERATOR) - 1
        tensors[f"out.latents_{name}"] = encode_pixels(vae, tensors[f"in.{name}"][None])[0]
    tensors["in.latents"] = draw_like(tensors["in.latents"])
    tensors["out.pixels"] = decode_latents(vae, tensors["in.latents"][None])[0]


def write_texts(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    omni = load_golden_model("v1")
    tokens = tokenize_prompts(omni.tokenizer, about["prompts"], omni.preset.text)
    tensors |= {"in.ids": tokens["input_ids"], "in.mask": tokens["attention_mask"]}
    tensors |= {f"out.{index}": value for index, value in enumerate(omni.encode_prompts(about["prompts"]))}


def write_parts_1(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    omni = load_golden_model("v1")
    for name in ("", "_batch"):
        tensors[f"out.vision_head{name}"] = omni.bridge.vision_head(tensors[f"in.hidden_states{name}"])
    visual = omni.predict_visual_tokens(MLLMFeatures(tensors["in.hidden_states"], "hidden-states"))
    tensors["out.adapter_first_token"] = omni.adapt_visual_tokens(visual, ["image"])[0][None]
    each = omni.adapt_visual_tokens(visual, ["video"])[0]
    tensors["out.adapter_each_token"] = each.reshape(tensors["out.adapter_each_token"].shape)
    for name in ("video", "image", "not_multiple_of_4"):
        (context,) = omni.encode_visual_context(tensors[f"in.latents_{name}"][None], 1)
        tensors[f"out.visual_context_{name}"] = context[None]
    context_BLD = torch.zeros(1, omni.preset.condition.max_tokens, omni.preset.text_width)
    context_BLD[0, : len(tensors["in.wan_context"])] = tensors["in.wan_context"]
    for name, timestep in (("", tensors["in.wan_timestep"]), ("_big", torch.tensor([999]))):
        latents = tensors[f"in.wan_latents{name}"][None]
        tensors[f"out.wan_velocity{name}"] = omni.decoder(latents, timestep, context_BLD, return_dict=False)[0][0]
    for task, target, source, text in (
        ("t2v", "video", None, ""), ("t2i", "image", None, ""), ("v2v", "video", "video", ""),
        ("i2i", "image", "image", ""), ("cut", "video", "video", "_too_long"),
    ):  # fmt: skip
        row = {"text": tensors[f"in.text{text}"], "visual": omni.adapt_visual_tokens(visual, [target])[0]}
        latents = tensors[f"in.latents_{source}"][None] if source else None
        keep_condition(tensors, f"out.condition_{task}", omni.complete_conditions([row], latents))
    for target in ("video", "image"):
        keep_condition(tensors, f"out.condition_null_{target}", omni.build_null_condition("", 1, target=target))


def keep_condition(tensors: dict[str, Tensor], key: str, condition_1LD: Tensor) -> None:
    """Store a condition without its padding; its length is that of the first set."""
    tensors[key] = condition_1LD[0, : len(tensors[key])]


def write_parts_2(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    from tests.models.test_golden_parts import EXPERTS, without_markers

    states, source = tensors["in.hidden_states"][0], tensors["in.latents"]
    for name, (kind, index) in EXPERTS.items():
        omni = load_golden_model(kind)
        condition = omni.complete_conditions([{"hidden": states}], None, index)[0]
        tensors[f"out.projected_{name}"] = condition[None, : len(states)]
        tensors[f"out.visual_context_{name}"] = omni.encode_visual_context(source, 1, index)[0][None]
    single = load_golden_model("single")
    null = single.encode_null_requests("", 1, "video")[0]["hidden"]
    tensors["out.null_hidden"], tensors["out.null_projected_single"] = null, single.bridge.hidden_projection(null)
    for name, hidden, has_source, text in (
        ("v2v", states, True, ""), ("t2v", states, False, ""), ("text_only", None, False, ""),
        ("null_v2v", null, True, ""), ("no_markers", states, True, ""), ("cut", states, True, "_too_long"),
    ):  # fmt: skip
        omni = without_markers(single) if name == "no_markers" else single
        row = {"text": tensors[f"in.text{text}"]} | ({} if hidden is None else {"hidden": hidden})
        condition = omni.complete_conditions([row], source if has_source else None)
        keep_condition(tensors, f"out.condition_{name}", condition)
        latents, timestep = tensors["in.wan_latents"][None], torch.tensor([500])
        tensors[f"out.velocity_{name}"] = omni.decoder(latents, timestep, condition, return_dict=False)[0][0]


# ---------------------------------------------------------------- generations and the scheduler


def change_sampling(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Change the settings and the noise, and state the timesteps and experts that follow."""
    settings = {
        "shift": 4.5, "prompt": "Generate a video about: the big cat in the rain", "guide_scale": 2.5,
        "caption": "a small red square moving up", "instruction": "make the cat blue",
        "negative_prompt": "worst quality, blurry",
    }  # fmt: skip
    about |= {name: value for name, value in settings.items() if name in about}
    for case in about["cases"]:
        case["timesteps"] = create_scheduler(about["steps"], about["shift"]).timesteps.tolist()
        if "guide_scale_as_in_their_script" in case:
            case["guide_scale_as_in_their_script"] -= 0.5
        if case["name"].startswith("experts"):
            case["expert_of_each_step"] = ["high" if step >= BOUNDARY else "low" for step in case["timesteps"]]
    tensors |= {key: draw_like(value) for key, value in tensors.items() if key.endswith(".noise")}


def write_sampling(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    from tests.backends.decoder.test_golden_sampling import read_case

    for name in (case["name"] for case in about["cases"]):
        case = read_case(name)
        steps, clip = case.run()
        outputs = {
            "latents": torch.stack([step.state.latents[0] for step in steps]),
            "cond": torch.stack(case.velocities[::2]),
            "uncond": torch.stack(case.velocities[1::2]),
            "pixels": decode_latents(case.omni.vae, clip.latents[None])[0],
        }
        tensors |= {f"{name}.{key}": value for key, value in outputs.items() if f"{name}.{key}" in tensors}
        if f"in.text_{name.partition('_')[2]}" in tensors:
            texts = case.omni.encode_request_texts([case.prompt], [case.features.caption], case.source is not None)
            tensors[f"in.text_{name.partition('_')[2]}"] = texts[0]


def write_scheduler(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    def toy_velocity(x: Tensor, timestep: Tensor, condition: Tensor, return_dict: bool) -> tuple[Tensor]:
        return ((3 * x).sin() + 0.1 * x * timestep.view(-1, 1, 1, 1, 1) / 1000 + 0.05,)

    for case in about["cases"]:
        case["shift"] += 0.5
        name, scheduler = case["name"], create_scheduler(case["steps"], case["shift"])
        tensors |= {f"{name}.timesteps": scheduler.timesteps, f"{name}.sigmas": scheduler.sigmas}
        tensors[f"{name}.x0"] = draw_like(tensors[f"{name}.x0"])
        expert = Expert(toy_velocity, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
        steps = denoise([expert], tensors[f"{name}.x0"], case["steps"], 1.0, case["shift"])
        tensors[f"{name}.trajectory"] = torch.stack([step.state.latents for step in steps])


def write_sources(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    for case in about["cases"]:
        tensors[f"{case['name']}.source"] = draw_like(tensors[f"{case['name']}.source"])
        media = DecodedMedia(tensors[f"{case['name']}.source"].numpy(), None, "image")
        fitted = fit_media(media, case["target_width"], case["target_height"], 1, 8, OMNIVIDEO_1_3B.source)
        tensors[f"{case['name']}.pixels"] = pixels_from_bytes(fitted[None])[:, :, 0]
    values = tensors["bytes.in"] = 2.4 * torch.rand(tensors["bytes.in"].shape, generator=GENERATOR) - 1.2
    frame = values.reshape(1, 1, 1, 1, -1).expand(1, 3, 1, 1, -1)
    tensors["bytes.out"] = torch.from_numpy(pixels_to_bytes(frame, OMNIVIDEO_1_3B.byte_rounding)[0, 0, 0, :, 0])


# ---------------------------------------------------------------- MLLMs


def write_vila(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    from tests.models import test_vila as vila

    about["prompts"] = dict.fromkeys(about["prompts"], "a big blue square") | {"v2v": "turn it red", "i2i": "add snow"}
    tensors |= {key: draw_like(value) for key, value in tensors.items() if key.endswith((".frames", ".image"))}
    bound = vila.load_golden_vila()
    config, golden = bound.model.image_config, (tensors, about)
    for task, medium in vila.TASKS.items():
        message = vila.build_message(golden, task)
        request = vila.tokenize_features(bound.tokenizer, message, medium, config)
        padding = vila.get_padding_id(bound.tokenizer)
        tensors[f"{task}.input_ids"] = torch.tensor([request.token_ids])
        tensors[f"{task}.attention_mask"] = torch.tensor([[int(token != padding) for token in request.token_ids]])
        tensors[f"{task}.hidden_states"] = bound.compute_features([(message, medium)])[0]
    tensors["i2i.pixel_values"] = vila.convert_frame(tensors["i2i.image"].numpy(), config)[None]
    for task in ("v2v", "route_v2v"):
        frames = [vila.convert_frame(tensors[f"{task}.frames"].numpy()[index], config) for index in (0, -1)]
        tensors[f"{task}.pixel_values"] = torch.stack(frames)
    out = bound.model.vision_tower(tensors["v2v.pixel_values"], output_hidden_states=True)
    tensors["parts.vision_features"] = out.hidden_states[bound.model.select_layer]
    tensors["parts.projected"] = bound.model.projector(tensors["parts.vision_features"])
    for task in ("route_t2v", "route_v2v"):
        request = bound.tokenize(vila.build_message(golden, task))
        answer = vila.iterate_answer(bound.model, request, lambda logits: int(logits.argmax()))
        steps = list(itertools.islice(answer, len(tensors[f"{task}.greedy_tokens"])))
        tensors[f"{task}.input_ids"] = torch.tensor([request.token_ids])
        tensors[f"{task}.next_token_logits"] = steps[0][1]
        tensors[f"{task}.greedy_tokens"] = torch.tensor([token for token, _ in steps])


def change_qwen_texts(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    about |= {"instruction": "turn it red", "short_prompt": "the big blue square"}
    about["source_caption_in_target_v2v"] = "The blue square stands still."
    about["system_prompts"] = {name: f"{text} Be brief." for name, text in about["system_prompts"].items()}


def write_qwen(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    from tests.models import test_qwen3_vl as qwen

    bound, calls, prompts = qwen.load_mllm(), qwen.qwen3_vl, about["system_prompts"]

    def tokenize(message: MLLMMessage, config: Any) -> Any:
        return tokenize_message(bound.tokenizer, message, config)

    message = calls.build_source_caption_message(qwen.source_message(""), prompts["source"])
    caption = tokenize(message, qwen.CAPTION_INPUT)
    tensors["caption.input_ids"] = torch.tensor([caption.token_ids])
    tensors["caption.video_grid_thw"] = torch.tensor(caption.grids["video"])
    tensors["caption.patches"] = caption.patches["video"][0][tensors["caption.patch_rows"]]
    for name, text in (("v2v", about["instruction"]), ("t2v", about["short_prompt"])):
        source_caption = about["source_caption_in_target_v2v"] if name == "v2v" else None
        message = calls.build_target_caption_message(MLLMMessage(text), source_caption, prompts["target"])
        encoded, ids = tokenize(message, qwen.CAPTION_INPUT), list[int]()
        tensors[f"target_{name}.input_ids"] = torch.tensor([encoded.token_ids])
        for _ in tensors.get(f"target_{name}.greedy_tokens", ()):
            ids.append(int(bound.compute_next_logits(encoded, ids).argmax()))
        tensors |= {f"target_{name}.greedy_tokens": torch.tensor(ids)} if ids else {}
        message = calls.build_feature_message(
            qwen.source_message(text) if name == "v2v" else MLLMMessage(text), prompts["feature"]
        )
        encoded = tokenize(message, qwen.FEATURE_INPUT)
        tensors[f"feature_{name}.input_ids"] = torch.tensor([encoded.token_ids])
        tensors[f"feature_{name}.drop"] = torch.tensor(calls.count_dropped_tokens(bound.tokenizer, message))
        if name == "v2v":
            tensors["feature_v2v.video_grid_thw"] = torch.tensor(encoded.grids["video"])
            tensors["feature_v2v.patches"] = encoded.patches["video"][0]
        tensors[f"feature_{name}.features"] = bound.compute_kept_states([message])[0][0]
        inputs = qwen.collate_requests([encoded], bound.tokenizer.pad_token_id)
        tensors[f"feature_{name}.last_hidden_state"] = bound.model.model(**inputs).last_hidden_state[0]


# In an order in which everything is written before it is used.
WRITERS: tuple[tuple[str, Callable[[dict[str, Tensor], dict[str, Any]], None]], ...] = (
    ("wan21_vae", change_states), ("umt5", change_states), ("wan21_vae", write_vae), ("umt5", write_texts),
    ("v1_parts", change_inputs), ("v1_parts", write_parts_1), ("v2_parts", change_inputs), ("v2_parts", write_parts_2),
    ("v1_sampling", change_sampling), ("v1_sampling", write_sampling),
    ("v2_sampling", change_sampling), ("v2_sampling", write_sampling),
    ("source_reading", write_sources), ("unipc", write_scheduler), ("vila", write_vila),
    ("qwen3vl", change_qwen_texts), ("qwen3vl", write_qwen),
)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the tests do, which compare some values exactly
    write_variant(Path(sys.argv[1]))
