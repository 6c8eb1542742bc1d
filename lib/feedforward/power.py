"""How many runs, questions or attempts would decide a comparison: its statistical power.

A difference of two arms has two kinds of luck: that of training, other for every seed, and that of
the items on which they are scored, other for every choice of questions or start states. Explained
in ``book/robust-qa/04-audit``.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from feedforward.claims import Result, Statistic, Verdict

__all__ = ["items_needed", "needed", "runs_needed", "would_decide"]

#: Units in which the least gain worth proving is one.
_POINTS = ("points", "F1", "EM")


def needed(spread: float, gain: float, *, level: float = 0.95, power: float = 0.8) -> int:
    """How many independent differences prove a gain: questions, or pairs of training runs.

    A two-sided test of a mean difference by the normal approximation.

    Args:
        spread: Standard deviation of one difference, for instance ``PairedTest.spread``.
        gain: The mean difference to be proven, in the same unit.
        level: Of confidence.
        power: Probability to prove a gain that is there.

    Raises:
        ValueError: When a number is out of range.

    >>> needed(spread=40.0, gain=1.0)
    12559
    """
    z = _both(level, power)
    if spread < 0 or gain == 0:
        raise ValueError(f"spread {spread} must not be negative and gain {gain} not 0")
    return max(2, math.ceil((z * spread / gain) ** 2))


def runs_needed(
    gain: float,
    over_runs: float,
    over_items: float,
    items: int,
    *,
    level: float = 0.95,
    power: float = 0.8,
) -> int | None:
    """Pairs of runs that prove a gain on a given number of items; None: no number of them does.

    Args:
        gain: To be proven.
        over_runs: Standard deviation of the difference over pairs of training runs.
        over_items: That of the differences of single items, averaged over the runs.
        items: Their number.
        level: Of confidence.
        power: Probability to prove a gain that is there.

    >>> runs_needed(1.0, 1.4, 0.0, 382), runs_needed(1.0, 1.4, 30.0, 382)
    (16, None)
    """
    left = gain**2 - (_both(level, power) * over_items) ** 2 / items
    return needed(over_runs, math.sqrt(left), level=level, power=power) if left > 0 else None


def items_needed(
    gain: float,
    over_runs: float,
    over_items: float,
    runs: int,
    *,
    level: float = 0.95,
    power: float = 0.8,
) -> int | None:
    """Items that prove a gain with a given number of pairs of runs; None: no number of them does.

    Args:
        gain: To be proven.
        over_runs: Standard deviation of the difference over pairs of training runs.
        over_items: That of the differences of single items, averaged over the runs.
        runs: Pairs of runs.
        level: Of confidence.
        power: Probability to prove a gain that is there.

    >>> items_needed(1.0, 0.0, 40.0, 3)
    12559
    """
    left = gain**2 - (_both(level, power) * over_runs) ** 2 / runs
    return needed(over_items, math.sqrt(left), level=level, power=power) if left > 0 else None


def would_decide(verdict: Verdict, *, items: str = "questions", power: float = 0.8) -> str:
    """What an inconclusive claim lacks, in one clause, judged by the records that it has.

    The gain to be proven is how far the nearer end of the claim's band lies from no effect. Where
    no effect lies inside the band, that end is to be ruled out. Where it is the end of the band, a
    size has to be assumed: one point of what is measured in points, else as much as was found. A
    contrast of several arms is one value a seed. Two or three runs give rough standard deviations,
    so the numbers are orders of magnitude.

    Args:
        verdict: Of the claim; the statistic that decides it compares arms, or an arm with the band.
        items: What the arms are scored on.
        power: Probability to prove a gain that is there.

    Returns:
        For instance ``"to prove 2: 34 seeds on these questions, or 2,100 questions with 3 seeds"``;
        where neither alone would do, a pair of both, half of what is allowed for each kind of luck.
        Where there is no interval, the reason for that.
    """
    result = verdict.weakest
    if math.isnan(result.low):
        return result.reason
    if result.statistic.kind == "value":
        return _beside_the_band(result, items, power)
    if result.statistic.kind not in ("difference", "ratio", "relative", "contrast"):
        return "more seeds: the statistic is no difference of arms"
    runs, over_runs, over_items, count = _luck(result)
    if runs < 2:
        return f"the same seeds in {'both' if len(result.statistic.arms) == 2 else 'all'} arms"
    if not over_runs and not over_items:
        return "another test: the arms are equal in every run"
    aim, gain = _aim(result)
    ways = _ways(gain, runs, over_runs, over_items, count, items, power)
    return f"{aim}: {', or '.join(ways)}"


def _beside_the_band(result: Result, items: str, power: float) -> str:
    """What tells a mean from the nearest end of the band, if it stays where it is."""
    metric = result.statistic.metric
    values = [record.metrics[metric] for record in result.records]
    tables = [record.metrics.get("items", {}).get(metric) for record in result.records]
    end = min(result.statistic.band, key=lambda end: abs(end - result.estimate))
    gap, over_runs = end - result.estimate, float(np.std(values, ddof=1))
    over_items, count = 0.0, 1
    if all(tables):
        single = np.mean([[table[name] for name in sorted(table)] for table in tables], axis=0)
        over_items, count = float(single.std(ddof=1)), len(single)
    if not gap or not (over_runs or over_items):
        return "other seeds: these are all alike, or on the end of the band"
    ways = _ways(gap, len(values), over_runs, over_items, count, items, power)
    return f"to tell {result.estimate:.2g} from {end:g}: {', or '.join(ways)}"


def _ways(
    gain: float,
    runs: int,
    over_runs: float,
    over_items: float,
    count: int,
    items: str,
    power: float,
) -> list[str]:
    """More seeds, more items or, where neither alone would do, a pair of both."""
    ways = []
    if more := runs_needed(gain, over_runs, over_items, count, power=power):
        # the normal law is used, and a few runs have Student's
        on = f" on these {items}" if over_items else ""
        ways.append(f"{max(more, runs + 1):,} seeds{on}")
    if over_items and (more := items_needed(gain, over_runs, over_items, runs, power=power)):
        ways.append(f"{more:,} {items} with {runs} seeds")
    if not ways:
        half = [needed(math.sqrt(2) * x, gain, power=power) for x in (over_runs, over_items)]
        ways.append(f"{half[0]:,} seeds and {half[1]:,} {items}")
    return ways


def _both(level: float, power: float) -> float:
    """How many standard errors a gain must be."""
    if not 0 < level < 1 or not 0 < power < 1:
        raise ValueError(f"level {level} and power {power} lie between 0 and 1")
    normal = NormalDist()
    return normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)


def _luck(result: Result) -> tuple[int, float, float, int]:
    """Seeds of all arms, standard deviation over them, that over items, and the number of items."""
    terms = _terms(result.statistic)
    runs = {(record.variant, record.seed): record for record in result.records}
    seeds = sorted({seed for _, seed in runs if all((arm, seed) in runs for _, arm, _ in terms)})
    values = [
        sum(weight * runs[arm, seed].metrics[metric] for weight, arm, metric in terms)
        for seed in seeds
    ]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    single: dict[tuple[str, ...], np.ndarray] = {}  # terms on the same items vary together
    for weight, arm, metric in terms:
        tables = [runs[arm, seed].metrics.get("items", {}).get(metric) for seed in seeds]
        if not tables or not all(table and table.keys() == tables[0].keys() for table in tables):
            return len(seeds), spread, 0.0, 1
        names = tuple(sorted(tables[0]))
        scores = np.mean([[table[name] for name in names] for table in tables], axis=0)
        single[names] = single.get(names, 0.0) + weight * scores
    count = sum(map(len, single))
    variance = sum(scores.var(ddof=1) / len(scores) for scores in single.values())
    return len(seeds), spread, math.sqrt(variance * count), count


def _terms(statistic: Statistic) -> Sequence[tuple[float, str, str]]:
    """What is added up: weights, arms and metrics."""
    if statistic.kind == "contrast":
        return statistic.terms
    (one,), (other,) = statistic.variant, statistic.reference
    metric = statistic.metric
    return (1.0, one, metric), (-1.0, other, statistic.reference_metric or metric)


def _aim(result: Result) -> tuple[str, float]:
    """What is to be shown, in words, and how large that is in the metric's unit."""
    statistic, null = result.statistic, result.statistic.null or 0.0
    unit = 1.0
    if statistic.kind in ("relative", "ratio"):
        base = float(np.mean([record.metrics[statistic.metric] for record in result.records]))
        unit = base / (100 if statistic.kind == "relative" else 1)
    low, high = statistic.band
    end = min(statistic.band, key=lambda end: abs(end - null)) - null
    if low < null < high:
        return f"to rule out {end * unit:.2g} if the arms are alike", abs(end * unit)
    if end:
        return f"to prove {abs(end * unit):.2g}", abs(end * unit)
    if statistic.unit in _POINTS or result.estimate == null:
        return "to prove 1 (assumed)", 1.0
    size = abs(result.estimate - null) * unit
    return f"to prove {size:.2g} (as found)", size
