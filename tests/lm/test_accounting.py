"""Costs of runs: against what autograd keeps, against the paper's figures, and in one table."""

from dataclasses import replace

import pytest
import torch

from feedforward.claims import load_claims
from feedforward.layers.cost import count
from feedforward.layers.guided import guide
from feedforward.lm import accounting
from feedforward.lm.accounting import (
    PRINTED,
    account,
    activation_bytes,
    gpu_hours,
    memory,
    plan,
    utilisation,
)
from feedforward.lm.experiment import Guidance, LanguageModelConfig, training_flops
from feedforward.lm.model import Decoder, DecoderConfig
from feedforward.lm.structured import grid
from feedforward.training import TrainingConfig

PAPER = grid("structured-ffn", "paper")
ROWS = 2
LONG = 544  # beyond 512 tokens the fused attention runs on a processor too
SHAPE = {"vocabulary": 300, "width": 32, "layers": 1, "heads": 4, "context": LONG}
KINDS = {
    "dense": {},
    "lowrank": {"ffn": "lowrank", "rank": 8},
    "blockshuffle": {"ffn": "blockshuffle", "blocks": 2},
    "blockdense": {"ffn": "blockdense", "rank": 16, "blocks": 2},
    "wide attention": {"head_width": 16},
}


def config(**changes) -> LanguageModelConfig:
    model = DecoderConfig(**SHAPE | {"activation": "gelu_tanh"} | changes)
    return LanguageModelConfig("one", model, TrainingConfig(steps=10, lr=1e-3), batch=ROWS)


def kept(model: DecoderConfig) -> int:
    """Bytes that the graph keeps of a batch in bf16 autocast, weights and positions apart."""
    torch.manual_seed(0)
    decoder = Decoder(model)
    weights = {tuple(p.shape) for p in decoder.parameters()}
    weights |= {shape[:-2] + shape[:-3:-1] for shape in weights if len(shape) > 1}
    found = {}

    def keep(tensor):
        shape = tuple(tensor.shape)
        if shape not in weights and shape[:1] != (LONG,):
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, model.vocabulary, (ROWS, LONG + 1))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        decoder(tokens[:, :-1], tokens[:, 1:])
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_the_graph_keeps_of_a_layer(kind):
    one = config(**KINDS[kind], dense_layers=0)
    two = config(**KINDS[kind] | {"layers": 2}, dense_layers=0)
    measured = (kept(two.model) - kept(one.model)) / (ROWS * LONG)
    assert activation_bytes(two) - activation_bytes(one) == pytest.approx(measured, rel=0.01)


def test_activations_at_the_end_are_the_last_norm_and_the_logits():
    one, two = config(), config(layers=2)
    end = 2 * kept(one.model) - kept(two.model)
    # two gradients of the logits come later
    own = 2 * activation_bytes(one) - activation_bytes(two) - 8 * 300
    assert own == pytest.approx(end / (ROWS * LONG), abs=0.1)


def test_memory_adds_up():
    one = config(**KINDS["lowrank"], layers=2)
    parameters, tokens = count(one.model).parameters, ROWS * LONG
    assert memory(one) == 18 * parameters + tokens * activation_bytes(one)
    assert memory(replace(one, processes=2)) - memory(one) == 4 * parameters
    guided = replace(one, guidance=Guidance(5))
    assert memory(guided) - memory(one) == 18 * 2 * 4 * 32 * 32  # two maps of the second layer
    more = replace(one, training=replace(one.training, accumulate=4))
    assert memory(more) == memory(one)


@pytest.mark.parametrize("changes", [{"ffn": "moe"}, {"gated": True}])
def test_activations_of_other_layers_are_not_made_up(changes):
    with pytest.raises(ValueError, match=r"layers are (moe|gated dense); .* dense, lowrank"):
        memory(config(**changes))


@pytest.mark.parametrize("stochastic", [True, False])
def test_flops_of_a_guided_run_are_those_of_its_two_models(stochastic):
    one = config(**KINDS["blockshuffle"], layers=3)
    guidance = Guidance(4, repeat=True, stochastic=stochastic)
    guided = guide(Decoder(one.model), steps=4, stochastic=stochastic)
    per_step = one.tokens_per_step
    expected = 4 * count(guided).training_flops + 6 * count(one.model).training_flops
    assert training_flops(replace(one, guidance=guidance)) == expected * per_step


# --- the paper's figures ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PRINTED)
def test_our_counts_are_the_printed_ones(variant):
    own = account(PAPER[variant])
    for quantity in ("parameters", "FFN parameters", "training FLOPs", "tokens"):
        if figure := PRINTED[variant].get(quantity):
            assert own[quantity] == pytest.approx(figure.value, rel=0.01)


def test_the_ledger_prints_the_same_figures():
    (claim,) = [one for one in load_claims() if one.id == "ffn-1"]
    quantities = {"FLOPs": "training FLOPs"}
    for cell, value in claim.statistics[0].printed.items():
        name, _, quantity = cell.partition(" ")
        size, _, arm = name.partition("-")
        variant = f"{ {'': 'dense', 'ws': 'wide-structured'}.get(arm, arm) }-{size}"
        assert PRINTED[variant][quantities.get(quantity, quantity)].value == value


def test_hours_are_those_of_the_dense_model_by_calibration_alone():
    assert utilisation() == pytest.approx(0.531, abs=0.001)
    assert gpu_hours(training_flops(PAPER["dense-xl"])) == pytest.approx(352.2, rel=1e-3)
    short = {
        variant: account(PAPER[variant])["A100 hours"] / figures["A100 hours"].value - 1
        for variant, figures in PRINTED.items()
        if "A100 hours" in figures and variant != "dense-xl"
    }
    assert len(short) == 6
    assert max(short, key=short.get) == "lowrank-63-xl"
    assert min(short, key=short.get) == "blockshuffle-32-xl"
    assert -0.245 < min(short.values()) < max(short.values()) < -0.075


# --- the table ----------------------------------------------------------------------------------


def test_a_plan_of_the_paper_compares_where_it_printed_something():
    made = plan("paper", [PAPER["lowrank-32-xl"], PAPER["lowrank-63-m"], PAPER["blockdense-32-m"]])
    assert [row[0] for row in made.rows] == [
        *("lowrank-32-xl", "  paper", "  ours / paper"),
        *("lowrank-63-m", "  paper"),
        "blockdense-32-m",
    ]
    table = [dict(zip(made.columns, row, strict=True)) for row in made.rows]
    assert (table[0]["M all"], table[1]["M all"], table[2]["M all"]) == (
        "743.6",
        "744.0 I",
        "-0.1%",
    )
    assert (table[1]["A100 h"], table[2]["A100 h"]) == ("260.2 I", "-16.9%")
    assert (table[0]["ppl"], table[1]["ppl"], table[2]["ppl"]) == ("", "13.55 I", "")
    assert table[4] == dict.fromkeys(made.columns, "") | {"run": "  paper", "ppl": "19.14 D"}
    assert len(made.commands) == 3
    assert made.commands[0].replace("\\\n   ", "").split() == [
        *("torchrun", "--nproc-per-node", "8", "-m", "feedforward.cli", "run", "structured-ffn"),
        *("--profile", "paper", "--record", "--variants", "lowrank-32-xl"),
    ]
    notes = " ".join(made.notes)
    assert "8 GPUs x 8 micro-batches x 8 sequences of 1024 tokens = 512 sequences" in notes
    assert "an estimate: FLOPs / (53.1% of 312 TFLOP/s)" in notes


def test_other_profiles_have_no_hours_and_no_paper():
    cpu = list(grid("structured-ffn", "cpu").values())[:2]
    made = plan("cpu", cpu)
    assert made.columns == ("run", "M all", "M FFN", "M tokens", "FLOPs")
    assert [row[0] for row in made.rows] == ["dense", "lowrank-63"]
    # small models in digits that tell them apart
    for config, row in zip(cpu, made.rows, strict=True):
        own = account(config)
        for name, shown in zip(("parameters", "FFN parameters", "tokens"), row[1:4], strict=True):
            assert float(shown) == pytest.approx(own[name] / 1e6, rel=2e-3)
    assert made.commands == []
    gpu = plan("gpu", list(grid("structured-ffn", "gpu").values()))
    assert gpu.columns == ("run", "M all", "M FFN", "B tokens", "FLOPs", "GiB/GPU")
    assert len(gpu.rows) == len(grid("structured-ffn", "gpu"))
    assert any("fineweb" in note for note in gpu.notes)


def test_marks_are_those_that_the_notes_explain():
    marks = {figure.mark for figures in PRINTED.values() for figure in figures.values()}
    assert marks == {"T", "I", "D"}
    assert PRINTED.keys() <= PAPER.keys()
    assert accounting.A100_FLOPS == 312e12
