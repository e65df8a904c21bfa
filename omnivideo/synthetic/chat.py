"""Chat examples about scenes: what a user says and shows, and the correct answer."""

import random
from dataclasses import dataclass, replace

from omnivideo.contracts import THINK_END, THINK_START
from omnivideo.synthetic.captions import describe_scene
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.indirect_requests import BACKGROUND_HINTS, COLOUR_HINTS, MOTION_HINTS, SHAPE_HINTS
from omnivideo.synthetic.questions import QUESTION_WEIGHTS, ask_layout, sample_question
from omnivideo.synthetic.requests import get_medium_prefix, make_caption_prompt, make_indirect_prompt
from omnivideo.synthetic.scenes import Scene, sample_scene

THINK_SYSTEM_PROMPT = "think"
SMALL_TALK = {
    "hello": "hello, what shall i draw?", "hi": "hello, what shall i draw?", "good morning": "good morning to you",
    "thank you": "you are welcome", "thanks": "you are welcome", "who are you?": "i am omnivideo",
    "what can you do?": "i make, change and understand pictures and videos of shapes", "goodbye": "goodbye",
    "how are you?": "i am fine, thank you", "what is your name?": "my name is omnivideo",
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
    scene = sample_scene(rng, is_video)
    question = ask_layout(rng, scene) if rng.random() < 0.1 else sample_question(rng, scene, QUESTION_WEIGHTS)
    return ChatExample(question.text, question.answer, scene)


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
    example = ChatExample(text, plain_text)
    return add_reasoning(example, reasoning) if rng.random() < thinking_probability else example


def make_edit_example(rng: random.Random, is_video: bool, thinking_probability: float = 0.5) -> ChatExample:
    """Return an instruction for an attached source, restated as a caption of the target."""
    edit = sample_edit(rng, is_video)
    restatement = get_medium_prefix(is_video) + describe_scene(edit.target)
    example = ChatExample(edit.instruction, restatement, edit.source)
    if rng.random() < thinking_probability:
        return add_reasoning(example, f"now it is {describe_scene(edit.source)}")
    return example


def make_thinking_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a request in think mode, with or without a source."""
    return rng.choice((make_prompt_example, make_edit_example))(rng, is_video, 1.0)


def make_knowledge_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a question about the meaning of a hint. Held-out hints occur too: a large model knows these facts."""
    table = rng.choice((SHAPE_HINTS, COLOUR_HINTS, BACKGROUND_HINTS, MOTION_HINTS))
    name = rng.choice(list(table))
    hint = rng.choice(table[name])
    if table is COLOUR_HINTS:
        return ChatExample(f"what colour is {hint}?", name)
    if table is MOTION_HINTS:
        return ChatExample(f"how does it move if {hint}?", name)
    if table is SHAPE_HINTS:
        return ChatExample(f"what is {hint}?", name)
    return ChatExample(f"what colour is {hint.removeprefix('the colour of ')}?", name)


def make_talk_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a piece of small talk."""
    text, reply = rng.choice(list(SMALL_TALK.items()))
    return ChatExample(text, reply)
