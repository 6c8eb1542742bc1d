"""Scaling curves: known laws are recovered, intervals cover, and no crossing is claimed lightly."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from feedforward.claims import MARKS, Claim, Published, Statistic, evaluate, structured_cost
from feedforward.lm.scaling import (
    PAPER_TOKENS,
    PUBLISHED,
    Points,
    crossing,
    fit_line,
    fit_power,
    published_points,
    slope_difference,
)
from feedforward.records import Provenance, Record

SIZES = np.array([1e15, 4e15, 2e16, 1e17])
ARMS = ("dense", "lowrank-63", "lowrank-32")


def runs(rng, intercept, slope, *, sizes=SIZES, seeds=3, noise=0.01, common=None):
    """Points on a line with independent noise, and with noise of each (size, seed) in common."""
    flops = np.repeat(sizes, seeds)
    loss = intercept + slope * (np.log10(flops) - 16) + noise * rng.standard_normal(len(flops))
    if common is not None:
        loss = loss + common.ravel()
    return Points(flops, loss, seeds=np.tile(np.arange(seeds), len(sizes)))


# --- what the paper printed ---------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "slope"), [*zip(ARMS, (-0.355, -0.367, -0.386), strict=True)])
def test_the_published_slopes_per_decade_of_training_flops(variant, slope):
    points = published_points(variant)
    line = fit_line(points.flops, points.loss)
    assert line.slope == pytest.approx(slope, abs=0.003)
    assert 0.015 < line.residual_sd < 0.02


PRINTED = {
    "s": ((110, 90, 74), (1.69e18, 1.44e18, 1.22e18)),
    "m": ((335, 262, 202), (1.55e19, 1.26e19, 1.01e19)),
    "l": ((729, 566, 430), (7.03e19, 5.61e19, 4.42e19)),
    "xl": ((1274, 985, 744), (2.10e20, 1.66e20, 1.29e20)),
}


@pytest.mark.parametrize("size", PRINTED)
def test_counted_parameters_and_flops_are_the_printed_ones(size):
    for variant, millions, flops in zip(ARMS, *PRINTED[size], strict=True):
        (point,) = (p for p in PUBLISHED if (p.variant, p.size) == (variant, size))
        assert point.parameters == pytest.approx(1e6 * millions, rel=0.01)
        assert point.flops == pytest.approx(flops, rel=0.01)
        cell = size if variant == "dense" else f"{size}-{variant}"
        assert point.flops == structured_cost(f"{cell} FLOPs")  # what the ledger counts


@pytest.mark.parametrize("arm", ["lowrank-32-guided", "lowrank-32-equal-flops"])
def test_the_arms_at_equal_flops_spend_those_of_the_dense_model(arm):
    equal, dense, plain = map(published_points, (arm, "dense", "lowrank-32"))
    np.testing.assert_array_equal(equal.flops, dense.flops)
    np.testing.assert_array_equal(equal.parameters, plain.parameters)
    assert {p.error for p in PUBLISHED if p.variant == arm} == {0.05}


def test_every_published_number_has_a_known_mark_and_an_error():
    assert {p.mark for p in PUBLISHED} <= set(MARKS)
    assert all(p.error == (0.005 if p.mark == "text" else p.error) for p in PUBLISHED)
    assert {p.error for p in PUBLISHED if p.mark == "digitised"} == {0.02, 0.05}
    assert len({(p.variant, p.size) for p in PUBLISHED}) == len(PUBLISHED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED[0].perplexity = 1.0
    with pytest.raises(TypeError):
        PAPER_TOKENS["s"] = 1.0


def test_the_errors_of_published_points_are_in_nats():
    points = published_points("lowrank-63")
    np.testing.assert_allclose(points.errors[0], math.log(27.18 / 27.16), rtol=1e-3)
    np.testing.assert_allclose(points.errors[-1], math.log(12.865 / 12.86), rtol=1e-3)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("variant", ["lowrank-63", "lowrank-32"])
def test_the_published_points_do_not_establish_a_crossing(variant, shared):
    arms = published_points(variant), published_points("dense")
    found = crossing(*arms, shared_residuals=shared)
    assert not found.established
    assert "the residuals of the fits (0.01" in found.reason
    assert "larger than the gap between the lines" in found.reason
    assert "errors of reading" in found.slopes.how
    # what both lines miss alike decides whether the slopes differ
    assert found.slopes.differs == shared
    assert ("contains 0" in found.reason) != shared
    assert found.low < found.flops < found.high
    assert (found.low, found.high) == (0, math.inf) or shared


def test_at_the_same_flops_the_published_slopes_do_not_differ():
    arms = published_points("lowrank-32-equal-flops"), published_points("dense")
    assert not slope_difference(*arms, shared_residuals=True).differs


def test_an_unknown_arm_and_one_of_a_single_size_are_errors():
    with pytest.raises(ValueError, match=r"'dens'; choose one of dense, lowrank-63"):
        published_points("dens")
    with pytest.raises(ValueError, match="1 distinct FLOPs"):
        published_points("blockdense-63")


# --- the straight line --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_line_without_noise_is_recovered(seed):
    rng = np.random.default_rng(seed)
    flops = 10 ** rng.uniform(14, 21, rng.integers(3, 9))
    intercept, slope = rng.uniform(5, 12), rng.uniform(-0.6, 0.1)
    line = fit_line(flops, intercept + slope * np.log10(flops))
    assert line.slope == pytest.approx(slope, abs=1e-9)
    assert line.intercept == pytest.approx(intercept, abs=1e-8)
    assert line.residual_sd < 1e-9
    assert line.high - line.low < 1e-8
    further = np.array([1e10, 1e25])
    np.testing.assert_allclose(line.predict(further), intercept + slope * np.log10(further))


def test_the_line_and_its_interval_agree_with_another_implementation():
    points = runs(np.random.default_rng(3), 4.0, -0.3, noise=0.05)
    line = fit_line(points.flops, points.loss)
    other = scipy.stats.linregress(np.log10(points.flops), points.loss)
    half = scipy.stats.t.ppf(0.975, len(points.flops) - 2) * other.stderr
    ours = (line.slope, line.intercept, line.low, line.high)
    theirs = (other.slope, other.intercept, other.slope - half, other.slope + half)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_two_runs_make_a_line_without_an_interval():
    line = fit_line([1e15, 1e17], [4.0, 3.0])
    assert line.slope == pytest.approx(-0.5)
    assert np.isnan([line.low, line.high, line.residual_sd]).all()


# --- the power law ------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.03, 0.1, 0.35, 0.7])
@pytest.mark.parametrize("offset", [0.5, 1.7, 2.9])
def test_a_power_law_without_noise_is_recovered(offset, exponent):
    flops = np.geomspace(1e17, 1e21, 6)
    scale = 2.0 * 1e17**exponent
    fit = fit_power(flops, offset + scale * flops**-exponent)
    assert fit.identified
    assert fit.exponent == pytest.approx(exponent, rel=1e-5)
    assert fit.offset == pytest.approx(offset, abs=1e-4)
    assert fit.scale == pytest.approx(scale, rel=1e-3)
    assert fit.residual_sd < 1e-6
    assert fit.low <= fit.exponent <= fit.high
    np.testing.assert_allclose(
        fit.predict([1e16, 1e23]), offset + scale * np.array([1e16, 1e23]) ** -exponent, rtol=1e-4
    )


def test_a_noisy_power_law_is_fitted_as_another_implementation_does():
    rng = np.random.default_rng(5)
    x = np.linspace(0, 5, 12)
    y = 1.5 + 2.0 * 10 ** (-0.3 * x) + 0.01 * rng.standard_normal(len(x))
    fit = fit_power(10**x, y)
    (offset, scale, exponent), _ = scipy.optimize.curve_fit(
        lambda x, e, a, alpha: e + a * 10 ** (-alpha * x), x, y, p0=(1.0, 1.0, 0.1)
    )
    np.testing.assert_allclose(
        (fit.offset, fit.scale, fit.exponent), (offset, scale, exponent), rtol=1e-4
    )
    assert fit.identified
    assert fit.low < 0.3 < fit.high
    # the ends are where the F-test turns: the other two numbers refitted there
    quantile = scipy.stats.f.ppf(0.95, 1, len(x) - 3)
    for end in (fit.low, fit.high):
        basis = np.stack([np.ones_like(x), 10 ** (-end * x)], axis=1)
        squares = np.linalg.lstsq(basis, y, rcond=None)[1][0]
        least = fit.residual_sd**2 * (len(x) - 3)
        assert squares == pytest.approx(least * (1 + quantile / (len(x) - 3)), rel=1e-4)


def test_the_interval_of_the_exponent_covers_the_true_one():
    x = np.linspace(0, 4, 8)
    held = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).standard_normal(len(x))
        fit = fit_power(10**x, 1.5 + 2.0 * 10 ** (-0.3 * x) + 0.02 * noise)
        held += fit.low <= 0.3 <= fit.high
    assert 53 <= held <= 60


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ([3.0, 2.7, 2.5], "3 sizes: a curve with three numbers passes near any"),
        ([4.0, 3.6, 3.2, 2.8, 2.4], "a power law without an offset fits the runs as well"),
        ([2.4, 2.8, 3.2, 3.6, 4.0], "the loss does not fall with the FLOPs"),
        ([4.0, 2.0, 2.0, 2.0, 2.0], "any exponent on one side fits the runs as well"),
    ],
    ids=["few", "straight", "rising", "step"],
)
def test_a_power_law_that_is_not_identified_says_why(loss, reason):
    fit = fit_power(10.0 ** np.arange(16, 16 + len(loss)), loss)
    assert not fit.identified
    assert fit.reason.startswith(reason)


def test_a_pure_power_law_has_no_identified_offset():
    fit = fit_power(SIZES, 300 * SIZES**-0.12)
    assert not fit.identified
    assert fit.exponent == pytest.approx(0.12, rel=1e-4)
    assert fit.offset == pytest.approx(0, abs=1e-3)


def test_no_published_arm_identifies_an_offset():
    for arm in ARMS:
        fit = fit_power(published_points(arm).flops, published_points(arm).loss)
        assert not fit.identified
        assert fit.low < 0.06 < fit.high


# --- the difference of slopes -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["paired", "unpaired", "residuals", "shared"])
def test_the_interval_of_the_slope_difference_covers_the_true_one(how):
    held, wide, seeds = 0, 0.0, {"paired": 3, "unpaired": 3, "residuals": 1, "shared": 1}[how]
    for number in range(300):
        rng = np.random.default_rng(number)
        common = 0.03 * rng.standard_normal((len(SIZES), seeds))
        if how in ("unpaired", "residuals"):
            common = None
        a = runs(rng, 3.0, -0.38, sizes=0.7 * SIZES, seeds=seeds, common=common)
        b = runs(rng, 3.0, -0.35, seeds=seeds, common=common)
        if how == "unpaired":
            b = dataclasses.replace(b, seeds=b.seeds + 7)
        found = slope_difference(a, b, resamples=300, shared_residuals=how == "shared")
        held += found.low <= -0.03 <= found.high
        wide += (found.high - found.low) / 300
    assert 0.92 * 300 <= held <= 0.995 * 300
    # noise that both arms have in common (0.03 a run) does not widen the interval
    assert wide < {"paired": 0.06, "unpaired": 0.06, "residuals": 0.3, "shared": 0.12}[how]


def test_without_pairing_the_noise_in_common_counts():
    rng = np.random.default_rng(1)
    common = 0.05 * rng.standard_normal((len(SIZES), 4))
    a = runs(rng, 3.0, -0.38, seeds=4, noise=0.002, common=common)
    b = runs(rng, 3.0, -0.35, seeds=4, noise=0.002, common=common)
    paired = slope_difference(a, b)
    alone = slope_difference(a, dataclasses.replace(b, seeds=b.seeds + 1))
    assert "the same in both arms" in paired.how
    assert "each arm by itself" in alone.how
    assert paired.differs
    assert paired.estimate == alone.estimate
    assert alone.high - alone.low > 5 * (paired.high - paired.low)


def test_one_seed_at_a_size_leaves_the_residuals():
    points = runs(np.random.default_rng(2), 3.0, -0.3)
    fewer = Points(points.flops[2:], points.loss[2:], seeds=points.seeds[2:])
    assert "residuals, each arm by itself" in slope_difference(fewer, points).how
    assert "reading" not in slope_difference(fewer, points).how


def test_runs_without_the_names_of_their_seeds_are_not_paired():
    points = dataclasses.replace(runs(np.random.default_rng(2), 3.0, -0.3), seeds=None)
    found = slope_difference(points, points)
    assert found.how == "bootstrap over the seeds of each size, each arm by itself"
    assert found.low < 0 < found.high


def test_errors_of_reading_widen_the_interval():
    a = runs(np.random.default_rng(0), 3.0, -0.38, seeds=1, noise=0.001)
    b = runs(np.random.default_rng(1), 3.0, -0.35, seeds=1, noise=0.001)
    read = dataclasses.replace(a, errors=np.full(len(SIZES), 0.05))
    exact, coarse = slope_difference(a, b), slope_difference(read, b)
    assert coarse.high - coarse.low > 3 * (exact.high - exact.low)


def test_the_order_of_the_runs_is_no_matter_and_the_bootstrap_repeats():
    rng = np.random.default_rng(4)
    a, b = runs(rng, 3.0, -0.38), runs(rng, 3.0, -0.35)
    order = rng.permutation(len(a.flops))
    shuffled = Points(a.flops[order], a.loss[order], seeds=a.seeds[order])
    one, other = slope_difference(a, b), slope_difference(shuffled, b)
    assert (one.low, one.high) == (other.low, other.high) != slope_difference(a, b, seed=1)
    assert slope_difference(b, a).estimate == pytest.approx(-one.estimate)
    assert fit_line(a.flops, a.loss).slope - fit_line(b.flops, b.loss).slope == pytest.approx(
        one.estimate
    )


def test_two_runs_an_arm_have_no_interval():
    a, b = Points([1e15, 1e17], [4.0, 3.0]), Points([1e15, 1e17], [3.9, 3.1])
    found = slope_difference(a, b)
    assert found.estimate == pytest.approx(-0.1)
    assert np.isnan([found.low, found.high]).all()
    assert not found.differs
    assert "no residuals" in found.how
    meeting = crossing(a, b)
    assert not meeting.established
    assert "no residuals" in meeting.reason
    assert "2 sizes do not show whether the curves are straight" in meeting.reason


# --- where lines meet ---------------------------------------------------------------------------


def test_a_clear_crossing_is_established():
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        a, b = runs(rng, 3.0, -0.5, noise=0.005), runs(rng, 3.0, -0.3, noise=0.005)
        found = crossing(a, b, resamples=300)
        assert found.established, found.reason
        assert SIZES[0] < found.low < found.flops < found.high < SIZES[-1]
        held += found.low <= 1e16 <= found.high
    assert 91 <= held <= 100
    assert found.reason.startswith("the slopes differ, and the lines cross within")


def test_the_place_of_the_crossing_is_exact_without_noise():
    rng = np.random.default_rng(0)
    a, b = runs(rng, 3.0, -0.5, noise=0), runs(rng, 3.1, -0.3, noise=0)
    found = crossing(a, b)
    assert found.established
    assert (found.flops, found.low, found.high) == pytest.approx((10**15.5,) * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ((3.05, -0.4), "the lines are parallel"),
        ((2.5, -0.35), "the lines meet 9.0 decades beyond what both arms reach"),
        ((3.5, -0.35), "the lines meet 9.0 decades below what both arms cover"),
    ],
    ids=["parallel", "beyond", "below"],
)
def test_lines_that_do_not_cross_in_the_runs_are_no_crossing(other, reason):
    rng = np.random.default_rng(0)
    a, b = runs(rng, 3.0, -0.4, noise=0), runs(rng, *other, noise=0)
    found = crossing(a, b)
    assert not found.established
    assert found.reason.endswith(reason)
    if "9.0" in reason:  # 10 decades from the middle
        assert abs(math.log10(found.flops) - 16) == pytest.approx(10)
    else:
        assert math.isnan(found.flops)


def test_equal_arms_hardly_ever_cross():
    wrong = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        a, b = runs(rng, 3.0, -0.35), runs(rng, 3.0, -0.35)
        wrong += crossing(a, b, resamples=200).established
    assert wrong <= 6


def test_curves_that_no_line_fits_are_no_crossing():
    rng = np.random.default_rng(0)
    a, b = runs(rng, 3.0, -0.45, noise=1e-4), runs(rng, 3.0, -0.35, noise=1e-4)
    bend = 0.1 * (np.log10(a.flops) - 16) ** 2
    assert crossing(a, b).established
    bent = crossing(dataclasses.replace(a, loss=a.loss + bend), b)
    assert not bent.established
    assert "residuals of the fits" in bent.reason


def test_an_interval_that_leaves_the_runs_is_no_crossing():
    rng = np.random.default_rng(1)
    a, b = runs(rng, 2.85, -0.5, noise=0.005), runs(rng, 3.0, -0.35, noise=0.005)
    assert 1e14 < crossing(a, b).flops < 1.2e15
    a, b = runs(rng, 2.92, -0.5, noise=0.05), runs(rng, 3.0, -0.35, noise=0.05)
    found = crossing(a, b)
    assert not found.established
    assert "is not inside what both arms cover, 1e15.0 to 1e17.0" in found.reason


def test_arms_over_other_flops_are_no_crossing():
    rng = np.random.default_rng(1)
    a, b = runs(rng, 3.0, -0.5), runs(rng, 3.0, -0.3, sizes=SIZES * 1e4)
    assert "no FLOPs are covered by the runs of both arms" in crossing(a, b).reason
    assert not crossing(a, b).established


# --- from records -------------------------------------------------------------------------------

HERE = Provenance(None, None, None, {}, "a test processor", 1, 1.0, None, "2025-01-02", "3.11")


def record(variant, seed, **metrics):
    return Record("demo", variant, "cpu", seed, {"v": variant, "s": seed}, metrics, {}, HERE)


def grid(arm, slope, rng):
    return [
        record(
            f"{arm}-{size}",
            seed,
            **{
                "training FLOPs": 10.0**size,
                "test loss": 3 + slope * (size - 16) + 0.01 * rng.standard_normal(),
                "validation loss": 5.0,
                "parameters": 1000 * size,
            },
        )
        for size in (15, 16, 17)
        for seed in (0, 1, 2)
    ]


def test_records_become_points():
    records = grid("dense", -0.3, np.random.default_rng(0))
    points = Points.of(records)
    np.testing.assert_array_equal(points.flops, np.repeat([1e15, 1e16, 1e17], 3))
    np.testing.assert_array_equal(points.loss, [one.metrics["test loss"] for one in records])
    np.testing.assert_array_equal(points.seeds, [0, 1, 2] * 3)
    np.testing.assert_array_equal(points.parameters, np.repeat([15000, 16000, 17000], 3))
    assert points.sizes == 3
    assert set(Points.of(records, loss="validation loss").loss) == {5.0}


def test_the_ledger_estimates_the_same_slope_difference():
    rng = np.random.default_rng(0)
    one, other = grid("one", -0.4, rng), grid("other", -0.3, rng)
    statistic = Statistic(
        kind="slope",
        experiment="demo",
        band=(-math.inf, 0.0),
        variant=("one-15", "one-16", "one-17"),
        reference=("other-15", "other-16", "other-17"),
        metric="test loss",
        x="training FLOPs",
    )
    claim = Claim(
        "demo-1", "structured-ffn", ".", (Published("1", "none"),), (statistic,), "cpu", ""
    )
    ledger = evaluate(statistic, claim, [*one, *other])
    ours = slope_difference(Points.of(one), Points.of(other))
    assert ledger.estimate == pytest.approx(ours.estimate, abs=1e-9)
    assert ledger.verdict == "reproduced"
    assert ours.differs


def test_a_record_without_the_numbers_is_an_error():
    records = grid("dense", -0.3, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"demo/dense-15, seed 0, has no number 'test bits'"):
        Points.of(records, loss="test bits")
    with pytest.raises(ValueError, match="has no number 'training FLOPs'"):
        Points.of([*records, record("tiny", 0, parameters=1.0, **{"test loss": 3.0})])
    with pytest.raises(ValueError, match="no records"):
        Points.of([])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": [3.0, math.nan, 2.0]}, "loss holds nan"),
        ({"flops": [1e15, math.inf, 1e17]}, "flops holds inf"),
        ({"flops": [1e15, 0.0, 1e17]}, "flops holds 0"),
        ({"flops": [-1e15, 1e16, 1e17]}, "positive"),
        ({"flops": [1e15] * 3}, "1 distinct FLOPs in 3 runs; give 2 sizes or more"),
        ({"flops": [], "loss": []}, "0 distinct FLOPs"),
        ({"loss": [3.0, 2.0]}, r"loss has the shape \(2,\); give 3 numbers"),
        ({"flops": [[1e15, 1e16, 1e17]]}, r"flops has the shape \(1, 3\)"),
        ({"parameters": [1e6, 0.0, 1e7]}, "parameters are"),
        ({"parameters": [1e6]}, "parameters has the shape"),
        ({"errors": [0.1, -0.1, 0.1]}, "errors are"),
        ({"seeds": [0, 0.5, 1]}, "whole numbers"),
        ({"flops": [1e15, 1e15, 1e17], "seeds": [4, 4, 4]}, "a seed occurs twice at one size"),
    ],
)
def test_impossible_points_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        Points(**{"flops": [1e15, 1e16, 1e17], "loss": [4.0, 3.0, 2.0]} | given)


def test_the_fits_refuse_what_they_cannot_fit():
    with pytest.raises(ValueError, match="loss holds nan"):
        fit_line([1e15, 1e16], [3.0, math.nan])
    with pytest.raises(ValueError, match="1 distinct FLOPs in 2 runs; give 2 sizes or more"):
        fit_line([1e15, 1e15], [3.0, 2.0])
    with pytest.raises(ValueError, match="2 distinct FLOPs in 3 runs; give 3 sizes or more"):
        fit_power([1e15, 1e16, 1e16], [3.0, 2.0, 2.1])
    with pytest.raises(ValueError, match="loss holds 0; a power law"):
        fit_power(SIZES, [3.0, 2.0, 1.0, 0.0])


def test_the_bootstrap_refuses_too_few_resamples_and_sizes_that_do_not_match():
    points = published_points("dense")
    with pytest.raises(ValueError, match="resamples is 10; an interval of 95 % needs 100 or more"):
        slope_difference(points, points, resamples=10)
    fewer = published_points("blockshuffle-32")
    with pytest.raises(ValueError, match=r"3 runs of 3 sizes and 4 of 4 share no residuals"):
        crossing(fewer, points, shared_residuals=True)
    assert not crossing(fewer, points).established
