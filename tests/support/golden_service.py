"""The golden checkpoints for a whole service, each with an MLLM that vLLM serves on the CPU and that routes nothing.

    python -m tests.support.golden_service ARGUMENTS ...      the command line, with the presets in the golden sizes

The MLLMs of the golden data are too narrow for vLLM's code for the CPU. These are as wide as vLLM needs; so the tensors
that touch the MLLM's width are random, and all others are golden. Random weights would take routes of their own:
here every route has a probability below one half, so the planner asks the user, and the reply decides.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from omnivideo.models.choices import score_choices
from omnivideo.models.qwen3_vl import ROUTE_WORDS, tokenize_route_words
from omnivideo.models.vila import Vila
from omnivideo.models.vila_requests import find_routing_ids
from omnivideo.models.weights.published import locate_tensors
from omnivideo.presets import OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B, OMNIVIDEO_1_3B, PRESETS, Preset
from tests.support.golden import golden_folder, load_golden
from tests.support.published_folders import (
    CHECKPOINTS,
    narrow_to_golden,
    publish_golden,
    read_states,
    write_checkpoint,
    write_pickle,
)
from tests.support.qwen_weights import build_instruct_model, save_instruct_model
from tests.support.vila_weights import SERVICE_PRESETS, build_random_vila, save_vila

PUBLISHED = {"v1": OMNIVIDEO_1_3B, "single": OMNIVIDEO2_1_3B, "experts": OMNIVIDEO2_A14B}
MLLM_WIDTH = 64
CONDITION_TOKENS = 1536  # more than a caption of random words and the hidden states of a clip take
SIZE = {"width": 64, "height": 32, "fps": 8}
CONSTANT = 4.0  # the first component of every hidden state before the final norm
ROUTE_LOGITS = {"video": 0.0, "answer": 0.0, "decline": -0.3}  # times the first component; the other words get less
OTHER_LOGIT, ROUTING_LOGIT = -3.0, 8.0


def build_service_preset(kind: str) -> Preset:
    """Return a published preset with the golden sizes, this MLLM's width, and small clips as its defaults."""
    published = PUBLISHED[kind]
    sampling = {
        task: defaults.model_copy(update=SIZE | {"frames": 9 if defaults.frames > 1 else 1, "steps": 8})
        for task, defaults in published.sampling.items()
    }
    lengths = {"min_tokens": CONDITION_TOKENS, "max_tokens": CONDITION_TOKENS}
    condition = published.condition.model_copy(update=lengths)
    preset = narrow_to_golden(published, sampling=sampling, trained={}, condition=condition)
    update: dict[str, Any] = {"mllm_width": MLLM_WIDTH}
    if preset.vision_head is not None:
        update["vision_head"] = preset.vision_head.model_copy(update={"input_dim": MLLM_WIDTH})
    return preset.model_copy(update=update)


def register_presets() -> None:
    """Give the published presets of this process the golden sizes."""
    PRESETS.update({PUBLISHED[kind].name: build_service_preset(kind) for kind in PUBLISHED})


def run_command(*arguments: object, log: Path | None = None, **environment: str) -> "subprocess.Popen[bytes]":
    """Start the command line in a process that has these presets."""
    root = str(Path(__file__).parents[2])
    variables = os.environ | {"PYTHONPATH": root, SERVICE_PRESETS: "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "tests.support.golden_service", *map(str, arguments)]
    with (log or Path(os.devnull)).open("ab") as output:
        return subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)


def import_service_weights(kind: str, folder: Path) -> Path:
    """Write a published folder and import it with the command; return the imported folder."""
    publish_service_weights(kind, folder / "published")
    process = run_command("weights", "import", folder / "published", "-o", folder / "ours", log=folder / "import.log")
    assert process.wait(120) == 0, (folder / "import.log").read_text()
    return folder / "ours"


def publish_service_weights(kind: str, folder: Path) -> None:
    preset = build_service_preset(kind)
    publish_golden(folder, preset.name)
    generator = torch.Generator().manual_seed(5)
    for file, golden in CHECKPOINTS[preset.name].items():
        state = load_golden(golden)[0]
        for key, location in locate_tensors(preset).items():
            if state[key].shape != location.shape:
                state[key] = 0.1 * torch.randn(location.shape, generator=generator)
        write_checkpoint(folder / file, state)
    if kind != "v1":
        save_instruct_model(build_undecided_qwen(), folder / "Qwen3-VL")
        return
    context = read_states("v1_side_files", "context/")
    states = context["vlm_last_hidden_states"]
    lists = {key: [context[f"{key}.0"]] for key in ("text_emb", "text_emb_siglip2")}
    lists["vlm_last_hidden_states"] = torch.randn((*states.shape[:-1], MLLM_WIDTH), generator=generator)
    write_pickle(folder / "unconditioned_context" / "context.pkl", lists)
    shutil.rmtree(folder / "ar_model" / "checkpoint")
    save_vila(build_undecided_vila(), folder / "ar_model" / "checkpoint")


# ---------------------------------------------------------------- MLLMs that leave the route to the user


@torch.no_grad()
def fix_first_component(embeddings: nn.Embedding, layers: Iterable[Any], last_of_media: nn.Linear) -> None:
    """Give every hidden state the same first component, which no layer changes."""
    embeddings.weight[:, 0] = CONSTANT
    for layer in layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    last_of_media.weight[0] = 0
    last_of_media.bias[0] = CONSTANT


@torch.no_grad()
def set_logits(lm_head: nn.Linear, logits: Mapping[int, float]) -> None:
    """Let the logits of tokens depend on the first component alone."""
    for token_id, logit in logits.items():
        lm_head.weight[token_id] = 0
        lm_head.weight[token_id, 0] = logit


def build_undecided_vila() -> Vila:
    """Return a VILA whose answers begin with either routing token, both as likely."""
    vila = build_random_vila()
    fix_first_component(vila.llm.model.embed_tokens, vila.llm.model.layers, vila.projector.layers[-1])
    routing_ids = find_routing_ids(AutoTokenizer.from_pretrained(golden_folder() / "vila_ar_model" / "llm"))
    with torch.no_grad():
        random_ids = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))
        component = float(vila.llm.model(random_ids).last_hidden_state[..., 0].mean())
    set_logits(vila.llm.lm_head, dict.fromkeys(routing_ids.values(), ROUTING_LOGIT / component))
    return vila


def build_undecided_qwen() -> Any:
    """Return a dense Qwen3-VL for which a clip and words are as likely, and neither more likely than not."""
    model = build_instruct_model(experts=False, width=MLLM_WIDTH)
    visual, language = model.model.visual, model.model.language_model
    fix_first_component(language.embed_tokens, language.layers, visual.merger.linear_fc2)
    with torch.no_grad():
        for merger in visual.deepstack_merger_list:
            merger.linear_fc2.weight[0] = 0
            merger.linear_fc2.bias[0] = 0
    words = tokenize_route_words(AutoTokenizer.from_pretrained(golden_folder() / "qwen3vl"))
    set_logits(model.lm_head, choose_route_logits(words))
    return model


def choose_route_logits(words: list[list[int]]) -> dict[int, float]:
    """Return the logits of the tokens between which the route words branch."""
    logits: dict[int, float] = {}
    queries, answer = score_choices(words), None
    while True:
        try:
            query = queries.send(answer) if answer is not None else next(queries)
        except StopIteration as stop:
            probabilities = dict(zip(ROUTE_WORDS, stop.value, strict=True))
            break
        for token_id in query.token_ids:
            path = [*query.prefix_ids, token_id]
            reached = [ROUTE_LOGITS.get(word, OTHER_LOGIT) for word, ids in zip(ROUTE_WORDS, words, strict=True)
                       if ids[: len(path)] == path]  # fmt: skip
            logits[token_id] = max(reached)
        answer = [logits[token_id] for token_id in query.token_ids]
    clips = sum(probabilities[word] for word in ("video", "image", "edit"))
    assert max(clips, probabilities["answer"]) < 0.5 and probabilities["decline"] < 0.3, probabilities
    return logits


if __name__ == "__main__":
    register_presets()
    from omnivideo.cli.main import main

    main()
