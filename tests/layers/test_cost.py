from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DistilBertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from feedforward.layers.cost import PAPER_SHAPES, Cost, TransformerShape, breakdown, count
from feedforward.layers.experts import MoE
from feedforward.layers.guided import SelfGuided
from feedforward.layers.routing import ScaleAdapterRouter, TopKRouter
from feedforward.layers.structured import BlockDense, BlockShuffle, LowRank, PreMerged

# arXiv 2406.16450: parameters in millions and training FLOPs, as printed
PRINTED = {
    "s": (110, 1.69e18), "s-lowrank-63": (90, 1.44e18), "s-lowrank-32": (74, 1.22e18),
    "m": (335, 1.55e19), "m-lowrank-63": (262, 1.26e19), "m-lowrank-32": (202, 1.01e19),
    "l": (729, 7.03e19), "l-lowrank-63": (566, 5.61e19), "l-lowrank-32": (430, 4.42e19),
    "xl": (1274, 2.10e20), "xl-lowrank-63": (985, 1.66e20), "xl-lowrank-32": (744, 1.29e20),
    "xl-blockdense-63": (955, 1.61e20), "xl-blockdense-32": (728, 1.27e20),
    "xl-blockshuffle-63": (985, 1.66e20), "xl-blockshuffle-32": (744, 1.29e20),
}  # fmt: skip
TOKENS = {"s": 2.2e9, "m": 6.7e9, "l": 14.58e9, "xl": 25.5e9}


@pytest.mark.parametrize("name", PRINTED)
def test_every_printed_cell_of_the_structured_paper(name):
    parameters, flops = PRINTED[name]
    cost = count(PAPER_SHAPES[name])
    assert cost.parameters / 1e6 == pytest.approx(parameters, rel=0.01)
    tokens = TOKENS[name.partition("-")[0]]
    assert cost.training_flops * tokens == pytest.approx(flops, rel=0.01)
    # nothing here is sparse
    assert cost.active_parameters == cost.parameters
    assert cost.training_flops == 3 * cost.flops


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("xl", 805),
        ("xl-lowrank-63", 516),
        ("xl-lowrank-32", 275),
        ("xl-blockdense-63", 486),
        ("xl-blockdense-32", 260),
        ("xl-blockshuffle-63", 516),
        ("xl-blockshuffle-32", 275),
    ],
)
def test_printed_parameters_of_the_ffns(name, millions):
    assert breakdown(PAPER_SHAPES[name])["ffn"].parameters / 1e6 == pytest.approx(
        millions, rel=0.01
    )


@pytest.mark.parametrize(
    ("name", "millions"), [("m-gqa", 335), ("m-ws", 219), ("l-gqa", 729), ("l-ws", 464)]
)
def test_printed_parameters_of_the_wide_and_structured(name, millions):
    assert count(PAPER_SHAPES[name]).parameters / 1e6 == pytest.approx(millions, rel=0.01)


def test_wide_and_structured_models_train_for_less_than_grouped_queries():
    for size in "ml":
        wide, grouped = (count(PAPER_SHAPES[f"{size}-{kind}"]) for kind in ("ws", "gqa"))
        assert wide.training_flops < grouped.training_flops


def test_the_action_expert_and_its_mixture():
    dense = count(PAPER_SHAPES["pi0-action-expert"])
    sparse = count(PAPER_SHAPES["adamoe-action-expert"])
    assert dense.parameters / 1e9 == pytest.approx(0.31, abs=0.005)
    assert sparse.parameters / 1e9 == pytest.approx(1.22, abs=0.005)
    assert sparse.active_parameters / 1e9 == pytest.approx(0.54, abs=0.005)
    assert sparse.flops < 2 * sparse.active_parameters  # norms multiply nothing
    assert sparse.bytes == 4 * sparse.active_parameters


def test_distilbert_from_its_configuration_and_from_its_shape():
    made = count(DistilBertConfig(), context=384)
    assert made == count(PAPER_SHAPES["distilbert"], context=384)
    assert made.parameters == 66_362_880


def tiny_gpt2():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    config._attn_implementation = "eager"
    shape = TransformerShape(
        width=16, layers=2, heads=2, hidden=64, vocabulary=50, positions=12, context=12
    )
    return GPT2LMHeadModel, config, shape


def tiny_llama(*, tied):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, tie_word_embeddings=tied,
    )  # fmt: skip
    config._attn_implementation = "eager"
    shape = TransformerShape(
        width=16, layers=3, heads=4, kv_heads=2, attention_width=24, hidden=40, gated=True,
        bias=False, norm_bias=False, vocabulary=50, context=12, logits="tied" if tied else "own",
    )  # fmt: skip
    return LlamaForCausalLM, config, shape


@pytest.mark.parametrize(
    "case",
    [tiny_gpt2(), tiny_llama(tied=True), tiny_llama(tied=False)],
    ids=["gpt2", "tied", "own"],
)
class TestOneCostFromThreeSides:
    def test_module_configuration_and_shape_agree(self, case):
        cls, config, shape = case
        config.architectures = [cls.__name__]
        model = cls(config)
        assert count(model, context=12) == count(config, context=12) == count(shape)
        assert count(model, dtype=torch.bfloat16).bytes == count(shape).bytes // 2
        assert count(model).parameters == sum(p.numel() for p in model.parameters())

    def test_flops_are_those_of_a_forward_pass(self, case):
        cls, config, shape = case
        model = cls(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 12, dtype=torch.long), use_cache=False)
        # rotary angles are made by a small product, which is none of the model's
        assert counter.get_total_flops() / 12 == pytest.approx(count(shape).flops, rel=0.01)


def test_a_configuration_without_architectures_is_counted_without_a_head():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    with_head = count(tiny_gpt2()[2], context=0)
    assert count(config).flops == with_head.flops - 2 * 50 * 16


def test_a_large_configuration_needs_no_memory():
    assert count(LlamaConfig(architectures=["LlamaForCausalLM"])).parameters == 6_738_415_616


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 48),
        LowRank(12, 48, rank=3),
        BlockShuffle(12, 48, blocks=4),
        BlockDense(48, 12, rank=6, blocks=2),
        BlockDense(48, 12, rank=6, blocks=2, bias=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_linear_maps_against_a_counted_forward_pass(layer):
    with FlopCounterMode(display=False) as counter:
        layer(torch.ones(5, layer.in_features))
    cost = count(layer)
    assert cost.flops == counter.get_total_flops() / 5
    assert cost.parameters == cost.active_parameters == sum(p.numel() for p in layer.parameters())
    assert cost.bytes == 4 * cost.parameters
    assert count(layer.double()).bytes == 8 * cost.parameters


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_mixture_against_a_counted_forward_pass(gated, shared):
    # float64, so that the experts run one by one and the counter sees them
    moe = MoE(
        8, 16, 4, router=ScaleAdapterRouter(8, 4, k=2), gated=gated, bias=True,
        shared=nn.Linear(8, 8) if shared else None,
    ).double()  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        moe(torch.randn(6, 8, dtype=torch.float64))
    cost = count(moe)
    assert cost.flops == counter.get_total_flops() / 6
    assert cost.parameters == sum(p.numel() for p in moe.parameters())
    idle = sum(p.numel() // 2 for p in (moe.w_in, moe.w_out, moe.b_in, moe.b_out))
    assert cost.active_parameters == cost.parameters - idle
    assert cost.bytes == 8 * cost.active_parameters


def test_shape_and_module_of_a_mixture_agree():
    shape = TransformerShape(
        width=8, layers=1, heads=1, hidden=16, ffn="MoE", experts=4, k=2, shared=1, adapter=True
    )
    shared = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    router = ScaleAdapterRouter(8, 4, k=2)
    moe = MoE(8, 16, 4, router=router, bias=True, shared=shared)
    assert count(moe) == breakdown(shape)["ffn"]


def test_guides_cost_in_training_alone():
    plain = count(LowRank(12, 48, rank=3))
    always = SelfGuided(LowRank(12, 48, rank=3), steps=10, stochastic=False)
    half = SelfGuided(LowRank(12, 48, rank=3), steps=10)
    for guided, part in ((always, 1.0), (half, 0.5)):
        cost = count(guided)
        assert cost.parameters == plain.parameters + 12 * 48
        assert cost.active_parameters == plain.active_parameters
        assert (cost.flops, cost.bytes) == (plain.flops, plain.bytes)
        assert cost.training_flops == plain.training_flops + 3 * part * 2 * 12 * 48
    with FlopCounterMode(display=False) as counter:
        always(torch.ones(5, 12))
    assert 3 * counter.get_total_flops() / 5 == count(always).training_flops
    assert count(half.release()) == plain


def test_a_merged_weight_is_read_for_one_token_but_no_parameter():
    plain = count(LowRank(12, 48, rank=3))
    merged = count(PreMerged(LowRank(12, 48, rank=3), threshold=4).eval())
    assert merged.bytes == 4 * (12 * 48 + 48)
    assert replace(merged, bytes=plain.bytes) == plain
    assert count(PreMerged(LowRank(12, 48, rank=3), threshold=0).eval()) == plain


def test_what_occurs_twice_is_run_twice_and_stored_once():
    layer = nn.Linear(4, 4)
    once, twice = count(layer), count(nn.ModuleList([layer, nn.Sequential(layer)]))
    assert twice.parameters == once.parameters
    assert twice.bytes == once.bytes
    assert twice.flops == 2 * once.flops
    # of one parent as well
    for same in (nn.Sequential(layer, layer), nn.ModuleList([layer] * 2)):
        assert count(same) == twice


def test_costs_add_up_and_parts_are_the_whole():
    shape = PAPER_SHAPES["s-lowrank-32"]
    assert sum(breakdown(shape).values(), Cost()) == count(shape)
    assert Cost(1, 2, 3, 4, 5) + Cost(10, 20, 30, 40, 50) == Cost(11, 22, 33, 44, 55)
    with pytest.raises(TypeError):
        Cost() + 1


def test_any_object_with_a_shape_is_counted():
    class Config:
        def shape(self):
            return PAPER_SHAPES["s"]

    class Model(nn.Linear):
        config = Config()

    assert count(Config()) == count(PAPER_SHAPES["s"])
    attention = 4 * 12 * 768
    assert count(Model(2, 2), context=0).flops == 8
    assert count(Model(2, 2)).flops == 8 + attention * 1024
    assert count(Model(2, 2), context=7).training_flops == 3 * (8 + attention * 7)


def test_dense_first_layers_may_have_a_width_of_their_own():
    sizes = {"width": 8, "layers": 3, "heads": 1, "ffn": "MoE", "experts": 4, "k": 1}
    mixed = TransformerShape(**sizes, hidden=16, dense_layers=1, dense_hidden=32)
    dense = TransformerShape(width=8, layers=1, heads=1, hidden=32)
    moes = TransformerShape(**(sizes | {"layers": 2}), hidden=16)
    ffns = [breakdown(shape)["ffn"] for shape in (mixed, dense, moes)]
    assert ffns[0] == ffns[1] + ffns[2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 0}, "width is 0"),
        ({"heads": 5}, "5 heads must divide"),
        ({"heads": 4, "kv_heads": 3}, "3 kv_heads"),
        ({"context": -1}, "context is -1"),
        ({"logits": "none"}, "logits is 'none'"),
        ({"ffn": "Dense"}, "ffn is 'Dense'"),
        ({"ffn": "LowRank"}, "rank is None"),
        ({"rank": 4}, "rank is 4"),
        ({"ffn": "LowRank", "rank": 17}, "rank is 17"),
        ({"ffn": "BlockShuffle", "blocks": 3}, "3 equal blocks"),
        ({"ffn": "MoE", "experts": 2, "k": 3}, "k is 3 with 2 experts"),
        ({"shared": 1}, "shared and adapter"),
        ({"dense_layers": 3}, "dense_layers is 3"),
        ({"dense_hidden": 0}, "dense_hidden is 0"),
    ],
)
def test_shapes_that_cannot_be(change, told):
    with pytest.raises(ValueError, match=told):
        TransformerShape(**({"width": 16, "layers": 2, "heads": 4, "hidden": 64} | change))


def test_what_cannot_be_counted_says_why():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(2, 3, 4))

    class Router(nn.Module):
        pass

    with pytest.raises(ValueError, match="count was given a dict"):
        count({})
    with pytest.raises(ValueError, match=r"Unknown 'inside' .*\(2, 3, 4\)"):
        count(nn.ModuleDict({"inside": Unknown()}))
    with pytest.raises(ValueError, match="attribute k"):
        count(MoE(4, 8, 2, router=Router()))
    with pytest.raises(ValueError, match="how many layers and attention heads"):
        count(nn.Linear(2, 2), context=8)
    with pytest.raises(ValueError, match="context is -8"):
        count(PAPER_SHAPES["s"], context=-8)
    with pytest.raises(ValueError, match="from_config"):
        count(DistilBertConfig(feedforward=[{"operation": "upcycle"}]))


def test_a_router_decides_how_many_experts_are_active():
    one, two = (count(MoE(8, 16, 4, router=TopKRouter(8, 4, k=k))) for k in (1, 2))
    expert = 2 * 8 * 16
    assert two.active_parameters - one.active_parameters == expert
    assert two.flops - one.flops == 2 * expert
    assert one.parameters == two.parameters


def test_the_table_of_shapes_cannot_be_changed():
    with pytest.raises(TypeError):
        PAPER_SHAPES["s"] = None
