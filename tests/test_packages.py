"""Files of installed packages: none is believed that differs from what the registry promises."""

import dataclasses
import hashlib
import importlib.metadata
import types

import pytest

from feedforward import packages
from feedforward.augment.lexicon import WORDNET
from feedforward.files import DataError
from feedforward.packages import PackageFiles
from feedforward.qa.model import MINILM


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """A package of two files, compared one by one and as a pattern."""
    folder = tmp_path / "numbers"
    folder.mkdir()
    (folder / "b.json").write_bytes(b"22")
    (folder / "a.json").write_bytes(b"1")
    here = types.SimpleNamespace(locate_file=lambda path: tmp_path / path, version="1.1")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: here)
    both = sha256(f"a.json {sha256(b'1')}\nb.json {sha256(b'22')}\n".encode())
    files = {"numbers/b.json": (2, sha256(b"22")), "numbers/*.json": (3, both)}
    return PackageFiles("n", "Numbers", "numbers", "1.0", files), folder


def test_sound_files_are_read_in_order(numbers):
    source, folder = numbers
    assert [tuple(file) for file in source.read()] == [
        ("numbers/b.json", folder / "b.json", b"22"),
        ("numbers/a.json", folder / "a.json", b"1"),
        ("numbers/b.json", folder / "b.json", b"22"),
    ]
    assert [file.path for file in source.read("b")] == ["numbers/b.json"]
    assert source.bytes == 5
    lines = "".join(f"{path} {digest}\n" for path, (_, digest) in source.files.items())
    assert source.sha256 == sha256(lines.encode())
    one = dataclasses.replace(source, files={"numbers/b.json": (2, sha256(b"22"))})
    assert one.sha256 == sha256(b"22")
    # a name outside ASCII is no part of a pattern
    (folder / "ç.json").write_bytes(b"3")
    assert len(list(source.read())) == 3


@pytest.mark.parametrize(
    ("content", "state"), [(b"", "is empty"), (b"2", "is truncated"), (b"23", "differs")]
)
def test_a_damaged_file_is_named_with_both_checksums(numbers, content, state):
    source, folder = numbers
    (folder / "b.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(source.read("b"))
    for part in (
        f"{folder / 'b.json'} {state}: expected 2 bytes with sha256 {sha256(b'22')}",
        f"found {len(content)} bytes with sha256 {sha256(content)}",
        "(version 1.1 of numbers is installed)",
        "pip install --force-reinstall --no-deps numbers==1.0",
    ):
        assert part in str(caught.value)


def test_a_damaged_file_of_a_pattern_is_an_error(numbers):
    source, folder = numbers
    pattern = dataclasses.replace(source, files=dict([*source.files.items()][1:]))
    (folder / "a.json").write_bytes(b"4")
    with pytest.raises(DataError, match=r"\*\.json differs: expected 3 bytes"):
        list(pattern.read())
    (folder / "a.json").unlink()
    with pytest.raises(DataError, match=r"\*\.json is truncated"):
        list(pattern.read())
    (folder / "b.json").unlink()
    with pytest.raises(DataError, match=r"\*\.json is empty"):
        list(pattern.read())


def test_what_is_missing_says_what_to_install(numbers, monkeypatch):
    source, folder = numbers
    (folder / "b.json").unlink()
    with pytest.raises(DataError, match=r"b\.json cannot be read.*--no-deps numbers==1\.0"):
        list(source.read())
    monkeypatch.undo()
    absent = dataclasses.replace(source, package="a-package-nobody-has")
    with pytest.raises(DataError, match=r"Numbers is read.*--no-deps a-package-nobody-has==1\.0"):
        list(absent.read())


def test_a_broken_registry_is_a_clear_error(tmp_path):
    path = tmp_path / "registry.toml"
    with pytest.raises(DataError, match="needs the project's checkout"):
        packages.registry(path)
    path.write_text("[kjv\n")
    with pytest.raises(DataError, match="not valid TOML"):
        packages.registry(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not valid TOML"):
        packages.registry(path)
    path.write_text("[kjv]\ntitle = 'A text'\n")
    with pytest.raises(DataError, match="'kjv' has no part"):
        packages.registry(path)
    path.write_text("[kjv]\npart = 'lm'\n")
    with pytest.raises(DataError, match=r"'kjv' of .* is incomplete.*files"):
        PackageFiles.of("kjv", packages.registry(path)["kjv"])


@pytest.mark.parametrize("known", [WORDNET, MINILM], ids=lambda it: it.name)
def test_what_is_known_without_a_checkout_is_what_the_registry_says(known):
    listed = PackageFiles.of(known.name, packages.registry()[known.name])
    assert (known.package, known.version) == (listed.package, listed.version)
    read = {path: it for path, it in listed.files.items() if "LICENSE" not in path}
    assert known.files == read


def test_every_entry_is_read_or_made():
    entries = packages.registry()
    made = {name for name, entry in entries.items() if "package" not in entry}
    assert made == {"embedded-questions"}
    for name in entries.keys() - made:
        files = PackageFiles.of(name, entries[name]).files.values()
        assert all(size > 0 and len(digest) == 64 for size, digest in files)
