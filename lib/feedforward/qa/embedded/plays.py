"""Pages of Shakespeare's plays, with questions and gaps as in a reading examination."""

import re
from collections.abc import Iterator, Mapping

from feedforward.qa.embedded.draft import Draft, choose, unambiguous

_SPEAKER = re.compile(r"^([A-Z][A-Z' ]{2,})\.$")
_SCENE = re.compile(r"^SCENE [IVX]+\. +(.*)$", re.DOTALL)
_ENTER = re.compile(
    r"\[(?:Re-e|E)nter ((?:an? |the )?[A-Z][\w' ]*?)(?:,? (?:with|in|from|as|at|reading|above"
    r"|below|on)\b[^\]]*|, [a-z][^\]]*)?[.]?\]"
)
_EXIT = re.compile(r"\[Exit ((?:an? |the )?[A-Z][\w' ]*?)(?: [a-z][^\]]*|, [a-z][^\]]*)?[.]?\]")
_CALL = re.compile(
    r"(?:(?<=[,;.!?] )|(?<=^))(?:[Mm]y|[Gg]ood|[Gg]entle|noble|sweet|dear) (?:lord|lady|sir"
    r"|master|cousin|uncle|niece|son|daughter|friend|queen|prince|captain|madam|brother|sister"
    r"|father|mother|liege|nurse|boy)(?=[,;.!?])"
)
_WORDS = 270

_FORMS = {
    "speaker": (
        "The words “{}” are spoken by _.",
        "According to the passage, who says “{}”?",
        "“{}” belongs to the part of _.",
    ),
    "reply": (
        "Right after “{}”, the next character to speak is _.",
        "According to the passage, who replies to “{}”?",
    ),
    "place": (
        "According to the passage, where does the action take place?",
        "What we read here is set in _.",
        "The stage represents _.",
    ),
    "enters": (
        "The character who joins the others is _.",
        "According to the passage, whose arrival is shown?",
        "The one who comes on stage is _.",
    ),
    "leaves": (
        "The character who goes away is _.",
        "According to the passage, who is the one to leave?",
        "We no longer see _ after a certain point.",
    ),
    "first": (
        "The passage opens with a speech by _.",
        "According to the passage, which character talks first?",
    ),
    "last": (
        "The passage ends with a speech by _.",
        "According to the passage, which character has the final say?",
    ),
    "address": (
        "In the passage {} speaks to somebody as _.",
        "According to the passage, with what title does {} address the other?",
    ),
}


def drafts(plays: Mapping[str, str]) -> Iterator[Draft]:
    """Questions on the plays that write out who speaks; the source is the play."""
    for name, text in sorted(plays.items()):
        blocks = [
            " ".join(block.split()) if block.lstrip().startswith(("[", "SCENE")) else block
            for block in re.split(r"\n\s*\n", text.replace("\r", "").replace("_", ""))
        ]
        if sum(1 for block in blocks if _SPEAKER.match(block.lstrip().partition("\n")[0])) < 400:
            continue
        for page in _pages(blocks):
            yield from unambiguous(_page(name, page))


def _pages(blocks: list[str]) -> Iterator[list[str]]:
    """Blocks of one scene in order, about so many words a page."""
    page: list[str] = []
    for block in blocks:
        block = block.strip()
        if block.startswith(("ACT ", "SCENE", "PROLOGUE", "EPILOGUE", "THE END")):
            if sum(len(it.split()) for it in page) > _WORDS / 2:
                yield page
            page = []
            if not _SCENE.match(block):
                continue
        if (
            _SCENE.match(block)
            or block.startswith("[")
            or (page and _SPEAKER.match(block.partition("\n")[0]))
        ):
            page.append(block)
        elif page:  # songs and letters end a page
            page = []
        if sum(len(it.split()) for it in page) >= _WORDS:
            yield page
            page = [page[-1]] if _SPEAKER.match(page[-1].partition("\n")[0]) else []


def _page(play: str, page: list[str]) -> Iterator[Draft]:
    context, turns = "", []  # of each speech: the speaker, where, and the words
    for block in page:
        first, _, rest = block.partition("\n")
        speaker = _SPEAKER.match(first)
        if speaker:
            turns.append((speaker[1], len(context), " ".join(rest.split())))
            context += f"{first} {' '.join(rest.split())}\n"
        else:
            context += f"{' '.join(block.split())}\n"
    context = context.rstrip("\n")
    if len(turns) < 4 or len({speaker for speaker, _, _ in turns}) < 3:
        return

    def draft(kind: str, answer: str, start: int, *about: str) -> Draft:
        question = choose(_FORMS[kind], kind, *about, context).format(*about)
        return Draft(kind, question, context, answer, start, play)

    if scene := _SCENE.match(page[0]):
        place = " ".join(scene[1].split()).rstrip(" .")
        if 2 <= len(place.split()) <= 9 and not place.startswith(("The same", "Another")):
            yield draft("place", place, context.index(place))
    for kind, pattern in (("enters", _ENTER), ("leaves", _EXIT)):
        found = list(pattern.finditer(context))
        mentions = context.count("nter ") if kind == "enters" else context.count("Exit")
        if len(found) == 1 and mentions == 1 and "Exeunt" not in context:
            yield draft(kind, found[0][1], found[0].start(1))
    yield draft("first", turns[0][0], turns[0][1])
    yield draft("last", turns[-1][0], turns[-1][1])
    for number, (speaker, start, words) in enumerate(turns):
        quote = _quote(words)
        if quote and context.count(quote) == 1:
            yield draft("speaker", speaker, start, quote)
            if number + 1 < len(turns) and turns[number + 1][0] != speaker:
                yield draft("reply", turns[number + 1][0], turns[number + 1][1], quote)
    for speaker in sorted({speaker for speaker, _, _ in turns}):
        calls = [
            (it[0], start + len(speaker) + 2 + it.start())
            for who, start, words in turns
            if who == speaker
            for it in _CALL.finditer(words)
        ]
        if len({call for call, _ in calls}) == 1:
            yield draft("address", *calls[0], speaker)


def _quote(words: str) -> str | None:
    """A few words of a speech that stand together: a clause of four to eight words."""
    clauses = [it.strip() for it in re.split(r"[.,;:!?\[\]()\"]|--", words)]
    clauses = [it for it in clauses if 4 <= len(it.split()) <= 8 and it.isascii()]
    clauses = [it for it in clauses if "'" not in (it[0], it[-1]) and " '" not in it]
    return max(clauses, key=lambda it: (len(it), it)) if clauses else None
