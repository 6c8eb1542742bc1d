"""Back translation around protected answers: there, back, and the answers where they belong.

A context is translated sentence by sentence; in the place of an answer the engine sees a made-up
name, which is checked for when the sentence returns. The robust question answering system (Zhou,
Liu and Dong 2022, arXiv 2204.09598) cuts the context at the answers instead, an option here.
"""

import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Protocol

import numpy as np

from feedforward.augment.sentences import split_sentences
from feedforward.augment.spans import Edit, ProtectedText, Rewritten, Span, whole_words
from feedforward.files import cache_directory


class EngineError(ValueError):
    """A translation engine that is not installed or failed: says which, and what is kept."""


class Engine(Protocol):
    """What translates.

    Attributes:
        name: What the translations depend on; those in the cache are found by it.
        at_once: How many sentences to ask for before they are stored.
    """

    name: str
    at_once: int

    def translate(self, sentences: list[str]) -> list[str]:
        """The translation of each sentence, in their order."""
        ...


# --- engines -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundTrip:
    """Two engines one after the other: into another language, and back.

    Args:
        there: From the language of the text.
        back: Into the language of the text.
    """

    there: Engine
    back: Engine

    @property
    def name(self) -> str:
        """Both engines' names."""
        return f"{self.there.name} > {self.back.name}"

    @property
    def at_once(self) -> int:
        """What suits both engines."""
        return min(self.there.at_once, self.back.at_once)

    def translate(self, sentences: list[str]) -> list[str]:
        """The sentences as they come back."""
        return self.back.translate(self.there.translate(sentences))


@dataclass(frozen=True)
class Apertium:
    """Rule-based translation by Apertium, a program without a network.

    On Debian: ``apt-get install apertium apertium-eng-spa``.

    Args:
        pair: The direction as ``apertium -l`` lists it, for instance ``"eng-spa"``.
    """

    pair: str
    at_once: int = 5000  # most of a call's time is its start

    @property
    def name(self) -> str:
        """The program and its direction."""
        return f"apertium {self.pair}"

    def translate(self, sentences: list[str]) -> list[str]:
        """The translation of each sentence; unknown words come back as they are.

        Raises:
            EngineError: Apertium or the pair of languages is not installed, or it failed.
        """
        program = shutil.which("apertium")
        if program is None:
            raise EngineError(
                "Apertium is not installed. On Debian: apt-get install apertium "
                f"apertium-{self.pair}"
            )
        # a blank line ends a sentence: the format of lines loses final full stops
        finished = subprocess.run(
            [program, "-u", "-f", "txt", self.pair],
            input="".join(f"{sentence}\n\n" for sentence in sentences),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if finished.returncode:
            raise EngineError(
                f"apertium {self.pair} failed ({finished.returncode}): "
                f"{(finished.stderr or finished.stdout).strip()[:500]}. "
                "`apertium -l` lists the directions that are installed."
            )
        *translated, rest = finished.stdout.split("\n\n")
        if len(translated) == len(sentences) and not rest.strip():
            return [" ".join(part.split()) for part in translated]
        if len(sentences) == 1:
            return [" ".join(finished.stdout.split())]
        half = len(sentences) // 2  # a sentence vanished or fell in two: find it
        return self.translate(sentences[:half]) + self.translate(sentences[half:])


class Marian:
    """Neural translation by a model of the Hugging Face hub, or a folder with one.

    Loaded when it is first used, from safetensors only.

    Args:
        model: For instance ``"Helsinki-NLP/opus-mt-en-es"``.
        batch_size: Sentences translated side by side.
        device: Where PyTorch puts the model.
    """

    def __init__(self, model: str, *, batch_size: int = 16, device: str = "cpu"):
        self.model = model
        self.batch_size = batch_size
        self.device = device
        self.at_once = 4 * batch_size
        self.name = f"marian {model}"

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            model = AutoModelForSeq2SeqLM.from_pretrained(self.model, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise EngineError(
                f"the translation model {self.model!r} cannot be loaded: it needs a network (or a "
                "copy in the hub's cache), weights as safetensors and, for its tokenizer, "
                f"`pip install sentencepiece`. {type(error).__name__}: {str(error)[:300]}"
            ) from error
        return tokenizer, model.eval().to(self.device)

    def translate(self, sentences: list[str]) -> list[str]:
        """The translation of each sentence, by greedy decoding.

        Raises:
            EngineError: The model cannot be loaded.
        """
        import torch

        tokenizer, model = self._loaded
        # sentences of like length together, so that little of a batch is padding
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        translated = [""] * len(sentences)
        for at in range(0, len(order), self.batch_size):
            chosen = order[at : at + self.batch_size]
            inputs = tokenizer(
                [sentences[i] for i in chosen], return_tensors="pt", padding=True, truncation=True
            ).to(self.device)
            with torch.inference_mode():
                tokens = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    num_beams=1,
                    do_sample=False,
                    max_length=None,
                    max_new_tokens=model.config.max_position_embeddings - 1,
                )
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                translated[i] = text
        return translated


class NlpaugTranslation:
    """nlpaug's ``BackTranslationAug`` as an engine that makes the whole round trip.

    Args:
        augmenter: The augmenter, with its models loaded.
        name: What its translations depend on, for the cache: the models' names.
        at_once: How many sentences to ask for before they are stored.
    """

    def __init__(self, augmenter: Any, *, name: str, at_once: int = 64):
        self.augmenter = augmenter
        self.name = f"nlpaug {name}"
        self.at_once = at_once

    def translate(self, sentences: list[str]) -> list[str]:
        """The sentences as they come back."""
        # past `augment`, which drops repeated sentences
        return list(self.augmenter.substitute(list(sentences)))


# --- the cache -----------------------------------------------------------------------------------

_WAIT = "another process is writing to it: run again when that has ended; nothing is lost"
_REACH = (
    "make it a file that this process may read and write, or set FEEDFORWARD_CACHE to a folder "
    "where it may"
)
_SPACE = "make room on its disk and run again; nothing is lost"
# by the primary codes of SQLite's errors; the others mean a damaged file
_CURES = {
    sqlite3.SQLITE_BUSY: _WAIT,
    sqlite3.SQLITE_LOCKED: _WAIT,
    sqlite3.SQLITE_PERM: _REACH,
    sqlite3.SQLITE_READONLY: _REACH,
    sqlite3.SQLITE_CANTOPEN: _REACH,
    sqlite3.SQLITE_AUTH: _REACH,
    sqlite3.SQLITE_IOERR: f"reading or writing failed: {_REACH}",
    sqlite3.SQLITE_FULL: _SPACE,
}


class TranslationCache:
    """Translations on disk, by engine and sentence: what was done once is never done again.

    Args:
        path: The SQLite file; None is one in the library's cache folder.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else cache_directory("translations") / "sentences.sqlite"

    def translate(self, engine: Engine, sentences: Sequence[str]) -> dict[str, str]:
        """The translation of each sentence; only those that are not stored reach the engine.

        What the engine gives is stored every ``engine.at_once`` sentences, whole or not at all, so
        that one that dies in the middle can go on where it was.

        Raises:
            EngineError: The engine failed or gave another number of sentences, or the file of
                the cache is damaged, in use by another process or out of reach.
        """
        try:
            with closing(self._open()) as connection:
                return self._translate(connection, engine, sentences)
        except sqlite3.DatabaseError as error:
            # what is stored may have taken hours: delete it only where it is lost
            cure = _CURES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            raise EngineError(
                f"the stored translations {self.path} cannot be used ({error}); "
                f"{cure or 'delete the file, it can be made again'}"
            ) from error

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(
                f"the stored translations {self.path} cannot be used ({error}); {_REACH}"
            ) from error
        connection = sqlite3.connect(self.path, timeout=60)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS sentences "
            "(engine TEXT, sentence TEXT, translation TEXT, PRIMARY KEY (engine, sentence))"
        )
        return connection

    def _translate(self, connection, engine: Engine, sentences: Sequence[str]) -> dict[str, str]:
        wanted = dict.fromkeys(sentences)
        stored = connection.execute(
            "SELECT sentence, translation FROM sentences "
            "WHERE engine = ? AND typeof(translation) = 'text'",
            (engine.name,),
        )
        known = {sentence: text for sentence, text in stored if sentence in wanted}
        missing = [sentence for sentence in wanted if sentence not in known]
        for at in range(0, len(missing), engine.at_once):
            batch = missing[at : at + engine.at_once]
            where = f"{engine.name}, after {len(known)} of {len(wanted)} sentences, which are kept"
            try:
                texts = engine.translate(batch)
            except Exception as error:
                raise EngineError(f"{where}: {error}. Run again to go on.") from error
            if len(texts) != len(batch):
                raise EngineError(f"{where}: {len(texts)} translations of {len(batch)} sentences")
            for text in texts:
                if not _storable(text):
                    raise EngineError(f"{where}: {text!r} in the place of a translation")
            rows = list(zip(batch, texts, strict=True))
            with connection:  # one transaction
                connection.executemany(
                    "INSERT OR REPLACE INTO sentences VALUES (?, ?, ?)",
                    [(engine.name, sentence, text) for sentence, text in rows],
                )
            known.update(rows)
        return known


def _storable(text: object) -> bool:
    """Whether it is a text that can be written down: half of a pair of surrogates cannot."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- the augmenter -------------------------------------------------------------------------------


class BackTranslation:
    """Sentences there and back again, with the protected spans as they were.

    In the place of each protected word stands a made-up name (``Xaxa``, ``Xbxb``, ...). A sentence
    that comes back without one of them, with one twice, or with two in another order, or empty but
    for them, is replaced by the original: its answers are counted as repaired. None is ever lost.

    The engine decides; randomness only chooses among several engines and, with `share` below 1,
    which sentences travel. So copies differ only then.

    Args:
        engines: What makes the round trip, usually a :class:`RoundTrip`; with several, one is
            drawn for each sentence.
        share: Share of the sentences that travel (0 to 1).
        cut_at_answers: The paper's form: cut the context at the answers, translate the parts
            between them, leave parts of five words or fewer. Engines then see broken sentences.
        cache: Where translations are kept; None is the library's cache folder.

    Raises:
        ValueError: No engine, or a share outside 0 to 1.

    Book: ``book/robust-qa/02-augmentation``.
    """

    def __init__(
        self,
        *engines: Engine,
        share: float = 1.0,
        cut_at_answers: bool = False,
        cache: TranslationCache | None = None,
    ):
        if not engines:
            raise ValueError("no engine is given; for instance RoundTrip(Apertium(...), ...)")
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}, a share between 0 and 1 is needed")
        self.engines = engines
        self.share = share
        self.cut_at_answers = cut_at_answers
        self.cache = cache or TranslationCache()

    def __call__(self, protected: ProtectedText, rng: np.random.Generator) -> ProtectedText:
        """One text there and back; :meth:`many` is far quicker for many.

        Raises:
            EngineError: The engine is not there or failed.
        """
        return self.many([protected], [rng])[0].text

    def many(
        self, texts: Sequence[ProtectedText], rngs: Sequence[np.random.Generator]
    ) -> list[Rewritten]:
        """Many texts there and back, with one request for all sentences of an engine.

        Raises:
            EngineError: An engine is not there or failed; what it did is kept, run again.
        """
        cut = _between_answers if self.cut_at_answers else _around_answers
        journeys = []  # for each text: its parts and the engine of each, None for staying
        for text, rng in zip(texts, rngs, strict=True):
            parts = cut(text)
            travels = rng.random(len(parts)) < self.share
            engines = rng.integers(len(self.engines), size=len(parts))
            journeys.append((parts, np.where(travels, engines, -1).tolist()))
        translated = [
            self.cache.translate(
                engine,
                [
                    part.masked
                    for parts, chosen in journeys
                    for part, engine_of_part in zip(parts, chosen, strict=True)
                    if engine_of_part == number
                ],
            )
            for number, engine in enumerate(self.engines)
        ]
        results = []
        for text, (parts, chosen) in zip(texts, journeys, strict=True):
            edits: list[Edit] = []
            repaired = 0
            for part, engine in zip(parts, chosen, strict=True):
                if engine >= 0:
                    back = part.unmask(translated[engine][part.masked])
                    if back is None:
                        repaired += sum(part.start <= a < part.end for a, _ in text.spans)
                    edits += back or []
            results.append(Rewritten(text.edit(edits), repaired))
        return results


@dataclass(frozen=True)
class _Part:
    """A sentence on its journey.

    Attributes:
        start: Where it begins in the text.
        end: Where it ends.
        masked: What the engine sees.
        names: The made-up name in the place of each block.
        blocks: The protected places in it, from left to right.
    """

    start: int
    end: int
    masked: str
    names: tuple[str, ...]
    blocks: tuple[Span, ...]

    def unmask(self, translated: str) -> list[Edit] | None:
        """The edits that put the translation around the blocks; None if some of it was lost."""
        if self.names and not re.search(r"[^\W_]", re.sub("|".join(self.names), "", translated)):
            return None
        rest, pieces = " ".join(translated.split()), []
        for name in self.names:
            found = re.split(rf"(?<!\w){name}(?!\w)", rest)
            if len(found) != 2:
                return None
            pieces.append(found[0])
            rest = found[1]
        pieces.append(rest)
        if (not self.blocks and not rest) or any(n in p for n in self.names for p in pieces):
            return None
        starts = [self.start, *(end for _, end in self.blocks)]
        ends = [*(start for start, _ in self.blocks), self.end]
        return list(zip(starts, ends, pieces, strict=True))


def _around_answers(text: ProtectedText) -> list[_Part]:
    """The sentences of a text, names standing in for the protected words."""
    blocks = whole_words(text)
    parts = []
    for start, end in split_sentences(text.text, keep=blocks):
        inside = tuple(block for block in blocks if start <= block[0] < end)
        chosen = tuple(islice(_names(text.text[start:end]), len(inside)))
        cuts = [start, *(edge for block in inside for edge in block), end]
        around = [text.text[a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
        if not any(map(str.isalpha, "".join(around))):
            continue
        masked = around[0] + "".join(n + a for n, a in zip(chosen, around[1:], strict=True))
        parts.append(_Part(start, end, " ".join(masked.split()), chosen, inside))
    return parts


def _between_answers(text: ProtectedText) -> list[_Part]:
    """What stands between the protected spans, in sentences, where it is longer than five words."""
    return [
        _Part(low + start, low + end, " ".join(text.text[low + start : low + end].split()), (), ())
        for low, high in text.free
        if len(text.text[low:high].split()) > 5
        for start, end in split_sentences(text.text[low:high])
    ]


def _names(text: str) -> Iterator[str]:
    """Made-up names that the text does not hold: Xaxa, Xbxb, ... Xabxab, ..."""
    for number in count():
        letters, rest = ascii_lowercase[number % 26], number // 26
        while rest:
            letters, rest = ascii_lowercase[rest % 26] + letters, rest // 26
        if (name := f"X{letters}x{letters}") not in text:
            yield name
