"""The claims of the three papers, and the verdicts that recorded runs give on them.

A claim is an entry of ``book/claims.yml``: what a paper says, the number it prints and where that
number comes from, the statistic of our runs that tests it, the band that counts as reproduced, and
the least scale that can show it. :func:`verdicts` computes every verdict from records; nobody
writes one by hand.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .files import checkout
from .records import Record

CONFIDENCE = 0.95
LEAST_SEEDS = 3
RESAMPLES = 2000

PROFILES = ("smoke", "cpu", "gpu", "paper")

PAPERS = {
    "robust-qa": "Robust QA with experts",
    "structured-ffn": "Structured feed-forward layers",
    "adamoe": "AdaMoE for robot policies",
}

# mark -> (what it says about a published number, how sure we are of it)
MARKS = {
    "abstract": ("in the paper's abstract or on its project page", "high"),
    "text": ("in the paper's text or in one of its printed tables", "high"),
    "code": ("in the code that the authors released", "high"),
    "rescored": ("computed by us from predictions that the authors released", "high"),
    "calc": ("counted by us from the sizes that the paper gives", "high"),
    "digitised": ("read off a printed picture, about ±0.02 perplexity", "medium"),
    "derived": ("computed by us from other published numbers", "medium"),
    "measured": ("measured by us in one earlier run without an interval", "low"),
    "others": ("reported by other teams on the same data", "low"),
    "second-hand": ("from a third party's summary of the paper", "low"),
    "none": ("the direction is claimed; no number is known to us", "none"),
}
_SURENESS = ("high", "medium", "low", "none")

# From the weakest to the strongest: a claim with several statistics gets the weakest of theirs.
VERDICTS = (
    "not reproduced",
    "not run",
    "needs more scale",
    "inconclusive",
    "partly",
    "reproduced",
    "exact",
)

# kind of statistic -> (required fields, further allowed fields)
_KINDS = {
    "value": ({"variant", "metric"}, {"against"}),
    "difference": ({"variant", "reference", "metric"}, {"reference_metric"}),
    "ratio": ({"variant", "reference", "metric"}, {"reference_metric"}),
    "relative": ({"variant", "reference", "metric"}, {"reference_metric"}),
    "contrast": ({"terms"}, set()),
    "gap": ({"variant", "reference", "target", "metric"}, set()),
    "slope": ({"variant", "reference", "metric", "x"}, set()),
    "exact": ({"check"}, set()),
}


class ClaimError(ValueError):
    """A claims file that cannot be used; the message names the file, the claim and the mend."""


@dataclass(frozen=True)
class Published:
    """One number as a paper (or someone else) printed it, and the mark that says who and where."""

    value: str
    mark: str

    @property
    def sureness(self) -> str:
        """How sure we are of the number: ``high``, ``medium``, ``low`` or ``none``."""
        return MARKS[self.mark][1]


@dataclass(frozen=True)
class Statistic:
    """What is computed from the records of an experiment, and the band that reproduces the claim.

    Args:
        kind: ``value`` (mean of a metric), ``difference`` (variant minus reference), ``ratio``
            (variant over reference), ``relative`` (the ratio's gain in percent), ``contrast``
            (any weighted sum of metrics), ``gap`` (share of the way from reference to target that
            the variant goes), ``slope`` (of the metric per decade of ``x`` over the variants of a
            list, minus the same of the reference list) or ``exact`` (a function that counts).
        experiment: the experiment whose records are read.
        band: ``(low, high)``, either end may be infinite.
        of: a short name, shown where a claim has more than one statistic.
        unit: what the estimate is measured in, as printed.
    """

    kind: str
    experiment: str
    band: tuple[float, float]
    of: str = ""
    unit: str = ""
    variant: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    metric: str = ""
    reference_metric: str = ""
    against: float | None = None
    x: str = ""
    terms: tuple[tuple[float, str, str], ...] = ()
    check: str = ""

    @property
    def null(self) -> float | None:
        """The value that means "no effect", or None where a plain value is compared."""
        return {"ratio": 1.0, "value": self.against, "exact": None}.get(self.kind, 0.0)

    @property
    def arms(self) -> tuple[str, ...]:
        """Every variant whose records the statistic needs."""
        named = (*self.variant, *self.reference, *self.target, *(arm for _, arm, _ in self.terms))
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class Claim:
    """One row of ``book/claims.yml``.

    Args:
        id: short and unique, as the book refers to it.
        paper: a key of :data:`PAPERS`.
        statement: one sentence of Markdown.
        published: the printed numbers, each with a mark of :data:`MARKS`.
        statistics: what is computed; all of them must hold for the claim to hold.
        profile: the least profile that can show the claim.
        at_least: metrics that a record must reach to count, for example training tokens per
            parameter.
        chapter: the page of the book that tests it, without suffix.
        note: what a reader should know beside the verdict.
    """

    id: str
    paper: str
    statement: str
    published: tuple[Published, ...]
    statistics: tuple[Statistic, ...]
    profile: str
    chapter: str
    at_least: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def sureness(self) -> str:
        """How sure we are of the paper's number: that of its least sure part."""
        return max((p.sureness for p in self.published), key=_SURENESS.index)


@dataclass(frozen=True)
class Result:
    """One statistic evaluated: the estimate with its interval, the verdict and the reason."""

    statistic: Statistic
    verdict: str
    reason: str
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    records: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A claim, the results of its statistics, and the verdict: that of the weakest of them."""

    claim: Claim
    results: tuple[Result, ...]

    @property
    def weakest(self) -> Result:
        """The result that decides."""
        return min(self.results, key=lambda result: VERDICTS.index(result.verdict))

    @property
    def verdict(self) -> str:
        """One of :data:`VERDICTS`."""
        return self.weakest.verdict

    @property
    def reason(self) -> str:
        """Why, in one clause, naming the statistic that decides where there are several."""
        name = self.weakest.statistic.of
        return f"{name}: {self.weakest.reason}" if name else self.weakest.reason


# Reading the file -------------------------------------------------------------------------------


def load_claims(path: str | Path | None = None) -> list[Claim]:
    """Read and validate a claims file, by default ``book/claims.yml`` of the checkout.

    Raises:
        ClaimError: for a file that is missing or no YAML list, a field that is missing, unknown or
            of the wrong type, an id given twice, an unknown paper, mark, kind or profile, or an
            empty band. The message names the file, the claim and what is allowed.
    """
    if path is None:
        root = checkout()
        if root is None:
            raise ClaimError("no checkout of the book here; give the path of a claims file")
        path = root / "book" / "claims.yml"
    path = Path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClaimError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ClaimError(f"{path}: holds {type(entries).__name__}; write a list of claims")
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(entries, start=1):
        name = entry.get("id", f"number {number}") if isinstance(entry, dict) else f"number {number}"
        try:
            claim = _claim(entry)
        except ClaimError as error:
            raise ClaimError(f"{path}, claim {name!r}: {error}") from error
        if claim.id in claims:
            raise ClaimError(f"{path}, claim {name!r}: this id is given twice; ids are unique")
        claims[claim.id] = claim
    return list(claims.values())


def _claim(entry: Any) -> Claim:
    required = {"id", "paper", "statement", "published", "statistics", "profile", "chapter"}
    _fields(entry, "the claim", required, {"at_least", "note"})
    _choice(entry["paper"], "paper", PAPERS)
    _choice(entry["profile"], "profile", [name for name in PROFILES if name != "smoke"])
    at_least = entry.get("at_least", {})
    if not isinstance(at_least, dict) or not all(_is_number(v) for v in at_least.values()):
        raise ClaimError(f"at_least is {at_least!r}; write metric: number")
    return Claim(
        id=_text(entry, "id"),
        paper=entry["paper"],
        statement=_text(entry, "statement"),
        published=tuple(_published(one) for one in _list(entry, "published")),
        statistics=tuple(_statistic(one) for one in _list(entry, "statistics")),
        profile=entry["profile"],
        chapter=_text(entry, "chapter"),
        at_least=at_least,
        note=_text(entry, "note") if "note" in entry else "",
    )


def _published(entry: Any) -> Published:
    _fields(entry, "a published number", {"value", "mark"}, set())
    _choice(entry["mark"], "mark", MARKS)
    return Published(_text(entry, "value"), entry["mark"])


def _statistic(entry: Any) -> Statistic:
    if not isinstance(entry, dict):
        raise ClaimError(f"a statistic is {entry!r}; write it as field: value")
    _choice(entry.get("kind"), "kind of statistic", _KINDS)
    required, further = _KINDS[entry["kind"]]
    common = {"kind", "band"} | ({"experiment"} if entry["kind"] != "exact" else set())
    _fields(entry, f"a statistic of kind {entry['kind']!r}", common | required,
            further | {"of", "unit"})  # fmt: skip
    values: dict[str, Any] = {"experiment": "", "band": _band(entry["band"])}
    for name in ("kind", "experiment", "of", "unit", "metric", "reference_metric", "x", "check"):
        if name in entry:
            values[name] = _text(entry, name)
    for name in ("variant", "reference", "target"):
        if name in entry:
            several = _list(entry, name) if entry["kind"] == "slope" else [_text(entry, name)]
            if not all(isinstance(one, str) for one in several):
                raise ClaimError(f"{name} is {several!r}; write names of variants")
            values[name] = tuple(several)
            if entry["kind"] == "slope" and len(several) < 2:
                raise ClaimError(f"{name} is {several!r}; a slope needs two variants or more")
    if "against" in entry:
        if not _is_number(entry["against"]):
            raise ClaimError(f"against is {entry['against']!r}; write a number")
        values["against"] = float(entry["against"])
    if "terms" in entry:
        for term in _list(entry, "terms"):
            _fields(term, "a term", {"weight", "variant", "metric"}, set())
            if not _is_number(term["weight"]):
                raise ClaimError(f"the weight of a term is {term['weight']!r}; write a number")
        values["terms"] = tuple(
            (float(term["weight"]), _text(term, "variant"), _text(term, "metric"))
            for term in entry["terms"]
        )
    return Statistic(**values)


def _band(given: Any) -> tuple[float, float]:
    if isinstance(given, list) and len(given) == 2:
        low = -math.inf if given[0] is None else given[0]
        high = math.inf if given[1] is None else given[1]
        numbers = _is_number(low) and _is_number(high)
        if numbers and low <= high and (math.isfinite(low) or math.isfinite(high)):
            return float(low), float(high)
    raise ClaimError(
        f"band is {given!r}; write [low, high] with low <= high, and null for at most one open end"
    )


def _fields(entry: Any, what: str, required: set[str], further: set[str]) -> None:
    if not isinstance(entry, dict):
        raise ClaimError(f"{what} is {entry!r}; write it as field: value")
    if unknown := sorted(map(str, entry.keys() - required - further)):
        raise ClaimError(f"{what} has unknown {unknown}; allowed are {sorted(required | further)}")
    if missing := sorted(required - entry.keys()):
        raise ClaimError(f"{what} lacks {missing}")


def _choice(given: Any, what: str, allowed: Iterable[str]) -> None:
    if not isinstance(given, str) or given not in allowed:
        raise ClaimError(f"unknown {what} {given!r}; allowed are {', '.join(allowed)}")


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry[name]
    if not isinstance(value, str) or not value.strip():
        raise ClaimError(f"{name} is {value!r}; write a text (in quotes, if YAML reads it otherwise)")
    return value.strip()


def _list(entry: Mapping[str, Any], name: str) -> list:
    value = entry[name]
    if not isinstance(value, list) or not value:
        raise ClaimError(f"{name} is {value!r}; write a list with one entry or more")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


# Verdicts ---------------------------------------------------------------------------------------


def verdicts(claims: Iterable[Claim], records: Iterable[Record]) -> list[Verdict]:
    """The verdict of every claim, in the order of `claims`, computed from `records`.

    For each statistic of a claim:

    1. Smoke records never count. The records of the largest profile at which every arm was run
       with three seeds or more are used (else of the largest with every arm); profiles are never
       mixed. No such records: *not run*.
    2. Records below the claim's least scale: *needs more scale*.
    3. A metric that is not finite, or fewer than three seeds: *inconclusive*. A run that diverged
       is never left out, since that would flatter its arm.
    4. Otherwise the 95 % interval decides, as :func:`decide` says.

    The interval is a t interval over seeds, of paired values where the arms share three seeds or
    more, else of independent ones. Where records carry scores of single items, the variance of a
    paired bootstrap over the items is added, because all seeds answer the same questions. Ratios
    are averaged as logarithms; the interval of a ``gap`` is Fieller's.

    A claim is as strong as its weakest statistic.
    """
    records = list(records)
    return [
        Verdict(claim, tuple(evaluate(one, claim, records) for one in claim.statistics))
        for claim in claims
    ]


def decide(low: float, high: float, band: tuple[float, float], null: float | None) -> str:
    """The verdict of an interval ``[low, high]`` on a band.

    A band on one side of `null` (no effect) claims a direction; one around it claims that there is
    hardly any effect, and then there is no *partly*.

    - *reproduced*: the interval lies inside the band (and off `null`, if that is the band's end);
    - *partly*: it does not, but it lies on the claimed side of `null`;
    - *not reproduced*: it lies outside the band altogether;
    - *inconclusive*: else.

    >>> decide(1.2, 3.0, band=(1, 4), null=0), decide(0.2, 3.0, band=(1, 4), null=0)
    ('reproduced', 'partly')
    >>> decide(-2.0, 0.5, band=(1, 4), null=0), decide(-1.0, 3.0, band=(1, 4), null=0)
    ('not reproduced', 'inconclusive')
    """
    lower, upper = band
    upwards = null is not None and null <= lower
    downwards = null is not None and null >= upper
    claimed_side = (upwards and low > null) or (downwards and high < null)
    wrong_side = (upwards and high <= null) or (downwards and low >= null)
    if lower <= low and high <= upper and (claimed_side or not (upwards or downwards)):
        return "reproduced"
    if claimed_side:
        return "partly"
    if high < lower or low > upper or wrong_side:
        return "not reproduced"
    return "inconclusive"


def evaluate(statistic: Statistic, claim: Claim, records: Sequence[Record]) -> Result:
    """One statistic of a claim on records, as :func:`verdicts` describes."""
    if statistic.kind == "exact":
        return _exact(statistic)
    runs = _by_profile(statistic, records)
    if not runs:
        return Result(statistic, "not run", _what_lacks(statistic, records))
    at_scale = {
        profile: arms
        for profile, arms in runs.items()
        if PROFILES.index(profile) >= PROFILES.index(claim.profile)
        and all(_reaches(run, claim.at_least) for arm in arms.values() for run in arm.values())
    }
    arms = _largest(at_scale or runs)
    used = tuple(run for arm in arms.values() for run in arm.values())
    verdict, reason, estimate, low, high = _judge(statistic, arms)
    if not at_scale:
        verdict = "needs more scale"
        conditions = [f"profile {claim.profile} or above"]
        conditions += [f"{name} of {value:g} or more" for name, value in claim.at_least.items()]
        reason = f"can be shown with {' and '.join(conditions)} only"
    return Result(statistic, verdict, reason, estimate, low, high, used)


def _judge(statistic: Statistic, arms: "_Arms") -> tuple[str, str, float, float, float]:
    """Verdict, reason, estimate and interval from the runs of every arm."""
    nothing = (math.nan, math.nan, math.nan)
    components = _components(statistic)
    logarithm = statistic.kind in ("ratio", "relative")
    values: list[dict[tuple[str, ...], dict[int, float]]] = []
    for terms in components:
        groups: dict[tuple[str, ...], dict[int, float]] = {}
        for term in terms:
            seeds = set.intersection(*(set(arms[arm]) for arm in term.arms))
            group = groups.setdefault(term.arms, dict.fromkeys(sorted(seeds), 0.0))
            for seed in group:
                value = term.value([arms[arm][seed] for arm in term.arms], logarithm)
                if not math.isfinite(value):
                    where = f"{term.metric} of {', '.join(term.arms)}, seed {seed},"
                    what = "finite and positive" if logarithm else "finite"
                    return "inconclusive", f"{where} is not {what}", *nothing
                group[seed] += term.weight * value
        values.append(groups)

    shared = sorted(set.intersection(*(set(g) for groups in values for g in groups.values())))
    paired = len(shared) >= LEAST_SEEDS
    fewest = min(len(g) for groups in values for g in groups.values())
    if paired:
        table = np.array([[sum(g[s] for g in groups.values()) for groups in values] for s in shared])
        mean, parts = table.mean(axis=0), [(_covariance(table), len(shared) - 1)]
    else:
        mean = np.array([sum(np.mean([*g.values()]) for g in groups.values()) for groups in values])
        if fewest < LEAST_SEEDS:
            estimate = _shown(statistic, mean)
            return ("inconclusive", f"{_count(fewest, 'seed')}; an interval needs {LEAST_SEEDS}",
                    estimate, math.nan, math.nan)  # fmt: skip
        parts = _independent(values)
    if (items := _item_covariance(components, arms, shared if paired else None, logarithm)) is not None:
        parts.append(items)

    covariance = sum(part for part, _ in parts)
    quantile = _quantile(parts)
    low, high = _interval(statistic, mean, covariance, quantile)
    estimate = _shown(statistic, mean)
    if statistic.kind == "gap" and not math.isfinite(low - high):
        return ("inconclusive", "the gap itself is not established", estimate,
                math.nan, math.nan)  # fmt: skip
    verdict = decide(low, high, statistic.band, statistic.null)
    return verdict, _REASONS[verdict], estimate, low, high


_REASONS = {
    "reproduced": "the interval lies inside the band",
    "partly": "the effect has the claimed sign, but the interval is not inside the band",
    "not reproduced": "the interval lies outside the band",
    "inconclusive": "the interval is too wide to decide",
}
