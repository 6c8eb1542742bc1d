"""What every maker of questions hands over, and choices that are the same on every machine."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Draft:
    """A question before it has an id and a split.

    Attributes:
        kind: The pattern or relation that asks it.
        question: As it is asked.
        context: The passage.
        answer: The stretch of the passage that answers.
        start: Its first character.
        source: What a split must not cut: the article, the country, the book, the play.
    """

    kind: str
    question: str
    context: str
    answer: str
    start: int
    source: str

    def __post_init__(self):
        if not self.context.startswith(self.answer, self.start) or not self.answer.strip():
            raise ValueError(f"{self.answer!r} is not at {self.start} of {self.context[:80]!r}")

    @property
    def digest(self) -> str:
        """A name made of question, answer and passage; also a random order that never changes."""
        return digest(self.question, self.answer, str(self.start), self.context)


def word_set(text: str) -> frozenset[str]:
    """The words of a string, to look them up."""
    return frozenset(text.split())


def digest(*parts: str) -> str:
    """64 hexadecimal digits that depend on all parts and nothing else."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def choose(options: Sequence[T], *key: str) -> T:
    """One of the options, at random but always the same for a key."""
    return options[int(digest(*key)[:12], 16) % len(options)]


def ordered(items: Iterable[T], *salt: str) -> list[T]:
    """Strings or drafts in an order that is random but always the same."""
    return sorted(
        items, key=lambda it: digest(*salt, it.digest if isinstance(it, Draft) else str(it))
    )


def take(drafts: Iterable[Draft], count: int, *, a_kind: float = 1.0, a_context: int = 3) -> list:
    """At most `count` drafts: a share of each kind at most, few a passage, no question twice."""
    kinds: Counter = Counter()
    contexts: Counter = Counter()
    asked: set[Hashable] = set()
    taken = []
    for draft in ordered(drafts):
        key = draft.context, draft.question
        full = kinds[draft.kind] >= a_kind * count or contexts[draft.context] >= a_context
        if len(taken) < count and not full and key not in asked:
            kinds[draft.kind] += 1
            contexts[draft.context] += 1
            asked.add(key)
            taken.append(draft)
    return taken


def unambiguous(drafts: Iterable[Draft]) -> list[Draft]:
    """Without the questions that two answers of one passage would fit."""
    answers = defaultdict(set)
    drafts = list(drafts)
    for draft in drafts:
        answers[draft.context, draft.question].add(draft.answer)
    return [it for it in drafts if len(answers[it.context, it.question]) == 1]
