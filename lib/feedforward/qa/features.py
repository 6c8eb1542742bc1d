"""Questions as windows of tokens with labels, and batches of windows of like length.

A passage longer than the reader's input is read through windows that overlap. Every passage is
tokenised once, however many questions are asked on it; windows are places in it, and a batch is
put together when it is asked for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from tokenizers import Tokenizer

from feedforward.files import DataError
from feedforward.profiles import unknown
from feedforward.qa.schema import Question, problems_of

WITHOUT_ANSWER = ("cls", "drop")


@dataclass(frozen=True)
class _Template:
    """Special tokens before, between and behind question and context, with all token types."""

    before: np.ndarray
    between: np.ndarray
    behind: np.ndarray
    types: tuple[np.ndarray, np.ndarray, np.ndarray]
    type_of_question: int
    type_of_context: int

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.behind)


@dataclass(frozen=True, eq=False)
class Features:
    """W windows of tokens: [CLS] question [SEP] a stretch of the context [SEP].

    Attributes:
        questions: What the windows were made of.
        question: (W,) the place of each window's question in `questions`.
        first: (W,) the first token of the window's stretch, counted in its context.
        size: (W,) the tokens of the stretch.
        lead: (W,) the tokens of the window before the stretch.
        lengths: (W,) all tokens of the window.
        starts: (W,) the label: the answer's first token, counted in the window; 0, the [CLS],
            where the window does not hold a whole answer.
        ends: (W,) the label: the answer's last token, or 0.
        answerable: (W,) whether the window holds a whole answer.
    """

    questions: tuple[Question, ...]
    question: np.ndarray
    first: np.ndarray
    size: np.ndarray
    lead: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    answerable: np.ndarray
    _template: _Template
    _padding: int
    _with_types: bool
    _question_tokens: list[list[int]]
    _tokens: np.ndarray  # of all contexts, one behind the other
    _offsets: np.ndarray  # (tokens, 2) characters in the context
    _begin: np.ndarray  # (W,) of the window's context in the two above

    def __len__(self) -> int:
        return len(self.question)

    def batch(self, windows: Iterable[int]) -> dict[str, torch.Tensor]:
        """Inputs and labels of some windows, padded to the longest of them.

        Args:
            windows: B places of windows.

        Returns:
            ``input_ids``, ``attention_mask`` and, where the reader has them, ``token_type_ids``,
            all (B, L) int64; ``start_positions`` and ``end_positions``, both (B,) int64: what a
            Hugging Face model for question answering takes.
        """
        windows = np.asarray(windows, dtype=np.int64)
        lengths = self.lengths[windows]
        shape = len(windows), int(lengths.max(initial=0))
        tokens = np.full(shape, self._padding, dtype=np.int64)
        types = np.zeros(shape, dtype=np.int64)
        it = self._template
        for row, window in enumerate(windows):
            begin = self._begin[window] + self.first[window]
            parts = (
                it.before,
                self._question_tokens[self.question[window]],
                it.between,
                self._tokens[begin : begin + self.size[window]],
                it.behind,
            )
            tokens[row, : lengths[row]] = np.concatenate(parts)
            if self._with_types:
                kinds = (it.types[0], it.type_of_question, it.types[1], it.type_of_context)
                place = 0
                for part, kind in zip(parts, (*kinds, it.types[2]), strict=True):
                    types[row, place : place + len(part)] = kind
                    place += len(part)
        batch = {
            "input_ids": tokens,
            "attention_mask": (np.arange(shape[1]) < lengths[:, None]).astype(np.int64),
            "start_positions": self.starts[windows].astype(np.int64),
            "end_positions": self.ends[windows].astype(np.int64),
        }
        if self._with_types:
            batch["token_type_ids"] = types
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def offsets(self, window: int) -> np.ndarray:
        """Where the tokens of a window's stretch stand in the context: (size, 2) characters."""
        begin = self._begin[window] + self.first[window]
        return self._offsets[begin : begin + self.size[window]]

    def characters(
        self, windows: np.ndarray, firsts: np.ndarray, lasts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where spans begin and end in their contexts, in characters.

        Args:
            windows: (N,) places of windows.
            firsts: (N,) first tokens, counted in the windows' stretches.
            lasts: (N,) last tokens, counted likewise.
        """
        begin = self._begin[windows] + self.first[windows]
        return self._offsets[begin + firsts, 0], self._offsets[begin + lasts, 1]


def prepare(
    questions: Iterable[Question],
    tokenizer,
    *,
    length: int = 384,
    stride: int = 128,
    question_length: int = 64,
    without_answer: str = "cls",
) -> Features:
    """Windows with labels of all questions.

    The label of a window is the first of the question's answers that lies wholly in it, from the
    token that holds the answer's first character to the one that holds its last.
    Explained in ``book/robust-qa/01-task-and-gap``.

    Args:
        questions: Each checked again (see `feedforward.qa.schema.problems_of`).
        tokenizer: A fast tokenizer of transformers. Truncation and padding that were saved with it
            are not used, and not changed.
        length: Tokens of a window at most, the special ones included.
        stride: Tokens that a window shares with the next one of its context.
        question_length: Tokens of a question at most; what is longer loses its end.
        without_answer: Windows that hold no whole answer, for instance because their border cuts
            it: ``"cls"`` labels them with the [CLS] token, ``"drop"`` leaves them out.

    Raises:
        DataError: When a question is wrong, with its id, or there is none.
        ValueError: When the tokenizer gives no offsets or puts no special token in front, a
            question leaves no room for more than `stride` tokens, or `without_answer` is unknown.
    """
    questions = tuple(questions)
    _check(questions, length, stride, question_length, without_answer)
    backend = _backend(tokenizer)
    template = _template(backend)

    asked = dict.fromkeys(question.question for question in questions)
    encoded = backend.encode_batch_fast(list(asked), add_special_tokens=False)
    asked = {text: it.ids[:question_length] for text, it in zip(asked, encoded, strict=True)}
    question_tokens = [asked[question.question] for question in questions]

    place = {text: at for at, text in enumerate(dict.fromkeys(q.context for q in questions))}
    tokens, offsets, counts = _encode_contexts(backend, list(place))
    context = np.array([place[question.context] for question in questions])
    begins = np.cumsum(counts) - counts

    # the windows of each question
    lead = len(template.before) + len(template.between) + np.array(list(map(len, question_tokens)))
    room = length - lead - len(template.behind)
    if (room <= stride).any():
        worst = int(room.argmin())
        raise ValueError(
            f"question {questions[worst].id!r} of {len(question_tokens[worst])} tokens leaves "
            f"{room[worst]} of {length} for the context; windows that share {stride} tokens need "
            "more than that. Give a greater length, or a smaller stride or question_length."
        )
    step = room - stride
    windows = 1 + np.maximum(0, -(-(counts[context] - room) // step))
    question = np.repeat(np.arange(len(questions)), windows)
    before = np.cumsum(windows) - windows
    first = (np.arange(len(question)) - before[question]) * step[question]
    size = np.minimum(room[question], counts[context][question] - first)
    starts, ends = _labels(questions, context, counts, offsets, question, first, size)

    kept = np.flatnonzero((starts >= 0) | (without_answer == "cls"))
    question, answerable = question[kept], starts[kept] >= 0
    shift = np.where(answerable, lead[question], 1)  # -1, no answer, becomes 0, the [CLS]
    return Features(
        questions=questions,
        question=question,
        first=first[kept],
        size=size[kept],
        lead=lead[question],
        lengths=lead[question] + size[kept] + len(template.behind),
        starts=starts[kept] + shift,
        ends=ends[kept] + shift,
        answerable=answerable,
        _template=template,
        _padding=getattr(tokenizer, "pad_token_id", None) or 0,
        _with_types="token_type_ids" in tokenizer.model_input_names,
        _question_tokens=question_tokens,
        _tokens=tokens,
        _offsets=offsets,
        _begin=begins[context][question],
    )


def _check(questions, length, stride, question_length, without_answer) -> None:
    if without_answer not in WITHOUT_ANSWER:
        raise ValueError(unknown("without_answer", without_answer, WITHOUT_ANSWER))
    whole = all(isinstance(n, (int, np.integer)) for n in (length, stride, question_length))
    if not whole or stride < 0 or question_length < 1 or length < 1:
        raise ValueError(
            f"length {length} and question_length {question_length} must be whole numbers of at "
            f"least 1, stride {stride} one that is not negative"
        )
    if not questions:
        raise DataError("there are no questions to prepare; give at least one")
    for question in questions:
        if wrong := problems_of(question):
            raise DataError(f"question {question.id!r} of {question.domain!r}: {wrong[0]}")


def _backend(tokenizer) -> Tokenizer:
    """A copy of the tokenizer in Rust that cuts and pads nothing."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no offsets, the places of its tokens in the text. "
            "Give a fast tokenizer, such as AutoTokenizer.from_pretrained(name) loads where there "
            "is a tokenizer.json."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _template(backend: Tokenizer) -> _Template:
    """The special tokens, read off a pair that the tokenizer puts together itself."""
    pair = backend.encode("a", "a")
    sequence = np.array([-1 if it is None else it for it in pair.sequence_ids])
    tokens, types = np.array(pair.ids), np.array(pair.type_ids)
    ours = [np.flatnonzero(sequence == side) for side in (0, 1)]
    if not len(ours[0]) or not len(ours[1]):
        raise ValueError("the tokenizer makes no token of 'a'; give one with an unknown token")
    cuts = [slice(0, ours[0][0]), slice(ours[0][-1] + 1, ours[1][0]), slice(ours[1][-1] + 1, None)]
    if cuts[0].stop == 0:
        raise ValueError(
            "the tokenizer puts no special token such as [CLS] in front of a pair; windows "
            "without an answer need one. Give the tokenizer of an encoder such as BERT."
        )
    return _Template(
        *(tokens[cut] for cut in cuts),
        types=tuple(types[cut] for cut in cuts),
        type_of_question=int(types[ours[0][0]]),
        type_of_context=int(types[ours[1][0]]),
    )


def _encode_contexts(
    backend: Tokenizer, contexts: list[str], chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (N,), offsets (N, 2) of all contexts, and the number of tokens of each."""
    tokens, offsets, counts = [], [], []
    for begin in range(0, len(contexts), chunk):
        encoded = backend.encode_batch(contexts[begin : begin + chunk], add_special_tokens=False)
        counts += map(len, encoded)
        total = sum(counts[begin:])
        # flat iterators: numpy reads them several times faster than lists of pairs
        flat = chain.from_iterable
        tokens.append(np.fromiter(flat(it.ids for it in encoded), np.int32, total))
        pairs = flat(flat(it.offsets for it in encoded))
        offsets.append(np.fromiter(pairs, np.int32, 2 * total).reshape(-1, 2))
    return np.concatenate(tokens), np.concatenate(offsets), np.array(counts)


def _labels(questions, context, counts, offsets, question, first, size):
    """First and last token of the label of each window, counted in its stretch; -1 for none."""
    # characters of all contexts in one row, so that one search finds the tokens of all answers
    lengths = np.zeros(len(counts), dtype=np.int64)
    lengths[context] = [len(it.context) for it in questions]
    base = np.cumsum(lengths) - lengths
    places = offsets + np.repeat(base, counts)[:, None]
    owner = np.repeat(np.arange(len(questions)), [len(it.answers) for it in questions])
    spans = [(answer.start, answer.end) for it in questions for answer in it.answers]
    spans = np.array(spans, dtype=np.int64).reshape(-1, 2) + base[context[owner]][:, None]
    begin = (np.cumsum(counts) - counts)[context[owner]]
    start = np.searchsorted(places[:, 1], spans[:, 0], side="right") - begin
    end = np.searchsorted(places[:, 0], spans[:, 1], side="left") - 1 - begin

    # each answer with each window of its question
    windows = np.bincount(question, minlength=len(questions))
    before = np.cumsum(windows) - windows
    answer = np.repeat(np.arange(len(owner)), windows[owner])
    pairs = np.cumsum(windows[owner]) - windows[owner]
    window = np.arange(len(answer)) - pairs[answer] + before[owner[answer]]
    start, end = start[answer] - first[window], end[answer] - first[window]
    inside = np.flatnonzero((start >= 0) & (end < size[window]) & (start <= end))
    labels = np.full((2, len(question)), -1)
    inside = inside[::-1]  # of several answers in a window the first is written last
    labels[:, window[inside]] = start[inside], end[inside]
    return labels


# --- batches ------------------------------------------------------------------------------------


class Batches:
    """The batch of any step, computed from the step alone: a resumed run sees the same data.

    An epoch shows every window once, in a fresh random order in which windows of like length share
    a batch, so that little is padding: the shuffled windows are sorted by length inside pools of
    `pool` batches, and the batches of all pools are shuffled again.

    Args:
        features: What is read.
        batch: Windows a batch; the last of an epoch's batches may be smaller.
        seed: Of the order.
        pool: Batches that are sorted together; 1 for windows in plain random order.

    Raises:
        ValueError: When there are no windows, or a size is not positive.
    """

    def __init__(self, features: Features, batch: int, seed: int, *, pool: int = 50):
        if batch < 1 or pool < 1:
            raise ValueError(f"batch {batch} and pool {pool} must be at least 1")
        if not len(features):
            raise ValueError("there is no window to train on; keep those without an answer, too")
        self.features, self.batch, self.seed, self.pool = features, batch, seed, pool
        self._order = lru_cache(maxsize=2)(self._draw)

    @property
    def steps_per_epoch(self) -> int:
        """Batches until every window was shown once."""
        return -(-len(self.features) // self.batch)

    def _draw(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.features))
        pools = range(0, len(order), self.pool * self.batch)
        pools = [order[begin : begin + self.pool * self.batch] for begin in pools]
        lengths = self.features.lengths
        if self.pool > 1:
            pools = [it[np.argsort(lengths[it], kind="stable")] for it in pools]
        batches = [it[at : at + self.batch] for it in pools for at in range(0, len(it), self.batch)]
        return [batches[at] for at in rng.permutation(len(batches))]

    def windows(self, step: int) -> np.ndarray:
        """The places of the windows in the batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """Inputs and labels of a step; see `Features.batch`."""
        return self.features.batch(self.windows(step))


def evaluation_batches(
    features: Features, batch: int
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """All windows once, from long to short: where memory runs out, it does so at once.

    Yields:
        The places of the windows, and their inputs and labels.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; give at least 1")
    order = np.argsort(-features.lengths, kind="stable")
    for begin in range(0, len(order), batch):
        windows = order[begin : begin + batch]
        yield windows, features.batch(windows)
