"""Text: what is read is what the registry promises, and no test text is trained on."""

import dataclasses
import importlib.metadata
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from feedforward.lm import data
from feedforward.lm.data import DataError, Source, Work, load_text


@pytest.fixture(scope="module")
def embedded():
    return load_text("embedded")


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prose(seed: int, paragraphs: int = 60) -> str:
    words = ["the", "a", "sea", "ship", "whale", "said", "went", "old", "and", "of", "he", "it"]
    rng = np.random.default_rng(seed)
    return "\n\n".join(" ".join(rng.choice(words, 30)) for _ in range(paragraphs))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "some texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(prose(number))
    return folder


# --- the embedded text --------------------------------------------------------------------------


def test_the_splits_hold_the_works_that_the_registry_holds_out(embedded):
    works = {split: embedded.details[split]["works"] for split in data.SPLITS}
    assert set(works["test"]) == {"Job", "John", "hamlet", "macbeth"}
    assert set(works["validation"]) == {"Ezekiel", "twelfth_night", "winters_tale"}
    assert len(works["train"]) == 101
    assert not set(works["train"]) & {*works["test"], *works["validation"]}
    assert not any("_gut_f" in name for name in works["train"])  # one edition a play


def test_no_test_text_stands_in_the_training_text(embedded):
    def grams(split, n=13):
        words = re.findall(r"[a-z']+", embedded.decode(getattr(embedded, split)).lower())
        return [hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)]

    train = set(grams("train"))
    for split in ("validation", "test"):
        held_out = grams(split)
        assert len(held_out) > 50_000
        assert np.mean([gram in train for gram in held_out]) < 1e-3
    # the check itself finds a copy
    assert np.mean([gram in train for gram in grams("train")[:1000]]) == 1


def test_encoding_loses_nothing(embedded):
    tokens = embedded.test[:5000]
    text = embedded.decode(tokens)
    assert text.startswith("<|endoftext|>Job\n\nThere was a man in the land of Uz")
    assert embedded.encode(text) == tokens.tolist()
    assert embedded.decode(embedded.encode("Zürich – 東京")) == "Zürich – 東京"
    details = embedded.details["test"]
    decoded = embedded.decode(embedded.test).replace(data.END_OF_TEXT, "")
    assert len(decoded.encode()) == details["bytes"]
    assert embedded.bytes_per_token("test") == details["bytes"] / len(embedded.test)


def test_cast_lists_are_gone_and_scenes_stay(embedded):
    text = embedded.decode(embedded.train) + embedded.decode(embedded.test)
    assert "Dramatis Personae" not in text
    assert "PERSONS REPRESENTED" not in text.upper()
    assert "To be, or not to be,--that is the question:--" in text
    assert "by William Shakespeare" not in text
    assert not re.search(r"[^\n]  |\t|_|\r|\n\n\n", text)


def test_the_arrays_are_small_mapped_and_within_the_vocabulary(embedded):
    for split in data.SPLITS:
        tokens = getattr(embedded, split)
        assert tokens.dtype == np.uint16
        assert isinstance(tokens, np.memmap)
        assert int(tokens.max()) < embedded.vocabulary == 2048
        assert (tokens == embedded.end_of_text).sum() == len(embedded.details[split]["works"])
    described = embedded.describe()
    assert "embedded" in described
    assert "hamlet" in described


# --- damaged sources ----------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of one file, as its installation record would find it."""
    file = tmp_path / "text.txt"
    file.write_bytes(b"Call me Ishmael.\n")
    here = types.SimpleNamespace(locate_file=lambda path: tmp_path / path, version="1.0")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: here)
    content = file.read_bytes()
    checksum = data.hashlib.sha256(content).hexdigest()
    files = {"text.txt": (len(content), checksum)}
    about = dict.fromkeys(("title", "licence", "about"), "x")
    source = Source(
        "x", package="whale", version="1.0", files=files, validation=(), test=(), **about
    )
    return source, file


def test_a_sound_file_is_read(installed):
    source, _ = installed
    assert dict(data.read_checked(source)) == {"text.txt": "Call me Ishmael.\n"}


def test_a_damaged_file_is_not_read(installed):
    source, file = installed
    file.write_bytes(b"Call me")
    with pytest.raises(DataError, match=r"is truncated.*--no-deps whale==1\.0"):
        dict(data.read_checked(source))


def test_an_undecodable_file_names_the_byte(installed):
    source, file = installed
    content = "naïve".encode("latin1")
    file.write_bytes(content)
    checksum = data.hashlib.sha256(content).hexdigest()
    source = dataclasses.replace(source, files={"text.txt": (len(content), checksum)})
    with pytest.raises(DataError, match="not UTF-8: byte 0xef at offset 2"):
        dict(data.read_checked(source))


def test_a_broken_registry_is_a_clear_error(tmp_path):
    (tmp_path / "registry.toml").write_text("[kjv]\npart = 'lm'\nfiles = {}\n")
    with pytest.raises(DataError, match=r"incomplete.*title"):
        data.registry(tmp_path / "registry.toml")


# --- cleaning -----------------------------------------------------------------------------------


def test_a_shared_paragraph_stays_in_the_held_out_work():
    shared = "And it came to pass in the days of Ahaz, king of Judah.\n"
    short = "Exeunt.\n"
    splits = {
        "train": [Work("a", (shared, short, "Only here.\n")), Work("b", (shared.upper(), short))],
        "validation": [Work("c", (short,))],
        "test": [Work("d", (shared, shared))],
    }
    kept = data.deduplicate(splits)
    assert kept["test"][0].paragraphs == (shared, shared)  # whole, with its own repetition
    assert kept["train"][0].paragraphs == (short, "Only here.\n")
    assert kept["train"][1].paragraphs == (short,)
    assert kept["validation"][0].paragraphs == (short,)


# --- other sources ------------------------------------------------------------------------------


def test_a_few_large_files_are_each_cut_at_their_end(fresh_cache, folder):
    text = load_text(folder, vocabulary=300)
    assert text.source == str(folder)
    assert all(len(text.details[split]["works"]) == 3 for split in data.SPLITS)
    total = sum(text.details[split]["tokens"] for split in data.SPLITS)
    assert 0.03 < text.details["test"]["tokens"] / total < 0.08
    assert text.decode(text.train).count("\n\n") + text.decode(text.test).count("\n\n") > 100


def test_a_file_without_empty_lines_is_cut_between_its_lines(fresh_cache, tmp_path):
    lines = [f"entry {number}: {'word ' * 10}{number}" for number in range(1000)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    text = load_text(tmp_path, vocabulary=300)
    parts = [text.decode(getattr(text, split)) for split in data.SPLITS]
    joined = "".join(parts).replace(data.END_OF_TEXT, "").splitlines()
    assert joined[:1000] == [" ".join(line.split()) for line in lines]
    assert [part.count("\n") // 10 for part in parts] == [90, 5, 5]


def test_many_small_files_are_held_out_whole(fresh_cache, tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(prose(number, paragraphs=5))
    text = load_text(tmp_path, vocabulary=300)
    works = {split: set(text.details[split]["works"]) for split in data.SPLITS}
    assert len(works["train"]) + len(works["validation"]) + len(works["test"]) == 30
    assert len(works["train"]) == 26
    assert not works["train"] & works["test"]


def test_the_readers_folder_goes_before_the_embedded_text(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_DATA", str(tmp_path))
    assert data.default_source() == "embedded"
    (tmp_path / "lm").mkdir()
    assert data.default_source() == str(tmp_path / "lm")
    monkeypatch.delenv("FEEDFORWARD_DATA")
    assert data.default_source() == "embedded"


def test_bad_folders_say_what_to_do(fresh_cache, tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        load_text(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        load_text(tmp_path)
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        load_text(tmp_path)
    (tmp_path / "a.txt").write_text("Too short to be split.")
    with pytest.raises(DataError, match="leaves no text for"):
        load_text(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" + prose(0).encode())
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        load_text(tmp_path)


@pytest.mark.parametrize("vocabulary", [0, 256, 65_537])
def test_a_vocabulary_out_of_range_is_refused(vocabulary):
    with pytest.raises(ValueError, match="257 to 65536"):
        load_text("embedded", vocabulary=vocabulary)


def test_a_hub_source_is_streamed_up_to_its_budget(fresh_cache, monkeypatch):
    read = []

    def load_dataset(path, config, split, streaming):
        assert (path, config, split, streaming) == ("some/texts", "small", "train", True)
        for number in range(10_000):
            read.append(number)
            yield {"text": prose(number, paragraphs=3)}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    text = load_text("hub:some/texts:small", vocabulary=300, tokens=20_000)
    assert text.source == "hub:some/texts:small"
    assert 100 < len(read) < 1000
    assert len(text.train) > 20_000


@pytest.fixture
def stream(monkeypatch):
    """A hub with one data set; how often it was opened is counted."""
    opened = []

    def load_dataset(*_, **__):
        opened.append(True)
        return ({"text": prose(number, paragraphs=3)} for number in range(2_000))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return opened


def test_more_tokens_of_a_stream_extend_what_is_held_out_until_it_is_enough(
    fresh_cache, stream, monkeypatch
):
    for name, size in {"_HEAD": 60_000, "_CHUNK": 20_000, "_HELD_OUT": 3_000}.items():
        monkeypatch.setattr(data, name, size)
    texts = [load_text("hub:some/texts", vocabulary=300, tokens=n) for n in (60_000, 120_000)]
    for split in ("train", "validation", "test"):
        short, long = (getattr(text, split) for text in texts)
        assert np.array_equal(short, long[: len(short)])
    assert len(texts[0].validation) < len(texts[1].validation)
    assert texts[0].tokenizer.to_str() == texts[1].tokenizer.to_str()


def test_more_tokens_of_a_stream_extend_the_training_text_alone(fresh_cache, stream, monkeypatch):
    for name, size in {"_HEAD": 60_000, "_CHUNK": 20_000, "_HELD_OUT": 600}.items():
        monkeypatch.setattr(data, name, size)
    short, long = (
        load_text("hub:some/texts", vocabulary=300, tokens=n) for n in (100_000, 150_000)
    )
    assert short.sha256 != long.sha256
    assert short.tokenizer.to_str() == long.tokenizer.to_str()
    for split in ("validation", "test"):
        assert np.array_equal(getattr(short, split), getattr(long, split))
        assert 600 <= len(getattr(short, split)) < 10_000
    assert 100_000 <= len(short.train) < 140_000
    assert 150_000 <= len(long.train) < 190_000
    assert np.array_equal(short.train, long.train[: len(short.train)])
    assert short.train[0] == short.end_of_text
    assert short.details["train"]["tokens"] == len(short.train)
    assert (short.train == short.end_of_text).sum() == int(
        short.details["train"]["works"][0].split()[0].replace(",", "")
    )
    assert "documents" in short.describe()


def test_a_stream_is_read_once_by_those_who_wait_for_it(fresh_cache, stream):
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(
            lambda _: load_text("hub:some/texts", vocabulary=300, tokens=10_000), range(2)
        )
    assert len(stream) == 1
    assert np.array_equal(one.train, two.train)


def test_a_stream_that_breaks_off_leaves_nothing(fresh_cache, monkeypatch):
    def load_dataset(*_, **__):
        yield from ({"text": prose(number, paragraphs=3)} for number in range(50))
        raise ConnectionError("gone")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="gone"):
        load_text("hub:some/texts", vocabulary=300, tokens=10**6)
    assert not [f for f in fresh_cache.rglob("*") if f.suffix in (".npy", ".part", ".json")]


def test_a_hub_source_without_network_is_a_clear_error(fresh_cache, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"cannot be streamed.*no route.*embedded"):
        load_text("hub:some/texts")


# --- the cache ----------------------------------------------------------------------------------


def test_prepared_twice_is_the_same_to_the_byte(folder, tmp_path, monkeypatch):
    contents = []
    for name in ("one", "two"):
        monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / name))
        load_text(folder, vocabulary=400)
        files = sorted(f for f in (tmp_path / name).rglob("*") if f.is_file())
        contents.append({f.name: f.read_bytes() for f in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5


def test_a_second_load_reads_the_cache_and_a_changed_source_does_not(
    fresh_cache, folder, monkeypatch
):
    first = load_text(folder, vocabulary=300)
    monkeypatch.setattr(data, "train_tokenizer", None)
    assert load_text(folder, vocabulary=300).sha256 == first.sha256
    monkeypatch.undo()
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(fresh_cache))
    (folder / "0.txt").write_text(prose(7))
    assert load_text(folder, vocabulary=300).sha256 != first.sha256


@pytest.mark.parametrize("file", ["train.npy", "tokenizer.json", "prepared.json"])
def test_a_truncated_cache_is_noticed_and_made_again(fresh_cache, folder, file):
    first = load_text(folder, vocabulary=300)
    whole = np.array(first.train)
    damaged = next(fresh_cache.rglob(file))
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=f"{re.escape(file)}.*prepared again"):
        again = load_text(folder, vocabulary=300)
    assert np.array_equal(again.train, whole)


def test_a_full_disk_leaves_nothing_half_written(fresh_cache, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        load_text(folder, vocabulary=300)
    assert not [f for f in fresh_cache.rglob("*") if f.is_file()]
    monkeypatch.undo()
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(fresh_cache))
    assert len(load_text(folder, vocabulary=300).train) > 100


def test_two_at_once_both_get_the_text(fresh_cache, folder):
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: load_text(folder, vocabulary=300), range(2))
    assert np.array_equal(one.train, two.train)


# --- batches ------------------------------------------------------------------------------------


def test_a_batch_depends_on_the_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    one, two = (data.batches(tokens, 4, 16, seed=3) for _ in range(2))
    later = [two(step) for step in (30, 7, 29)][::-1]
    for step, (inputs, targets) in zip((29, 7, 30), later, strict=True):
        assert torch.equal(one(step)[0], inputs)
        assert torch.equal(one(step)[1], targets)
        assert torch.equal(targets, inputs + 1)
        assert inputs.dtype == torch.int64
    assert not torch.equal(one(0)[0], data.batches(tokens, 4, 16, seed=4)(0)[0])


def test_an_epoch_visits_every_window_once_and_the_next_is_shifted():
    tokens = np.arange(1040, dtype=np.uint16)
    step = data.batches(tokens, 8, 16, seed=0)
    assert step.windows == 64
    epochs = []
    for epoch in range(3):
        starts = torch.cat([step(epoch * 8 + i)[0][:, 0] for i in range(8)]).tolist()
        assert len(set(starts)) == 64
        assert len({start % 16 for start in starts}) == 1  # side by side: no token twice
        assert sorted(starts) != starts
        epochs.append(starts)
    assert len({starts[0] % 16 for starts in epochs}) > 1
    assert epochs[0] != epochs[1]


def test_every_offset_stays_inside_the_text():
    tokens = np.arange(33, dtype=np.uint16)
    step = data.batches(tokens, 1, 16, seed=0)
    assert max(int(step(i)[1].max()) for i in range(200)) == 32  # the last token is reached


@pytest.mark.parametrize(("count", "batch", "context"), [(20, 1, 16), (100, 0, 16), (100, 1, 0)])
def test_impossible_batches_are_refused(count, batch, context):
    with pytest.raises(ValueError, match="at least"):
        data.batches(np.zeros(count, np.uint16), batch, context, seed=0)


@pytest.mark.parametrize("count", [97, 100, 96])
def test_evaluation_predicts_each_token_once(count):
    tokens = np.arange(count, dtype=np.uint16)
    pairs = list(data.evaluation_batches(tokens, batch=4, context=8))
    targets = torch.cat([t.flatten() for _, t in pairs]).tolist()
    assert targets == list(range(1, count))
    assert all(torch.equal(t, i + 1) for i, t in pairs)


@pytest.mark.parametrize(("count", "limit", "targets"), [
    (97, 96, 96), (100, 99, 99), (100, 1000, 99), (6, 1000, 5),  # all there are
    (100, 98, 96), (100, 96, 96), (100, 95, 88), (6, 4, 0),  # whole windows
])  # fmt: skip
def test_evaluation_with_a_limit_that_the_text_hardly_has(count, limit, targets):
    tokens = np.arange(count, dtype=np.uint16)
    pairs = list(data.evaluation_batches(tokens, batch=4, context=8, limit=limit))
    assert sum(t.numel() for _, t in pairs) == targets


def test_evaluation_on_a_part_spreads_over_the_text():
    tokens = np.arange(10_000, dtype=np.uint16)
    pairs = list(data.evaluation_batches(tokens, batch=4, context=8, limit=80))
    inputs = torch.cat([i for i, _ in pairs])
    assert inputs.shape == (10, 8)
    assert inputs[0, 0] == 0
    assert inputs[-1, 0] > 9_900
