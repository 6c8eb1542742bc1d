"""Questions from English sentences by patterns: no parser, so only what a pattern is sure of.

A pattern finds a subject, a verb and what follows, turns them into a question and takes one of the
parts as the answer. What it cannot be sure of it leaves alone: subjects that point back ("it",
"this"), relative clauses, verbs whose base form the text never shows.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from feedforward.qa.embedded.draft import word_set

_FORMS = (
    "become/became/become begin/began/begun break/broke/broken bring/brought/brought "
    "build/built/built buy/bought/bought catch/caught/caught choose/chose/chosen "
    "come/came/come draw/drew/drawn drive/drove/driven eat/ate/eaten fall/fell/fallen "
    "fight/fought/fought flee/fled/fled fly/flew/flown forbid/forbade/forbidden "
    "get/got/got give/gave/given go/went/gone grow/grew/grown hold/held/held "
    "keep/kept/kept know/knew/known lead/led/led leave/left/left lend/lent/lent "
    "lose/lost/lost make/made/made meet/met/met overthrow/overthrew/overthrown "
    "pay/paid/paid ride/rode/ridden rise/rose/risen run/ran/run see/saw/seen "
    "seek/sought/sought sell/sold/sold send/sent/sent shoot/shot/shot sing/sang/sung "
    "speak/spoke/spoken spend/spent/spent stand/stood/stood steal/stole/stolen "
    "sink/sank/sunk swear/swore/sworn take/took/taken teach/taught/taught tell/told/told "
    "think/thought/thought throw/threw/thrown understand/understood/understood "
    "undergo/underwent/undergone wear/wore/worn win/won/won "
    "withdraw/withdrew/withdrawn write/wrote/written find/found/found"
)
_IRREGULAR = {
    past: (base, participle)
    for base, past, participle in (row.split("/") for row in _FORMS.split())
}
_PARTICIPLES = {participle: past for past, (_, participle) in _IRREGULAR.items()}
_NO_VERB = word_set(
    "united red bed hundred indeed need feed seed speed breed exceed proceed succeed sacred naked "
    "wicked rugged supposed so-called aged based limited unprecedented related mixed beloved "
    "advanced complicated learned varied ed bled shed sped used tried said seemed appeared"
)
_NOUNS = word_set(  # seen as verbs too, but in "-s" they are things
    "results forms works states names parts places uses plays means claims changes attacks votes "
    "controls tests studies reports orders books views increases supports costs limits effects "
    "designs questions experiences matters points rules reasons marks needs acts visits moves "
    "shows hands heads lands signs supplies trades turns ends stands deals calls runs sets "
    "struggles demands efforts offers promises attempts answers returns"
)
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = (
    rf"(?:(?:{_MONTHS}) \d{{1,2}}, \d{{4}}|\d{{1,2}} (?:{_MONTHS}) \d{{4}}"
    rf"|(?:early |late )?(?:{_MONTHS})(?: of)? \d{{4}}|(?:1[0-9]|20)\d\d(?![\d–-]|,\d))"
)
_CAP = r"[A-Z][\w’'-]*[a-z][\w’-]*|[A-Z]\.(?: ?[A-Z]\.)*|[A-Z]{2,5}"
NAME = rf"(?:(?:{_CAP})(?: (?:(?:of the|of|the|de|von|van|al) )?(?:{_CAP}|[IVX]+\b))*)"
_WORDS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty"
    "|sixty"
)
_SCALE = "(?: hundred| thousand| million| billion)?"
NUMBER = rf"(?:\d(?:[\d,.]*\d)?{_SCALE}|(?:{_WORDS}){_SCALE})"
ROLES = (
    "king|queen|emperor|president|philosopher|chemist|physicist|author|writer|general|director|"
    "anthropologist|mathematician|poet|historian|psychologist|biologist|astronaut|composer|"
    "economist|novelist|artist|painter|scholar|scientist|astronomer|explorer|governor|senator|"
    "engineer|critic|anarchist|feminist|journalist|lawyer|physician|secretary|ambassador|admiral|"
    "alchemist|biographer|psychiatrist|commander|actor|actress|singer|coach|professor|linguist|"
    "sociologist|playwright|inventor|theologian|missionary|chairman|editor|translator"
)
NATIONS = (
    "French|German|English|British|Scottish|Irish|American|Italian|Spanish|Dutch|Russian|Soviet|"
    "Polish|Greek|Roman|Chinese|Japanese|Indian|Arab|Persian|Albanian|Afghan|Angolan|Algerian|"
    "Austrian|Swiss|Swedish|Danish|Norwegian|Portuguese|Canadian|Australian|Israeli|Turkish|Muslim"
)
_NATIONAL = re.compile(rf"(?:{NATIONS})\b")
_ROLE = re.compile(rf"\b(?:{ROLES})\b", re.IGNORECASE)
# words that need the sentences before them
_LOOSE = re.compile(
    r"\b(?:this|these|those|that|such|it|they|them|he|him|she|hers|we|our|us|i|you|former|latter"
    r"|also|however|therefore|thus|then|both|other|others|another|same|here"
    r"|there|later|below|above|following|so|one|ones|respectively|but|not|no|who|which|what"
    r"|instead|too|either|neither|nor|mainly|example|else|still|yet|again|only|even|just"
    r"|eventually|subsequently|finally|initially|soon|ago|today|now|did|does|himself|herself"
    r"|itself|themselves|each|further|furthermore|moreover|meanwhile|similarly|despite|thereby"
    r"|next|previous|fact|because|when|if|while)\b",
    re.IGNORECASE,
)
_MODAL = re.compile(r"\b(?:will|would|could|can|may|might|must|should|to|never|often|and|or)\b")
_OPENING = word_set(
    "Although Once When While If After Before Since As Because Though Until Where Unlike Despite "
    "During In On At By For From To With Under Among Over Through Within Without Between Like "
    "Following According Upon Along Around Given Instead Using Due Based Being Having Whether "
    "Unless Throughout Today Nevertheless Perhaps Maybe Early Late Later Recently Another "
    "Including Except Besides Per Across Against Prior Except Until Even Only Since Both "
    "Traditionally Historically Originally Initially Eventually Finally Then Thus So But And Or "
    "Yet Nor Not Also Here There This That These Those It Its They Their We He She His Her What "
    "Which Who How Why Each Every Other Others Such One Some Many Most All Several Few"
)
_CUT = re.compile(
    r",(?!\d)|;|:(?!\d)| – | — |\(| (?:and|but|or|which|who|whose|while|although|because|after|"
    r"before|when|where|that|as|until|since|if|despite|so|during|following|whereas|than"
    r"|including|plus|"
    r"such|though|instead|rather|in order|due|not) "
)
_STOP = word_set("a an the of in on at to for by with from and or as into is was were are")
_PEOPLE = re.compile(  # heads of phrases that ask for "who"
    r"(?:men|man|women|woman|people|person|king|queen|president|children|child|students?|female|"
    r"male|[a-z]{2,}ists?|[a-z]{2,}men|wife|husband|son|sons|daughter|mother|father|"
    r"general|emperor|pope|author|authors|poet|crew|troops|forces|army|soldiers?|british|french|"
    r"germans?|americans?|romans?|greeks?|ottomans?|portuguese|spanish|dutch|english|russians?|"
    r"[a-z]+(?:ers|ors)|leader|governor|minister|delegates?|actors?|writer|speaker|teacher|"
    r"commissioners?|loyalists|patriots|whigs|appellee|appellant|defendant|plaintiff|judge|jury|"
    r"family|team|couple|fifth|third|half|militants|girls?|boys?|astronauts?|librarians?"
    r"|physicians?|musicians?|politicians?|historians?|pilot|commander|god|goddess|hero|duke"
    r"|prince|brother|sister|victim)$",
    re.IGNORECASE,
)
_NO_PERSON = re.compile(
    r"\b(?:University|Army|Congress|Court|Council|Party|Union|States|Government|Church|Committee|"
    r"Academy|Company|Institute|Society|Board|Association|Republic|Empire|Navy|Commission|War|Act|"
    r"Battle|Award|Awards|Center|Museum|Department|River|Sea|Parliament|Senate|House|Kingdom|The|"
    r"Times|Organization|League|Group|Force|Forces|Bank|Agency|NASA|Treaty|Ocean|Lake|Mountains?|"
    r"Island|Islands|County|City|Stadium|School|College|Constitution|Articles?|Module|Moon|Earth|"
    r"Mission|Program|Alaska|Alabama|Alberta|Algeria|Angola|Afghanistan|Albania|Azerbaijan|Andorra|"
    r"Aruba|Asia|Canada|Europe|Africa|Highway|Airport|Railway|Park|Festival|Prize|Movement)\b"
)
_PERSONAL = (
    "argued wrote published invented discovered proposed believed claimed directed painted "
    "suggested described coined married defeated taught told thought studied criticized rejected "
    "appointed resigned noted stated explained announced concluded remarked recalled advised "
    "advocated translated visited attended coached commanded designed nominated insisted lectured"
)
_NO_PLACE = word_set(  # followed by "in", and the place is not where they happen
    "interested involved engaged used found described made known aimed shown defeated "
    "included believed called named elected invested represented reflected listed "
    "mentioned given divided seen"
)
_NO_OBJECT = word_set(  # what follows is not what is done something to
    "became remained died went came told thought gave lasted made considered found called "
    "left kept saw rendered elected lived prevented expected allowed enabled "
    "asked persuaded urged ordered estimated emerged finished"
)
_INTRANSITIVE = word_set(  # others before a preposition may be participles
    "evolved came went began ended continued moved lived died grew occurred participated "
    "consisted belonged arrived returned emerged originated resulted fell rose served "
    "competed worked withdrew fled stood appeared remained failed lasted landed entered "
    "flew ran turned extended succeeded contributed relied depended focused resided "
    "settled marched sat agreed converted retired expanded spread started differed "
    "existed happened developed became fought spoke migrated escaped opened closed joined "
    "merged believed ranked sought"
)
_NATION = re.compile(r"[A-Z][a-z]+(?:ans|ars|ers|ese|ish|eks|rks|ims)$")
# what may stand behind an "and" that joins whole clauses
_JOINED = re.compile(
    r"(?:the|an?|it|its|was|were|is|are|has|had|have|in|on|then|later|became|took|made|gave|led"
    r"|won|began|"
    r"went|held|\w+ed)\b"
)
_AUXILIARY = "is|are|was|were|has|have|had"
_PREPOSITION = re.compile(
    r" (?:in|on|at|to|of|for|by|with|from|into|over|through|against|under|between|among) "
)


# a question and the group of the match that answers it
_Made = tuple[str, int] | None


@dataclass(frozen=True)
class Found:
    """A question on a sentence: which pattern asks it, and the answer's place in the sentence."""

    kind: str
    question: str
    start: int
    end: int


class Asker:
    """Asks the questions that its patterns find, with verbs learnt from the text itself.

    Args:
        text: Sentences. A word after "to", "will", "would", "could" or "can" is taken as a base
            form, and forms in "-ed" are led back to the base seen most often; subjects of verbs
            like "wrote" are taken as names of people.
    """

    def __init__(self, text: Iterable[str]):
        text = list(text)
        self._asked: dict[str, tuple[Found, ...]] = {}
        bases = Counter(
            word
            for sentence in text
            for word in re.findall(r"\b(?:to|will|would|could|can|not) ([a-z]{2,})\b", sentence)
        )
        self._bases = {word: count for word, count in bases.items() if count >= 2}
        seen = {word for sentence in text for word in re.findall(r"\b[a-z]+ed\b", sentence)}
        pasts = sorted(word for word in seen if self.base(word)) + sorted(_IRREGULAR)
        personal = _PERSONAL.replace(" ", "|")
        self._people = {
            part
            for sentence in text
            for name in re.findall(rf"({NAME}) (?:{personal})\b", sentence)
            if not _NO_PERSON.search(name) and " " in name and name.split()[0] not in _OPENING
            for part in (name, name.split()[-1])
            if len(part) > 3
        }
        presents = {
            word
            for sentence in text
            for word in re.findall(r"\b[a-z]{3,}s\b", sentence)
            if self._bases.get(word[:-1], 0) >= 12 and word not in _NOUNS
        }
        self._things = {
            name
            for name, count in Counter(
                name
                for sentence in text
                for name in re.findall(rf"\bin (?:the )?({NAME})\b(?! and)", sentence)
            ).items()
            if count >= 3 and not {name, name.split()[-1]} & self._people
        }
        self._rules = _rules("|".join(pasts), "|".join(sorted(presents)))

    def base(self, past: str) -> str | None:
        """The base form of a past tense, or None where it is not known as a verb."""
        if past in _IRREGULAR:
            return _IRREGULAR[past][0]
        if not past.endswith("ed") or past in _NO_VERB:
            return None
        stem = past[:-2]
        forms = [stem, stem + "e"]
        if stem.endswith("i"):
            forms = [stem[:-1] + "y"]
        elif len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "sl":
            forms = [stem[:-1]]
        known = [form for form in forms if form in self._bases]
        return max(known, key=lambda form: (self._bases[form], form)) if known else None

    def past(self, participle: str) -> str | None:
        """The past tense that belongs to a participle, or None where it is not known as one."""
        if participle in _PARTICIPLES:
            return _PARTICIPLES[participle]
        return participle if participle not in _IRREGULAR and self.base(participle) else None

    def person(self, name: str) -> bool:
        """Whether a name is seen as that of somebody who writes, argues, marries."""
        return name in self._people and not _NO_PERSON.search(name)

    def thing(self, name: str) -> bool:
        """Whether a name is that of a place or an institution, going by where it is seen."""
        return bool(_NO_PERSON.search(name)) or name in self._things

    def has_verb(self, phrase: str) -> bool:
        """Whether a word of a phrase is known as a verb in the past or as an auxiliary."""
        return any(
            word in _AUXILIARY.split("|") or word in _IRREGULAR or self.base(word) is not None
            for word in phrase.split()
        )

    def __call__(self, sentence: str) -> tuple[Found, ...]:
        """The questions on one sentence, each with its answer's span."""
        if sentence not in self._asked:
            self._asked[sentence] = tuple(self._ask(sentence))
        return self._asked[sentence]

    def _ask(self, sentence: str) -> Iterator[Found]:
        for kind, pattern, rule in self._rules:
            it = pattern.search(sentence)
            if it and (made := rule(self, it)):
                question, group = made
                start, end = it.span(group)
                answer = sentence[start:end]
                end -= len(answer) - len(answer.rstrip(' .,;"”'))
                start += len(answer) - len(answer.lstrip(' "“'))
                if _sound(question, sentence[start:end]):
                    yield Found(kind, question, start, end)


def _sound(question: str, answer: str) -> bool:
    words = question[:-1].split()
    inner = " ".join(words[2:] if words[1] in ("did", "does", "do", "many") else words[1:])
    inner = re.sub(r"^(\w+ )+?(did|does|do) |\b(?:are|were) there\b|have there been", "", inner)
    return (
        4 <= len(words) <= 16
        and 1 <= len(answer.split()) <= 8
        and not _LOOSE.search(inner)
        and not _LOOSE.match(answer)
        and not re.search(r"[\"“”();:&]|,$|\d$(?<=\b\d)", " ".join(words))
        and answer.lower() not in question.lower()
        and len(re.findall(r"['’]s? ", question)) <= 1
    )


def _phrase(text: str, most: int) -> str | None:
    """The first phrase of `text`: up to where a clause may begin, of at most `most` words."""
    cut = _CUT.search(text)
    phrase = (text[: cut.start()] if cut else text).strip().rstrip('.!?"” ')
    words = phrase.split()
    while len(words) > most:  # a shorter question, up to a preposition
        ends = [n for n in range(3, most + 1) if words[n].lower() in _PREPOSITIONS - {"of"}]
        # "in a state [of rebellion]", "the first to get a prize [in sciences]"
        if not ends or re.search(r"\b(?:first|last|only|\w+est)\b", phrase):
            return None
        words, cut = words[: ends[-1]], None
    last = words[-1].lower() if words else ""
    if (
        last in _STOP
        or last in ("be", "more", "most", "very", "all", "care", "part")
        or (cut and cut[0] == " than ")
    ):
        return None
    if cut and cut[0] in (" and ", " or ", ",") and _ADJECTIVE.search(last):
        return None
    listed = cut and cut[0] == "," and re.match(" [a-z]", text[cut.end() :])
    if listed and len(words) > 1 and words[-2].lower() in (_STOP | {"more"}):
        return None  # "a direct, popular vote"
    if cut and (cut[0] == " or " or re.match(r"\([^)]*\) [A-Z]", text[cut.start() :])):
        return None
    if cut and cut[0] == " and " and not _JOINED.match(text[cut.end() :]):
        return None  # "a road and rail tunnel"
    if cut and cut[0] in (" and ", " or ") and re.search(r"\b(?:between|both)\b", phrase):
        return None
    return " ".join(words)


_PREPOSITIONS = word_set(
    "in on at to of for by with from into over through against under between among upon about "
    "near across within around toward towards via per throughout without along"
)
_ADJECTIVE = re.compile(r"(?:est|al|ic|ive|ous|ful|ary|ent|ant|ble|ish|less|ern|ed)$")


def _subject(text: str, most: int = 6) -> str | None:
    """A subject that stands by itself, as it is written inside a sentence."""
    text = text.strip()
    if len(text.split()) > most or _LOOSE.search(text) or _MODAL.search(text):
        return None
    first, _, rest = text.partition(" ")
    if re.search(
        r"[,;:()\"“”%]|\d|\w+ly$|\w+ing$| (?:first|second|then|once)$|(?:ful|ous|able|est)$|"
        r" (?:of|in|for|the|a|an|is|was|at|by|on)$",
        text,
    ):
        return None
    if first in ("The", "A", "An"):
        return f"{first.lower()} {rest}" if rest and rest[0] != "," else None
    if first in _OPENING or not re.match(NAME, text) or re.search(r" (?:an?|is|are|has) ", text):
        return None
    return text


def _head(subject: str) -> str:
    """The noun that a subject is about: the last word before its first preposition."""
    return re.split(_PREPOSITION, subject + " ")[0].split()[-1]


def _rules(pasts: str, presents: str):
    words = r"((?:[\w’'.-]+ ){%d,%d}?)"
    opening = (
        r"^(?:(?:In|On|During|At|After|By|Under|For|From|Since|However|As|With|Throughout|Unlike|"
        r"Despite|Following|According to)\b[^,;(]{0,50}, )?"
    )
    some = words % (1, 6)
    # what may stand before a verb and after a subject
    after = r"(?=[,.;]| and | in | on | at | by | for | to | from | because | with | which | as )"
    return tuple(
        (kind, re.compile(pattern), rule)
        for kind, pattern, rule in (
            ("when", rf"^(?:In|On|By) ({_DATE}),? {some}(was|were|{pasts})\b(.*)$", _when_first),
            (
                "when",
                opening + rf"{some}(was|were|{pasts})\b((?: [\w’'-]+){{0,8}}?) (?:in|on)"
                # a second number makes it "1943 and 1944"
                rf" ({_DATE})(?=[,.;]| and (?!\d)| by | with | to (?!\d)| as )",
                _when_last,
            ),
            (
                "by",
                opening + rf"{some}(was|were) (?:first )?({pasts}|[a-z]+n)((?: [\w’'-]+){{0,4}}?)"
                rf" by ((?:[Tt]he |a |an )?(?:{NAME}|[a-z]+(?: [a-z]+)?))"
                r"(?=[,.;]| in | on | at | and [a-z]+ed)",
                _who_by,
            ),
            (
                "where",
                opening + rf"{some}(was|were|is|are) ({pasts}|born|located|situated|held|built)"
                rf"(?: [a-z]+ly)? (?:in|at|near) ((?:the )?{NAME}(?:, {NAME})?)"
                r"(?=[,.;]| and [a-z]| in \d| on )",
                _where,
            ),
            (
                "count",
                opening + rf"{some}(has|have|had|contains?|contained|includes?|included) "
                r"(?:(?:about|approximately|over|around|nearly|some|at least|more than) )?"
                rf"({NUMBER}) ((?:[a-z][\w-]* ){{0,2}}?[a-z-]+(?:s|men|people|children))\b(?! of)",
                _how_many,
            ),
            (
                "share",
                r"(?:^|, |[Aa]bout |[Aa]pproximately |[Aa]round |[Oo]ver |[Nn]early )"
                r"(\d[\d.]*(?:%| percent| per cent)) of ((?:the |all )?(?:[\w’'-]+ ){1,5}?)"
                r"(are|were|is|was|live|lives|lived|speak|voted|have|had|identified|died|came"
                r"|comes?"
                r"|consisted|consists) ([^,;:()]{3,60}?)(?=[,.;]| and | in \d| while| with )",
                _share,
            ),
            (
                "there",
                rf"\b[Tt]here (are|were|have been) (?:about |around |over |some |only "
                rf"|approximately )?"
                rf"({NUMBER}) ((?:[a-z][a-z-]* ){{0,2}}?[a-z]+(?:s|men|people)) ((?:in|at|on|for"
                rf"|within) [^,;.]*)",
                _there,
            ),
            (
                "number",
                opening
                + r"(?:(?:[Aa]bout|[Aa]round|[Oo]ver|[Aa]pproximately|[Mm]ore than|[Aa]t least"
                r"|[Tt]he) )?"
                rf"({NUMBER}|{_WORDS.title()}) ((?:[a-z][a-z-]* ){{0,2}}?[a-z]+(?:s|men|people)) "
                rf"(were|are|have|had|{pasts})\b([^;]*)\.",
                _number,
            ),
            (
                "which",
                rf"(?<![Vv]ice )(?<!-)\b(?:[Tt]he )?((?:(?:{NATIONS}) )?(?:{ROLES}"
                rf"|{ROLES.title()})) ({NAME}) ({pasts})\b([^;]*)\.",
                _which,
            ),
            (
                "called",
                opening + rf"{some}(is|are|was|were) (?:also |often |sometimes |commonly |"
                r"usually |formerly |originally |generally )?"
                r"(known as|called|nicknamed|dubbed|referred to as) "
                r"((?:the |an? )?[\"“]?[\w’'-]+(?: [\w’'-]+){0,3}?[\"”]?)"
                r"(?=[,.;]| and | by | in | because | after )",
                _called,
            ),
            (
                "long",
                opening + rf"{some}({pasts}|was|were)((?: [\w’'-]+){{0,6}}?) for "
                rf"((?:about |over |nearly |almost |approximately )?{NUMBER} "
                r"(?:years|months|weeks|days|hours|minutes|centuries))\b",
                _how_long,
            ),
            ("what", opening + rf"{some}({pasts}) ((?:the|a|an) [\w’' -]+?){after}", _what),
            (
                "is",
                rf"^(The [a-z]+(?: [a-z]+)? (?:of|for|in) (?:the )?(?:{NAME}|[\w’'-]+(?:"
                rf" [\w’'-]+)?) )"
                rf"(is|was|are|were) ((?:the |a |an )?[\w’'-][\w’' -]*?)(?=[,.;]| and | which |"
                rf" with )",
                _what_is,
            ),
            (
                "being",
                rf"^((?:The )?{NAME} )(?:\([^()]*\) )?(is|was) ((?:an|a|the) [\w’' -]+?)"
                r"(?=[,.;]| that | which | who | and | whose | located | published | directed )",
                _being,
            ),
            (
                "subject",
                opening + rf"((?:[Tt]he|An?) (?:[\w’'-]+ ){{1,4}}?|{NAME} )"
                rf"({_AUXILIARY}|{pasts}|{presents})\b([^;]*)\.",
                _who_what,
            ),
        )
    )


def _when_first(asker: Asker, it: re.Match) -> _Made:
    return (made, 1) if (made := _when(asker, it[2], it[3], it[4])) else None


def _when_last(asker: Asker, it: re.Match) -> _Made:
    return (made, 4) if (made := _when(asker, it[1], it[2], it[3])) else None


def _did(asker: Asker, subject: str, verb: str, rest: str, most: int) -> str | None:
    """Subject and predicate as they stand behind "when", or None."""
    subject = _subject(subject[0].upper() + subject[1:] if subject.startswith("the ") else subject)
    if not subject or asker.has_verb(subject):
        return None
    if verb in ("was", "were"):
        word, _, more = rest.strip().partition(" ")
        if not word.isalpha() or not (asker.past(word) or word == "born"):
            return None
        phrase = _phrase(f" {more}", most)
        return None if phrase is None else f"{verb} {subject} {word} {phrase}".strip()
    phrase = _phrase(rest, most)
    if not phrase or phrase in ("out", "up") or phrase.startswith("by ") or asker.has_verb(phrase):
        return None
    return f"did {subject} {asker.base(verb)} {phrase}".strip()


def _when(asker: Asker, subject: str, verb: str, rest: str) -> str | None:
    made = _did(asker, subject, verb, rest, 7)
    return f"When {made}?" if made else None


def _how_long(asker: Asker, it: re.Match) -> _Made:
    made = _did(asker, it[1], it[2], it[3], 6)
    return (f"For how long {made}?", 4) if made else None


def _who_by(asker: Asker, it: re.Match) -> _Made:
    past, subject = asker.past(it[3]), _subject(it[1])
    agent = it[5].removeprefix("the ").removeprefix("The ")
    if not past or not subject or re.search(rf"\b(?:{_MONTHS}|[a-z]+ing)\b", it[5]):
        return None
    rest = _phrase(it[4], 4)
    if rest is None or agent in ("means", "way", "far", "law", "then", "foot", "train"):
        return None
    who = asker.person(agent) or _PEOPLE.search(agent)
    if agent[0].isupper() and not who and not _NO_PERSON.search(agent):
        return None
    return f"{'Who' if who else 'What'} {past} {subject} {rest}".strip() + "?", 5


def _where(asker: Asker, it: re.Match) -> _Made:
    subject = _subject(it[1])
    if not subject or it[3] in _NO_PLACE:
        return None
    if re.search(rf"\b(?:{_MONTHS}|War|Act|[A-Z][a-z]+s)\b", it[4]) or it[4].startswith("A "):
        return None
    return f"Where {it[2]} {subject} {it[3]}?", 4


def _how_many(asker: Asker, it: re.Match) -> _Made:
    subject = _subject(it[1])
    if (
        not subject
        or it[4].startswith("or ")
        or it[4].split()[-1] in ("years", "times", "is", "was", "has", "as", "lies")
    ):
        return None
    past = it[2] in ("had", "contained", "included")
    plural = it[2] in ("have", "contain", "include")
    verb = {"h": "have", "c": "contain", "i": "include"}[it[2][0]]
    return f"How many {it[4]} {'did' if past else 'do' if plural else 'does'} {subject} {verb}?", 3


def _share(asker: Asker, it: re.Match) -> _Made:
    phrase = _phrase(it[4], 6)
    if (
        _LOOSE.search(it[2])
        or re.search(r"\b(?:whom|and)\b", it[2])
        or not phrase
        or " " not in phrase
        or phrase.endswith("ern")
    ):
        return None
    return f"What percentage of {it[2].strip()} {it[3]} {phrase}?", 1


def _called(asker: Asker, it: re.Match) -> _Made:
    subject = _subject(it[1])
    if not subject or re.match(r"(?:the )?(?:for|after|in|on|at|to|by|a|an|up)\b", it[4]):
        return None
    return f"What {it[2]} {subject} {it[3]}?", 4


def _what(asker: Asker, it: re.Match) -> _Made:
    subject = _subject(it[1])
    thing = it[3]
    if not subject or len(thing.split()) > 6 or asker.has_verb(thing) or _LOOSE.search(thing):
        return None
    if _PEOPLE.search(_head(thing)) or re.search(
        r"\b(?:year|day|time|way|most|end|of|\w+ly)$", thing
    ):
        return None
    if asker.has_verb(subject) or thing.split()[-1] in ("two", "three", "four", "impossible"):
        return None
    behind = it.string[it.end() :]
    if behind.startswith(" to "):
        return None  # "a tendency to tip backwards"
    if behind.startswith(" and ") and not _JOINED.match(behind[5:]):
        return None
    if re.match(", [A-Z]", behind) or (behind.startswith(",") and _ADJECTIVE.search(thing)):
        return None  # "political, diplomatic and military authority"
    if re.search(r"\b(?:about|on|at|to|with|by|from)\b|\b[A-Z]$", thing):
        return None
    if it[2] in _NO_OBJECT or re.search(r"(?:ing|ed|ly|est|ous|able|ive|known)$", thing):
        return None
    return f"What did {subject} {asker.base(it[2])}?", 3


def _what_is(asker: Asker, it: re.Match) -> _Made:
    subject, thing = _subject(it[1], 7), it[3]
    if not subject or _LOOSE.search(thing) or asker.has_verb(thing) or len(thing.split()) > 6:
        return None
    if _PEOPLE.search(_head(subject)) or not re.match(r"the |an? |[A-Z]", thing):
        return None
    return f"What {it[2]} {subject}?", 3


def _being(asker: Asker, it: re.Match) -> _Made:
    subject, behind = _subject(it[1]), it.string[it.end() :]
    if not subject or _LOOSE.search(it[3]) or len(it[3].split()) < 3:
        return None
    if behind.startswith(" and ") and not _JOINED.match(behind[5:]):
        return None
    if _ADJECTIVE.search(it[3]):
        return None
    known = subject.startswith("the ") or " " not in subject or asker.thing(subject)
    who = asker.person(subject)
    return f"{'Who' if who else 'What' if known else 'Who or what'} {it[2]} {subject}?", 3


def _there(asker: Asker, it: re.Match) -> _Made:
    phrase = _phrase(it[4], 7)
    if not phrase or _LOOSE.search(it[3]) or asker.has_verb(phrase):
        return None
    verb = {"have been": "have there been"}.get(it[1], f"{it[1]} there")
    return f"How many {it[3]} {verb} {phrase}?", 2


def _number(asker: Asker, it: re.Match) -> _Made:
    phrase = _predicate(asker, it[3], it[4])
    if not phrase or it[2].split()[-1] in ("years", "days", "months", "times", "percent", "miles"):
        return None
    return f"How many {it[2]} {it[3]} {phrase}?", 1


def _which(asker: Asker, it: re.Match) -> _Made:
    phrase = _predicate(asker, it[3], it[4])
    if not phrase or _NO_PERSON.search(it[2]):
        return None
    role = it[1] if _NATIONAL.match(it[1]) else it[1].lower()
    return f"Which {role} {it[3]} {phrase}?", 2


def _predicate(asker: Asker, verb: str, rest: str) -> str | None:
    """What follows a verb, where the subject is asked for; None where it may be no predicate."""
    phrase = _phrase(rest, 9)
    if not phrase or phrase.startswith("by ") or re.search(r"\w{3,}ing$", phrase):
        return None
    first = phrase.split()[0]
    if verb in ("are", "were"):
        return phrase if asker.past(first) and not asker.has_verb(phrase[len(first) :]) else None
    if verb in ("have", "had"):
        return phrase if asker.past(first) or first in ("a", "an", "the") else None
    if first in _PREPOSITIONS and verb not in _INTRANSITIVE:
        return None
    if asker.has_verb(phrase) or re.search(r"\w{3,}ed\b", phrase):
        return None
    return phrase if len(phrase.split()) > 1 else None


def _who_what(asker: Asker, it: re.Match) -> _Made:
    subject, verb = it[1].strip(), it[2]
    subject = subject[0].upper() + subject[1:]
    plain = _subject(subject)
    if not plain or asker.has_verb(plain) or re.search(r" (?:that|which|who) ", subject):
        return None
    phrase = _phrase(it[3], 9)
    if not phrase or len(phrase.split()) < 3 or phrase.startswith("by "):
        return None
    content = [w for w in re.findall(r"[a-z]{4,}|[A-Z]\w+|\d+", phrase) if w not in _STOP]
    if len(content) < 2:
        return None
    first = phrase.split()[0]
    if verb in ("is", "are", "was", "were"):
        if subject.startswith(("A ", "An ")):
            return None
        if first != "the" and not asker.past(first):
            return None
        if first == "the" and re.match(r" ?and (?:the|an?)\b", it[3][len(phrase) + 1 :]):
            return None  # "the oldest are the University of X [and the cathedral]"
        if asker.has_verb(phrase.partition(" ")[2]) or first in ("composed", "divided", "entered"):
            return None
    elif verb in ("has", "have", "had"):
        if not asker.past(first) and not re.match(rf"(?:an?|the|{NUMBER}) ", phrase):
            return None
        if asker.has_verb(phrase.partition(" ")[2]):
            return None
    elif asker.has_verb(phrase) or re.search(r"\w{3,}ed\b", phrase):
        return None
    if re.search(r"\w{3,}ing$", phrase):
        return None
    if first in _PREPOSITIONS and verb not in _AUXILIARY and verb not in _INTRANSITIVE:
        return None
    head = _head(plain)
    who = asker.person(subject) or _PEOPLE.search(head) or _NATION.match(head)
    who = who or _ROLE.search(subject)
    described = re.search(r"^(?:The|An?) .*\b[a-z]+ ([A-Z][a-z]+(?: [A-Z][a-z]+)?)$", subject)
    named = described[1] if described else subject
    plainly = not described and subject.startswith(("The ", "A ", "An "))
    unsure = not (who or plainly or asker.thing(named))
    opening = "Who or what" if unsure else "Who" if who else "What"
    return f"{opening} {verb} {phrase}?", 1
