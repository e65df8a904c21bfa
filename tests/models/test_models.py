"""How the parts of the model work together: patches, routing, conditions, the denoising loop and checkpoints."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from omnivideo.errors import CheckpointError, ConditionTooLong
from omnivideo.models.conditions import MarkerEmbeddings, assemble_conditions
from omnivideo.models.mllm import (
    BOI,
    VISUAL_TOKENS,
    MLLMMedia,
    MLLMMessage,
    collate_requests,
    compute_hidden_states,
    generate_answer,
    patchify,
    predict_route,
    sample_frame_indices,
    tokenize_message,
)
from omnivideo.models.sampling import DenoisingState, Expert, create_scheduler, denoise, sample_initial_noise
from omnivideo.models.weights import checkpoint
from omnivideo.presets import TINY, ConditionConfig
from omnivideo.training.tiny import mllm

DOCS = Path(__file__).parents[2] / "docs"
RNG = np.random.default_rng(0)
FRAME = RNG.integers(0, 255, (1, 64, 64, 3), dtype=np.uint8)
CLIP = RNG.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)


# ---------------------------------------------------------------- MLLM


def test_patches_agree_with_those_of_qwen():
    theirs = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, min_pixels=4096, max_pixels=4096,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )(images=[Image.fromarray(FRAME[0])], return_tensors="pt")  # fmt: skip
    ours, grid = patchify(FRAME, TINY.mllm.vision_input)
    assert theirs["image_grid_thw"].tolist() == [grid]
    assert torch.allclose(theirs["pixel_values"], ours, atol=1e-6)


def test_a_clip_is_sampled_from_its_first_to_its_last_frame():
    assert sample_frame_indices(MLLMMedia(CLIP, 8.0), TINY.mllm.vision_input) == [0, 3, 5, 8]


def test_batches_equal_single_requests(omni):
    """Padding does not change a request's result, whatever the other requests of the batch are."""
    requests = [
        (MLLMMessage("a red circle"), "image"),
        (MLLMMessage("make it blue", (MLLMMedia(CLIP),)), "video"),
        (MLLMMessage("make the star a circle", (MLLMMedia(FRAME, is_video=False),)), "image"),
    ]
    together = omni.compute_visual_tokens(requests)
    for row, request in zip(together, requests, strict=True):
        assert torch.allclose(row, omni.compute_visual_tokens([request])[0], atol=1e-4)


def test_cached_answers_equal_the_full_forward(omni):
    message = MLLMMessage("what is in this picture?", (MLLMMedia(FRAME, is_video=False),))
    text = "".join(
        generate_answer(omni.mllm, omni.mllm_tokenizer, message, omni.vision_config, temperature=0, max_tokens=6)
    )
    encoded = tokenize_message(omni.mllm_tokenizer, message, omni.vision_config)
    banned = omni.mllm_tokenizer.convert_tokens_to_ids(["<BOI>", "<EOI>", "<BOV>", "<EOV>"])
    ids, made = list(encoded.token_ids), []
    for _ in range(6):
        grown = type(encoded)(ids, encoded.token_types + [0] * len(made), encoded.patches, encoded.grids)
        logits = omni.mllm(**collate_requests([grown], omni.mllm_tokenizer.pad_token_id)).logits[0, -1]
        logits[banned] = -torch.inf
        if int(logits.argmax()) == omni.mllm_tokenizer.eos_token_id:
            break
        made.append(int(logits.argmax()))
        ids.append(made[-1])
    assert text.rstrip("\ufffd") == omni.mllm_tokenizer.decode(made).rstrip("\ufffd")


def test_routing_follows_the_special_token(omni):
    message = MLLMMessage("a red circle")
    first = predict_route(omni.mllm, omni.mllm_tokenizer, message, omni.vision_config)
    assert first == predict_route(omni.mllm, omni.mllm_tokenizer, message, omni.vision_config)
    head = omni.mllm.lm_head.weight
    row = omni.mllm_tokenizer.convert_tokens_to_ids(BOI)
    states, _ = compute_hidden_states(omni.mllm, omni.mllm_tokenizer, [(message, "image")], omni.vision_config)
    length = len(tokenize_message(omni.mllm_tokenizer, message, omni.vision_config).token_ids)
    saved = head[row].clone()
    head[row] = states[0, length - 1] * 10
    try:
        pushed = predict_route(omni.mllm, omni.mllm_tokenizer, message, omni.vision_config)
    finally:
        head[row] = saved
    assert pushed.kind == "image" and pushed.probability > 0.99


# ---------------------------------------------------------------- condition


def test_condition_is_in_the_documented_order():
    markers = MarkerEmbeddings(4, TINY.condition.marker_names)
    h, v, t = (torch.full((n, 4), float(value)) for n, value in ((3, 1), (2, 2), (5, 3)))
    config = ConditionConfig(min_tokens=20, max_tokens=40)
    c = assemble_conditions(config, markers, [{"text": t, "visual": v, "source": h}], torch.float32)[0]
    expected = [markers.img_st, h, markers.img_ed, markers.ipl_st, v, markers.ipl_ed,
                markers.prp_st, t, markers.prp_ed, torch.zeros(4, 4)]  # fmt: skip
    assert torch.equal(c, torch.cat(expected))
    unpadded = ConditionConfig(min_tokens=0, max_tokens=40)
    alone = assemble_conditions(unpadded, markers, [{"text": t}], torch.float32)[0]
    assert torch.equal(alone, torch.cat([markers.prp_st, t, markers.prp_ed]))


def test_a_condition_that_is_too_long_is_refused(omni):
    with pytest.raises(ConditionTooLong, match="1 to 64"):
        omni.build_condition(["red circle " * 80], [None])
    with pytest.raises(ConditionTooLong, match="the decoder takes 1 to 10"):
        config = ConditionConfig(min_tokens=0, max_tokens=10)
        markers = MarkerEmbeddings(4, config.marker_names)
        assemble_conditions(config, markers, [{"text": torch.zeros(9, 4)}], torch.float32)


def test_an_image_uses_the_first_visual_token_only(omni, monkeypatch):
    visual = torch.randn(2, 4, TINY.vision_head.width)
    image, video = omni.adapt_visual_tokens(visual, ["image", "video"])
    assert len(image) == TINY.adapter.num_queries and len(video) == 4 * len(image)
    changed = visual.clone()
    changed[:, 1:] = 0
    assert torch.allclose(omni.adapt_visual_tokens(changed, ["image", "video"])[0], image, atol=1e-5)
    taken = []
    with monkeypatch.context() as patch:
        forward = omni.bridge.adapter.forward
        patch.setattr(omni.bridge.adapter, "forward", lambda tokens: taken.append(tokens) or forward(tokens))
        alone = omni.adapt_visual_tokens(visual, ["image", "image"])
    assert torch.allclose(alone[0], image, atol=1e-5) and taken[0].shape[1] == 1  # the other tokens are not generated


@pytest.mark.parametrize("target", ["image", "video"])
@pytest.mark.parametrize("prompt", ["a red circle", "a red circle " * 15])
def test_the_length_of_a_condition_is_computed_in_advance(omni, prompt, target):
    visual = omni.adapt_visual_tokens(torch.randn(1, 4, TINY.vision_head.width), [target])
    assert omni.compute_condition_length(prompt, target) == omni.build_condition([prompt], visual).shape[1]


# ---------------------------------------------------------------- denoising


def test_timesteps_agree_with_the_released_code():
    fifty, forty = (create_scheduler(steps, 5.0).timesteps.tolist() for steps in (50, 40))
    assert (fifty[:3], fifty[-1], len(fifty)) == ([999, 995, 991], 92, 50)
    assert (forty[:3], forty[-1], len(forty)) == ([999, 994, 989], 113, 40)


def run(
    omni, seed: int, guidance: float = 3.0, steps: int = 4, begin: DenoisingState | None = None, shift: float = 5.0
):
    condition = omni.build_condition(["a red circle"], [None])
    null = omni.build_null_condition(TINY.null.negative_prompt, 1)
    x = sample_initial_noise([seed], (16, 3, 8, 8), torch.device("cpu"))
    return list(denoise([Expert(omni.decoder, condition, null)], x, steps, guidance, shift, begin))


def test_denoising_yields_every_step_and_is_reproducible(omni):
    one, two, other = run(omni, 1), run(omni, 1), run(omni, 2)
    assert [state.state.step for state in one] == [1, 2, 3, 4]
    assert torch.equal(one[-1].state.latents, two[-1].state.latents)
    assert not torch.equal(one[-1].state.latents, other[-1].state.latents)
    assert torch.isfinite(one[-1].clean_latents).all()


@pytest.mark.parametrize("shift", [0.01, 100.0])
def test_the_ends_of_the_flow_shifts_range_are_usable(omni, shift):
    """With a flow shift of 100, several steps have the same timestep."""
    whole = run(omni, 1, steps=200, shift=shift, guidance=1.0)
    assert [state.state.step for state in whole] == list(range(1, 201))
    assert torch.isfinite(whole[-1].state.latents).all()


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_denoising_resumes_from_any_step_bit_for_bit(omni, steps):
    whole = run(omni, 1, steps=steps)
    for state in whole[:-1]:
        rest = run(omni, 1, steps=steps, begin=state.state)
        assert [one.state.step for one in rest] == list(range(state.state.step + 1, steps + 1))
        assert torch.equal(rest[-1].state.latents, whole[-1].state.latents)


class ReleasedLevels(UniPCMultistepScheduler):
    """The scheduler of diffusers with the noise levels of the released code, as `create_scheduler` sets them."""

    def set_timesteps(self, num_inference_steps=None, device=None, **rest):
        super().set_timesteps(sigmas=np.linspace(0.999, 0, num_inference_steps + 1)[:-1], device=device)


def test_the_loop_agrees_with_the_pipeline_of_diffusers(omni):
    """With the same weights, noise, condition and noise levels, the latents are those of `WanPipeline`."""
    scheduler = ReleasedLevels(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    theirs = WanPipeline(omni.tokenizer, omni.text_encoder, omni.vae, scheduler, omni.decoder)
    theirs.set_progress_bar_config(disable=True)
    latents = theirs(
        prompt_embeds=omni.build_condition(["a red circle"], [None]),
        negative_prompt_embeds=omni.build_null_condition(TINY.null.negative_prompt, 1),
        height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
        latents=sample_initial_noise([1], (16, 3, 8, 8), torch.device("cpu")),
    ).frames  # fmt: skip
    assert torch.allclose(latents, run(omni, 1)[-1].state.latents, atol=1e-5)


def test_a_batch_keeps_each_seeds_noise():
    together = sample_initial_noise([3, 4], (16, 1, 8, 8), torch.device("cpu"))
    assert torch.equal(together[1], sample_initial_noise([4], (16, 1, 8, 8), torch.device("cpu"))[0])


def test_absolute_positions_have_no_weights(omni):
    assert all(not key.startswith("position") for key in omni.decoder.state_dict())
    x = torch.zeros(1, 16, 1, 8, 8)
    out = omni.decoder(x, torch.tensor([500.0]), torch.zeros(1, 8, 192), return_dict=False)[0]
    assert out.std(dim=(2, 3, 4)).max() > 1e-3  # equal tokens differ by their position


# ---------------------------------------------------------------- checkpoint


def test_a_checkpoint_round_trip_keeps_the_weights(omni, weights):
    loaded = checkpoint.load(weights)
    for name in ("mllm", "bridge", "decoder", "text_encoder", "vae"):
        ours, theirs = getattr(omni, name).state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key].half().float(), theirs[key]) for key in ours)
    checkpoint.verify_digests(weights)


def edit_state(folder, name, change):
    path = folder / name
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    ["transformer/diffusion_pytorch_model.safetensors", "adapter/model.safetensors", "mllm/model.safetensors",
     "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", "markers/model.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "unknown", "shape"])
def test_loading_is_strict(weights, tmp_path, name, how):
    folder = tmp_path / "tiny"
    shutil.copytree(weights, folder)

    def change(state):
        key = next(key for key in sorted(state) if state[key].ndim >= 1 and state[key].numel() > 1)
        if how == "missing":
            del state[key]
        elif how == "unknown":
            state["nobody.knows.me"] = torch.zeros(3)
        else:
            state[key] = torch.zeros(*state[key].shape[:-1], state[key].shape[-1] + 1)

    edit_state(folder, name, change)
    with pytest.raises(CheckpointError, match=name.split("/")[0]):
        checkpoint.load(folder)


def test_damaged_and_missing_files_are_reported(weights, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(weights, folder)
    path = folder / "adapter" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"adapter/model\.safetensors is damaged"):
        checkpoint.verify_digests(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        checkpoint.load(tmp_path / "nowhere")
    (folder / "model_index.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(CheckpointError, match="format"):
        checkpoint.load(folder)


@pytest.mark.parametrize("size", [600, 640])  # with spare rows, as in Qwen3-VL, and without
def test_a_stock_mllm_is_refused_until_the_routing_tokens_are_added(weights, tmp_path, monkeypatch, size):
    """Run the lines of docs/weights.md."""
    stock = tuple(token for token in mllm.SPECIAL_TOKENS if token not in VISUAL_TOKENS)
    monkeypatch.setattr(mllm, "SPECIAL_TOKENS", stock)
    samples = [mllm.to_chat_sample(mllm.sample_foundation_example(random.Random(at))) for at in range(200)]
    tokenizer = mllm.build_tokenizer([f"{message.text} {reply}" for message, reply in samples], size)
    model = mllm.build_model(tokenizer)
    rows = model.get_input_embeddings().num_embeddings
    assert len(tokenizer) == size and rows == 640
    shutil.copytree(weights, tmp_path / "FOLDER")
    shutil.rmtree(tmp_path / "FOLDER" / "mllm")
    checkpoint.save_library_model(model, tmp_path / "FOLDER" / "mllm", torch.float32)
    tokenizer.save_pretrained(tmp_path / "FOLDER" / "mllm")
    with pytest.raises(CheckpointError, match="mllm: <BOI>, <EOI>, <BOV>, <EOV> must be one token each"):
        checkpoint.load(tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall("```python\n(.*?)```", (DOCS / "weights.md").read_text(), flags=re.S)
    exec(compile(lines, "weights.md", "exec"), {})
    omni = checkpoint.load(tmp_path / "FOLDER")
    text = omni.mllm_tokenizer("draw<BOV><EOV>", add_special_tokens=False).input_ids
    assert text[-2:] == omni.mllm_tokenizer.convert_tokens_to_ids(["<BOV>", "<EOV>"]) == [size + 2, size + 3]
    found = omni.mllm.get_input_embeddings().weight
    assert torch.equal(found[:rows], model.get_input_embeddings().weight) and len(found) == max(rows, size + 4)
    assert predict_route(omni.mllm, omni.mllm_tokenizer, MLLMMessage("a red circle"), omni.vision_config).kind in (
        "text",
        "image",
        "video",
    )


def test_a_text_question_is_not_affected_by_an_earlier_clip(omni):
    """transformers keeps the rotary offset of the last request with media."""
    talk = MLLMMessage("hello, who are you?")
    clip = MLLMMessage("what is this?", (MLLMMedia(np.zeros((9, 64, 64, 3), np.uint8), 8.0, True),))

    def said(message):
        return "".join(
            generate_answer(omni.mllm, omni.mllm_tokenizer, message, omni.vision_config, temperature=0.0, max_tokens=12)
        )

    omni.mllm.model.rope_deltas = None  # as in a new process
    first = said(talk)
    said(clip)
    assert said(talk) == first
