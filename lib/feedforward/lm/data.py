"""Text for language models: found, checked, cleaned, split by work, encoded, cut into batches.

The embedded default is about nine million characters of English that two ordinary packages carry
(``data/registry.toml`` says which files and with which checksums). A folder of text files or a
streamed data set of the Hugging Face hub takes its place by naming it as the source.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from feedforward import packages
from feedforward.files import DataError, atomic_write, cache_directory, sha256
from feedforward.packages import PackageFiles

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
# what a stored preparation depends on beside its source; raise it when cleaning changes
_PREPARATION = 1


# --- what there is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source(PackageFiles):
    """One text of ``data/registry.toml``, in files that a package carries.

    Attributes:
        licence: Of the text, and of the package.
        about: One line on the content.
        validation: Names of the works held out for validation.
        test: Names of the works held out for the final test.
    """

    licence: str
    about: str
    validation: tuple[str, ...]
    test: tuple[str, ...]


def registry(path: str | os.PathLike = packages.REGISTRY) -> dict[str, Source]:
    """The texts that ``data/registry.toml`` lists, by name.

    Raises:
        DataError: When the registry is not there or cannot be parsed.
    """
    return {
        name: Source.of(name, entry)
        for name, entry in packages.registry(path).items()
        if entry["part"] == "lm"
    }


@dataclass(frozen=True)
class Work:
    """One book or play: a name and its paragraphs, each with the line feeds that end it."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole work as one string."""
        return "".join(self.paragraphs)


def read_checked(source: Source) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of each file of `source`, after its SHA-256 was compared.

    Raises:
        DataError: When the package or a file is missing, or a file is empty, truncated, changed
            or not UTF-8.
    """
    for path, place, content in source.read():
        yield path, _decode(content, place)


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}. "
            "Convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error


# --- cleaned works ------------------------------------------------------------------------------

# Everything above the first act, prologue or induction is title page and cast list.
_FIRST_SCENE = re.compile(
    r"^[ \t]*(?:ACT (?:I|1|FIRST)\b|(?:THE )?PROLOGUE\b|INDUCTION\b)", re.IGNORECASE | re.MULTILINE
)
_BYLINE = re.compile(r"^by William Shakespeare$", re.MULTILINE)


def _paragraphs(text: str, *, longest: int = 10_000) -> tuple[str, ...]:
    """Split at empty lines; inside a line runs of white space become one space.

    A block of more than `longest` characters is a list with an entry a line: each is a paragraph.
    """
    lines = (" ".join(line.split()) for line in text.splitlines())
    paragraphs = []
    for block in re.split(r"\n{2,}", "\n".join(lines).strip("\n")):
        parts = block.splitlines(keepends=True) if len(block) > longest else [block]
        if block:
            paragraphs += [*parts[:-1], f"{parts[-1]}\n\n"]
    return tuple(paragraphs)


def _read_kjv(source: Source) -> list[Work]:
    books: dict[str, list[str]] = {}
    chapter = None
    for path, text in read_checked(source):
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                verse = json.loads(line)
                place = verse["book"], verse["chapter"]
                content = " ".join(verse["text"].split())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}, line {number} is not a verse: {error!r}") from error
            paragraphs = books.setdefault(place[0], [f"{place[0]}\n"])
            if place != chapter:  # an empty line between chapters, and below the title
                paragraphs[-1] += "\n"
                chapter = place
            paragraphs.append(f"{content}\n")
    return [Work(name, tuple(paragraphs)) for name, paragraphs in books.items()]


def _read_shakespeare(source: Source) -> list[Work]:
    works = []
    for path, text in read_checked(source):
        title = text.partition("\n")[0].strip()
        body = text.replace("_", "")  # underscores mark italics
        start = _FIRST_SCENE.search(body)
        if start:
            body = body[start.start() :]
        elif byline := _BYLINE.search(body):  # the poems have no acts
            body = body[byline.end() :]
        name = Path(path).name.removesuffix("_gut.txt")
        works.append(Work(name, (f"{title}\n\n", *_paragraphs(body))))
    return works


DATASETS: dict[str, Callable[[Source], list[Work]]] = {
    "kjv": _read_kjv,
    "shakespeare": _read_shakespeare,
}
"""The embedded texts: name in the registry -> how its works are read."""


def deduplicate(splits: dict[str, list[Work]], *, shortest: int = 40) -> dict[str, list[Work]]:
    """Remove from a work each paragraph that another work already has.

    The test works are looked at first, then validation, then training: what is held out stays
    whole, and its copy in the training text goes. Repetition inside one work is its own style and
    stays, as do paragraphs under `shortest` characters ("Exeunt.").
    """
    owner: dict[str, tuple[str, int]] = {}
    kept: dict[str, list[Work]] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for number, work in enumerate(splits[split]):
            paragraphs = []
            for paragraph in work.paragraphs:
                key = " ".join(paragraph.lower().split())
                first = owner.setdefault(key, (split, number)) if len(key) >= shortest else None
                if first in (None, (split, number)):
                    paragraphs.append(paragraph)
            kept[split].append(Work(work.name, tuple(paragraphs)))
    return {split: kept[split] for split in SPLITS}


def _embedded() -> dict[str, list[Work]]:
    splits: dict[str, list[Work]] = {split: [] for split in SPLITS}
    for name, source in registry().items():
        works = DATASETS[name](source)
        names = {work.name for work in works}
        if unknown := {*source.validation, *source.test} - names:
            raise DataError(
                f"the registry holds out {sorted(unknown)} of {name}, not among its works"
            )
        for work in works:
            held = "test" if work.name in source.test else None
            held = held or ("validation" if work.name in source.validation else "train")
            splits[held].append(work)
    return splits


def _folder_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder. Give 'embedded', a folder of .txt files, or "
            "'hub:owner/name' for a streamed data set."
        )
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise DataError(f"{folder} holds no .txt file. Put UTF-8 text files there.")
    return files


def _folder(files: list[Path], root: Path) -> dict[str, list[Work]]:
    """Hold out whole files where enough are small, else the last stretches of every file.

    Files of at most a tenth of all bytes are taken in the order of the hash of their names: test
    until it has a twentieth of the bytes, then validation. Where that leaves either of the two
    empty, each file's last twentieth is for the test and the twentieth before it for validation,
    cut between paragraphs.
    """
    works = []
    for file in files:
        text = _decode(file.read_bytes(), file)
        if not text.strip():
            raise DataError(f"{file} is empty: remove it, or put text in it.")
        works.append(Work(file.relative_to(root).as_posix(), _paragraphs(text)))
    total = sum(len(work.text) for work in works)
    splits: dict[str, list[Work]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    for work in sorted(works, key=lambda work: hashlib.sha256(work.name.encode()).digest()):
        wants = next((s for s in ("test", "validation") if size[s] < total / 20), "train")
        split = wants if len(work.text) <= total / 10 else "train"
        splits[split].append(work)
        size[split] += len(work.text)
    if all(splits[split] for split in SPLITS):
        return splits
    splits = {split: [] for split in SPLITS}
    for work in works:
        ends = np.cumsum([len(paragraph) for paragraph in work.paragraphs])
        cuts = [
            0,
            *(int(np.searchsorted(ends, share * ends[-1])) for share in (0.9, 0.95)),
            len(ends),
        ]
        for split, start, stop in zip(SPLITS, cuts, cuts[1:], strict=False):
            splits[split].append(Work(work.name, work.paragraphs[start:stop]))
    return splits


def _hub(name: str) -> Iterator[tuple[str, str]]:
    """Stream the documents of a data set of the hub, each with its split: by the hash of their
    text one in 50 is for validation and one for the test, so that copies fall into one split."""
    try:
        import datasets
    except ImportError:
        raise DataError("a hub source needs the package 'datasets': pip install datasets") from None
    path, _, config = name.partition(":")
    try:
        for document in datasets.load_dataset(path, config or None, split="train", streaming=True):
            text = document.get("text", document.get("content"))
            if not isinstance(text, str):
                raise DataError(f"{path} has no column 'text' or 'content': {sorted(document)}")
            draw = hashlib.sha256(text.encode()).digest()[0] % 50
            if paragraphs := _paragraphs(text):
                yield {0: "test", 1: "validation"}.get(draw, "train"), "".join(paragraphs)
    except DataError:
        raise
    except Exception as error:  # the client raises a dozen kinds, from DNS to HTTP
        raise DataError(
            f"the hub data set {path!r} cannot be streamed ({type(error).__name__}: {error}). "
            "It needs a network; use source='embedded' or a folder of text files without one."
        ) from error


# --- prepared text ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Encoded text in three splits, memory-mapped, with the tokeniser that made it.

    Attributes:
        source: What it was made from: ``embedded``, a folder, or ``hub:...``.
        sha256: Of the sources' content and the options: two equal values are the same tokens.
        tokenizer: Byte-level BPE trained on the training split alone.
        train: Tokens (N,) uint16.
        validation: Tokens (N,) uint16.
        test: Tokens (N,) uint16; for the one measurement at the end.
        details: Works, characters and bytes of each split.
    """

    source: str
    sha256: str
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    details: dict

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return self.tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int:
        """The token that stands before every work."""
        return self.tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """Token ids of a string."""
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The string of token ids, special tokens included."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    def bytes_per_token(self, split: str = "validation") -> float:
        """Mean UTF-8 bytes that one token of a split stands for."""
        return self.details[split]["bytes"] / self.details[split]["tokens"]

    def describe(self) -> str:
        """What was read and how it was split, in a few lines for a notebook."""
        lines = [
            f"source      {self.source}  (sha256 {self.sha256[:12]})",
            f"vocabulary  {self.vocabulary} byte-level BPE tokens, trained on the training split",
        ]
        for split in SPLITS:
            it = self.details[split]
            works = ", ".join(it["works"]) if len(it["works"]) <= 6 else f"{len(it['works'])} works"
            lines.append(
                f"{split:10}  {it['tokens']:>11,} tokens  {it['bytes']:>11,} bytes  {works}"
            )
        return "\n".join(lines)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Cross-entropy in bits per byte of text, which compares across tokenisers.

    Args:
        loss: Mean cross-entropy in nats per token.
        bytes_per_token: `Text.bytes_per_token` of the same split.

    >>> round(bits_per_byte(math.log(256), bytes_per_token=1.0), 6)
    8.0
    """
    return loss / math.log(2) / bytes_per_token


def default_source() -> str:
    """The reader's own text where ``FEEDFORWARD_DATA`` names a folder with it, else the embedded.

    Looked for in ``$FEEDFORWARD_DATA/lm``.
    """
    if given := os.environ.get("FEEDFORWARD_DATA"):
        folder = Path(given) / "lm"
        if folder.is_dir():
            return str(folder)
    return "embedded"


def load_text(
    source: str | os.PathLike | None = None, *, vocabulary: int = 2048, tokens: int = 20_000_000
) -> Text:
    """Text in three splits: prepared once, then memory-mapped from the cache.

    Args:
        source: ``"embedded"``, a folder of ``.txt`` files, or ``"hub:owner/name"`` (with a
            configuration: ``"hub:owner/name:config"``). None asks `default_source`.
        vocabulary: Number of BPE tokens, from 257 (256 bytes and the end of text) to 65,536.
        tokens: Training tokens to stream from the hub, where there are as many; the other sources
            are read whole. They are kept in two bytes each. From 20 million on, more tokens leave
            the tokeniser as it is and extend the texts: the held-out ones as well, by about a
            fiftieth of that, up to ten million each. So runs are compared on one number of tokens.

    Raises:
        DataError: When the text is missing, damaged, empty, undecodable or too short.
        ValueError: When `vocabulary` or `tokens` is out of range.
    """
    if not 257 <= vocabulary <= 65_536:
        raise ValueError(f"vocabulary is {vocabulary}; allowed are 257 to 65536 (uint16 tokens)")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; give a positive number of tokens to stream")
    source = default_source() if source is None else str(source)
    if source == "embedded":
        found = registry()
        identity = [(name, it.files, it.validation, it.test) for name, it in found.items()]
        for it in found.values():
            it.installed()  # its absence is worth saying even where the cache would do
        read = _embedded
    elif source.startswith("hub:"):
        identity = ["streamed", source, tokens]
    else:
        root = Path(source).expanduser()
        files = _folder_files(root)
        identity = [(file.relative_to(root).as_posix(), sha256(file)) for file in files]

        def read():
            return _folder(files, root)

    described = json.dumps([_PREPARATION, vocabulary, identity], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()
    folder = cache_directory("data", "text", key[:16])
    if (text := _stored(folder, source, key)) is None:
        if source.startswith("hub:"):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "streaming.lock"):  # of several processes one streams
                if (text := _stored(folder, source, key)) is None:
                    _prepare_stream(folder, source, vocabulary, tokens)
        else:
            _prepare(folder, read, vocabulary, source)
        text = text or _stored(folder, source, key)
    if text is None:
        raise DataError(
            f"the prepared text in {folder} is damaged; remove that folder and try again"
        )
    return text


def _prepare(folder: Path, read: Callable[[], dict], vocabulary: int, source: str) -> None:
    splits = deduplicate(read())
    texts = {split: [work.text for work in splits[split]] for split in SPLITS}
    for split in SPLITS:
        _require_text(source, split, sum(map(len, texts[split])))
    tokenizer = train_tokenizer(texts["train"], vocabulary)
    details = {}
    for split in SPLITS:
        ids = _encode(tokenizer, texts[split])
        with atomic_write(folder / f"{split}.npy") as file:
            np.save(file, ids)
        details[split] = {
            "works": [work.name for work in splits[split]],
            "characters": sum(map(len, texts[split])),
            "bytes": sum(len(text.encode()) for text in texts[split]),
            "tokens": len(ids),
        }
    _seal(folder, tokenizer, details)


def _require_text(source: str, split: str, characters: int) -> None:
    if characters < 100:
        raise DataError(
            f"{source} leaves no text for {split} after cleaning; give at least a few "
            "thousand characters in paragraphs."
        )


def _encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The tokens of texts one after the other, each behind an end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch_fast(texts)
    ids = np.concatenate([part for text in encoded for part in ([end], text.ids)])
    return ids.astype(np.uint16)


def _seal(folder: Path, tokenizer: Tokenizer, details: dict) -> None:
    """Keep the tokeniser and what was prepared, with the checksums of all files."""
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode())
    names = (*(f"{split}.npy" for split in SPLITS), "tokenizer.json")
    files = {name: sha256(folder / name) for name in names}
    # written last: its presence says that the rest is whole
    with atomic_write(folder / "prepared.json", "w", encoding="utf-8") as file:
        json.dump({"details": details, "files": files}, file, indent=1)


# of a stream: the characters that the tokeniser is trained on, those that are encoded at a time,
# and the tokens held out for each of validation and test
_HEAD, _CHUNK, _HELD_OUT = 100_000_000, 10_000_000, 10_000_000


def _prepare_stream(folder: Path, source: str, vocabulary: int, tokens: int) -> None:
    """Encode documents of the hub as they come, until there are `tokens` training tokens.

    The memory holds what the tokeniser is trained on and never the whole text.
    """
    documents = _hub(source.removeprefix("hub:"))
    head = _take(documents, min(_HEAD, 5 * tokens))  # more characters than a token has
    tokenizer = train_tokenizer((text for split, text in head if split == "train"), vocabulary)
    details = {
        split: dict.fromkeys(("documents", "characters", "bytes", "tokens"), 0) for split in SPLITS
    }
    limits = {"train": tokens, "validation": _HELD_OUT, "test": _HELD_OUT}
    with contextlib.ExitStack() as stack:
        files = {
            split: stack.enter_context(atomic_write(folder / f"{split}.npy")) for split in SPLITS
        }
        for split in SPLITS:
            _write_header(files[split], 0)
        chunk = head
        while chunk:
            for split in SPLITS:
                texts = [text for own, text in chunk if own == split]
                it = details[split]
                if texts and it["tokens"] < limits[split]:
                    ids = _encode(tokenizer, texts)
                    files[split].write(ids.tobytes())
                    it["documents"] += len(texts)
                    it["characters"] += sum(map(len, texts))
                    it["bytes"] += sum(len(text.encode()) for text in texts)
                    it["tokens"] += len(ids)
            missing = tokens - details["train"]["tokens"]
            chunk = _take(documents, min(_CHUNK, 5 * missing)) if missing > 0 else []
        for split in SPLITS:
            _require_text(source, split, details[split]["characters"])
            files[split].seek(0)
            _write_header(files[split], details[split]["tokens"])
    for it in details.values():
        it["works"] = [f"{it.pop('documents'):,} documents"]
    _seal(folder, tokenizer, details)


def _take(documents: Iterator[tuple[str, str]], characters: int) -> list[tuple[str, str]]:
    """The next documents, until they have so many characters or there are no more."""
    taken = []
    for document in documents:
        taken.append(document)
        characters -= len(document[1])
        if characters <= 0:
            break
    return taken


def _write_header(file: IO[bytes], tokens: int) -> None:
    """The header of a ``.npy`` file; numpy leaves room in it for the length to grow."""
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint16))
    np.lib.format.write_array_header_1_0(file, header | {"shape": (tokens,)})


def _stored(folder: Path, source: str, key: str) -> Text | None:
    """The prepared text in `folder`, or None where it is not there or not whole."""
    try:
        about = json.loads((folder / "prepared.json").read_text("utf-8"))
        damaged = [f for f, digest in about["files"].items() if sha256(folder / f) != digest]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError) as error:
        damaged = [f"prepared.json: {error!r}"]
    if damaged:
        warnings.warn(f"{folder}: {damaged} damaged; the text is prepared again", stacklevel=3)
        return None
    arrays = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Text(source, key, tokenizer, **arrays, details=about["details"])


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens, token 0 for the end of a text; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# --- batches ------------------------------------------------------------------------------------


class Batches:
    """The batch of any step, computed from the step alone: a resumed run sees the same data.

    Every epoch shifts the windows by a random offset and visits them in a fresh random order.

    Args:
        tokens: (N,) token ids.
        batch: Sequences a batch.
        context: Tokens a sequence.
        seed: Of the order.

    Raises:
        ValueError: When the text is shorter than two windows, or a size is not positive.
    """

    def __init__(self, tokens: np.ndarray, batch: int, context: int, seed: int):
        if batch < 1 or context < 1:
            raise ValueError(f"batch {batch} and context {context} must be at least 1")
        # the offset moves this many windows, and the target after the last, through the text
        self.windows = (len(tokens) - context) // context
        if self.windows < 1:
            raise ValueError(
                f"{len(tokens)} tokens are too few for a context of {context}: "
                f"give at least {2 * context}, or a shorter context"
            )
        self.tokens, self.batch, self.context, self.seed = tokens, batch, context, seed
        self._order = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        room = len(self.tokens) - 1 - self.windows * self.context
        return int(rng.integers(room + 1)), rng.permutation(self.windows)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step, both (batch, context) int64; the targets are one later."""
        rows = np.empty((self.batch, self.context + 1), dtype=np.int64)
        for row, sample in enumerate(range(step * self.batch, (step + 1) * self.batch)):
            epoch, position = divmod(sample, self.windows)
            offset, order = self._order(epoch)
            start = offset + order[position] * self.context
            rows[row] = self.tokens[start : start + self.context + 1]
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]


def batches(tokens: np.ndarray, batch: int, context: int, seed: int) -> Batches:
    """A function from the step to its batch; see `Batches`.

    >>> step = batches(np.arange(100), batch=2, context=8, seed=0)
    >>> inputs, targets = step(3)
    >>> inputs.shape, bool((targets == inputs + 1).all())
    (torch.Size([2, 8]), True)
    """
    return Batches(tokens, batch, context, seed)


def evaluation_batches(
    tokens: np.ndarray, batch: int, context: int, limit: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows side by side, so that each token but the first is predicted exactly once.

    Args:
        tokens: (N,) token ids.
        batch: Sequences a batch.
        context: Tokens a sequence.
        limit: At most about this many targets, in windows spread evenly over the text; None, or as
            many as there are: all.

    Yields:
        Inputs and targets, both (at most batch, context); of the whole text the remainder comes
        last, as one shorter sequence.
    """
    windows = (len(tokens) - 1) // context
    chosen = np.arange(windows)
    if limit is not None and limit < windows * context:
        count = max(1, limit // context)
        chosen = np.linspace(0, windows - 1, count).round().astype(np.int64)
    for first in range(0, len(chosen), batch):
        starts = chosen[first : first + batch] * context
        rows = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
        rows = torch.from_numpy(rows)
        yield rows[:, :-1], rows[:, 1:]
    rest = tokens[windows * context :].astype(np.int64)
    if (limit is None or limit >= len(tokens) - 1) and len(rest) > 1:
        rest = torch.from_numpy(rest)[None]
        yield rest[:, :-1], rest[:, 1:]
