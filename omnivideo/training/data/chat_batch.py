"""Batches of requests and answers for the MLLM, and the loss over the answers."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from omnivideo.models.mllm import MLLMMessage, TokenizedRequest, add_position_ids, collate_requests, tokenize_message
from omnivideo.presets import VisionInputConfig
from omnivideo.training.engine.data_parallel import current_rank

ChatSample = tuple[MLLMMessage, str]


def make_answer_labels(
    encoded_samples: list[TokenizedRequest], prompt_lengths: list[int], inputs: dict[str, Tensor]
) -> Tensor:
    """Return labels [B, N]: the tokens of the answer and its end, and -100 over the prompt and the padding."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (encoded, start) in enumerate(zip(encoded_samples, prompt_lengths, strict=True)):
        labels[row, start : len(encoded.token_ids)] = torch.tensor(encoded.token_ids[start:])
    return labels


def collate_chat_batch(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    samples: list[ChatSample],
    pixels: VisionInputConfig,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the model inputs with position ids, and the labels, of a list of samples."""
    encoded = [tokenize_message(tokenizer, message, pixels, reply) for message, reply in samples]
    prompt_lengths = [
        len(sample.token_ids) - len(tokenizer(f"{reply}<|im_end|>").input_ids)
        for sample, (_, reply) in zip(encoded, samples, strict=True)
    ]
    inputs = collate_requests(encoded, tokenizer.pad_token_id)
    return add_position_ids(model, inputs), make_answer_labels(encoded, prompt_lengths, inputs)


def to_device(device: torch.device, batch: tuple[dict[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the result of `collate_chat_batch` on a device."""
    inputs, labels = batch
    return {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)


def count_answer_tokens(labels: Tensor) -> Tensor:
    """Return the number of tokens to predict."""
    return (labels[:, 1:] != -100).sum()


def text_loss(logits: Tensor, labels: Tensor, token_count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the loss of Eq. 2 over the answers' tokens, and the share of answers with every token right.

    `token_count` is the mean number of tokens in a pass over all processes; None computes it for a single pass.
    """
    predicted, target = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(predicted.flatten(0, 1).float(), target.flatten(), ignore_index=-100, reduction="sum")
    token_count = current_rank().global_mean(count_answer_tokens(labels)) if token_count is None else token_count
    loss = total / token_count.clamp(min=1e-6)  # 0 if the batch has no answer
    exact_share = ((predicted.argmax(-1) == target) | (target == -100)).all(dim=1).float().mean()
    return loss, exact_share


def answer_loss(
    model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor], labels: Tensor, token_count: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the results of `text_loss`, with logits for the answers' tokens alone."""
    targets = labels[:, 1:]
    is_answer = targets != -100
    logits = model.lm_head(model.model(**inputs).last_hidden_state[:, :-1][is_answer])
    total = F.cross_entropy(logits.float(), targets[is_answer], reduction="sum")
    is_wrong = torch.zeros_like(is_answer)
    is_wrong[is_answer] = logits.argmax(-1) != targets[is_answer]
    return total / token_count.clamp(min=1e-6), (~is_wrong.any(dim=1)).float().mean()
