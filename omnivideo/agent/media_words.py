"""Rules on English text: whether a request asks for another medium than its source has, for more of it, or a frame."""

import re

from omnivideo.contracts import FramePosition, Medium

SOURCE = r"(?:it|this|that|them|these|(?:the|this|that|my)(?: [\w-]+){1,4}?)"
CLIP_NOUN = r"(?:clip|video|animation|movie|gif)"
STILL_NOUN = r"(?:picture|image|photo|still|frame|screenshot|snapshot)"
MOVING = (
    r"(?:move|rise|fall|fly|float|drift|slide|spin|rotate|turn round|bounce|jump|dance|swing|go (?:left|right|up|down)"
    r"|grow and shrink)"
)
MOTION_REQUEST = re.compile(
    rf"\banimat(?:e|ing)\b|\b(?:in|into) motion\b|\bbring {SOURCE} to life\b"
    rf"|\b(?:make|let|have) {SOURCE} (?:slowly |quickly |gently )?(?:start (?:to )?)?{MOVING}(?:ing)?\b"
    rf"|\b(?:make|turn|convert|change|transform) {SOURCE} (?:in)?to an? (?:[\w-]+ ){{0,2}}{CLIP_NOUN}\b"
    rf"|\ban? (?:[\w-]+ ){{0,2}}{CLIP_NOUN} (?:of|from|out of|with) {SOURCE}(?=$|[\s.,!?])",
    re.IGNORECASE,
)
STILL_REQUEST = re.compile(
    rf"\b(?:make|turn|convert|change|transform) {SOURCE} (?:in)?to an? (?:[\w-]+ ){{0,2}}{STILL_NOUN}\b"
    rf"|\bmake (?:it|this|that) (?:just )?an? (?:[\w-]+ )?{STILL_NOUN}(?=$|[.,!?]| (?:please|instead|again|now))"
    rf"|\ban? (?:[\w-]+ ){{0,2}}{STILL_NOUN} (?:of|from|out of)"
    rf" (?:{SOURCE}|(?:its|the|that) (?:first|last|final|middle) (?:frame|moment|second))(?=$|[\s.,!?])"
    rf"|^\W*(?:(?:and|now|but|please|the|same|it|this|that|again|just|show|give|me|i want)[ ,]+){{0,5}}as an? "
    rf"(?:single )?{STILL_NOUN}(?: please| instead| now)?\W*$"
    r"|\b(?:give|show|save|get|extract|export|make|take|want)\b.{0,40}\b(?:first|last|final|middle) frame\b",
    re.IGNORECASE,
)
CLIP = rf"(?:it|this|that|(?:the|this|that|my) (?:[\w-]+ ){{0,2}}{CLIP_NOUN})"
EXTENSION_REQUEST = re.compile(
    rf"\b(?:extend|prolong|lengthen|continue) {CLIP}\b"
    rf"|\b(?:make|let) {CLIP} (?:a bit |a little |much )?(?:longer|go on|continue)\b"
    r"|^\W*(?:please )?(?:continue|keep going|go on)\b|^\W*(?:a bit |much )?longer(?: please)?\W*$"
    r"|\bwhat happens (?:next|then|after that)\b",
    re.IGNORECASE,
)
FRAME_POSITIONS: dict[FramePosition, re.Pattern[str]] = {
    "first": re.compile(r"\b(?:first|start|beginning|opening)\b", re.IGNORECASE),
    "middle": re.compile(r"\b(?:middle|half(?:way)?|centre|center)\b", re.IGNORECASE),
}


def find_requested_medium(text: str, source_medium: Medium) -> Medium | None:
    """Return the medium that words ask for if the source has another one; otherwise None."""
    if source_medium == "image":
        return "video" if MOTION_REQUEST.search(text) else None
    return "image" if STILL_REQUEST.search(text) else None


def is_medium_request(text: str) -> bool:
    """Return whether a request asks for an existing artifact in the other medium."""
    return bool(MOTION_REQUEST.search(text) or STILL_REQUEST.search(text))


def is_extension_request(text: str) -> bool:
    """Return whether words ask for more of a clip."""
    return EXTENSION_REQUEST.search(text) is not None


def find_frame_position(text: str) -> FramePosition:
    """Return which frame of a clip a request for a still means; the last one if it does not say."""
    return next((position for position, words in FRAME_POSITIONS.items() if words.search(text)), "last")
