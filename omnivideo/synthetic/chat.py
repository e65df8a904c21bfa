"""Chat examples about scenes: what a user says and shows, and the correct answer."""

import random
from dataclasses import dataclass, replace

from omnivideo.contracts import THINK_END, THINK_START
from omnivideo.synthetic.captions import describe_scene
from omnivideo.synthetic.contradictions import sample_contradiction
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.knowledge import sample_knowledge_question
from omnivideo.synthetic.questions import QUESTION_WEIGHTS, ask_layout, sample_question
from omnivideo.synthetic.refusals import sample_refusal
from omnivideo.synthetic.requests import (
    CONTINUATION_TASKS,
    make_caption_prompt,
    make_indirect_prompt,
    restate_scene,
    sample_continuation_request,
)
from omnivideo.synthetic.scenes import CLIP_FRAMES, LONG_CLIP_FRAMES, Scene, sample_scene
from omnivideo.synthetic.wording import vary_wording

THINK_SYSTEM_PROMPT = "think"
ABILITIES = "i make, change and understand pictures and videos of shapes"
WELCOME, GREETING = "you are welcome", "hello, what shall i draw?"
SMALL_TALK = {
    "hello": GREETING, "hi": GREETING, "hey there": GREETING, "hi, how is it going?": "i am fine, thank you",
    "good morning": "good morning to you", "good evening": "good evening to you", "thank you": WELCOME,
    "thanks": WELCOME, "thanks a lot": WELCOME, "thank you so much": WELCOME, "cheers": WELCOME,
    "that is great": "i am glad that you like it", "nice": "i am glad that you like it",
    "i love it": "i am glad that you like it", "well done": "i am glad that you like it",
    "perfect": "i am glad that you like it", "wow": "i am glad that you like it",
    "that looks good": "i am glad that you like it", "who are you?": "i am omnivideo",
    "what are you?": "i am omnivideo", "who made you?": "i am omnivideo", "are you a robot?": "i am omnivideo",
    "what can you do?": ABILITIES, "what do you do?": ABILITIES, "how can you help me?": ABILITIES,
    "what should i ask you?": ABILITIES, "goodbye": "goodbye", "bye": "goodbye", "see you later": "goodbye",
    "how are you?": "i am fine, thank you", "how do you feel today?": "i am fine, thank you",
    "how is it going?": "i am fine, thank you",
    "what is your name?": "my name is omnivideo", "do you have a name?": "my name is omnivideo",
}  # fmt: skip


@dataclass(frozen=True)
class ChatExample:
    """One user turn with its answer. `shown` is the scene that the user attaches; `system` names a mode."""

    text: str
    answer: str
    shown: Scene | None = None
    system: str | None = None


def make_question_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a question about an attached image or clip."""
    scene = sample_scene(rng, is_video, composed_share=0.3, frame_count=sample_length(rng))
    question = ask_layout(rng, scene) if rng.random() < 0.1 else sample_question(rng, scene, QUESTION_WEIGHTS)
    return ChatExample(vary_wording(rng, question.text), question.answer, scene)


def sample_length(rng: random.Random) -> int:
    """Return the number of frames of a clip: a fifth of them are long."""
    return LONG_CLIP_FRAMES if rng.random() < 0.2 else CLIP_FRAMES


def add_reasoning(example: ChatExample, reasoning: str) -> ChatExample:
    """Return the example in think mode: the answer starts with the reasoning."""
    answer = f"{THINK_START}{reasoning}{THINK_END}{example.answer}"
    return replace(example, system=THINK_SYSTEM_PROMPT, answer=answer)


def make_prompt_example(rng: random.Random, is_video: bool, thinking_probability: float = 0.5) -> ChatExample:
    """Return a direct or indirect request without a source, restated plainly, in think mode or not."""
    if rng.random() < 0.5:
        text, reasoning, plain_text = make_indirect_prompt(rng, is_video)
    else:
        (text, plain_text), reasoning = make_caption_prompt(rng, is_video), "this is plain"
    example = ChatExample(vary_wording(rng, text), plain_text)
    return add_reasoning(example, reasoning) if rng.random() < thinking_probability else example


def make_edit_example(rng: random.Random, is_video: bool, thinking_probability: float = 0.7) -> ChatExample:
    """Return an instruction for an attached source, restated as a caption of the target with the places."""
    edit = sample_edit(rng, is_video, composed_share=0.5, frame_count=sample_length(rng))
    restatement = restate_scene(edit.target, with_places=True)
    example = ChatExample(vary_wording(rng, edit.instruction), restatement, edit.source)
    if rng.random() < thinking_probability:
        return add_reasoning(example, f"now it is {describe_scene(edit.source, with_places=True)}")
    return example


def make_continuation_example(rng: random.Random, is_video: bool, thinking_probability: float = 0.7) -> ChatExample:
    """Return an instruction to animate a still or to continue a clip, restated as a caption of the result."""
    request = sample_continuation_request(rng, CONTINUATION_TASKS[int(is_video)], rewrite_probability=0.0)
    assert request.source is not None
    restatement = restate_scene(request.target, with_places=True)
    example = ChatExample(vary_wording(rng, request.text), restatement, request.source)
    if rng.random() < thinking_probability:
        return add_reasoning(example, f"now it is {describe_scene(request.source, with_places=True)}")
    return example


def make_thinking_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a request in think mode, with or without a source."""
    return rng.choice((make_prompt_example, make_edit_example))(rng, is_video, 1.0)


def make_knowledge_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a question about a fact. Held-out facts occur too: a large model knows them."""
    question, answer = sample_knowledge_question(rng)
    example = ChatExample(question, answer)
    return add_reasoning(example, answer) if rng.random() < 0.5 else example


def make_refusal_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a request that the world cannot fulfil, or that contradicts itself, sometimes about an attached scene.

    The answer is the same in think mode.
    """
    if rng.random() < 0.7:
        refusal = sample_refusal(rng, "train")
        text, answer = refusal.text, refusal.answer
    else:
        contradiction = sample_contradiction(rng, "train")
        text, answer = contradiction.text, contradiction.answer
    shown = sample_scene(rng, is_video, composed_share=0.5) if rng.random() < 0.5 else None
    example = ChatExample(vary_wording(rng, text), answer, shown)
    return replace(example, system=THINK_SYSTEM_PROMPT) if rng.random() < 0.3 else example


def make_talk_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a piece of small talk, sometimes with a scene attached: the conversation has one."""
    text, reply = rng.choice(list(SMALL_TALK.items()))
    shown = sample_scene(rng, is_video) if rng.random() < 0.4 else None
    return ChatExample(vary_wording(rng, text), reply, shown)
