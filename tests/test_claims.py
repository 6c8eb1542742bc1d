"""The claims file is checked, and every verdict is reached by the rule and by nothing else."""

import dataclasses
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from feedforward import claims as module
from feedforward.claims import (
    MARKS,
    PAPERS,
    VERDICTS,
    Claim,
    ClaimError,
    Published,
    Statistic,
    compare,
    decide,
    ledger_markdown,
    ledger_rows,
    ledger_summary,
    load_claims,
    structured_cost,
    verdicts,
)
from feedforward.records import Provenance, Record

BOOK = Path(__file__).resolve().parents[1] / "book"
INF = math.inf

HERE = Provenance(
    commit=None,
    dirty=None,
    lock=None,
    versions={},
    device="a test processor",
    threads=1,
    seconds=1.0,
    peak_memory=None,
    date="2025-01-02T00:00:00+00:00",
    python="3.11",
)


def record(variant, seed, value, *, profile="cpu", metric="score", items=None, **metrics):
    metrics = {metric: value} | metrics
    if items is not None:
        metrics["items"] = {metric: items}
    config = {"variant": variant, "seed": seed, "profile": profile}
    return Record("demo", variant, profile, seed, config, metrics, {}, HERE)


def arm(variant, values, **options):
    return [record(variant, seed, value, **options) for seed, value in enumerate(values)]


def claim(*statistics, profile="cpu", **options):
    return Claim(
        id="demo-1",
        paper="adamoe",
        statement="A beats B.",
        published=(Published("+2", "abstract"),),
        statistics=statistics,
        profile=profile,
        chapter="adamoe/index",
        **options,
    )


def difference(band=(1.0, INF), **options):
    fields = {"kind": "difference", "variant": ("a",), "reference": ("b",), "metric": "score"}
    return Statistic(experiment="demo", band=band, **fields | options)


def judge(statistic, records, **options):
    (verdict,) = verdicts([claim(statistic, **options)], records)
    return verdict


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ([3.0, 3.1, 2.9], "reproduced"),
        ([0.5, 0.6, 0.55], "partly"),
        ([1.0, 1.1, 0.9], "partly"),
        ([-3.0, -3.1, -2.9], "not reproduced"),
        ([0.0, 0.0, 0.0], "not reproduced"),
        ([0.1, -0.1, 0.05], "not reproduced"),
        ([4.0, -1.0, 3.0], "inconclusive"),
    ],
)
def test_interval_over_seeds_decides(a, expected):
    assert judge(difference(), arm("a", a) + arm("b", [0.0, 0.0, 0.0])).verdict == expected


@pytest.mark.parametrize("band", [(0.0, INF), (-INF, 0.0)])
def test_what_never_happened_decides_no_direction(band):
    """Spikes are counted in two arms, and there is none: neither has fewer."""
    result = judge(difference(band), arm("a", [0, 0, 0]) + arm("b", [0, 0, 0]))
    assert result.verdict == "inconclusive"
    assert "equal in every run" in result.reason


def test_what_happened_and_changed_nothing_is_a_finding():
    def runs(*stakes):
        return [record("a", s, 1.0, other=1.0, lost=lost) for s, lost in enumerate(stakes)]

    same = {"reference": ("a",), "reference_metric": "other"}
    statistic = difference(band=(0.0, INF), at_stake={"lost": 0.01}, **same)
    assert judge(statistic, runs(0.02, 0.05, 0.01)).verdict == "not reproduced"
    assert judge(statistic, runs(0.02, 0.05, 0.009)).verdict == "inconclusive"
    assert judge(statistic, arm("a", [1.0] * 3, other=1.0)).verdict == "inconclusive"
    unequal = [record("a", s, 1.0 + s / 10, other=0.0, lost=0.0) for s in range(3)]
    assert judge(statistic, unequal).verdict == "reproduced"


def test_no_effect_can_be_claimed_too():
    same, apart = arm("a", [5.0, 5.01, 4.99]), arm("a", [7.0, 7.01, 6.99])
    statistic = difference(band=(-0.5, 0.5))
    other = arm("b", [5.0, 5.0, 5.0])
    assert judge(statistic, same + other).verdict == "reproduced"
    assert judge(statistic, apart + other).verdict == "not reproduced"


def test_a_direction_needs_an_interval_off_no_effect():
    assert decide(0.0, 1.0, (0.0, INF), 0.0) == "inconclusive"
    assert decide(1e-9, 1.0, (0.0, INF), 0.0) == "reproduced"
    assert decide(0.0, 0.0, (0.0, INF), 0.0) == "not reproduced"


def test_decide_is_consistent_on_a_grid():
    """Exactly one verdict; mirrored intervals and bands agree; a narrower one is never weaker."""
    ends = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0]
    bands = [(1.0, INF), (0.0, INF), (0.5, 2.0), (-0.5, 0.5), (-1.0, INF), (-INF, -1.0)]
    for band in bands:
        for low, high in itertools.combinations_with_replacement(ends, 2):
            verdict = decide(low, high, band, 0.0)
            assert verdict in ("reproduced", "partly", "not reproduced", "inconclusive")
            assert verdict == decide(-high, -low, (-band[1], -band[0]), 0.0)
            inside = band[0] <= low and high <= band[1]
            assert (verdict == "reproduced") <= inside
            if verdict == "reproduced":
                middle = (low + high) / 2
                assert decide(middle, middle, band, 0.0) == "reproduced"


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("value", [-100.0, 0.0, 2.0, 100.0])
def test_fewer_than_three_seeds_decide_nothing(seeds, value):
    verdict = judge(difference(), arm("a", [value] * seeds) + arm("b", [0.0] * seeds))
    assert verdict.verdict == "inconclusive"
    assert f"{seeds} of the 3 seeds" in verdict.reason
    (result,) = verdict.results
    assert result.estimate == value
    assert math.isnan(result.low)


def test_three_seeds_of_one_arm_are_not_enough():
    assert judge(difference(), arm("a", [3.0] * 3) + arm("b", [0.0] * 2)).verdict == "inconclusive"


def test_smoke_never_counts():
    smoke = arm("a", [3.0] * 3, profile="smoke") + arm("b", [0.0] * 3, profile="smoke")
    assert judge(difference(), smoke).verdict == "not run"
    recorded = arm("a", [-3.0] * 3) + arm("b", [0.0] * 3)
    verdict = judge(difference(), smoke + recorded)
    assert verdict.verdict == "not reproduced"
    assert {run.profile for run in verdict.weakest.records} == {"cpu"}


def test_profiles_outside_the_book_never_count():
    records = arm("a", [3.0] * 3, profile="custom") + arm("b", [0.0] * 3, profile="custom")
    assert judge(difference(), records).verdict == "not run"


def test_a_missing_arm_is_named():
    assert judge(difference(), []).reason == "no recorded run yet"
    verdict = judge(difference(), arm("a", [1.0] * 3))
    assert (verdict.verdict, verdict.reason) == ("not run", "no recorded run yet of b")


def test_records_of_other_experiments_and_metrics_are_left_alone():
    others = [dataclasses.replace(r, experiment="other") for r in arm("a", [9.0] * 3)]
    records = others + arm("a", [1.0] * 3, metric="loss") + arm("b", [0.0] * 3)
    assert judge(difference(), records).verdict == "not run"


def test_a_smaller_scale_decides_nothing_but_is_shown():
    verdict = judge(difference(), arm("a", [3.0] * 3) + arm("b", [0.0] * 3), profile="gpu")
    assert verdict.verdict == "needs more scale"
    assert verdict.results[0].estimate == 3.0
    assert "profile gpu" in verdict.reason


def test_records_must_reach_the_metrics_of_the_claim():
    def runs(tokens):
        return arm("a", [3.0] * 3, tokens=tokens) + arm("b", [0.0] * 3, tokens=tokens)

    needs = {"at_least": {"tokens": 10}}
    assert judge(difference(), runs(9), **needs).verdict == "needs more scale"
    assert judge(difference(), runs(10), **needs).verdict == "reproduced"
    assert judge(difference(), runs(None), **needs).verdict == "needs more scale"


def test_the_largest_scale_with_enough_seeds_is_used_and_never_mixed():
    small = arm("a", [3.0] * 3) + arm("b", [0.0] * 3)
    one = arm("a", [-9.0], profile="gpu") + arm("b", [0.0], profile="gpu")
    verdict = judge(difference(), small + one)
    assert verdict.verdict == "reproduced"
    three = arm("a", [-9.0] * 3, profile="gpu") + arm("b", [0.0] * 3, profile="gpu")
    assert judge(difference(), small + three).verdict == "not reproduced"
    half = arm("a", [-9.0] * 3, profile="gpu")  # the other arm has no run at this profile
    assert judge(difference(), small + half).verdict == "reproduced"


@pytest.mark.parametrize("broken", [None, "diverged"])
def test_a_run_without_a_number_is_not_left_out(broken):
    records = arm("a", [3.0, 3.0, 3.0, broken]) + arm("b", [0.0] * 4)
    verdict = judge(difference(), records)
    assert verdict.verdict == "inconclusive"
    assert verdict.reason == "score of a at seed 3 is missing or not finite"


def test_a_run_that_lacks_the_metric_is_not_left_out():
    lacking = record("a", 3, 1.0, metric="another")
    verdict = judge(difference(), [*arm("a", [3.0] * 3), lacking, *arm("b", [0.0] * 4)])
    assert verdict.verdict == "inconclusive"
    assert verdict.reason == "score of a at seed 3 is missing or not finite"


def test_two_records_of_one_run_are_refused():
    twice = arm("a", [1.0] * 3) + arm("a", [2.0]) + arm("b", [0.0] * 3)
    with pytest.raises(ClaimError, match="two records of demo/cpu/a with seed 0"):
        judge(difference(), twice)


def test_a_claim_is_as_strong_as_its_weakest_statistic():
    records = arm("a", [3.0] * 3) + arm("b", [0.0] * 3) + arm("c", [9.0] * 3)
    weak = difference(reference=("c",), of="over c")
    (verdict,) = verdicts([claim(difference(of="over b"), weak)], records)
    assert verdict.verdict == "not reproduced"
    assert verdict.reason.startswith("over c: ")
    absent = difference(reference=("d",), of="over d")
    (verdict,) = verdicts([claim(difference(of="over b"), absent)], records)
    assert verdict.verdict == "not run"


def test_every_verdict_can_be_reached():
    recorded = arm("a", [3.0, 3.1, 2.9]) + arm("b", [0.0] * 3)
    exact = Statistic("exact", "", (0.0, 0.01), check="feedforward.claims:structured_cost",
                      printed={"s parameters": 110e6})  # fmt: skip
    reached = {
        judge(difference(), recorded).verdict,
        judge(difference(band=(4.0, INF)), recorded).verdict,
        judge(difference(band=(-INF, -1.0)), recorded).verdict,
        judge(difference(), recorded[:4]).verdict,
        judge(difference(), recorded, profile="paper").verdict,
        judge(difference(), []).verdict,
        judge(exact, []).verdict,
    }
    assert reached == set(VERDICTS)


# --- the intervals --------------------------------------------------------------------------------


def test_shared_seeds_are_paired():
    """A large spread that both arms share does not widen the interval of their difference."""
    shared = np.array([0.0, 10.0, 20.0, 30.0])
    records = arm("a", [*(shared + [2.0, 2.1, 1.9, 2.0])]) + arm("b", [*shared])
    (result,) = judge(difference(), records).results
    assert result.verdict == "reproduced"
    assert result.high - result.low < 0.5
    apart = [dataclasses.replace(r, seed=r.seed + 100) for r in records if r.variant == "b"]
    unpaired = judge(difference(), [r for r in records if r.variant == "a"] + apart)
    assert unpaired.verdict == "inconclusive"
    assert unpaired.results[0].estimate == pytest.approx(2.0)


def test_too_few_runs_are_compared_with_those_of_their_own_seeds():
    records = arm("a", [12.0]) + arm("b", [10.0, 20.0, 30.0])
    (result,) = judge(difference(), records).results
    assert (result.verdict, result.estimate) == ("inconclusive", pytest.approx(2.0))
    assert math.isnan(result.low)
    apart = [dataclasses.replace(r, seed=r.seed + 7) for r in records if r.variant == "a"]
    (result,) = judge(difference(), apart + records[1:]).results
    assert result.estimate == pytest.approx(-8.0)


def test_intervals_are_those_of_the_textbook():
    a, b = np.array([1.2, 2.9, 2.0, 1.1, 3.3]), np.array([0.1, -1.0, 0.7, 0.2, 0.5])
    (result,) = judge(difference(), arm("a", [*a]) + arm("b", [*b])).results
    half = 2.776445 * (a - b).std(ddof=1) / 5**0.5  # t of 4 degrees of freedom
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half))

    apart = [dataclasses.replace(r, seed=r.seed + 9) for r in arm("b", [*b])]
    (result,) = judge(difference(), arm("a", [*a]) + apart).results
    va, vb = a.var(ddof=1) / 5, b.var(ddof=1) / 5
    freedom = (va + vb) ** 2 / (va**2 / 4 + vb**2 / 4)
    assert freedom == pytest.approx(6.98, abs=0.02)
    half = 2.366 * (va + vb) ** 0.5  # t of about 7 degrees of freedom: 2.3646
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half), abs=2e-3)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(300):
        a, b = rng.normal(2.0, 1.0, 4), rng.normal(0.0, 1.0, 4)
        (result,) = judge(difference(), arm("a", [*a]) + arm("b", [*b])).results
        inside += result.low <= 2.0 <= result.high
    assert 0.91 <= inside / 300 <= 0.985


def items_of(rng, count, mean):
    scores = np.clip(rng.normal(mean, 20.0, count), 0, 100)
    return {f"q{i}": float(score) for i, score in enumerate(scores)}


def with_items(variant, seed, items):
    return record(variant, seed, float(np.mean([*items.values()])), items=items)


def test_items_widen_the_interval_by_their_own_variance():
    rng = np.random.default_rng(3)
    a, b = items_of(rng, 50, 55.0), items_of(rng, 50, 50.0)
    records = [with_items("a", s, a) for s in range(3)] + [with_items("b", s, b) for s in range(3)]
    (result,) = judge(difference(), records).results
    paired = np.array([a[q] - b[q] for q in a])
    half = 1.96 * paired.std(ddof=1) / 50**0.5  # no spread over seeds: the items' alone
    assert (result.high - result.low) / 2 == pytest.approx(half, rel=0.1)
    without = [dataclasses.replace(r, metrics={"score": r.metrics["score"]}) for r in records]
    (bare,) = judge(difference(), without).results
    assert bare.high - bare.low == pytest.approx(0.0, abs=1e-9)


def test_items_never_make_the_interval_narrower():
    """Their degrees of freedom would, where seeds scatter more than items."""
    rng = np.random.default_rng(7)
    b = items_of(rng, 100, 50.0)
    records = [with_items("b", s, b) for s in range(3)]
    for seed, shift in enumerate((0.0, 4.0, 8.0)):
        moved = {q: score + shift + rng.normal(0, 20) for q, score in b.items()}
        records.append(with_items("a", seed, moved))
    bare = [dataclasses.replace(r, metrics={"score": r.metrics["score"]}) for r in records]
    (full,), (seeds,) = judge(difference(), records).results, judge(difference(), bare).results
    assert (full.low, full.high) == pytest.approx((seeds.low, seeds.high))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda items: None, "only some of the runs have the scores of single items"),
        (
            lambda items: {f"other {q}": score for q, score in items.items()},
            "the runs of a were not scored on the same items",
        ),
    ],
)
def test_runs_that_differ_in_their_items_decide_nothing(spoil, reason):
    rng = np.random.default_rng(8)
    a, b = items_of(rng, 50, 90.0), items_of(rng, 50, 10.0)
    records = [with_items("a", s, a) for s in range(3)] + [with_items("b", s, b) for s in range(3)]
    assert judge(difference(), records).verdict == "reproduced"
    records[2] = record("a", 2, records[2].metrics["score"], items=spoil(a))
    verdict = judge(difference(), records)
    assert (verdict.verdict, verdict.reason) == ("inconclusive", reason)


def test_items_are_paired_over_the_arms():
    """The same hard and easy questions in both arms cancel."""
    rng = np.random.default_rng(4)
    b = items_of(rng, 200, 50.0)
    a = {q: score + 2.0 for q, score in b.items()}
    records = [with_items("a", s, a) for s in range(3)] + [with_items("b", s, b) for s in range(3)]
    (result,) = judge(difference(), records).results
    assert (result.low, result.high) == pytest.approx((2.0, 2.0))
    renamed = {f"other {q}": score for q, score in b.items()}
    records[3:] = [with_items("b", s, renamed) for s in range(3)]
    (result,) = judge(difference(), records).results
    assert result.high - result.low > 4.0


def test_the_bootstrap_is_the_same_every_time():
    rng = np.random.default_rng(5)
    records = [with_items(v, s, items_of(rng, 40, 50.0)) for v in "ab" for s in range(3)]
    first, second = (judge(difference(), records).results[0] for _ in range(2))
    assert (first.low, first.high) == (second.low, second.high)


def test_items_in_another_unit_than_the_metric_are_refused():
    wrong = [record(v, s, 50.0, items={"q1": 0.5, "q2": 0.5}) for v in "ab" for s in range(3)]
    with pytest.raises(ClaimError, match="one unit"):
        judge(difference(), wrong)


# --- the kinds of statistics ----------------------------------------------------------------------


def test_ratio_and_relative_gain():
    records = arm("a", [2.0, 4.0, 8.0]) + arm("b", [1.0, 2.0, 4.0])
    (ratio,) = judge(difference(kind="ratio", band=(1.5, INF)), records).results
    assert (ratio.estimate, ratio.low, ratio.verdict) == (
        pytest.approx(2.0), pytest.approx(2.0), "reproduced"
    )  # fmt: skip
    (gain,) = judge(difference(kind="relative", band=(50.0, INF)), records).results
    assert gain.estimate == pytest.approx(100.0)
    zero = judge(difference(kind="ratio"), arm("a", [0.0] * 3) + arm("b", [1.0] * 3))
    assert zero.verdict == "inconclusive"
    assert "positive" in zero.reason


def test_no_effect_of_a_ratio_is_one():
    statistic = difference(kind="ratio", band=(1.0, INF))
    slower = arm("a", [0.5, 0.51, 0.49]) + arm("b", [1.0] * 3)
    assert judge(statistic, slower).verdict == "not reproduced"


def test_another_metric_of_the_same_arm():
    records = [record("a", s, 70.0 + s, other=90.0 + s) for s in range(3)]
    statistic = difference(reference=("a",), reference_metric="other", band=(-INF, -11.0))
    (result,) = judge(statistic, records).results
    assert (result.estimate, result.verdict) == (-20.0, "reproduced")
    compared = compare(records, "a", "a", "score", reference_metric="other")
    assert (compared.estimate, compared.low, compared.high) == (-20.0, result.low, result.high)


def test_value_against_a_number():
    statistic = Statistic("value", "demo", (0.3, INF), variant=("a",), metric="score", against=0.1)
    assert judge(statistic, arm("a", [0.2, 0.21, 0.19])).verdict == "partly"
    plain = dataclasses.replace(statistic, against=None)
    assert judge(plain, arm("a", [0.2, 0.21, 0.19])).verdict == "not reproduced"


def test_contrast_is_a_difference_of_differences():
    terms = ((1, "a", "long"), (-1, "b", "long"), (-1, "a", "short"), (1, "b", "short"))
    statistic = Statistic("contrast", "demo", (3.0, INF), terms=terms)
    records = [record("a", s, 0.0, long=90.0 + s, short=95.0 + s) for s in range(3)]
    records += [record("b", s, 0.0, long=80.0 - s, short=94.0 - s) for s in range(3)]
    (result,) = judge(statistic, records).results
    assert result.estimate == pytest.approx(9.0)
    assert result.verdict == "reproduced"


def test_interval_ends_with_what_is_possible():
    shares = arm("a", [0.5, 0.8, 0.95])
    free = Statistic("value", "demo", (0.3, INF), variant=("a",), metric="score", against=0.25)
    bounded = dataclasses.replace(free, possible=(0.0, 1.0))
    (wide,), (kept,) = judge(free, shares).results, judge(bounded, shares).results
    assert wide.high > 1.0
    assert (kept.low, kept.high, kept.estimate) == (wide.low, 1.0, wide.estimate)


def gap(band=(0.25, INF)):
    names = {"variant": ("guided",), "reference": ("lowrank",), "target": ("dense",)}
    return Statistic("gap", "demo", band, metric="score", **names)


def test_gap_is_the_share_of_the_way():
    records = arm("lowrank", [4.2, 4.21, 4.19]) + arm("dense", [4.0, 4.0, 4.01])
    (result,) = judge(gap(), records + arm("guided", [4.1, 4.1, 4.1])).results
    assert result.estimate == pytest.approx(0.5, abs=0.03)
    assert result.low < 0.5 < result.high
    assert result.verdict == "reproduced"
    worse = judge(gap(), records + arm("guided", [4.3, 4.31, 4.3]))
    assert worse.verdict == "not reproduced"


@pytest.mark.parametrize("dense", [[4.1, 4.4, 4.0], [4.5, 4.5, 4.51]])
def test_without_a_gap_nothing_can_be_removed(dense):
    records = arm("lowrank", [4.2, 4.21, 4.19]) + arm("dense", dense)
    verdict = judge(gap(), records + arm("guided", [4.1, 4.1, 4.1]))
    assert (verdict.verdict, verdict.reason) == ("inconclusive", "no gap is established")


def test_slope_per_decade():
    records = []
    for seed in range(3):
        for name, flops in (("1", 1e3), ("2", 1e4), ("3", 1e5)):
            decades = math.log10(flops) - 3
            steep, flat = 4 - 0.4 * decades, 4 - 0.3 * decades + 0.001 * seed
            records.append(record(f"a-{name}", seed, steep, flops=flops))
            records.append(record(f"b-{name}", seed, flat, flops=flops))
    names = {v: tuple(f"{v}-{i}" for i in "123") for v in "ab"}
    statistic = Statistic(
        "slope", "demo", (-INF, -0.05), variant=names["a"], reference=names["b"],
        metric="score", x="flops",
    )  # fmt: skip
    (result,) = judge(statistic, records).results
    assert result.estimate == pytest.approx(-0.1)
    assert result.verdict == "reproduced"
    same = [dataclasses.replace(r, metrics=r.metrics | {"flops": 1e3}) for r in records]
    assert judge(statistic, same).verdict == "inconclusive"


def test_exact_counts():
    cells = {"xl parameters": 1274e6, "xl-lowrank-32 FFN parameters": 275e6, "xl FLOPs": 2.10e20}
    statistic = Statistic("exact", "", (0.0, 0.01), check="feedforward.claims:structured_cost",
                          printed=cells)  # fmt: skip
    assert judge(statistic, []).verdict == "exact"
    wrong = dataclasses.replace(statistic, printed=cells | {"s parameters": 120e6})
    verdict = judge(wrong, [])
    assert verdict.verdict == "not reproduced"
    assert "3 of 4 printed numbers agree" in verdict.reason
    with pytest.raises(ClaimError, match="cannot be loaded"):
        judge(dataclasses.replace(statistic, check="feedforward.claims:no_such"), [])
    for cell in ("xxl parameters", "xl weights", "xl"):
        with pytest.raises(ValueError, match="no number of the paper"):
            structured_cost(cell)


# --- the file -------------------------------------------------------------------------------------

ENTRY = {
    "id": "demo-1",
    "paper": "adamoe",
    "statement": "A beats B.",
    "published": [{"value": "+2", "mark": "abstract"}],
    "statistics": [
        {"kind": "difference", "experiment": "demo", "variant": "a", "reference": "b",
         "metric": "score", "band": [1.0, None]},
    ],
    "profile": "cpu",
    "chapter": "adamoe/index",
}  # fmt: skip


def written(folder, *entries):
    path = folder / "claims.yml"
    path.write_text(yaml.safe_dump([*entries]))
    return path


def with_statistic(**changes):
    statistic = {k: v for k, v in (ENTRY["statistics"][0] | changes).items() if v != "absent"}
    return ENTRY | {"statistics": [statistic]}


def test_a_claim_is_read_as_written(tmp_path):
    (one,) = load_claims(written(tmp_path, ENTRY))
    assert one.statistics == (difference(),)
    assert (one.id, one.sureness) == ("demo-1", "high")


BAD = {
    "unknown field": (ENTRY | {"verdict": "reproduced"}, r"unknown \['verdict'\]"),
    "missing field": ({k: v for k, v in ENTRY.items() if k != "chapter"}, r"lacks \['chapter'\]"),
    "unknown paper": (ENTRY | {"paper": "gshard"}, "unknown paper 'gshard'"),
    "unknown mark": (ENTRY | {"published": [{"value": "1", "mark": "rumour"}]}, "unknown mark"),
    "nothing published": (ENTRY | {"published": []}, "published is"),
    "no text": (ENTRY | {"statement": 3}, "statement is 3"),
    "smoke as scale": (ENTRY | {"profile": "smoke"}, "unknown profile 'smoke'"),
    "list as choice": (ENTRY | {"paper": ["adamoe"]}, "unknown paper"),
    "at_least": (ENTRY | {"at_least": {"tokens": "many"}}, "at_least"),
    "unknown kind": (with_statistic(kind="median"), "unknown kind of statistic 'median'"),
    "field of another kind": (with_statistic(target="c"), r"unknown \['target'\]"),
    "arm missing": (with_statistic(reference="absent"), r"lacks \['reference'\]"),
    "no list of arms": (with_statistic(variant=["a", "c"]), "variant is"),
    "empty band": (with_statistic(band=[2.0, 1.0]), "band is"),
    "open band": (with_statistic(band=[None, None]), "band is"),
    "band of text": (with_statistic(band=["1", None]), "band is"),
    "nothing possible": (with_statistic(possible=[1.0, 0.0]), "possible is"),
    "band of one": (with_statistic(band=[1.0]), "band is"),
    "no number for NaN": (with_statistic(band=[float("nan"), 1.0]), "band is"),
    "slope of one": (
        with_statistic(kind="slope", variant=["a"], reference=["b"], x="flops"), "a slope needs two"
    ),
    "a function elsewhere": (
        ENTRY | {"statistics": [{"kind": "exact", "check": "os:system", "band": [0, 0.01],
                                 "printed": {"ls": 1}}]},
        "write feedforward.module:function",
    ),
    "nothing printed": (
        ENTRY | {"statistics": [{"kind": "exact", "check": "feedforward.claims:structured_cost",
                                 "band": [0, 0.01], "printed": {}}]},
        "printed is",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "message"), BAD.values(), ids=BAD)
def test_bad_entries_name_file_and_claim(tmp_path, entry, message):
    path = written(tmp_path, entry)
    with pytest.raises(ClaimError, match=message) as caught:
        load_claims(path)
    assert str(path) in str(caught.value)
    assert "'demo-1'" in str(caught.value)


def test_an_id_given_twice_is_refused(tmp_path):
    with pytest.raises(ClaimError, match="'demo-1': this id is given twice"):
        load_claims(written(tmp_path, ENTRY, ENTRY))


@pytest.mark.parametrize("text", ["", "claims: 1", "- [", "just text", "- 3"])
def test_a_file_that_is_no_list_of_claims(tmp_path, text):
    path = tmp_path / "claims.yml"
    path.write_text(text)
    with pytest.raises(ClaimError, match=re.escape(str(path))):
        load_claims(path)
    with pytest.raises(ClaimError, match="cannot be read"):
        load_claims(tmp_path / "absent.yml")


# --- the book's claims ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book():
    return verdicts(load_claims(), [])


def test_every_claim_of_the_papers_is_entered(book):
    ids = {one.claim.id for one in book}
    expected = {f"qa-{i}" for i in range(1, 10)} | {f"qa-defect-{i}" for i in range(1, 8)}
    expected |= {f"ffn-{i}" for i in range(1, 11)} | {f"vla-{i}" for i in range(1, 10)}
    assert expected <= ids


def test_without_records_only_counts_have_a_verdict(book):
    for one in book:
        counted = all(result.statistic.kind == "exact" for result in one.results)
        assert one.verdict == ("exact" if counted else "not run"), one.claim.id


def test_part_pages_and_marks_agree_with_the_claims(book):
    for paper in PAPERS:
        page = (BOOK / paper / "index.md").read_text()
        for one in book:
            if one.claim.paper == paper:
                assert f"claim-{one.claim.id}>" in page, f"{one.claim.id} is not in {paper}/index"
    guide = (BOOK / "how-to-read.md").read_text()
    for mark, (meaning, _) in MARKS.items():
        assert f"| {mark} | {meaning}" in guide
    for verdict in VERDICTS:
        assert f"*{verdict}*" in guide


def test_ledger_shows_every_claim(book):
    text, rows = ledger_markdown(book), ledger_rows(book)
    assert len(rows) == len(book) == text.count('class="claim"')
    for one in book:
        assert f"(claim-{one.claim.id})=" in text
        assert f"{{doc}}`chapter </{one.claim.chapter}>`" in text
    # a cell never breaks out of its row
    assert all(re.match(r"(\* -|  -|    |:|$)", line) for line in text.splitlines())


def test_ledger_shows_ours_with_interval_scale_and_hardware():
    records = arm("a", [3.0, 3.1, 2.9]) + arm("b", [0.0] * 3)
    rows = ledger_rows(verdicts([claim(difference(unit="points"))], records))
    assert rows[0]["ours"] == "+3.00 [+2.75, +3.25] points"
    assert rows[0]["scale"] == "cpu, 3 seeds, a test processor"
    negative = ledger_rows(verdicts([claim(difference())], arm("a", [-1.5]) + arm("b", [0.0])))
    assert negative[0]["ours"] == "−1.500"
    nothing = ledger_rows(verdicts([claim(difference())], arm("a", [-1e-9]) + arm("b", [0.0])))
    assert nothing[0]["ours"] == "+0.000"


def test_summary_counts_each_claim_once(book):
    numbers = [int(n) for n in re.findall(r"\| (\d+) (?=\|)", ledger_summary(book))]
    assert sum(numbers) == 2 * len(book)


def test_current_verdicts_read_the_recorded_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path))
    for variant, value in (("baseline", 50.0), ("tuned", 55.0)):
        for seed in range(3):
            made = Record("robust-qa", variant, "cpu", seed, {"variant": variant, "seed": seed},
                          {"out-of-domain F1": value}, {}, HERE)  # fmt: skip
            made.save(tmp_path / f"robust-qa/cpu/{variant}-s{seed}.json")
    found = {one.claim.id: one.verdict for one in module.current_verdicts()}
    assert found["qa-2"] == "reproduced"
    assert found["qa-1"] == "not run"
