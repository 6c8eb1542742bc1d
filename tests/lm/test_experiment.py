"""Runs of language models: measured as said, resumed exactly, loaded when they ended."""

import dataclasses
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from feedforward import SelfGuided, count
from feedforward.files import DataError, cache_directory
from feedforward.layers.cost import PAPER_SHAPES
from feedforward.layers.experts import collect_routing
from feedforward.lm import experiment
from feedforward.lm.data import batches, bits_per_byte, evaluation_batches, load_text
from feedforward.lm.experiment import (
    Guidance,
    LanguageModelConfig,
    grid,
    guide_flops,
    guide_parameters,
    guided_share,
    loss_spikes,
    measure,
    run,
    spike_starts,
    trace_routing,
)
from feedforward.lm.model import Decoder, DecoderConfig
from feedforward.records import Record, config_key, plain_config, run_directory
from feedforward.training import TrainingConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "results"))


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    words = ["whale", "ship", "sea", "the", "a", "and", "saw", "sank", "old", "white"]
    rng = np.random.default_rng(0)
    text = "\n\n".join(" ".join(rng.choice(words, 20)) for _ in range(120))
    (folder / "text.txt").write_text(text)
    return LanguageModelConfig(
        variant="moe",
        model=DecoderConfig(
            vocabulary=280, width=16, layers=2, heads=2, context=16, ffn="moe", experts=4, k=2
        ),
        training=TrainingConfig(steps=8, lr=1e-2, precision="fp32", log_every=2, evaluate_every=4),
        batch=4,
        source=str(folder),
        balance=0.01,
        z=0.001,
        curve_tokens=64,
    )


def text_of(config):
    return load_text(config.source, vocabulary=config.model.vocabulary)


def plain(record: Record) -> dict:
    """What must not depend on the machine's speed."""
    return {k: v for k, v in record.metrics.items() if k != "tokens per second"} | record.curves


def test_a_run_measures_what_it_says(config):
    started = time.perf_counter()
    record = run(config, progress=False, device="cpu")
    assert 0 < record.provenance.seconds <= time.perf_counter() - started + 0.01
    m = record.metrics
    text = text_of(config)
    assert (record.experiment, record.variant, record.seed) == ("foundations", "moe", 0)
    assert m["tokens"] == config.tokens == 8 * 4 * 16
    assert m["epochs"] == pytest.approx(512 / len(text.train))
    for split in ("validation", "test"):
        loss = m[f"{split} loss"]
        assert m[f"{split} perplexity"] == pytest.approx(math.exp(loss))
        per_byte = bits_per_byte(loss, text.bytes_per_token(split))
        assert m[f"{split} bits per byte"] == pytest.approx(per_byte)
    assert m["parameters"] == sum(p.numel() for p in Decoder(config.model).parameters())
    assert m["active parameters"] < m["parameters"]
    assert m["FLOPs per token"] == count(config.model).flops
    assert np.allclose(np.sum(m["load"], axis=1), 1)
    assert len(m["load"]) == len(m["load entropy"]) == len(m["max share"]) == 2
    assert m["balance loss"] >= 0.9
    assert 1 < m["unigram loss"] < math.log(280)
    steps = [2, 4, 6, 8]
    assert record.curves["train loss"]["step"] == steps
    assert record.curves["train loss"]["value"][0] > record.curves["train loss"]["value"][-1]
    assert record.curves["validation loss"]["step"] == [4, 8]
    assert set(record.curves["load, layer 1"]) == {"step", *(f"expert {e}" for e in range(4))}
    shares = [record.curves["load, layer 1"][f"expert {e}"] for e in range(4)]
    assert np.allclose(np.sum(shares, axis=0), 1)
    assert set(record.curves["routing entropy"]) == {"step", "layer 0", "layer 1"}
    assert record.provenance.device


def test_a_dense_run_has_nothing_of_experts(config):
    dense = DecoderConfig(vocabulary=280, width=16, layers=2, heads=2, context=16)
    record = run(
        dataclasses.replace(config, variant="dense", model=dense), progress=False, device="cpu"
    )
    assert "load" not in record.metrics
    assert record.metrics["active parameters"] == record.metrics["parameters"]
    assert record.curves["loss"] == record.curves["train loss"]


def test_a_killed_run_ends_with_the_same_numbers(config, monkeypatch, tmp_path):
    whole = run(config, progress=False, device="cpu")
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "another"))
    often = dataclasses.replace(config.training, checkpoint_every_steps=3)
    again = dataclasses.replace(config, training=often)
    loss, calls = experiment._loss, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*arguments, **options)

    monkeypatch.setattr(experiment, "_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        run(again, progress=False, device="cpu")
    assert not list(cache_directory().rglob("record.json"))
    continued = run(again, progress=False, device="cpu")
    assert len(calls) == 6 + 5  # steps 4 to 8 again, none before the checkpoint
    assert plain(continued) == plain(whole)
    assert not list(cache_directory().rglob("step-*"))  # weights stay, checkpoints go


def test_a_run_that_ended_is_loaded(config, monkeypatch):
    first = run(config, progress=False, device="cpu")
    monkeypatch.setattr(experiment, "train", None)
    assert run(config, progress=False, device="cpu") == first
    with pytest.raises(TypeError):
        run(dataclasses.replace(config, seed=1), progress=False, device="cpu")


def test_the_test_text_is_read_once_the_training_is_over(config, monkeypatch):
    trained = []

    class Sealed:
        def __init__(self, tokens):
            self.tokens = tokens

        def __len__(self):
            assert trained, "the test text was read before the training ended"
            return len(self.tokens)

        def __getitem__(self, index):
            assert trained, "the test text was read before the training ended"
            return self.tokens[index]

    def sealed(*arguments, **options):
        text = load_text(*arguments, **options)
        return dataclasses.replace(text, test=Sealed(text.test))

    def train(*arguments, **options):
        result = original(*arguments, **options)
        trained.append(True)
        return result

    original = experiment.train
    monkeypatch.setattr(experiment, "load_text", sealed)
    monkeypatch.setattr(experiment, "train", train)
    assert run(config, progress=False, device="cpu").metrics["test loss"] > 0


def test_the_router_losses_are_added_with_their_weights(config):
    torch.manual_seed(0)
    model = Decoder(config.model)
    batch = torch.randint(0, 280, (2, 4, 16))
    plain, numbers = experiment._loss(model, batch, balance=0.0, z=0.0)
    heavy, _ = experiment._loss(model, batch, balance=0.5, z=0.25)
    torch.testing.assert_close(plain, numbers["train loss"])
    expected = plain + 0.5 * numbers["balance loss"] + 0.25 * numbers["z-loss"]
    torch.testing.assert_close(heavy, expected)
    gate = model.blocks[0].ffn.router.gate
    gradients = [torch.autograd.grad(loss, gate)[0] for loss in (plain, heavy)]
    assert not torch.allclose(*gradients)


def test_measuring_equals_one_pass_over_everything(config):
    torch.manual_seed(0)
    model = Decoder(config.model)
    tokens = np.random.default_rng(0).integers(0, 280, 16 * 12 + 1).astype(np.uint16)
    measured = measure(model, evaluation_batches(tokens, 5, 16))
    inputs = torch.from_numpy(tokens[:-1].astype(np.int64)).view(12, 16)
    targets = torch.from_numpy(tokens[1:].astype(np.int64)).view(12, 16)
    with torch.no_grad(), collect_routing(model) as routings:
        logits = model(inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    for layer, routing in enumerate(routings):
        counts = np.bincount(routing.indices.flatten(), minlength=4)
        assert measured["load"][layer] == pytest.approx((counts / counts.sum()).tolist())
    assert not model.training


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_is_shorter_than_a_context_is_told_before_training(config, split, monkeypatch):
    def load_short(*arguments, **options):
        text = load_text(*arguments, **options)
        text.details[split]["tokens"] = 16
        return text

    monkeypatch.setattr(experiment, "load_text", load_short)
    monkeypatch.setattr(experiment, "train", None)
    with pytest.raises(DataError, match=f"the {split} text .* has 16 tokens.* context of 16"):
        run(config, progress=False, device="cpu")
    with pytest.raises(ValueError, match="no target to measure"):
        measure(Decoder(config.model), [])


def test_a_collapsed_router_is_seen(config):
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(config.model, ffn="switch"))
    for block in model.blocks:
        block.ffn_norm.bias.data.fill_(1.0)
        block.ffn_norm.weight.data.zero_()
        block.ffn.router.gate.data.zero_()
        block.ffn.router.gate.data[2] = 1.0  # the logit of expert 2 is 16, the others' 0
    tokens = np.arange(100, dtype=np.uint16)
    measured = measure(model, evaluation_batches(tokens, 2, 16))
    assert measured["load"] == [[0, 0, 1, 0]] * 2
    assert measured["max share"] == [1, 1]
    assert measured["load entropy"] == [0, 0]
    assert measured["routing entropy"] == pytest.approx([0, 0], abs=1e-4)
    assert measured["balance loss"] == pytest.approx(4, abs=1e-3)


def test_a_trained_model_has_the_weights_of_its_record(config):
    model, text, record = experiment.trained_model(config, progress=False, device="cpu")
    loss = measure(model, evaluation_batches(text.validation, 16, 16))["loss"]
    assert loss == pytest.approx(record.metrics["validation loss"], rel=1e-6)
    again, _, _ = experiment.trained_model(config, progress=False, device="cpu")
    assert again.head.weight is again.embedding.weight
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    file = run_directory(run, config) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*Delete it"):
        experiment.trained_model(config, progress=False, device="cpu")


def test_a_passage_can_be_followed_through_the_experts(config):
    torch.manual_seed(0)
    model, text = Decoder(config.model), text_of(config)
    trace = trace_routing(model, text, "the old whale sank")
    assert "".join(trace.tokens) == "the old whale sank"
    assert trace.layers == (0, 1)
    assert trace.indices.shape == trace.weights.shape == (2, len(trace.tokens), 2)
    assert trace.probabilities.shape == (2, len(trace.tokens), 4)
    assert torch.equal(trace.probabilities.topk(2).indices, trace.indices)
    torch.testing.assert_close(trace.weights.sum(-1), torch.ones(2, len(trace.tokens)))
    assert len(trace_routing(model, text, "whale " * 100).tokens) == 16
    with pytest.raises(ValueError, match="passage is empty"):
        trace_routing(model, text, "")
    dense = Decoder(DecoderConfig(vocabulary=280, width=16, layers=1, heads=2))
    with pytest.raises(ValueError, match="dense: no experts"):
        trace_routing(dense, text, "the whale")


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_the_arms_of_foundations_are_comparable(profile):
    arms = grid("foundations", profile)
    assert {"dense", "moe", "switch", "moe-unbalanced"} <= set(arms)
    flops = {name: count(arm.model).flops for name, arm in arms.items()}
    assert max(flops.values()) < 1.01 * min(flops.values())
    for name, arm in arms.items():
        assert arm.variant == name
        assert (arm.experiment, arm.source, arm.seed) == ("foundations", "embedded", 0)
        assert arm.training == arms["dense"].training
        assert arm.tokens == arms["dense"].tokens
        assert (arm.balance > 0) == (name in ("moe", "switch"))


def test_unknown_parts_and_profiles_are_refused():
    with pytest.raises(ValueError, match="no part 'foundation'; did you mean 'foundations'"):
        grid("foundation", "cpu")
    with pytest.raises(ValueError, match="no profile 'cup'"):
        grid("foundations", "cup")
    with pytest.raises(ValueError, match=r"foundations has no.*'paper'.*smoke, cpu, gpu"):
        grid("foundations", "paper")


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"balance": -1.0}, {"final_tokens": 0}])
def test_numbers_out_of_range_are_refused(config, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(config, **wrong)


# self-guided training

GUIDED = Guidance(4, repeat=True)


@pytest.fixture
def guided(config):
    """12 steps of 2 micro-batches: 4 guided, 4 plain, and the first 4 steps' data again."""
    model = DecoderConfig(
        vocabulary=280, width=16, layers=3, heads=2, context=16, ffn="blockshuffle", blocks=2
    )
    loop = TrainingConfig(
        steps=12,
        lr=1e-2,
        accumulate=2,
        decay_all=True,
        precision="fp32",
        log_every=1,
        evaluate_every=3,
    )
    return dataclasses.replace(
        config, variant="guided", model=model, training=loop, guidance=GUIDED, balance=0, z=0
    )


def changed(config, **guidance):
    return dataclasses.replace(config, guidance=dataclasses.replace(config.guidance, **guidance))


def guided_layers(model):
    return [module for module in model.modules() if isinstance(module, SelfGuided)]


@pytest.fixture
def seen(monkeypatch):
    """Of every micro-batch that is trained on: its inputs, and each guide's part."""
    loss, seen = experiment._loss, []

    def sees(model, batch, **options):
        seen.append((batch[0].clone(), [module.alpha for module in guided_layers(model)]))
        return loss(model, batch, **options)

    monkeypatch.setattr(experiment, "_loss", sees)
    return seen


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("lowrank", (0.30, 0.38, 0.41, 0.43)),
        ("blockshuffle", (0.30, 0.38, 0.41, 0.43)),
        ("blockdense", (0.30, 0.40, 0.41, 0.45)),
    ],
)
def test_the_guided_share_is_the_papers(kind, shares):
    for size, share in zip(("s", "m", "l", "xl"), shares, strict=True):
        dense, structured = PAPER_SHAPES[size], PAPER_SHAPES[f"{size}-{kind}-32"]
        assert guided_share(dense, structured) == pytest.approx(share, abs=0.006)
        assert guided_share(dense, structured, stochastic=False) < guided_share(dense, structured)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("gated", [False, True])
def test_the_guided_share_makes_the_protocol_cost_what_dense_training_does(gated, stochastic):
    """From the parameters of real models: 6 FLOPs a weight and token, 12 of attention a layer."""
    dense = DecoderConfig(vocabulary=300, width=32, layers=3, heads=2, context=24, gated=gated)
    structured = dataclasses.replace(dense, ffn="blockdense", rank=12, blocks=4)

    def flops(config):
        weights = sum(p.numel() for p in Decoder(config).parameters() if p.dim() > 1)
        return 6 * weights + 12 * config.layers * config.context * config.width

    guide = 6 * (2 + gated) * (3 - 1) * 32 * 128 * (0.5 if stochastic else 1)
    share = guided_share(dense, structured, stochastic=stochastic)
    protocol = flops(structured) * (1 + share) + guide * share
    assert protocol == pytest.approx(flops(dense), rel=1e-12)


def test_there_is_no_share_without_a_guide_or_FLOPs_for_it():
    dense = DecoderConfig(vocabulary=300, width=32, layers=3, heads=2, context=24)
    low = dataclasses.replace(dense, ffn="lowrank", rank=32)  # more weights than a dense matrix
    with pytest.raises(ValueError, match="none are left for a guide"):
        guided_share(dense, low)
    with pytest.raises(ValueError, match="structured layers; the model's are dense"):
        guided_share(low, dense)
    experts = dataclasses.replace(dense, ffn="moe", experts=4)
    for count_of in (guide_parameters, guide_flops):
        with pytest.raises(ValueError, match="structured layers; the model's are MoE"):
            count_of(experts)
    low = dataclasses.replace(low, rank=8)
    assert guide_parameters(low) == 2 * 2 * 32 * 128
    assert guide_parameters(low.shape()) == guide_parameters(low)


def test_guides_fall_by_the_schedule_and_leave(guided, seen):
    run(guided, progress=False, device="cpu")
    parts = [alphas for _, alphas in seen]
    assert len(parts) == 12 * 2
    for step in range(4):
        expected = [pytest.approx(0.5 * (1 + math.cos(math.pi * step / 4)))] * 4  # 2 of 3 layers
        assert parts[2 * step] == parts[2 * step + 1] == expected
    assert not any(parts[8:])
    weights = load_file(run_directory(run, guided) / "model.safetensors")
    plain = dict(Decoder(guided.model).named_parameters())
    assert weights.keys() == plain.keys()
    model, _, _ = experiment.trained_model(guided, progress=False, device="cpu")
    assert not guided_layers(model)


def test_a_repeated_phase_sees_the_first_data_again(guided, seen):
    run(guided, progress=False, device="cpu")
    data = [inputs for inputs, _ in seen]
    assert all(map(torch.equal, data[:8], data[16:]))
    text = text_of(guided)
    batch = batches(text.train, guided.batch, 16, guided.seed)
    assert all(torch.equal(inputs, batch(i)[0]) for i, inputs in enumerate(data[:16]))
    seen.clear()
    run(changed(guided, repeat=False), progress=False, device="cpu")
    assert all(torch.equal(inputs, batch(i)[0]) for i, (inputs, _) in enumerate(seen))


@pytest.mark.parametrize("processes", [1, 3])
def test_every_process_repeats_its_own_data(guided, processes):
    """`train` gives micro-batch m of step s in process r the index (2s + m) * processes + r."""
    shared = dataclasses.replace(guided, processes=processes)
    order = experiment.data_order(shared, lambda index: index)
    per_step = 2 * processes
    indices = [order(index) for index in range(12 * per_step)]
    assert indices == [*range(8 * per_step), *range(4 * per_step)]
    plain = changed(shared, repeat=False)
    assert experiment.data_order(plain, lambda index: index)(11 * per_step) == 11 * per_step


def test_a_guided_run_starts_as_the_plain_one(guided):
    """The same weights, and the same function: the first loss is the same, the next is not."""
    always = changed(guided, stochastic=False)
    plain = dataclasses.replace(guided, guidance=None)
    first, other = (
        run(config, progress=False, device="cpu").curves["loss"]["value"]
        for config in (always, plain)
    )
    assert first[0] == pytest.approx(other[0], rel=1e-6)
    assert first[1] != pytest.approx(other[1], rel=1e-6)
    released = run(changed(always, released_start=True), progress=False, device="cpu")
    assert released.curves["loss"]["value"][0] != pytest.approx(first[0], rel=1e-6)


@pytest.mark.parametrize("blocks", [2, 4])
def test_the_released_start_is_not_what_the_layers_compute(blocks):
    """Its relative errors on 12 -> 48 and 48 -> 12; ours has none."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocabulary=300, width=12, layers=3, heads=2, ffn="blockshuffle", blocks=blocks
    )
    for released in (False, True):
        model = Decoder(config)
        experiment.start_guides(model, Guidance(3, released_start=released))
        layers = guided_layers(model)
        assert [(m.in_features, m.out_features) for m in layers] == [(12, 48), (48, 12)] * 2
        for module in layers:
            own = module.layer.dense_weight()
            error = ((module.guide - own).norm() / own.norm()).item()
            assert 0.5 < error < 3 if released else error < 1e-6
            without = torch.block_diag(*module.layer.u) @ torch.block_diag(*module.layer.v)
            assert torch.equal(module.guide, without) == released


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("repeat", [True, False])
def test_training_flops_count_the_guides_while_they_are_there(guided, repeat, stochastic):
    guided = changed(guided, repeat=repeat, stochastic=stochastic)
    metrics = run(guided, progress=False, device="cpu").metrics
    weights = sum(p.numel() for p in Decoder(guided.model).parameters() if p.dim() > 1)
    token = 6 * weights + 12 * 3 * 16 * 16  # attention: 3 layers, context 16, width 16
    guide = 6 * 2 * 2 * 16 * 64 * (0.5 if stochastic else 1)  # two linears of two layers
    per_step = 2 * 4 * 16
    expected = (12 * token + 4 * guide) * per_step
    assert metrics["training FLOPs"] == pytest.approx(expected, rel=1e-12)
    assert metrics["tokens"] == 12 * per_step
    assert metrics["tokens per parameter"] == pytest.approx(12 * per_step / metrics["parameters"])
    assert metrics["parameters"] == sum(p.numel() for p in Decoder(guided.model).parameters())
    without = run(dataclasses.replace(guided, guidance=None), progress=False, device="cpu")
    assert without.metrics["training FLOPs"] == 12 * token * per_step


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps 0; give a whole number from 1"),
        ({"steps": 2.0}, r"steps 2\.0"),
        ({"steps": True}, "steps True"),
        ({"schedule": "step"}, "no schedule 'step'.*'cosine', 'linear'"),
        ({"steps": 7}, "takes 7 steps, twice, of 12"),
        ({"steps": 13, "repeat": False}, "takes 13 steps of 12"),
    ],
)
def test_guidance_that_cannot_be_is_refused(guided, wrong, message):
    with pytest.raises(ValueError, match=message):
        changed(guided, **wrong)


def test_guidance_needs_structured_layers(config):
    with pytest.raises(ValueError, match="guidance is of structured layers; ffn is 'moe'"):
        dataclasses.replace(config, guidance=Guidance(2))


def test_what_was_added_leaves_the_identity_of_runs_alone(config, guided):
    entries = plain_config(config)
    assert "guidance" not in entries
    assert "init" not in entries["model"]
    assert plain_config(guided)["guidance"]["steps"] == 4
    keys = {
        config_key(c)
        for c in (
            guided,
            dataclasses.replace(guided, guidance=None),
            changed(guided, released_start=True),
            dataclasses.replace(
                guided, model=dataclasses.replace(guided.model, init="orthonormal")
            ),
        )
    }
    assert len(keys) == 4


def test_guidance_over_the_whole_run_leaves_a_plain_model(guided):
    whole = changed(guided, steps=12, repeat=False)
    record = run(whole, progress=False, device="cpu")
    model, text, _ = experiment.trained_model(whole, progress=False, device="cpu")
    loss = measure(model, evaluation_batches(text.validation, 16, 16))["loss"]
    assert loss == pytest.approx(record.metrics["validation loss"], rel=1e-6)


class Killed(BaseException):
    """Nothing catches it."""


def kill(monkeypatch, name, call):
    """Let the call of a function of the experiment end the run, after it did its work."""
    original, calls = getattr(experiment, name), []

    def dies(*arguments, **options):
        result = original(*arguments, **options)
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(experiment, name, dies)


@pytest.fixture(scope="module")
def undisturbed():
    """What the runs that nobody killed gave, by how often they were saved."""
    return {}


@pytest.mark.parametrize(
    ("function", "call", "every", "step"),
    [
        pytest.param("_loss", 6, 1, 2, id="inside guidance"),
        pytest.param("_loss", 7, 1, 3, id="before the last guided step"),
        pytest.param("release", 1, 1, 3, id="when the guides were dropped, not saved"),
        pytest.param("measure", 1, 1, 3, id="evaluating without guides, not saved"),
        pytest.param("_loss", 9, 1, 4, id="when the guides were dropped, and saved"),
        pytest.param("_loss", 12, 3, 3, id="after guidance, saved inside it"),
        pytest.param("_loss", 17, 1, 8, id="before the repeat"),
        pytest.param("_loss", 22, 1, 10, id="inside the repeat"),
        pytest.param("_loss", 24, 5, 10, id="in the last step"),
    ],
)
def test_a_killed_guided_run_ends_with_the_same_numbers(
    guided, function, call, every, step, undisturbed, monkeypatch, tmp_path
):
    """Guides drawn at random, over each of the borders between the phases, bit for bit."""
    often = dataclasses.replace(
        guided.training, checkpoint_every_steps=every, evaluate_every=4, log_every=3
    )
    guided = dataclasses.replace(guided, training=often)
    monkeypatch.setattr(
        "feedforward.training.checkpoints._flush", lambda path: None
    )  # no power cut here
    if every not in undisturbed:
        record = run(guided, progress=False, device="cpu")
        weights = (run_directory(run, guided) / "model.safetensors").read_bytes()
        undisturbed[every] = plain(record), weights
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "another"))
    with monkeypatch.context() as patch:
        kill(patch, function, call)
        with pytest.raises(Killed):
            run(guided, progress=False, device="cpu")
    train, results = experiment.train, []
    monkeypatch.setattr(
        experiment, "train", lambda *a, **o: results.append(train(*a, **o)) or results[-1]
    )
    torch.manual_seed(99)
    continued = run(guided, progress=False, device="cpu")
    assert [result.resumed_from for result in results] == [step]
    weights = (run_directory(run, guided) / "model.safetensors").read_bytes()
    assert (plain(continued), weights) == undisturbed[every]


# spikes


def falling(length, seed=0):
    """A training curve without spikes: slowly down, with a little noise."""
    rng = np.random.default_rng(seed)
    return 2 + 4 * np.exp(-np.arange(length) / 30) + rng.uniform(-0.05, 0.05, length)


@pytest.mark.parametrize("seed", range(5))
def test_every_spike_is_counted_once(seed):
    rng = np.random.default_rng(seed)
    losses = falling(300, seed)
    assert loss_spikes(losses) == loss_spikes(losses.tolist()) == 0
    starts = 60 + 40 * np.arange(rng.integers(1, 7))
    for start in starts:
        losses[start : start + rng.integers(1, 6)] += rng.uniform(0.6, 3)
    assert spike_starts(losses) == tuple(starts)
    assert loss_spikes(losses) == len(starts)
    assert loss_spikes(losses + 7) == len(starts)  # only differences count
    assert loss_spikes(2 * losses, height=0.5) == len(starts)
    assert loss_spikes(losses, height=5) == 0
    assert type(loss_spikes(losses)) is int


def test_what_is_no_spike():
    assert loss_spikes([]) == loss_spikes([3.0]) == loss_spikes([2.0] * 50) == 0
    assert loss_spikes(np.linspace(9, 1, 100)) == 0
    assert loss_spikes([1.0, 1.25]) == 0  # it has to be above
    assert loss_spikes([1.0, 1.2501]) == 1
    assert loss_spikes([1.0] * 30 + [9.0] * 500) == 1  # a new level is one
    assert loss_spikes(np.linspace(1, 3, 200)) == 0  # a slow rise, against the last 20 points
    assert loss_spikes(np.linspace(1, 3, 200), window=200) == 1
    spikes = [1.0, 9.0] * 5
    assert loss_spikes(spikes[:4]) == 2


@pytest.mark.parametrize("count_of", [loss_spikes, spike_starts])
@pytest.mark.parametrize("window", [0, -3])
def test_without_points_to_compare_with_there_is_no_spike_to_count(count_of, window):
    with pytest.raises(ValueError, match=f"window is {window}; "):
        count_of([1.0, 2.0, 3.0], window=window)
