"""From the logits of windows to the best spans of each question."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from feedforward.qa.features import Features, evaluation_batches


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a context that may be the answer.

    Attributes:
        text: The stretch without white space around it.
        start: Its first character in the context.
        end: The first character behind it.
        score: The sum of its start's and its end's logit, or of their log probabilities.
    """

    text: str
    start: int
    end: int
    score: float


def decode(
    features: Features,
    start_logits: np.ndarray | torch.Tensor,
    end_logits: np.ndarray | torch.Tensor,
    *,
    n_best: int = 20,
    min_tokens: int = 1,
    max_tokens: int = 30,
    normalize: bool = True,
) -> list[tuple[Span, ...]]:
    """The best spans of each question over all its windows, the best first.

    All spans of allowed length are compared, exactly; a span that several windows hold counts once,
    with its best score. Of equal scores the span that begins first comes first, then the shorter
    one, whatever `n_best` is.

    The released code takes ``min_tokens=2``: it refuses spans whose end is not behind their start,
    so that it never answers with one token; and ``normalize=False``. Explained in
    ``book/robust-qa/01-task-and-gap``, the cost of that rule in ``book/robust-qa/04-audit``.

    Args:
        features: W windows, with those that hold no answer.
        start_logits: (W, L) of every token of a window, L at least the longest window.
        end_logits: (W, L) likewise.
        n_best: Spans of a question at most.
        min_tokens: Tokens of a span at least.
        max_tokens: Tokens of a span at most.
        normalize: Compare the spans of different windows by log probability, a softmax over each
            window's context and its [CLS] (where readers put windows without an answer), as the
            question answering pipeline of transformers 4 did; with its ``align_to_words=False`` it
            gives the same answers. By default it widened them to whole words and added up those
            that then had the same text. False compares by the sum of logits,
            as the scripts of SQuAD do.

    Returns:
        One tuple a question, in their order; empty where no span is allowed.

    Raises:
        ValueError: When the logits do not fit the windows or are not finite (those of the [CLS]
            where they count), a question has no window, or an option is out of range.
    """
    whole = all(isinstance(n, (int, np.integer)) for n in (n_best, min_tokens, max_tokens))
    if not whole or n_best < 1 or not 1 <= min_tokens <= max_tokens:
        raise ValueError(
            f"n_best is {n_best}, tokens from {min_tokens} to {max_tokens}; allowed are whole "
            "numbers of at least 1, and a minimum that is not above the maximum"
        )
    logits = [_checked(values, features) for values in (start_logits, end_logits)]
    windows = np.bincount(features.question, minlength=len(features.questions))
    if (windows == 0).any():
        lost = features.questions[int(windows.argmin())]
        raise ValueError(
            f"question {lost.id!r} has no window; prepare with without_answer='cls' to answer it"
        )
    chunks = _window_spans(features, *logits, n_best, min_tokens, max_tokens, normalize)
    window, first, last, score = map(np.concatenate, zip(*chunks, strict=True))

    # of the same span in several windows the best, then the best of each question
    question = features.question[window]
    begin, end = features.first[window] + first, features.first[window] + last
    order = np.lexsort((-score, end, begin, question))
    keys = np.stack([question, begin, end])[:, order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
    order = order[new]
    order = order[np.lexsort((end[order], begin[order], -score[order], question[order]))]
    counts = np.bincount(question[order], minlength=len(features.questions))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = order[rank < n_best]

    spans: list[list[Span]] = [[] for _ in features.questions]
    starts, ends = features.characters(window[order], first[order], last[order])
    rows = (question[order], starts, ends, score[order])
    for number, start, end, value in zip(*(row.tolist() for row in rows), strict=True):
        spans[number].append(_span(features.questions[number].context, start, end, value))
    return [tuple(it) for it in spans]


def best_answers(
    features: Features,
    start_logits: np.ndarray | torch.Tensor,
    end_logits: np.ndarray | torch.Tensor,
    **options,
) -> dict[str, str]:
    """The text of the best span by question id, as `feedforward.score` takes it.

    Empty where no span is allowed; the options are those of `decode`.
    """
    spans = decode(features, start_logits, end_logits, n_best=1, **options)
    return {
        question.id: best[0].text if best else ""
        for question, best in zip(features.questions, spans, strict=True)
    }


@torch.no_grad()
def read(model: nn.Module, features: Features, *, batch: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """The start and end logits of a reader for all windows, both (W, L) float32, 0 at padding.

    Args:
        model: Takes ``input_ids``, ``attention_mask`` and where the tokenizer gives them
            ``token_type_ids``, and returns ``start_logits`` and ``end_logits`` (B, L) as
            attributes: any Hugging Face model for question answering. Its mode is restored.
        features: W windows, of L tokens at most.
        batch: Windows at a time, those of like length together.
    """
    shape = len(features), int(features.lengths.max(initial=0))
    logits = np.zeros((2, *shape), dtype=np.float32)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for windows, inputs in evaluation_batches(features, batch):
            inputs = {k: v.to(device) for k, v in inputs.items() if not k.endswith("_positions")}
            output = model(**inputs)
            for side, values in enumerate((output.start_logits, output.end_logits)):
                values = values.float().cpu().numpy()
                inside = np.arange(values.shape[1]) < features.lengths[windows][:, None]
                logits[side, windows, : values.shape[1]] = np.where(inside, values, 0.0)
    finally:
        model.train(training)
    return logits[0], logits[1]


def _checked(logits: np.ndarray | torch.Tensor, features: Features) -> np.ndarray:
    if isinstance(logits, torch.Tensor):
        logits = logits.detach().float().cpu().numpy()
    logits = np.asarray(logits, dtype=np.float32)
    longest = int(features.lengths.max(initial=0))
    if logits.ndim != 2 or len(logits) != len(features) or logits.shape[1] < longest:
        raise ValueError(
            f"logits of shape {logits.shape} do not fit {len(features)} windows of up to {longest} "
            "tokens; give one row a window, in the order of the windows"
        )
    return logits


def _window_spans(
    features: Features,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best: int,
    min_tokens: int,
    max_tokens: int,
    normalize: bool,
    chunk: int = 256,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (window, first token, last token, score) of the best spans of some windows at a time.

    Tokens count in the windows' stretches of context.
    """
    # windows of like length together: less padding
    by_size = np.argsort(features.size, kind="stable")
    for at in range(0, len(by_size), chunk):
        windows = by_size[at : at + chunk]
        size, lead = features.size[windows], features.lead[windows]
        longest = max(1, int(size.max()))
        inside = np.arange(longest) < size[:, None]
        start, end = (
            _of_context(logits, windows, lead, inside, normalize)
            for logits in (start_logits, end_logits)
        )
        # the best end of each start
        far = min(max_tokens, longest)
        reach = np.full_like(end, -np.inf)
        for further in range(min_tokens - 1, far):
            ahead = reach[:, : longest - further]
            np.maximum(ahead, end[:, further:], out=ahead)
        # the n best spans begin at n starts at most: those that reach highest
        firsts = _top(start + reach, n_best)
        further = np.arange(min_tokens - 1, max(far, min_tokens))
        padded = np.pad(end, ((0, 0), (0, int(further[-1]))), constant_values=-np.inf)
        rows = np.arange(len(windows))[:, None]
        score = start[rows, firsts][:, :, None]
        score = score + padded[rows[:, :, None], firsts[:, :, None] + further]
        score = score.reshape(len(windows), -1)
        best = _top(score, n_best)
        first = np.take_along_axis(firsts, best // len(further), axis=1)
        last = first + further[best % len(further)]
        score = np.take_along_axis(score, best, axis=1)
        row, column = np.nonzero(score > -np.inf)
        yield windows[row], first[row, column], last[row, column], score[row, column]


def _of_context(
    logits: np.ndarray, windows: np.ndarray, lead: np.ndarray, inside: np.ndarray, normalize: bool
) -> np.ndarray:
    """The logits, or log probabilities, of the windows' stretches, flush left, else -inf."""
    places = np.minimum(lead[:, None] + np.arange(inside.shape[1]), logits.shape[1] - 1)
    values = logits[windows[:, None], places]
    cls = logits[windows, :1]
    finite = (np.isfinite(values) | ~inside).all(1)
    if normalize:
        finite &= np.isfinite(cls[:, 0])
    if not finite.all():
        window = windows[int(np.argmin(finite))]
        raise ValueError(
            f"the logits of window {window} are not finite; the reader has diverged, or its "
            "numbers overflow in this precision"
        )
    values = np.where(inside, values, -np.inf)
    if normalize:
        all_values = np.concatenate([values, cls], axis=1)
        highest = all_values.max(1, keepdims=True)
        total = np.exp(all_values - highest).sum(1, keepdims=True)
        values = values - (highest + np.log(total))
    return values


def _top(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` highest values of each row, from left to right; (rows, <= count).

    Of equal values those further left, so that one answer and the first of several are the same.
    """
    if count == 1:
        return values.argmax(1)[:, None]
    if count >= values.shape[1]:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    least = np.partition(values, -count, axis=1)[:, -count, None]
    above, equal = values > least, values == least
    wanted = count - above.sum(1, keepdims=True)
    chosen = above | (equal & (equal.cumsum(1, dtype=np.int32) <= wanted))
    return np.nonzero(chosen)[1].reshape(-1, count)


def _span(context: str, start: int, end: int, score: float) -> Span:
    # many tokenizers drop the marks that follow their letter as characters of their own: accents,
    # vowel signs, the choice of an emoji's form
    while end < len(context) and unicodedata.category(context[end]) in ("Mn", "Me"):
        end += 1
    text = context[start:end]
    start += len(text) - len(text.lstrip())  # some count the space to the word
    text = text.strip()
    return Span(text, start, start + len(text), score)
