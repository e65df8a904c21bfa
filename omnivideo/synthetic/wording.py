"""How people write: politeness, capitals, punctuation and typing mistakes, added to a plain request."""

import random

GREETINGS = ("hi", "hello", "hey", "ok", "okay", "so", "well", "now", "alright", "great", "nice", "perfect", "thanks")
POLITE_FORMS = (
    "{}, please", "{} please", "please {}", "could you {}?", "can you {}?", "can you please {}?", "would you {}?",
    "could you maybe {}?", "i would like you to {}", "{} if you can", "{} for me", "{}, thanks", "{} now",
)  # fmt: skip
ENDINGS = (".", ".", "!", " ...", " :)", "")


def vary_wording(rng: random.Random, text: str) -> str:
    """Return the text as somebody might type it; half of the texts stay as they are."""
    if rng.random() < 0.5:
        return text
    if rng.random() < 0.35 and not text.endswith("?"):
        text = rng.choice(POLITE_FORMS).format(text)
    if rng.random() < 0.15:
        text = f"{rng.choice(GREETINGS)}{rng.choice((', ', ' ', '! '))}{text}"
    if rng.random() < 0.25:
        text = misspell_word(rng, text)
    if rng.random() < 0.3 and not text.endswith(("?", "!", ".")):
        text += rng.choice(ENDINGS)
    chance = rng.random()
    return text.capitalize() if chance < 0.35 else text.upper() if chance < 0.4 else text


def misspell_word(rng: random.Random, text: str) -> str:
    """Return the text with a typing mistake in one of its longer words."""
    words = text.split(" ")
    long_words = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long_words:
        return text
    index = rng.choice(long_words)
    word, position = words[index], rng.randrange(1, len(words[index]) - 2)
    words[index] = rng.choice(
        (
            word[:position] + word[position + 1 :],  # a letter is missing
            word[:position] + word[position] + word[position:],  # a letter is doubled
            word[:position] + word[position + 1] + word[position] + word[position + 2 :],  # two are exchanged
        )
    )
    return " ".join(words)
