"""How fast structured feed-forward layers are, timed side by side with the dense ones.

``grid`` lists what the experiment ``structured-ffn-speed`` times at a profile, ``run`` times one of
it and returns its record, ``rows`` makes a table of records. A time means little by itself, so
every run times its layer together with what it replaces, turn and turn about, and the record holds
the ratios; the seeds are repetitions of the whole measurement, and an interval over them is the
noise of timing. The chapters ``book/structured-ffn/01-cost`` and
``book/structured-ffn/04-decoding`` show the results.
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from feedforward.layers.cost import count
from feedforward.lm.model import STRUCTURED, FeedForward
from feedforward.profiles import get_profile, resolve_device, unknown
from feedforward.records import Provenance, Record
from feedforward.timing import PASSES, interleaved, threads
from feedforward.training import seed_everything

EXPERIMENT = "structured-ffn-speed"

#: The layers that are timed: a kind of structured layer, and its share of the dense parameters in
#: percent as the paper names it (62.5 and 31.25 exactly, or a little less).
LAYERS = {f"{kind}-{percent}": (kind, percent) for kind in STRUCTURED for percent in (63, 32)}

_DTYPES = ("float32", "bfloat16", "float16")


# --- what the paper printed ---------------------------------------------------------------------


class PublishedSpeed(NamedTuple):
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
        _check_timing(self.dtype, self.threads, self.rounds, self.seconds)
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
    # left out where a bar is wanted, so that TQDM_DISABLE has its say
    silent = {} if progress else {"disable": True}
    speed: dict[str, dict] = {name: {} for name in PASSES}
    microseconds: dict[str, dict] = {arm: {name: {} for name in PASSES} for arm in arms}
    bound, modules, built = {}, {}, None
    bar = tqdm(
        list(_cells(config)),
        desc=f"{config.variant}, seed {config.seed}",
        unit="cell",
        leave=False,
        **silent,
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


# --- the grid, one run, and a table -------------------------------------------------------------

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


def grid(part: str, profile: str) -> dict[str, SpeedConfig]:
    """What is timed at a profile, by variant, all with seed 0.

    Each of `LAYERS` against the dense layer, over widths and tokens in flight.

    Raises:
        ValueError: When the part or the profile is unknown, or the part has no such profile.
    """
    if part != EXPERIMENT:
        raise ValueError(unknown("part", part, (EXPERIMENT,)))
    name = get_profile(profile).name
    if name not in _SETTINGS:
        raise ValueError(f"{part} has no profile {name!r}: it has {', '.join(_SETTINGS)}")
    return {variant: SpeedConfig(variant, **_SETTINGS[name]) for variant in LAYERS}


def run(
    config: SpeedConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> Record:
    """Time what `config` says on a machine that has nothing else to do.

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
    """
    device, start = resolve_device(str(device)), time.perf_counter()
    seed_everything(config.seed)
    with threads(config.threads):
        metrics = _time_layers(config, device, progress)
        provenance = Provenance.here(seconds=time.perf_counter() - start, device=device)
    return Record.of(config, metrics=metrics, provenance=provenance)


def rows(records: Record | Iterable[Record]) -> list[dict[str, Any]]:
    """A table of the layers' times: one row for each record, pass, width and number of tokens.

    Args:
        records: Of runs of `SpeedConfig`; others are left out.

    Returns:
        Rows with ``variant``, ``seed``, ``pass``, ``width``, ``tokens``, ``speed`` (over dense),
        ``bound`` (what the FLOPs allow), ``microseconds`` and ``dense microseconds`` (medians).
    """
    records = [records] if isinstance(records, Record) else records
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
        for record in records
        if "speed" in record.metrics
        for name, widths in record.metrics["speed"].items()
        for width, cells in widths.items()
        for tokens, speed in cells.items()
    ]


# --- checks -------------------------------------------------------------------------------------


def _check_timing(dtype: str, threads: int, rounds: int, seconds: float) -> None:
    if dtype not in _DTYPES:
        raise ValueError(unknown("dtype", dtype, _DTYPES))
    if threads < 1 or rounds < 3 or not seconds > 0:
        raise ValueError(
            f"threads {threads}, rounds {rounds} and seconds {seconds}: give at least 1 thread and "
            "3 rounds, and a positive time"
        )


def _check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sizes)
    if not sizes or not whole or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{name} is {sizes!r}; give rising whole numbers from 1")
