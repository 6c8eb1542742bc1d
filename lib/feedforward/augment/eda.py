"""Easy data augmentation around protected answers: synonyms, insertions, swaps, deletions.

The operations are those of Wei and Zou (2019, arXiv 1901.11196, section 2), on the words outside
the protected spans of a text: n = alpha * words of them change, at least one where alpha > 0 (as in
the authors' code), a deletion hits each word with probability alpha. Punctuation, white space
and case stay, where the authors drop them; :class:`StrippedEDA` drops them too.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from feedforward.augment.lexicon import Lexicon, default_lexicon
from feedforward.augment.spans import Edit, ProtectedText, Span, free_words

# Function words, which carry no topic: never replaced, and kept in place unless asked otherwise.
_FUNCTION_WORDS = """
    a about above after again against all almost along already also although always am among an and
    another any anybody anyone anything are aren't around as at away be because been before behind
    being below beneath beside besides between beyond both but by can can't cannot could couldn't
    despite did didn't do does doesn't doing don't done down during each either else enough etc even
    ever every everybody everyone everything except few for from further had hadn't has hasn't have
    haven't having he he'd he'll he's hence her here hers herself him himself his how however i i'd
    i'll i'm i've if in indeed inside instead into is isn't it it'll it's its itself just least less
    let let's like many may me might mine more moreover most much must mustn't my myself near
    neither never no nobody none nor not nothing now of off often on once one only onto or other
    others otherwise ought our ours ourselves out outside over own per perhaps quite rather same
    shall shan't she she'd she'll she's should shouldn't since so some somebody someone something
    sometimes somewhat still such than that that's the their theirs them themselves then there
    there's therefore these they they'd they'll they're they've this those though through throughout
    thus till to together too toward towards under unless until up upon us very via was wasn't we
    we'd we'll we're we've were weren't what what's whatever when whenever where whereas wherever
    whether which whichever while who who'd who'll who's whoever whom whose why will with within
    without won't would wouldn't yes yet you you'd you'll you're you've your yours yourself
    yourselves
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())

_OPENING = "([{<\"'«“‘„¿¡—"


class EDA:
    """Random edits of the words outside the protected spans, by Wei and Zou (2019).

    The operations follow one another: synonyms, swaps, deletions, insertions. A substitute takes
    the case of the word it stands for, moved words keep their own. A text with too few words or
    no synonyms comes back with fewer edits than asked for, down to none.

    Args:
        synonyms: Share of the words replaced by a synonym (0 to 1).
        insertions: Synonyms of words of the text put in at random places, as a share of the words.
        swaps: Pairs of words that change places, as a share of the words.
        deletions: Probability of each word to go; one word always stays.
        lexicon: Where synonyms come from; None loads the default when it is first needed.
        keep_stop_words: Swaps and deletions leave stop words alone, as synonyms and insertions
            always do; False is the paper's form.
        one_operation: Draw one of the operations with a share above 0 for each text, as the paper
            does, in place of all of them.

    Raises:
        ValueError: A share is not between 0 and 1.

    >>> import numpy as np
    >>> context = ProtectedText("Big dogs, old cats (and mice) live in Rome.", ((38, 42),))
    >>> edit = EDA(synonyms=0, insertions=0, swaps=0, deletions=0.5)
    >>> edit(context, np.random.default_rng(0)).text
    'Big, (and mice) live in Rome.'

    Book: ``book/robust-qa/02-augmentation``.
    """

    def __init__(
        self,
        *,
        synonyms: float = 0.1,
        insertions: float = 0.1,
        swaps: float = 0.1,
        deletions: float = 0.1,
        lexicon: Lexicon | None = None,
        keep_stop_words: bool = True,
        one_operation: bool = False,
    ):
        shares = {
            "synonyms": synonyms,
            "insertions": insertions,
            "swaps": swaps,
            "deletions": deletions,
        }
        for name, share in shares.items():
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}, a share between 0 and 1 is needed")
        self.shares = shares
        self.lexicon = lexicon
        self.keep_stop_words = keep_stop_words
        self.one_operation = one_operation

    def __repr__(self) -> str:
        shares = ", ".join(f"{name}={share:g}" for name, share in self.shares.items())
        return f"{type(self).__name__}({shares})"

    def __call__(self, protected: ProtectedText, rng: np.random.Generator) -> ProtectedText:
        """A changed copy of a text; the protected spans hold the same words at their new places.

        Args:
            protected: The text and its protected spans.
            rng: Where the randomness comes from; the same state gives the same copy.

        Raises:
            MissingLexicon: Synonyms or insertions are wanted and no lexicon is installed.
        """
        places = free_words(protected)
        wanted = {name: share for name, share in self.shares.items() if share > 0}
        if not places or not wanted:
            return protected
        if self.one_operation:
            name = list(wanted)[rng.integers(len(wanted))]
            wanted = {name: wanted[name]}
        # the floor, safe against 0.29 * 100 = 28.999...
        count = {name: max(1, int(wanted[name] * len(places) + 1e-9)) for name in wanted}

        words = [protected.text[start:end] for start, end in places]
        now = [[word] for word in words]  # what will stand in the place of each word
        known: list[tuple[str, ...]] = []
        if "synonyms" in wanted or "insertions" in wanted:
            known = self._synonyms(words)
        if "synonyms" in wanted:
            _replace(now, known, count["synonyms"], rng)
        movable = range(len(words))
        if self.keep_stop_words:
            movable = [i for i in movable if words[i].lower() not in STOP_WORDS]
        if "swaps" in wanted:
            _swap(now, movable, count["swaps"], rng)
        if "deletions" in wanted:
            _delete(now, movable, wanted["deletions"], rng, spare_one=not protected.spans)
        if "insertions" in wanted:
            _insert(now, known, count["insertions"], rng)
        return protected.edit(_edits(protected, places, words, now))

    def _synonyms(self, words: list[str]) -> list[tuple[str, ...]]:
        if self.lexicon is None:
            self.lexicon = default_lexicon()
        look_up = self.lexicon.synonyms
        lowered = [word.lower() for word in words]
        return [() if word in STOP_WORDS else look_up(word) for word in lowered]


class StrippedEDA:
    """The robust question answering system's form of EDA, kept for comparison.

    The text is lower-cased and loses its punctuation; no occurrence of a word of any answer
    changes, nor does a stop word; afterwards each answer is looked for again, and its first
    occurrence is taken for its place, which may be the wrong one. An answer that is not found is
    lost: the result has a span less. Zhou, Liu and Dong (2022, arXiv 2204.09598) and their
    released code.

    Args:
        synonyms: As for :class:`EDA`; by default the released setting, synonyms alone.
        insertions: As for :class:`EDA`.
        swaps: As for :class:`EDA`.
        deletions: As for :class:`EDA`.
        lexicon: As for :class:`EDA`.

    >>> import numpy as np
    >>> context = ProtectedText("In 1066, after May; in May 1067.", ((23, 26),))
    >>> stripped = StrippedEDA(synonyms=0)(context, np.random.default_rng(0))
    >>> stripped.text, stripped.spans  # the first May is not the one that was asked for
    ('in 1066 after may in may 1067', ((14, 17),))

    Book: ``book/robust-qa/02-augmentation``.
    """

    def __init__(
        self,
        *,
        synonyms: float = 0.3,
        insertions: float = 0.0,
        swaps: float = 0.0,
        deletions: float = 0.0,
        lexicon: Lexicon | None = None,
    ):
        self.eda = EDA(
            synonyms=synonyms,
            insertions=insertions,
            swaps=swaps,
            deletions=deletions,
            lexicon=lexicon,
        )

    def __repr__(self) -> str:
        return repr(self.eda).replace("EDA", type(self).__name__, 1)

    def __call__(self, protected: ProtectedText, rng: np.random.Generator) -> ProtectedText:
        """A stripped and changed copy; its spans are those of the answers that were found again.

        Args:
            protected: The text and the places of the answers.
            rng: Where the randomness comes from.

        Raises:
            MissingLexicon: Synonyms or insertions are wanted and no lexicon is installed.
        """
        answers = [strip(answer) for answer in protected.protected]
        kept = {word for answer in answers for word in answer.split()}
        text = strip(protected.text)
        words = re.finditer(r"\S+", text)
        spans = tuple(word.span() for word in words if word[0] in kept)
        text = self.eda(ProtectedText(text, spans), rng).text
        found = [(text.find(answer), len(answer)) for answer in answers]
        return ProtectedText(
            text, tuple((start, start + size) for start, size in found if start >= 0 and size)
        )


def strip(text: str) -> str:
    """A text in lower case without punctuation, one space between words.

    Hyphens part words, every other mark of punctuation vanishes.

    >>> strip("Don't  panic: it's 4.5 a well-known\\nU.S. number.")
    'dont panic its 45 a well known us number'
    """
    text = re.sub(r"[-\u2010-\u2015]", " ", text.lower())
    return " ".join(re.sub(r"[^\w\s]|_", "", text).split())


def _replace(now: list[list[str]], known: list[tuple[str, ...]], count: int, rng) -> None:
    """Put synonyms in the places of at most `count` words that have some."""
    places = rng.permutation([i for i, synonyms in enumerate(known) if synonyms])[:count]
    for i, draw in zip(places.tolist(), rng.random(len(places)).tolist(), strict=True):
        synonym = known[i][int(draw * len(known[i]))]
        now[i] = [_in_case_of(now[i][0], synonym)]


def _swap(now: list[list[str]], movable: Sequence[int], count: int, rng) -> None:
    """Let `count` pairs of words change places, one pair after the other."""
    size = len(movable)
    if size < 2:
        return
    first = rng.integers(size, size=count)
    second = (first + rng.integers(1, size, size=count)) % size
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        i, j = movable[a], movable[b]
        now[i], now[j] = now[j], now[i]


def _delete(now: list[list[str]], movable: Sequence[int], share: float, rng, *, spare_one) -> None:
    """Take out each movable word with probability `share`, never the last word of a text."""
    draws = rng.random(len(movable)).tolist()
    going = [i for i, draw in zip(movable, draws, strict=True) if draw < share]
    if spare_one and len(going) == len(now):
        going.pop(rng.integers(len(going)))
    for i in going:
        now[i] = []


def _insert(now: list[list[str]], known: list[tuple[str, ...]], count: int, rng) -> None:
    """Put `count` synonyms of words of the text before or after random places."""
    sources = [synonyms for synonyms in known if synonyms]
    if not sources:
        return
    for source, choice, place, side in rng.random((count, 4)).tolist():
        synonyms = sources[int(source * len(sources))]
        words = now[int(place * len(now))]
        words.insert(0 if side < 0.5 else len(words), synonyms[int(choice * len(synonyms))])


def _in_case_of(word: str, synonym: str) -> str:
    if len(word) > 1 and word.isupper():
        return synonym.upper()
    return synonym[0].upper() + synonym[1:] if word[0].isupper() else synonym


def _edits(protected: ProtectedText, places: list[Span], words: list[str], now: list[list[str]]):
    """The edits that put what stands in `now` in the places of the words."""
    edits: list[Edit] = []
    walls = [edge for block in protected.blocks for edge in block]
    for (start, end), word, new in zip(places, words, now, strict=True):
        if not new:
            wall = bisect_right(walls, start)  # spaces are taken up to the block before and after
            low = max(walls[wall - 1] if wall else 0, edits[-1][1] if edits else 0)
            high = walls[wall] if wall < len(walls) else len(protected.text)
            edits.append((*_with_spaces(protected.text, start, end, low, high), ""))
        elif new != [word]:
            edits.append((start, end, " ".join(new)))
    return edits


def _with_spaces(text: str, start: int, end: int, low: int, high: int) -> Span:
    """A word and the spaces before it, or at the beginning of a line or bracket those after it."""
    before = start
    while before > low and text[before - 1] in " \t":
        before -= 1
    if before < start:
        return before, end
    if start == low or text[start - 1].isspace() or text[start - 1] in _OPENING:
        while end < high and text[end] in " \t":
            end += 1
    return start, end
