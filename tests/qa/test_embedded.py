"""The embedded questions: exact spans, sizes, no shared sources, the same on every machine."""

import bz2
import hashlib
import importlib.metadata
import json
import types

import pytest

from feedforward.augment.sentences import split_sentences
from feedforward.files import DataError
from feedforward.qa import embedded
from feedforward.qa.data import load_questions
from feedforward.qa.embedded import bible, countries, files, glosses, plays, reports, wikipedia
from feedforward.qa.embedded.asking import Asker
from feedforward.qa.embedded.draft import Draft, choose, ordered, take, unambiguous
from feedforward.qa.schema import SPLITS, problems_of

DUMP = """<page><title>Ada Lovelace</title><text xml:space="preserve">
'''Ada Lovelace''' was an English poet.&lt;ref&gt;A book.&lt;/ref&gt; She was clever and quick.
== Life ==
{{Infobox|a=1}}
The Analytical Engine was designed by [[Charles Babbage|Babbage]]. It was never built at all.
* a list
%s
</text></page><page><title>B</title><text>#REDIRECT [[A]]</text></page>"""


@pytest.fixture(scope="module")
def made():
    return embedded.embedded_questions()


def pooled(made, split):
    return [question for questions in made[split].values() for question in questions]


# --- the whole ----------------------------------------------------------------------------------


def test_the_six_sets_have_their_sizes(made):
    assert tuple(made) == SPLITS
    for split in SPLITS[:2]:
        assert tuple(made[split]) == embedded.INDOMAIN
    for split in SPLITS[2:]:
        assert tuple(made[split]) == embedded.OUTDOMAIN
    assert {k: len(v) for k, v in made["oodomain_train"].items()} == dict.fromkeys(
        embedded.OUTDOMAIN, 127
    )
    assert {k: len(v) for k, v in made["oodomain_val"].items()} == dict.fromkeys(
        embedded.OUTDOMAIN, 128
    )
    assert all(len(questions) > 800 for questions in made["indomain_train"].values())
    assert all(len(questions) > 150 for questions in made["indomain_val"].values())


def test_every_span_is_exact_and_every_id_its_own(made):
    everything = [question for split in SPLITS for question in pooled(made, split)]
    assert [problem for question in everything for problem in problems_of(question)] == []
    assert len({question.id for question in everything}) == len(everything)
    for question in everything:
        (answer,) = question.answers
        assert answer.text == answer.text.strip()
        assert len(answer.text.split()) <= 12
        assert question.question == " ".join(question.question.split())
        assert question.id.startswith(f"{question.domain}-")


def test_training_and_validation_share_no_passage(made):
    for place in ("indomain", "oodomain"):
        train = {question.context for question in pooled(made, f"{place}_train")}
        held_out = {question.context for question in pooled(made, f"{place}_val")}
        assert not train & held_out


def test_no_answer_of_validation_stands_in_a_passage_of_training(made):
    """Nor in one of the other set that is made of the same articles."""

    def sentences(context):
        return {context[a:b] for a, b in split_sentences(context) if b - a > 40}

    trained = set().union(*(sentences(q.context) for q in pooled(made, "indomain_train")))
    for domain in ("wiki", "report"):
        for question in made["indomain_val"][domain]:
            spans = split_sentences(question.context)
            at = question.answers[0].start
            own = {question.context[a:b] for a, b in spans if a <= at < b and b - a > 40}
            assert not own & trained, question.id


def test_no_question_holds_its_answer(made):
    for split in SPLITS:
        for question in pooled(made, split):
            if question.domain not in ("search", "exam"):
                assert question.answers[0].text.lower() not in question.question.lower()


def test_what_is_loaded_is_what_the_registry_promises(made):
    entry = files.registry()["embedded-questions"]
    path = embedded.cache_directory("data", "qa", entry["sha256"][:16]) / "questions.json"
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert len(content) == entry["bytes"]
    loaded = load_questions("embedded")
    assert loaded.pooled("oodomain_val") == tuple(pooled(made, "oodomain_val"))


def test_a_damaged_store_is_built_again(tmp_path, monkeypatch):
    content = b'{"%s":{}}' % b'":{},"'.join(split.encode() for split in SPLITS)
    digest = hashlib.sha256(content).hexdigest()
    built = []
    monkeypatch.setattr(embedded, "build", lambda: built.append(1) or content)
    for _ in range(2):
        embedded._load.cache_clear()
        embedded._load(str(tmp_path), digest)
    assert built == [1]
    (tmp_path / digest[:16] / "questions.json").write_bytes(content[:-1])
    embedded._load.cache_clear()
    embedded._load(str(tmp_path), digest)
    assert built == [1, 1]
    embedded._load.cache_clear()


def test_another_result_than_promised_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "build", lambda: b"{}")
    embedded._load.cache_clear()
    with pytest.raises(DataError, match="the code and the registry do not belong together"):
        embedded._load(str(tmp_path), "0" * 64)
    embedded._load.cache_clear()


# --- files --------------------------------------------------------------------------------------


def test_files_are_read_by_name(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(b"1")
    (tmp_path / "b.json").write_bytes(b"2")
    here = types.SimpleNamespace(locate_file=lambda path: tmp_path / path, version="1.0")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: here)
    listed = {
        f"{name}.json": {"bytes": 1, "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in (("a", b"1"), ("b", b"2"))
    }
    entry = {"title": "Numbers", "package": "numbers", "version": "1.0", "files": listed}
    assert files.read("numbers", entry) == {"a.json": b"1", "b.json": b"2"}
    assert files.read("numbers", entry, only="b") == {"b.json": b"2"}
    (tmp_path / "b.json").write_bytes(b"3")
    with pytest.raises(DataError, match=r"differs: expected 1 bytes.*--no-deps numbers==1\.0"):
        files.read("numbers", entry)


def test_a_registry_without_the_sources_is_an_error(tmp_path):
    (tmp_path / "registry.toml").write_text("[kjv]\npart = 'lm'\n")
    with pytest.raises(DataError, match=r"lacks \['wikipedia'.*'embedded-questions'\]"):
        files.registry(tmp_path / "registry.toml")


# --- the makers ---------------------------------------------------------------------------------


def test_drafts_are_chosen_the_same_way_everywhere():
    drafts = [Draft("k", f"Who is {n}?", "Ada and Bob", "Ada", 0, str(n)) for n in range(20)]
    assert take(reversed(drafts), 5, a_context=9) == take(drafts, 5, a_context=9)
    assert len(take(drafts, 5, a_context=2)) == 2
    assert len(take(drafts, 10, a_kind=0.3, a_context=9)) == 3
    assert ordered("abc", "salt") == ordered("cba", "salt")
    assert choose(["x", "y", "z"], "a", "b") == choose(["x", "y", "z"], "a", "b")
    with pytest.raises(ValueError, match="is not at 1"):
        Draft("k", "Who?", "Ada", "Ada", 1, "s")


def test_a_question_with_two_answers_is_left_out():
    one = Draft("k", "Who?", "Ada and Bob", "Ada", 0, "s")
    assert unambiguous([one, Draft("k", "Who?", "Ada and Bob", "Bob", 8, "s")]) == []
    assert unambiguous([one]) == [one]


def test_wikitext_becomes_plain_sentences():
    filler = "\n".join(f"Number {n} is a number of note. It is large and round." for n in range(5))
    (article,) = wikipedia.articles(bz2.compress((DUMP % filler).encode()))
    assert article.title == "Ada Lovelace"
    assert ("The Analytical Engine was designed by Babbage.", "It was never built at all.") in (
        article.paragraphs
    )
    assert not any("list" in s or "Infobox" in s for p in article.paragraphs for s in p)
    text = "Dr. J. Smith came. He left the U.S. Army in May. Was it early? Yes."
    assert wikipedia.sentences(text) == [
        "Dr. J. Smith came.",
        "He left the U.S. Army in May.",
        "Was it early?",
        "Yes.",
    ]
    assert wikipedia.plain("A {{convert|3|km|mi}} road{{sfn|B}} to [[C|D]].") == "A 3 km road to D."


TEXT = [
    "He published it, designed it and visited it.",
    "They want to publish and will publish it.",
    "They want to design and will design it.",
    "They want to visit and will visit it.",
]


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("In 1843, Ada Lovelace published the notes.", "When did Ada Lovelace publish the notes?",
         "1843"),
        ("The engine was designed in London in 1837.", "When was the engine designed in London?",
         "1837"),
        ("The heart has two chambers and pumps blood.", "How many chambers does the heart have?",
         "two"),
        ("The capital of Alabama is Montgomery.", "What is the capital of Alabama?", "Montgomery"),
        ("About 41% of the people are of English ancestry.",
         "What percentage of the people are of English ancestry?", "41%"),
    ],
)  # fmt: skip
def test_a_pattern_asks_what_it_is_sure_of(sentence, question, answer):
    found = {it.question: sentence[it.start : it.end] for it in Asker(TEXT)(sentence)}
    assert found.get(question) == answer


@pytest.mark.parametrize(
    "sentence",
    [
        "It was designed in 1837.",
        "In 1843, this published the notes.",
        "The engine designed by him was large.",
        "However, they visited the museum in 1843.",
    ],
)
def test_a_pattern_leaves_alone_what_points_elsewhere(sentence):
    assert Asker(TEXT)(sentence) == ()


def test_passages_keep_to_their_length():
    article = wikipedia.Article("A", tuple((("word " * 19 + "end.",) * 3) for _ in range(9)))
    lengths = [sum(len(s.split()) for s in p) for p in reports.passages(article, 60, 130)]
    assert lengths
    assert min(lengths) >= 60
    assert max(lengths) < 150


def test_entries_of_a_dictionary():
    line = (
        "10954498 18 n 03 Einstein 0 Albert_Einstein 0 Al 0 002 @i 10428004 n 0000 + 02 a 0101 "
        "| physicist born in Germany who formulated the theory of relativity; Einstein also "
        "proposed that light consists of quanta (1879-1955)  "
    )
    (draft,) = glosses.drafts(line)
    assert draft.context.startswith("Albert Einstein: physicist born in Germany who")
    assert draft.answer in ("1879", "1955")
    assert "Albert Einstein" in draft.question


def test_a_page_of_facts_holds_two_countries():
    def country(name, code):
        return (
            f'{{"name":"{name}","capital":"{name} City","area":1234.0,"population":56789,'
            f'"demonym":"{name}ish","subregion":"North","callingCodes":["{ord(code[0])}"],'
            f'"tld":[".{code.lower()}"],"timezones":["UTC"],"ISO":{{"alpha3":"{code}"}},'
            f'"translations":{{"fr":"La {name}","de":"Das {name}"}}}}'
        )

    drafts = list(
        countries.drafts({"a": country("Utopia", "UTO"), "b": country("Ruritania", "RUR")})
    )
    assert {draft.source for draft in drafts} <= {"Utopia and Ruritania", "Ruritania and Utopia"}
    assert all("Utopia" in it.context and "Ruritania" in it.context for it in drafts)
    for draft in drafts:
        assert draft.question == draft.question.lower()
        assert ("utopia" in draft.question) != ("ruritania" in draft.question)
    assert {it.answer for it in drafts if it.kind == "area"} == {"1,234"}


def test_chapters_are_asked_in_other_words():
    verses = ["And Jared begat Enoch."] + ["And it came to pass after many days."] * 40
    verses[3] = "So Uriah abode in Jerusalem that day."
    verses[5] = "And Absalom slew Amnon."
    lines = "\n".join(
        json.dumps({"book": "Genesis", "chapter": 1, "verse": n, "text": text})
        for n, text in enumerate(verses)
    )
    found = {it.question: it.answer for it in bible.drafts(lines)}
    assert "Jared" in {answer for question, answer in found.items() if "Enoch" in question}
    assert found["Who killed Amnon?"] == "Absalom"
    assert any(question.endswith("did Uriah stay?") for question in found)
    assert not any(word in question for question in found for word in ("begat", "slew", "abode"))


def test_plays_are_asked_who_speaks():
    scene = "SCENE I. A heath near the sea.\n\n[Enter MACBETH.]\n\n" + "\n\n".join(
        f"{name}.\nNow is the time number {n} of my life, and so it will go on for all of us here."
        for n, name in enumerate(["MACBETH", "BANQUO", "ROSS"] * 140)
    )
    drafts = list(plays.drafts({"play": scene}))
    place = next(it for it in drafts if it.kind == "place")
    assert place.answer == "A heath near the sea"
    for draft in drafts:
        if draft.kind in ("speaker", "reply", "first", "last"):
            assert draft.answer in ("MACBETH", "BANQUO", "ROSS")
            assert draft.context.startswith(f"{draft.answer}. ", draft.start)
