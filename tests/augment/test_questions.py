import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from feedforward.augment.eda import EDA, StrippedEDA
from feedforward.augment.lexicon import Lexicon
from feedforward.augment.questions import augment_as_released, augment_questions, edit_distance
from feedforward.augment.spans import ProtectedText, Rewritten

LEXICON = Lexicon({"big": ["large", "huge"], "dog": ["hound"], "old": ["aged"]})
CONTEXT = "The big dog sat on the old mat in May. In May the big dog slept."


@dataclass(frozen=True)
class Answer:
    text: str
    start: int


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    domain: str


def question(name="q", starts=((42, 45),), context=CONTEXT):
    answers = tuple(Answer(context[a:b], a) for a, b in starts)
    return Question(name, "When?", context, answers, "demo")


def exact(questions):
    return all(
        q.context[a.start : a.start + len(a.text)] == a.text for q in questions for a in q.answers
    )


def test_copies_are_new_questions_with_exact_answers():
    augmented = augment_questions([question()], EDA(lexicon=LEXICON), copies=3, seed=1)
    assert [q.id for q in augmented.questions] == ["q#1", "q#2", "q#3"]
    assert exact(augmented.questions)
    assert all(q.answers[0].text == "May" and q.domain == "demo" for q in augmented.questions)
    assert len({q.context for q in augmented.questions}) == 3
    report = augmented.report
    assert (report.questions, report.copies, report.kept) == (1, 3, 3)
    assert (report.lost, report.repaired, report.unchanged, report.not_made) == (0, 0, 0, ())
    assert 0.1 < report.changed < 0.9
    assert "3 copies of 1 questions" in str(report)


def test_neither_order_nor_processes_change_a_copy():
    questions = [question(f"q{i}") for i in range(300)]
    augmenter = EDA(lexicon=LEXICON)
    one = augment_questions(questions, augmenter, copies=2, seed=3)
    assert augment_questions(questions, augmenter, copies=2, seed=3, processes=2) == one
    back = augment_questions(questions[::-1], augmenter, copies=2, seed=3).questions
    assert sorted(back, key=lambda q: q.id) == sorted(one.questions, key=lambda q: q.id)
    other = augment_questions(questions, augmenter, copies=2, seed=4).questions
    assert sum(a.context != b.context for a, b in zip(one.questions, other, strict=True)) > 500


def test_several_overlapping_answers_and_none():
    several = question(starts=((4, 11), (4, 7), (8, 16), (42, 45)))
    unanswered = question("no answer", starts=())
    made = augment_questions([several, unanswered], EDA(lexicon=LEXICON), copies=2, seed=0)
    assert exact(made.questions)
    assert [len(q.answers) for q in made.questions] == [4, 4, 0, 0]
    assert [a.text for a in made.questions[0].answers] == ["big dog", "big", "dog sat ", "May"]


def test_what_is_lost_is_said_and_never_wrong():
    def careless(protected, rng):
        return ProtectedText(protected.text.replace("May", "June"), protected.spans)

    made = augment_questions([question()], careless, copies=1, seed=0)
    assert made.questions == []
    assert made.report.not_made == ("q#1",)
    assert (made.report.kept, made.report.lost, made.report.copies) == (0, 1, 0)

    half = question(starts=((42, 45), (4, 7)))
    made = augment_questions([half], careless, copies=1, seed=0)
    assert [a.text for a in made.questions[0].answers] == ["big"]
    assert (made.report.kept, made.report.lost) == (1, 1)


def test_unchanged_copies_are_counted():
    made = augment_questions([question()], lambda text, rng: text, copies=2, seed=0)
    assert (made.report.unchanged, made.report.changed) == (2, 0.0)
    wide = question(context=CONTEXT.replace("on the", "on\n  the"), starts=((4, 11),))

    def narrow(text, rng):
        return ProtectedText(" ".join(text.text.split()), text.spans)

    made = augment_questions([wide], narrow, copies=2, seed=0)
    assert made.questions[0].context == CONTEXT != wide.context
    assert (made.report.unchanged, made.report.changed) == (2, 0.0)


def test_an_augmenter_of_many_is_asked_once():
    class Many:
        calls = 0

        def many(self, texts, rngs):
            self.calls += 1
            return [Rewritten(text, repaired=1) for text in texts]

    many = Many()
    made = augment_questions([question("a"), question("b")], many, copies=2, seed=0)
    assert many.calls == 1
    assert (made.report.kept, made.report.repaired) == (0, 4)


def test_the_stripped_form_goes_through():
    made = augment_questions([question()], StrippedEDA(lexicon=LEXICON), copies=2, seed=0)
    assert exact(made.questions)
    assert made.questions[0].answers[0].text == "may"
    assert made.questions[0].answers[0].start < 42


def test_the_released_recipe_keeps_the_stripped_original():
    made = augment_as_released([question()], augmenter=StrippedEDA(lexicon=LEXICON), seed=0)
    assert [q.id for q in made.questions] == ["q#0", "q#1", "q#2", "q#3", "q#4"]
    assert made.questions[0].context == CONTEXT.lower().replace(".", "")
    assert made.report.copies == 4
    assert exact(made.questions)


def test_bad_questions_are_named():
    wrong = Question("bad", "When?", CONTEXT, (Answer("May", 41),), "demo")
    with pytest.raises(ValueError, match=r"'bad': the answer 'May' does not stand at 41"):
        augment_questions([wrong], EDA(**OFF), copies=1, seed=0)
    empty = Question("empty", "When?", CONTEXT, (Answer("", 4),), "demo")
    with pytest.raises(ValueError, match=r"'empty': span \(4, 4\)"):
        augment_questions([empty], EDA(**OFF), copies=1, seed=0)
    with pytest.raises(ValueError, match="same id"):
        augment_questions([question(), question()], EDA(**OFF), copies=1, seed=0)
    with pytest.raises(ValueError, match="'q#1' is taken"):
        augment_questions([question(), question("q#1")], EDA(**OFF), copies=1, seed=0)
    for wrong in ({"copies": 0}, {"copies": 1.5}, {"seed": -1}, {"processes": 0}):
        with pytest.raises(ValueError, match="is needed"):
            augment_questions([question()], EDA(**OFF), **wrong)
    with pytest.raises(ValueError, match=r"cannot be sent to other processes .* top of a module"):
        augment_questions([question()], lambda text, rng: text, processes=2)


OFF = {"synonyms": 0, "insertions": 0, "swaps": 0, "deletions": 0}


def test_edit_distance_against_the_table():
    rng = random.Random(0)
    for _ in range(300):
        a = rng.choices("abcd", k=rng.randint(0, 12))
        b = rng.choices("abcd", k=rng.randint(0, 12))
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            above, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
        assert edit_distance(a, b) == row[-1]


@pytest.mark.skipif(
    not (Path(os.environ.get("FEEDFORWARD_DATA", "/nowhere")) / "qa").is_dir(),
    reason="FEEDFORWARD_DATA holds no folder qa",
)
def test_every_context_at_hand():
    augmenter = EDA(lexicon=LEXICON, swaps=0.2, deletions=0.2)
    for path in sorted((Path(os.environ["FEEDFORWARD_DATA"]) / "qa").glob("*domain_*/*.json")):
        for i, paragraph in enumerate(
            p for article in json.loads(path.read_text())["data"] for p in article["paragraphs"]
        ):
            spans = tuple(
                (a["answer_start"], a["answer_start"] + len(a["text"]))
                for qa in paragraph["qas"]
                for a in qa["answers"]
            )
            protected = ProtectedText(paragraph["context"], spans)
            changed = augmenter(protected, np.random.default_rng(i))
            assert changed.protected == protected.protected, path
