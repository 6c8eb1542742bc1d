"""How fast structured feed-forward layers are, and models with them: side by side with dense ones.

``grid`` lists what the experiment ``structured-ffn-speed`` times at a profile, ``run`` times one of
it and returns its record, ``layer_rows`` and ``decoding_rows`` make tables of records. A time means
little by itself, so every run times its layer or model together with what it replaces, turn and
turn about, and the record holds the ratios. The seeds are repetitions of the whole measurement, and
an interval over them is the noise of timing. The chapters
``book/structured-ffn/01-cost-and-speed`` and ``book/structured-ffn/04-decoding`` show the results.
"""

import copy
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from feedforward.layers.cost import count
from feedforward.lm.decoding import compare_throughput, premerge_decoder
from feedforward.lm.model import STRUCTURED, Decoder, DecoderConfig, FeedForward, paper_config
from feedforward.profiles import get_profile, resolve_device, unknown
from feedforward.records import Provenance, Record
from feedforward.surgery import premerge
from feedforward.timing import PASSES, interleaved, threads
from feedforward.training import seed_everything

EXPERIMENT = "structured-ffn-speed"

#: The layers that are timed: a kind of structured layer, and its share of the dense parameters in
#: percent as the paper names it (62.5 and 31.25 exactly, or a little less).
LAYERS = {f"{kind}-{percent}": (kind, percent) for kind in STRUCTURED for percent in (63, 32)}

_DTYPES = ("float32", "bfloat16", "float16")


# --- what the paper printed ---------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedSpeed:
    """A speed-up over dense that the paper gives, on an A100 in bfloat16.

    Attributes:
        variant: the layer, as in `LAYERS`.
        width: H of the feed-forward layer H -> 4H -> H; None where it is not known to us.
        tokens: in flight.
        low: the speed-up, or the lower end where a range is given.
        high: the speed-up, or the upper end.
        mark: where the number was read, one of ``feedforward.claims.MARKS``.
    """

    variant: str
    width: int | None
    tokens: int
    low: float
    high: float
    mark: str


#: Latency of feed-forward layers in arXiv 2406.16450; its gains begin near width 1536.
PUBLISHED_SPEED = (
    PublishedSpeed("lowrank-63", None, 30_000, 1.4, 1.4, "text"),
    PublishedSpeed("lowrank-32", None, 30_000, 2.5, 2.6, "text"),
    PublishedSpeed("blockdense-63", None, 30_000, 1.4, 1.4, "text"),
    PublishedSpeed("blockdense-32", None, 30_000, 2.5, 2.6, "text"),
    PublishedSpeed("blockshuffle-63", None, 30_000, 1.1, 1.1, "text"),
    PublishedSpeed("blockshuffle-32", None, 30_000, 2.0, 2.0, "text"),
    PublishedSpeed("lowrank-32", 5120, 2048, 2.63, 2.63, "text"),
    PublishedSpeed("blockdense-32", 6144, 1536, 2.81, 2.81, "text"),
)


@dataclass(frozen=True)
class PublishedThroughput:
    """New tokens a second that the paper gives, the most over all batch sizes.

    Attributes:
        variant: ``"dense"``, ``"gqa"`` (grouped queries) or ``"wide-structured"``.
        size: ``"m"`` or ``"l"``, see ``feedforward.lm.model.paper_config``.
        tokens_per_second: of all rows of a batch together.
        mark: where the number was read, one of ``feedforward.claims.MARKS``.
    """

    variant: str
    size: str
    tokens_per_second: int
    mark: str


#: Maximum throughput in arXiv 2406.16450.
PUBLISHED_THROUGHPUT = (
    PublishedThroughput("dense", "m", 30_229, "text"),
    PublishedThroughput("gqa", "m", 84_202, "text"),
    PublishedThroughput("wide-structured", "m", 91_147, "text"),
    PublishedThroughput("dense", "l", 23_351, "text"),
    PublishedThroughput("gqa", "l", 64_737, "text"),
    PublishedThroughput("wide-structured", "l", 75_930, "text"),
)


# --- layers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedConfig:
    """What decides the times of a feed-forward layer next to those of the dense one.

    Args:
        variant: The layer, one of `LAYERS`.
        widths: H of the feed-forward layers H -> 4H -> H.
        tokens: In flight in a forward pass.
        training_tokens: In flight in a forward and backward pass.
        reference: Width and tokens of the forward pass that "speed over dense" is of.
        training_reference: Width and tokens of "training speed over dense".
        dtype: Of weights and tokens: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        threads: Of the processor.
        rounds: In which both have a turn, at most; at least 3.
        seconds: That a cell of the table takes, as long as it has 3 rounds.
        seed: Of weights and tokens; each is a repetition of the measurement.
        experiment: The part of the book.

    Raises:
        ValueError: When the layer or the type is unknown, a number is out of range, or a reference
            is not among what is timed.
    """

    variant: str
    widths: tuple[int, ...]
    tokens: tuple[int, ...]
    training_tokens: tuple[int, ...]
    reference: tuple[int, int]
    training_reference: tuple[int, int]
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 11
    seconds: float = 3.0
    seed: int = 0
    experiment: str = EXPERIMENT

    def __post_init__(self):
        if self.variant not in LAYERS:
            raise ValueError(unknown("layer", self.variant, LAYERS))
        _check_timing(self.dtype, self.threads, self.rounds)
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; give a positive time")
        for name in ("widths", "tokens", "training_tokens"):
            _check_sizes(name, getattr(self, name))
        for name, tokens in (
            ("reference", self.tokens),
            ("training_reference", self.training_tokens),
        ):
            width, number = given = getattr(self, name)
            if width not in self.widths or number not in tokens:
                raise ValueError(
                    f"{name} is {given}; give a width of {self.widths} and tokens of {tokens}"
                )


def feed_forward(
    variant: str,
    width: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> FeedForward:
    """A feed-forward layer H -> 4H -> H of the paper's sizes, to be timed.

    LowRank has the rank H/2 or H/4, BlockShuffle 2 or 4 blocks, BlockDense 2 blocks and the rank
    2H/3 or H/3 where 3 divides H, else 4 blocks and the rank 3H/4 or 3H/8 (arXiv 2406.16450,
    section 4).

    Args:
        variant: ``"dense"`` or one of `LAYERS`.
        width: H.
        device: Where its weights live.
        dtype: Their type.

    Raises:
        ValueError: When there is no such layer, or the width has no such blocks.

    >>> feed_forward("blockdense-32", 768).up
    BlockDense(in_features=768, out_features=3072, rank=256, blocks=2, bias=True, init='gaussian')
    """
    if variant == "dense":
        linear = nn.Linear
    elif variant in LAYERS:
        kind, percent = LAYERS[variant]
        smaller = 1 if percent == 63 else 2
        if kind == "lowrank":
            sizes = {"rank": width // 2 // smaller}
        elif kind == "blockshuffle":
            sizes = {"blocks": 2 * smaller}
        elif width % 3 == 0:
            sizes = {"rank": 2 * width // 3 // smaller, "blocks": 2}
        else:
            sizes = {"rank": 3 * width // 4 // smaller, "blocks": 4}
        # the values do not matter for the time, and a Gaussian start is the quickest
        linear = partial(STRUCTURED[kind], init="gaussian", **sizes)
    else:
        raise ValueError(unknown("layer", variant, ("dense", *LAYERS)))
    return FeedForward(width, 4 * width, linear=partial(linear, device=device, dtype=dtype))


def _cells(config: SpeedConfig) -> Iterator[tuple[int, str, int]]:
    """Width, pass and tokens of everything that is timed."""
    for width in config.widths:
        yield from ((width, "forward", tokens) for tokens in config.tokens)
        yield from ((width, "training", tokens) for tokens in config.training_tokens)


def _time_layers(config: SpeedConfig, device: torch.device, progress: bool) -> dict[str, Any]:
    """The metrics of a layer: nested by pass, width and tokens."""
    dtype, arms = getattr(torch, config.dtype), ("dense", config.variant)
    made = {"device": device, "dtype": dtype}
    speed: dict[str, dict] = {name: {} for name in PASSES}
    microseconds: dict[str, dict] = {arm: {name: {} for name in PASSES} for arm in arms}
    bound, modules, built = {}, {}, None
    bar = tqdm(
        list(_cells(config)),
        desc=f"{config.variant}, seed {config.seed}",
        unit="cell",
        leave=False,
        **_silent(progress),
    )
    for width, name, tokens in bar:
        if built != width:
            modules.clear()  # before the next ones are made: a GPU's memory
            modules |= {arm: feed_forward(arm, width, **made) for arm in arms}
            flops = [count(modules[arm]).flops for arm in arms]
            bound[width], built = flops[0] / flops[1], width
        x = torch.randn(tokens, width, **made)
        gradient = torch.randn_like(x)
        runs = {arm: partial(PASSES[name], modules[arm], x, gradient) for arm in arms}
        times = interleaved(runs, device=device, rounds=config.rounds, seconds=config.seconds)
        for arm, seconds in times.items():
            cell = microseconds[arm][name].setdefault(width, {})
            cell[tokens] = [1e6 * quartile for quartile in statistics.quantiles(seconds, n=4)]
        medians = [statistics.median(times[arm]) for arm in arms]
        speed[name].setdefault(width, {})[tokens] = medians[0] / medians[1]

    def at(name: str, cell: tuple[int, int]) -> float:
        return speed[name][cell[0]][cell[1]]

    return {
        "speed over dense": at("forward", config.reference),
        "training speed over dense": at("training", config.training_reference),
        "speed": speed,
        "bound": bound,
        "microseconds": microseconds,
    }


# --- decoding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodingSpeedConfig:
    """What decides how fast a model generates next to another one.

    Args:
        variant: The model's name.
        model: Its shape.
        against: The name of what it is compared with.
        reference: The shape of that.
        prompt: Tokens of each prompt; with 1 there are always as many tokens in flight as rows.
        length: Tokens to add to each.
        batches: Numbers of rows that are timed.
        at: The number of rows that "speed of decoding" is of; all of `batches` are timed then.
            None: each model's best, and the search ends as that of
            `feedforward.lm.decoding.compare_throughput` does.
        structured: The name of `model` without pre-merge. The variant is then the model with
            pre-merge, its thresholds measured in its own steps
            (`feedforward.lm.decoding.premerge_decoder`). A third form, ``merged``, uses the dense
            product for every step. None: no pre-merge.
        dtype: Of the weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        threads: Of the processor.
        rounds: In which each model has a turn; at least 3.
        seed: Of the weights; each is a repetition of the measurement.
        experiment: The part of the book.

    Raises:
        ValueError: When a name is unknown or given twice, or a number is out of range.
    """

    variant: str
    model: DecoderConfig
    against: str
    reference: DecoderConfig
    prompt: int
    length: int
    batches: tuple[int, ...]
    at: int | None = None
    structured: str | None = None
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 5
    seed: int = 0
    experiment: str = EXPERIMENT

    def __post_init__(self):
        _check_timing(self.dtype, self.threads, self.rounds)
        _check_sizes("batches", self.batches)
        if self.at is not None and self.at not in self.batches:
            raise ValueError(f"at is {self.at}; give one of the batches {self.batches}, or None")
        names = [self.variant, self.against, *(["merged", self.structured] * bool(self.structured))]
        if len(set(names)) < len(names):
            raise ValueError(f"the names {names} are not different; give each model its own")
        if self.structured and self.model.ffn not in STRUCTURED:
            raise ValueError(
                f"pre-merge is of structured layers; ffn is {self.model.ffn!r}: give one of "
                f"{', '.join(STRUCTURED)}, or structured=None"
            )
        longest = min(self.model.context, self.reference.context)
        if min(self.prompt, self.length) < 1 or self.prompt + self.length > longest:
            raise ValueError(
                f"prompt {self.prompt} and length {self.length} must be at least 1, and together "
                f"at most the context of {longest}"
            )


def _decoder(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    if config.ffn in STRUCTURED:
        config = replace(config, init="gaussian")  # the quickest start
    with device:
        return Decoder(config).to(dtype).eval()


def _decoders(config: DecodingSpeedConfig, device: torch.device) -> dict[str, Decoder]:
    """The models that take turns, by name."""
    dtype = getattr(torch, config.dtype)
    models = {config.against: _decoder(config.reference, device, dtype)}
    model = _decoder(config.model, device, dtype)
    if config.structured:
        largest = max(config.batches)
        merged = premerge(copy.deepcopy(model), threshold=largest)
        models |= {config.structured: model, "merged": merged}
        model = premerge_decoder(copy.deepcopy(model), largest=largest)
    return models | {config.variant: model}


def _time_decoding(
    config: DecodingSpeedConfig, device: torch.device, progress: bool
) -> dict[str, Any]:
    """The metrics of a model: nested by model and number of rows."""
    models = _decoders(config, device)
    sizes = {"prompt": config.prompt, "length": config.length, "rounds": config.rounds}
    description = f"{config.variant}, seed {config.seed}"
    # a search decides by itself which batches it tries; for a comparison all are timed
    tries = [config.batches] if config.at is None else [(batch,) for batch in config.batches]
    found = [
        compare_throughput(models, batches=batches, **sizes)
        for batches in tqdm(tries, desc=description, unit="batch", leave=False, **_silent(progress))
    ]
    rates: dict[str, dict[int, float]] = {name: {} for name in models}
    for measured in found:
        for name, throughput in measured.items():
            rates[name] |= throughput.tokens_per_second
    needed = config.at or config.batches[0]
    for name, by_batch in rates.items():
        if needed not in by_batch:
            raise ValueError(
                f"{name} has no room for {needed} rows on {device}; give smaller batches, or a "
                "smaller model"
            )
    most = {name: max(by_batch.values()) for name, by_batch in rates.items()}
    compared = most if config.at is None else {name: rates[name][config.at] for name in models}
    metrics = {
        f"speed of decoding over {config.against}": (
            compared[config.variant] / compared[config.against]
        ),
        "tokens per second": rates,
        "maximum tokens per second": most,
        "best batch": {name: max(rates[name], key=rates[name].get) for name in models},
    }
    if config.structured:
        # layers that the dense product never makes faster stay as they are
        last = models[config.variant].blocks[-1].ffn
        metrics["thresholds"] = {
            name: getattr(layer, "threshold", 0)
            for name, layer in (("up", last.up), ("down", last.down))
        }
    return metrics


# --- the grid, one run, and tables --------------------------------------------------------------

_SETTINGS = {
    "smoke": {
        "widths": (96, 192, 384),
        "tokens": (1, 16, 128),
        "training_tokens": (128,),
        "reference": (384, 128),
        "training_reference": (384, 128),
        "rounds": 3,
    },
    "cpu": {
        "widths": (384, 768, 1536, 2048),
        "tokens": (1, 16, 128, 512, 2048),
        "training_tokens": (128, 512),
        "reference": (1536, 2048),
        "training_reference": (1536, 512),
    },
    "gpu": {
        "widths": (768, 1024, 1536, 2048, 3072, 4096, 5120, 6144),
        "tokens": (1, 16, 128, 512, 1536, 2048, 8192, 30_000),
        "training_tokens": (2048, 30_000),
        "reference": (1536, 30_000),
        "training_reference": (1536, 30_000),
        "dtype": "bfloat16",
        "rounds": 21,
    },
}


def _premerged(dense: DecoderConfig, lowrank: DecoderConfig, **others) -> DecodingSpeedConfig:
    """Pre-merge with as many tokens in flight as rows."""
    names = {"variant": "premerged-32", "structured": "lowrank-32", "against": "dense"}
    return DecodingSpeedConfig(**names, model=lowrank, reference=dense, prompt=1, **others)


def _wide(
    grouped: DecoderConfig, wide: DecoderConfig, suffix: str = "", **others
) -> DecodingSpeedConfig:
    """Wide and structured against grouped queries, each with its best batch."""
    names = {"variant": f"wide-structured{suffix}", "against": "gqa"}
    return DecodingSpeedConfig(**names, model=wide, reference=grouped, **others)


def _decoding(profile: str) -> list[DecodingSpeedConfig]:
    powers = tuple(2**i for i in range(11))
    if profile == "gpu":
        few = {"length": 64, "batches": powers[:8], "at": 16, "dtype": "bfloat16"}
        many = {"prompt": 128, "length": 128, "batches": powers, "dtype": "bfloat16"}
        return [
            _premerged(paper_config("xl"), paper_config("xl-lowrank-32"), **few),
            _wide(paper_config("m-gqa"), paper_config("m-ws"), **many),
            _wide(paper_config("l-gqa"), paper_config("l-ws"), "-l", **many),
        ]
    width, layers, length, batches, at = {
        "smoke": (64, 2, 4, (1, 4), 4),
        "cpu": (768, 4, 16, (1, 4, 16, 64), 16),
    }[profile]
    sizes = {
        "width": width,
        "layers": layers,
        "vocabulary": 2048,
        "context": 2 * length,
        "activation": "gelu_tanh",
    }
    # in the proportions of the paper's models of size m
    grouped = sizes | {"hidden": 19 * width // 4, "kv_heads": 2, "head_width": width // 8}
    ways = {"length": length, "batches": batches}
    return [
        _premerged(
            DecoderConfig(**sizes, heads=8),
            DecoderConfig(**sizes, heads=8, ffn="lowrank", rank=width // 4),
            **ways,
            at=at,
        ),
        _wide(
            DecoderConfig(**grouped, heads=8),
            DecoderConfig(**grouped, heads=4, ffn="lowrank", rank=width // 2),
            **ways,
            prompt=length,
        ),
    ]


def grid(part: str, profile: str) -> dict[str, SpeedConfig | DecodingSpeedConfig]:
    """What is timed at a profile, by variant, all with seed 0.

    Each of `LAYERS` against the dense layer, over widths and tokens in flight. ``premerged-32``:
    generation with few rows, LowRank at 32 % with and without pre-merge against dense.
    ``wide-structured``: the best throughput against that of grouped queries, at the sizes of the
    paper's m; with ``-l`` at those of its l, on a GPU only.

    Raises:
        ValueError: When the part or the profile is unknown, or the part has no such profile.
    """
    if part != EXPERIMENT:
        raise ValueError(unknown("part", part, (EXPERIMENT,)))
    name = get_profile(profile).name
    if name not in _SETTINGS:
        raise ValueError(f"{part} has no profile {name!r}: it has {', '.join(_SETTINGS)}")
    layers = [SpeedConfig(variant, **_SETTINGS[name]) for variant in LAYERS]
    return {config.variant: config for config in (*layers, *_decoding(name))}


def run(
    config: SpeedConfig | DecodingSpeedConfig,
    *,
    progress: bool = True,
    device: str | torch.device = "auto",
) -> Record:
    """Time what `config` says, on a machine that has nothing else to do.

    On one thread of a processor the times are of processor time, on a GPU they are taken between
    events; see `feedforward.timing.stopwatch`.

    Args:
        config: What to time.
        progress: Show a bar.
        device: Where.

    Returns:
        The record. Of a layer, ``speed`` is the median time of the dense layer over that of this
        one, by pass (``forward`` or ``training``, which is forward and backward), width and tokens;
        ``bound`` is the ratio of their FLOPs by width, ``microseconds`` has the quartiles of the
        times by layer, pass, width and tokens. ``speed over dense`` and ``training speed over
        dense`` are those of the references.

        Of generation, ``tokens per second`` is by model and number of rows, ``speed of decoding
        over`` the reference is of the number of rows that the configuration names or of each
        model's best, and ``thresholds`` has the tokens up to which the dense product of each map
        (``up``, ``down``) is used.

    Raises:
        ValueError: When the device has no room for the number of rows that counts.
    """
    device, start = resolve_device(str(device)), time.perf_counter()
    seed_everything(config.seed)
    measure = _time_layers if isinstance(config, SpeedConfig) else _time_decoding
    with threads(config.threads):
        metrics = measure(config, device, progress)
        provenance = Provenance.here(seconds=time.perf_counter() - start, device=device)
    return Record.of(config, metrics=metrics, provenance=provenance)


def layer_rows(records: Record | Iterable[Record]) -> list[dict[str, Any]]:
    """A table of the layers' times: one row for each record, pass, width and number of tokens.

    Args:
        records: Of the experiment; those of generation are left out.

    Returns:
        Rows with ``variant``, ``seed``, ``pass``, ``width``, ``tokens``, ``speed`` (over dense),
        ``bound`` (what the FLOPs allow), ``microseconds`` and ``dense microseconds`` (medians).
    """
    return [
        {
            "variant": record.variant,
            "seed": record.seed,
            "pass": name,
            "width": int(width),
            "tokens": int(tokens),
            "speed": speed,
            "bound": record.metrics["bound"][width],
            "microseconds": record.metrics["microseconds"][record.variant][name][width][tokens][1],
            "dense microseconds": record.metrics["microseconds"]["dense"][name][width][tokens][1],
        }
        for record in _several(records)
        for name, widths in record.metrics.get("speed", {}).items()
        for width, cells in widths.items()
        for tokens, speed in cells.items()
    ]


def decoding_rows(records: Record | Iterable[Record]) -> list[dict[str, Any]]:
    """A table of generation: one row for each record, model and number of rows in a batch.

    Args:
        records: Of the experiment; those of layers are left out.

    Returns:
        Rows with ``variant``, ``seed``, ``model``, ``batch``, ``tokens per second``, and ``speed``
        over the reference with the same batch, None where the reference had no such batch.
    """
    table = []
    for record in _several(records):
        rates = record.metrics.get("tokens per second", {})
        for model, by_batch in rates.items():
            for batch, rate in by_batch.items():
                reference = rates[record.config["against"]].get(batch)
                table.append(
                    {
                        "variant": record.variant,
                        "seed": record.seed,
                        "model": model,
                        "batch": int(batch),
                        "tokens per second": rate,
                        "speed": rate / reference if reference else None,
                    }
                )
    return table


def _several(records: Record | Iterable[Record]) -> Iterable[Record]:
    return [records] if isinstance(records, Record) else records


def _silent(progress: bool) -> dict[str, bool]:
    """What silences a bar; left out where one is wanted, so that TQDM_DISABLE has its say."""
    return {} if progress else {"disable": True}


# --- checks -------------------------------------------------------------------------------------


def _check_timing(dtype: str, threads: int, rounds: int) -> None:
    if dtype not in _DTYPES:
        raise ValueError(unknown("dtype", dtype, _DTYPES))
    if threads < 1 or rounds < 3:
        raise ValueError(
            f"threads is {threads} and rounds {rounds}; give at least 1 thread and 3 rounds"
        )


def _check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sizes)
    if not sizes or not whole or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{name} is {sizes!r}; give rising whole numbers from 1")
