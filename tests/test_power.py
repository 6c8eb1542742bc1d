"""What would decide a comparison, against simulated experiments."""

import dataclasses
import math

import numpy as np
import pytest

from feedforward.claims import Claim, Published, Statistic, verdicts
from feedforward.power import items_needed, needed, runs_needed, would_decide
from feedforward.records import Provenance, Record

HERE = Provenance.here(seconds=1.0)


def judged(a, b, *, band=(0.0, math.inf), unit="points", kind="difference", **others):
    """The verdict on two arms, each a list over seeds of scores over the same items."""
    statistic = Statistic(
        kind,
        "demo",
        band,
        **{"variant": ("a",), "reference": ("b",), "metric": "score", "unit": unit, **others},
    )
    return verdict_of(statistic, {"a": a, "b": b})


def contrasted(terms, *, unit="bits", items=False, **arms):
    """The verdict on a weighted sum of arms."""
    terms = tuple((weight, arm, "score") for weight, arm in terms)
    statistic = Statistic("contrast", "demo", (0.0, math.inf), unit=unit, terms=terms)
    return verdict_of(statistic, arms, items=items)


def verdict_of(statistic, arms, *, items=True):
    records = [
        Record(
            "demo",
            variant,
            "cpu",
            seed,
            {"variant": variant, "seed": seed},
            {
                "score": float(np.mean(scores)),
                "items": {"score": {str(i): float(v) for i, v in enumerate(scores)}}
                if items
                else {},
            },
            {},
            HERE,
        )
        for variant, runs in arms.items()
        for seed, scores in enumerate(runs)
    ]
    claim = Claim(
        id="demo-1",
        paper="adamoe",
        statement="A beats B.",
        published=(Published("+2", "abstract"),),
        statistics=(statistic,),
        profile="cpu",
        chapter="adamoe/index",
    )
    return verdicts([claim], records)[0]


def test_the_needed_number_has_the_promised_power():
    count = needed(spread=30, gain=5)
    rng = np.random.default_rng(6)
    draws = rng.normal(5, 30, (2000, count))
    z = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(count))
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    "wrong", [{"gain": 0}, {"spread": -1}, {"power": 1.0}, {"level": 95}], ids=str
)
def test_bad_numbers_are_named(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        needed(**{"spread": 30.0, "gain": 5.0} | wrong)


def test_runs_and_items_have_the_promised_power_together():
    rng = np.random.default_rng(0)
    gain, over_runs, over_items, items = 2.0, 1.5, 20.0, 1000
    runs = runs_needed(gain, over_runs, over_items, items)
    errors = rng.normal(0, over_runs, (4000, runs)).mean(1)
    errors += rng.normal(0, over_items / math.sqrt(items), 4000)
    total = math.hypot(over_runs / math.sqrt(runs), over_items / math.sqrt(items))
    assert np.mean(np.abs(gain + errors) > 1.96 * total) == pytest.approx(0.8, abs=0.04)
    enough = items_needed(gain, over_runs, over_items, runs)
    assert enough <= items
    assert items_needed(gain, over_runs, over_items, runs + 5) < enough


def test_the_other_luck_may_leave_nothing():
    assert runs_needed(1.0, 1.0, 30.0, 382) is None
    assert items_needed(1.0, 5.0, 30.0, 3) is None


class TestWouldDecide:
    rng = np.random.default_rng(3)

    def noisy(self, runs, items, *, shift=0.0, spread=30.0):
        return [50 + shift + self.rng.normal(0, spread, items) for _ in range(runs)]

    def test_names_seeds_and_items(self):
        verdict = judged(self.noisy(3, 50, shift=1), self.noisy(3, 50))
        assert verdict.verdict == "inconclusive"
        text = would_decide(verdict, items="attempts")
        assert text.startswith("to prove 1 (assumed): ")
        assert "attempts" in text
        assert "seeds" in text

    def test_the_gain_is_what_the_claim_asks_for(self):
        a, b = self.noisy(3, 50), self.noisy(3, 50)
        assert would_decide(judged(a, b, band=(4.0, math.inf))).startswith("to prove 4: ")
        found = judged(a, b, unit="bits")
        size = abs(found.weakest.estimate)
        assert would_decide(found).startswith(f"to prove {size:.2g} (as found): ")

    @pytest.mark.parametrize(
        ("band", "end"), [((-1.0, math.inf), "-1"), ((-math.inf, 0.5), "0.5"), ((-2.0, 1.0), "1")]
    )
    def test_what_a_band_around_no_effect_excludes_is_ruled_out(self, band, end):
        a, b = self.noisy(3, 50), self.noisy(3, 50)
        text = would_decide(judged(a, b, band=band))
        assert text.startswith(f"to rule out {end} if the arms are alike: ")
        proven = would_decide(judged(a, b, band=(abs(float(end)), math.inf)))
        assert text.partition(": ")[2] == proven.partition(": ")[2]

    @pytest.mark.parametrize(("kind", "unit"), [("relative", "%"), ("ratio", "×")])
    def test_a_found_share_is_turned_into_what_is_measured(self, kind, unit):
        a, b = self.noisy(4, 2), self.noisy(4, 2)
        null = 1.0 if kind == "ratio" else 0.0
        verdict = judged(a, b, kind=kind, unit=unit, band=(null, math.inf))
        base = np.mean([run.metrics["score"] for run in verdict.records])
        share = abs(verdict.weakest.estimate - null) / (100 if kind == "relative" else 1)
        assert would_decide(verdict).startswith(f"to prove {share * base:.2g} (as found): ")

    def test_a_contrast_is_one_value_a_seed(self):
        a, b = ([self.rng.normal(50, 3, 1) for _ in range(5)] for _ in range(2))
        plain = would_decide(contrasted([(1.0, "a"), (-1.0, "b")], a=a, b=b))
        values = [float(one[0] - other[0]) for one, other in zip(a, b, strict=True)]
        seeds = needed(float(np.std(values, ddof=1)), abs(np.mean(values)))
        assert plain == f"to prove {abs(np.mean(values)):.2g} (as found): {seeds:,} seeds"
        # with the scores of single items it is what the difference is
        a, b = self.noisy(3, 50), self.noisy(3, 50)
        terms = [(1.0, "a"), (-1.0, "b")]
        of_items = would_decide(contrasted(terms, unit="points", items=True, a=a, b=b))
        assert of_items == would_decide(judged(a, b))
        lacking = contrasted([(1.0, "a"), (-1.0, "b"), (1.0, "c")], a=a, b=b, c=a[:1])
        assert would_decide(lacking) == lacking.weakest.reason

    def test_a_larger_gain_needs_less(self):
        a = [50 + self.rng.normal(0, 3, 2000) + shift for shift in (1, -3, 2.5)]
        b = [50 + self.rng.normal(0, 3, 2000) for _ in range(3)]
        seeds = [
            int(would_decide(judged(a, b, band=(gain, math.inf))).split()[3].replace(",", ""))
            for gain in (1.0, 2.0)
        ]
        assert seeds[0] > seeds[1] > 3

    def test_too_few_runs_say_so(self):
        verdict = judged(self.noisy(1, 50), self.noisy(1, 50))
        assert would_decide(verdict) == verdict.weakest.reason

    def test_equal_arms_need_another_test(self):
        same = self.noisy(3, 20)
        assert "equal in every run" in would_decide(judged(same, same))

    @pytest.mark.parametrize("kind", ["gap", "slope"])
    def test_what_is_no_difference_of_two_arms_says_so(self, kind):
        runs = self.noisy(3, 20)
        result = dataclasses.replace(
            judged(runs, self.noisy(3, 20)).weakest, verdict="inconclusive"
        )
        statistic = dataclasses.replace(
            result.statistic, kind=kind, variant=("a", "c"), target=("b",)
        )
        verdict = dataclasses.replace(
            judged(runs, runs), results=(dataclasses.replace(result, statistic=statistic),)
        )
        assert would_decide(verdict) == "more seeds: the statistic is no difference of arms"

    def test_a_value_is_told_from_the_end_of_its_band(self):
        runs = [[50.0, 50.0], [60.0, 60.0], [40.0, 40.0]]
        options = {"kind": "value", "reference": (), "against": 45.0, "band": (45.0, math.inf)}
        verdict = judged(runs, [], **options)
        assert verdict.verdict == "inconclusive"
        assert would_decide(verdict) == f"to tell 50 from 45: {needed(10, 5)} seeds"
        uncertain = [[0.0, 100.0] * 20 + [50.0] * more for more in (1, 2, 3)]
        uncertain = [scores[:40] for scores in uncertain]
        by_items = would_decide(judged(uncertain, [], **options), items="attempts")
        assert by_items == f"to tell 50 from 45: {needed(50.637, 5):,} attempts with 3 seeds"
        alike = judged([[50.0, 50.0]] * 3, [], **(options | {"band": (50.0, math.inf)}))
        assert would_decide(alike).startswith("other seeds")
