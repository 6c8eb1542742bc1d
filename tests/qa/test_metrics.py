"""The metric against hand-made cases, an independent implementation and known distributions."""

import math
import re
import string

import numpy as np
import pytest

from feedforward import Answer, Question, Score, score
from feedforward.qa.metrics import (
    ItemScores,
    bootstrap_interval,
    exact_match,
    f1,
    item_scores,
    normalize_answer,
    paired_test,
)


def question(key, *golds, domain="demo"):
    return Question(key, "What?", " ".join(golds), tuple(Answer(g, 0) for g in golds), domain)


# --- an independent implementation: multiset intersection by hand, no shared code --------------


def reference_tokens(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    words, word = [], ""
    for piece in re.split(r"(\W+)", kept):  # the article must stand between word boundaries
        word += " " if piece in ("a", "an", "the") else piece
    for piece in word.split():
        words.append(piece)
    return words


def reference_scores(prediction, golds):
    best_f1 = best_em = 0.0
    for gold in golds:
        ours, theirs = reference_tokens(prediction), reference_tokens(gold)
        left, common = list(theirs), 0
        for token in ours:
            if token in left:
                left.remove(token)
                common += 1
        if not ours or not theirs:
            value = 1.0 if ours == theirs else 0.0
        elif common == 0:
            value = 0.0
        else:
            precision, recall = common / len(ours), common / len(theirs)
            value = 2 * precision * recall / (precision + recall)
        best_f1 = max(best_f1, value)
        best_em = max(best_em, float(ours == theirs))
    return best_f1, best_em


def random_text(rng):
    pieces = [
        *("the", "a", "an", "The", "A", "theatre", "Ana", "one", "two", "1,000", "it's", "U.S."),
        *(
            "café",
            "cafe\u0301",
            "naïve",
            "東京",
            "👩‍🚀",
            "x-ray",
            "«so»",
            "\u00a0",
            "\r\n",
            "--",
            ".",
        ),
    ]
    joints = rng.choice([" ", "  ", "", "-", "\t", "'"], 8, p=[0.6, 0.1, 0.1, 0.1, 0.05, 0.05])
    words = rng.choice(pieces, rng.integers(0, 7))
    return "".join(f"{word}{joint}" for word, joint in zip(words, joints, strict=False))


def test_agrees_with_an_independent_implementation_on_random_texts():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        prediction = random_text(rng)
        golds = [random_text(rng) for _ in range(rng.integers(1, 4))]
        if rng.random() < 0.2:
            golds.append(f"the {prediction}!")
        expected = reference_scores(prediction, golds)
        assert (f1(prediction, golds), exact_match(prediction, golds)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("Orange", ["Orange"], (1, 1)),
        ("the  ORANGE!", ["orange"], (1, 1)),
        ("in Orange", ["Orange"], (2 / 3, 0)),
        ("red red", ["red blue"], (0.5, 0)),  # a word counts once for each time it is there
        ("blue", ["red", "dark blue", "blue"], (1, 1)),  # the best of several
        ("dark red", ["dark blue", "blue sky"], (0.5, 0)),
        ("", ["red"], (0, 0)),
        ("the", ["a"], (1, 1)),  # both without a word
        ("theatre", ["the atre"], (0, 0)),
        ("Saint-Simon", ["SaintSimon"], (1, 1)),  # punctuation goes without leaving a space
    ],
)
def test_hand_made_cases(prediction, golds, expected):
    assert (f1(prediction, golds), exact_match(prediction, golds)) == pytest.approx(expected)


@pytest.mark.parametrize("compare", [f1, exact_match])
def test_nothing_to_compare_with_is_told(compare):
    with pytest.raises(ValueError, match="golds is empty: there is no accepted answer"):
        compare("Orange", [])
    assert compare("Orange", iter(["Lyon", "Orange"])) == 1


def test_normalising_twice_changes_nothing_more_on_words():
    assert normalize_answer("  An  Answer, the\r\nbest.") == "answer best"
    assert normalize_answer("answer best") == "answer best"


# --- sets of questions --------------------------------------------------------------------------


QUESTIONS = [
    question("1", "red", domain="x"),
    question("2", "dark blue", "blue", domain="x"),
    question("3", "green sky", domain="y"),
]
PREDICTIONS = {"1": "red", "2": "blue", "3": "green", "unasked": "other"}


def test_a_score_is_the_mean_over_questions_in_percent():
    found = score(PREDICTIONS, QUESTIONS)
    assert found == Score(f1=pytest.approx(800 / 9), em=pytest.approx(200 / 3), count=3)


def test_scores_by_domain_and_pooled():
    items = item_scores(PREDICTIONS, QUESTIONS)
    assert items.by_domain() == {"x": Score(100, 100, 2), "y": Score(pytest.approx(200 / 3), 0, 1)}
    assert items.ids == ("1", "2", "3")
    assert items.f1.tolist() == pytest.approx([100, 100, 200 / 3])
    assert items.by_question("em") == {"1": 100, "2": 100, "3": 0}


def test_a_missing_prediction_is_an_error_or_wrong_by_choice():
    part = {"1": "red"}
    with pytest.raises(
        ValueError, match=r"2 of 3 questions have no prediction, first \['2', '3'\]"
    ):
        score(part, QUESTIONS)
    assert score(part, QUESTIONS, missing="zero").em == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match="no missing 'skip'"):
        score(part, QUESTIONS, missing="skip")


@pytest.mark.parametrize(
    ("predictions", "questions", "message"),
    [
        ({}, [], "no questions to score"),
        ({"1": "a"}, [question("1", "a"), question("1", "b")], "'1' comes twice"),
        ({"1": "a"}, [question("1")], "'1' has no accepted answer"),
        ({"1": None}, [question("1", "a")], "prediction of '1' is None"),
    ],
)
def test_what_cannot_be_scored_is_told(predictions, questions, message):
    with pytest.raises(ValueError, match=message):
        score(predictions, questions)


# --- how sure -----------------------------------------------------------------------------------


def items(values, ids=None):
    values = np.asarray(values, float)
    ids = tuple(map(str, range(len(values)))) if ids is None else ids
    return ItemScores(ids, ("demo",) * len(values), values, (values > 50) * 100.0)


def test_the_bootstrap_has_the_standard_error_of_a_mean():
    values = np.random.default_rng(3).normal(50, 30, 400)
    low, high = bootstrap_interval(values)
    error = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.25)
    assert bootstrap_interval(values) == (low, high)  # seeded
    assert items(values).interval() == (low, high)
    assert bootstrap_interval([40.0, 40.0]) == (40, 40)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(4)
    covered = 0
    for number in range(200):
        values = 100.0 * (rng.random(120) < 0.4)
        low, high = bootstrap_interval(values, level=0.9, resamples=400, seed=number)
        covered += low <= 40 <= high
    assert 165 <= covered <= 195  # 0.9 of 200, within 3 standard errors


def test_the_paired_tests_agree_with_the_t_test_on_many_questions():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(5)
    first = rng.normal(50, 30, 300)
    second = first + rng.normal(1.5, 10, 300)
    found = paired_test(items(first), items(second))
    expected = ttest_rel(second, first)
    assert found.difference == pytest.approx((second - first).mean())
    assert found.p_permutation == pytest.approx(expected.pvalue, abs=0.01)
    assert found.p_bootstrap == pytest.approx(expected.pvalue, abs=0.01)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.15)
    assert found.spread == pytest.approx((second - first).std(ddof=1))


def test_no_difference_is_never_significant_and_a_sure_one_always():
    same = items(np.linspace(0, 100, 50))
    found = paired_test(same, same)
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert found.p_bootstrap == found.p_permutation == 1
    better = paired_test(items(np.zeros(50)), items(np.full(50, 100.0)), "em", resamples=999)
    assert better.p_bootstrap <= 0.002
    assert better.p_permutation <= 0.002


def test_pairs_are_found_by_id_and_in_both_directions():
    first = items([0, 50, 100], ids=("a", "b", "c"))
    second = items([100, 10, 60], ids=("c", "a", "b"))
    found = paired_test(first, second)
    assert found.difference == pytest.approx(20 / 3)
    back = paired_test(second, first)
    assert back.difference == pytest.approx(-20 / 3)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.2)


def test_different_questions_and_bad_options_are_told():
    first, second = items([1, 2]), items([1, 2], ids=("0", "other"))
    with pytest.raises(ValueError, match=r"2 are of one alone, first \['1', 'other'\]"):
        paired_test(first, second)
    with pytest.raises(ValueError, match="no metric 'F1'"):
        paired_test(first, first, "F1")
    with pytest.raises(ValueError, match="level is 95"):
        bootstrap_interval([1, 2], level=95)
    with pytest.raises(ValueError, match="resamples is 0"):
        bootstrap_interval([1, 2], resamples=0)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([])
