"""What a chat program wraps around a person's words: attached documents, retrieved sources, lists of files.

Wrappers are context, not words. They are recognised by their kind: blocks of tags, sections and code blocks under the
name of a file, and templates of retrieval, which say where the question stands.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from omnivideo.api.chat.links import find_artifact_links

# Tags around context, wherever they stand. Any other tag that is not HTML's counts if its block fills whole lines.
CONTEXT_TAGS = {
    "attached_files", "attachments", "attachment", "attachment_file", "context", "source", "sources", "document",
    "documents", "file", "files", "image", "images", "knowledge", "memory", "memories", "retrieved_context",
    "search_results",
}  # fmt: skip
WORD_TAGS = {
    "user_query", "query", "question", "user_question", "user_message", "user_input", "user_request", "user_prompt",
}  # fmt: skip
HTML_TAGS = {
    "a", "b", "blockquote", "br", "code", "div", "em", "font", "h1", "h2", "h3", "i", "img", "li", "ol", "p", "pre",
    "s", "small", "span", "strong", "sub", "sup", "table", "td", "th", "think", "tr", "u", "ul", "video",
}  # fmt: skip
OPENING_TAG = re.compile(r"<(?P<tag>[A-Za-z][\w.-]*+)(?P<attributes>(?:\s[^<>]*+)?+)>")
LINE_OPENING_TAG = re.compile(rf"^[ \t]*+{OPENING_TAG.pattern}", re.MULTILINE)
CLOSING_TAG = re.compile(r"</(?P<tag>[A-Za-z][\w.-]*+)>")
FILE_TAG = re.compile(r"<(?:file|attachment|image|video|document)\b(?P<attributes>[^<>]*?)(?P<end>/?)>", re.IGNORECASE)
ATTRIBUTE = re.compile(r"(?<![\w-])([\w-]++)\s*+=\s*+(\"[^\"]*\"|'[^']*')")
FILE_NAME = r"[\w()+&,~ .-]{0,120}[\w)]\.[A-Za-z0-9]{1,5}"
ONLY_FILE_NAME = re.compile(rf"\A\s*+{FILE_NAME}\s*+\Z")
FILE_LINE = re.compile(rf"^[ \t]*+[-*][ \t]++(?P<name>(?:[\w./-]*/)?{FILE_NAME})[ \t]*+$", re.MULTILINE)
NAME_TAG = re.compile(r"<(?:file_)?name>\s*(?P<name>[^<]+?)\s*</(?:file_)?name>", re.IGNORECASE)
# "## notes.txt", "## File: notes.txt" or "file: notes.txt"
FILE_HEADING = re.compile(
    rf"^(?:#{{1,4}}[ \t]+(?:(?:file|document|attachment):?[ \t]+)?|(?:file|document|attachment):[ \t]*+)"
    rf"[`\"']?(?P<name>{FILE_NAME})[`\"']?[ \t]*:?[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
FENCE = re.compile(r"\A\s*+```[^\n]*+\n(?P<body>.*?)\n?```[ \t]*(?:\n|$)", re.DOTALL)
SECTION_RULE = re.compile(r"^[ \t]*+-{3,}+[ \t]*+(?:\n|\Z)", re.MULTILINE)
NAMED_FENCE = re.compile(
    rf"^```(?P<name>{FILE_NAME})[ \t]*+\n(?P<body>(?:(?!\n```).)*+)\n```[ \t]*+$", re.DOTALL | re.MULTILINE
)
BRACKET_LINE = re.compile(
    rf"^[ \t]*+\[(?:attached )?(?:file|attachment|image|video|document)[ \t]*+:?[ \t]*+"
    rf"(?P<name>{FILE_NAME})\][ \t]*+$",
    re.IGNORECASE | re.MULTILINE,
)
MARKDOWN_PICTURE = re.compile(r"!\[(?P<name>[^\[\]]*+)\]\((?P<address>[^()\s]++)\)")
ATTACHED_FENCE = re.compile(
    r"^Attached document\(s\):\s*+(?<=\n)```[^\n]*+\n(?P<body>(?:(?!\nAttached document\(s\):).)*?)\n```[ \t]*+$",
    re.DOTALL | re.MULTILINE,
)
# "Use the following context ... Question: ...", as retrieval templates of LangChain, LlamaIndex and others are built.
QUESTION_LINE = re.compile(
    r"^(?:user(?:'s)? )?(?:question|query|request)[ \t]*:[ \t]*(?P<words>.+?)"
    r"(?=^\s*(?:[\w-]+ )?(?:answer|response|context|sources?)[ \t]*:|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
QUESTION_SECTION = re.compile(
    r"^#{1,4}[ \t]+(?:my |the |user(?:'s)? )?question(?: is)?[ \t]*+:?[ \t]*+\n(?P<words>.+?)(?=^#{1,4}[ \t]|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
TEMPLATE_OPENING = re.compile(
    r"\A[^\n]{0,200}\b(?:context|citations|reference materials|references|search results)\b", re.IGNORECASE
)
INSTRUCTION_HEADING = re.compile(r"\A\s*#{1,4} *(?:task|instructions?)\b", re.IGNORECASE)
MEDIA_NAME = re.compile(r"\.(?:png|jpe?g|webp|gif|avif|heic|bmp|mp4|mov|webm|mkv)$", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """A text that came with a message; `name` is "" if the client gives none."""

    name: str
    text: str


@dataclass(frozen=True)
class NamedFile:
    """A file that a message names without containing it."""

    name: str
    address: str
    is_media: bool


@dataclass(frozen=True)
class Block:
    """A tag (in small letters) with its attributes and body. `start` and `end` are positions in the text."""

    tag: str
    attributes: str
    body: str
    start: int
    end: int


@dataclass(frozen=True)
class SplitText:
    """A message's text, split into the person's `words` and what was wrapped around them."""

    words: str
    documents: tuple[Document, ...] = ()
    named_files: tuple[NamedFile, ...] = ()


def split_wrappers(text: str) -> SplitText:
    """Split a user's text into the person's words, documents, and files that are only named."""
    splitter = WrapperSplitter()
    words = splitter.take_words(remove_comments(text.replace("\r\n", "\n").replace("\r", "\n")))
    words = re.sub(r"\n{3,}", "\n\n", words).strip()
    received_names = {document.name for document in splitter.documents if document.text}
    named = [file for file in splitter.named_files if file.name not in received_names]
    return SplitText(words, tuple(document for document in splitter.documents if document.text), tuple(named))


class WrapperSplitter:
    """Takes the wrappers out of one text, and collects what was in them."""

    def __init__(self) -> None:
        self.words: list[str] = []  # in tags that say so
        self.documents: list[Document] = []
        self.named_files: list[NamedFile] = []

    def take_words(self, text: str) -> str:
        """Return the text without its wrappers."""
        # Blocks at the start of a line first: instructions before them may show a tag as an example.
        kept, blocks_end = self.take_blocks(text, LINE_OPENING_TAG)
        if INSTRUCTION_HEADING.match(kept) and blocks_end is not None:
            kept = kept[blocks_end:]  # a template's instructions stand before its context, the words after it
        elif TEMPLATE_OPENING.match(kept) and (question := QUESTION_LINE.search(kept) or QUESTION_SECTION.search(kept)):
            self.documents.append(Document("", (kept[: question.start()] + kept[question.end() :]).strip()))
            kept = question["words"]
        kept, _ = self.take_blocks(kept, OPENING_TAG)
        if self.words:
            return "\n".join(self.words)
        kept = ATTACHED_FENCE.sub(self.take_fence, self.take_lone_file_tags(kept))
        return self.take_sections(self.take_named_parts(kept))

    def take_blocks(self, text: str, opening: re.Pattern[str]) -> tuple[str, int | None]:
        """Return the text without blocks of tags, and the position after the last of them, None if there is none."""
        taken = []
        for block in find_blocks(text, opening):
            if block.tag in WORD_TAGS:
                self.words.append(block.body.strip())
            elif block.tag in CONTEXT_TAGS or (block.tag not in HTML_TAGS and fills_lines(text, block)):
                self.take_block(block)
            else:
                continue
            taken.append(block)
        return cut_blocks(text, taken)

    def take_block(self, block: Block) -> None:
        """Collect the documents and the named files of a block."""
        tag, attributes = block.tag, read_attributes(block.attributes)
        inner_blocks = [inner for inner in find_blocks(block.body) if inner.tag in CONTEXT_TAGS]
        for inner in inner_blocks:
            self.take_block(inner)
        body = self.take_lone_file_tags(cut_blocks(block.body, inner_blocks)[0])
        if tag in ("attached_files", "attachments", "files"):
            self.named_files += [to_named_file({"name": line["name"]}) for line in FILE_LINE.finditer(body)]
            body = FILE_LINE.sub("", body)
        name = find_name(attributes)
        if (name_tag := NAME_TAG.search(body)) and not name:
            name = name_tag["name"]
        if tag in ("file", "attachment", "image") and ONLY_FILE_NAME.match(body):
            self.named_files.append(to_named_file({"name": body.strip()}))
        elif body.strip():
            self.documents.append(Document(name, body.strip()))
        elif tag in ("file", "attachment", "image") and name:
            self.named_files.append(to_named_file(attributes))

    def take_lone_file_tags(self, text: str) -> str:
        """Return the text without tags of files that have no content; the files are named."""

        def take(match: re.Match[str]) -> str:
            attributes = read_attributes(match["attributes"])
            if not match["end"] or not (find_name(attributes) or attributes.get("url")):
                return match[0]
            self.named_files.append(to_named_file(attributes))
            return ""

        return FILE_TAG.sub(take, text)

    def take_fence(self, match: re.Match[str]) -> str:
        name, _, body = match["body"].partition("\n")
        is_heading = name.startswith("#")
        self.documents.append(Document(name.strip('# "') if is_heading else "", body if is_heading else match["body"]))
        return ""

    def take_named_parts(self, text: str) -> str:
        """Return the text without code blocks under names of files, and without files and pictures that it names."""

        def take_fence(match: re.Match[str]) -> str:
            self.documents.append(Document(match["name"], match["body"]))
            return ""

        def take_picture(match: re.Match[str]) -> str:
            if find_artifact_links(match["address"]):
                return match[0]  # one of ours
            attributes = {"name": match["name"], "url": match["address"], "type": "image"}
            self.named_files.append(to_named_file(attributes))
            return ""

        def take_line(match: re.Match[str]) -> str:
            self.named_files.append(to_named_file({"name": match["name"]}))
            return ""

        text = NAMED_FENCE.sub(take_fence, text)
        return BRACKET_LINE.sub(take_line, MARKDOWN_PICTURE.sub(take_picture, text))

    def take_sections(self, text: str) -> str:
        """Return the text without sections that stand under the name of a file.

        A section ends with its code block, at a rule, or at the next name. If nothing else is left, the last paragraph
        of the last section is the person's words.
        """
        headings = list(FILE_HEADING.finditer(text))
        if not headings:
            return text
        kept, last_open_body = text[: headings[0].start()], ""
        for heading, following in zip(headings, [*headings[1:], None], strict=True):
            body = text[heading.end() : following.start() if following else len(text)]
            if fence := FENCE.match(body):
                self.documents.append(Document(heading["name"], fence["body"]))
                kept += body[fence.end() :]
            elif rule := SECTION_RULE.search(body):
                self.documents.append(Document(heading["name"], body[: rule.start()].strip()))
                kept += body[rule.end() :]
            else:
                self.documents.append(Document(heading["name"], body.strip()))
                last_open_body = body.strip() if following is None else ""
        if not kept.strip() and "\n\n" in last_open_body:
            document = self.documents.pop()
            body, _, kept = last_open_body.rpartition("\n\n")
            self.documents.append(Document(document.name, body.strip()))
        self.named_files += [
            to_named_file({"name": document.name}) for document in self.documents if document.name and not document.text
        ]
        return kept


def remove_comments(text: str) -> str:
    """Return the text without HTML comments, in which programs mark what they have added."""
    kept, position = list[str](), 0
    while (start := text.find("<!--", position)) >= 0 and (end := text.find("-->", start)) >= 0:
        kept.append(text[position:start])
        position = end + len("-->")
    return "".join([*kept, text[position:]])


def find_blocks(text: str, opening: re.Pattern[str] = OPENING_TAG) -> Iterator[Block]:
    """Yield the blocks of tags that do not lie in one another, in order; a block ends at the first tag of its name.

    The closing tags are collected first, so that tags without an end take no longer than others.
    """
    closings: dict[str, list[tuple[int, int]]] = {}
    for match in CLOSING_TAG.finditer(text):
        closings.setdefault(match["tag"].lower(), []).append(match.span())
    position = 0
    for match in opening.finditer(text):
        tag = match["tag"].lower()
        ends = closings.get(tag, [])
        index = bisect_left(ends, (match.end(), 0))
        if match.start() >= position and index < len(ends):
            body_end, position = ends[index]
            yield Block(tag, match["attributes"], text[match.end() : body_end], match.start(), position)


def cut_blocks(text: str, blocks: Sequence[Block]) -> tuple[str, int | None]:
    """Return the text without the blocks, and the position in it after the last of them, None if there is none."""
    starts, ends = [block.start for block in blocks], [block.end for block in blocks]
    parts = [text[start:end] for start, end in zip([0, *ends], [*starts, len(text)], strict=True)]
    return "".join(parts), sum(map(len, parts[:-1])) if blocks else None


def fills_lines(text: str, block: Block) -> bool:
    """Return whether nothing else stands on the lines on which a block begins and ends, and it has several."""
    before, after = block.start - 1, block.end
    while before >= 0 and text[before] != "\n" and text[before].isspace():
        before -= 1
    while after < len(text) and text[after] != "\n" and text[after].isspace():
        after += 1
    is_alone = (before < 0 or text[before] == "\n") and (after == len(text) or text[after] == "\n")
    return is_alone and "\n" in text[block.start : block.end]


def read_attributes(text: str) -> dict[str, str]:
    return {name.lower(): value[1:-1] for name, value in ATTRIBUTE.findall(text)}


def find_name(attributes: dict[str, str]) -> str:
    return next((attributes[key] for key in ("name", "filename", "title", "path") if attributes.get(key)), "")


def to_named_file(attributes: dict[str, str]) -> NamedFile:
    """Return a file as a tag's attributes name it."""
    name, address = find_name(attributes), attributes.get("url", "")
    kind = f"{attributes.get('type', '')} {attributes.get('content_type', '')}".lower()
    is_media = "image" in kind or "video" in kind or bool(MEDIA_NAME.search(name))
    return NamedFile(name or ("a picture" if is_media else "a file"), address, is_media)
