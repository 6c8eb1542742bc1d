"""Scaling curves: loss against training FLOPs, how their slopes differ, and whether they cross.

The same few functions work on the numbers that arXiv 2406.16450 printed (`PUBLISHED`) and on our
own records (`Points.of`). An interval is always one of 95 %. Explained in
``book/structured-ffn/05-scaling``.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtri, stdtrit

from feedforward.layers.cost import PAPER_SHAPES, count
from feedforward.records import Record

# both tails of an interval together hold the other 5 %
_LOW, _HIGH = 0.025, 0.975


# --- points -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Points:
    """The runs of one arm at several sizes. Runs of equal FLOPs are of one size.

    Explained in ``book/structured-ffn/05-scaling``.

    Args:
        flops: (n,) of the whole training.
        loss: (n,) in nats per token.
        parameters: (n,) of the model, where known.
        seeds: (n,) whole numbers, where there are several runs of one size.
        errors: (n,) in nats: a loss read off a picture lies within this of the true one.

    Raises:
        ValueError: other shapes, numbers that are not finite, FLOPs or parameters that are not
            positive, negative errors, seeds that are no whole numbers or occur twice at one size.

    >>> Points(flops=[1e18, 1e19], loss=[3.2, 2.9]).sizes
    2
    """

    flops: np.ndarray
    loss: np.ndarray
    parameters: np.ndarray | None = None
    seeds: np.ndarray | None = None
    errors: np.ndarray | None = None

    def __post_init__(self):
        flops, loss = _checked(self.flops, self.loss)
        object.__setattr__(self, "flops", flops)
        object.__setattr__(self, "loss", loss)
        for name in ("parameters", "seeds", "errors"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _finite(name, value, len(flops)))
        if self.parameters is not None and (self.parameters <= 0).any():
            raise ValueError(f"parameters are {self.parameters}; they must be positive")
        if self.errors is not None and (self.errors < 0).any():
            raise ValueError(f"errors are {self.errors}; they are half widths, not below 0")
        if self.seeds is not None:
            if (self.seeds != np.round(self.seeds)).any():
                raise ValueError(f"seeds are {self.seeds}; give whole numbers")
            pairs = np.stack([self.flops, self.seeds])
            if np.unique(pairs, axis=1).shape[1] < len(flops):
                raise ValueError(
                    "a seed occurs twice at one size (equal FLOPs); keep one run of it"
                )

    @classmethod
    def of(cls, records: Iterable[Record], *, loss: str = "test loss") -> "Points":
        """The points of recorded runs, in the order of the records.

        Args:
            records: of one arm at several sizes, with the metrics ``training FLOPs``,
                ``parameters`` and that of the loss.
            loss: the metric, in nats per token.

        Raises:
            ValueError: no record, or one that lacks such a number.
        """
        records = list(records)
        if not records:
            raise ValueError("no records; give the runs of one arm at two sizes or more")
        names = ("training FLOPs", loss, "parameters")
        for record in records:
            for name in names:
                if not isinstance(record.metrics.get(name), int | float):
                    raise ValueError(
                        f"record {record.experiment}/{record.variant}, seed {record.seed}, has no "
                        f"number {name!r} among its metrics"
                    )
        columns = (np.array([record.metrics[name] for record in records]) for name in names)
        return cls(*columns, seeds=np.array([record.seed for record in records]))

    @property
    def sizes(self) -> int:
        """How many sizes there are."""
        return len(np.unique(self.flops))


def _finite(name: str, values: ArrayLike, length: int | None = None) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or length not in (None, len(array)):
        wanted = "one number a run" if length is None else f"{length} numbers, one a run"
        raise ValueError(f"{name} has the shape {array.shape}; give {wanted}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} holds {array[~np.isfinite(array)][0]}; every number must be finite"
        )
    return array


def _checked(flops: ArrayLike, loss: ArrayLike, *, sizes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    flops = _finite("flops", flops)
    loss = _finite("loss", loss, len(flops))
    if (flops <= 0).any():
        raise ValueError(f"flops holds {flops.min():g}; a curve over log FLOPs needs positive ones")
    if (found := len(np.unique(flops))) < sizes:
        raise ValueError(f"{found} distinct FLOPs in {len(flops)} runs; give {sizes} sizes or more")
    return flops, loss


# --- what the paper printed ---------------------------------------------------------------------

PAPER_TOKENS: Mapping[str, float] = MappingProxyType(
    {"s": 2.2e9, "m": 6.7e9, "l": 14.58e9, "xl": 25.5e9}
)
"""Training tokens of each size of arXiv 2406.16450, 20 for each parameter of the dense model."""


@dataclass(frozen=True)
class Published:
    """One perplexity of arXiv 2406.16450, a single run.

    Explained in ``book/structured-ffn/05-scaling``.

    Args:
        variant: ``dense``, ``lowrank-63``, ... as our own arms are named; ``-guided`` and
            ``-equal-flops`` are the arms that spend the dense model's FLOPs, on self-guided
            training and on more tokens.
        size: ``s``, ``m``, ``l`` or ``xl``.
        perplexity: as printed, or read off the picture.
        error: the true one lies within this: half of the last printed digit, or of the reading.
        mark: ``text`` or ``digitised``, as claims mark their numbers.
    """

    variant: str
    size: str
    perplexity: float
    error: float
    mark: str

    @property
    def loss(self) -> float:
        """In nats per token."""
        return math.log(self.perplexity)

    @property
    def parameters(self) -> int:
        """Of the model, counted."""
        kind = self.variant.removesuffix("-guided").removesuffix("-equal-flops")
        return count(self._shape(kind)).parameters

    @property
    def flops(self) -> float:
        """Of the whole training, counted; of an arm at equal FLOPs those of the dense model."""
        equal = self.variant.endswith(("-guided", "-equal-flops"))
        shape = self._shape("dense" if equal else self.variant)
        return count(shape).training_flops * PAPER_TOKENS[self.size]

    def _shape(self, kind: str):
        return PAPER_SHAPES[self.size if kind == "dense" else f"{self.size}-{kind}"]


PERPLEXITIES: Mapping[str, Mapping[str, tuple[float, str]]] = MappingProxyType(
    {
        "dense": {"s": (25.97, "D"), "m": (18.29, "I"), "l": (14.29, "I"), "xl": (12.46, "I")},
        "lowrank-63": {"s": (27.16, "D"), "m": (19.14, "D"), "l": (14.81, "D"), "xl": (12.86, "I")},
        "lowrank-32": {"s": (29.22, "D"), "m": (20.59, "D"), "l": (15.68, "D"), "xl": (13.55, "I")},
        "blockdense-63": {"xl": (12.97, "I")},
        "blockdense-32": {"s": (29.17, "T"), "xl": (13.74, "I")},
        "blockshuffle-63": {"xl": (12.98, "I")},
        "blockshuffle-32": {"s": (29.95, "T"), "m": (21.12, "T"), "xl": (13.81, "I")},
        "lowrank-32-guided": {
            "s": (26.75, "D"), "m": (18.6, "D"), "l": (14.7, "D"), "xl": (12.87, "D")
        },
        "lowrank-32-equal-flops": {
            "s": (26.9, "D"), "m": (18.85, "D"), "l": (14.75, "D"), "xl": (12.75, "D")
        },
        "gqa": {"m": (18.23, "I"), "l": (14.40, "I")},
        "wide-structured": {"m": (17.89, "I"), "l": (14.27, "I")},
        "wide-structured-guided": {"m": (18.04, "I"), "l": (14.40, "I")},
    }
)  # fmt: skip
"""Validation perplexities of arXiv 2406.16450 by variant and size, and where each was read: ``T``
in the text, ``I`` in a picture of a table, ``D`` digitised from a plot.

:meta hide-value:
"""


def _published(variant: str, size: str, perplexity: float, mark: str) -> Published:
    if mark != "D":  # half of the last printed digit
        return Published(variant, size, perplexity, 0.005, "text")
    # what a picture was read to; that of the arms at equal FLOPs is coarser
    error = 0.05 if variant.endswith(("-guided", "-equal-flops")) else 0.02
    return Published(variant, size, perplexity, error, "digitised")


PUBLISHED: tuple[Published, ...] = tuple(
    _published(variant, size, *printed)
    for variant, row in PERPLEXITIES.items()
    if not variant.startswith(("gqa", "wide-structured"))  # the attention is another there
    for size, printed in row.items()
)
"""The perplexities of arXiv 2406.16450, in text, tables and pictures, arm by arm.

:meta hide-value:
"""


def published_points(variant: str) -> Points:
    """The published runs of one arm, each with the error it was read with.

    Explained in ``book/structured-ffn/05-scaling``.

    Args:
        variant: an arm of `PUBLISHED` with two sizes or more.

    Raises:
        ValueError: another name, or an arm with a single size.

    >>> (published_points("lowrank-32").flops / 1e18).round(2)
    array([  1.22,  10.15,  44.24, 129.07])
    """
    rows = [point for point in PUBLISHED if point.variant == variant]
    if not rows:
        arms = ", ".join(dict.fromkeys(point.variant for point in PUBLISHED))
        raise ValueError(f"no published arm {variant!r}; choose one of {arms}")
    return Points(
        flops=[point.flops for point in rows],
        loss=[point.loss for point in rows],
        parameters=[point.parameters for point in rows],
        errors=[point.error / point.perplexity for point in rows],
    )


# --- fits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LineFit:
    """A straight line of loss over log FLOPs, as arXiv 2406.16450 draws it.

    Explained in ``book/structured-ffn/05-scaling``.

    Attributes:
        intercept: in nats, at one FLOP.
        slope: in nats per decade of FLOPs.
        low: where the interval of the slope begins, by Student's t, which takes the residuals for
            independent noise; NaN where two runs leave none.
        high: where it ends.
        residual_sd: standard deviation of the runs about the line, in nats; NaN likewise.
    """

    intercept: float
    slope: float
    low: float
    high: float
    residual_sd: float

    def predict(self, flops: ArrayLike) -> np.ndarray:
        """The loss on the line at these FLOPs, in nats."""
        return self.intercept + self.slope * np.log10(flops)


def fit_line(flops: ArrayLike, loss: ArrayLike) -> LineFit:
    """Fit ``loss = intercept + slope * log10(flops)`` by least squares.

    Explained in ``book/structured-ffn/05-scaling``.

    Args:
        flops: (n,) of the whole training.
        loss: (n,) in nats.

    Raises:
        ValueError: numbers that are not finite, FLOPs that are not positive, or fewer than two
            distinct ones.

    >>> line = fit_line([1e18, 1e19, 1e20], [3.3, 2.9, 2.5])
    >>> round(line.slope, 3), line.predict([1e21]).round(3)
    (-0.4, array([2.1]))
    """
    flops, loss = _checked(flops, loss)
    x = np.log10(flops)
    intercept, slope = map(float, least_squares(x, loss))
    sd, freedom = _scatter(x, loss)
    half = sd * float(stdtrit(freedom, _HIGH)) / math.sqrt(len(x) * x.var()) if freedom else sd
    return LineFit(intercept, slope, slope - half, slope + half, sd)


def least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The straight line through points with the least sum of squares.

    Explained in ``book/structured-ffn/05-scaling``.

    Args:
        x: (n,), not all equal.
        y: (..., n): one line for each row.

    Returns:
        Intercept and slope, (..., 2).

    >>> least_squares(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0]))
    array([1., 2.])
    """
    slope = y @ _weights(x)
    return np.stack([y.mean(-1) - slope * x.mean(), slope], axis=-1)


def _weights(x: np.ndarray) -> np.ndarray:
    """What each y adds to the slope, (n,)."""
    centred = x - x.mean()
    return centred / (centred @ centred)


def _residuals(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    intercept, slope = least_squares(x, y)
    return y - intercept - slope * x


def _scatter(x: np.ndarray, y: np.ndarray) -> tuple[float, int]:
    """Standard deviation about the line, and its degrees of freedom."""
    residuals, freedom = _residuals(x, y), len(x) - 2
    return (math.sqrt(residuals @ residuals / freedom) if freedom else math.nan), freedom


@dataclass(frozen=True)
class PowerFit:
    """A power law with an offset: the loss that no amount of FLOPs removes.

    Explained in ``book/structured-ffn/05-scaling``.

    Attributes:
        offset: E in nats, not below 0.
        scale: A, in nats at one FLOP.
        exponent: alpha.
        low: the smallest exponent that an F-test does not reject, the other two numbers chosen
            anew for it; 0 where there is none, NaN where three runs leave nothing to test with.
        high: the largest one; infinite where there is none.
        residual_sd: standard deviation of the runs about the curve, in nats; NaN likewise.
        identified: whether the runs tell offset and exponent apart from others.
        reason: why they do, or do not.
    """

    offset: float
    scale: float
    exponent: float
    low: float
    high: float
    residual_sd: float
    identified: bool
    reason: str

    def predict(self, flops: ArrayLike) -> np.ndarray:
        """The loss on the curve at these FLOPs, in nats."""
        return self.offset + self.scale * np.asarray(flops, dtype=float) ** -self.exponent


# logarithms of exponents; those of measured laws lie well inside
_STARTS = np.log(np.geomspace(1e-3, 3.0, 200))


def fit_power(flops: ArrayLike, loss: ArrayLike) -> PowerFit:
    """Fit ``loss = E + A * flops ** -alpha`` with ``E >= 0`` by least squares.

    A power law plus a constant, as Henighan et al. 2020 (arXiv 2010.14701) fit it. For a given
    alpha the best E and A have a closed form (variable projection, Golub and Pereyra 1973), so one
    number is searched, in every valley between 200 starts. Hoffmann et al. 2022 (arXiv 2203.15556,
    approach 3) fit hundreds of runs with a Huber loss instead; on a handful of sizes its curve
    passes through three of them and ignores the rest. Explained in
    ``book/structured-ffn/05-scaling``.

    Args:
        flops: (n,) of the whole training.
        loss: (n,) in nats, positive.

    Returns:
        The fit. It is not identified with fewer than four sizes, or when a law without an offset
        or one of any exponent fits the runs as well.

    Raises:
        ValueError: numbers that are not finite or not positive, or fewer than three distinct FLOPs.

    >>> c = np.array([1e17, 1e18, 1e19, 1e20])
    >>> fit = fit_power(c, 1.5 + 500 * c**-0.15)
    >>> round(fit.offset, 4), round(fit.scale, 1), round(fit.exponent, 4), fit.identified
    (1.5, 500.0, 0.15, True)
    """
    flops, loss = _checked(flops, loss, sizes=3)
    if (loss <= 0).any():
        raise ValueError(f"loss holds {loss.min():g}; a power law in nats needs positive ones")
    x = np.log10(flops)
    middle = x.mean()  # the curve is searched about it, where its scale is near 1

    def squares(logarithm: float, *, offset: bool = True) -> float:
        return _power(math.exp(logarithm), x - middle, loss, offset=offset)[2]

    best, least = _search(squares)
    exponent = math.exp(best)
    offset, scale, _ = _power(exponent, x - middle, loss)
    low, high, sd, limit = math.nan, math.nan, math.nan, math.inf
    if freedom := len(x) - 3:
        sd = math.sqrt(least / freedom)
        rounding = len(x) * (1e-9 * loss.max()) ** 2  # rejects nothing
        limit = (least + rounding) * (1 + float(stdtrit(freedom, _HIGH)) ** 2 / freedom)
        low, high = _ends(squares, best, limit)
    if (sizes := len(np.unique(flops))) < 4:
        doubt = f"{sizes} sizes: a curve with three numbers passes near any; 4 sizes are the least"
    elif scale <= 0:
        doubt = "the loss does not fall with the FLOPs"
    elif _search(partial(squares, offset=False))[1] <= limit:
        doubt = "a power law without an offset fits the runs as well"
    elif low == 0 or high == math.inf:
        doubt = "any exponent on one side fits the runs as well"
    else:
        doubt = ""
    reason = doubt or "neither another exponent nor an offset of 0 fits the runs as well"
    scale *= 10 ** float(exponent * middle)
    return PowerFit(offset, scale, exponent, low, high, sd, not doubt, reason)


def _power(
    exponent: float, x: np.ndarray, y: np.ndarray, *, offset: bool = True
) -> tuple[float, float, float]:
    """For an exponent the best offset (or none) and scale, and the sum of squared residuals."""
    z = 10 ** (-exponent * x)
    floor = 0.0
    if offset:
        scale = max(float(_weights(z) @ y), 0.0)
        floor = float(y.mean() - scale * z.mean())
    if floor <= 0:
        floor, scale = 0.0, float(z @ y / (z @ z))
    residuals = y - floor - scale * z
    return floor, scale, float(residuals @ residuals)


def _search(function: Callable[[float], float]) -> tuple[float, float]:
    """The least value of a function of the exponent's logarithm, and where it is."""
    values = np.array([function(start) for start in _STARTS])
    walled = np.concatenate([[math.inf], values, [math.inf]])
    found = []
    for valley in np.flatnonzero((values < walled[:-2]) & (values <= walled[2:])):
        bounds = _STARTS[max(valley - 1, 0)], _STARTS[min(valley + 1, len(_STARTS) - 1)]
        end = minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-12})
        found += [(float(end.fun), float(end.x)), (values[valley], _STARTS[valley])]
    least, best = min(found)
    return best, least


def _ends(function: Callable[[float], float], best: float, limit: float) -> tuple[float, float]:
    """The least and the largest exponent at which the function is not above the limit."""
    inside = [best, *(start for start in _STARTS if function(start) <= limit)]
    low, high = 0.0, math.inf
    if (first := min(inside)) > _STARTS[0]:
        outer = _STARTS[first > _STARTS][-1]
        low = math.exp(brentq(lambda a: function(a) - limit, outer, first))
    if (last := max(inside)) < _STARTS[-1]:
        outer = _STARTS[last < _STARTS][0]
        high = math.exp(brentq(lambda a: function(a) - limit, last, outer))
    return low, high


# --- two arms -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlopeDifference:
    """How much steeper one arm falls than another.

    Explained in ``book/structured-ffn/05-scaling``.

    Attributes:
        estimate: slope of the first minus slope of the second, in nats per decade.
        low: where its interval begins; NaN where there is none.
        high: where it ends.
        how: where the interval comes from, or why there is none.
    """

    estimate: float
    low: float
    high: float
    how: str

    @property
    def differs(self) -> bool:
        """Whether the interval has no 0 in it."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Crossing:
    """Where the lines of two arms meet.

    Explained in ``book/structured-ffn/05-scaling``.

    Attributes:
        flops: where the fitted lines meet; NaN for parallel ones. It is a result only when
            `established`.
        low: where its interval begins, in FLOPs; 0 when the slopes may be equal.
        high: where it ends; infinite when the slopes may be equal.
        established: whether the runs show that the arms cross there.
        reason: why they do, or everything that speaks against it.
        slopes: the difference of the slopes.
    """

    flops: float
    low: float
    high: float
    established: bool
    reason: str
    slopes: SlopeDifference


def slope_difference(
    a: Points,
    b: Points,
    *,
    resamples: int = 2000,
    seed: int = 0,
    shared_residuals: bool = False,
) -> SlopeDifference:
    """The slope of `a` minus that of `b`, with a bootstrap interval.

    Where every size has at least two runs, seeds are drawn anew at every size; when both arms have
    the same seeds at each size (the smallest against the smallest, and so on), the same are drawn
    in both. Two or three seeds spread too little, so the deviations are widened by
    ``sqrt(n / (n - 1))`` and by Student's t over the normal quantile (Hesterberg 2015, "What
    teachers should know about the bootstrap"). Such an interval is about other seeds at the same
    sizes, not about other sizes.

    With single runs, as published points are, noise is drawn that has the residuals' standard
    deviation, itself uncertain (scaled inverse chi-squared), and on top of it the reading error.

    A law that flattens is steeper at fewer FLOPs, so two arms measured over other FLOPs can differ
    in the slopes of their lines and yet follow one law. Explained in
    ``book/structured-ffn/05-scaling``.

    Args:
        a: runs of one arm, at two sizes or more.
        b: runs of another.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        shared_residuals: of single runs, draw what the lines miss at a size for both arms together,
            correlated as the residuals are, so that what both lines miss alike cancels. By default
            each arm is drawn by itself, and the interval is wider.

    Raises:
        ValueError: fewer than 100 resamples, or residuals to share between arms of other sizes.

    >>> both = (published_points("lowrank-32"), published_points("dense"))
    >>> result = slope_difference(*both)
    >>> round(result.estimate, 3), result.differs
    (-0.03, False)
    """
    lines, draws, how = _draw(a, b, resamples, seed, shared_residuals)
    return _slopes(lines, draws, how)


def crossing(
    a: Points,
    b: Points,
    *,
    resamples: int = 2000,
    seed: int = 0,
    shared_residuals: bool = False,
) -> Crossing:
    """Where the lines of two arms meet, and whether their runs establish that they cross.

    A crossing is established when all of this holds: each arm has three sizes or more; the interval
    of the slope difference has no 0 in it; the interval of the crossing lies within the FLOPs that
    the runs of both arms cover; and at both ends of these FLOPs the lines are further apart than
    they are from their own runs (the means of each size). Explained in
    ``book/structured-ffn/05-scaling``.

    Args:
        a: runs of one arm, at two sizes or more.
        b: runs of another.
        resamples: of the bootstrap, which is that of `slope_difference`.
        seed: of the bootstrap.
        shared_residuals: as of `slope_difference`.

    Raises:
        ValueError: as of `slope_difference`.

    >>> found = crossing(published_points("lowrank-32"), published_points("dense"))
    >>> found.established, found.high
    (False, inf)
    """
    lines, draws, how = _draw(a, b, resamples, seed, shared_residuals)
    slopes = _slopes(lines, draws, how)
    meeting = float(_meeting(lines))
    low, high = -math.inf, math.inf
    if slopes.differs:
        low, high = map(float, np.quantile(_meeting(draws), [_LOW, _HIGH]))
    doubts = _doubts(a, b, lines, slopes, meeting, low, high)
    return Crossing(
        flops=_from_decades(meeting),
        low=_from_decades(low),
        high=_from_decades(high),
        established=not doubts,
        reason="; ".join(doubts)
        or "the slopes differ, and the lines cross within the FLOPs that both arms cover",
        slopes=slopes,
    )


def _doubts(
    a: Points,
    b: Points,
    lines: np.ndarray,
    slopes: SlopeDifference,
    meeting: float,
    low: float,
    high: float,
) -> list[str]:
    """Everything that speaks against a crossing; decades of FLOPs, the last three."""
    doubts = []
    if math.isnan(slopes.low):
        doubts.append(slopes.how)
    elif not slopes.differs:
        doubts.append(
            f"the interval of the slope difference, {slopes.low:+.3f} to {slopes.high:+.3f} nats "
            "per decade, contains 0"
        )
    if (sizes := min(a.sizes, b.sizes)) < 3:
        doubts.append(f"{sizes} sizes do not show whether the curves are straight")
    first = math.log10(max(a.flops.min(), b.flops.min()))
    last = math.log10(min(a.flops.max(), b.flops.max()))
    if last <= first:
        return [*doubts, "no FLOPs are covered by the runs of both arms"]
    intercept, slope = lines[0] - lines[1]
    gap = min(abs(intercept + slope * x) for x in (first, last))
    if sizes > 2 and (missed := max(map(_missed, (a, b)))) >= gap:
        doubts.append(
            f"the residuals of the fits ({missed:.3f} nats) are larger than the gap between the "
            f"lines ({gap:.3f} nats) at an end of the FLOPs that both arms cover"
        )
    if math.isnan(meeting):
        doubts.append("the lines are parallel")
    elif meeting > last:
        doubts.append(f"the lines meet {meeting - last:.1f} decades beyond what both arms reach")
    elif meeting < first:
        doubts.append(f"the lines meet {first - meeting:.1f} decades below what both arms cover")
    elif slopes.differs and (low < first or high > last):
        doubts.append(
            f"the interval of the crossing, 1e{low:.1f} to 1e{high:.1f} FLOPs, is not inside what "
            f"both arms cover, 1e{first:.1f} to 1e{last:.1f}"
        )
    return doubts


def _missed(points: Points) -> float:
    """How far the means of the sizes lie from the line, a standard deviation in nats."""
    sizes, row = np.unique(points.flops, return_inverse=True)
    means = np.bincount(row, points.loss) / np.bincount(row)
    return _scatter(np.log10(sizes), means)[0]


def _meeting(lines: np.ndarray) -> np.ndarray:
    """Where pairs of lines (..., 2, 2) meet, in decades of FLOPs; NaN for parallel ones."""
    intercept, slope = np.moveaxis(lines[..., 0, :] - lines[..., 1, :], -1, 0)
    parallel = np.abs(slope) <= 1e-9 * np.abs(lines[..., 1]).sum(-1)
    return -intercept / np.where(parallel, math.nan, slope)


def _from_decades(decades: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float64(10.0) ** decades)


def _slopes(lines: np.ndarray, draws: np.ndarray | None, how: str) -> SlopeDifference:
    def difference(lines: np.ndarray) -> np.ndarray:
        return np.round(lines[..., 0, 1] - lines[..., 1, 1], 12)  # rounding is no difference

    low = high = math.nan
    if draws is not None:
        low, high = map(float, np.quantile(difference(draws), [_LOW, _HIGH]))
    return SlopeDifference(float(difference(lines)), low, high, how)


# --- the bootstrap ------------------------------------------------------------------------------


def _draw(
    a: Points, b: Points, resamples: int, seed: int, shared_residuals: bool
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """The lines of both arms (2, 2), those of the resamples (R, 2, 2) or None, and how."""
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; an interval of 95 % needs 100 or more")
    arms = [_Arm(points) for points in (a, b)]
    if shared_residuals and [len(r) for r in arms[0].rows] != [len(r) for r in arms[1].rows]:
        raise ValueError(
            f"{len(a.flops)} runs of {a.sizes} sizes and {len(b.flops)} of {b.sizes} share no "
            "residuals; give the same sizes in both arms, or leave shared_residuals False"
        )
    lines = np.stack([least_squares(arm.x, arm.y) for arm in arms])
    rng = np.random.default_rng(seed)
    if all(len(rows) > 1 for arm in arms for rows in arm.rows):
        losses, widening, how = _by_seeds(arms, resamples, rng)
    elif min(len(arm.x) for arm in arms) > 2:
        losses, widening, how = _by_residuals(arms, resamples, rng, shared_residuals)
    else:
        return lines, None, "two runs leave no residuals to make an interval from"
    draws = np.stack([least_squares(arm.x, y) for arm, y in zip(arms, losses, strict=True)], axis=1)
    return lines, lines + widening * (draws - lines), how


class _Arm:
    """Runs sorted by size and seed."""

    def __init__(self, points: Points):
        n = len(points.flops)
        order = np.lexsort([np.zeros(n) if points.seeds is None else points.seeds, points.flops])
        self.x, self.y = np.log10(points.flops[order]), points.loss[order]
        self.errors = np.zeros(n) if points.errors is None else points.errors[order]
        # the runs of each size, and their seeds
        self.rows = np.split(np.arange(n), np.unique(self.x, return_index=True)[1][1:])
        self.seeds = None
        if points.seeds is not None:
            self.seeds = [points.seeds[order][rows].tolist() for rows in self.rows]


def _by_seeds(
    arms: list[_Arm], resamples: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], float, str]:
    """Losses (R, n) of each arm with the seeds of each size drawn anew, and a widening factor."""
    paired = arms[0].seeds is not None and arms[0].seeds == arms[1].seeds
    losses = [np.tile(arm.y, (resamples, 1)) for arm in arms]
    # (what the seeds of one size add to the variance of the slope difference, its freedom)
    parts: list[tuple[float, int]] = []
    for together in [(0, 1)] if paired else [(0,), (1,)]:
        for rows in zip(*(arms[i].rows for i in together), strict=True):
            n = len(rows[0])
            drawn = rng.integers(n, size=(resamples, n))
            added = np.zeros(n)
            for i, mine in zip(together, rows, strict=True):
                mean = arms[i].y[mine].mean()
                deviations = arms[i].y[mine] - mean
                losses[i][:, mine] = mean + math.sqrt(n / (n - 1)) * deviations[drawn]
                added += (-1) ** i * _weights(arms[i].x)[mine] * deviations
            parts.append((n * float(added @ added) / (n - 1), n - 1))
    # Welch and Satterthwaite
    total, spread = sum(v for v, _ in parts), sum(v**2 / freedom for v, freedom in parts)
    freedom = total**2 / spread if spread else min(freedom for _, freedom in parts)
    how = "bootstrap over the seeds of each size, " + (
        "the same in both arms" if paired else "each arm by itself"
    )
    return losses, float(stdtrit(freedom, _HIGH) / ndtri(_HIGH)), how


def _by_residuals(
    arms: list[_Arm], resamples: int, rng: np.random.Generator, shared: bool
) -> tuple[list[np.ndarray], float, str]:
    """Losses (R, n) of each arm: its line, noise like its residuals, and errors of reading."""
    residuals = [_residuals(arm.x, arm.y) for arm in arms]
    if shared:
        freedom = len(residuals[0]) - 2
        table = np.stack(residuals, axis=1)
        values, vectors = np.linalg.eigh(table.T @ table / freedom)
        factor = vectors * np.sqrt(np.maximum(values, 0))
        scale = np.sqrt(freedom / rng.chisquare(freedom, (resamples, 1, 1)))
        noise = scale * (rng.standard_normal((resamples, len(table), 2)) @ factor.T)
        noises = [noise[..., 0], noise[..., 1]]
    else:
        noises = []
        for arm in arms:
            sd, freedom = _scatter(arm.x, arm.y)
            scale = sd * np.sqrt(freedom / rng.chisquare(freedom, (resamples, 1)))
            noises.append(scale * rng.standard_normal((resamples, len(arm.x))))
    losses = [
        arm.y + noise + arm.errors * rng.uniform(-1, 1, noise.shape)
        for arm, noise in zip(arms, noises, strict=True)
    ]
    how = "bootstrap of the residuals, " + (
        "shared by both arms" if shared else "each arm by itself"
    )
    if any(arm.errors.any() for arm in arms):
        how += ", and of the errors of reading"
    return losses, 1.0, how
