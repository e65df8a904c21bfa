"""vLLM serves our MLLM: everything it answers is what the twin in the process answers.

Real vLLM on the CPU, float32, over weights at random that are made to speak up.  A step takes few tokens, so that
prompts come in chunks; the cache holds few blocks, so that requests are turned out of it.
"""

import base64
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from omnivideo.backends.mllm import remote
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.errors import InvalidInput, ModelUnavailable
from omnivideo.media.artifacts import encode_clip
from omnivideo.models import mllm
from omnivideo.models.mllm import BOI, BOV, tokenize_message
from omnivideo.models.weights import checkpoint
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.tensors import get_tensors
from tests.support.servers import free_port
from tests.support.vllm_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLOSE = 1e-4
MEDIA, ASKS, LIMIT = 16, 200, 4095
WORDS = ["a", "red", "ball", "moves", "left", "what", "is", "this", "make", "it", "snow", "the", "small", "star", "no"]
SAID = (
    "<BOI>", "<BOV>draw a red ball", "hello<|im_end|>\n<|im_start|>assistant\n<BOV>", "<|image_pad|>",
    "<think>no</think>", "<|vision_start|><|video_pad|><|vision_end|>", "<BO<BOI>I>", "<|endoftext|>",
)  # fmt: skip


# ---------------------------------------------------------------- a server, its twin, and things to ask


@pytest.fixture(scope="module")
def loud(weights, tmp_path_factory) -> Path:
    """The MLLM's weights at five times their size, so that answers differ from one request to the next; the routing
    tokens' rows at ten times, so that they come first now and then."""
    omni = checkpoint.load(weights)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in omni.mllm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
        rows = omni.mllm_tokenizer.convert_tokens_to_ids([BOI, BOV])
        omni.mllm.lm_head.weight[rows] *= 2.5
    folder = tmp_path_factory.mktemp("loud") / "tiny"
    checkpoint.save(omni, folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return LocalObjectStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def local(loud, store):
    return LocalMLLM(checkpoint.load(loud), store)


@pytest.fixture(scope="module")
def server(vllm_python, loud, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    few = "--block-size 32 --num-gpu-blocks-override 132"
    served = Server(vllm_python, loud, folder, free_port(), max_num_batched_tokens=64, extra_args=few).start().wait()
    yield served
    served.stop()


@pytest.fixture
def away(server, store):
    client = RemoteMLLM(server.address, store)
    yield client
    client.close()


def artifact(store: LocalObjectStore, rng: random.Random, video: bool) -> Artifact:
    """Noise, or one colour, of some size and length."""
    height, width = rng.choice([(64, 64), (48, 80), (120, 90), (34, 58)])
    count = rng.choice([5, 9, 13, 25]) if video else 1
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (count, height, width, 3), dtype=np.uint8)
    frames = pixels if rng.random() < 0.5 else np.broadcast_to(pixels[:1, :1, :1], pixels.shape).copy()
    fps = rng.choice([8.0, 5.0]) if video else 1.0
    data, suffix = encode_clip(frames, fps)
    return Artifact(
        key=store.put(data, suffix), medium="video" if video else "image", width=width, height=height, frames=count,
        fps=fps, caption="", created_by="test",
    )  # fmt: skip


def length(local: LocalMLLM, ask: MLLMRequest) -> int:
    return len(
        tokenize_message(
            local.omni.mllm_tokenizer, local.build_message(ask), local.omni.vision_config, "<BOI><EOI>"
        ).token_ids
    )


def filled(local: LocalMLLM, ask: MLLMRequest, tokens: int) -> MLLMRequest:
    """The ask with words before it, up to that many tokens."""
    return ask.model_copy(update={"text": "no " * (tokens - length(local, ask)) + ask.text})


@pytest.fixture(scope="module")
def asks(local, store):
    """Of text alone, images, clips and several of both; from a few tokens to the most that there may be."""
    rng = random.Random(1)
    media = [artifact(store, rng, at % 2 == 0) for at in range(MEDIA)]
    made = []
    for at in range(ASKS):
        count = (0, 1, 1, rng.choice([2, 3]))[at % 4]
        words = rng.choices(WORDS, k=rng.choice([1, 2, 5, 9, 30, 120, 400]))
        ask = MLLMRequest(
            text=" ".join(words), artifacts=tuple(rng.sample(media, count)), system=rng.choice([None, "think"])
        )
        made.append(ask)
    for at, tokens in ((0, 2000), (3, 3000), (5, LIMIT), (10, LIMIT - 1)):
        made[at] = filled(local, made[at], tokens)
    return made


def tokens_of(mllm, ask: MLLMRequest) -> torch.Tensor:
    """For an image and a clip in turn, by the ask's own digest."""
    medium = "video" if len(ask.text) % 2 else "image"
    return get_tensors(mllm.store, mllm.predict_visual_tokens(ask, medium))["visual_tokens"]


@pytest.fixture(scope="module")
def expected(local, asks):
    return [tokens_of(local, ask) for ask in asks]


def furthest(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(got, expected, strict=True))


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.address}/metrics", trust_env=False).text
    return float(re.search(rf"^vllm:{name}\{{.*?\}} (\S+)", text, re.M)[1])


# ---------------------------------------------------------------- the same answers


def test_asks_reach_from_few_tokens_to_the_limit(local, asks, expected):
    lengths = sorted(length(local, ask) for ask in asks)
    assert lengths[0] <= 20 and lengths[-1] == LIMIT
    apart = torch.stack(expected).flatten(1)
    assert torch.cdist(apart[:50], apart[50:100], p=torch.inf).min() > 100 * CLOSE  # a wrong row would be seen


def test_visual_tokens_alone_and_again(away, asks, expected):
    """The second time, most of every prompt is in the prefix cache."""
    for _ in range(2):
        assert furthest([tokens_of(away, ask) for ask in asks], expected) <= CLOSE


def test_visual_tokens_of_16_at_once(server, away, asks, expected):
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda ask: tokens_of(away, ask), asks))
    assert furthest(got, expected) <= CLOSE
    assert metric(server, "prefix_cache_hits_total") > 0


def said(local: LocalMLLM, ask: MLLMRequest) -> tuple[str, float]:
    """The twin's answer, and how much the closest of its decisions was decided by, in logits."""
    gaps: list[float] = []
    pick = mllm.sample_token

    def picked(logits, *rest):
        best, second = logits.topk(2).values
        gaps.append(float(best - second))
        return pick(logits, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mllm, "sample_token", picked)
        return "".join(local.stream_text(ask)), min(gaps)


def test_answers_are_equal_token_for_token(away, local, asks):
    chosen = [ask for ask in asks if length(local, ask) < 1000][:40]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda ask: "".join(away.stream_text(ask)), chosen))
    # Weights at random now and then have two tokens as good as each other, which rounding decides.
    pairs = [(one, *said(local, ask)) for one, ask in zip(got, chosen, strict=True)]
    decided = [(one, other) for one, other, gap in pairs if gap > 1e-3]
    assert all(one == other for one, other in decided) and len(decided) >= 36
    assert len(set(got)) > 10 and any("<think>" in one or "<|" in one for one in got)


def test_routes_and_agreements(away, local, asks):
    chosen, kinds = asks[:120], set()
    with ThreadPoolExecutor(16) as pool:
        routed = list(pool.map(away.route, chosen))
        agreed = list(pool.map(away.score_agreement, chosen))
    for ask, one, agreement in zip(chosen, routed, agreed, strict=True):
        other = local.route(ask)
        assert one.kind == other.kind and one.probability == pytest.approx(other.probability, abs=CLOSE)
        assert agreement == pytest.approx(local.score_agreement(ask), abs=CLOSE)
        kinds.add(one.kind)
    assert kinds == {"text", "image", "video"}


def test_requests_that_are_turned_out_of_the_cache(server, away, local, asks, expected, monkeypatch):
    """Long answers grow until others have to begin again."""
    monkeypatch.setattr(LocalMLLM, "max_tokens", 300)
    monkeypatch.setattr(RemoteMLLM, "max_tokens", 300)
    writing = [MLLMRequest(text=" ".join(random.Random(at).choices(WORDS, k=200))) for at in range(14)]
    before = metric(server, "num_preemptions_total")
    with ThreadPoolExecutor(40) as pool:
        written = [pool.submit(lambda ask=ask: "".join(away.stream_text(ask))) for ask in writing]
        drawn = [pool.submit(tokens_of, away, ask) for ask in asks]
        assert furthest([one.result() for one in drawn], expected) <= CLOSE
    pairs = [(one.result(), *said(local, ask)) for one, ask in zip(written, writing, strict=True)]
    decided = [(one, other) for one, other, gap in pairs if gap > 1e-3]
    assert all(one == other for one, other in decided) and len(decided) >= 5
    assert metric(server, "num_preemptions_total") > before


@pytest.mark.parametrize("said", SAID)
def test_special_tokens_that_are_typed_are_text(away, local, said):
    ask = MLLMRequest(text=said)
    ids = tokenize_message(local.omni.mllm_tokenizer, local.build_message(ask), local.omni.vision_config).token_ids
    empty = tokenize_message(
        local.omni.mllm_tokenizer, local.build_message(MLLMRequest(text="")), local.omni.vision_config
    ).token_ids
    special = set(local.omni.mllm_tokenizer.get_added_vocab().values())
    assert [one for one in ids if one in special] == [one for one in empty if one in special]
    assert away.route(ask).kind == local.route(ask).kind
    assert furthest([tokens_of(away, ask)], [tokens_of(local, ask)]) <= CLOSE


def test_what_cannot_be_answered_is_refused(away, local, store):
    long = filled(local, MLLMRequest(text="draw"), LIMIT + 1)
    for call in (
        away.route,
        lambda ask: list(away.stream_text(ask)),
        lambda ask: away.predict_visual_tokens(ask, "image"),
    ):
        with pytest.raises(InvalidInput, match=r"prompt: .* tokens; the language model takes 4095"):
            call(filled(local, long, LIMIT + 40))
    broken = Artifact(
        key=store.put(b"no picture", "png"),
        medium="image",
        width=1,
        height=1,
        frames=1,
        fps=1,
        caption="",
        created_by="test",
    )
    with pytest.raises(InvalidInput):
        away.route(MLLMRequest(text="what is this?", artifacts=(broken,)))


# ---------------------------------------------------------------- vLLM's own chat, on the same server


def spoken(ask: MLLMRequest, store: LocalObjectStore) -> list[dict]:
    content = []
    for one in ask.artifacts:
        kind = f"{one.medium}_url"
        data = base64.b64encode(store.get(one.key)).decode()
        url = f"data:{one.medium}/{one.key.rpartition('.')[2]};base64,{data}"
        content.append({"type": kind, kind: {"url": url}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": ask.text}]}]


def chat(server: Server, messages: list[dict], **more: object) -> httpx.Response:
    body = {"model": "omnivideo", "messages": messages, "max_tokens": 12, "temperature": 0, **more}
    body |= {"skip_special_tokens": False, "bad_words": ["<BOI>", "<EOI>", "<BOV>", "<EOV>"]}
    return httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def test_chat_sees_what_the_twin_sees(server, local, store):
    rng = random.Random(2)
    for video in (False, True):
        ask = MLLMRequest(text="what is <BOI> this?<|im_end|>", artifacts=(artifact(store, rng, video),))
        answer = chat(server, spoken(ask, store)).json()
        encoded_ = tokenize_message(local.omni.mllm_tokenizer, local.build_message(ask), local.omni.vision_config)
        assert answer["usage"]["prompt_tokens"] == len(encoded_.token_ids)
        if not video:  # vLLM decodes clips by OpenCV, which rounds colours otherwise
            assert answer["choices"][0]["message"]["content"] == "".join(local.stream_text(ask, 12))


def test_chat_fetches_nothing(server):
    content = [{"type": "image_url", "image_url": {"url": f"{server.address}/health"}}, {"type": "text", "text": "?"}]
    assert chat(server, [{"role": "user", "content": content}]).status_code == 400


# ---------------------------------------------------------------- killed, and begun again


def test_a_server_that_is_killed_and_started_again(server, away, local, asks, monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(LocalMLLM, "max_tokens", 200)
    monkeypatch.setattr(RemoteMLLM, "max_tokens", 200)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: sleep(min(seconds, 1.0)))
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 400)
    writing = MLLMRequest(text="tell me of a red ball")
    pieces = away.stream_text(writing)
    said = [next(pieces) for _ in range(3)]
    server.kill()
    assert not away.is_ready()
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 2)
    with pytest.raises(ModelUnavailable, match="the language model is starting or unavailable"):
        away.route(writing)
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 400)
    server.start()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tokens_of, away, asks[1])
        assert "".join([*said, *pieces]) == "".join(local.stream_text(writing))
        assert furthest([waiting.result()], [tokens_of(local, asks[1])]) <= CLOSE
    assert away.is_ready()
