"""Runs of language models: measured as said, resumed exactly, loaded when they ended."""

import dataclasses
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from feedforward import count
from feedforward.files import cache_directory
from feedforward.layers.experts import collect_routing
from feedforward.lm import experiment
from feedforward.lm.data import bits_per_byte, evaluation_batches, load_text
from feedforward.lm.experiment import LanguageModelConfig, grid, measure, run, trace_routing
from feedforward.lm.model import Decoder, DecoderConfig
from feedforward.records import Record, run_directory
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
