"""Files that are whole or not there: atomic writes, checksums, the places of things."""

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO


class DataError(ValueError):
    """Data that is missing, damaged, empty or unusable: says which, and how to mend it."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **open_options) -> Iterator[IO]:
    """Open a temporary file beside `path` that replaces `path` when the block ends without error.

    A reader sees the old content or the new one, never a part; when the block raises (a full disk,
    an interrupt) the old file stays as it was and the temporary one is removed.

    >>> target = getfixture("tmp_path") / "notes.txt"
    >>> with atomic_write(target, "w") as file:
    ...     _ = file.write("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, mode, **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; what is published gets the usual permissions
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 checksum of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkout() -> Path | None:
    """The checkout this library is imported from, or None where it is installed by itself."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "book").is_dir() else None


def cache_directory(*parts: str) -> Path:
    """A writable folder for what can be made again: ``FEEDFORWARD_CACHE``, else the user's cache.

    Where neither can be written (a read-only home), a temporary folder serves this process and
    a warning says so.
    """
    return _cache_root(os.environ.get("FEEDFORWARD_CACHE")).joinpath(*parts)


def results_directory() -> Path:
    """The folder of recorded runs: ``FEEDFORWARD_RESULTS``, else ``results/`` of the checkout."""
    if given := os.environ.get("FEEDFORWARD_RESULTS"):
        return Path(given)
    return (checkout() or cache_directory()) / "results"


@cache
def _cache_root(given: str | None) -> Path:
    import pooch

    root = Path(given) if given else Path(pooch.os_cache("feedforward"))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError as error:
        if given:
            raise OSError(
                f"FEEDFORWARD_CACHE is {given!r}, which cannot be written: {error}"
            ) from error
        fallback = Path(tempfile.mkdtemp(prefix="feedforward-"))
        warnings.warn(
            f"the cache folder {root} cannot be written ({error}); using {fallback} for this run. "
            "Set FEEDFORWARD_CACHE to a writable folder to keep what is computed.",
            stacklevel=3,
        )
        return fallback


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
