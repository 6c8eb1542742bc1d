"""F1 and exact match as SQuAD defines them, with intervals over questions and paired tests."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from feedforward.profiles import unknown
from feedforward.qa.schema import Question

METRICS = ("f1", "em")

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces.

    Unicode is left as it is: a composed and a decomposed accent differ, as in the official script.

    >>> normalize_answer("The  Duke of   Saint-Simon!")
    'duke of saintsimon'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Iterable[str]) -> bool:
    """Whether a prediction equals one of the accepted answers, both normalised.

    Raises:
        ValueError: When there is no accepted answer.
    """
    return normalize_answer(prediction) in {normalize_answer(gold) for gold in _some(golds)}


def f1(prediction: str, golds: Iterable[str]) -> float:
    """The harmonic mean of word precision and recall, with the best of the accepted answers.

    Where one side has no word left after normalisation, it is 1 if the other has none either and
    else 0, as in the script of SQuAD 2.0.

    Raises:
        ValueError: When there is no accepted answer.

    >>> f1("in the town of Orange", ["Orange"])
    0.4
    """
    predicted = normalize_answer(prediction).split()
    return max(_f1(predicted, normalize_answer(gold).split()) for gold in _some(golds))


def _some(golds: Iterable[str]) -> list[str]:
    golds = list(golds)
    if not golds:
        raise ValueError(
            "golds is empty: there is no accepted answer to compare with; give at least one, and "
            "'' for a question that is rightly left unanswered"
        )
    return golds


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


@dataclass(frozen=True)
class Score:
    """Scores of a set of questions, in percent.

    Attributes:
        f1: Mean F1 over the questions.
        em: Mean exact match over the questions.
        count: Number of questions.
    """

    f1: float
    em: float
    count: int


@dataclass(frozen=True)
class ItemScores:
    """The scores of each question, from which everything else follows.

    Attributes:
        ids: Of the questions.
        domains: Of the questions.
        f1: (N,) in percent.
        em: (N,) in percent, 0 or 100.
    """

    ids: tuple[str, ...]
    domains: tuple[str, ...]
    f1: np.ndarray
    em: np.ndarray

    def score(self) -> Score:
        """The mean over all questions, as the paper reports it."""
        return Score(float(self.f1.mean()), float(self.em.mean()), len(self.ids))

    def by_domain(self) -> dict[str, Score]:
        """The mean over the questions of each domain, in the order of their first questions."""
        domains = np.array(self.domains)
        scores = {}
        for domain in dict.fromkeys(self.domains):
            own = domains == domain
            scores[domain] = Score(
                float(self.f1[own].mean()), float(self.em[own].mean()), int(own.sum())
            )
        return scores

    def by_question(self, metric: str = "f1") -> dict[str, float]:
        """One metric by question id, as records keep it for paired intervals."""
        return dict(zip(self.ids, _values(self, metric).tolist(), strict=True))

    def interval(
        self, metric: str = "f1", *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
    ) -> tuple[float, float]:
        """A bootstrap interval of the pooled mean over questions; see `bootstrap_interval`."""
        values = _values(self, metric)
        return bootstrap_interval(values, level=level, resamples=resamples, seed=seed)


def item_scores(
    predictions: Mapping[str, str], questions: Iterable[Question], *, missing: str = "raise"
) -> ItemScores:
    """Score each question: the best F1 and exact match over its accepted answers.

    Args:
        predictions: The predicted text by question id; predictions of other questions are ignored.
        questions: Each with at least one accepted answer, ids unique.
        missing: What a question without a prediction does: ``"raise"``, or ``"zero"``: it counts
            as an empty prediction, as in the official script.

    Raises:
        ValueError: When there are no questions, one has no accepted answer or no prediction, an id
            comes twice, or a prediction is no text.
    """
    if missing not in ("raise", "zero"):
        raise ValueError(unknown("missing", missing, ("raise", "zero")))
    questions = tuple(questions)
    if not questions:
        raise ValueError("there are no questions to score; give at least one")
    ids = tuple(question.id for question in questions)
    if len(set(ids)) < len(ids):
        twice = next(key for key, count in Counter(ids).items() if count > 1)
        raise ValueError(f"question id {twice!r} comes twice; one prediction cannot serve both")
    lacking = [key for key in ids if key not in predictions]
    if lacking and missing == "raise":
        raise ValueError(
            f"{len(lacking)} of {len(ids)} questions have no prediction, first {lacking[:3]}. "
            "Predict them, or give missing='zero' to count them as wrong."
        )
    values = np.zeros((2, len(ids)))
    for number, question in enumerate(questions):
        golds = {answer.text for answer in question.answers}
        if not golds:
            raise ValueError(f"question {question.id!r} has no accepted answer to score against")
        prediction = predictions.get(question.id, "")
        if not isinstance(prediction, str):
            raise ValueError(f"the prediction of {question.id!r} is {prediction!r}, not a text")
        values[:, number] = f1(prediction, golds), exact_match(prediction, golds)
    return ItemScores(ids, tuple(question.domain for question in questions), *100 * values)


def score(
    predictions: Mapping[str, str], questions: Iterable[Question], *, missing: str = "raise"
) -> Score:
    """F1 and exact match in percent, the mean over questions; see `item_scores`.

    Explained in ``book/robust-qa/01-task-and-gap``.

    >>> from feedforward.qa.schema import Answer
    >>> answers = (Answer("Ada Lovelace", 7),)
    >>> question = Question("1", "Who was it?", "It was Ada Lovelace.", answers, "demo")
    >>> score({"1": "Lovelace"}, [question])
    Score(f1=66.66666666666666, em=0.0, count=1)
    """
    return item_scores(predictions, questions, missing=missing).score()


# --- how sure -----------------------------------------------------------------------------------


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over questions.

    Args:
        values: (N,) one number a question.
        level: Share of the resampled means that the interval holds.
        resamples: Number of resampled means.
        seed: Of the resampling.

    Raises:
        ValueError: When there are no values or one is not finite, or `level` is not between 0 and
            1.
    """
    means = _resampled(_finite(values), resamples, seed)
    return _percentiles(means, level)


@dataclass(frozen=True)
class PairedTest:
    """Two systems on the same questions: the second minus the first, in points of percent.

    Attributes:
        difference: Of the means.
        low: Lower end of its bootstrap interval over questions.
        high: Upper end.
        p_bootstrap: Two-sided: twice the share of resamples on the other side of zero.
        p_permutation: Two-sided, with the signs of the differences flipped at random.
        spread: Standard deviation of the difference over questions.
        count: Number of questions.
    """

    difference: float
    low: float
    high: float
    p_bootstrap: float
    p_permutation: float
    spread: float
    count: int


def paired_test(
    first: ItemScores,
    second: ItemScores,
    metric: str = "f1",
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Is the second system better than the first? A paired bootstrap and a permutation test.

    Both look at the questions as drawn from many; neither knows of the spread over training seeds.

    Args:
        first: Scores of the baseline.
        second: Scores of the other system on the same questions, in any order.
        metric: ``"f1"`` or ``"em"``.
        level: Of the interval.
        resamples: Of each of the two tests; no p-value is below ``1 / (resamples + 1)``.
        seed: Of both.

    Raises:
        ValueError: When the questions are not the same, or the metric is unknown.
    """
    if set(first.ids) != set(second.ids):
        only = sorted(set(first.ids) ^ set(second.ids))
        raise ValueError(
            f"the systems answered different questions: {len(only)} are of one alone, first "
            f"{only[:3]}. Score both on the same questions."
        )
    place = {key: number for number, key in enumerate(second.ids)}
    order = [place[key] for key in first.ids]
    differences = _values(second, metric)[order] - _values(first, metric)
    difference = differences.mean()
    means = _resampled(_finite(differences), resamples, seed)
    low, high = _percentiles(means, level)
    tail = 1 + min((means <= 0).sum(), (means >= 0).sum())

    rng = np.random.default_rng([seed, 1])
    beyond = 0
    for rows in _chunks(resamples, len(differences)):
        signs = 2 * rng.integers(0, 2, (rows, len(differences)), dtype=np.int8) - 1
        flipped = np.abs(signs @ differences) / len(differences)
        beyond += int((flipped >= abs(difference) - 1e-9).sum())  # the same sum in another order
    return PairedTest(
        difference=float(difference),
        low=low,
        high=high,
        p_bootstrap=min(1.0, float(2 * tail / (resamples + 1))),
        p_permutation=(1 + beyond) / (resamples + 1),
        spread=float(differences.std(ddof=1)) if len(differences) > 1 else 0.0,
        count=len(differences),
    )


def _values(scores: ItemScores, metric: str) -> np.ndarray:
    if metric not in METRICS:
        raise ValueError(unknown("metric", metric, METRICS))
    return getattr(scores, metric)


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be a list of finite numbers, got shape {values.shape}")
    return values


def _chunks(resamples: int, count: int, room: int = 2**22) -> Iterable[int]:
    """Sizes that add up to `resamples`, so that no table of draws is larger than `room`."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; give at least 1")
    rows = max(1, room // count)
    for first in range(0, resamples, rows):
        yield min(rows, resamples - first)


def _resampled(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    parts = [
        values[rng.integers(0, len(values), (rows, len(values)))].mean(1)
        for rows in _chunks(resamples, len(values))
    ]
    return np.concatenate(parts)


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a share between 0 and 1, such as 0.95")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
