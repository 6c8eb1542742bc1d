"""Wikipedia articles cut into passages: paragraphs with full questions, windows with short ones."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from feedforward.qa.embedded.asking import NAME, NATIONS, NUMBER, ROLES, Asker
from feedforward.qa.embedded.draft import Draft, choose, unambiguous, word_set
from feedforward.qa.embedded.wikipedia import Article

_ROLE = re.compile(
    rf"\b((?:(?:{NATIONS}|then|former|early|[a-z]+ist) )?(?:{ROLES})) ((?!The\b){NAME})(?=[,.;)]"
    rf"| [a-z])"
)
_OFFICE = re.compile(
    rf"\b((?!The\b){NAME}), ((?:the|an?) (?:[\w-]+ ){{0,3}}?(?:{ROLES})(?: of (?:the"
    rf" )?{NAME})?)(?=[,.;])"
)
_HOW_MANY = re.compile(
    # "between 27 and 33 atoms", "11 to 25 symbols"
    rf"(?<![\d.,$£€-])(?<!or )(?<!to )(?<!and )(?<!top )(?<!next )(?<!last )\b({NUMBER}) "
    r"((?:[a-z][a-z-]+ ){0,2}?[a-z]{3,}(?:s|men|people|children))"
    r"(?=[,.;)]| in | of | from | on | at | by | for | with | and | who | that | were | are |"
    r" had | have )"
)
_SHORT = re.compile(
    rf"\b((?:{NAME}|(?:[A-Z]\w+ )+(?:of|for|and|on) (?:the )?{NAME})) \(([A-Z]{{3,6}})\)"
)
_ERA = re.compile(r"\b(?:ago|later|earlier|old|before|after|long)\b")
_UNITS = word_set(
    "years months weeks days hours minutes seconds metres miles feet inches degrees percent times "
    "decades centuries kilometers kilograms pounds dollars acres points square was has is its this "
    "meters yards tons tonnes barrels hectares others ones series various years' does as thus"
    " plus cases ways types parts kinds forms"
)
_NO_KIND = re.compile(
    r"^(?:dozen|with|the|were|was|and|of|in|other|or|more|such|to|that)\b| \w+ed\b"
)

_MENTIONS = {
    "how many": (
        "How many {} are mentioned?",
        "How many {} are spoken of?",
        "What is the number of {}?",
    ),
    "role": ("Which {} is named?", "Who is the {} in the report?", "What is the name of the {}?"),
    "office": ("Who is described as {}?", "Which person is {}?"),
    "short": ("What does {} stand for?", "What is {} short for?"),
}


def passages(article: Article, least: int, most: int) -> Iterator[tuple[str, ...]]:
    """Neighbouring sentences of an article, from `least` to about `most` words."""
    passage: list[str] = []
    for paragraph in article.paragraphs:
        for sentence in paragraph:
            passage.append(sentence)
            if _words(passage) >= most:
                yield tuple(passage)
                passage = []
        if _words(passage) >= least:
            yield tuple(passage)
            passage = []
    if _words(passage) >= least:
        yield tuple(passage)


def wiki(articles: Iterable[Article], asker: Asker) -> Iterator[Draft]:
    """Full questions on paragraphs of about a hundred words; the source is the article."""
    for article in articles:
        for passage in passages(article, 60, 130):
            named = (
                it for it in _mentioned(" ".join(passage), article.title) if it.kind != "how many"
            )
            yield from unambiguous([*_asked(passage, asker, article.title), *named])


def report(articles: Iterable[Article], asker: Asker) -> Iterator[Draft]:
    """Short questions that leave much unsaid, on windows of 250 words, by article."""
    for article in articles:
        for passage in passages(article, 200, 250):
            text = " ".join(passage)
            drafts = [*_mentioned(text, article.title)]
            drafts += [
                it
                for it in _asked(passage, asker, article.title)
                if it.kind in ("when", "what", "where", "long", "count", "by")
                and len(it.question.split()) <= 9
            ]
            yield from unambiguous(drafts)


def _words(sentences: Iterable[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


def _asked(passage: tuple[str, ...], asker: Asker, title: str) -> Iterator[Draft]:
    context, start = " ".join(passage), 0
    for sentence in passage:
        for it in asker(sentence):
            answer = sentence[it.start : it.end]
            yield Draft(it.kind, it.question, context, answer, start + it.start, title)
        start += len(sentence) + 1


def _mentioned(text: str, title: str) -> Iterator[Draft]:
    counted = [it for it in _HOW_MANY.finditer(text) if not _UNITS & set(it[2].split())]
    heads = Counter(it[2].split()[-1] for it in counted)
    for it in counted:
        around = text[it.start() : it.end() + 12]
        if heads[it[2].split()[-1]] == 1 and not _ERA.search(around) and not it[2].endswith("ss"):
            if re.fullmatch(r"(?:1\d|20)\d\d", it[1]) or _NO_KIND.search(it[2]):
                continue
            yield _mention("how many", it[2], text, it[1], it.start(1), title)
    roles = Counter(it[1].split()[-1] for it in _ROLE.finditer(text))
    for it in _ROLE.finditer(text):
        if roles[it[1].split()[-1]] == 1:
            yield _mention("role", it[1], text, it[2], it.start(2), title)
    for it in _OFFICE.finditer(text):
        yield _mention("office", it[2], text, it[1], it.start(1), title)
    for it in _SHORT.finditer(text):
        words = re.findall(r"[A-Z]\w*", it[1])
        if "".join(word[0] for word in words[-len(it[2]) :]) == it[2]:
            start = it[1].rindex(" ".join(it[1].split())) if len(words) == len(it[2]) else -1
            if start == 0:
                yield _mention("short", it[2], text, it[1], it.start(1), title)


def _mention(kind: str, about: str, text: str, answer: str, start: int, title: str) -> Draft:
    question = choose(_MENTIONS[kind], kind, about, text).format(about)
    return Draft(kind, question, text, answer, start, title)
