"""Entries of a dictionary on people and places, with questions from relation templates."""

import re
from collections.abc import Iterator

from feedforward.qa.embedded.draft import Draft, choose

_ENTRY = re.compile(r"^\d{8} (\d\d) n ([0-9a-f]{2}) (\S+) \S .* @i .*\| (.*)$")
_PERSON, _PLACE, _THING = "18", "15", "17"  # lexicographer files
_LIFE = re.compile(r"\((?:born in )?(\d{3,4})(?:-(\d{3,4}))?\)$")
_NATION = (
    r"United States|British|English|Scottish|Irish|Welsh|French|German|Austrian|Italian|Spanish|"
    r"Dutch|Russian|Soviet|Polish|Hungarian|Swedish|Norwegian|Danish|Swiss|Belgian|Greek|Roman|"
    r"Canadian|Australian|Czech|Finnish|Portuguese|Mexican|Chilean|Argentine|Chinese|Japanese|"
    r"Indian|Persian|Egyptian|Israeli|Romanian|Flemish|Florentine|Carthaginian"
)
_WHO = re.compile(
    rf"^(?:ancient |influential |prolific |noted )?({_NATION}) "
    r"((?:\(born in [A-Z]\w+\) )?[a-z][a-z -]*?)(?= who | whose | noted | best | known |"
    r" remembered "
    r"| famous | and |,| of | in | \(|;| for | during | to | at )"
)
_KIND = re.compile(
    r"^(?:an?|the) ((?:[a-z-]+ ){0,2}?(?:city|town|port|river|lake|mountain|mountain range|island|"
    r"peninsula|strait|desert|village|volcano|peak|resort|republic|kingdom|bay|gulf|sea|mountain "
    r"peak|seaport|glacier|plateau|state|province|suburb|waterfall|region|archipelago))"
    r" (?:in|on|of|that|between|off) "
)
_WHERE = re.compile(
    r"^(?:an?|the) (?:[a-z-]+ ){0,4}?(?:city|town|river|lake|mountain|peak|volcano|port|village|"
    r"suburb|resort|desert|range|glacier|waterfall|seaport|bay|peninsula) in ((?:the )?(?:[a-z]+"
    r" ){0,3}"
    r"[A-Z][\w-]+(?: [A-Z][\w-]+)*)(?=$|[;,]| on | near | at | where | that | which )"
)
_CAPITAL = re.compile(
    r"(?<!former )\bcapital(?: and (?:[a-z]+ )?(?:city|port)(?: in)?)? of ((?:the"
    r" )?(?:[A-Z][\w-]+ ?)+)(?=[;,]|$| and | on )"
)
_FLOWS = re.compile(
    r"\b(?:flows?|flowing|empties|emptying)\b[^;]*? (?:in)?to (?:become a tributary of )?"
    r"(the (?:[A-Z][\w-]+ ?)+(?: of [A-Z][\w-]+)?)(?=[;,]|$| in | at | near | and )"
)
_SOURCE = re.compile(
    r"\b(?:rises|arises|originates|rising) in ((?:[a-z]+ ){0,2}[A-Z][\w-]+(?: [A-Z][\w-]+)?)"
)
_ON_RIVER = re.compile(r"\bon the ([A-Z][\w-]+(?: [A-Z][\w-]+)? [Rr]iver)\b")
_NOTED = re.compile(
    r"\b(?:noted|known|famous|remembered|best known) for (?:(?:his|her|its) )?((?:[\w'-]+"
    r" ){0,4}[\w'-]+)(?=$|[;,]| \()"
)
_FOUNDED = re.compile(r"\bfounded by ((?:the )?(?:[A-Z][\w-]+ ?)+)(?=[;,]|$| in | as | and )")

# relation -> (pattern of the gloss, group, whom it is asked of, questions)
_RELATIONS = (
    (
        "born",
        _LIFE,
        1,
        _PERSON,
        (
            "In which year was {} born?",
            "What is the birth year of {}?",
            "When did the life of {} begin?",
        ),
    ),
    (
        "died",
        _LIFE,
        2,
        _PERSON,
        (
            "In which year did {} die?",
            "What is the year of death of {}?",
            "Until which year did {} live?",
        ),
    ),
    (
        "nationality",
        _WHO,
        1,
        _PERSON,
        ("What is the nationality of {}?", "What nationality did {} have?"),
    ),
    (
        "occupation",
        _WHO,
        2,
        _PERSON,
        (
            "What was the occupation of {}?",
            "What did {} do for a living?",
            "What profession did {} have?",
        ),
    ),
    ("known for", _NOTED, 1, None, ("What made {} famous?", "To what does {} owe its fame?")),
    (
        "location",
        _WHERE,
        1,
        _PLACE,
        (
            "In which area is {} to be found?",
            "Where is {}?",
            "What part of the world does {} belong to?",
        ),
    ),
    ("kind", _KIND, 1, _PLACE, ("What sort of place is {}?", "As what is {} classified?")),
    (
        "capital of",
        _CAPITAL,
        1,
        _PLACE,
        ("Which territory is governed from {}?", "{} is the seat of government of what?"),
    ),
    (
        "mouth",
        _FLOWS,
        1,
        _PLACE,
        ("What body of water receives the waters of {}?", "Where is the mouth of {}?"),
    ),
    ("source", _SOURCE, 1, _PLACE, ("Where is the source of {}?", "Where does {} begin?")),
    (
        "river",
        _ON_RIVER,
        1,
        _PLACE,
        ("Which river runs past {}?", "Next to which body of water does {} lie?"),
    ),
    ("founder", _FOUNDED, 1, None, ("Who established {}?", "By whom was {} set up?")),
)


def drafts(nouns: str) -> Iterator[Draft]:
    """Questions on the instance entries of WordNet's ``data.noun``; the source is the entry."""
    for line in nouns.splitlines():
        it = _ENTRY.match(line)
        if it is None or it[1] not in (_PERSON, _PLACE, _THING):
            continue
        of_what = _PERSON if it[1] == _PERSON else _PLACE
        gloss = it[4].split('; "')[0].strip()
        synonyms = re.findall(r"[^\d\s]\S*(?= [0-9a-f] )", line.split(" @")[0][14:])
        names = [synonym.replace("_", " ") for synonym in synonyms]
        name = min(
            names, key=lambda it: len(it.split()) != 2
        )  # the first of two words, or the first
        if not 6 <= len(gloss.split()) <= 40 or not name[0].isupper():
            continue
        if of_what == _PLACE and re.search(r"\b(?:River|Lake|Sea|Gulf|Bay|Strait|Ocean)$", name):
            name = f"the {name}"
        head = f"{name[0].upper()}{name[1:]}: "
        context = f"{head}{gloss}."
        found = []
        for kind, pattern, group, of, forms in _RELATIONS:
            if of not in (None, of_what) or not (at := pattern.search(gloss)) or not at[group]:
                continue
            answer = at[group].strip()
            if (
                re.search(r"born|responsible$|^(?:in|of) ", answer)
                or len(answer.split()) > 6
                or answer.lower() in name.lower()
            ):
                continue
            if kind == "known for" and of_what == _PERSON:
                forms = ("What made {} famous?", "For what is the memory of {} kept?")
            start = len(head) + at.start(group)
            question = choose(forms, name, kind).format(name)
            found.append(Draft(kind, question, context, answer, start, source=name))
        if found:
            yield choose(found, name)
