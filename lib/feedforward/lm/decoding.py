"""Generation of text: prefill, step by step with a cache, drawing, and the throughput of it all."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedforward.lm.model import Decoder, KeyValueCache
from feedforward.surgery import premerge
from feedforward.timing import interleaved

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
        model: The decoder; it runs in eval mode, and all its modules keep the modes they have.
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
        ValueError: When a prompt is empty, a number is out of range or no whole one, prompt and new
            tokens are more than the model's context, or the model gives scores as `sample` refuses
            them.

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
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
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
        _set_modes(modes)
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
        top_k: Draw among this many most probable tokens, which 1 makes the most probable one; None:
            among all.
        top_p: Draw among the fewest most probable tokens that have this probability together
            (nucleus sampling, arXiv 1904.09751), after `top_k`; None: among all.
        generator: Source of the draws on any device, or one for each row, whose tokens then do not
            depend on its company; None: PyTorch's own.

    Returns:
        (B,) int64.

    Raises:
        ValueError: When the logits are not (B, vocabulary), the largest of a row is not finite, a
            number is out of range, or there are not as many generators as rows.

    >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0)
    tensor([1])
    """
    if logits.dim() != 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; give (B, vocabulary), a single row as "
            "logits[None]"
        )
    _check_drawing(logits.shape[0], temperature, top_k, top_p, generator)
    if temperature == 0 or top_k == 1:
        largest, chosen = logits.max(-1)
        _check_scores(largest)
        return chosen
    logits = logits.float()
    if top_k is not None and top_k < logits.shape[-1]:
        # by place and not by score, since several may have the least score
        least = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, least.indices, least.values)
    largest = logits.amax(-1, keepdim=True)
    _check_scores(largest)
    # the largest is 0, so that no temperature is too small that is a number in float32
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - largest) / temperature
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, tokens = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = probabilities.scatter(-1, tokens, ordered)
    # of exponential clocks that run at these rates, each is the first to ring with its probability
    return (probabilities / _exponential(probabilities, generator)).argmax(-1)


def _check_scores(largest: Tensor) -> None:
    """Refuse rows with an infinite largest score, or NaN, as it is where any score is."""
    # in decoding the sum has to do; where it is infinite, the numbers may still be finite
    if math.isfinite(largest.sum().item()) or largest.isfinite().all():
        return
    row = int((~largest.isfinite()).flatten().nonzero()[0])
    raise ValueError(
        f"the largest of the logits in row {row} is {largest.flatten()[row].item()}; give rows "
        "whose largest is finite: a model's is not where weights or activations are NaN or too "
        "large"
    )


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


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Bring modules back to the modes they had, parents first."""
    for module, training in modes:
        if module.training != training:
            module.train(training)


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
    if not isinstance(length, int) or length < 0:
        raise ValueError(f"length is {length}; give how many tokens to add, a whole number from 0")
    if start + length > context:
        raise ValueError(
            f"a prompt of {start} tokens and {length} new ones are more than the context of "
            f"{context}: add at most {max(0, context - start)}, cut the prompt, or build the model "
            "with a longer context"
        )
    if stop is not None and not (isinstance(stop, int) and 0 <= stop < vocabulary):
        raise ValueError(f"stop is {stop}; give a token from 0 to {vocabulary - 1}, or None")
    _check_drawing(rows, temperature, top_k, top_p, generator)


def _check_drawing(rows, temperature, top_k, top_p, generator) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give 0 (greedy) or more")
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise ValueError(f"top_k is {top_k}; give a whole number from 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; give a probability above 0, or None")
    if isinstance(generator, Sequence) and len(generator) != rows:
        raise ValueError(
            f"there are {len(generator)} generators for {rows} rows; give one for each"
        )


def _end(row: Tensor, start: int, stop: int | None) -> int:
    """Where a row ends: after the first `stop` among what was added, if there is one."""
    stops = (row[start:] == stop).nonzero() if stop is not None else row[:0]
    return start + int(stops[0]) + 1 if len(stops) else len(row)


def premerge_decoder(model: Decoder, *, largest: int = 64) -> Decoder:
    """Pre-merge the structured layers of a decoder, with thresholds from its own steps.

    Which way is faster depends on what else is read in a step and pushes weights out of the
    processor's caches, so both are timed in generation itself. A layer whose dense weight does not
    pay stays as it is. See ``feedforward.surgery.premerge``. Explained in
    ``book/structured-ffn/04-decoding``.

    Args:
        model: The decoder, in eval mode and on the device that it will run on; it is changed.
        largest: The most rows that it will generate at once; with more the dense weight is not
            used.

    Returns:
        The decoder.

    Raises:
        ValueError: When it has no structured layers, or is in training mode.
    """

    def run(rows: int) -> None:
        # prompts of one token: as many tokens in flight as rows, always
        first = torch.zeros(rows, 1, dtype=torch.long)
        generate(model, first, min(4, model.config.context - 1), temperature=0)

    return premerge(model, run=run, largest=largest)


# --- throughput ---------------------------------------------------------------------------------

#: Batch sizes that are tried: powers of two up to 1024.
BATCHES = tuple(2**i for i in range(11))

# a larger batch that is slower than the best one by more than this share ends the search
_FALL = 0.05


@dataclass(frozen=True)
class Throughput:
    """How many tokens a second a model generates, by batch size.

    Attributes:
        prompt: Tokens of each prompt.
        length: Tokens added to each.
        seconds: Median time of a whole generation, prefill included, by batch size.
        stopped: Why no larger batch was tried: ``"memory"`` (it had no room), ``"slower"``, or
            ``"batches"`` (there was none).
    """

    prompt: int
    length: int
    seconds: dict[int, float]
    stopped: str

    @property
    def tokens_per_second(self) -> dict[int, float]:
        """New tokens of all rows a second, by batch size."""
        return {batch: batch * self.length / time for batch, time in self.seconds.items()}

    @property
    def best(self) -> int | None:
        """The batch size with the most tokens a second; None where not even one row had room."""
        return max(self.seconds, key=self.tokens_per_second.get, default=None)

    @property
    def maximum(self) -> float:
        """The tokens a second of the best batch size; 0 where there is none."""
        return max(self.tokens_per_second.values(), default=0.0)


def max_throughput(
    model: Decoder,
    *,
    prompt: int,
    length: int,
    batches: Sequence[int] = BATCHES,
    rounds: int = 3,
) -> Throughput:
    """Search the batch size with which a model generates most tokens a second.

    See `compare_throughput`, which compares models with each other.

    >>> from feedforward.lm.model import DecoderConfig
    >>> model = Decoder(DecoderConfig(vocabulary=11, width=16, layers=2, heads=2))
    >>> found = max_throughput(model, prompt=4, length=2, batches=(1, 2))
    >>> found.best in found.seconds and found.maximum > 0
    True
    """
    measured = compare_throughput(
        {"model": model}, prompt=prompt, length=length, batches=batches, rounds=rounds
    )
    return measured["model"]


def compare_throughput(
    models: Mapping[str, Decoder],
    *,
    prompt: int,
    length: int,
    batches: Sequence[int] = BATCHES,
    rounds: int = 3,
) -> dict[str, Throughput]:
    """Search the batch size with which each of several models generates most tokens a second.

    With each batch size the models generate turn and turn about, so that whatever else the machine
    does meets all of them alike. A model is out of the search when it runs out of memory, or when a
    larger batch gives more than 5 % fewer tokens a second than its best one. Prompts are random
    tokens, and decoding is greedy. This is the maximum throughput of arXiv 2406.16450, section 4;
    explained in ``book/structured-ffn/04-decoding``.

    Args:
        models: Models by name, on one device, whose memory they share.
        prompt: Tokens of each prompt.
        length: Tokens to add to each.
        batches: The batch sizes to try, in rising order.
        rounds: In which each model has its turn, at least 3; their median counts.

    Returns:
        What was measured of each model.

    Raises:
        ValueError: When there is no model, they are on several devices, the batch sizes do not
            rise, or prompt and new tokens are more than a model's context.
    """
    devices = {model.embedding.weight.device for model in models.values()}
    if len(devices) != 1:
        found = ", ".join(map(str, devices)) or "none"
        raise ValueError(f"models are on {found}; give one model or more, on one device")
    if min(prompt, length) < 1 or rounds < 3:
        raise ValueError(
            f"prompt {prompt} and length {length} must be at least 1, rounds {rounds} at least 3"
        )
    if not batches or batches[0] < 1 or any(b <= a for a, b in pairwise(batches)):
        raise ValueError(f"batches are {batches}; give sizes from 1 that rise")
    device, running = devices.pop(), dict(models)
    seconds: dict[str, dict[int, float]] = {name: {} for name in models}
    stopped = dict.fromkeys(models, "batches")
    for batch in batches:
        runs = {}
        for name, model in list(running.items()):
            tokens = _random_prompts(model, batch, prompt)
            run = partial(generate, model, tokens, length, temperature=0)
            if _fits(run, device):
                runs[name] = run
            else:
                stopped[name] = "memory"
                del running[name]
        if not runs:
            break
        for name, taken in interleaved(runs, device=device, rounds=rounds).items():
            seconds[name][batch] = statistics.median(taken)
            rates = [size / time for size, time in seconds[name].items()]
            if rates[-1] < (1 - _FALL) * max(rates):
                stopped[name] = "slower"
                del running[name]
    return {name: Throughput(prompt, length, seconds[name], stopped[name]) for name in models}


def _random_prompts(model: Decoder, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocabulary, (batch, length), generator=generator)
    return tokens.to(model.embedding.weight.device)


def _fits(run: Callable[[], object], device: torch.device) -> bool:
    """Whether there is memory enough for it."""
    try:
        run()
        return True
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what the CPU says
            raise
    # here nothing holds the tensors of the failed run any more
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False
