"""Every pattern that is applied to a user's text takes time that is linear in the text's length."""

import ast
import importlib
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]

import pytest

import omnivideo
from omnivideo.agent import commands, english_rules
from omnivideo.agent.english_rules import MAX_WORDING_CHARS
from omnivideo.agent.small_world import wordings
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.turn_reading import read_choice, read_turn, resolve_reply, strip_connecting_words
from omnivideo.api.chat.wrappers import split_wrappers
from omnivideo.contracts import Artifact
from omnivideo.presets import TINY

PACKAGE = Path(omnivideo.__file__).parent
FOLDERS = ("agent", "api", "media", "backends/batches", "training/curation", "training/data", "evaluation")
SHORT, LONG = 40, 4000  # characters; a turn has at most 4,000
# Linear time grows 100 times from SHORT to LONG, quadratic time 10,000 times: the limit is between them.
MAX_GROWTH = 1000.0
MIN_SECONDS = 3e-6  # shorter times are noise
BLANKS = "a" + " " * (LONG - 2) + "b"
MAX_WORDING_SECONDS = 0.02  # of a pattern of many wordings, which sees MAX_WORDING_CHARS of a text
# Patterns that are not constants: the samples of our own data say what the MLLM's reply must contain.
# The others replace contractions, words that were escaped, and names of parts.
EXEMPT = {
    "evaluation/phrases/judge.py", "agent/commands.py", "agent/small_world/reading.py",
    "agent/small_world/turn_reading.py",
}  # fmt: skip


def find_patterns() -> Iterator[tuple[str, re.Pattern, bool]]:
    """Yield each compiled pattern of the modules, and each pattern that a call of `re` states.

    The last value says whether the pattern is only matched with a whole text, from its beginning.
    """
    for folder in FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            place = str(path.relative_to(PACKAGE))
            source = path.read_text()
            if not re.search(r"^import re$", source, re.MULTILINE):
                continue
            module = importlib.import_module("omnivideo." + place.removesuffix(".py").replace("/", "."))
            compiled = {name: value for name, value in vars(module).items() if isinstance(value, re.Pattern)}
            for name, value in vars(module).items():
                if isinstance(value, dict) and not name.startswith("__"):
                    compiled |= {f"{name}.{key}": item for key, item in value.items() if isinstance(item, re.Pattern)}
            for name, pattern in compiled.items():
                if isinstance(pattern.pattern, str):
                    uses = set(re.findall(rf"\b{name}\.(\w+)\(", source))
                    yield f"{place}::{name}", pattern, uses == {"fullmatch"}
            for call in ast.walk(ast.parse(source)):
                function = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
                if re.fullmatch(r"re\.(?!compile|escape)\w+", function) and isinstance(call, ast.Call):
                    text = read_pattern(call.args[0], f"{place}:{call.lineno}")
                    if isinstance(text, str):
                        is_whole = function == "re.fullmatch"
                        yield f"{place}::{text[:40]}", re.compile(text, re.IGNORECASE), is_whole


def read_pattern(argument: ast.expr, place: str) -> str | bytes | None:
    """Return the pattern that a call states; a value within it is replaced by a word."""
    if isinstance(argument, ast.Constant):
        return argument.value
    if isinstance(argument, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "word" for part in argument.values)
    assert place.partition(":")[0] in EXEMPT, f"{place}: give the pattern as a constant"
    return None


def sample_match(nodes, rng: random.Random, depth: int = 0) -> str:
    """Return a random text that a parsed pattern matches, apart from what it looks ahead and behind for."""
    text = ""
    for kind, value in nodes:
        if kind is _constants.LITERAL:
            text += chr(value)
        elif kind in (_constants.NOT_LITERAL, _constants.ANY):
            text += "a"
        elif kind is _constants.IN:
            text += sample_character(value, rng)
        elif kind is _constants.BRANCH:
            text += sample_match(rng.choice(value[1]), rng, depth + 1)
        elif kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            low, high, inner = value
            for _ in range(rng.randint(low, min(int(high), low + 2))):
                text += sample_match(inner, rng, depth + 1)
        elif kind is _constants.SUBPATTERN:
            text += sample_match(value[-1], rng, depth + 1)
        elif kind is _constants.ATOMIC_GROUP:
            text += sample_match(value, rng, depth + 1)
        elif kind is _constants.ASSERT:
            text += sample_match(value[1], rng, depth + 1) if value[0] == 1 else ""
    return text


def sample_character(choices, rng: random.Random) -> str:
    kind, value = rng.choice(choices)
    if kind is _constants.LITERAL:
        return chr(value)
    if kind is _constants.RANGE:
        return chr(rng.randint(*value))
    category = {_constants.CATEGORY_SPACE: " ", _constants.CATEGORY_DIGIT: "1", _constants.CATEGORY_WORD: "a"}
    return category.get(value, "a") if kind is _constants.CATEGORY else "a"


def list_hostile_units(pattern: re.Pattern) -> list[str]:
    """Return texts to repeat: single characters, and random beginnings and parts of what the pattern matches."""
    rng = random.Random(pattern.pattern)
    units = [*' a-,;.!"1:/<?\n', "a ", "A-", ", ", "and ", "the ", "and put ", "a\n", ". "]
    parsed = _parser.parse(pattern.pattern, pattern.flags)
    for _ in range(30):
        sample = sample_match(parsed, rng)
        if len(sample) > 1:
            start = rng.choice((0, 0, rng.randrange(len(sample))))
            units.append(sample[start : rng.randint(start + 1, len(sample))])
            units.append(sample + " ")
    return list(dict.fromkeys(units))


def measure_once(call: Callable[[], object], repeats: int = 1) -> float:
    """Return the processor time of a call in seconds, the mean of one series."""
    started_at = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - started_at) / repeats


def measure_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the least time of a call in three series, or of the first series if it is short or very long."""
    best = float("inf")
    for _ in range(3):
        best = min(best, measure_once(call, repeats))
        if best > 0.5 or best < MIN_SECONDS * MAX_GROWTH / 3:
            break
    return best


def fill(unit: str, length: int, end: str) -> str:
    return (unit * (length // len(unit) + 1))[: length - len(end)] + end


def assert_linear(name: str, apply, units: list[str]) -> None:
    """Check the growth of the time from SHORT to LONG hostile characters; a slow one is measured again.

    A pattern that looks ahead up to 200 characters takes a constant time more from there on. From a quarter of LONG on,
    its time grows like the text, by 4, and a quadratic one by 16.
    """
    for unit in units:
        for end in ("\nb", "~"):  # whatever must follow, one of these does not
            seconds = measure_seconds(partial(apply, fill(unit, LONG, end)), 1)
            if seconds < MIN_SECONDS * MAX_GROWTH / 3:
                continue
            short = max(MIN_SECONDS, measure_seconds(partial(apply, fill(unit, SHORT, end)), 50))
            if seconds < MAX_GROWTH * short:
                continue
            quarter, whole = (measure_seconds(partial(apply, fill(unit, n, end)), 1) for n in (LONG // 4, LONG))
            assert whole < 8 * quarter, f"{name}: {seconds / short:.0f} times as long for {unit!r} ... {end!r}"


PATTERNS = {name: (pattern, is_whole) for name, pattern, is_whole in find_patterns()}


def test_the_patterns_of_every_folder_are_found():
    assert {name.partition("/")[0] for name in PATTERNS} >= {"agent", "api", "media", "training"}
    assert "agent/english_rules.py::ACTION_BOUNDARY" in PATTERNS and len(PATTERNS) > 20


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_linear(name):
    pattern, is_whole = PATTERNS[name]
    apply = pattern.fullmatch if is_whole else lambda text: sum(1 for _ in pattern.finditer(text))
    assert_linear(name, apply, list_hostile_units(pattern))


def test_the_smallest_text_that_hung_the_service():
    started_at = time.thread_time()
    assert english_rules.split_actions(BLANKS) == [BLANKS]
    assert time.thread_time() - started_at < 0.05


def list_loaded_patterns() -> Iterator[tuple[str, Callable[[str], object], re.Pattern]]:
    """Yield the patterns of many wordings, from files, with how they are used; a text is cut before."""
    patterns = commands.load_patterns()
    for number, (name, wording) in enumerate(patterns.commands):
        yield f"{name} {number}", wording.pattern.fullmatch, wording.pattern
    yield "resend", patterns.resend.pattern.fullmatch, patterns.resend.pattern
    searched = {"lead": patterns.lead, "tail": patterns.tail}
    searched |= {
        name: wordings.load_pattern(name) for name, text in wordings.load_wordings().items() if isinstance(text, str)
    }
    searched |= {said: wording for wording, said in wordings.load_small_talk()}
    for name, wording in searched.items():
        yield name, wording.pattern.search, wording.pattern


LOADED = {name: (apply, pattern) for name, apply, pattern in list_loaded_patterns()}
# An exponential time is noticed before it takes hours.
WORDING_LENGTHS = (12, 20, 28, 36, 48, 64, 100, 150, 200, MAX_WORDING_CHARS)


@pytest.mark.parametrize("name", LOADED)
def test_a_pattern_of_wordings_takes_little_time_for_the_longest_text_that_it_sees(name):
    apply, pattern = LOADED[name]
    for unit in list_hostile_units(pattern):
        for length in WORDING_LENGTHS:
            seconds = measure_seconds(partial(apply, fill(unit, length, " ~")), 1)
            assert seconds < MAX_WORDING_SECONDS, f"{length} characters {unit!r} ... ' ~': {seconds:.3f} s"


def test_words_that_are_replaced_in_a_turn_take_linear_time():
    for pattern, _ in (*wordings.load_contractions(), *((re.compile(text), "") for text, _ in commands.CONTRACTED)):
        assert_linear(pattern.pattern, partial(pattern.sub, ""), list_hostile_units(pattern))


def test_a_turn_of_the_small_world_is_read_in_linear_time():
    """A turn of many actions takes a tenth of a second for 1,000 characters, so only a slow one is measured again."""
    context = Context(TINY, medium="image", number=1)
    for unit in (" ", ".", ", ", "ha", "undo, ", "results ", "a red ball. ", "blue. ", "make it blue. ", "the one "):
        quarter, whole = (
            partial(read_turn, "a red ball. " + fill(unit, length, "~"), context) for length in (LONG // 4, LONG)
        )
        seconds = measure_once(quarter), measure_once(whole)
        if seconds[1] >= 10 * max(0.01, seconds[0]):  # a collection of garbage may have fallen into it
            seconds = measure_seconds(quarter, 1), measure_seconds(whole, 1)
        assert seconds[1] < 10 * max(0.01, seconds[0]), f"{seconds} s for {unit!r}"


def apply_all_rules(text: str) -> None:
    artifacts = [Artifact(key="k", medium="image", width=8, height=8, frames=1, fps=1.0, caption="c", created_by="t")]
    for action in english_rules.split_actions(text):
        english_rules.is_indirect(action)
        english_rules.has_other_words(action)
        english_rules.is_reference(action)
        english_rules.is_go_back_request(action)
        english_rules.find_by_ordinal(action, artifacts)
        english_rules.find_description(action)
        english_rules.artifact_from_reply(action, artifacts, [action])


def test_the_rules_together_are_linear():
    units = [unit for name in PATTERNS if "english_rules" in name for unit in list_hostile_units(PATTERNS[name][0])]
    assert_linear("english_rules", apply_all_rules, random.Random(0).sample(units, 60))


def test_wrappers_of_a_message_are_found_in_linear_time():
    """Tags without an end, tags of many names, blocks in one line, and blocks in blocks."""
    many_names = "".join(f"<{name}{number}>" for number in range(400) for name in ("a", "File"))
    units = ["<file>", "<x>", "<x>\n</x>", "<x>a</x> ", "<file>a</file>", " <x>\n", "</x>", "<x ", many_names]
    cased = ("file", "File", "fILE", "source", "SOURCE", "document", "context")
    nested = "".join(f"<{tag}>" for tag in cased) + "".join(f"</{tag}>" for tag in reversed(cased))
    units += [nested, "<source>" * 9 + "</source>" * 9]
    assert_linear("split_wrappers", split_wrappers, units)


def test_a_reply_to_a_choice_is_read_in_linear_time():
    assert_linear("read_choice", lambda text: read_choice(f"Do you mean {text}?"), [" or ", "a or ", "or"])
    assert_linear("strip_connecting_words", strip_connecting_words, [" and", ", and", " that is", " that", " is"])
    request = "a ball, and also blue, on white"
    assert resolve_reply(request, "Do you mean blue or white?", "white") == "a ball, on white"
