"""The decoder against slow decoders written apart from it, and where its rules bite."""

import os
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from feedforward import load_questions, score
from feedforward.qa.decoding import Span, best_answers, decode, read
from feedforward.qa.features import prepare
from feedforward.qa.schema import Answer, Question

from .conftest import random_questions


@pytest.fixture(scope="module")
def features(wordpiece):
    return prepare(random_questions(80, words=110, seed=4), wordpiece, length=72, stride=24)


def logits(features, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    shape = 2, len(features), int(features.lengths.max()) + 5
    return rng.normal(0, scale, shape).astype(np.float32)


def windows_of(features, number):
    return np.flatnonzero(features.question == number)


def slow_n_best(features, start, end, number, *, n_best, min_tokens=1, max_tokens=30):
    """Every allowed span of every window by sum of logits, in plain Python."""
    best = {}
    for window in windows_of(features, number):
        lead, size = int(features.lead[window]), int(features.size[window])
        for first in range(size):
            for last in range(first + min_tokens - 1, min(size, first + max_tokens)):
                total = float(start[window, lead + first]) + float(end[window, lead + last])
                key = features.first[window] + first, features.first[window] + last
                best[key] = max(best.get(key, -np.inf), total)
    ranked = sorted(best.items(), key=lambda item: -item[1])[:n_best]
    return [total for _, total in ranked]


def pipeline_answer(features, start, end, number, max_answer_len):
    """What the question answering pipeline of transformers 4 does, before it widens to words.

    Per window a softmax over the context and the [CLS], the [CLS] set to zero afterwards, the
    outer product of the two, one triangle for the order and one for the length; then the best of
    all windows.
    """
    found = []
    for window in windows_of(features, number):
        lead, size = features.lead[window], features.size[window]
        allowed = np.zeros(start.shape[1], dtype=bool)
        allowed[lead : lead + size] = True
        allowed[0] = True
        s = np.where(allowed, start[window].astype(np.float64), -10000.0)
        e = np.where(allowed, end[window].astype(np.float64), -10000.0)
        s, e = np.exp(s - s.max()), np.exp(e - e.max())
        s, e = s / s.sum(), e / e.sum()
        s[0] = e[0] = 0.0
        candidates = np.tril(np.triu(np.outer(s, e)), max_answer_len - 1)
        first, last = np.unravel_index(candidates.argmax(), candidates.shape)
        offsets = features.offsets(window)
        place = offsets[first - lead][0], offsets[last - lead][1]
        found.append((candidates[first, last], place))
    probability, (begin, stop) = max(found)
    return features.questions[number].context[begin:stop], probability


# --- agreement ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("min_tokens", "max_tokens"), [(1, 30), (2, 30), (1, 1), (3, 4), (1, 500)])
@pytest.mark.parametrize("n_best", [1, 20])
def test_the_n_best_are_those_of_an_exhaustive_search(features, n_best, min_tokens, max_tokens):
    start, end = logits(features)
    options = {"n_best": n_best, "min_tokens": min_tokens, "max_tokens": max_tokens}
    found = decode(features, start, end, normalize=False, **options)
    for number in range(0, len(features.questions), 4):
        expected = slow_n_best(features, start, end, number, **options)
        assert [span.score for span in found[number]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("steps", [0, 2, 100])
def test_of_equal_scores_the_first_span_and_then_the_shortest_comes_first(
    features, steps, normalize
):
    # few different values, as of bfloat16, make many ties; 0: all are equal
    start, end = np.round(steps * logits(features, scale=0.3)) / max(1, steps)
    options = {"normalize": normalize, "max_tokens": 8}
    many = decode(features, start, end, n_best=20, **options)
    assert decode(features, start, end, n_best=1, **options) == [spans[:1] for spans in many]
    assert decode(features, start, end, n_best=7, **options) == [spans[:7] for spans in many]
    for spans in many:
        order = [(-span.score, span.start, span.end) for span in spans]
        assert order == sorted(order)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_tokens", [15, 30])
def test_agrees_with_the_pipeline_of_transformers(features, seed, max_tokens):
    start, end = logits(features, seed)
    found = decode(features, start, end, n_best=1, max_tokens=max_tokens)
    for number, spans in enumerate(found):
        text, probability = pipeline_answer(features, start, end, number, max_tokens)
        assert np.exp(spans[0].score) == pytest.approx(probability, rel=1e-4)
        assert spans[0].text.startswith(text.strip())
        behind = spans[0].text[len(text.strip()) :]  # marks, which the pipeline leaves behind
        assert all(unicodedata.category(mark) in ("Mn", "Me") for mark in behind)


def test_tensors_in_low_precision_are_taken_too(features):
    start, end = logits(features)
    wide = [torch.from_numpy(values).to(torch.bfloat16) for values in (start, end)]
    expected = decode(features, *(values.float().numpy() for values in wide), n_best=2)
    assert decode(features, *wide, n_best=2) == expected


def test_the_logits_of_the_labels_give_the_gold_answers(features):
    start, end = np.zeros((2, len(features), int(features.lengths.max())), dtype=np.float32)
    rows = np.arange(len(features))
    start[rows, features.starts] = end[rows, features.ends] = 10.0
    texts = best_answers(features, start, end, max_tokens=200)
    answerable = set(features.question[features.answerable].tolist())
    questions = [q for number, q in enumerate(features.questions) if number in answerable]
    assert len(questions) > 70
    assert score(texts, questions).em > 99


needs_data = pytest.mark.skipif(
    not (Path(os.environ.get("FEEDFORWARD_DATA", "/nowhere")) / "qa").is_dir(),
    reason="FEEDFORWARD_DATA holds no folder qa",
)


@needs_data
def test_on_real_passages_the_labels_give_a_gold_answer_to_every_question(wordpiece):
    data = load_questions()
    questions = [q for split in ("oodomain_train", "oodomain_val") for q in data.pooled(split)]
    features = prepare(questions, wordpiece, length=512, stride=256)
    assert len(set(features.question[features.answerable])) == len(questions)
    start, end = np.zeros((2, len(features), 512), dtype=np.float32)
    rows = np.arange(len(features))
    start[rows, features.starts] = end[rows, features.ends] = 10.0
    spans = decode(features, start, end, n_best=1, max_tokens=500)
    for question, (span,) in zip(questions, spans, strict=True):
        # wider than a gold answer only where that ends inside a token or with white space
        golds = [a for a in question.answers if span.start <= a.start]
        assert any(span.text.startswith(a.text.strip()) or a.text in span.text for a in golds)


# --- rules --------------------------------------------------------------------------------------


def one(wordpiece, context, **options):
    question = Question("q", "who wrote?", context, (), "demo")
    return prepare([question], wordpiece, **options)


def peaks(features, *places):
    """Logits that favour (window, first token, last token, height), counted in the contexts."""
    start, end = np.full((2, len(features), int(features.lengths.max())), -9.0, np.float32)
    for window, first, last, height in places:
        shift = features.lead[window] - features.first[window]
        start[window, first + shift] = end[window, last + shift] = height
    return start, end


def test_answers_of_one_token_are_allowed_unless_refused(wordpiece):
    features = one(wordpiece, "ada lovelace wrote")
    start, end = peaks(features, (0, 1, 1, 5))
    assert best_answers(features, start, end) == {"q": "lovelace"}
    refused = best_answers(features, start, end, min_tokens=2)["q"]
    assert refused in ("ada lovelace", "lovelace wrote")


def test_a_context_of_one_token_has_no_answer_of_two(wordpiece):
    features = one(wordpiece, "ada")
    start, end = peaks(features, (0, 0, 0, 5))
    assert best_answers(features, start, end, min_tokens=2) == {"q": ""}
    assert decode(features, start, end, min_tokens=2) == [()]


def test_question_special_and_padding_tokens_never_answer(features):
    start, end = logits(features)
    quiet = start.copy(), end.copy()
    columns = np.arange(start.shape[1])
    lead = features.lead[:, None]
    outside = (columns < lead) | (columns >= lead + features.size[:, None])
    for values in (start, end):
        values[outside] = 50.0
    expected = decode(features, *quiet, normalize=False)
    assert decode(features, start, end, normalize=False) == expected


def test_a_span_in_two_windows_counts_once_with_its_best_score(wordpiece):
    context = "first program engine " * 20
    features = one(wordpiece, context, length=40, stride=20)
    first, last = int(features.first[1]), int(features.first[1]) + 1  # in windows 0 and 1
    start, end = peaks(features, (0, first, last, 4), (1, first, last, 6))
    spans = decode(features, start, end, n_best=5, normalize=False)[0]
    assert spans[0].score == pytest.approx(12)
    assert len({(span.start, span.end) for span in spans}) == 5


def test_windows_compete_by_probability_or_by_logit(wordpiece):
    features = one(wordpiece, "first program engine " * 20, length=40, stride=0)
    # window 0 shouts but means its [CLS]; window 1 is sure
    start, end = peaks(features, (0, 0, 0, 20), (1, int(features.first[1]), features.first[1], 10))
    start[0, 0] = end[0, 0] = 30
    begin = features.offsets(1)[0][0]
    assert decode(features, start, end)[0][0].start == begin
    assert decode(features, start, end, normalize=False)[0][0].start == 0


def test_spans_are_exact_stretches_without_white_space_around(bytelevel):
    context = "ada\r\n 👩‍🚀 café  東京 wrote"
    question = Question("q", "who?", context, (), "demo")
    features = prepare([question], bytelevel)
    start, end = logits(features)
    for span in decode(features, start, end, n_best=200)[0]:
        assert context[span.start : span.end] == span.text
        assert span.text == span.text.strip()


@pytest.mark.parametrize(
    "word",
    [
        "cafe\u0301",
        "\u0939\u093f\u0928\u094d\u0926\u0941",  # hindu, in Devanagari: ends in a vowel sign
        "\u0e17\u0e35\u0e48",  # thi, in Thai
        "\u2764\ufe0f",  # a heart, in colour
    ],
)
def test_a_mark_stays_with_its_letter(wordpiece, word):
    context = f"the {word} wrote"
    features = one(wordpiece, context)
    start, end = peaks(features, (0, 1, int(features.size[0]) - 2, 5))
    assert best_answers(features, start, end) == {"q": word}


def test_a_context_without_tokens_has_no_answer(wordpiece):
    features = one(wordpiece, "\u200b")
    assert best_answers(features, *peaks(features)) == {"q": ""}


# --- refusals -----------------------------------------------------------------------------------


def test_logits_that_do_not_fit_are_told(features):
    start, end = logits(features)
    with pytest.raises(ValueError, match=r"do not fit \d+ windows"):
        decode(features, start[1:], end)
    with pytest.raises(ValueError, match="do not fit"):
        decode(features, start[:, :10], end)
    broken = end.copy()
    broken[7, features.lead[7]] = np.nan
    with pytest.raises(ValueError, match="logits of window 7 are not finite"):
        decode(features, start, broken)
    for value in (np.nan, np.inf, -np.inf):
        broken = end.copy()
        broken[7, 0] = value  # of the [CLS], which counts in the softmax alone
        with pytest.raises(ValueError, match="logits of window 7 are not finite"):
            decode(features, start, broken)
        raw = decode(features, start, end, normalize=False)
        assert decode(features, start, broken, normalize=False) == raw


def test_bad_options_are_told(features, wordpiece):
    start, end = logits(features)
    for options in (
        {"n_best": 0},
        {"n_best": 2.5},
        {"min_tokens": 0},
        {"min_tokens": 3, "max_tokens": 2},
    ):
        with pytest.raises(ValueError, match="allowed are whole numbers of at least 1"):
            decode(features, start, end, **options)
    answered = Question("a", "who?", "ada wrote", (Answer("ada", 0),), "demo")
    other = Question("b", "who?", "ada wrote", (), "demo")
    dropped = prepare([answered, other], wordpiece, without_answer="drop")
    with pytest.raises(ValueError, match="'b' has no window"):
        decode(dropped, *peaks(dropped))


# --- reading ------------------------------------------------------------------------------------


def test_reading_gives_the_same_logits_in_batches_of_any_size(features):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = BertForQuestionAnswering(BertConfig(vocab_size=400, num_hidden_layers=1, **sizes))
    model.train()
    start, end = read(model, features, batch=16)
    assert model.training
    assert start.shape == end.shape == (len(features), features.lengths.max())
    alone = model.eval()(**features.batch([3]))
    assert start[3, : features.lengths[3]] == pytest.approx(
        alone.start_logits[0].detach().numpy(), abs=1e-5
    )
    again = read(model, features, batch=5)
    assert np.abs(again[1] - end).max() < 1e-5
    assert len(best_answers(features, start, end)) == len(features.questions)


def test_any_reader_with_two_rows_of_logits_will_do(features):
    class Counting(torch.nn.Linear):
        def forward(self, input_ids, attention_mask, token_type_ids):
            values = input_ids.float()
            return types.SimpleNamespace(start_logits=values, end_logits=-values)

    start, end = read(Counting(1, 1), features)
    window = int(features.lengths.argmin())
    expected = features.batch([window])["input_ids"][0].numpy()
    assert np.array_equal(start[window, : len(expected)], expected)
    assert np.array_equal(start, -end)


def test_spans_are_values():
    assert Span("ada", 0, 3, 1.0) == Span("ada", 0, 3, 1.0)
