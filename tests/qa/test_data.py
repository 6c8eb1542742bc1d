"""Questions: what is loaded is exact, and what is wrong is named with its file and id."""

import dataclasses
import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest

from feedforward.files import DataError
from feedforward.qa import data
from feedforward.qa.data import load_questions, load_squad
from feedforward.qa.schema import Answer, Question, problems_of

SPLITS = data.SPLITS


def squad(*questions, context="Ada Lovelace wrote it in 1843."):
    """A SQuAD file's content of one paragraph; a question is (id, question, [(text, start)])."""
    qas = [
        {
            "id": key,
            "question": question,
            "answers": [{"text": text, "answer_start": start} for text, start in answers],
        }
        for key, question, answers in questions
    ]
    paragraphs = [{"context": context, "qas": qas}]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    def make(*questions, name="demo.json", **more):
        return write(tmp_path / name, squad(*questions, **more))

    return make


GOOD = ("q1", "Who wrote it?", [("Ada Lovelace", 0), ("Lovelace", 4)])


# --- one file -----------------------------------------------------------------------------------


def test_a_file_becomes_questions_with_all_answers_in_order(file):
    path = file(GOOD, ("q2", "When?", [("1843", 25)]))
    context = "Ada Lovelace wrote it in 1843."
    assert load_squad(path) == [
        Question(
            "q1",
            "Who wrote it?",
            context,
            (Answer("Ada Lovelace", 0), Answer("Lovelace", 4)),
            "demo",
        ),
        Question("q2", "When?", context, (Answer("1843", 25),), "demo"),
    ]


def test_the_domain_is_the_files_name_with_or_without_an_ending(file):
    assert load_squad(file(GOOD, name="nat_questions"))[0].domain == "nat_questions"
    assert load_squad(file(GOOD, name="a.b.json"))[0].domain == "a.b"
    assert load_squad(file(GOOD), domain="own")[0].domain == "own"


def test_questions_without_known_answers_are_kept(tmp_path):
    content = squad(GOOD)
    del content["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    assert load_squad(write(tmp_path / "test.json", content))[0].answers == ()


def test_an_id_that_cannot_be_written_down_is_refused_with_file_and_id_or_reported(file):
    path = file(GOOD, ("q\ud83d", "Who?", [("Ada", 0)]))
    with pytest.raises(DataError, match=r"demo\.json, question 'q\\ud83d': the id holds half a"):
        load_squad(path)
    report = []
    assert [q.id for q in load_squad(path, report=report)] == ["q1"]
    assert [(problem.source, problem.id) for problem in report] == [(str(path), "q\ud83d")]
    assert str(report[0]).encode()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (("q7", "Who?", [("Ada", 1)]), "not at 1, where the context has 'da '; it stands at 0"),
        (("q7", "Who?", [("Bob", 0)]), "where the context has 'Ada'; the context does not hold it"),
        (("q7", "Who?", [("1843.", 26)]), "from 26 to 31 is outside the context of 30 characters"),
        (("q7", "Who?", [("Ada", -30)]), "from -30 to -27 is outside"),
        (("q7", "Who?", [("Ada", 0), ("ada", 0)]), "answer 'ada' is not at 0"),
        (("q7", "Who?", [("", 3)]), "the answer at 3 is empty"),
        (("q7", "Who?", [(" ", 3)]), "the answer at 3 is empty"),
        (("q7", "Who?", [("Ada", "0")]), "an answer is 'Ada' at '0', not a text at a whole number"),
        (("q7", "Who?", [(None, 0)]), "an answer is None at 0"),
        (("q7", " \n", [("Ada", 0)]), "the question is empty"),
        (("q7", None, [("Ada", 0)]), "the question is None, not a text"),
        (("q7", "\ud83d?", [("Ada", 0)]), "half a surrogate pair"),
    ],
)
def test_a_wrong_question_is_refused_with_file_and_id_or_reported(file, question, message):
    path = file(GOOD, question, ("q8", "When?", [("1843", 25)]))
    with pytest.raises(DataError) as caught:
        load_squad(path)
    text = str(caught.value)
    assert str(path) in text
    assert "'q7'" in text
    assert message in text

    report = []
    assert [q.id for q in load_squad(path, report=report)] == ["q1", "q8"]
    assert [(problem.source, problem.id) for problem in report] == [(str(path), "q7")]
    assert message in report[0].what


def test_an_empty_context_is_refused(file):
    with pytest.raises(DataError, match="'q1': the context is empty"):
        load_squad(file(("q1", "Who?", []), context=" \r\n"))


@pytest.mark.parametrize("key", [17, None, ""])
def test_an_id_that_is_no_text_is_refused_with_its_place(file, key):
    with pytest.raises(DataError, match=r"data\[0\].paragraphs\[0\].qas\[1\].*the id is"):
        load_squad(file(GOOD, (key, "When?", [("1843", 25)])))


def test_the_second_of_two_questions_with_one_id_is_the_wrong_one(file):
    path = file(GOOD, ("q1", "When?", [("1843", 25)]))
    with pytest.raises(DataError, match="'q1': the id comes twice"):
        load_squad(path)
    report = []
    assert [q.question for q in load_squad(path, report=report)] == ["Who wrote it?"]
    assert [problem.id for problem in report] == ["q1"]


def test_overlapping_and_repeated_answers_are_right(file):
    answers = [("Ada Lovelace", 0), ("Ada", 0), ("Lovelace wrote", 4), ("Ada Lovelace", 0)]
    (question,) = load_squad(file(("q1", "Who?", answers)))
    assert [(answer.text, answer.start) for answer in question.answers] == answers


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("Yes", "Yes"),
        ("one 👩‍🚀 two 🇪🇸 three", "three"),
        ("the caf\u0065\u0301 of Ren\u00e9e", "Ren\u00e9e"),
        ("first\r\nsecond\r\nthird line", "third line"),
        ("first\r\nsecond", "first\r\nsecond"),
        ("word " * 49_999 + "last", "last"),
    ],
    ids=["one word", "emoji", "combining", "CRLF", "CRLF inside", "50,000 words"],
)
@pytest.mark.parametrize("ascii", [True, False])
def test_offsets_count_characters_whatever_the_text(tmp_path, context, answer, ascii):
    content = squad(("q1", "What?", [(answer, context.index(answer))]), context=context)
    (question,) = load_squad(write(tmp_path / "x.json", json.dumps(content, ensure_ascii=ascii)))
    found = question.answers[0]
    assert question.context == context
    assert question.context[found.start : found.end] == answer


def test_offsets_in_bytes_are_told_with_the_right_ones(file):
    context = "Ein Café in Köln"
    in_bytes = len("Ein Café in ".encode())
    with pytest.raises(DataError, match=r"outside the context of 16 characters; it stands at 12"):
        load_squad(file(("q1", "Wo?", [("Köln", in_bytes)]), context=context))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(squad(GOOD))[:-30], "truncated or no JSON"),
        ("", "truncated or no JSON"),
        ('{"version": "1.1"}', "the file lacks 'data'"),
        ("[1, 2]", "the file is malformed"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\].paragraphs\[0\] lacks 'context'"),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b"}]}]}]}',
            r"qas\[0\] lacks 'id'",
        ),
        ("[" * 100_000, "truncated or no JSON"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(DataError, match=message) as caught:
        load_squad(path)
    assert str(path) in str(caught.value)


def test_other_encodings_and_missing_files_are_told(tmp_path):
    path = tmp_path / "latin.json"
    path.write_bytes(json.dumps(squad(GOOD, context="Café"), ensure_ascii=False).encode("latin1"))
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9 .* iconv"):
        load_squad(path)
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        load_squad(tmp_path / "none.json")


def test_compressed_files_are_told(tmp_path):
    path = tmp_path / "packed.json"
    path.write_bytes(gzip.compress(json.dumps(squad(GOOD)).encode()))
    with pytest.raises(DataError, match=r"packed\.json is compressed; unpack it"):
        load_squad(path)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": "Ada", "answer_start": 0}, "not a list of text and answer_start"),
        ("Ada", "not a list of text and answer_start"),
        (["Ada"], "not a list of text and answer_start"),
        ([{"text": "Ada"}], "an answer lacks 'answer_start'"),
        ([{"answer_start": 0}], "an answer lacks 'text'"),
    ],
)
def test_malformed_answers_cost_their_question_alone(tmp_path, answers, message):
    content = squad(GOOD, ("q2", "Who?", [("Ada", 0)]))
    content["data"][0]["paragraphs"][0]["qas"][1]["answers"] = answers
    path = write(tmp_path / "some.json", content)
    with pytest.raises(DataError, match=f"'?q2'?.*{message}"):
        load_squad(path)
    report = []
    assert [q.id for q in load_squad(path, report=report)] == [GOOD[0]]
    assert message in str(*report)


def test_a_byte_order_mark_and_crlf_in_the_file_itself_do_not_matter(file):
    path = file(GOOD)
    content = json.dumps(json.loads(path.read_text()), indent=1).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_squad(path)[0].id == "q1"


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "some data"
    for number, split in enumerate(SPLITS):
        for domain in ("squad", "newsqa"):
            key = f"{domain}-{number}"
            write(root / split / domain, squad((key, "Who?", [("Ada", 0)])))
    return root


def test_a_folder_in_the_layout_of_robustqa(folder):
    write(folder / "oodomain_val" / "race.json", squad(("r", "When?", [("1843", 25)])))
    write(folder / "oodomain_val" / "race_encodings.pt", "a cache")
    write(folder / "oodomain_val" / ".DS_Store", "noise")
    write(folder / "oodomain_test" / "race", "not read")
    found = load_questions(folder)
    assert list(found["indomain_train"]) == ["newsqa", "squad"]
    assert list(found.oodomain_val) == ["newsqa", "race", "squad"]
    assert [q.id for q in found.pooled("oodomain_val")] == ["newsqa-3", "r", "squad-3"]
    assert {q.domain for q in found.oodomain_val["race"]} == {"race"}
    assert "oodomain_val    race" in found.describe()
    with pytest.raises(KeyError, match="unknown split 'test'"):
        found["test"]


def test_the_checksum_follows_the_content(folder):
    before = load_questions(folder).sha256
    assert load_questions(folder).sha256 == before
    write(folder / "indomain_val" / "squad", squad(("squad-1", "Who??", [("Ada", 0)])))
    assert load_questions(folder).sha256 != before


def test_an_id_in_two_files_is_told_with_both(folder):
    write(folder / "oodomain_val" / "race", squad(("squad-0", "Who?", [("Ada", 0)])))
    with pytest.raises(DataError, match=r"oodomain_val.race.*'squad-0'.*indomain_train.squad"):
        load_questions(folder)
    report = []
    assert len(load_questions(folder, report=report).oodomain_val["race"]) == 0
    assert len(report) == 1


def test_folders_that_are_not_data_are_told(tmp_path, folder):
    with pytest.raises(DataError, match="is not a folder"):
        load_questions(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds none of them"):
        load_questions(tmp_path)
    (tmp_path / "empty" / "indomain_train").mkdir(parents=True)
    with pytest.raises(DataError, match="hold no file"):
        load_questions(tmp_path / "empty")
    write(folder / "oodomain_val" / "squad.json", squad(GOOD))
    with pytest.raises(DataError, match="'squad' twice"):
        load_questions(folder)


def test_some_of_the_four_folders_are_enough(tmp_path):
    write(tmp_path / "oodomain_val" / "race", squad(GOOD))
    found = load_questions(tmp_path)
    assert found.indomain_train == {}
    assert len(found.pooled("oodomain_val")) == 1


def test_the_readers_own_data_come_first(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_DATA", str(tmp_path))
    assert data.default_source() == "embedded"
    folder.rename(tmp_path / "qa")
    assert data.default_source() == str(tmp_path / "qa")
    assert load_questions().source == str(tmp_path / "qa")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("FEEDFORWARD_DATA", f"~/{tmp_path.name}")
    assert data.default_source() == str(tmp_path / "qa")
    monkeypatch.delenv("FEEDFORWARD_DATA")
    assert data.default_source() == "embedded"


def test_the_embedded_sets_are_asked_for_lazily(monkeypatch):
    question = Question("e", "Who?", "Ada.", (Answer("Ada", 0),), "wiki")
    made = {split: {"wiki": [question]} for split in SPLITS}
    module = types.SimpleNamespace(embedded_questions=lambda: made)
    monkeypatch.setitem(sys.modules, "feedforward.qa.embedded", module)
    assert load_questions("embedded").oodomain_train == {"wiki": (question,)}


@pytest.mark.skipif(
    not (Path(os.environ.get("FEEDFORWARD_DATA", "/nowhere")) / "qa").is_dir(),
    reason="FEEDFORWARD_DATA holds no folder qa",
)
def test_the_real_out_of_domain_sets_are_whole():
    found = load_questions()
    counts = {domain: len(questions) for domain, questions in found.oodomain_val.items()}
    assert counts == {"duorc": 126, "race": 128, "relation_extraction": 128}
    assert {len(questions) for questions in found.oodomain_train.values()} == {127}


# --- the hub ------------------------------------------------------------------------------------


def fake_hub(monkeypatch, **data_sets):
    def load_dataset(path):
        if path not in data_sets:
            raise ConnectionError("no network")
        return data_sets[path]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def mrqa_row(subset, number, **spans):
    context = f"Passage {number} of Ada Lovelace."
    spans = spans or {"start": [len(context) - 13], "end": [len(context) - 2]}
    return {
        "subset": subset,
        "qid": f"{subset}-{number}",
        "question": "Who?",
        "context": context,
        "answers": ["ada lovelace"],
        "detected_answers": {"text": ["Ada Lovelace"], "char_spans": [spans]},
    }


def test_mrqa_becomes_the_splits_of_robustqa(monkeypatch):
    inside = ("SQuAD", "NewsQA", "NaturalQuestionsShort", "HotpotQA")
    outside = ("DuoRC.ParaphraseRC", "RACE", "RelationExtraction", "DROP")
    rows = {
        "train": [mrqa_row(subset, n) for subset in inside for n in range(3)],
        "validation": [mrqa_row(subset, n) for subset in inside for n in range(10, 12)],
        "test": [mrqa_row(subset, n) for subset in outside for n in range(300)],
    }
    fake_hub(monkeypatch, **{"mrqa-workshop/mrqa": rows})
    found = load_questions("hub:mrqa")
    assert {d: len(q) for d, q in found.indomain_train.items()} == {
        "squad": 3,
        "newsqa": 3,
        "nat_questions": 3,
    }
    assert all(len(questions) == 2 for questions in found.indomain_val.values())
    assert {d: len(q) for d, q in found.oodomain_train.items()} == {
        "duorc": 127,
        "race": 127,
        "relation_extraction": 127,
    }
    assert {d: len(q) for d, q in found.oodomain_val.items()} == {
        "duorc": 126,
        "race": 128,
        "relation_extraction": 128,
    }
    every = [q for split in SPLITS for q in found.pooled(split)]
    assert len({q.id for q in every}) == len(every)
    assert all(q.answers[0].text == "Ada Lovelace" and not problems_of(q) for q in every)
    rows["test"].reverse()
    assert load_questions("hub:mrqa").oodomain_val == found.oodomain_val


def test_mrqa_passages_to_train_on_are_none_of_those_to_validate_with(monkeypatch):
    test = [
        mrqa_row(subset, n) | {"context": mrqa_row(subset, n // 7)["context"]}
        for subset in ("DuoRC.ParaphraseRC", "RACE", "RelationExtraction")
        for n in range(700)
    ]
    for row in test:
        at = row["context"].index("Ada")
        row["detected_answers"]["char_spans"] = [{"start": [at], "end": [at + 11]}]
    rows = {"train": [], "validation": [], "test": test}
    fake_hub(monkeypatch, **{"mrqa-workshop/mrqa": rows})
    found = load_questions("hub:mrqa")
    for domain, train in found.oodomain_train.items():
        validation = found.oodomain_val[domain]
        assert len(train) == 127
        assert len(validation) == (126 if domain == "duorc" else 128)
        assert not {q.context for q in train} & {q.context for q in validation}


def test_mrqa_detected_answers_count_their_end_in_and_may_be_several(monkeypatch):
    row = mrqa_row("SQuAD", 5, start=[13, 17], end=[15, 24])
    fake_hub(monkeypatch, **{"mrqa-workshop/mrqa": {"train": [row], "validation": [], "test": []}})
    (question,) = load_questions("hub:mrqa").indomain_train["squad"]
    assert question.answers == (Answer("Ada", 13), Answer("Lovelace", 17))


def test_squad_of_the_hub(monkeypatch):
    row = {
        "id": "s",
        "title": "t",
        "question": "Who?",
        "context": "It was Ada.",
        "answers": {"text": ["Ada", "Ada."], "answer_start": [7, 7]},
    }
    rows = {"train": [row], "validation": [row | {"id": "v"}]}
    fake_hub(monkeypatch, **{"rajpurkar/squad": rows})
    found = load_questions("hub:squad")
    assert found.indomain_train["squad"][0].answers == (Answer("Ada", 7), Answer("Ada.", 7))
    assert [q.id for q in found.pooled("indomain_val")] == ["v"]
    assert found.oodomain_val == {}


def test_without_a_network_the_hub_is_a_clear_error(monkeypatch):
    fake_hub(monkeypatch)
    with pytest.raises(DataError, match=r"ConnectionError: no network.*source='embedded'"):
        load_questions("hub:mrqa")
    with pytest.raises(DataError, match="unknown source 'hub:other'"):
        load_questions("hub:other")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_questions("hub:squad")


def test_questions_are_values(file):
    (question,) = load_squad(file(GOOD))
    assert dataclasses.replace(question, id="q9").id == "q9"
    assert hash(question) == hash(dataclasses.replace(question))
    with pytest.raises(dataclasses.FrozenInstanceError):
        question.id = "other"
