"""Timing of layers: the sizes of the paper, ratios of medians, records that the claims can read."""

import dataclasses
import json
from functools import partial

import pytest
import torch

from feedforward import claims, count, timing
from feedforward.layers.cost import PAPER_SHAPES
from feedforward.lm import speed
from feedforward.lm.speed import (
    LAYERS,
    PUBLISHED_SPEED,
    SpeedConfig,
    feed_forward,
    grid,
    rows,
    run,
)
from feedforward.profiles import PROFILES, load_experiment
from feedforward.records import plain_config

TINY = {
    "widths": (12, 32),
    "tokens": (1, 3),
    "training_tokens": (2,),
    "reference": (32, 3),
    "training_reference": (12, 2),
    "rounds": 3,
}


@pytest.fixture
def clock(monkeypatch):
    """Every layer takes the time that its weights would, and 3 rounds differ."""

    def interleaved(runs, *, device, rounds, seconds):
        times = {}
        for name, timed in runs.items():
            timed()
            assert isinstance(timed, partial)
            module, x, _ = timed.args
            factor = 1e-9 * x.shape[0] * (3 if timed.func is speed.PASSES["training"] else 1)
            times[name] = [factor * count(module).flops * wobble for wobble in (2.0, 1.0, 4.0)]
        return times

    monkeypatch.setattr(speed, "interleaved", interleaved)


@pytest.mark.parametrize("variant", LAYERS)
@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
def test_layers_have_the_sizes_of_the_paper(size, variant):
    dense, structured = PAPER_SHAPES[size], PAPER_SHAPES[f"{size}-{variant}"]
    ffn = feed_forward(variant, dense.width, device="meta")
    assert ffn.up.out_features == ffn.down.in_features == dense.hidden
    for name in ("rank", "blocks"):
        sizes = {getattr(layer, name, None) for layer in (ffn.up, ffn.down)}
        assert sizes == {getattr(structured, name)}


def test_the_dense_layer_is_dense():
    ffn = feed_forward("dense", 8, dtype=torch.float64)
    assert type(ffn.up) is type(ffn.down) is torch.nn.Linear
    assert ffn(torch.ones(3, 8, dtype=torch.float64)).shape == (3, 8)


@pytest.mark.parametrize("name", ["lowrank", "lowrank-50", "Dense", ""])
def test_an_unknown_layer_names_those_there_are(name):
    with pytest.raises(ValueError, match=r"there is no layer .*lowrank-32"):
        feed_forward(name, 8)


@pytest.mark.parametrize("variant", LAYERS)
def test_a_run_times_a_layer_and_the_dense_one(variant, monkeypatch):
    monkeypatch.setattr(speed, "interleaved", partial(timing.interleaved, turn=0.0))
    record = run(SpeedConfig(variant, **TINY), progress=False, device="cpu")
    assert (record.experiment, record.variant) == ("structured-ffn-speed", variant)
    assert record.metrics["microseconds"].keys() == {"dense", variant}
    for passes, tokens in (("forward", {"1", "3"}), ("training", {"2"})):
        for table in (
            record.metrics["speed"][passes],
            *(arm[passes] for arm in record.metrics["microseconds"].values()),
        ):
            assert table.keys() == {"12", "32"}
            assert all(cells.keys() == tokens for cells in table.values())
    assert len(rows(record)) == 2 * 2 + 2 * 1
    for row in rows(record):
        assert row["speed"] == pytest.approx(row["dense microseconds"] / row["microseconds"])


def test_speed_is_the_ratio_of_the_medians(clock):
    record = run(SpeedConfig("lowrank-32", **TINY), progress=False, device="cpu")
    bound = {"12": 3.2, "32": 3.2}
    assert record.metrics["bound"] == pytest.approx(bound)
    for row in rows([record]):
        assert row["speed"] == pytest.approx(3.2)
        assert row["bound"] == pytest.approx(3.2)
        flops = 2 * 8 * row["width"] ** 2 * row["tokens"] * (3 if row["pass"] == "training" else 1)
        assert row["dense microseconds"] == pytest.approx(2e-3 * flops)
    low, middle, high = record.metrics["microseconds"]["dense"]["forward"]["12"]["1"]
    assert (low, high) == pytest.approx((middle / 2, middle * 2))


def test_the_reference_cells_are_what_the_claim_is_about(monkeypatch):
    times = iter(range(1, 100))

    def interleaved(runs, **options):
        return {"dense": [float(next(times))] * 3, "lowrank-63": [1.0] * 3}

    monkeypatch.setattr(speed, "interleaved", interleaved)
    record = run(SpeedConfig("lowrank-63", **TINY), progress=False, device="cpu")
    # cells in order: width 12 with 1 and 3 tokens and training with 2, then width 32
    assert record.metrics["speed over dense"] == 5
    assert record.metrics["training speed over dense"] == 3


def test_a_run_takes_its_threads_and_gives_them_back(clock):
    before = torch.get_num_threads()
    config = SpeedConfig("lowrank-63", **TINY, threads=before + 1)
    assert run(config, progress=False, device="cpu").provenance.threads == before + 1
    assert torch.get_num_threads() == before


def test_seeds_repeat_the_measurement(clock):
    config = SpeedConfig("lowrank-63", **TINY)
    assert run(config, progress=False, device="cpu").key != (
        run(dataclasses.replace(config, seed=1), progress=False, device="cpu").key
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "lowrank-31"}, "there is no layer 'lowrank-31'; did you mean"),
        ({"dtype": "float64"}, "there is no dtype 'float64'"),
        ({"threads": 0}, "at least 1 thread"),
        ({"rounds": 2}, "3 rounds"),
        ({"seconds": 0.0}, "a positive time"),
        ({"widths": ()}, "widths is"),
        ({"widths": (32, 12)}, "rising whole numbers"),
        ({"tokens": (0, 3)}, "tokens is"),
        ({"training_tokens": (2.0,)}, "training_tokens is"),
        ({"reference": (32, 2)}, r"reference is \(32, 2\); give a width of"),
        ({"training_reference": (9, 2)}, "training_reference is"),
    ],
)
def test_a_bad_setting_says_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        SpeedConfig(**{"variant": "lowrank-63"} | TINY | changes)


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_every_layer_of_the_grid_can_be_built(profile):
    configs = grid("structured-ffn-speed", profile)
    assert configs.keys() >= LAYERS.keys()
    for variant in LAYERS:
        config = configs[variant]
        assert config.variant == variant
        for width in config.widths:
            dense, made = (feed_forward(v, width, device="meta") for v in ("dense", variant))
            share = count(made).flops / count(dense).flops
            assert {63: 0.58, 32: 0.29}[LAYERS[variant][1]] < share < LAYERS[variant][1] / 100


def test_the_grid_covers_what_the_paper_printed():
    gpu = grid("structured-ffn-speed", "gpu")
    for published in PUBLISHED_SPEED:
        config = gpu[published.variant]
        assert published.tokens in config.tokens
        assert published.width is None or published.width in config.widths
        assert published.mark in claims.MARKS
        assert 1 < published.low <= published.high


def test_the_grid_knows_its_part_and_its_profiles():
    assert load_experiment("structured-ffn-speed") is speed
    with pytest.raises(ValueError, match="has no profile 'paper': it has smoke, cpu, gpu"):
        grid("structured-ffn-speed", "paper")
    with pytest.raises(ValueError, match="there is no part 'structured-ffn'"):
        grid("structured-ffn", "smoke")
    for profile in PROFILES.keys() - {"paper"}:
        for config in grid("structured-ffn-speed", profile).values():
            json.dumps(plain_config(config))


def test_claims_read_what_the_runs_give(clock):
    """Every claim on speed is about a variant of the grid and a number of its records."""
    gpu = grid("structured-ffn-speed", "gpu")
    numbers = {
        name: run(dataclasses.replace(config, **TINY), progress=False, device="cpu").metrics
        for name, config in gpu.items()
    }
    for claim in claims.load_claims():
        for statistic in claim.statistics:
            if statistic.experiment == "structured-ffn-speed" and claim.id == "ffn-2":
                assert claim.profile == "gpu"
                assert statistic.null == 1.0
                for arm in statistic.arms:
                    assert isinstance(numbers[arm][statistic.metric], float)
