"""Small talk, in the MLLM's words, and requests in other languages than English."""

import re

from omnivideo.agent.small_world.lexicon import is_known_word, load_lexicon, normalize_text, split_words

# What people say, and what it is to the MLLM. The whole text must be small talk, apart from fillers.
SMALL_TALK = (
    (r"thanks?\b|thank you|thx|ty\b|cheers|much appreciated|ta\b|appreciate|grateful|merci", "thanks"),
    (r"how are you|how is it going|how do you (?:do|feel)|how are things|how have you been|are you (?:well|ok|okay|fine|alright)"
     r"|what is up|wassup|sup\b|you (?:ok|okay|alright)\b|how was your", "how are you?"),
    (r"your name|have a name|call you|are you called|who am i (?:talking|speaking)", "what is your name?"),
    (r"who are you|what are you|who (?:made|built|created|trained|wrote) you|are you (?:a |an )?(?:robot|human|person|bot|ai|machine|real|computer|alive)", "who are you?"),
    (r"do you (?:speak|understand|know|talk) (?:\w+ )?(?:english|german|french|spanish|chinese|italian|japanese|languages?)|(?:which|what) languages?|in english", "languages"),
    (r"what should i ask you|how can you help|what can you|what do you do|what are you able|what else can you|your abilities", "what can you do?"),
    (r"bye\b|goodbye|see you|farewell|good night|goodnight|take care|so long|cya|gotta go|until next time|have a (?:good|nice|great|lovely)", "goodbye"),
    (r"good (?:morning|afternoon|evening|day)|hello|hi\b|hiya|hey|howdy|greetings|yo\b|welcome back|morning\b", "hello"),
    (r"(?:that|this|it) (?:is|looks|was|will) (?:\w+ ){0,2}(?:great|nice|lovely|perfect|good|beautiful|awesome|amazing|brilliant|cool|excellent|fantastic"
     r"|wonderful|pretty|neat|superb|do|fine|cute|sweet|gorgeous)|i (?:really )?(?:love|like) (?:it|that|this)|well done|good job|nice (?:one|work)|great (?:job|work)"
     r"|you are (?:\w+ ){0,2}(?:great|clever|smart|good|the best|awesome|amazing|brilliant|funny|nice|cool|helpful|talented|wonderful)"
     r"|^(?:\W|wow|perfect|nice|great|lovely|awesome|brilliant|amazing|cool|excellent|beautiful|fantastic|ha+|haha+|lol|yay|wonderful|super|neat|bravo|sweet)+$", "perfect"),
)  # fmt: skip
# What is small talk even as a question, when there is a result.
CERTAIN = (
    "thanks",
    "how are you?",
    "what is your name?",
    "who are you?",
    "what can you do?",
    "goodbye",
    "hello",
    "languages",
)
FOREIGN_WORDS = frozenset(["der", "die", "das", "den", "dem", "ein", "eine", "einen", "einem", "und", "ist", "nicht", "mit", "auf", "bitte", "mach", "mache", "zeig", "zeige", "kannst", "ich", "du", "wir", "sie", "es", "ihn", "ihr", "von", "zu", "für", "le", "la", "les", "un", "une", "des", "du", "est", "et", "pas", "avec", "sur", "je", "tu", "il", "elle", "nous", "vous", "moi", "toi", "mets", "fais", "peux", "peut", "voudrais", "plaît", "que", "qui", "ce", "cette", "el", "los", "las", "una", "uno", "unos", "unas", "y", "es", "no", "con", "por", "favor", "pon", "haz", "hazlo", "quiero", "puedes", "en", "del", "al", "que", "está", "il", "lo", "gli", "i", "di", "che", "con", "per", "favore", "fai", "puoi", "vorrei", "sono", "non", "sul", "della", "nel", "o", "os", "as", "um", "uma", "e", "com", "para", "você", "não", "por", "faça", "quero", "pode", "em", "do", "da", "no", "na", "num", "numa", "de", "het", "een", "en", "van", "op", "met", "niet", "ik", "je", "wil", "maak", "alsjeblieft", "graag", "kun", "zijn", "och", "att", "det", "som", "på", "är", "inte", "jag", "vill", "gör", "kan", "du", "med", "för", "en", "ett", "w", "na", "i", "z", "jest", "nie", "proszę", "zrób", "chcę", "się", "do", "to", "og", "til", "på", "ikke", "jeg", "lav", "gør", "er", "et", "bir", "ve", "bu", "için", "yap", "istiyorum", "lütfen", "ja", "on", "kaksi", "tee", "ole", "hyvä", "egy", "és", "a", "kérek", "prosím", "jeden"])  # fmt: skip
ENGLISH_TOO = frozenset(
    ["a", "i", "do", "to", "no", "on", "me", "en", "is", "as", "the", "in", "so", "it", "y", "e", "o", "w", "z"]
)


def find_small_talk(text: str) -> str | None:
    """Return the small talk of the MLLM's world that a text is, or None."""
    normalized = normalize_text(text).strip(" .!?")
    return next((said for pattern, said in SMALL_TALK if re.search(rf"(?:^|\b)(?:{pattern})", normalized)), None)


def is_foreign(text: str) -> bool:
    """Return whether a text is not in English: other letters, or mostly unknown words with one of another language."""
    letters = [letter for letter in text if letter.isalpha()]
    if letters and sum(not is_latin(letter) for letter in letters) > len(letters) / 4:
        return True
    lexicon = load_lexicon()
    words = [word for word in split_words(normalize_text(text)) if word[0].isalpha()]
    unknown = [word for word in words if not is_known_word(lexicon, word) and word not in lexicon.described]
    foreign = [word for word in words if word in FOREIGN_WORDS and word not in ENGLISH_TOO]
    accented = [word for word in words if not word.isascii()]
    if not words or (len(unknown) * 2 < len(words) and len(foreign) * 2 < len(words)):
        return False
    return bool(foreign or accented)


def is_latin(letter: str) -> bool:
    return letter < "ɐ" or "Ḁ" <= letter <= "ỿ"
