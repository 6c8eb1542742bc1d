"""Augmented copies of questions, with a count of what became of their answers."""

import pickle
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import numpy as np

from feedforward.augment.eda import StrippedEDA
from feedforward.augment.lexicon import wordnet
from feedforward.augment.spans import ProtectedText, Rewritten, SpanError

Augmenter = Callable[[ProtectedText, np.random.Generator], ProtectedText]
_CHUNK = 256  # copies that a process makes at a time


@dataclass(frozen=True)
class Report:
    """What became of the copies that were asked for.

    Attributes:
        questions: How many questions were given.
        copies: How many copies were made.
        kept: Answers of these questions' copies that stand exact in a context of the augmenter.
        repaired: Answers whose surroundings were put back as they were, since they were lost on
            the way; they stand exact too.
        lost: Answers that are not in the new context. A copy that lost all is not made.
        unchanged: Copies whose context has the words of the question's, in their order: a reader
            learns nothing new from other white space, which a translator makes single spaces.
        changed: Mean share of the words of a context that differ, from 0 (the same) to 1: the
            edit distance in words over the length of the longer context.
        not_made: Ids of the copies that are missing because no answer was left.
    """

    questions: int
    copies: int
    kept: int
    repaired: int
    lost: int
    unchanged: int
    changed: float
    not_made: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.copies} copies of {self.questions} questions ({self.unchanged} unchanged, "
            f"{len(self.not_made)} not made), {self.changed:.1%} of the words changed; answers: "
            f"{self.kept} kept, {self.repaired} repaired, {self.lost} lost"
        )


@dataclass(frozen=True)
class Augmented:
    """Copies of questions and what became of their answers.

    Attributes:
        questions: The copies alone, in the order of the questions; add the originals to train on
            both.
        report: What was kept, repaired and lost.
    """

    questions: list[Any]
    report: Report


def augment_questions(
    questions: Iterable[Any],
    augmenter: Augmenter,
    *,
    copies: int = 1,
    seed: int = 0,
    processes: int = 1,
) -> Augmented:
    """Copies of questions with augmented contexts and answers where they now stand.

    Each copy is drawn from the seed, the question's id and the copy's number alone: neither order
    nor the number of processes changes it. A copy's id is ``<id>#1``, ``<id>#2``, ...

    Args:
        questions: Dataclasses with ``id``, ``context`` and ``answers``, each answer with ``text``
            and ``start`` (characters), as :class:`feedforward.qa.schema.Question`.
        augmenter: What makes a new text of a :class:`ProtectedText`, for instance :class:`EDA`.
            One with a method ``many(texts, rngs)`` that gives a list of :class:`Rewritten` is
            asked for many at once.
        copies: How many of each question.
        seed: Of all randomness, not negative.
        processes: How many work side by side.

    Raises:
        ValueError: An answer does not stand in its context, an id occurs twice or already stands
            for a copy, a number is out of its range, or the augmenter cannot be sent to other
            processes.

    Book: ``book/robust-qa/02-augmentation``.
    """
    questions = list(questions)
    for name, value, least in (
        ("copies", copies, 1),
        ("seed", seed, 0),
        ("processes", processes, 1),
    ):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} is {value}; a whole number of at least {least} is needed")
    tasks = [
        (question, f"{question.id}#{number}")
        for question in questions
        for number in range(1, copies + 1)
    ]
    taken = {question.id for question in questions}
    if len(taken) < len(questions):
        raise ValueError("two questions have the same id; ids tell the copies apart")
    if clash := next((new for _, new in tasks if new in taken), None):
        raise ValueError(
            f"the id {clash!r} is taken: augment the questions without their earlier copies"
        )

    chunks = [tasks[i : i + _CHUNK] for i in range(0, len(tasks), _CHUNK)]
    if processes == 1:
        chunks = [tasks]  # one request for engines that like many sentences
        results = map(_augment, chunks, repeat(augmenter), repeat(seed))
    else:
        try:
            pickle.dumps(augmenter)
        except Exception as error:  # its own, or what it is made of, raises what it likes
            raise ValueError(
                f"the augmenter cannot be sent to other processes ({error}): define it at the top "
                "of a module, or leave processes at 1"
            ) from error
        with ProcessPoolExecutor(min(processes, max(1, len(chunks)))) as pool:
            results = list(pool.map(_augment, chunks, repeat(augmenter), repeat(seed)))
    outcomes = list(chain.from_iterable(results))
    made = [outcome for outcome in outcomes if outcome.question is not None]
    return Augmented(
        [outcome.question for outcome in made],
        Report(
            questions=len(questions),
            copies=len(made),
            kept=sum(outcome.kept for outcome in outcomes),
            repaired=sum(outcome.repaired for outcome in outcomes),
            lost=sum(outcome.lost for outcome in outcomes),
            unchanged=sum(outcome.changed == 0 for outcome in made),
            changed=float(np.mean([outcome.changed for outcome in made])) if made else 0.0,
            not_made=tuple(
                new for (_, new), o in zip(tasks, outcomes, strict=True) if o.question is None
            ),
        ),
    )


def augment_as_released(
    questions: Iterable[Any],
    *,
    copies: int = 4,
    seed: int = 0,
    augmenter: StrippedEDA | None = None,
) -> Augmented:
    """EDA as the robust question answering system was trained with, for comparison.

    The questions stripped of case and punctuation (ids ``<id>#0``), followed by their changed
    copies (``<id>#1``, ...), whose report it gives: Zhou, Liu and Dong (2022, arXiv 2204.09598) and
    their released code.

    Args:
        questions: As for :func:`augment_questions`.
        copies: How many of each question beside the stripped one.
        seed: Of all randomness.
        augmenter: What makes the copies; None replaces 30 % of the words by words of any of
            their senses, as far as they have some.

    Raises:
        ValueError: As :func:`augment_questions`.
        MissingLexicon: No `augmenter` is given and no lexicon is installed.
    """
    questions = list(questions)
    augmenter = augmenter or StrippedEDA(lexicon=wordnet(senses="all"))
    stripped = augment_questions(questions, StrippedEDA(synonyms=0), copies=1, seed=seed)
    changed = augment_questions(questions, augmenter, copies=copies, seed=seed)
    kept = [replace(question, id=f"{question.id[:-1]}0") for question in stripped.questions]
    return Augmented(kept + changed.questions, changed.report)


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """How many words must be inserted, deleted or replaced to make one list of the other.

    Computed a whole column at a time in the bits of one integer (Myers 1999, Hyyrö 2003).

    >>> edit_distance("the big old cat".split(), "the large cat sat".split())
    3
    """
    if not first or not second:
        return len(first) + len(second)
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    whole, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    distance, up, down = len(first), whole, 0  # where a column rises and falls by one
    for word in second:
        match = places.get(word, 0)
        vertical = match | down
        diagonal = (((match & up) + up) ^ up) | match
        right_up = down | (whole & ~(diagonal | up))
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = (right_up << 1 | 1) & whole
        right_down = (right_down << 1) & whole
        up = right_down | (whole & ~(vertical | right_up))
        down = right_up & vertical
    return distance


@dataclass(frozen=True)
class _Outcome:
    question: Any | None
    kept: int
    repaired: int
    lost: int
    changed: float


def _augment(tasks: Sequence[tuple[Any, str]], augmenter: Augmenter, seed: int) -> list[_Outcome]:
    texts = [_protect(question) for question, _ in tasks]
    rngs = [np.random.default_rng((seed, zlib.crc32(new.encode()))) for _, new in tasks]
    if hasattr(augmenter, "many"):
        results = augmenter.many(texts, rngs)
    else:
        results = [Rewritten(augmenter(text, rng)) for text, rng in zip(texts, rngs, strict=True)]
    return [
        _copy(question, new, text, result)
        for (question, new), text, result in zip(tasks, texts, results, strict=True)
    ]


def _protect(question: Any) -> ProtectedText:
    spans = []
    for answer in question.answers:
        end = answer.start + len(answer.text)
        if question.context[answer.start : end] != answer.text or answer.start < 0:
            raise ValueError(
                f"question {question.id!r}: the answer {answer.text!r} does not stand at "
                f"{answer.start} of its context, where {question.context[answer.start : end]!r} is"
            )
        spans.append((answer.start, end))
    try:
        return ProtectedText(question.context, tuple(spans))
    except SpanError as error:
        raise SpanError(f"question {question.id!r}: {error}") from error


def _copy(question: Any, new: str, old: ProtectedText, result: Rewritten) -> _Outcome:
    """The copy with its answers, each of them one of the old ones, as far as letters go."""
    text, wanted = result.text, {_essence(answer) for answer in old.protected}
    answers = tuple(
        replace(question.answers[0], text=answer, start=start)
        for answer, (start, _) in zip(text.protected, text.spans, strict=True)
        if _essence(answer) in wanted
    )
    lost = len(old.spans) - len(answers)
    if old.spans and not answers:
        return _Outcome(None, 0, 0, lost, 0.0)
    before, after = old.text.split(), text.text.split()
    distance = edit_distance(before, after) if old.text != text.text else 0
    return _Outcome(
        replace(question, id=new, context=text.text, answers=answers),
        kept=len(answers) - result.repaired,
        repaired=result.repaired,
        lost=lost,
        changed=distance / max(len(before), len(after), 1),
    )


def _essence(answer: str) -> str:
    return "".join(filter(str.isalnum, answer.casefold())) or answer
