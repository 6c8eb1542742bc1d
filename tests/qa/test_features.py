"""Windows are those of the tokenizer's own, labels cover their answers, batches are functions."""

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertForQuestionAnswering, CanineTokenizer

from feedforward.files import DataError
from feedforward.qa.features import Batches, evaluation_batches, prepare
from feedforward.qa.schema import Answer, Question

from .conftest import WORDS, random_questions


def one(context, *answers, question="who wrote?", key="q"):
    golds = tuple(Answer(text, context.index(text)) for text in answers)
    return Question(key, question, context, golds, "demo")


def label_text(features, window):
    """The stretch of the context that a window's label means."""
    span = np.array([[features.starts[window], features.ends[window]]]) - features.lead[window]
    start, end = features.characters(np.array([window]), span[:, 0], span[:, 1])
    return features.questions[features.question[window]].context[start[0] : end[0]]


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wordpiece", "bytelevel"])
@pytest.mark.parametrize(("length", "stride"), [(48, 16), (40, 0), (96, 31), (512, 128)])
def test_windows_are_those_that_the_tokenizer_makes_itself(request, name, length, stride):
    tokenizer = request.getfixturevalue(name)
    questions = random_questions(60, words=120)
    features = prepare(questions, tokenizer, length=length, stride=stride)
    theirs = tokenizer(
        [question.question for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        padding=False,
    )
    assert features.question.tolist() == theirs["overflow_to_sample_mapping"]
    assert len(features) > 60 or length == 512
    for window in range(len(features)):
        batch = features.batch([window])
        assert batch["input_ids"][0].tolist() == theirs["input_ids"][window]
        assert batch["attention_mask"].all()
        assert features.lengths[window] == len(theirs["input_ids"][window])
        if name == "wordpiece":
            assert batch["token_type_ids"][0].tolist() == theirs["token_type_ids"][window]
        else:
            assert "token_type_ids" not in batch
        stretch = slice(features.lead[window], features.lead[window] + features.size[window])
        assert {it for it in theirs.sequence_ids(window)[stretch]} <= {1}
        offsets = [list(pair) for pair in theirs["offset_mapping"][window][stretch]]
        assert features.offsets(window).tolist() == offsets


def test_what_is_saved_with_the_tokenizer_is_neither_used_nor_changed(wordpiece):
    wordpiece.backend_tokenizer.enable_truncation(16)
    wordpiece.backend_tokenizer.enable_padding(length=16)
    before = wordpiece.backend_tokenizer.to_str()
    features = prepare([one("first program " * 30)], wordpiece, length=100, stride=10)
    assert features.size.tolist() == [60]
    assert wordpiece.backend_tokenizer.to_str() == before


def test_windows_share_so_many_tokens_and_leave_none_out(wordpiece):
    features = prepare([one("first program engine " * 100)], wordpiece, length=50, stride=20)
    ends = features.first + features.size
    assert (ends[:-1] - features.first[1:] == 20).all()
    assert features.first[0] == 0
    assert ends[-1] == 300
    assert (features.lengths[:-1] == 50).all()


def test_contexts_of_one_word_and_of_50_000(wordpiece):
    rng = np.random.default_rng(1)
    words = rng.choice(["first", "program", "engine"], 50_000).tolist()
    words[30_001] = "lovelace"
    long = one(" ".join(words), "lovelace", key="long")
    features = prepare([one("Ada", "Ada"), long], wordpiece, length=384, stride=128)
    assert features.size[0] == 1
    assert label_text(features, 0) == "Ada"
    holding = np.flatnonzero(features.answerable & (features.question == 1))
    assert len(holding) in (1, 2)
    assert {label_text(features, window) for window in holding} == {"lovelace"}
    assert (features.first + features.size)[-1] == 50_000


def test_a_context_without_tokens_gets_an_empty_window(bytelevel, wordpiece):
    features = prepare([one("\u200b\x00 \u200b")], wordpiece, length=30, stride=5)
    assert features.size.tolist() == [0]
    assert len(features.batch([0])["input_ids"][0]) == features.lengths[0]
    assert prepare([one("\u200b")], bytelevel, length=30, stride=5).size[0] > 0


def test_a_long_question_loses_its_end(wordpiece):
    asked = one("first program", "program", question="engine " * 500)
    features = prepare([asked], wordpiece, length=100, stride=10, question_length=40)
    assert features.lead[0] == 40 + 2
    assert label_text(features, 0) == "program"


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wordpiece", "bytelevel"])
def test_labels_are_the_first_whole_answer_of_the_window(request, name):
    tokenizer = request.getfixturevalue(name)
    questions = random_questions(200, words=90, seed=2)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    features = prepare(questions, tokenizer, length=72, stride=20)
    seen = set()
    for window in range(len(features)):
        question = questions[features.question[window]]
        whole = tokenizer.backend_tokenizer.encode(question.context, add_special_tokens=False)
        expected = None
        for answer in question.answers:  # by hand: which tokens touch the answer's characters
            touching = [
                number
                for number, (start, end) in enumerate(whole.offsets)
                if start < answer.end and end > answer.start
            ]
            touching = [number - features.first[window] for number in touching]
            covered = touching[0] >= 0 and touching[-1] < features.size[window]
            if covered:
                expected = touching[0], touching[-1]
                break
        assert features.answerable[window] == (expected is not None)
        seen.add(expected is None)
        shift = features.lead[window]
        label = int(features.starts[window]), int(features.ends[window])
        assert label == ((expected[0] + shift, expected[1] + shift) if expected else (0, 0))
    assert seen == {True, False}


def test_a_label_begins_at_the_first_word_piece(wordpiece):
    context = "drew unbelievable plans"
    pieces = wordpiece.tokenize(context)
    assert len(pieces) > 3  # the word is in pieces
    features = prepare([one(context, "unbelievable")], wordpiece)
    tokens = wordpiece.convert_ids_to_tokens(features.batch([0])["input_ids"][0])
    label = tokens[features.starts[0] : features.ends[0] + 1]
    assert not label[0].startswith("##")
    assert all(piece.startswith("##") for piece in label[1:])
    assert label_text(features, 0) == "unbelievable"
    inside = prepare([one(context, "believ")], wordpiece)  # the pieces that hold it
    assert "believ" in label_text(inside, 0)


@pytest.mark.parametrize("name", ["wordpiece", "bytelevel"])
@pytest.mark.parametrize(
    "answer", ["👩‍🚀", "🇪🇸", "café", "東京", "“quoted”", "ada\r\nwrote", "x-ray"]
)
def test_labels_are_exact_on_any_writing(request, name, answer):
    tokenizer = request.getfixturevalue(name)
    context = f"naïve 🇪🇸🚀 plans\r\n {answer} \u200b engine\r\n" + "é" * 10
    features = prepare([one(context, answer)], tokenizer)
    assert label_text(features, 0) == answer


def test_an_answer_cut_by_a_window_is_labelled_in_those_that_hold_it_whole(wordpiece):
    words = ["first"] * 30 + ["ada", "lovelace", "wrote"] + ["engine"] * 30
    question = one(" ".join(words), "ada lovelace wrote")
    room = 31  # the first window ends behind "ada"
    length = room + 3 + len(wordpiece.tokenize(question.question))
    features = prepare([question], wordpiece, length=length, stride=8)
    assert features.answerable.tolist() == [False, True, False]
    assert features.starts[0] == features.ends[0] == 0
    assert label_text(features, 1) == "ada lovelace wrote"
    none = prepare([question], wordpiece, length=length, stride=0)
    assert not none.answerable.any()  # no window holds it: nothing is labelled wrongly
    dropped = prepare([question], wordpiece, length=length, stride=8, without_answer="drop")
    assert dropped.answerable.tolist() == [True]
    assert label_text(dropped, 0) == "ada lovelace wrote"
    assert dropped.batch([0])["input_ids"].equal(features.batch([1])["input_ids"])


def test_several_and_overlapping_golds(wordpiece):
    context = "ada lovelace wrote " + "engine " * 60 + "charles babbage drew plans"
    both = one(context, "babbage", "ada lovelace", "lovelace")
    features = prepare([both], wordpiece, length=64, stride=16)
    texts = [label_text(features, w) for w in np.flatnonzero(features.answerable)]
    assert texts == ["ada lovelace", "babbage"]
    overlapping = one("ada lovelace wrote", "lovelace wrote", "ada lovelace")
    assert label_text(prepare([overlapping], wordpiece), 0) == "lovelace wrote"


def test_questions_without_answers_have_windows_to_be_read(wordpiece):
    features = prepare([one("ada wrote plans")], wordpiece)
    assert len(features) == 1
    assert not features.answerable.any()
    assert len(prepare([one("ada wrote")], wordpiece, without_answer="drop")) == 0


# --- refusals -----------------------------------------------------------------------------------


def test_a_tokenizer_without_offsets_is_told():
    with pytest.raises(ValueError, match="CanineTokenizer gives no offsets"):
        prepare([one("ada wrote", "ada")], CanineTokenizer())


def test_a_tokenizer_without_a_token_in_front_is_told(bytelevel):
    bare = type(bytelevel)(tokenizer_object=bytelevel.backend_tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(ValueError, match=r"no special token such as \[CLS\]"):
        prepare([one("ada wrote", "ada")], bare)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            Question("q7", "who?", "ada wrote", (Answer("ada", 1),), "d"),
            "'q7' of 'd': answer",
        ),
        (Question("q7", "who?", "ada", (Answer("adam", 0),), "d"), "outside the context"),
        (Question("q7", "  ", "ada", (Answer("ada", 0),), "d"), "the question is empty"),
        (Question("q7", "who?", "", (), "d"), "the context is empty"),
    ],
)
def test_wrong_questions_are_refused_with_their_id(wordpiece, question, message):
    with pytest.raises(DataError, match=message):
        prepare([one("ada wrote", "ada"), question], wordpiece)


def test_bad_options_are_told(wordpiece):
    question = one("ada wrote", "ada", question="engine " * 60)
    with pytest.raises(ValueError, match="leaves 1 of 64 for the context"):
        prepare([question], wordpiece, length=64, stride=16)
    short = one("ada wrote", "ada", question="ada")
    assert len(prepare([short], wordpiece, length=16, stride=11)) == 1  # 12 are left
    with pytest.raises(ValueError, match="leaves 12 of 16"):
        prepare([short], wordpiece, length=16, stride=12)
    with pytest.raises(ValueError, match="no without_answer 'dropped'"):
        prepare([question], wordpiece, without_answer="dropped")
    with pytest.raises(ValueError, match="stride -1 one that is not negative"):
        prepare([question], wordpiece, stride=-1)
    with pytest.raises(ValueError, match=r"length 384\.0 .* whole numbers"):
        prepare([question], wordpiece, length=384.0)
    with pytest.raises(DataError, match="no questions"):
        prepare([], wordpiece)


# --- batches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(wordpiece):
    return prepare(random_questions(150, words=100, seed=3), wordpiece, length=80, stride=20)


def test_a_batch_pads_to_its_longest_window(features):
    windows = [int(features.lengths.argmin()), int(features.lengths.argmax())]
    batch = features.batch(windows)
    short, long = features.lengths[windows]
    assert batch["input_ids"].shape == (2, long)
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert (batch["input_ids"][0, short:] == 0).all()
    assert (batch["token_type_ids"][0, short:] == 0).all()
    assert batch["start_positions"].tolist() == features.starts[windows].tolist()
    alone = features.batch(windows[:1])["input_ids"][0]
    assert batch["input_ids"][0, :short].equal(alone)


def test_a_batch_is_what_a_hugging_face_reader_takes(features):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = BertForQuestionAnswering(BertConfig(vocab_size=200, num_hidden_layers=1, **sizes))
    output = model(**features.batch([0, 1, 2]))
    assert torch.isfinite(output.loss)


def test_every_window_comes_once_an_epoch_in_a_fresh_order(features):
    batches = Batches(features, 16, seed=1)
    steps = batches.steps_per_epoch
    epochs = [
        np.concatenate([batches.windows(epoch * steps + step) for step in range(steps)])
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(features)))
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_is_a_function_of_its_step(features):
    steps = [40, 3, 0, 41, 3]
    first, second = Batches(features, 16, seed=1), Batches(features, 16, seed=1)
    drawn = {step: first.windows(step) for step in steps}
    for step in reversed(steps):
        assert np.array_equal(second.windows(step), drawn[step])
        assert second(step)["input_ids"].equal(features.batch(drawn[step])["input_ids"])
    assert not np.array_equal(Batches(features, 16, seed=2).windows(0), drawn[0])


def padding(batches):
    masks = [batches(step)["attention_mask"] for step in range(batches.steps_per_epoch)]
    return 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks)


def test_windows_of_like_length_share_a_batch(features):
    assert padding(Batches(features, 8, seed=0)) < padding(Batches(features, 8, seed=0, pool=1)) / 3


def test_short_and_long_batches_come_mixed(features):
    batches = Batches(features, 8, seed=0)
    longest = [batches(step)["input_ids"].shape[1] for step in range(batches.steps_per_epoch)]
    half = len(longest) // 2
    assert np.mean(longest[:half]) == pytest.approx(np.mean(longest[half:]), rel=0.25)


def test_evaluation_reads_every_window_once_the_longest_first(features):
    seen = list(evaluation_batches(features, 32))
    assert sorted(np.concatenate([windows for windows, _ in seen])) == list(range(len(features)))
    widths = [batch["input_ids"].shape[1] for _, batch in seen]
    assert widths == sorted(widths, reverse=True)


def test_bad_batches_are_told(features, wordpiece):
    with pytest.raises(ValueError, match="batch 0"):
        Batches(features, 0, seed=0)
    with pytest.raises(ValueError, match="batch is 0"):
        list(evaluation_batches(features, 0))
    empty = prepare([one("ada wrote")], wordpiece, without_answer="drop")
    with pytest.raises(ValueError, match="no window to train on"):
        Batches(empty, 4, seed=0)


def test_the_words_of_these_tests_are_in_pieces(wordpiece):
    assert any(len(wordpiece.tokenize(word)) > 1 for word in WORDS)
