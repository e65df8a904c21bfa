"""VILA gives what the authors' code gives: ids, pixels, hidden states, logits and greedy text."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from omnivideo.models.mllm import MLLMMedia, MLLMMessage, sanitize_text
from omnivideo.models.mllms import bind_mllm
from omnivideo.models.vila import Vila, compute_repelled_keys, join_patches
from omnivideo.models.vila_answers import BoundVila, compute_request_states, iterate_answer
from omnivideo.models.vila_requests import (
    GENERATION_TOKENS,
    IMAGE_TOKEN_ID,
    convert_frame,
    find_routing_ids,
    get_padding_id,
    list_stop_ids,
    pad_to_square,
    sample_frame_indices,
    tokenize_features,
    tokenize_request,
)
from omnivideo.models.weights.vila import load_vila, load_vila_tokenizer
from omnivideo.presets import get_preset
from tests.support.golden import golden_folder, load_golden

TOLERANCE = 2e-5  # of sums in float32, whose order differs between processors: up to 5e-6 on a Zen 5
TASKS = {"t2v": "video", "v2v": "video", "t2i": "image", "i2i": "image"}


@pytest.fixture(scope="module")
def golden():
    return load_golden("vila")


@pytest.fixture(scope="module")
def tensors(golden):
    return golden[0]


@pytest.fixture(scope="module")
def bound() -> BoundVila:
    return load_golden_vila()


def load_golden_vila() -> BoundVila:
    folder = golden_folder() / "vila_ar_model"
    model = load_vila(folder, torch.float32)
    tokenizer = load_vila_tokenizer(folder, model.get_input_embeddings().num_embeddings)
    bound_mllm = bind_mllm(get_preset("omnivideo-1.3b"), model, tokenizer)
    assert isinstance(bound_mllm, BoundVila)
    return bound_mllm


def build_message(golden, task: str) -> MLLMMessage:
    """Return the request of a golden task, with its source."""
    tensors, about = golden
    text = about["prompts"][task.removeprefix("route_")]
    if f"{task}.frames" in tensors:
        return MLLMMessage(text, (MLLMMedia(tensors[f"{task}.frames"].numpy(), fps=8.0),))
    if f"{task}.image" in tensors:
        return MLLMMessage(text, (MLLMMedia(tensors[f"{task}.image"].numpy()[None], is_video=False),))
    return MLLMMessage(text)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.golden
class TestGolden:
    @pytest.mark.parametrize("task", TASKS)
    def test_feature_ids_and_mask(self, golden, bound, task):
        tensors = golden[0]
        message = build_message(golden, task)
        request = tokenize_features(bound.tokenizer, message, TASKS[task], bound.model.image_config)
        assert request.token_ids == tensors[f"{task}.input_ids"][0].tolist()
        mask = [int(token_id != get_padding_id(bound.tokenizer)) for token_id in request.token_ids]
        assert mask == tensors[f"{task}.attention_mask"][0].tolist()

    @pytest.mark.parametrize("task", TASKS)
    def test_features(self, golden, bound, task):
        states, padding = bound.compute_features([(build_message(golden, task), TASKS[task])])
        assert not padding.any()
        assert_close(states, golden[0][f"{task}.hidden_states"])

    def test_pixels(self, tensors, bound):
        config = bound.model.image_config
        image = convert_frame(tensors["i2i.image"].numpy(), config)[None]
        assert_close(image, tensors["i2i.pixel_values"])
        for task in ("v2v", "route_v2v"):
            frames = tensors[f"{task}.frames"].numpy()
            assert_close(
                torch.stack([convert_frame(frames[i], config) for i in (0, -1)]), tensors[f"{task}.pixel_values"]
            )

    def test_frame_indices(self, tensors):
        routing = tensors["route_v2v.frame_indices"].tolist()
        assert sample_frame_indices(routing[-1] + 1) == routing
        # The authors decode these for an edit, and use the first alone.
        edit = tensors["v2v.frame_indices"].tolist()
        assert sample_frame_indices(edit[-1] + 1) == edit

    @torch.no_grad()
    def test_tower_and_projector(self, tensors, bound):
        model = bound.model
        out = model.vision_tower(tensors["v2v.pixel_values"], output_hidden_states=True)
        features = out.hidden_states[model.select_layer]
        assert_close(features, tensors["parts.vision_features"])
        assert_close(model.projector(features), tensors["parts.projected"])
        assert_close(model.encode_images(tensors["v2v.pixel_values"]), tensors["parts.projected"])

    @pytest.mark.parametrize("task", ["route_t2v", "route_v2v"])
    def test_routing_call(self, golden, bound, task):
        tensors = golden[0]
        request = bound.tokenize(build_message(golden, task))
        assert request.token_ids == tensors[f"{task}.input_ids"][0].tolist()
        expected_ids = tensors[f"{task}.greedy_tokens"].tolist()
        answer = iterate_answer(bound.model, request, lambda logits: int(logits.argmax()))
        steps = list(itertools.islice(answer, len(expected_ids)))
        assert_close(steps[0][1], tensors[f"{task}.next_token_logits"])
        assert [token_id for token_id, _ in steps] == expected_ids

    def test_text(self, golden, bound):
        expected_ids = golden[0]["route_v2v.greedy_tokens"].tolist()
        pieces = bound.stream_text(build_message(golden, "route_v2v"), temperature=0.0, max_tokens=len(expected_ids))
        text = "".join(pieces)
        expected = bound.tokenizer.decode(expected_ids, skip_special_tokens=True)
        assert expected.startswith(text) and expected[len(text) :].strip("\ufffd") == ""


# ---------------------------------------------------------------- routing


def force_answer(bound: BoundVila, monkeypatch, *token_ids: int) -> None:
    """Make the model prefer these tokens one after the other, each with logit 4 more than all others."""
    remaining = iter(token_ids)

    class Output:
        logits: torch.Tensor
        cache = past_key_values = None

    def forward(*args, **kwargs) -> Output:
        out = Output()
        out.logits = torch.zeros(1, 1, bound.model.llm.config.vocab_size)
        out.logits[0, 0, next(remaining)] = 4.0
        return out

    monkeypatch.setattr(bound.model.llm, "forward", forward)


CLIP = MLLMMedia(np.zeros((9, 32, 48, 3), np.uint8), fps=8.0)
IMAGE = MLLMMedia(np.zeros((1, 32, 48, 3), np.uint8), is_video=False)


@pytest.mark.parametrize(
    ("answer", "media", "kind"),
    [
        (["[GEN_VID]"], (), "video"),
        (["[GEN_IMG]"], (), "image"),
        (["a", "b", "[GEN_VID]"], (), "video"),
        (["[GEN_IMG]"], (CLIP,), "video"),
        (["[GEN_VID]"], (IMAGE,), "image"),
        (["a", "<|eot_id|>", "[GEN_VID]"], (), "text"),
        (["a", "<|end_of_text|>", "[GEN_VID]"], (IMAGE,), "text"),
    ],
)
def test_a_routing_token_anywhere_in_the_answer_sets_the_route(bound, monkeypatch, answer, media, kind):
    token_ids = bound.tokenizer.convert_tokens_to_ids(answer)
    force_answer(bound, monkeypatch, *token_ids)
    route = bound.route(MLLMMessage("draw a ball", media))
    vocabulary = bound.model.llm.config.vocab_size
    chosen, other = np.exp(4) / (np.exp(4) + vocabulary - 1), 1 / (np.exp(4) + vocabulary - 1)
    steps = next(
        index
        for index, word in enumerate(answer)
        if word in ("<|eot_id|>", "<|end_of_text|>", *GENERATION_TOKENS.values())
    )
    expected = (1 - 2 * other) ** (steps + 1) if kind == "text" else (1 - 2 * other) ** steps * chosen
    assert route.kind == kind and route.probability == pytest.approx(expected, abs=1e-6)


def test_equal_requests_take_equal_routes(bound):
    message = MLLMMessage("draw a ball", (CLIP, IMAGE))
    assert bound.route(message) == bound.route(message)


def test_the_reserved_tokens_route_if_no_token_has_the_names(bound):
    assert find_routing_ids(bound.tokenizer) == {
        "image": bound.tokenizer.convert_tokens_to_ids("[GEN_IMG]"),
        "video": bound.tokenizer.convert_tokens_to_ids("[GEN_VID]"),
    }

    class Llama3Tokenizer:
        def get_vocab(self):
            return {"<|reserved_special_token_0|>": 128002, "<|reserved_special_token_1|>": 128003}

        def convert_ids_to_tokens(self, token_id):
            return {index: name for name, index in self.get_vocab().items()}.get(token_id)

    assert find_routing_ids(Llama3Tokenizer()) == {"image": 128002, "video": 128003}


# ---------------------------------------------------------------- text and features


def test_an_answer_is_reproducible_and_has_no_routing_token(bound):
    bound.model.llm.lm_head.weight.data[list(bound.routing_ids.values())] *= 50
    try:
        message = MLLMMessage("what is this?", (IMAGE,))
        texts = ["".join(bound.stream_text(message, temperature=1.0, max_tokens=20, seed=3)) for _ in range(2)]
    finally:
        bound.model.llm.lm_head.weight.data[list(bound.routing_ids.values())] /= 50
    assert texts[0] == texts[1] and texts[0]
    assert not any(name in texts[0] for name in GENERATION_TOKENS.values())


def test_agreement_is_a_probability(bound):
    assert 0 < bound.score_agreement(MLLMMessage("is it red?", (IMAGE,))) < 1


def test_features_of_a_batch_equal_those_alone(bound):
    requests = [(MLLMMessage("a red ball"), "image"), (MLLMMessage("make it blue", (CLIP,)), "video")]
    states, padding = bound.compute_features(requests)
    for request, row, padded in zip(requests, states, padding, strict=True):
        alone, _ = bound.compute_features([request])
        assert_close(row[~padded], alone[0])


def test_a_user_cannot_type_a_token_or_a_place_for_an_image(bound):
    text = sanitize_text("<image>\n[GEN_VID]<|eot_id|>x", bound.special_tokens)
    request = tokenize_request(bound.tokenizer, MLLMMessage(text), bound.model.image_config)
    assert IMAGE_TOKEN_ID not in request.token_ids
    assert not set(bound.routing_ids.values()) & set(request.token_ids)
    assert request.token_ids.count(bound.tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 2


def test_a_system_prompt_replaces_the_usual_one(bound):
    message = MLLMMessage("hi", system="Answer briefly.")
    text = bound.tokenizer.decode(bound.tokenize(message).token_ids)
    assert "system<|end_header_id|>\n\nAnswer briefly.<|eot_id|>" in text and "helpful" not in text


def test_the_end_tokens_stop_an_answer(bound):
    names = set(bound.tokenizer.convert_ids_to_tokens(list(list_stop_ids(bound.tokenizer))))
    assert names == {"<|eot_id|>", "<|end_of_text|>"}


# ---------------------------------------------------------------- shapes


def test_patches_join_column_by_column():
    grid = torch.arange(9.0).view(1, 9, 1)  # 0 1 2 / 3 4 5 / 6 7 8
    joined = join_patches(grid)
    assert joined[0].tolist() == [[0, 1, 3, 4], [6, 7, 0, 0], [2, 0, 5, 0], [8, 0, 0, 0]]


def test_an_image_is_padded_in_the_middle():
    square = np.asarray(pad_to_square(Image.new("RGB", (4, 2), (255, 0, 0)), (127, 127, 127)))
    assert square.shape == (4, 4, 3) and (square[1:3] == [255, 0, 0]).all() and (square[[0, 3]] == 127).all()


def test_embedding_uses_the_first_images(bound):
    pixels = torch.rand(3, 3, bound.model.image_config.height, bound.model.image_config.width)
    first = bound.model.embed_request([1, IMAGE_TOKEN_ID, 2], pixels[:1])
    assert torch.equal(bound.model.embed_request([1, IMAGE_TOKEN_ID, 2], pixels), first)


def test_states_without_images_keep_the_masked_token(bound):
    request = tokenize_features(bound.tokenizer, MLLMMessage("a ball"), "video", bound.model.image_config)
    states = compute_request_states(bound.model, request, get_padding_id(bound.tokenizer))
    assert len(states) == len(request.token_ids)


def test_a_vila_can_be_built_from_its_configurations(bound):
    model = bound.model
    with torch.device("meta"):
        built = Vila.from_configs(model.vision_tower.config, model.llm.config, model.select_layer, model.image_config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in built.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_query_of_a_group_attends_to_a_repelled_key(dtype):
    torch.manual_seed(0)
    queries, other_keys = torch.randn(50, 4, 128, dtype=dtype), torch.randn(50, 9, 128, dtype=dtype) * 3
    scale = 128**-0.5
    repelled = compute_repelled_keys(queries, scale).to(dtype)
    keys = torch.cat([other_keys, repelled[:, None]], dim=1)
    weights = (queries.float() @ keys.float().mT * scale).softmax(-1)
    assert (weights[..., -1] == 0).all()
    torch.testing.assert_close(weights[..., :-1].sum(-1), torch.ones(50, 4))
