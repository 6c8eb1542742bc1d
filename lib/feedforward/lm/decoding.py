"""Generation of text: prefill, step by step with a cache, drawing, and the throughput of it all."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from feedforward.lm.model import Decoder, KeyValueCache

Generators = torch.Generator | Sequence[torch.Generator] | None


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor | Sequence[Tensor | Sequence[int]],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    generator: Generators = None,
    cache: bool = True,
) -> Tensor | list[Tensor]:
    """Continue sequences, one token after the other.

    The prompts go through the model at once, and then each new token alone: of the earlier ones
    it needs nothing but keys and values, which are kept. Prompts of different lengths are padded
    at the left and so end together; padding is seen by no token and takes no position, so that
    each row gets what it would get alone. Explained in ``book/structured-ffn/04-decoding``.

    A mixture of experts with a `capacity_factor` drops tokens according to how many there are, so
    it alone gives other tokens with and without a cache, or in other company.

    Args:
        model: The decoder; it runs in eval mode and keeps the mode that it has.
        tokens: (B, T) int64, or a list of B prompts of one token or more each.
        length: How many tokens to add.
        temperature: As `sample` takes it.
        top_k: As `sample` takes it.
        top_p: As `sample` takes it.
        stop: The token that ends a row.
        generator: As `sample` takes it.
        cache: Keep keys and values. False: the whole sequence goes through the model for each new
            token, which gives the same tokens later.

    Returns:
        Of a tensor: (B, T + length) int64, or as long as the longest row where all have stopped;
        after its end a row is filled with `stop`. Of a list: a list of B tensors, each its prompt
        and what was added, `stop` included. On the model's device.

    Raises:
        ValueError: When a prompt is empty, a number is out of range, or prompt and new tokens are
            more than the model's context.

    >>> from feedforward.lm.model import DecoderConfig
    >>> model = Decoder(DecoderConfig(vocabulary=11, width=16, layers=2, heads=2))
    >>> longer = generate(model, [[1, 2, 3], [4]], 5, temperature=0)
    >>> [len(row) for row in longer]
    [8, 6]
    """
    prompts, padding = _prompts(tokens, model)
    rows, start = prompts.shape
    _check(model, rows, start, length, temperature, top_k, top_p, stop, generator)
    out = prompts.new_zeros(rows, start + length)
    out[:, :start] = prompts
    done = torch.zeros(rows, dtype=torch.bool, device=out.device)
    memory = [KeyValueCache(start + length) for _ in model.blocks] if cache else None
    training = model.training
    if training:
        model.eval()
    try:
        for end in range(start, start + length):
            new = out[:, end - 1 : end] if cache and end > start else out[:, :end]
            states = model.states(new, padding=padding, cache=memory)
            chosen = sample(
                model.head(states[:, -1]),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generator,
            )
            if stop is not None:
                chosen = chosen.masked_fill(done, stop)
                done |= chosen == stop
            out[:, end] = chosen
            if stop is not None and done.all():
                out = out[:, : end + 1]
                break
    finally:
        if training:
            model.train()
    if isinstance(tokens, Tensor):
        return out
    skipped = [0] * rows if padding is None else padding.tolist()
    return [row[: _end(row, start, stop)][skip:] for row, skip in zip(out, skipped, strict=True)]


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generators = None,
) -> Tensor:
    """Draw a token from each row of scores. Explained in ``book/structured-ffn/04-decoding``.

    Args:
        logits: (B, vocabulary).
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Draw among this many most probable tokens; None: among all.
        top_p: Draw among the fewest most probable tokens that have this probability together
            (nucleus sampling, arXiv 1904.09751), after `top_k`; None: among all.
        generator: Source of the draws on any device, or one for each row, whose tokens then do not
            depend on its company; None: PyTorch's own.

    Returns:
        (B,) int64.

    >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0)
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # the largest is 0, so that no temperature is too small
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, tokens = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = probabilities.scatter(-1, tokens, ordered)
    # of exponential clocks that run at these rates, each is the first to ring with its probability
    return (probabilities / _exponential(probabilities, generator)).argmax(-1)


def _exponential(like: Tensor, generator: Generators) -> Tensor:
    """Draws from the exponential distribution, of the shape and on the device of `like`."""
    if generator is None:
        return torch.empty_like(like).exponential_()
    if isinstance(generator, torch.Generator):
        drawn = torch.empty(like.shape, device=generator.device).exponential_(generator=generator)
        return drawn.to(like.device)
    each = [
        torch.empty(like.shape[-1:], device=g.device).exponential_(generator=g) for g in generator
    ]
    return torch.stack(each).to(like.device)


def _prompts(
    tokens: Tensor | Sequence[Tensor | Sequence[int]], model: Decoder
) -> tuple[Tensor, Tensor | None]:
    """The prompts as (B, T), padded at the left, and how much padding each has (B,), or None."""
    device, vocabulary = model.embedding.weight.device, model.config.vocabulary
    if isinstance(tokens, Tensor):
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; give (B, T) with B and T >= 1"
            )
        prompts, padding = tokens.to(device), None
    else:
        rows = [torch.as_tensor(row) for row in tokens]
        if not rows or any(row.dim() != 1 or len(row) == 0 for row in rows):
            shapes = [tuple(row.shape) for row in rows]
            raise ValueError(f"prompts have shapes {shapes}; give one or more, each of T >= 1")
        longest = max(map(len, rows))
        missing = [longest - len(row) for row in rows]
        filled = [F.pad(row, (skip, 0)) for row, skip in zip(rows, missing, strict=True)]
        prompts = torch.stack(filled).to(device)
        padding = torch.tensor(missing, device=device) if any(missing) else None
    least, most = prompts.min().item(), prompts.max().item()
    if prompts.is_floating_point() or least < 0 or most >= vocabulary:
        raise ValueError(
            f"tokens are whole numbers from 0 to {vocabulary - 1}; the prompts are {prompts.dtype} "
            f"from {least} to {most}"
        )
    return prompts.long(), padding


def _check(model, rows, start, length, temperature, top_k, top_p, stop, generator) -> None:
    context, vocabulary = model.config.context, model.config.vocabulary
    if length < 0:
        raise ValueError(f"length is {length}; give how many tokens to add, from 0")
    if start + length > context:
        raise ValueError(
            f"a prompt of {start} tokens and {length} new ones are more than the context of "
            f"{context}: add at most {max(0, context - start)}, cut the prompt, or build the model "
            "with a longer context"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; give at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; give a probability above 0, or None")
    if stop is not None and not 0 <= stop < vocabulary:
        raise ValueError(f"stop is {stop}; give a token from 0 to {vocabulary - 1}, or None")
    if isinstance(generator, Sequence) and len(generator) != rows:
        raise ValueError(
            f"there are {len(generator)} generators for {rows} rows; give one for each"
        )


def _end(row: Tensor, start: int, stop: int | None) -> int:
    """Where a row ends: after the first `stop` among what was added, if there is one."""
    stops = (row[start:] == stop).nonzero() if stop is not None else row[:0]
    return start + int(stops[0]) + 1 if len(stops) else len(row)
