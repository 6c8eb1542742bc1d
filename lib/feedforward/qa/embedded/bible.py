"""Chapters of the King James Bible, with questions in today's words."""

import json
import re
from collections.abc import Iterator

from feedforward.qa.embedded.draft import Draft, choose, unambiguous

# a capital letter at the beginning of a sentence makes no name
_NAME = (
    r"(?!(?:And|The|Then|Now|But|For|So|When|Lord|God|LORD|GOD|Thou|Ye|They|That|This|There"
    r"|These|Who|"
    r"What|His|Her|Let|Thus|Wherefore|Therefore|Because|After|Again|Unto|Also|She|Him|How|Yea|Nay|"
    r"Behold|Jesus|Christ|Philistines|Gentiles|Jews|Levites|Syrians|Amalekites|Which|Moreover"
    r"|One|Two|Three|Four|Five|Six|Seven|Eight|Nine|Ten|Twelve|Sixteen|Twenty|Thirty|Forty|Fifty"
    r"|Zeruiah|Haggith|Abital)\b)"
    r"[A-Z][a-z]{2,}(?<!ite)"
)
_YEARS = r"(?:[a-z]+ ){1,7}?years?(?: and (?:six|three|ten) (?:months|days))?"
_ALONE = r"(?<!of )(?<!the )(?<!and )(?<!, )"  # not the end of a longer name or of a list
_NOT_OF = r"(?<!of )"
BOOKS = (  # those that tell what happened
    "Genesis",
    "Exodus",
    "Numbers",
    "Joshua",
    "Judges",
    "Ruth",
    "1 Samuel",
    "2 Samuel",
    "1 Kings",
    "2 Kings",
    "1 Chronicles",
    "2 Chronicles",
    "Ezra",
    "Nehemiah",
    "Esther",
    "Jeremiah",
    "Daniel",
    "Jonah",
    "Matthew",
    "Mark",
    "Luke",
    "John",
    "Acts",
)

# verb of the text -> what is asked for its subject ("Who ...?") and its object ("... whom?")
_DEEDS = {
    "slew": ("killed", "kill"),
    "smote": ("struck at", "strike at"),
    "loved": ("was fond of", "care deeply for"),
    "anointed": ("poured oil on the head of", "pour oil on"),
    "blessed": ("wished well to", "wish well to"),
    "pursued": ("chased", "chase"),
    "buried": ("laid to rest", "lay in the grave"),
    "served": ("worked for", "work for"),
    "feared": ("was afraid of", "stand in dread of"),
    "rebuked": ("scolded", "scold"),
    "bare": ("was the mother of", "give birth to"),
    "hated": ("could not bear", "detest"),
    "succeeded": ("came after", "come after"),
    "bound": ("tied up", "tie up"),
    "answered": ("replied to", "reply to"),
    "commanded": ("gave orders to", "give orders to"),
    "kissed": ("greeted with the lips", "greet with the lips"),
    "sought": ("looked for", "look for"),
    "envied": ("was jealous of", "resent"),
    "betrayed": ("was a traitor to", "hand over"),
    "baptized": ("dipped in the water", "dip in the water"),
}
_GOING = {
    "went": "travel to",
    "came": "arrive",
    "fled": "run away to",
    "returned": "go back to",
    "escaped": "get away to",
    "departed": "leave for",
    "journeyed": "travel to",
    "sailed": "go by ship",
    "gat": "make off to",
}
_DWELT = {
    "dwelt": "have a home",
    "abode": "stay",
    "sojourned": "live as a stranger",
    "tarried": "linger",
    "pitched": "set up camp",
    "encamped": "set up camp",
    "lodged": "spend the night",
}
_TITLE = r"(?: the (?:king|prophet|priest|servant|captain|son of [A-Z][a-z]+)(?: of [A-Z][a-z]+)?)?"
_PLACE = (
    r"((?:the land of |the wilderness of |the city of |mount |the plain of )?"
    + _NAME
    + r"(?:-[a-z]+)?)"
)

_RULES = (
    (
        "father",
        re.compile(rf"\b({_NAME}),? the son of ({_NAME})\b"),
        1,
        2,
        ("Who was the father of {}?", "Of which man was {} a child?", "Whose blood ran in {}?"),
    ),
    (
        "begat",
        re.compile(rf"{_NOT_OF}\b({_NAME}) begat ({_NAME})\b"),
        2,
        1,
        ("Who was the father of {}?", "By whom was {} fathered?", "From which man did {} spring?"),
    ),
    (
        "mother",
        re.compile(rf"\b({_NAME})[^.;]{{0,90}}? his mother's name (?:also )?was ({_NAME})\b"),
        1,
        2,
        ("Who gave birth to {}?", "Whose child was {} on the female side?"),
    ),
    (
        "age at crowning",
        re.compile(rf"\b({_NAME}) was ({_YEARS}) old when he began to reign"),
        1,
        2,
        ("At what age did {} ascend the throne?", "How old was {} on becoming king?"),
    ),
    (
        "reign",
        re.compile(
            rf"\b({_NAME})[^.;:]{{0,40}}? began to reign[^.;:]*?[,;:]? and (?:he )?reigned"
            rf" ({_YEARS}) in"
        ),
        1,
        2,
        ("How long was {} king?", "For what time did {} hold the throne?"),
    ),
    (
        "span",
        re.compile(rf"\ball the days (?:of|that) ({_NAME})(?: lived)? were ({_YEARS})"),
        1,
        2,
        ("To what age did {} live?", "How long did {} walk the earth?"),
    ),
    (
        "child at",
        re.compile(rf"\b({_NAME}) lived ({_YEARS}), and begat\b"),
        1,
        2,
        ("At what age did {} become a parent?",),
    ),
    (
        "heir",
        re.compile(
            rf"{_ALONE}\b({_NAME}) (?:slept with his fathers|died)[^.]*?(?:: |, |; )and"
            rf" ({_NAME})(?: his son)? reigned in his stead"
        ),
        1,
        2,
        ("Who took over the throne after {}?", "Which ruler came after {}?"),
    ),
    (
        "wife",
        re.compile(rf"\b({_NAME}) took(?: unto him| to him)? ({_NAME})[^.;:]{{0,40}}? to wife"),
        1,
        2,
        ("Whom did {} marry?", "Who was the bride of {}?"),
    ),
    (
        "wife",
        re.compile(rf"{_ALONE}\b({_NAME}),? the wife of ({_NAME})\b"),
        1,
        2,
        ("To whom was {} married?", "Who was the husband of {}?"),
    ),
    (
        "brother",
        re.compile(rf"{_ALONE}\b({_NAME}),? the brother of ({_NAME})\b"),
        1,
        2,
        ("With whom did {} share a parent?", "To whom was {} a sibling?"),
    ),
    (
        "realm",
        re.compile(rf"\b({_NAME}) (?:the )?king of ({_NAME})\b"),
        1,
        2,
        ("Over which land did {} rule?", "Where did {} hold the crown?"),
    ),
    (
        "resting place",
        re.compile(
            rf"\b({_NAME})[^.;:]{{0,40}}? (?:was|they) buried (?:him )?in ((?:the )?(?:city of "
            rf"|sepulchre of |house of |cave of )?{_NAME})"
        ),
        1,
        2,
        ("Where was {} laid to rest?", "In which place is the grave of {}?"),
    ),
    (
        "death place",
        re.compile(rf"\b({_NAME}) died in {_PLACE}"),
        1,
        2,
        ("Where did the life of {} end?",),
    ),
    (
        "home",
        re.compile(
            rf"{_ALONE}\b({_NAME}){_TITLE} (dwelt|abode|sojourned|tarried|pitched|encamped"
            rf"|lodged)[^.;:,]{{0,20}}? (?:in|at|by) {_PLACE}"
        ),
        1,
        3,
        ("Where did {} {verb}?", "In what place did {} {verb}?"),
    ),
    (
        "way",
        re.compile(
            rf"{_ALONE}\b({_NAME}){_TITLE} (went|came|fled|returned|escaped|departed|journeyed"
            rf"|sailed|gat)(?: up| down| again| away| forth| out)? (?:to|unto|into)"
            rf" {_PLACE}\b(?! the)"
        ),
        1,
        3,
        ("Where did {} {verb}?",),
    ),
    (
        "camp",
        re.compile(
            rf"\b[Tt]hey (?:departed|removed|went|journeyed) from ({_NAME}(?:-[a-z]+)?),? and"
            rf" (?:pitched|encamped|camped) (?:in|at) ({_NAME}(?:-[a-z]+)?)"
        ),
        1,
        2,
        ("Where was the next halt after {}?", "On leaving {}, where were the tents put up?"),
    ),
    (
        "naming",
        re.compile(
            rf"\b(?:called|call) the name of (?:the|that|his) (place|city|altar|well|child"
            rf"|firstborn|son) ({_NAME}(?:-[a-z]+)*)"
        ),
        1,
        2,
        ("What was the {} to be known as?", "How was the {} christened?"),
    ),
    (
        "name of",
        re.compile(
            rf"\bthe name of (?:the|his|her) (wife|daughter|mother|city|brother|sister|servant"
            rf"|damsel) (?:was|is|of it) ({_NAME})"
        ),
        1,
        2,
        ("What was the {} called?", "Which name did the {} have?"),
    ),
    (
        "listener",
        re.compile(rf"{_ALONE}\b({_NAME}){_TITLE} (?:said|spake) (?:un)?to ({_NAME})\b"),
        1,
        2,
        ("To whom did {} speak?", "Whom did {} address?"),
    ),
    (
        "builder",
        re.compile(rf"\b({_NAME}) (?:built|builded) ((?:an?|the) [a-z]+|{_NAME})\b"),
        1,
        2,
        ("What did {} construct?", "What was put up by {}?"),
    ),
    (
        "losses",
        re.compile(
            r"\b(?:slew|fell|smote|slain|died)\b[^.;:]{0,50}? ((?:about |of )?(?:[a-z]+"
            r" )?(?:[a-z]+ and )?[a-z]+ thousand(?: [a-z]+ hundred)?) (?:men|footmen|horsemen)\b"
        ),
        0,
        1,
        ("How many lost their lives?", "What was the number of the dead?"),
    ),
)
_DOES = "said|answered|looked|saw|went|came|spake|took|did|rose|sent|arose|called|the son"
_DEED = re.compile(
    rf"{_ALONE}\b({_NAME}) ({'|'.join(_DEEDS)}) ({_NAME})\b(?!,? and|'s| an?\b| another)"
)


def drafts(lines: str) -> Iterator[Draft]:
    """Questions on the verses of ``kjv.jsonl``, a JSON object a line; the source is the book."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in lines.splitlines():
        verse = json.loads(line)
        if verse["book"] not in BOOKS:
            continue
        text = " ".join(verse["text"].split())
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(text)
    for (book, _), verses in chapters.items():
        for passage in _passages(verses):
            yield from _passage(book, passage)


def _passages(verses: list[str], words: int = 560) -> Iterator[str]:
    """Whole verses of a chapter, about so many words; a rest of under 200 is left out."""
    passage: list[str] = []
    for verse in verses:
        passage.append(verse)
        if sum(len(it.split()) for it in passage) >= words:
            yield " ".join(passage)
            passage = []
    if sum(len(it.split()) for it in passage) >= 200:
        yield " ".join(passage)


def _passage(book: str, text: str) -> Iterator[Draft]:
    found = []
    for kind, pattern, of, answer, forms in _RULES:
        for it in pattern.finditer(text):
            about = it[of] if of else ""
            verb = _GOING.get(it[2]) or _DWELT.get(it[2]) if kind in ("home", "way") else ""
            question = choose(forms, kind, about, text).format(about, verb=verb)
            if kind == "way" and re.search(rf"\b{it[answer]} (?:{_DOES})\b", text):
                continue  # somebody, not a place
            found.append(Draft(kind, question, text, it[answer], it.start(answer), book))
    for it in _DEED.finditer(text):
        doer, verb, other = it.groups()
        who, whom = _DEEDS[verb]
        found.append(Draft("deed", f"Who {who} {other}?", text, doer, it.start(1), book))
        found.append(Draft("deed", f"Whom did {doer} {whom}?", text, other, it.start(3), book))
    # where a passage tells of two fathers or two journeys, only the questions with one answer stay
    yield from unambiguous(found)
