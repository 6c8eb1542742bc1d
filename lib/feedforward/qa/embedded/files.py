"""The files of other packages that the embedded questions are made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feedforward import packages
from feedforward.files import DataError
from feedforward.packages import PackageFiles

SOURCES = ("wikipedia", "countries", "wordnet", "kjv", "shakespeare")
"""The entries of ``data/registry.toml`` that are read."""


def registry(path: Path | str = packages.REGISTRY) -> Mapping[str, Mapping[str, Any]]:
    """All entries of ``data/registry.toml``, by name.

    Raises:
        DataError: When the registry is missing, no TOML, or lacks one of `SOURCES`.
    """
    entries = packages.registry(path)
    if missing := [name for name in (*SOURCES, "embedded-questions") if name not in entries]:
        raise DataError(f"{path} lacks {missing}; restore it with git.")
    return entries


def read(name: str, entry: Mapping[str, Any], only: str = "") -> dict[str, bytes]:
    """The files of one entry by their names, after their SHA-256 was compared.

    Args:
        name: Of the entry.
        entry: Of the registry.
        only: The beginning of the names of the files that are wanted; empty for all.

    Raises:
        DataError: When the package or a file is missing or changed.
    """
    files = PackageFiles.of(name, entry).read(only)
    return {file.place.name: file.content for file in files}
