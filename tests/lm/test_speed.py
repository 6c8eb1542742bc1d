"""Timing: sizes of the paper, ratios of what was timed together, records as claims read them."""

import dataclasses
import json
from functools import partial

import pytest
import torch

from feedforward import claims, count, timing
from feedforward.layers import structured
from feedforward.layers.cost import PAPER_SHAPES
from feedforward.layers.structured import LowRank, PreMerged
from feedforward.lm import decoding, speed
from feedforward.lm.decoding import Throughput
from feedforward.lm.model import Decoder, DecoderConfig
from feedforward.lm.speed import (
    LAYERS,
    PUBLISHED_SPEED,
    PUBLISHED_THROUGHPUT,
    DecodingSpeedConfig,
    SpeedConfig,
    decoding_rows,
    feed_forward,
    grid,
    layer_rows,
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


MODEL = {"vocabulary": 31, "width": 16, "layers": 2, "heads": 2, "context": 8}
LOWRANK = DecoderConfig(**MODEL, ffn="lowrank", rank=4)
MERGING = DecodingSpeedConfig(
    "premerged-32",
    LOWRANK,
    "dense",
    DecoderConfig(**MODEL),
    prompt=1,
    length=2,
    batches=(1, 3),
    at=3,
    structured="lowrank-32",
    rounds=3,
)
SEARCHING = DecodingSpeedConfig(
    "wide-structured", LOWRANK, "gqa", DecoderConfig(**MODEL), prompt=2, length=3, batches=(1, 2, 4)
)


@pytest.fixture
def quick(monkeypatch):
    """No turn is repeated, so that a measurement is over at once."""

    def interleaved(runs, **options):
        return timing.interleaved(runs, **options | {"rounds": 3, "turn": 0.0})

    for module in (speed, decoding, structured):
        monkeypatch.setattr(module, "interleaved", interleaved)


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
    dense, smaller = PAPER_SHAPES[size], PAPER_SHAPES[f"{size}-{variant}"]
    ffn = feed_forward(variant, dense.width, device="meta")
    assert ffn.up.out_features == ffn.down.in_features == dense.hidden
    for name in ("rank", "blocks"):
        sizes = {getattr(layer, name, None) for layer in (ffn.up, ffn.down)}
        assert sizes == {getattr(smaller, name)}


def test_the_dense_layer_is_dense():
    ffn = feed_forward("dense", 8, dtype=torch.float64)
    assert type(ffn.up) is type(ffn.down) is torch.nn.Linear
    assert ffn(torch.ones(3, 8, dtype=torch.float64)).shape == (3, 8)


@pytest.mark.parametrize("name", ["lowrank", "lowrank-50", "Dense", ""])
def test_an_unknown_layer_names_those_there_are(name):
    with pytest.raises(ValueError, match=r"there is no layer .*lowrank-32"):
        feed_forward(name, 8)


@pytest.mark.parametrize("variant", LAYERS)
@pytest.mark.usefixtures("quick")
def test_a_run_times_a_layer_and_the_dense_one(variant):
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
    assert len(layer_rows(record)) == 2 * 2 + 2 * 1
    for row in layer_rows(record):
        assert row["speed"] == pytest.approx(row["dense microseconds"] / row["microseconds"])


def test_speed_is_the_ratio_of_the_medians(clock):
    record = run(SpeedConfig("lowrank-32", **TINY), progress=False, device="cpu")
    bound = {"12": 3.2, "32": 3.2}
    assert record.metrics["bound"] == pytest.approx(bound)
    for row in layer_rows([record]):
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


@pytest.mark.usefixtures("quick")
def test_a_run_times_generation_with_and_without_merging():
    record = run(MERGING, progress=False, device="cpu")
    m = record.metrics
    names = {"dense", "lowrank-32", "merged", "premerged-32"}
    assert m["tokens per second"].keys() == m["best batch"].keys() == names
    assert all(rates.keys() == {"1", "3"} for rates in m["tokens per second"].values())
    rates = {name: rates["3"] for name, rates in m["tokens per second"].items()}
    ratio = rates["premerged-32"] / rates["dense"]
    assert m["speed of decoding over dense"] == pytest.approx(ratio)
    assert m["thresholds"].keys() == {"up", "down"}
    table = decoding_rows([record])
    assert len(table) == 4 * 2
    assert {row["speed"] for row in table if row["model"] == "dense"} == {1.0}
    (row,) = [r for r in table if (r["model"], r["batch"]) == ("premerged-32", 3)]
    assert row["speed"] == pytest.approx(ratio)
    assert layer_rows(record) == []


def test_merged_models_are_the_structured_one(quick, monkeypatch):
    given = {}

    def premerge(model, *, threshold):
        given["always"] = threshold
        return speed_premerge(model, threshold=threshold)

    def premerge_decoder(model, *, largest):
        given["measured up to"] = largest
        return speed_premerge(model, threshold=5)

    def compare(models, *, prompt, length, batches, rounds):
        assert (prompt, length, rounds) == (1, 2, 3)
        assert all(not model.training for model in models.values())
        kinds = {name: type(model.blocks[1].ffn.up) for name, model in models.items()}
        assert kinds == {
            "dense": torch.nn.Linear,
            "lowrank-32": LowRank,
            "merged": PreMerged,
            "premerged-32": PreMerged,
        }
        tokens = torch.arange(6).view(2, 3)
        with torch.no_grad():
            logits = [models[name](tokens) for name in ("lowrank-32", "merged", "premerged-32")]
        torch.testing.assert_close(logits[0], logits[1])
        torch.testing.assert_close(logits[0], logits[2])
        return {name: Throughput(prompt, length, {batches[0]: 1.0}, "batches") for name in models}

    speed_premerge = speed.premerge
    monkeypatch.setattr(speed, "premerge", premerge)
    monkeypatch.setattr(speed, "premerge_decoder", premerge_decoder)
    monkeypatch.setattr(speed, "compare_throughput", compare)
    record = run(MERGING, progress=False, device="cpu")
    assert given == {"always": 3, "measured up to": 3}  # every step of the largest batch is merged
    assert record.metrics["thresholds"] == {"up": 5, "down": 5}


def test_without_a_batch_each_model_has_its_best(monkeypatch):
    def compare(models, *, batches, **options):
        assert batches == (1, 2, 4)
        seconds = {"gqa": {1: 1.0, 2: 1.0, 4: 4.0}, "wide-structured": {1: 1.0, 2: 2.0, 4: 1.0}}
        return {name: Throughput(2, 3, seconds[name], "slower") for name in models}

    monkeypatch.setattr(speed, "compare_throughput", compare)
    record = run(SEARCHING, progress=False, device="cpu")
    assert record.metrics["best batch"] == {"gqa": 2, "wide-structured": 4}
    assert record.metrics["maximum tokens per second"] == {"gqa": 6.0, "wide-structured": 12.0}
    assert record.metrics["speed of decoding over gqa"] == 2.0
    assert "thresholds" not in record.metrics


def test_a_model_that_stopped_early_has_no_ratio_beyond(monkeypatch):
    seconds = {"gqa": {1: 1.0}, "wide-structured": {1: 1.0, 2: 1.0}}

    def compare(models, **options):
        return {name: Throughput(2, 3, seconds[name], "memory") for name in models}

    monkeypatch.setattr(speed, "compare_throughput", compare)
    table = decoding_rows(run(SEARCHING, progress=False, device="cpu"))
    assert [row["speed"] for row in table] == [1.0, 1.0, None]
    seconds["gqa"] = {}
    with pytest.raises(ValueError, match="gqa has no room for 1 rows on cpu; give smaller"):
        run(SEARCHING, progress=False, device="cpu")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MERGING, {"at": 2}, r"at is 2; give one of the batches \(1, 3\)"),
        (MERGING, {"batches": (3, 1)}, "batches is"),
        (MERGING, {"dtype": "int8"}, "there is no dtype"),
        (MERGING, {"rounds": 2}, "3 rounds"),
        (MERGING, {"against": "merged"}, "give each model its own"),
        (MERGING, {"model": DecoderConfig(**MODEL)}, "pre-merge is of structured layers"),
        (SEARCHING, {"variant": "gqa"}, "give each model its own"),
        (SEARCHING, {"length": 7}, "the context of 8"),
        (SEARCHING, {"prompt": 0}, "at least 1"),
    ],
)
def test_a_bad_comparison_says_what_is_allowed(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


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
        for name, config in grid("structured-ffn-speed", profile).items():
            assert name == config.variant
            json.dumps(plain_config(config))


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_models_of_the_grid_are_in_the_proportions_of_the_paper(profile):
    configs = grid("structured-ffn-speed", profile)
    merging, wide = configs["premerged-32"], configs["wide-structured"]
    assert merging.at <= 16
    assert merging.prompt == 1
    assert merging.model.rank == merging.model.width // 4
    grouped = wide.reference
    assert grouped.heads * grouped.per_head == grouped.width == 2 * wide.model.rank
    assert wide.model.heads * wide.model.per_head == grouped.width // 2
    assert wide.model.key_heads == grouped.key_heads == grouped.heads // 4
    assert wide.model.ffn_hidden == grouped.ffn_hidden == 19 * grouped.width // 4
    with torch.device("meta"):
        for config in (merging.model, merging.reference, wide.model, wide.reference):
            Decoder(dataclasses.replace(config, layers=2))


def test_the_wide_models_of_the_gpu_are_those_that_the_paper_timed():
    gpu = grid("structured-ffn-speed", "gpu")
    timed = {"m": gpu["wide-structured"], "l": gpu["wide-structured-l"]}
    for published in PUBLISHED_THROUGHPUT:
        assert published.variant in ("dense", timed["m"].variant, timed["m"].against)
        assert published.mark in claims.MARKS
    for size, config in timed.items():
        parameters = count(config.reference).parameters, count(config.model).parameters
        printed = {"m": (335e6, 219e6), "l": (729e6, 464e6)}[size]
        assert parameters == pytest.approx(printed, rel=0.01)


@pytest.mark.usefixtures("quick")
def test_claims_read_what_the_runs_give():
    """Every claim on speed is about a variant of the grid and a number of its records."""
    gpu = grid("structured-ffn-speed", "gpu")
    small = {name: dataclasses.replace(gpu[name], **TINY) for name in LAYERS}
    small |= {config.variant: config for config in (MERGING, SEARCHING)}
    numbers = {
        name: run(config, progress=False, device="cpu").metrics for name, config in small.items()
    }
    assert small.keys() <= gpu.keys()
    for claim in claims.load_claims():
        for statistic in claim.statistics:
            if statistic.experiment == "structured-ffn-speed":
                assert statistic.arms[0] in grid("structured-ffn-speed", claim.profile)
                assert statistic.null == 1.0
                for arm in statistic.arms:
                    assert isinstance(numbers[arm][statistic.metric], float)


@pytest.mark.parametrize("name", ["premerged-32", "wide-structured", "wide-structured-l"])
def test_decoding_of_the_gpu_runs_tiny(name):
    """The same code in bfloat16, with a model of its kind that a processor can time."""
    config = grid("structured-ffn-speed", "gpu")[name]
    small = {"width": 64, "layers": 2, "vocabulary": 256, "context": 32, "head_width": 16}
    small |= {"heads": 4, "kv_heads": 4 if name == "premerged-32" else 1}
    small["hidden"] = None if name == "premerged-32" else 304
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **small, rank=16),
        reference=dataclasses.replace(config.reference, **small),
        prompt=min(config.prompt, 8),
        length=4,
        batches=(1, 2),
        at=config.at and 2,
        rounds=3,
    )
    metrics = run(config, progress=False, device="cpu").metrics
    assert config.dtype == "bfloat16"
    assert metrics[f"speed of decoding over {config.against}"] > 0
