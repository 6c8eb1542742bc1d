"""Questions on passages: loaded, checked, sorted by domain.

A data set is four splits, in domain and out of domain, for training and for validation; each
holds its questions by domain. The embedded default comes with the packages that are installed
anyway; a folder in the layout of RobustQA or a data set of the Hugging Face hub takes its place
by naming it as the source.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from feedforward.files import DataError
from feedforward.qa.schema import SPLITS, Answer, Question, problems_of


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one question.

    Attributes:
        source: The file or data set.
        id: Of the question, or its place where it has no id.
        what: What was found, what is allowed, how to mend it.
    """

    source: str
    id: str
    what: str

    def __str__(self) -> str:
        return f"{self.source}, question {self.id!r}: {self.what}"


# --- SQuAD files --------------------------------------------------------------------------------


def load_squad(
    path: str | os.PathLike, *, domain: str | None = None, report: list[Problem] | None = None
) -> list[Question]:
    """The questions of a file in the JSON layout of SQuAD 1.1, each checked.

    Args:
        path: The file; UTF-8, with any name.
        domain: Of its questions; None takes the file's name without ``.json``.
        report: None refuses a file with a wrong question. A list collects what is wrong instead,
            and the wrong questions are left out.

    Returns:
        The questions in the order of the file.

    Raises:
        DataError: When the file is missing, truncated or in another layout; and without `report`
            when a span does not match its context, an id comes twice or a text is empty, with the
            file and the id.
    """
    path = Path(path)
    domain = path.name.removesuffix(".json") if domain is None else domain
    return _checked(_squad_rows(path), str(path), domain, report, seen={})


def _squad_rows(path: Path) -> Iterator[tuple]:
    """Yield (place, id, question, context, answers) of each question of a file, unchecked."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a SQuAD file") from error
    if raw.startswith(b"\x1f\x8b"):
        raise DataError(f"{path} is compressed; unpack it first, for example with: gunzip")
    try:
        content = json.loads(raw)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. "
            "Convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is truncated or no JSON: {error}. Get it again.") from error
    place = "the file"
    try:
        for a, article in enumerate(content["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{a}].paragraphs[{p}]"
                context, entries = paragraph["context"], paragraph["qas"]
                for q, entry in enumerate(entries):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    yield place, entry["id"], entry["question"], context, _pairs(entry)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
        raise DataError(
            f"{path} is not in the layout of SQuAD 1.1: {place} {what}. Needed: "
            "data[].paragraphs[] of context and qas[] of id, question and answers[] of text and "
            "answer_start."
        ) from error


def _pairs(entry: Mapping) -> list[tuple] | str:
    """Text and start of each answer of a question, or what is wrong with the answers."""
    given = entry.get("answers") or ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, dict) for one in given):
        return f"the answers are {given!r}, not a list of text and answer_start"
    for name in ("text", "answer_start"):
        if not all(name in one for one in given):
            return f"an answer lacks {name!r}"
    return [(one["text"], one["answer_start"]) for one in given]


def _checked(
    rows: Iterable[tuple],
    source: str,
    domain: str | None,
    report: list[Problem] | None,
    seen: dict[str, str],
) -> list[Question]:
    """Questions of rows; `seen` holds the ids so far and where they were, over several files."""
    found = []
    for place, key, question, context, pairs, *own_domain in rows:
        wrong = _wrong_types(key, question, context, pairs)
        if not wrong:
            answers = tuple(Answer(text, start) for text, start in pairs)
            candidate = Question(key, question, context, answers, *own_domain or [domain])
            wrong = problems_of(candidate)
            if key in seen:
                wrong.append(f"the id comes twice (before in {seen[key]}); give each its own")
            seen.setdefault(key, source)
        if not wrong:
            found.append(candidate)
            continue
        name = key if isinstance(key, str) and key else place
        problems = [Problem(source, name, what) for what in wrong]
        if report is None:
            raise DataError(
                f"{problems[0]}. Mend the data, or give report=[] to leave such questions out"
            )
        report.extend(problems)
    return found


def _wrong_types(key: Any, question: Any, context: Any, pairs: Any) -> list[str]:
    wrong = [
        f"the {name} is {value!r}, not a text"
        for name, value in (("id", key), ("question", question), ("context", context))
        if not isinstance(value, str)
    ]
    if key == "":
        wrong.append("the id is empty")
    if isinstance(pairs, str):
        return [*wrong, pairs]
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            wrong.append(f"an answer is {text!r} at {start!r}, not a text at a whole number")
    return wrong


# --- data sets ----------------------------------------------------------------------------------

Split = Mapping[str, tuple[Question, ...]]


@dataclass(frozen=True)
class Questions:
    """A data set in four splits; each maps a domain to its questions.

    Attributes:
        source: What it was made from: ``embedded``, a folder, or ``hub:...``.
        indomain_train: Much data, of the domains that the reader is trained on.
        indomain_val: Of the same domains, held out.
        oodomain_train: A few questions of other domains.
        oodomain_val: Of the same other domains, held out: the scores of the paper.
    """

    source: str
    indomain_train: Split
    indomain_val: Split
    oodomain_train: Split
    oodomain_val: Split

    def __getitem__(self, split: str) -> Split:
        if split not in SPLITS:
            raise KeyError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
        return getattr(self, split)

    def pooled(self, split: str) -> tuple[Question, ...]:
        """All questions of a split, domain after domain."""
        return tuple(question for domain in self[split].values() for question in domain)

    @cached_property
    def sha256(self) -> str:
        """The checksum of all questions in their order: two equal values are the same data."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for domain, questions in self[split].items():
                for q in questions:
                    answers = [(answer.text, answer.start) for answer in q.answers]
                    row = [split, domain, q.id, q.question, q.context, answers]
                    digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """What was read: questions, contexts and mean words of each domain, for a notebook."""
        lines = [f"source  {self.source}  (sha256 {self.sha256[:12]})"]
        for split in SPLITS:
            for domain, questions in self[split].items():
                contexts = {question.context for question in questions}
                words = sum(len(context.split()) for context in contexts) / max(1, len(contexts))
                lines.append(
                    f"{split:14}  {domain:20}  {len(questions):>6,} questions  "
                    f"{len(contexts):>6,} contexts of {words:>4.0f} words"
                )
        return "\n".join(lines)


def default_source() -> str:
    """The reader's own data where ``FEEDFORWARD_DATA`` names a folder with it, else the embedded.

    Looked for in ``$FEEDFORWARD_DATA/qa``.
    """
    if given := os.environ.get("FEEDFORWARD_DATA"):
        folder = Path(given).expanduser() / "qa"
        if folder.is_dir():
            return str(folder)
    return "embedded"


def load_questions(
    source: str | os.PathLike | None = None, *, report: list[Problem] | None = None
) -> Questions:
    """A data set of questions in four splits, each question checked.

    Args:
        source: ``"embedded"``, a folder with one or more of the folders ``indomain_train``,
            ``indomain_val``, ``oodomain_train`` and ``oodomain_val`` (one SQuAD file a domain,
            named after it, with or without ``.json``: the layout of RobustQA), ``"hub:mrqa"`` or
            ``"hub:squad"``. None asks `default_source`.
        report: None refuses data with a wrong question. A list collects what is wrong instead,
            and the wrong questions are left out.

    Raises:
        DataError: When the data are missing, damaged or cannot be reached, or without `report`
            a question is wrong (see `load_squad`); ids are unique over all splits.
    """
    source = default_source() if source is None else str(source)
    if source == "embedded":
        from feedforward.qa.embedded import embedded_questions

        made = embedded_questions()
        splits = {
            split: {domain: tuple(questions) for domain, questions in made[split].items()}
            for split in SPLITS
        }
    elif source in _HUB:
        splits = _HUB[source](report)
    elif source.startswith("hub:"):
        raise DataError(f"unknown source {source!r}; of the hub there are {', '.join(_HUB)}")
    else:
        splits = _folder(Path(source).expanduser(), report)
    return Questions(source, **splits)


def _folder(root: Path, report: list[Problem] | None) -> dict[str, dict]:
    if not any((root / split).is_dir() for split in SPLITS):
        state = "holds none of them" if root.is_dir() else "is not a folder"
        raise DataError(
            f"{root} {state}: needed are folders named {', '.join(SPLITS)} with one SQuAD file a "
            f"domain. Else give 'embedded', {' or '.join(map(repr, _HUB))} as the source."
        )
    splits: dict[str, dict] = {split: {} for split in SPLITS}
    seen: dict[str, str] = {}
    for split in SPLITS:
        # other endings are caches that reference codes leave beside their data
        files = sorted(
            file
            for file in (root / split).glob("*")
            if file.suffix in ("", ".json") and not file.name.startswith(".") and file.is_file()
        )
        for file in files:
            domain = file.name.removesuffix(".json")
            if domain in splits[split]:
                raise DataError(f"{file.parent} holds {domain!r} twice; keep one of the files")
            checked = _checked(_squad_rows(file), str(file), domain, report, seen)
            splits[split][domain] = tuple(checked)
    if not any(splits.values()):
        raise DataError(f"the folders of {root} hold no file named after a domain or *.json")
    return splits


# --- the hub ------------------------------------------------------------------------------------

# the sets of RobustQA by their names in MRQA
_MRQA_INSIDE = {"SQuAD": "squad", "NewsQA": "newsqa", "NaturalQuestionsShort": "nat_questions"}
_MRQA_OUTSIDE = {
    "DuoRC.ParaphraseRC": "duorc",
    "RACE": "race",
    "RelationExtraction": "relation_extraction",
}
# RobustQA has so many training questions a domain, inside; and outside for training, validation
_INSIDE, _OUTSIDE_TRAIN = 50_000, 127
_OUTSIDE_VAL = {"duorc": 126, "race": 128, "relation_extraction": 128}


def _load_hub(path: str) -> Mapping[str, Iterable[Mapping]]:
    try:
        import datasets
    except ImportError:
        raise DataError("a hub source needs the package 'datasets': pip install datasets") from None
    try:
        return datasets.load_dataset(path)
    except Exception as error:  # the client raises a dozen kinds, from DNS to HTTP
        raise DataError(
            f"the hub data set {path!r} cannot be loaded ({type(error).__name__}: {error}). "
            "It needs a network; use source='embedded' or a folder of SQuAD files without one."
        ) from error


def _hub_mrqa(report: list[Problem] | None) -> dict[str, dict]:
    """The sets of RobustQA out of MRQA 2019, as many questions of each as there.

    Which questions RobustQA drew is not public: here they are the first by the hash of their ids,
    and outside by that of their passages, none of which is on both sides.
    """
    data = _load_hub("mrqa-workshop/mrqa")
    seen: dict[str, str] = {}

    def read(split: str, subsets: Mapping[str, str]) -> dict[str, list[Question]]:
        rows = _mrqa_rows(data[split], subsets)
        by_domain: dict[str, list[Question]] = {domain: [] for domain in subsets.values()}
        for question in _checked(rows, f"hub:mrqa {split}", None, report, seen):
            by_domain[question.domain].append(question)
        return {domain: sorted(it, key=_by_hash) for domain, it in by_domain.items()}

    outside = read("test", _MRQA_OUTSIDE)
    parted = {domain: _parted(it, _OUTSIDE_VAL[domain]) for domain, it in outside.items()}
    inside = {split: read(split, _MRQA_INSIDE) for split in ("train", "validation")}
    return {
        "indomain_train": {d: tuple(it[:_INSIDE]) for d, it in inside["train"].items()},
        "indomain_val": {d: tuple(it) for d, it in inside["validation"].items()},
        "oodomain_train": {domain: train for domain, (train, _) in parted.items()},
        "oodomain_val": {domain: val for domain, (_, val) in parted.items()},
    }


def _parted(
    questions: Iterable[Question], validation: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Questions of a set to train on, and others on other passages to validate with."""
    by_passage: dict[str, list[Question]] = {}
    for question in questions:
        by_passage.setdefault(question.context, []).append(question)
    train: list[Question] = []
    val: list[Question] = []
    for passage in sorted(by_passage, key=lambda text: hashlib.sha256(text.encode()).digest()):
        (train if len(train) < _OUTSIDE_TRAIN else val).extend(by_passage[passage])
    return tuple(train[:_OUTSIDE_TRAIN]), tuple(val[:validation])


def _by_hash(question: Question) -> bytes:
    return hashlib.sha256(question.id.encode()).digest()


def _mrqa_rows(rows: Iterable[Mapping], subsets: Mapping[str, str]) -> Iterator[tuple]:
    for number, row in enumerate(rows):
        if row["subset"] in subsets:
            context, pairs = row["context"], []
            for spans in row["detected_answers"]["char_spans"]:
                for start, last in zip(spans["start"], spans["end"], strict=True):
                    pairs.append((context[start : last + 1], start))  # the end is inclusive there
            domain = subsets[row["subset"]]
            yield f"row {number}", row["qid"], row["question"], context, pairs, domain


def _hub_squad(report: list[Problem] | None) -> dict[str, dict]:
    data = _load_hub("rajpurkar/squad")
    splits: dict[str, dict] = {split: {} for split in SPLITS}
    seen: dict[str, str] = {}
    for split, theirs in (("indomain_train", "train"), ("indomain_val", "validation")):
        rows = _squad_hub_rows(data[theirs])
        splits[split]["squad"] = tuple(_checked(rows, f"hub:squad {theirs}", "squad", report, seen))
    return splits


def _squad_hub_rows(rows: Iterable[Mapping]) -> Iterator[tuple]:
    for number, row in enumerate(rows):
        answers = row["answers"]
        pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        yield f"row {number}", row["id"], row["question"], row["context"], pairs


_HUB = {"hub:mrqa": _hub_mrqa, "hub:squad": _hub_squad}
