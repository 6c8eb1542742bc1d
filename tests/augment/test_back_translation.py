import random
import shutil
import sqlite3
import sys
import types
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest

from feedforward.augment import back_translation
from feedforward.augment.back_translation import (
    Apertium,
    BackTranslation,
    EngineError,
    Marian,
    NlpaugTranslation,
    RoundTrip,
    TranslationCache,
)
from feedforward.augment.questions import augment_questions
from feedforward.augment.spans import ProtectedText

TEXT = "Ada lives in Paris. The old king came from Rome to Paris in May.\r\n\r\nNobody saw him."


class Words:
    """An engine that changes words, and remembers what it was asked."""

    def __init__(self, change, name="words", at_once=2):
        self.change, self.name, self.at_once, self.asked = change, name, at_once, []

    def translate(self, sentences):
        self.asked.append(sentences)
        return [self.change(sentence) for sentence in sentences]


def spans(*words, text=TEXT):
    return tuple((text.rindex(word), text.rindex(word) + len(word)) for word in words)


@pytest.fixture
def cache(tmp_path):
    return TranslationCache(tmp_path / "cache.sqlite")


def run(change, cache, text=TEXT, places=None, **options):
    engine = change if hasattr(change, "translate") else Words(change)
    places = spans("Rome", "Paris") if places is None else places
    augmenter = BackTranslation(engine, cache=cache, **options)
    return augmenter.many([ProtectedText(text, places)], [np.random.default_rng(0)])[0]


def test_sentences_change_around_the_answers(cache):
    back = run(
        lambda s: s.replace("came", "travelled all the way").replace("Nobody", "No one"), cache
    )
    assert back.text.text == (
        "Ada lives in Paris. The old king travelled all the way from Rome to Paris in May."
        "\r\n\r\nNo one saw him."
    )
    assert back.text.protected == ("Rome", "Paris")
    assert back.text.spans[1][0] > TEXT.index("Paris") + 20
    assert back.repaired == 0


def test_the_engine_sees_names_in_whole_sentences(cache):
    engine = Words(str.lower)
    run(
        engine, cache, places=(*spans("Rome"), (TEXT.rindex("ari"), TEXT.rindex("is")))
    )  # two letters of Paris
    seen = [sentence for batch in engine.asked for sentence in batch]
    assert seen[1] == "The old king came from Xaxa to Xbxb in May."
    assert len(seen) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.replace("Xaxa", ""),
        lambda s: s.replace("Xaxa", "Xaxaha"),
        lambda s: s.replace("Xaxa", "xaxa"),
        lambda s: s.replace("Xaxa", "Xaxa Xaxa"),
        lambda s: s.replace("Xaxa", "Q").replace("Xbxb", "Xaxa").replace("Q", "Xbxb"),
        lambda s: "",
        lambda s: "... Xaxa - Xbxb." if "Xbxb" in s else s,
    ],
)
def test_a_lost_name_brings_the_sentence_back(change, cache):
    places = (*spans("Rome", "Paris"), (TEXT.index("Rome"), TEXT.index("Rome") + 2))
    back = run(lambda s: change(s).replace("Nobody", "No one"), cache, places=places)
    assert "The old king came from Rome to Paris in May." in back.text.text
    assert back.text.protected == ("Rome", "Paris", "Ro")
    assert back.repaired == 3


def test_a_text_that_holds_the_name_gets_another(cache):
    text = "Xaxa and Xbxb met Ada in May."
    engine = Words(lambda s: s.replace("met", "saw"))
    back = run(engine, cache, text=text, places=spans("Ada", text=text))
    assert engine.asked == [["Xaxa and Xbxb met Xcxc in May."]]
    assert back.text.text == "Xaxa and Xbxb saw Ada in May."


def test_the_papers_form_cuts_at_the_answers(cache):
    engine = Words(str.upper)
    back = run(engine, cache, cut_at_answers=True, places=spans("Rome"))
    seen = [sentence for batch in engine.asked for sentence in batch]
    assert seen == [
        "Ada lives in Paris.",
        "The old king came from",
        "to Paris in May.",
        "Nobody saw him.",
    ]
    assert back.text.protected == ("Rome",)
    short = "One two three four five Rome one two three four five six."
    back = run(
        Words(str.upper, "other"),
        cache,
        text=short,
        places=spans("Rome", text=short),
        cut_at_answers=True,
    )
    assert back.text.text == "One two three four five Rome ONE TWO THREE FOUR FIVE SIX."


def test_a_share_of_sentences_travels_and_engines_take_turns(cache):
    text = " ".join(f"Sentence number {i} stands here." for i in range(400))
    engines = [Words(lambda s, n=n: s.replace("stands", n), n, 100) for n in ("one", "two")]
    augmenter = BackTranslation(*engines, share=0.5, cache=cache)
    words = augmenter(ProtectedText(text), np.random.default_rng(0)).text.split()
    assert 160 < words.count("stands") < 240
    assert 70 < words.count("one") < 130
    assert words.count("stands") + words.count("one") + words.count("two") == 400
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="share is"):
            BackTranslation(*engines, share=wrong)
    with pytest.raises(ValueError, match="no engine"):
        BackTranslation()


def test_what_was_translated_is_not_asked_again(cache):
    first, second, other = (Words(str.upper, name) for name in ("same", "same", "another"))
    once = run(first, cache)
    assert run(second, cache) == once
    assert (len(first.asked), second.asked) == (2, [])
    run(other, cache)
    assert len(other.asked) == 2


def test_an_engine_that_dies_goes_on_where_it_was(cache):
    class Dies(Words):
        def translate(self, sentences):
            if len(self.asked) == 2:
                raise OSError("out of memory")
            return super().translate(sentences)

    text = " ".join(f"Sentence number {i} stands here." for i in range(10))
    with pytest.raises(EngineError, match="after 4 of 10 sentences, which are kept: out of memory"):
        run(Dies(str.upper), cache, text=text, places=())
    again = Words(str.upper)
    assert run(again, cache, text=text, places=()).text.text == text.upper()
    assert sum(map(len, again.asked)) == 6
    short = Words(str.upper, "short")
    short.translate = lambda sentences: sentences[1:]
    with pytest.raises(EngineError, match="1 translations of 2 sentences"):
        run(short, cache, text=text, places=())


@pytest.mark.parametrize("broken", [None, 7, b"one", ["one"], "\ud83d"], ids=repr)
def test_what_is_no_text_is_named_and_not_kept(cache, broken):
    engine, text = Words(str.upper), "One stands here. Two stands there."
    engine.translate = lambda sentences: [broken] * len(sentences)
    with pytest.raises(EngineError, match="in the place of a translation"):
        run(engine, cache, text=text, places=())
    assert run(Words(str.upper), cache, text=text, places=()).text.text == text.upper()


def test_a_translation_without_text_that_was_stored_is_asked_for_again(cache):
    run(Words(str.upper), cache, text="One stands here.", places=())
    with closing(sqlite3.connect(cache.path)) as connection, connection:
        connection.execute("UPDATE sentences SET translation = NULL")
    again = Words(str.upper)
    done = run(again, cache, text="One stands here.", places=())
    assert (done.text.text, len(again.asked)) == ("ONE STANDS HERE.", 1)


def test_a_damaged_cache_is_named(cache):
    cache.path.write_bytes(b"no data base" * 100)
    with pytest.raises(EngineError, match=r"cache\.sqlite cannot be used .* delete the file"):
        run(str.upper, cache)


def test_a_cache_that_another_process_writes_is_not_to_be_deleted(cache, monkeypatch):
    run(str.upper, cache)
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: real(path, timeout=0.01))
    with closing(real(cache.path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(EngineError, match="another process is writing to it") as caught:
            run(str.lower, cache)
    assert "delete" not in str(caught.value)
    assert run(str.upper, cache).text.text


@pytest.mark.parametrize("place", ["folder", "file/cache.sqlite"])
def test_a_cache_that_cannot_be_opened_is_not_to_be_deleted(place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    cache = TranslationCache(tmp_path / place)
    with pytest.raises(EngineError, match="may read and write, or set FEEDFORWARD_CACHE") as caught:
        run(str.upper, cache)
    assert str(cache.path) in str(caught.value)
    assert "delete" not in str(caught.value)


def test_a_round_trip_is_there_and_back():
    there, back = Words(str.upper, "there"), Words(str.title, "back")
    trip = RoundTrip(there, back)
    assert trip.translate(["ab cd"]) == ["Ab Cd"]
    assert (trip.name, trip.at_once, back.asked) == ("there > back", 2, [["AB CD"]])


@dataclass(frozen=True)
class Answer:
    text: str
    start: int


@dataclass(frozen=True)
class Question:
    id: str
    context: str
    answers: tuple[Answer, ...]


def test_questions_report_what_was_repaired(cache):
    question = Question("q", TEXT, tuple(Answer(TEXT[a:b], a) for a, b in spans("Rome", "Paris")))
    lossy = BackTranslation(Words(lambda s: s.replace("Xaxa", "").lower()), cache=cache)
    made = augment_questions([question], lossy, copies=1, seed=0)
    assert (made.report.kept, made.report.repaired, made.report.lost) == (0, 2, 0)
    assert made.questions[0].answers == question.answers


def test_answers_stay_exact_whatever_an_engine_does(cache):
    rng = random.Random(0)

    def spoil(sentence):
        letters = list(sentence)
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(letters) + 1)
            new = rng.choice(["", "x", " ", "Xaxa", "\n\n", "👩\u200d"])
            letters[at : at + rng.randint(0, 2)] = new
        return "".join(letters)

    for number in range(100):
        words = rng.choices(
            ["Ada", "May.", "Rome?", "café", "👍🏽", "x-y", "3.5", "\r\n", "Mr.", "(a)", "“b”"],
            k=30,
        )
        text = " ".join(words)
        starts = [rng.randrange(len(text) - 8) for _ in range(rng.randint(0, 4))]
        places = tuple((a, a + rng.randint(1, 8)) for a in starts)
        for cut in (False, True):
            engine = Words(spoil, f"spoil {number}", 100)
            back = run(engine, cache, text=text, places=places, cut_at_answers=cut)
            assert back.text.protected == ProtectedText(text, places).protected


@pytest.mark.parametrize("text", ["", "\r\n", "word", "...", "👩\u200d👩🏽"])
def test_texts_without_sentences(text, cache):
    assert run(lambda s: s, cache, text=text, places=()).text.text == text
    if text.strip():
        everything = ((0, len(text)),)
        engine = Words(str.upper, "never asked")
        assert run(engine, cache, text=text, places=everything).text.text == text
        assert engine.asked == []


# --- the engines themselves ----------------------------------------------------------------------


def test_without_apertium_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(back_translation.shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match="apt-get install apertium apertium-eng-spa"):
        Apertium("eng-spa").translate(["A house."])


def test_apertium_finds_the_sentence_that_fell_in_two(tmp_path, monkeypatch):
    program = tmp_path / "apertium"
    program.write_text("#!/bin/sh\nsed 's/break/two\\n\\nparts/'\n")
    program.chmod(0o755)
    monkeypatch.setattr(back_translation.shutil, "which", lambda name: str(program))
    sentences = ["One.", "It will break here.", "  Three."]
    assert Apertium("a-b").translate(sentences) == ["One.", "It will two parts here.", "Three."]
    program.write_text("#!/bin/sh\necho 'Error: no mode' >&2\nexit 1\n")
    with pytest.raises(EngineError, match=r"apertium a-b failed \(1\): Error: no mode"):
        Apertium("a-b").translate(["One."])


@pytest.mark.skipif(not shutil.which("apertium"), reason="Apertium is not installed")
def test_apertium_keeps_names_and_full_stops():
    trip = RoundTrip(Apertium("eng-spa"), Apertium("spa-eng"))
    back = trip.translate(["The dog lives in Xaxa [1].", "He {saw} it."] * 3)
    assert len(back) == 6
    assert all("Xaxa" in s for s in back[::2])
    assert all(s.endswith(".") for s in back)
    with pytest.raises(EngineError, match="apertium eng-xyz failed"):
        Apertium("eng-xyz").translate(["One."])


def test_a_model_that_is_not_there_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EngineError, match=r"needs a network.*safetensors.*sentencepiece"):
        Marian(str(tmp_path / "nothing")).translate(["A house."])


def test_a_model_translates_in_order(tmp_path):
    """Of a tiny untrained model, every sentence gets its own text, wherever it stands."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    config = MarianConfig(
        vocab_size=13,
        d_model=16,
        **sizes,
        max_position_embeddings=12,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        bos_token_id=None,
    )
    MarianMTModel(config).save_pretrained(tmp_path, safe_serialization=True)
    sentences = ["a b c d e f", "j", "b c", "a b c d"]
    one = Marian(str(tmp_path), batch_size=1).translate(sentences)
    assert Marian(str(tmp_path), batch_size=3).translate(sentences) == one
    assert Marian(str(tmp_path)).translate(sentences[::-1]) == one[::-1]


def test_nlpaugs_translation_is_an_engine(cache):
    augmenter = types.SimpleNamespace(substitute=lambda sentences: [s.upper() for s in sentences])
    engine = NlpaugTranslation(augmenter, name="a > b")
    assert engine.translate(["one", "one"]) == ["ONE", "ONE"]
    assert "nlpaug" not in sys.modules or engine.name == "nlpaug a > b"
