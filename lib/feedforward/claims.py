"""The claims of the three papers, and the verdicts that recorded runs give on them.

A claim is an entry of ``book/claims.yml``: what a paper says, the number it prints and where that
number comes from, the statistic of our runs that tests it, the band that counts as reproduced, and
the least scale that can show it. :func:`verdicts` computes every verdict from records; nobody
writes one by hand.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from feedforward.files import checkout
from feedforward.profiles import PROFILES
from feedforward.records import Record, devices_of, load_records

CONFIDENCE = 0.95
LEAST_SEEDS = 3
RESAMPLES = 2000

# the profiles whose records may support a claim, from the smallest scale to the largest
SCALES = tuple(profile.name for profile in PROFILES.values() if profile.evidence)

PAPERS = {
    "robust-qa": "Robust QA",
    "structured-ffn": "Structured layers",
    "adamoe": "AdaMoE",
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
    "exact": ({"check", "printed"}, set()),
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
            the variant goes, of a metric that falls on that way, as a loss does), ``slope`` (of the
            metric per decade of ``x`` over the variants of a list, minus the same of the reference
            list) or ``exact`` (printed numbers against those that a function counts).
        experiment: the experiment whose records are read.
        band: ``(low, high)``, either end may be infinite.
        of: a short name, shown where a claim has more than one statistic.
        unit: what the estimate is measured in, as printed.
        possible: ``(low, high)``, the values that there can be, such as 0 to 1 of a share; an
            interval ends there.
        variant, reference, target: names of variants; one each, of a ``slope`` several.
        metric: the name of a number in the records' metrics.
        reference_metric: the reference's, where it is another one.
        against: of a ``value``: what it would be without an effect.
        at_stake: metrics of every arm, with the least that shows that what is claimed to matter
            did happen; then runs that are all equal are a finding, and else they test nothing.
        x: of a ``slope``: the metric whose decades count.
        terms: of a ``contrast``: weights, variants and metrics.
        check: of an ``exact`` claim: ``module:function`` of this library; it takes the name of a
            printed number and returns the counted one.
        printed: of an ``exact`` claim: the printed numbers by name; the band is of the relative
            errors.
    """

    kind: str
    experiment: str
    band: tuple[float, float]
    of: str = ""
    unit: str = ""
    possible: tuple[float, float] = (-math.inf, math.inf)
    variant: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    metric: str = ""
    reference_metric: str = ""
    against: float | None = None
    at_stake: Mapping[str, float] = field(default_factory=dict)
    x: str = ""
    terms: tuple[tuple[float, str, str], ...] = ()
    check: str = ""
    printed: Mapping[str, float] = field(default_factory=dict)

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
    def records(self) -> tuple[Record, ...]:
        """The records behind the numbers that are shown."""
        return tuple(run for result in self.results for run in result.records)

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
        name = entry.get("id") if isinstance(entry, dict) else None
        name = name or f"number {number}"
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
    _choice(entry["profile"], "profile", SCALES)
    at_least = _leasts(entry, "at_least")
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


def _leasts(entry: Any, name: str) -> dict[str, float]:
    leasts = entry.get(name, {})
    if not isinstance(leasts, dict) or not all(_is_number(v) for v in leasts.values()):
        raise ClaimError(f"{name} is {leasts!r}; write metric: number")
    return leasts


def _published(entry: Any) -> Published:
    _fields(entry, "a published number", {"value", "mark"}, set())
    _choice(entry["mark"], "mark", MARKS)
    return Published(_text(entry, "value"), entry["mark"])


def _statistic(entry: Any) -> Statistic:
    if not isinstance(entry, dict):
        raise ClaimError(f"a statistic is {entry!r}; write it as field: value")
    _choice(entry.get("kind"), "kind of statistic", _KINDS)
    required, further = _KINDS[entry["kind"]]
    measured = entry["kind"] != "exact"
    common = {"kind", "band"} | ({"experiment"} if measured else set())
    further = further | {"of", "unit"} | ({"possible", "at_stake"} if measured else set())
    _fields(entry, f"a statistic of kind {entry['kind']!r}", common | required, further)
    values: dict[str, Any] = {"experiment": "", "band": _range(entry, "band")}
    if "possible" in entry:
        values["possible"] = _range(entry, "possible")
    values["at_stake"] = _leasts(entry, "at_stake")
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
    if "printed" in entry:
        values["printed"] = entry["printed"]
        numbers = entry["printed"].values() if isinstance(entry["printed"], dict) else [None]
        if not numbers or not all(_is_number(number) and number for number in numbers):
            raise ClaimError(f"printed is {entry['printed']!r}; write name: number, none of them 0")
    if "check" in entry and not re.fullmatch(r"feedforward(\.\w+)+:\w+", entry["check"]):
        raise ClaimError(f"check is {entry['check']!r}; write feedforward.module:function")
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


def _range(entry: Mapping[str, Any], name: str) -> tuple[float, float]:
    given = entry[name]
    if isinstance(given, list) and len(given) == 2:
        low = -math.inf if given[0] is None else given[0]
        high = math.inf if given[1] is None else given[1]
        numbers = _is_number(low) and _is_number(high)
        if numbers and low <= high and (math.isfinite(low) or math.isfinite(high)):
            return float(low), float(high)
    raise ClaimError(
        f"{name} is {given!r}; write [low, high] with low <= high, and null for at most one open "
        "end"
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
        raise ClaimError(
            f"{name} is {value!r}; write a text (in quotes, if YAML reads it otherwise)"
        )
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
    3. A metric that is not finite, fewer than three seeds, or a claimed direction where the arms
       are equal in every run (such as no spike in either), unless records show that something was
       at stake: *inconclusive*. A run that diverged is never left out, since that would flatter
       its arm.
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


def current_verdicts() -> list[Verdict]:
    """The verdicts of ``book/claims.yml`` on the recorded runs under ``results/``."""
    claims = load_claims()
    experiments = {one.experiment for claim in claims for one in claim.statistics} - {""}
    return verdicts(claims, [run for name in sorted(experiments) for run in load_records(name)])


def compare(
    records: Iterable[Record],
    variant: str,
    reference: str,
    metric: str,
    *,
    kind: str = "difference",
    target: str | None = None,
    reference_metric: str | None = None,
) -> Result:
    """Two arms of one experiment and profile compared, as a statistic of a claim would be.

    So a chapter's prose and the ledger use the same intervals; `verdicts` says how they are made.

    Args:
        records: of an experiment; those of other variants are left alone.
        variant: the arm in question.
        reference: what it is compared with.
        metric: the name of a number in the records' metrics.
        kind: ``"difference"``, ``"ratio"``, ``"relative"`` (in percent), or ``"gap"``: the share of
            the way from `reference` to `target` that `variant` goes, of a metric that falls on
            that way.
        target: of a ``gap``.
        reference_metric: the reference's, where it is another one, even of the same arm.

    Returns:
        Estimate and ends of the 95 % interval; NaN, with the reason, where there is none. Its
        verdict says nothing here.

    Raises:
        ValueError: if an arm has no record with this metric, or the records are of several
            experiments or profiles.
    """
    if kind not in ("difference", "ratio", "relative", "gap") or (kind == "gap") != bool(target):
        raise ValueError(
            f"kind is {kind!r} and target {target!r}; give difference, ratio or relative, or gap "
            "with a target"
        )
    records = list(records)
    homes = {(record.experiment, record.profile) for record in records}
    if len(homes) != 1:
        raise ValueError(f"compare takes records of one experiment and profile, not of {homes}")
    ((experiment, profile),) = homes
    statistic = Statistic(
        kind,
        experiment,
        (-math.inf, math.inf),
        variant=(variant,),
        reference=(reference,),
        target=(target,) if target else (),
        metric=metric,
        reference_metric=reference_metric or "",
    )
    runs = _by_profile(statistic, records)
    if profile not in runs:
        raise ValueError(
            f"not every one of {', '.join(statistic.arms)} has a record of {experiment} at profile "
            f"{profile} with the metric {metric!r}"
        )
    arms = runs[profile]
    used = tuple(run for arm in arms.values() for run in arm.values())
    return Result(statistic, *_judge(statistic, arms), used)


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
        if SCALES.index(profile) >= SCALES.index(claim.profile)
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


# arm -> seed -> its record
_Arms = dict[str, dict[int, Record]]

_REASONS = {
    "reproduced": "the interval lies inside the band",
    "partly": "the effect has the claimed sign, but the interval is not inside the band",
    "not reproduced": "the interval lies outside the band",
    "inconclusive": "the interval is too wide to decide",
}


@dataclass(frozen=True)
class _Term:
    """A weighted metric of one arm, or its slope over several arms."""

    weight: float
    arms: tuple[str, ...]
    metric: str
    x: str = ""

    def value(self, runs: Sequence[Record], logarithm: bool) -> float:
        """The term for one seed, unweighted; NaN where it is not defined."""
        values = np.array([_metric(run, self.metric) for run in runs])
        with np.errstate(divide="ignore", invalid="ignore"):
            if not self.x:
                return float(np.log(values[0]) if logarithm else values[0])
            decades = np.log10([_metric(run, self.x) for run in runs])
            decades = decades - decades.mean()
            return float(decades @ (values - values.mean()) / (decades @ decades))


def _components(statistic: Statistic) -> list[list[_Term]]:
    """The statistic as weighted sums: one, or for a ``gap`` the way gone and the whole way."""
    one, other, metric = statistic.variant, statistic.reference, statistic.metric
    if statistic.kind == "contrast":
        return [[_Term(weight, (arm,), name) for weight, arm, name in statistic.terms]]
    if statistic.kind == "gap":
        start = _Term(1.0, other, metric)
        return [[start, _Term(-1.0, arm, metric)] for arm in (one, statistic.target)]
    terms = [_Term(1.0, one, metric, statistic.x)]
    if statistic.kind != "value":
        terms.append(_Term(-1.0, other, statistic.reference_metric or metric, statistic.x))
    return [terms]


def _judge(statistic: Statistic, arms: _Arms) -> tuple[str, str, float, float, float]:
    """Verdict, reason, estimate and the interval's ends, from the runs of every arm."""
    components = _components(statistic)
    logarithm = statistic.kind in ("ratio", "relative")
    # per component: the arms whose seeds go together -> seed -> weighted sum
    values: list[dict[tuple[str, ...], dict[int, float]]] = []
    for terms in components:
        groups: dict[tuple[str, ...], dict[int, float]] = {}
        for term in terms:
            seeds = sorted(set.intersection(*(set(arms[arm]) for arm in term.arms)))
            group = groups.setdefault(term.arms, dict.fromkeys(seeds, 0.0))
            for seed in seeds:
                value = term.value([arms[arm][seed] for arm in term.arms], logarithm)
                if not math.isfinite(value):
                    what = f"{term.metric} of {', '.join(term.arms)} at seed {seed}"
                    reason = f"{what} is missing or not {'positive and ' * logarithm}finite"
                    return "inconclusive", reason, math.nan, math.nan, math.nan
                group[seed] += term.weight * value
        values.append(groups)

    seeds = [set(group) for groups in values for group in groups.values()]
    shared = sorted(set.intersection(*seeds))
    if len(shared) >= LEAST_SEEDS:
        table = np.array([[sum(g[s] for g in gs.values()) for gs in values] for s in shared])
        mean, over_seeds = table.mean(axis=0), [(_covariance(table), len(shared) - 1)]
    else:
        fewest = min(map(len, seeds))
        if fewest < LEAST_SEEDS:
            reason = f"{fewest} of the {LEAST_SEEDS} seeds that an interval needs"
            # seeds differ more than arms do: a run is compared with those of its own seed
            values = [
                {arms: {s: group[s] for s in shared or group} for arms, group in groups.items()}
                for groups in values
            ]
            estimate = _estimate(statistic, _means(values)) if fewest else math.nan
            return "inconclusive", reason, estimate, math.nan, math.nan
        shared = []
        mean, over_seeds = _means(values), _independent(values)
    estimate = _estimate(statistic, mean)
    if reason := _what_items_lack(components, arms, shared):
        return "inconclusive", reason, estimate, math.nan, math.nan
    items = _item_covariance(components, arms, shared, logarithm)
    low, high = _interval(statistic, mean, over_seeds)
    if items:
        # more variance can also make it narrower, by more degrees of freedom: the wider one holds
        both = (low, high), _interval(statistic, mean, [*over_seeds, items])
        (low, _), (_, high) = np.min(both, axis=0).tolist(), np.max(both, axis=0).tolist()
    if not low <= high:
        return "inconclusive", "no gap is established", estimate, math.nan, math.nan
    least, most = statistic.possible
    low, high = max(low, least), min(high, most)
    equal = low == high == statistic.null and statistic.null in statistic.band
    every = [run for runs in arms.values() for run in runs.values()]
    at_stake = statistic.at_stake and all(_reaches(run, statistic.at_stake) for run in every)
    if equal and not at_stake:
        reason = "equal in every run, so that nothing was put to the test"
        return "inconclusive", reason, estimate, low, high
    verdict = decide(low, high, statistic.band, statistic.null)
    return verdict, _REASONS[verdict], estimate, low, high


def _means(values: list[dict]) -> np.ndarray:
    return np.array([sum(np.mean([*g.values()]) for g in groups.values()) for groups in values])


def _covariance(table: np.ndarray) -> np.ndarray:
    """The covariance of the mean of rows."""
    return np.atleast_2d(np.cov(table, rowvar=False)) / len(table)


def _independent(values: list[dict]) -> list[tuple[np.ndarray, int]]:
    """The covariance of the mean with its degrees of freedom, for each group of arms by itself."""
    parts = []
    for arms in dict.fromkeys(arms for groups in values for arms in groups):
        columns = [groups.get(arms) for groups in values]
        seeds = next(column for column in columns if column)
        table = np.array([[column[s] if column else 0.0 for column in columns] for s in seeds])
        parts.append((_covariance(table), len(table) - 1))
    return parts


def _item_scores(term: _Term, arms: _Arms, seeds: list[int]) -> list[tuple[Record, dict]]:
    """The runs of a term, each with its scores of single items; empty where it has none."""
    runs = [run for seed, run in arms[term.arms[0]].items() if seed in seeds or not seeds]
    return [(run, run.metrics.get("items", {}).get(term.metric) or {}) for run in runs]


def _what_items_lack(components: list[list[_Term]], arms: _Arms, seeds: list[int]) -> str:
    """Why the luck of the items cannot be told, where some runs have their scores."""
    terms = [term for terms in components for term in terms if not term.x]
    scores = {term: [one for _, one in _item_scores(term, arms, seeds)] for term in terms}
    have = [bool(one) for own in scores.values() for one in own]
    if any(have) and not all(have):
        return "only some of the runs have the scores of single items"
    for term, own in scores.items():
        if len({frozenset(one) for one in own}) > 1:
            return f"the runs of {term.arms[0]} were not scored on the same items"
    return ""


def _item_covariance(
    components: list[list[_Term]], arms: _Arms, seeds: list[int], logarithm: bool
) -> tuple[np.ndarray, int] | None:
    """The covariance that comes from the choice of items, by a bootstrap paired over the arms.

    None where records have no scores of single items. Arms that were scored on the same items are
    resampled together.
    """
    draws: dict[tuple[str, ...], np.ndarray] = {}
    estimates = []
    for terms in components:
        total = 0.0
        for term in terms:
            scored = [] if term.x else _item_scores(term, arms, seeds)
            if not scored or not scored[0][1]:
                return None
            ids = tuple(sorted(scored[0][1]))
            means = np.array([[one[name] for name in ids] for _, one in scored])
            for (run, _), row in zip(scored, means, strict=True):
                if not math.isclose(
                    row.mean(), run.metrics[term.metric], rel_tol=1e-3, abs_tol=1e-6
                ):
                    raise ClaimError(
                        f"record {run.experiment}/{run.variant}, seed {run.seed}: the items of "
                        f"{term.metric} have the mean {row.mean():g}, the metric is "
                        f"{run.metrics[term.metric]:g}; record both in one unit"
                    )
            if ids not in draws:
                generator = np.random.default_rng(len(draws))
                shares = generator.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), RESAMPLES)
                draws[ids] = shares / len(ids)
            resampled = draws[ids] @ means.mean(axis=0)
            with np.errstate(divide="ignore"):
                total = total + term.weight * (np.log(resampled) if logarithm else resampled)
        estimates.append(total)
    covariance = np.atleast_2d(np.cov(estimates))
    return (covariance, min(map(len, draws)) - 1) if np.isfinite(covariance).all() else None


def _quantile(parts: list[tuple[np.ndarray, int]]) -> float:
    """Student's t for a sum of estimated variances (Welch and Satterthwaite)."""
    from scipy.special import stdtrit

    sizes = [(float(np.trace(part)), freedom) for part, freedom in parts]
    spread = sum(size**2 / freedom for size, freedom in sizes)
    total = sum(size for size, _ in sizes)
    freedom = total**2 / spread if spread else min(freedom for _, freedom in sizes)
    return float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def _estimate(statistic: Statistic, mean: np.ndarray) -> float:
    if statistic.kind == "gap":
        return float(mean[0] / mean[1]) if mean[1] else math.nan
    if statistic.kind in ("ratio", "relative"):
        ratio = math.exp(mean[0])
        return 100 * (ratio - 1) if statistic.kind == "relative" else ratio
    return float(mean[0])


def _interval(
    statistic: Statistic, mean: np.ndarray, parts: list[tuple[np.ndarray, int]]
) -> tuple[float, float]:
    """The ends of the interval; NaN for a gap that is itself not above zero."""
    covariance, quantile = sum(part for part, _ in parts), _quantile(parts)
    if statistic.kind == "gap":
        (gone, whole), (v, c, w) = mean, (covariance[0, 0], covariance[0, 1], covariance[1, 1])
        a = whole**2 - quantile**2 * w
        b = gone * whole - quantile**2 * c
        inner = b**2 - a * (gone**2 - quantile**2 * v)
        if whole <= 0 or a <= 0:
            return math.nan, math.nan
        reach = math.sqrt(max(inner, 0.0))
        return (b - reach) / a, (b + reach) / a
    half = quantile * math.sqrt(covariance[0, 0])
    low, high = (_estimate(statistic, mean + shift) for shift in (-half, half))
    return low, high


def _exact(statistic: Statistic) -> Result:
    """Printed numbers against counted ones: exact where every relative error is in the band."""
    module, _, name = statistic.check.partition(":")
    try:
        count = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ClaimError(f"check {statistic.check!r} cannot be loaded: {error}") from error
    errors = [abs(count(cell) / printed - 1) for cell, printed in statistic.printed.items()]
    agreeing = sum(statistic.band[0] <= error <= statistic.band[1] for error in errors)
    worst = max(errors)
    reason = f"{agreeing} of {len(errors)} printed numbers agree"
    verdict = "exact" if agreeing == len(errors) else "not reproduced"
    return Result(statistic, verdict, reason, worst, worst, worst)


def structured_cost(cell: str) -> float:
    """Count one number of arXiv 2406.16450, named like ``"xl-lowrank-63 parameters"``.

    The quantities are ``parameters``, ``FFN parameters`` and ``FLOPs`` (of the whole training).
    Explained in ``book/foundations/01-feed-forward``.

    Raises:
        ValueError: if the model or the quantity has another name.
    """
    from feedforward.layers.cost import PAPER_SHAPES, breakdown
    from feedforward.lm.scaling import PAPER_TOKENS

    name, _, quantity = cell.partition(" ")
    if name not in PAPER_SHAPES or quantity not in ("parameters", "FFN parameters", "FLOPs"):
        raise ValueError(
            f"{cell!r} is no number of the paper; write a model ({', '.join(PAPER_SHAPES)}), a "
            "space, and parameters, FFN parameters or FLOPs"
        )
    parts = breakdown(PAPER_SHAPES[name])
    if quantity == "FFN parameters":
        return parts["ffn"].parameters
    if quantity == "FLOPs":
        return (
            sum(part.training_flops for part in parts.values()) * PAPER_TOKENS[name.split("-")[0]]
        )
    return sum(part.parameters for part in parts.values())


def _by_profile(statistic: Statistic, records: Iterable[Record]) -> dict[str, _Arms]:
    """The runs that a statistic can use, at each profile at which every arm has one.

    Of an arm with the metrics at some seed all runs are used: none is left out for lacking them.
    """
    needed: dict[str, set[str]] = {arm: set() for arm in statistic.arms}
    for terms in _components(statistic):
        for term in terms:
            for arm in term.arms:
                needed[arm] |= {term.metric, term.x} - {""}
    found: dict[str, _Arms] = {profile: {} for profile in SCALES}
    for record in records:
        arm = record.variant
        if record.experiment != statistic.experiment or record.profile not in found:
            continue
        if arm in needed:
            runs = found[record.profile].setdefault(arm, {})
            if record.seed in runs:
                raise ClaimError(
                    f"two records of {statistic.experiment}/{record.profile}/{arm} with seed "
                    f"{record.seed} (keys {runs[record.seed].key}, {record.key}); keep one"
                )
            runs[record.seed] = record
    usable = {
        profile: {
            arm: runs
            for arm, runs in arms.items()
            if any(needed[arm] <= run.metrics.keys() for run in runs.values())
        }
        for profile, arms in found.items()
    }
    return {profile: arms for profile, arms in usable.items() if arms.keys() == needed.keys()}


def _largest(runs: Mapping[str, _Arms]) -> _Arms:
    """The runs of the largest profile with enough seeds, else of the largest."""
    enough = [arms for arms in runs.values() if min(map(len, arms.values())) >= LEAST_SEEDS]
    return (enough or list(runs.values()))[-1]


def _what_lacks(statistic: Statistic, records: Iterable[Record]) -> str:
    made = {
        record.variant
        for record in records
        if record.experiment == statistic.experiment and record.profile in SCALES
    }
    lacking = [arm for arm in statistic.arms if arm not in made]
    if len(lacking) == len(statistic.arms):
        return "no recorded run yet"
    if lacking:
        return f"no recorded run yet of {', '.join(lacking)}"
    return "no profile at which every arm has a recorded run with the metrics it needs"


def _reaches(record: Record, at_least: Mapping[str, float]) -> bool:
    return all(_metric(record, name) >= value for name, value in at_least.items())


def _metric(record: Record, name: str) -> float:
    value = record.metrics.get(name)
    return float(value) if _is_number(value) else math.nan


# The ledger -------------------------------------------------------------------------------------


def ledger_rows(verdicts: Iterable[Verdict] | None = None) -> list[dict[str, str]]:
    """The ledger as texts, one dict a claim: what a table or another page shows of it.

    Args:
        verdicts: by default those of the book's claims on the recorded runs.
    """
    return [
        {
            "claim": one.claim.id,
            "paper": PAPERS[one.claim.paper],
            "statement": one.claim.statement,
            "the paper": "; ".join(
                f"{with_minus(p.value)} ({p.mark})" for p in one.claim.published
            ),
            "ours": _ours(one),
            "scale": _scale(one),
            "verdict": one.verdict,
            "because": one.reason,
            "chapter": one.claim.chapter,
        }
        for one in (current_verdicts() if verdicts is None else verdicts)
    ]


def ledger_markdown(verdicts: Iterable[Verdict] | None = None) -> str:
    """The ledger as MyST: a list table of class ``ledger``, one row a claim.

    Each row has the target ``claim-<id>`` (the roles ``ref`` and ``numref`` reach it) and carries
    its paper and verdict as data attributes, which ``_static/ledger.js`` filters by.
    """
    verdicts = current_verdicts() if verdicts is None else list(verdicts)
    lines = [":::::{list-table}", ":class: ledger", ":header-rows: 1", ":widths: 11 33 20 18 18"]
    heads = ("Claim", "Statement", "The paper's number", "Ours", "Verdict")
    lines += ["", *_cells([[head] for head in heads])]
    for one, row in zip(verdicts, ledger_rows(verdicts), strict=True):
        claim, verdict = one.claim, one.verdict
        tag = f'class="claim" data-paper="{row["paper"]}" data-verdict="{verdict}"'
        kind = verdict.replace(" ", "-")
        lines += _cells(
            [
                [
                    f"(claim-{claim.id})=",
                    f"<span {tag}>{claim.id}</span>",
                    f"{{doc}}`chapter </{claim.chapter}>`",
                ],
                [claim.statement, *([f"*{claim.note}*"] if claim.note else [])],
                [
                    f'{with_minus(p.value)} <span class="mark">{p.mark}</span>'
                    for p in claim.published
                ],
                [*row["ours"].split("; "), *([f"*{row['scale']}*"] if one.records else [])],
                [f'<span class="verdict verdict-{kind}">{verdict}</span>', row["because"]],
            ]
        )
    return "\n".join([*lines, ":::::", ""])


def ledger_summary(verdicts: Iterable[Verdict] | None = None) -> str:
    """How many claims of each paper have which verdict, as a Markdown table."""
    verdicts = current_verdicts() if verdicts is None else list(verdicts)
    found = {paper: [v.verdict for v in verdicts if v.claim.paper == paper] for paper in PAPERS}
    lines = [f"| | {' | '.join(PAPERS.values())} |", "|---" + "|--:" * len(PAPERS) + "|"]
    for verdict in reversed(VERDICTS):
        counts = [mine.count(verdict) for mine in found.values()]
        if any(counts):
            lines.append(f"| {verdict} | {' | '.join(map(str, counts))} |")
    lines.append(f"| claims | {' | '.join(str(len(mine)) for mine in found.values())} |")
    return "\n".join(lines) + "\n"


def _cells(cells: list[list[str]]) -> list[str]:
    """The rows of a list table; a cell is a list of paragraphs."""
    lines = []
    for number, paragraphs in enumerate(cells):
        text = "\n\n".join(paragraphs).replace(")=\n\n", ")=\n")
        first, *rest = text.split("\n")
        lines.append(f"{'* -' if not number else '  -'} {first}")
        lines += [f"    {line}".rstrip() for line in rest]
    return lines


def with_minus(text: str) -> str:
    """The text with minus signs for the hyphens before digits.

    >>> with_minus("-0.5 [-1e-3, +2] at AVX-512")
    '−0.5 [−1e-3, +2] at AVX-512'
    """
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def _ours(verdict: Verdict) -> str:
    shown = [_result(one) for one in verdict.results if not math.isnan(one.estimate)]
    return "; ".join(shown) or "–"


def _result(result: Result) -> str:
    statistic = result.statistic
    if statistic.kind == "exact":
        return f"{len(statistic.printed)} numbers, at most {100 * result.estimate:.1f} % apart"
    sign = "+" if statistic.null == 0 else ""
    width = result.high - result.low
    # two figures of the width; but rounding errors are not worth a line of zeros
    decimals = min(5, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 3
    form = f"{sign}z.{decimals}f"  # z: what rounds to zero has no minus
    text = f"{result.estimate:{form}}"
    if not math.isnan(width):
        text += f" [{result.low:{form}}, {result.high:{form}}]"
    name = f"{statistic.of}: " if statistic.of else ""
    return f"{name}{with_minus(text)} {statistic.unit}".rstrip()


def _scale(verdict: Verdict) -> str:
    runs = verdict.records
    if not runs:
        exact = all(result.statistic.kind == "exact" for result in verdict.results)
        return "counted" if exact else "–"
    profiles = "/".join(dict.fromkeys(run.profile for run in runs))
    arms: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        arms.setdefault((run.profile, run.variant), set()).add(run.seed)
    seeds = min(map(len, arms.values()))
    return f"{profiles}, {seeds} seed{'s' * (seeds != 1)}, {devices_of(runs)}"
