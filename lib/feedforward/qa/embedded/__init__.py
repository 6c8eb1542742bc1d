"""The embedded questions: six sets made from text and facts that the installed packages bring.

Nothing is downloaded and no model parses anything. The files of five packages are compared with
the checksums of ``data/registry.toml`` and read; patterns and templates turn them into questions.

======== ====== ============================== =============================================
set      domain passage                        question
======== ====== ============================== =============================================
wiki     in     paragraphs of Wikipedia        full questions, as in SQuAD
report   in     windows of 250 words of it     short, leaving much unsaid, as in NewsQA
search   in     pages of facts on two          lower-case queries, as in Natural Questions
                countries each
relation out    dictionary entries of people   one relation each, as in RelationExtraction
                and places
plots    out    chapters of the Bible          retold in other words, as in DuoRC
exam     out    pages of Shakespeare's plays   gaps and "according to the passage", as in RACE
======== ====== ============================== =============================================

They are *like* the sets of RobustQA in these respects and in their sizes, and no more. Every
passage of wiki, report, relation, plots and exam is the text of its source with white space
normalised; those of search are composed. Every answer is a stretch of its passage. Training and
validation share no article, pair of countries, dictionary entry, book or play, wiki and report
together.

Whatever is drawn is drawn by the SHA-256 of its text, so that the data are the same on every
machine; their own checksum stands in the registry. They are built once and kept in the cache.

Book: ``book/data``; chapter ``book/robust-qa/01-task-and-gap``.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock

from feedforward.augment.sentences import split_sentences
from feedforward.files import DataError, atomic_write, cache_directory
from feedforward.qa.embedded import bible, countries, files, glosses, plays, reports, wikipedia
from feedforward.qa.embedded.asking import Asker
from feedforward.qa.embedded.draft import Draft, ordered, take
from feedforward.qa.schema import SPLITS, Answer, Question

INDOMAIN = ("wiki", "report", "search")
OUTDOMAIN = ("relation", "plots", "exam")
# sets made from the same sources, of which none may be in the training of one and the validation
# of the other
_SAME_SOURCES = (("wiki", "report"),)
# set -> questions for training and validation, the largest share of one kind, questions a passage
_SIZES = {
    "wiki": (2000, 300, 0.5, 5),
    "report": (1500, 300, 0.6, 6),
    "search": (2000, 300, 1.0, 9),
    "relation": (127, 128, 0.12, 1),
    "plots": (127, 128, 0.13, 3),
    "exam": (127, 128, 0.16, 2),
}

Split = Mapping[str, tuple[Question, ...]]


def embedded_questions() -> Mapping[str, Split]:
    """The questions of each split by domain; built at the first call, then read from the cache.

    Returns:
        Splits ``indomain_train``, ``indomain_val``, ``oodomain_train`` and ``oodomain_val``, each
        a mapping from the name of a set to its questions.

    Raises:
        DataError: When a package or a file that the questions are made of is missing or changed.
    """
    entries = files.registry()
    return _load(str(cache_directory("data", "qa")), entries["embedded-questions"]["sha256"])


@lru_cache(maxsize=4)
def _load(cache: str, expected: str) -> Mapping[str, Split]:
    folder = Path(cache) / expected[:16]
    path = folder / "questions.json"
    content = _stored(path, expected)
    if content is None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "building.lock"):  # of several processes one builds
            content = _stored(path, expected)
            if content is None:
                print("building the embedded questions (once, under a minute)", file=sys.stderr)
                content = build()
                found = hashlib.sha256(content).hexdigest()
                if found != expected:
                    raise DataError(
                        f"the embedded questions were built with sha256 {found}, and "
                        f"data/registry.toml promises {expected}: the code and the registry do "
                        "not belong together; take both from the same commit"
                    )
                with atomic_write(path) as file:
                    file.write(content)
    splits = json.loads(content)
    return MappingProxyType(
        {
            split: MappingProxyType(
                {
                    domain: tuple(_question(row, domain, made["contexts"]) for row in made["rows"])
                    for domain, made in splits[split].items()
                }
            )
            for split in SPLITS
        }
    )


def _stored(path: Path, expected: str) -> bytes | None:
    """The content of a built file, or None where it is not there or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest() == expected else None


def _question(row: list, domain: str, contexts: list[str]) -> Question:
    key, question, context, text, start = row
    return Question(key, question, contexts[context], (Answer(text, start),), domain)


def build() -> bytes:
    """Make all sets from their sources: the content of the stored file, the same everywhere."""
    splits: dict[str, dict] = {split: {} for split in SPLITS}
    made = _drafts()
    groups = {domain: group for group in _SAME_SOURCES for domain in group}
    for domain, drafts in made.items():
        train, validation, a_kind, a_context = _SIZES[domain]
        group = groups.get(domain, (domain,))
        together = [draft for each in group for draft in made[each]]
        share = max(v / (t + v) for t, v, *_ in map(_SIZES.get, group))
        held_out = _held_out(together, share)
        if len(group) > 1:
            told = _sentences(it.context for it in together if it.source not in held_out)
            drafts = [it for it in drafts if it.source not in held_out or not _told(it, told)]
        place = "indomain" if domain in INDOMAIN else "oodomain"
        for part, count in (("train", train), ("val", validation)):
            own = [it for it in drafts if (it.source in held_out) == (part == "val")]
            taken = take(own, count, a_kind=a_kind, a_context=a_context)
            splits[f"{place}_{part}"][domain] = _rows(taken, domain)
    return json.dumps(splits, ensure_ascii=True, separators=(",", ":")).encode()


def _drafts() -> dict[str, list[Draft]]:
    entries = files.registry()
    only = {"wordnet": "data.noun"}
    content = {name: files.read(name, entries[name], only.get(name, "")) for name in files.SOURCES}
    text = {
        name: {file: data.decode("utf-8-sig") for file, data in content[name].items()}
        for name in ("countries", "wordnet", "kjv", "shakespeare")
    }
    found = wikipedia.articles(*content["wikipedia"].values())
    asker = Asker(s for article in found for paragraph in article.paragraphs for s in paragraph)
    return {
        "wiki": list(reports.wiki(found, asker)),
        "report": list(reports.report(found, asker)),
        "search": list(countries.drafts(text["countries"])),
        "relation": list(glosses.drafts("\n".join(text["wordnet"].values()))),
        "plots": list(bible.drafts(*text["kjv"].values())),
        "exam": list(plays.drafts(text["shakespeare"])),
    }


def _held_out(drafts: Iterable[Draft], share: float) -> frozenset[str]:
    """Whole sources for validation: in random order until they have their share of the drafts.

    A source with more than a tenth of all is for training.
    """
    sizes = Counter(draft.source for draft in drafts)
    wanted, chosen = share * sizes.total(), []
    for source in ordered(sizes, "held out"):
        if sizes[source] <= 0.1 * sizes.total() and wanted > 0:
            chosen.append(source)
            wanted -= sizes[source]
    return frozenset(chosen)


def _sentences(contexts: Iterable[str]) -> frozenset[str]:
    """The sentences of some passages, but for those of a few words."""
    return frozenset(
        context[start:end]
        for context in set(contexts)
        for start, end in split_sentences(context)
        if end - start > 40
    )


def _told(draft: Draft, sentences: frozenset[str]) -> bool:
    """Whether the sentence of the answer is among these: some articles repeat others."""
    spans = split_sentences(draft.context)
    start, end = next(span for span in reversed(spans) if span[0] <= draft.start)
    return draft.context[start:end] in sentences


def _rows(drafts: Iterable[Draft], domain: str) -> dict[str, list]:
    """What is stored of a set: its passages, and of each question id, text and answer."""
    places: dict[str, int] = {}
    rows = [
        [
            f"{domain}-{draft.digest[:12]}",
            draft.question,
            places.setdefault(draft.context, len(places)),
            draft.answer,
            draft.start,
        ]
        for draft in drafts
    ]
    return {"contexts": list(places), "rows": rows}
