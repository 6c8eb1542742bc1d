"""Articles of an English Wikipedia dump as plain paragraphs of sentences."""

import bz2
import html
import re
from dataclasses import dataclass

# templates that say what they hold; of others a mark stays, and their sentence is left out
_KEPT = re.compile(
    r"\{\{\s*(?:nowrap|lang\|[^|{}]*|transl(?:iteration)?\|[^|{}]*|abbr|small|circa|c\.)\|"
    r"([^|{}]*)(?:\|[^{}]*)?\}\}",
    re.IGNORECASE,
)
_MEASURE = re.compile(
    r"\{\{\s*(?:convert|cvt)\|([\d.,]+)\|([A-Za-z]{1,3}2?)(?:\|[^{}]*)?\}\}", re.IGNORECASE
)
_SILENT = re.compile(
    r"\{\{\s*(?:sfn|harv|cn\b|citation|cite|r\||refn|efn|fact|clarify|when|who\b|which|by whom"
    r"|dubious"
    r"|page needed|failed|better|primary|verify|update|as of|inconsistent|disputed|portal|main|see"
    r"|details|further|anchor|rp\||dead link|not in|specify|lead|clear|reflist|note)[^{}]*\}\}",
    re.IGNORECASE,
)
_UNITS = {"km": "km", "mi": "miles", "m": "metres", "ft": "feet", "km2": "square kilometres"}
_HOLE = "\x00"
_MAINTENANCE = re.compile(r"\(disambiguation\)|^List of|^[A-Z]$")

# a full stop after one of these does not end a sentence
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|Gen|Col|Brig|Cmdr|Adm|Lt|Capt|Maj|Sgt|Gov|Sen|Rep|Rev"
    r"|Prof|vs|ca?|cf|etc|"
    r"e\.g|i\.e|al|No|Vol|Inc|Ltd|Co|Bros|Mt|Ft|approx|fl|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec|"
    r"U\.S|U\.K|B\.C|A\.D|a\.m|p\.m|Ph\.D|D\.C))\.$"
)
_BOUNDARY = re.compile(r"(?<=[.!?])[\"”')\]]*(?=\s+[\"“'(]?[A-Z0-9])")


@dataclass(frozen=True)
class Article:
    """A page: its title and its paragraphs, each a tuple of whole sentences."""

    title: str
    paragraphs: tuple[tuple[str, ...], ...]


def articles(dump: bytes) -> list[Article]:
    """The articles of a bz2 dump in its order; redirects, lists and short pages are left out."""
    text = bz2.decompress(dump).decode("utf-8")
    found = []
    for page in re.findall(r"<page>.*?</page>", text, re.DOTALL):
        title = html.unescape(re.search(r"<title>(.*?)</title>", page)[1])
        body = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
        if body is None or body[1].startswith("#") or _MAINTENANCE.search(title):
            continue
        paragraphs = tuple(
            kept
            for line in plain(html.unescape(html.unescape(body[1]))).split("\n")
            if len(kept := tuple(s for s in sentences(line) if _whole(s))) >= 2
        )
        if sum(len(paragraph) for paragraph in paragraphs) >= 8:
            found.append(Article(title, paragraphs))
    return found


def plain(source: str) -> str:
    """Wikitext without its markup: a paragraph a line; a lost template leaves a mark behind."""
    source = re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL)
    source = re.sub(r"<ref[^<>]*/>", "", source)
    source = re.sub(r"<ref.*?</ref>", "", source, flags=re.DOTALL)
    source = re.sub(
        r"<(math|gallery|table|blockquote|poem|code|timeline|sub|sup|chem|score)\b.*?</\1>",
        _HOLE,
        source,
        flags=re.DOTALL,
    )
    source = re.split(
        r"^==+ *(?:See also|References|Notes|External links|Further reading|Bibliography)",
        source,
        maxsplit=1,
        flags=re.MULTILINE,
    )[0]
    before = None
    while before != source:  # the innermost templates and tables first
        before = source
        source = _MEASURE.sub(lambda it: f"{it[1]} {_UNITS.get(it[2], it[2])}", source)
        source = _KEPT.sub(r"\1", source)
        source = _SILENT.sub("", source)
        source = re.sub(r"\{\{[^{}]*\}\}", _HOLE, source)
    source = re.sub(r"^\{\|.*?^\|\}", "", source, flags=re.DOTALL | re.MULTILINE)
    before = None
    while before != source:  # captions hold links themselves
        before = source
        source = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", "", source)
        source = re.sub(
            r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", source
        )
    source = re.sub(r"\[https?://\S+ ([^\]]*)\]", r"\1", source)
    source = re.sub(r"\[https?://\S+\]", "", source)
    source = re.sub(r"</?[a-zA-Z][^<>]*>", "", source)
    source = source.replace("'''''", "").replace("'''", "").replace("''", "")
    lines = []
    for line in source.split("\n"):
        line = re.sub(f"^{_HOLE}+", "", line.strip())
        if not line or line[0] in "*#:;=|!{}<&-–":
            continue
        line = line.replace("\xa0", " ")
        line = re.sub(rf"\(\s*(?:{_HOLE}|[;,:]|or|\s)*[;,]?\s*", "(", line)  # pronunciations
        line = re.sub(r"\(\s*\)", "", line)
        line = " ".join(line.split())
        line = re.sub(r" ([,.;:)])", r"\1", line)
        lines.append(line)
    return "\n".join(lines)


def sentences(paragraph: str) -> list[str]:
    """Split where a sentence ends, and not after abbreviations and initials."""
    found, start = [], 0
    for boundary in _BOUNDARY.finditer(paragraph):
        sentence = paragraph[start : boundary.end()].strip()
        if sentence.endswith(".") and _ABBREVIATION.search(sentence):
            continue
        found.append(sentence)
        start = boundary.end()
    return [*found, paragraph[start:].strip()]


def _whole(sentence: str) -> bool:
    """Whether a sentence has an end, no holes, and closes what it opens."""
    return (
        sentence[-1:] in {".", "!", "?", '"', "”", ")"}
        and _HOLE not in sentence
        and sentence.count("(") == sentence.count(")")
        and not re.search(r"[\[\]{}|<>=]|https?:|\(\W|^\W*[a-z]", sentence)
        and 4 <= len(sentence.split()) <= 60
    )
