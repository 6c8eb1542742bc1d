"""What comes with the book, from text to questions: each piece checked, prepared and kept.

``feedforward data`` and the building of the book call it, so that no chapter waits for a piece in
the middle of its run, and so that damage is told where it can be mended.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from feedforward.augment.lexicon import default_lexicon
from feedforward.lm.data import DATASETS, Source, load_text
from feedforward.packages import PackageFiles, registry
from feedforward.profiles import unknown
from feedforward.qa.data import load_questions
from feedforward.qa.embedded.files import SOURCES
from feedforward.qa.schema import SPLITS

TEXT = "embedded-text"
QUESTIONS = "embedded-questions"


@dataclass(frozen=True)
class Piece:
    """One piece of the embedded data, checked and ready for use.

    Attributes:
        name: Key of its entry in ``data/registry.toml``, or ``embedded-text``.
        title: What it is called in prose.
        source: The package and version, or the names of the pieces that it is made of.
        content: What is there, counted.
        bytes: Size of the files.
        sha256: Checksum: of the only file, or of the lines "path checksum" of several; of the
            questions' file; of the sources and options of the encoded text.
        licence: Of the content, and of the package.
    """

    name: str
    title: str
    source: str
    content: str
    bytes: int
    sha256: str
    licence: str


def pieces() -> list[str]:
    """The names of all pieces: those in packages first, then what is made of them.

    Raises:
        DataError: When the registry is not there or cannot be parsed.
    """
    entries = registry()
    carried = [name for name, entry in entries.items() if "package" in entry]
    return [*carried, TEXT, *(name for name in entries if name not in carried)]


def prepare(name: str) -> Piece:
    """Check a piece against its checksums, and make what is made of it, unless it is in the cache.

    Args:
        name: One of `pieces`.

    Raises:
        ValueError: When there is no such piece.
        DataError: When a package or a file is missing or damaged, with the command that mends it.
    """
    if name not in (known := pieces()):
        raise ValueError(unknown("data", name, known))
    if name in _MADE:
        return _MADE[name](registry())
    entry = registry()[name]
    files = PackageFiles.of(name, entry)
    found = sum(1 for _ in files.read())
    content = f"{found} file{'s' * (found != 1)}"
    if name in DATASETS:
        content = f"{len(DATASETS[name](Source.of(name, entry)))} works"
    elif name == "wordnet":
        content = f"{len(default_lexicon()):,} words with synonyms"
    return Piece(
        name=name,
        title=files.title,
        source=f"{files.package} {files.version}",
        content=content,
        bytes=files.bytes,
        sha256=files.sha256,
        licence=entry["licence"],
    )


def _text(entries: dict[str, dict[str, Any]]) -> Piece:
    text = load_text("embedded")
    return Piece(
        name=TEXT,
        title="The embedded text, encoded",
        source=", ".join(DATASETS),
        content=f"{sum(it['tokens'] for it in text.details.values()):,} tokens",
        bytes=sum(it["bytes"] for it in text.details.values()),
        sha256=text.sha256,
        licence="; ".join(dict.fromkeys(entries[name]["licence"] for name in DATASETS)),
    )


def _questions(entries: dict[str, dict[str, Any]]) -> Piece:
    entry, questions = entries[QUESTIONS], load_questions("embedded")
    return Piece(
        name=QUESTIONS,
        title=entry["title"],
        source=", ".join(SOURCES),
        content=f"{sum(len(questions.pooled(split)) for split in SPLITS):,} questions",
        bytes=entry["bytes"],
        sha256=entry["sha256"],
        licence=entry["licence"],
    )


_MADE: dict[str, Callable[[dict[str, dict[str, Any]]], Piece]] = {
    TEXT: _text,
    QUESTIONS: _questions,
}
