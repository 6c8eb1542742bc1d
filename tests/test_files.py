import errno
import os
import subprocess
import sys

import pytest

from feedforward import files
from feedforward.files import (
    atomic_write,
    cache_directory,
    checkout,
    results_directory,
    sha256,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("FEEDFORWARD_CACHE", "FEEDFORWARD_RESULTS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    files._cache_root.cache_clear()
    yield
    files._cache_root.cache_clear()


def test_a_block_that_raises_leaves_the_old_file_alone(tmp_path):
    target = tmp_path / "sub folder" / "a.txt"
    with atomic_write(target, "w") as file:
        file.write("old")
    with pytest.raises(UnicodeEncodeError), atomic_write(target, "w", encoding="ascii") as file:
        file.writelines(["half of the n", "ëw"])
    assert target.read_text() == "old"
    assert os.listdir(target.parent) == ["a.txt"]


def test_no_space_left_leaves_the_old_file_alone(tmp_path, monkeypatch):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_readers_see_nothing_before_the_end(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_write(target, "w", encoding="utf-8") as file:
        file.write("ä")
        file.flush()
        assert not target.exists()
    assert target.read_text("utf-8") == "ä"


def test_a_new_file_has_the_usual_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as file:
            file.write(b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a") == expected


def test_places_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "my cache"))
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "my results"))
    assert cache_directory("runs", "demo") == tmp_path / "my cache" / "runs" / "demo"
    assert results_directory() == tmp_path / "my results"


def test_results_lie_in_the_checkout_or_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "checkout", lambda: tmp_path / "project")
    assert results_directory() == tmp_path / "project" / "results"
    monkeypatch.setattr(files, "checkout", lambda: None)
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path))
    assert results_directory() == tmp_path / "results"


def test_the_checkout_is_known_by_its_book(tmp_path, monkeypatch):
    module = tmp_path / "lib" / "feedforward" / "files.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(module))
    assert checkout() is None
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "book").mkdir()
    assert checkout() == tmp_path.resolve()


def test_a_given_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"FEEDFORWARD_CACHE is .* cannot be written"):
        cache_directory()


def test_a_home_that_cannot_be_written_is_replaced_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / "home").touch()  # nothing can be created below a file, not even by root
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.warns(UserWarning, match="cannot be written.*Set FEEDFORWARD_CACHE"):
        folder = cache_directory("runs")
    assert folder.parent.is_dir()
    assert tmp_path not in folder.parents
    assert cache_directory("runs") == folder  # for the whole process, and warned of once
    folder.parent.rmdir()


def test_importing_the_library_loads_nothing_heavy():
    code = (
        "import sys, feedforward, feedforward.files, feedforward.cli; "
        "print({'torch', 'numpy', 'pooch', 'transformers', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
