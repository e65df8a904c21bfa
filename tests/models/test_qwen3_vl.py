"""A stock Qwen3-VL: version 2's three calls against the authors' own, routing by likelihoods, plans by a schema."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer, Qwen3VLMoeForConditionalGeneration

from omnivideo.agent.mllm_plan import TurnPlan, build_plan_schema, parse_plan
from omnivideo.models import qwen3_vl
from omnivideo.models.mllm import MLLMMedia, MLLMMessage, collate_requests, tokenize_message
from omnivideo.models.qwen3_vl import InstructQwen3VL
from omnivideo.presets import OMNIVIDEO2_A14B, QWEN3_VL_INPUT
from tests.support.golden import golden_folder, load_golden

CONFIG = OMNIVIDEO2_A14B.mllm
CAPTION_INPUT, FEATURE_INPUT = CONFIG.caption_input, CONFIG.feature_input
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
TENSORS, ABOUT = load_golden("qwen3vl")


@lru_cache(maxsize=1)
def load_mllm() -> InstructQwen3VL:
    folder = golden_folder() / "qwen3vl"
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return InstructQwen3VL(model, tokenizer, CONFIG)


def draw_clip() -> MLLMMedia:
    """Return the clip whose pixels the golden file describes by a formula."""
    clip = ABOUT["clip"]
    f, y, x, c = np.ogrid[: clip["frames"], : clip["height"], : clip["width"], :3]
    pixels = (((x // 8) * 5 + (y // 8) * 3 + f * (2 + 3 * c) + 60 * c) % 256).astype(np.uint8)
    return MLLMMedia(pixels, clip["fps"])


def source_message(text: str) -> MLLMMessage:
    return MLLMMessage(text, (draw_clip(),))


def tokens_of(message: MLLMMessage, config=CAPTION_INPUT) -> list[int]:
    return tokenize_message(load_mllm().tokenizer, message, config).token_ids


@pytest.mark.golden
def test_the_source_caption_is_asked_for_as_the_authors_do():
    message = qwen3_vl.build_source_caption_message(source_message(""), ABOUT["system_prompts"]["source"])
    request = tokenize_message(load_mllm().tokenizer, message, CAPTION_INPUT)
    assert request.token_ids == TENSORS["caption.input_ids"][0].tolist()
    assert request.grids["video"] == TENSORS["caption.video_grid_thw"].tolist()
    rows = request.patches["video"][0][TENSORS["caption.patch_rows"]]
    assert_close(rows, TENSORS["caption.patches"], rtol=0.0, atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "text"), [("v2v", "instruction"), ("t2v", "short_prompt")])
def test_the_target_caption_is_asked_for_as_the_authors_do(name, text):
    source_caption = ABOUT["source_caption_in_target_v2v"] if name == "v2v" else None
    system = ABOUT["system_prompts"]["target"]
    message = qwen3_vl.build_target_caption_message(MLLMMessage(ABOUT[text]), source_caption, system)
    assert tokens_of(message) == TENSORS[f"target_{name}.input_ids"][0].tolist()
    if (greedy := TENSORS.get(f"target_{name}.greedy_tokens")) is not None:
        bound = load_mllm()
        answer = "".join(bound.stream_answer(message, CAPTION_INPUT, temperature=0.0, max_tokens=len(greedy)))
        # The last bytes may be the beginning of a character, which is held back.
        encoded = tokenize_message(bound.tokenizer, message, CAPTION_INPUT)
        ids: list[int] = []
        for _ in greedy:
            ids.append(int(bound.compute_next_logits(encoded, ids).argmax()))
        assert ids == greedy.tolist()
        assert bound.tokenizer.decode(ids).startswith(answer)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "text"), [("v2v", "instruction"), ("t2v", "short_prompt")])
def test_the_features_are_the_authors(name, text):
    bound, system = load_mllm(), ABOUT["system_prompts"]["feature"]
    request = source_message(ABOUT[text]) if name == "v2v" else MLLMMessage(ABOUT[text])
    message = qwen3_vl.build_feature_message(request, system)
    encoded = tokenize_message(bound.tokenizer, message, FEATURE_INPUT)
    assert encoded.token_ids == TENSORS[f"feature_{name}.input_ids"][0].tolist()
    assert qwen3_vl.count_dropped_tokens(bound.tokenizer, message) == int(TENSORS[f"feature_{name}.drop"])
    if name == "v2v":
        assert encoded.grids["video"] == TENSORS["feature_v2v.video_grid_thw"].tolist()
        assert_close(encoded.patches["video"][0], TENSORS["feature_v2v.patches"], rtol=0.0, atol=1e-6)
    states, padding = bound.compute_kept_states([message])
    assert not padding.any()
    assert_close(states[0], TENSORS[f"feature_{name}.features"], **TOLERANCE)
    inputs = collate_requests([encoded], bound.tokenizer.pad_token_id)
    with torch.no_grad():
        after_norm = bound.model.model(**inputs).last_hidden_state[0]
    assert_close(after_norm, TENSORS[f"feature_{name}.last_hidden_state"], **TOLERANCE)


@pytest.mark.golden
def test_a_batch_has_the_features_of_each_request_alone():
    bound = load_mllm()
    messages = [MLLMMessage("a red ball", (), "See it."), MLLMMessage("a much longer wish for a blue ball")]
    states, padding = bound.compute_kept_states(messages)
    for index, message in enumerate(messages):
        alone, _ = bound.compute_kept_states([message])
        assert_close(states[index][~padding[index]], alone[0], **TOLERANCE)


@pytest.mark.golden
def test_the_states_after_the_norm_and_all_positions_can_be_had_too():
    bound, message = load_mllm(), MLLMMessage(ABOUT["short_prompt"], (), ABOUT["system_prompts"]["feature"])
    config = CONFIG.model_copy(update={"hidden_states": "after-norm", "kept_positions": "all"})
    states, _ = InstructQwen3VL(bound.model, bound.tokenizer, config).compute_kept_states([message])
    assert_close(states[0], TENSORS["feature_t2v.last_hidden_state"], **TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_by_a_schema_is_always_valid(seed):
    bound = load_mllm()
    message = MLLMMessage("make it blue, then say what it is", (), "Plan.", build_plan_schema(2))
    answer = "".join(bound.stream_text(message, temperature=30.0, top_p=1.0, max_tokens=6000, seed=seed))
    plan = TurnPlan.model_validate_json(answer)
    assert parse_plan(answer, 2) == list(plan.actions)


@pytest.mark.golden
def test_a_route_is_the_most_likely_choice_and_never_sampled():
    bound = load_mllm()
    first, second = (bound.route(MLLMMessage("make it blue")) for _ in range(2))
    assert first == second and 1 / 6 <= first.probability <= 1
    encoded = tokenize_message(
        bound.tokenizer, qwen3_vl.build_route_message(MLLMMessage("make it blue")), QWEN3_VL_INPUT
    )
    words = qwen3_vl.tokenize_route_words(bound.tokenizer)
    probabilities = bound.answer_queries(qwen3_vl.score_choices(words), encoded)
    assert sum(probabilities) == pytest.approx(1)
    with_source = bound.route(source_message("make it blue"))
    assert with_source.kind in ("video", "text", "ask", "decline")
