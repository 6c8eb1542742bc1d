import copy
import errno
import json
import threading
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from feedforward import (
    BlockDense,
    BlockShuffle,
    LowRank,
    MoE,
    PreMerged,
    ScaleAdapterRouter,
    SelfGuided,
    SwitchRouter,
    TopKRouter,
    collect_routing,
    count,
    premerge,
    replace_ffn,
    upcycle,
)
from feedforward.layers.guided import advance, guide, release
from feedforward.surgery import find_ffns, from_config, load, save, structured

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOKENS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def distilbert(cls=transformers.DistilBertModel, **options):
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 3, "n_heads": 2}
    return make(cls, transformers.DistilBertConfig, sizes | options)


def bert(cls=transformers.BertModel, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    return make(cls, transformers.BertConfig, sizes | {"num_attention_heads": 2} | options)


def gpt2(cls=transformers.GPT2LMHeadModel, **options):
    sizes = {"n_embd": 16, "n_inner": 32, "n_layer": 3, "n_head": 2, "n_positions": 32}
    return make(cls, transformers.GPT2Config, sizes | options)


def llama(cls=transformers.LlamaForCausalLM, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    return make(cls, transformers.LlamaConfig, sizes | {"num_attention_heads": 2} | options)


def make(cls, config, options):
    torch.manual_seed(0)
    return cls(config(**(TOKENS | options))).eval()


def others():
    """Models beyond the four, with the number of their FFNs and whether they have a gate."""
    t = transformers
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    layers = {"num_hidden_layers": 2}
    t5 = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    bart = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16}
    for side in ("encoder", "decoder"):
        bart |= {f"{side}_ffn_dim": 32, f"{side}_attention_heads": 2}
    images = {"image_size": 32, "patch_size": 16}
    return [
        (t.T5ForConditionalGeneration, t.T5Config, t5 | {"feed_forward_proj": "gated-gelu"}, 4, 1),
        (t.BartForConditionalGeneration, t.BartConfig, bart, 4, 0),
        (t.ModernBertForMaskedLM, t.ModernBertConfig, small | layers, 2, 1),
        (t.Phi3ForCausalLM, t.Phi3Config, small | layers, 2, 1),
        (t.ViTModel, t.ViTConfig, small | layers | images, 2, 0),
        (t.AlbertModel, t.AlbertConfig, small | layers | {"embedding_size": 8}, 1, 0),
        (t.ElectraForMaskedLM, t.ElectraConfig, small | layers | {"embedding_size": 8}, 2, 0),
    ]


FOUR = [distilbert, bert, gpt2, llama]
QA = partial(distilbert, transformers.DistilBertForQuestionAnswering)
HEADS = [
    QA,
    partial(bert, transformers.BertForMaskedLM),
    partial(bert, transformers.BertForSequenceClassification),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small run slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NAMES = ["distilbert", "bert", "gpt2", "llama", "distilbert-qa", "bert-mlm", "bert-classifier"]


@pytest.fixture(params=FOUR, ids=lambda make: make.__name__)
def model(request):
    return request.param()


def batch(padded=True):
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def output(model, **inputs):
    """The first output at real tokens, as numbers."""
    inputs = inputs or batch()
    y = model(**inputs)[0]
    real = inputs["attention_mask"].bool()
    return y[real] if y.shape[:2] == real.shape else y


def same(a, b, tolerance=1e-6):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def moe_of(ffn, **options):
    sizes = {"router": TopKRouter(ffn.dim, 4, k=2), "activation": "relu"} | options
    return MoE(ffn.dim, ffn.hidden, 4, **sizes)


class TestFinding:
    def test_the_ffn_of_each_layer_and_nothing_else(self, model):
        ffns = find_ffns(model)
        assert [ffn.index for ffn in ffns] == [0, 1, 2]
        for ffn in ffns:
            assert (ffn.dim, ffn.hidden) == (16, 32)
            assert ffn.gated == isinstance(model, transformers.LlamaForCausalLM)
            assert ffn.bias != ffn.gated
            assert "attention" not in ffn.name

    @pytest.mark.parametrize("make", HEADS, ids=NAMES[4:])
    def test_heads_and_poolers_are_left_alone(self, make):
        model = make()
        base = getattr(model, model.base_model_prefix)
        assert [ffn.name for ffn in find_ffns(model)] == [
            f"{model.base_model_prefix}.{ffn.name}" for ffn in find_ffns(base)
        ]

    @pytest.mark.parametrize("other", others(), ids=lambda other: other[0].__name__)
    def test_other_models_by_structure(self, other):
        cls, config, options, number, gated = other
        tokens = {} if cls is transformers.ViTModel else TOKENS
        if cls is transformers.ModernBertForMaskedLM:
            tokens = tokens | {"cls_token_id": 1, "sep_token_id": 2}
        ffns = find_ffns(cls(config(**(tokens | options))))
        assert len(ffns) == number
        assert {(ffn.dim, ffn.hidden, ffn.gated) for ffn in ffns} == {(16, 32, bool(gated))}

    def test_a_hidden_width_equal_to_the_width(self):
        assert len(find_ffns(bert(intermediate_size=16))) == 3
        assert len(find_ffns(gpt2(n_inner=16))) == 3
        llamas = find_ffns(llama(intermediate_size=16))
        assert [ffn.linears[2] for ffn in llamas] == [
            layer.mlp.down_proj for layer in llama_layers(llamas)
        ]

    def test_which_map_is_the_gate_is_found_by_following_and_not_by_order(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(24, 8)
                self.act = nn.SiLU()
                self.value = nn.Linear(8, 24)
                self.switch = nn.Linear(8, 24)

            def forward(self, x):
                return self.out(self.value(x) * self.act(self.switch(x)))

        module = Backwards()
        (ffn,) = find_ffns(nn.ModuleList([module]))
        assert ffn.linears == (module.switch, module.value, module.out)
        x = torch.randn(3, 8)
        same(ffn.dense()(x), module(x))

    def test_a_plain_function_is_an_activation_too(self):
        model = bert(hidden_act="gelu")
        for layer in model.encoder.layer:
            del layer.intermediate.intermediate_act_fn
            layer.intermediate.intermediate_act_fn = torch.nn.functional.gelu
        before = output(model)
        assert len(find_ffns(model)) == 3
        same(output(replace_ffn(model, lambda ffn: ffn.dense())), before)

    def test_the_search_leaves_no_trace(self, model):
        model.train()
        state = torch.get_rng_state()
        find_ffns(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooks

    def test_what_is_found_computes_the_ffn(self, model):
        for ffn in find_ffns(model):
            x = torch.randn(2, 3, 16)
            w_in, b_in, w_out, b_out = ffn.weights()
            h = x @ w_in.T + b_in
            if ffn.gated:
                gate, up = h.chunk(2, dim=-1)
                h = ffn.activation(gate) * up
            else:
                h = ffn.activation(h)
            same(ffn.dense()(x), h @ w_out.T + b_out)
        if not isinstance(model, transformers.BertModel):
            same(ffn.dense()(x), model.get_submodule(ffn.name)(x))


def llama_layers(ffns):
    return [ffn._blocks[0] for ffn in ffns]


class Imposter(nn.Module):
    """Two linear maps and an activation that are no FFN of the usual form."""

    def __init__(self, kind):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.act, self.kind = nn.ReLU(), kind
        if kind == "added gate":
            self.gate = nn.Linear(8, 24)
        if kind == "two activations":
            self.last = nn.Sigmoid()

    def forward(self, x):
        if self.kind == "activation last":
            return self.act(self.down(self.up(x)))
        if self.kind == "two activations":
            return self.last(self.down(self.act(self.up(x))))
        if self.kind == "scaled":
            return self.down(0.5 * self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) + self.up(x))


class TestNotBeingFooled:
    @pytest.mark.parametrize("kind", ["activation last", "two activations", "scaled", "added gate"])
    def test_modules_that_do_something_else(self, kind):
        assert find_ffns(nn.ModuleList([Imposter(kind)])) == []

    def test_a_residual_inside_stays(self):
        class Residual(Imposter):
            def forward(self, x):
                return x + self.down(self.act(self.up(x)))

        model = nn.ModuleList([Residual("")])
        x = torch.randn(3, 8)
        before = model[0](x)
        replace_ffn(model, lambda ffn: ffn.dense())
        same(model[0](x), before)
        replace_ffn(model := nn.ModuleList([Residual("")]), lambda ffn: nn.Identity())
        same(model[0](x), 2 * x)

    def test_one_that_stands_alone_is_a_head(self):
        class Classifier(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))

        assert find_ffns(Classifier()) == []
        assert len(find_ffns(nn.ModuleList([Classifier()]))) == 1

    @pytest.mark.parametrize("odd", [nn.Identity(), nn.Dropout(), nn.Softmax(-1), nn.Flatten()])
    def test_only_a_non_linear_function_of_single_numbers_is_an_activation(self, odd):
        assert (
            find_ffns(nn.ModuleList([nn.Sequential(nn.Linear(8, 9), odd, nn.Linear(9, 8))])) == []
        )


class TestReplacing:
    def test_the_ffn_by_itself_changes_nothing(self, model):
        before = output(model)
        assert replace_ffn(model, lambda ffn: ffn.dense()) is model
        same(output(model), before)

    def test_linear_maps_by_their_likes_change_nothing(self, model):
        def likes(ffn):
            made = []
            for linear in ffn.linears:
                weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
                new = nn.Linear(*weight.T.shape, bias=linear.bias is not None)
                new.weight.data.copy_(weight)
                if linear.bias is not None:
                    new.bias.data.copy_(linear.bias)
                made.append(new)
            return made

        before = output(model)
        same(output(replace_ffn(model, likes)), before)

    @pytest.mark.parametrize("kind", [LowRank, BlockShuffle, BlockDense])
    def test_structured_layers_in_the_place_of_linear_maps(self, model, kind):
        dense = sum(count(linear).flops for ffn in find_ffns(model) for linear in ffn.linears)
        kept = {name for name, _ in model.named_modules()}
        replace_ffn(model, structured(kind, parameters=0.5), layers=[1, 2])
        first, *others = find_ffns(model)
        assert not any(isinstance(linear, kind) for linear in first.linears)
        assert all(isinstance(linear, kind) for ffn in others for linear in ffn.linears)
        flops = sum(count(m).flops for ffn in find_ffns(model) for m in ffn.linears)
        assert dense / 3 < flops < 0.8 * dense
        assert kept <= {name for name, _ in model.named_modules()}  # dropout, activation, norms
        model.train()
        model(**batch())[0].sum().backward()
        assert all(linear.u.grad.abs().sum() > 0 for linear in others[0].linears)

    def test_bias_type_and_training_mode_are_those_of_the_replaced(self, model):
        model.to(torch.float64).train()
        replace_ffn(model, structured(LowRank, rank=4))
        for ffn in find_ffns(model):
            for linear in ffn.linears:
                assert linear.v.dtype == torch.float64
                assert (linear.bias is None) == isinstance(model, transformers.LlamaForCausalLM)
                assert linear.training

    def test_a_mixture_in_the_place_of_the_whole(self, model):
        replace_ffn(model, lambda ffn: moe_of(ffn, gated=ffn.gated))
        with collect_routing(model) as routings:
            output(model)
        assert len(routings) == 3
        assert find_ffns(model) == []

    @pytest.mark.parametrize("make", [distilbert, bert, gpt2])
    def test_dropout_on_the_output_stays(self, make):
        dropout = {"dropout": 0.5, "hidden_dropout_prob": 0.5, "resid_pdrop": 0.5}
        model = make(**{k: v for k, v in dropout.items() if hasattr(make().config, k)})
        one = copy.deepcopy(model).train()
        two = replace_ffn(copy.deepcopy(model), lambda ffn: ffn.dense()).train()
        for each in (one, two):
            torch.manual_seed(3)
            each.result = output(each)
        same(one.result, two.result)
        assert (one.result - output(model)).abs().max() > 0.01

    def test_layers_by_number(self, model):
        plain = [type(ffn.linears[0]) for ffn in find_ffns(model)]
        replace_ffn(model, structured(LowRank, rank=2), layers=[-1, 0])
        kinds = [type(ffn.linears[0]) for ffn in find_ffns(model)]
        assert kinds == [LowRank, plain[1], LowRank]

    def test_numbers_count_what_was_replaced_before(self, model):
        upcycle(model, experts=2, router=SwitchRouter, layers=[0])
        assert [ffn.index for ffn in find_ffns(model)] == [1, 2]
        with pytest.raises(ValueError, match="layer -3 has been replaced already"):
            upcycle(model, experts=2, router=SwitchRouter, layers=[-3])
        upcycle(model, experts=2, router=SwitchRouter)
        assert find_ffns(model) == []
        with pytest.raises(ValueError, match="all 3 feed-forward layers have been replaced"):
            upcycle(model, experts=2, router=SwitchRouter)

    @pytest.mark.parametrize(
        ("layers", "told"),
        [
            ([3], "layers names 3; the model has 3 feed-forward layers, 0 to 2 or -3 to -1"),
            ([-4], "layers names -4"),
            ([0, -3], "twice"),
        ],
    )
    def test_numbers_that_do_not_exist(self, layers, told):
        with pytest.raises(ValueError, match=told):
            replace_ffn(bert(), structured(LowRank, rank=2), layers=layers)

    @pytest.mark.parametrize(
        ("build", "told"),
        [
            (lambda ffn: None, "build returned NoneType"),
            (lambda ffn: "moe", "build returned str"),
            (lambda ffn: [nn.Identity()], "which has 2 linear maps"),
            (lambda ffn: [nn.Identity(), 3], "which has 2 linear maps"),
            (lambda ffn: nn.Linear(16, 32), "out_features=32"),
            (lambda ffn: moe_of(ffn, router=TopKRouter(16, 2, k=1)), "experts=2"),
            (lambda ffn: [nn.Linear(16, 8), nn.Linear(8, 16)], r"\(16, 8\)"),
            (structured(LowRank, rank=17), "rank is 17"),
        ],
    )
    def test_a_build_that_does_not_fit_leaves_the_model_as_it_was(self, build, told):
        model = bert()
        before = model.state_dict()

        def last_fails(ffn):
            return build(ffn) if ffn.index == 2 else ffn.dense()

        with pytest.raises(ValueError, match=told):
            replace_ffn(model, last_fails)
        assert model.state_dict().keys() == before.keys()
        assert not hasattr(model.config, "feedforward")

    def test_a_model_without_ffns(self):
        with pytest.raises(ValueError, match="no feed-forward layer was found in Linear"):
            replace_ffn(nn.Linear(2, 2), structured(LowRank, rank=1))

    def test_a_gated_ffn_with_more_in_its_module_takes_linear_maps_only(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate, self.up = nn.Linear(8, 24), nn.Linear(8, 24)
                self.down, self.act = nn.Linear(24, 8), nn.SiLU()

            def forward(self, x):
                return 2 * self.down(self.act(self.gate(x)) * self.up(x))

        model = nn.ModuleList([Scaled()])
        with pytest.raises(ValueError, match="one module for each linear map"):
            replace_ffn(model, lambda ffn: ffn.dense())
        replace_ffn(model, structured(LowRank, rank=2))
        assert isinstance(model[0].down, LowRank)

    def test_a_structured_ffn_can_be_replaced_again(self, model):
        replace_ffn(model, structured(LowRank, rank=4))
        before = output(model)
        replace_ffn(model, lambda ffn: [linear.to_linear() for linear in ffn.linears])
        same(output(model), before)
        assert {type(m) for ffn in find_ffns(model) for m in ffn.linears} == {nn.Linear}

    def test_chunked_ffns_can_have_their_linear_maps_replaced(self):
        model = distilbert(chunk_size_feed_forward=3)
        before = output(model)
        same(output(replace_ffn(model, lambda ffn: ffn.dense())), before)


ROUTERS = {
    "top 1": partial(TopKRouter, k=1),
    "top 2": partial(TopKRouter, k=2),
    "top 2, probabilities": partial(TopKRouter, k=2, renormalize=False),
    "switch": SwitchRouter,
    "switch, jitter": partial(SwitchRouter, jitter=0.1),
    "adamoe": partial(ScaleAdapterRouter, k=1),
    "adamoe 2": partial(ScaleAdapterRouter, k=2),
    "csmoe": partial(ScaleAdapterRouter, k=2, combine="concat"),
}


def uniform(router):
    """A builder of routers that start at zero, where every probability is 1 / E."""

    def build(dim, experts):
        made = router(dim, experts)
        for weight in made.parameters():
            nn.init.zeros_(weight)
        return made

    return build


class TestUpcycling:
    def test_every_expert_is_a_copy_and_the_shared_one_the_ffn_itself(self, model):
        (ffn,) = find_ffns(model)[:1]
        linears, weights = ffn.linears, ffn.weights()
        upcycle(model, experts=3, router=SwitchRouter, layers=[0])
        moe = next(m for m in model.modules() if isinstance(m, MoE))
        assert {id(m) for m in linears} <= {id(m) for m in moe.shared.modules()}
        w_in, b_in, w_out, b_out = weights
        for e in range(3):
            assert torch.equal(moe.w_in[e], w_in)
            assert torch.equal(moe.w_out[e], w_out)
            if ffn.bias:
                assert torch.equal(moe.b_in[e], b_in)
                assert torch.equal(moe.b_out[e], b_out)
        assert (moe.b_in is None) == (not ffn.bias)

    @pytest.mark.parametrize(
        ("shared", "shared_weight", "share"),
        [(True, 0.5, 0.625), (True, None, 1.25), (False, None, 0.25)],
        ids=["the paper's code", "the paper's equation", "routed alone"],
    )
    def test_the_start_of_the_paper_is_not_the_parent(self, model, shared, shared_weight, share):
        """One of four experts at probability 1/4: 0.5 + 0.5 * 0.25 of the output, as released."""
        dense = find_ffns(copy.deepcopy(model))[0].dense()
        router = uniform(partial(ScaleAdapterRouter, k=1))
        options = {"shared": shared, "shared_weight": shared_weight, "layers": [0]}
        upcycle(model, experts=4, router=router, **options)
        moe = next(m for m in model.modules() if isinstance(m, MoE))
        x = torch.randn(5, 16)
        same(moe(x), share * dense(x))

    @pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
    @pytest.mark.parametrize(
        ("shared", "shared_weight"), [(True, None), (True, 0.5), (True, 0.9), (False, None)]
    )
    def test_preserving_starts_at_the_parents_function(self, router, shared, shared_weight):
        # large weights, so that what is preserved is far from zero
        model = distilbert(initializer_range=0.5)
        before = output(model)
        plain = copy.deepcopy(model)
        options = {"shared": shared, "shared_weight": shared_weight, "experts": 4}
        upcycle(model, router=router, preserve=True, **options)
        same(output(model), before, 2e-5)
        model.train()  # dropout off by the configuration below: jitter is what differs
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_dropout = 0.0
        for layer in model.transformer.layer:
            layer.attention.dropout = nn.Dropout(0.0)
        if router is not ROUTERS["switch, jitter"]:
            same(output(model), before, 2e-5)
        upcycle(plain, router=router, **options)
        always = router in (ROUTERS["top 1"], ROUTERS["top 2"]) and (not shared or shared_weight)
        assert ((output(plain) - before).abs().max() < 1e-4) == bool(always)

    @pytest.mark.parametrize("router", ["top 1", "switch", "scale adapter"])
    def test_what_preserving_promises_at_larger_widths(self, router):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 256))
        model, x = nn.ModuleList([block]).double(), torch.randn(2000, 256, dtype=torch.float64)
        before = block(x)
        routers = {
            "top 1": (partial(TopKRouter, k=1), 1e-12),  # m is 1 for every token: rounding alone
            "switch": (SwitchRouter, 1e-4),
            "scale adapter": (partial(ScaleAdapterRouter, k=1), 1e-4),
        }
        make, tolerance = routers[router]
        upcycle(model, experts=4, router=make, shared_weight=0.5, preserve=True)
        change = (model[0](x) - before).norm(dim=1) / before.norm(dim=1)
        assert change.max() < tolerance
        # float32 may choose others of nearly equal experts, and few
        made = make(256, 8)
        chosen = made(x.float()).indices
        with torch.no_grad():
            for weight in made.parameters():
                weight.mul_(1e-5)
        assert (made(x.float()).indices != chosen).double().mean() < 0.05

    def test_preserving_holds_for_every_model(self, model):
        before = output(model)
        upcycle(model, experts=4, router=partial(ScaleAdapterRouter, k=2), preserve=True)
        same(output(model), before)

    def test_the_seed_does_not_matter_to_what_can_be_preserved(self):
        # matrices of the router out of the same random numbers as its tokens would fit them
        block = nn.Sequential(nn.Linear(4096, 4), nn.GELU(), nn.Linear(4, 4096))
        model = nn.ModuleList([block])
        torch.manual_seed(0)
        upcycle(model, experts=1, router=partial(ScaleAdapterRouter, k=1), preserve=True)
        assert isinstance(model[0], MoE)

    def test_a_preserved_model_still_routes_and_learns(self):
        model = distilbert(initializer_range=0.5)
        upcycle(model, experts=4, router=partial(ScaleAdapterRouter, k=1), preserve=True)
        with collect_routing(model) as routings:
            model(**batch())[0].square().sum().backward()
        assert all(len(routing.indices.unique()) > 1 for routing in routings)
        for moe in (m for m in model.modules() if isinstance(m, MoE)):
            for weight in (moe.router.gate, moe.router.adapter, moe.w_in, moe.w_out):
                assert weight.grad.abs().sum() > 0

    def test_preserving_keeps_the_choices_of_the_gate(self):
        torch.manual_seed(0)
        x, chosen = torch.randn(200, 16), []
        for preserve in (False, True):
            model = distilbert()
            torch.manual_seed(5)
            upcycle(model, experts=4, router=SwitchRouter, preserve=preserve, layers=[0])
            moe = next(m for m in model.modules() if isinstance(m, MoE))
            chosen.append(moe.router(x).indices)
        assert (chosen[0] == chosen[1]).float().mean() > 0.98

    def test_upcycled_structured_ffns(self, model):
        replace_ffn(model, structured(BlockDense, rank=8, blocks=2))
        before = output(model)
        upcycle(model, experts=2, router=SwitchRouter, preserve=True)
        same(output(model), before)

    def test_noise_makes_experts_differ_by_its_standard_deviation(self):
        model, parent = distilbert(), find_ffns(distilbert())[0].weights()[0]
        upcycle(model, experts=8, router=SwitchRouter, noise=0.01, layers=[0])
        moe = next(m for m in model.modules() if isinstance(m, MoE))
        assert (moe.w_in - parent).std().item() == pytest.approx(0.01, rel=0.1)
        assert not torch.equal(moe.w_in[0], moe.w_in[1])
        assert torch.equal(moe.shared.up.weight, parent)

    def test_half_precision(self, model):
        model.to(torch.bfloat16)
        upcycle(model, experts=4, router=SwitchRouter, preserve=True)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert output(model).isfinite().all()

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"noise": -0.1}, "noise is -0.1"),
            ({"noise": float("nan")}, "noise is nan; a standard deviation is finite"),
            ({"noise": float("inf")}, "noise is inf"),
            ({"noise": 0.1, "preserve": True}, "noise and dropped tokens change the function"),
            ({"capacity_factor": 1.0, "preserve": True}, "dropped tokens change the function"),
            ({"experts": 0}, "experts is 0"),
            ({"router": partial(TopKRouter, k=5)}, "k is 5 with 4 experts"),
            ({"shared": False, "shared_weight": 0.5}, "shared_weight is 0.5"),
            ({"layers": [7]}, "layers names 7"),
            ({"router": lambda dim, experts: None}, "router made a NoneType"),
        ],
    )
    def test_what_is_refused(self, options, told):
        model = distilbert()
        with pytest.raises(ValueError, match=told):
            upcycle(model, **({"experts": 4, "router": SwitchRouter} | options))
        assert len(find_ffns(model)) == 3
        assert not hasattr(model.config, "feedforward")

    def test_a_router_that_cannot_be_preserved(self):
        class Sharp(SwitchRouter):
            def forward(self, x, mask=None):
                routing = super().forward(x, mask)
                return routing._replace(weights=x[:, :1])

        model = distilbert()
        before = output(model)
        with pytest.raises(ValueError, match="weights of Sharp depend on the token"):
            upcycle(model, experts=4, router=Sharp, preserve=True)
        same(output(model), before, 0)

    def test_guided_layers_are_released_first(self):
        model = replace_ffn(distilbert(), structured(LowRank, rank=2, guided={"steps": 3}))
        with pytest.raises(ValueError, match="release its guides before upcycling"):
            upcycle(model, experts=2, router=SwitchRouter)


class Block(nn.Module):
    def __init__(self, ffn):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(8), ffn

    def forward(self, x):
        return x + self.ffn(self.norm(x))


class TestSharing:
    """Modules that stand at several places of a model."""

    def ffn(self):
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def model(self, ffns):
        torch.manual_seed(0)
        return nn.Sequential(*(Block(ffn) for ffn in ffns)).double().eval()

    def test_an_ffn_of_several_blocks_is_replaced_in_all_of_them(self):
        shared = self.ffn()
        model = self.model([shared, shared, self.ffn()])
        model.extra = model[0]  # and at a third place, outside of the blocks
        assert [ffn.index for ffn in find_ffns(model)] == [0, 1]
        replace_ffn(model, lambda ffn: moe_of(ffn), layers=[0])
        assert model[0].ffn is model[1].ffn
        assert isinstance(model[0].ffn, MoE)
        assert [ffn.index for ffn in find_ffns(model)] == [1]
        replace_ffn(model, structured(LowRank, rank=2))
        assert isinstance(model[2].ffn[0], LowRank)
        replace_ffn(model, lambda ffn: moe_of(ffn))
        with pytest.raises(ValueError, match="all 2 feed-forward layers"):
            replace_ffn(model, structured(LowRank, rank=2))

    def test_two_names_in_one_block(self):
        shared = self.ffn()
        model = self.model([shared])
        model[0].second = shared
        model.append(Block(self.ffn()).double())
        replace_ffn(model, lambda ffn: moe_of(ffn))
        assert isinstance(model[0].ffn, MoE)
        assert model[0].second is model[0].ffn

    def test_upcycling_starts_at_the_parents_function(self):
        shared, x = self.ffn(), torch.randn(5, 8, dtype=torch.float64)
        model = self.model([shared, shared, self.ffn()])
        before = model(x)
        upcycle(model, experts=2, router=SwitchRouter, preserve=True)
        assert model[0].ffn is model[1].ffn
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)

    def test_gpt2_with_one_ffn_for_two_blocks(self):
        model = gpt2()
        model.transformer.h[2].mlp = model.transformer.h[0].mlp
        before = output(model)
        upcycle(model, experts=2, router=SwitchRouter, preserve=True)
        assert model.transformer.h[2].mlp is model.transformer.h[0].mlp
        same(output(model), before, 1e-4)
        assert [r.mask.sum() for r in routed(model, **batch())] == [15] * 3

    def test_half_of_an_ffn_shared_with_another_block(self):
        model = bert()
        first, second, _ = model.encoder.layer
        second.intermediate = first.intermediate
        kept = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match="shares only one of its two modules"):
            replace_ffn(model, lambda ffn: moe_of(ffn))
        assert {name: type(module) for name, module in model.named_modules()} == kept
        second.output = first.output
        replace_ffn(model, lambda ffn: moe_of(ffn))
        assert second.intermediate.dense is first.intermediate.dense
        assert sum(isinstance(m, MoE) for m in model.modules()) == 2

    @pytest.mark.parametrize("tied", ["module", "weight"])
    def test_last_weights_that_are_used_elsewhere_are_not_divided(self, tied):
        one, two = self.ffn(), self.ffn()
        if tied == "module":
            two[2] = one[2]
        else:
            two[2].weight = one[2].weight
        model, x = self.model([one, two]), torch.randn(5, 8, dtype=torch.float64)
        before = model(x)
        with pytest.raises(ValueError, match="used elsewhere in the model too"):
            upcycle(model, experts=2, router=SwitchRouter, preserve=True, layers=[0])
        assert torch.equal(model(x), before)
        upcycle(model, experts=2, router=SwitchRouter, preserve=True, shared=False)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def routed(model, **inputs):
    with collect_routing(model) as routings:
        model(**inputs)
    return routings


class TestPadding:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_never_routed(self, model, attention, side):
        model.set_attn_implementation(attention)
        inputs = batch()
        if side == "left":
            inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        upcycle(model, experts=4, router=partial(TopKRouter, k=2))
        for routing in routed(model, **inputs):
            assert torch.equal(routing.mask, inputs["attention_mask"].bool().reshape(-1))

    def test_without_padding_nothing_is_masked(self, model):
        upcycle(model, experts=4, router=SwitchRouter)
        assert all(
            routing.mask is None or routing.mask.all() for routing in routed(model, **batch(False))
        )
        ids = batch()["input_ids"]
        assert all(
            routing.mask is None or routing.mask.all() for routing in routed(model, input_ids=ids)
        )

    def test_padding_takes_no_capacity_from_real_tokens(self):
        model = distilbert()
        upcycle(model, experts=2, router=SwitchRouter, capacity_factor=0.5)
        inputs = batch()
        before = output(model, **inputs)
        changed = inputs | {"input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][1, 6:] = 7
        same(output(model, **changed), before)
        dropped = [(r.weights == 0)[r.mask].sum() for r in routed(model, **inputs)]
        assert any(dropped)

    @pytest.mark.filterwarnings("ignore:a routing was collected in training mode without a graph")
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_under_activation_checkpointing(self, model, reentrant):
        upcycle(model, experts=4, router=partial(ScaleAdapterRouter, k=2))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        gradients = []
        for checkpointed in (False, True):
            if checkpointed:
                name = "activation_checkpointing_enable"  # named otherwise in older releases
                enable = getattr(model, name, model.gradient_checkpointing_enable)
                enable({"use_reentrant": reentrant})
            model.zero_grad()
            routings = routed_loss(model)
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
            for routing in routings:
                assert torch.equal(routing.mask, batch()["attention_mask"].bool().reshape(-1))
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)

    def test_two_threads_with_masks_of_their_own(self):
        model = distilbert()
        upcycle(model, experts=4, router=SwitchRouter)
        seen, errors = {1: [], 2: []}, []
        together = threading.Barrier(2)

        # where the two threads have their masks set at once
        def remember(moe, args, kwargs):
            together.wait(timeout=30)
            seen[args[0].shape[0]].append(kwargs["mask"].sum().item())
            together.wait(timeout=30)

        for moe in (m for m in model.modules() if isinstance(m, MoE)):
            moe.register_forward_pre_hook(remember, with_kwargs=True)

        def run(rows, real):
            try:
                mask = torch.zeros(rows, 9, dtype=torch.long)
                mask[:, :real] = 1
                with torch.no_grad():
                    model(input_ids=batch()["input_ids"][:rows], attention_mask=mask)
            except Exception as error:
                errors.append(error)
                together.abort()

        threads = [threading.Thread(target=run, args=args) for args in ((1, 4), (2, 7))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert seen == {1: [4] * 3, 2: [14] * 3}

    def test_a_pass_that_fails_leaves_no_mask_behind(self):
        model = distilbert()
        upcycle(model, experts=4, router=SwitchRouter)
        moe = next(m for m in model.modules() if isinstance(m, MoE))
        broken = moe.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch())
        broken.remove()
        assert moe(torch.randn(5, 16)).abs().sum() > 0  # with a mask of 18 tokens it would raise
        (routing,) = routed(moe, x=torch.randn(5, 16))
        assert routing.mask is None

    def test_a_copy_masks_by_itself(self):
        model = distilbert()
        upcycle(model, experts=4, router=SwitchRouter)
        twin = copy.deepcopy(model)
        same(output(twin), output(model))
        assert [r.mask.sum() for r in routed(twin, **batch())] == [15] * 3

    def test_mixtures_that_replace_ffns_get_the_mask_too(self, model):
        replace_ffn(model, lambda ffn: moe_of(ffn, gated=ffn.gated))
        assert [r.mask.sum() for r in routed(model, **batch())] == [15] * 3

    @pytest.mark.parametrize("make", [gpt2, llama])
    def test_generation_from_padded_prompts_is_the_parents(self, make):
        model = make(initializer_range=0.3)
        inputs = batch()
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(**inputs, **options)
        upcycle(model, experts=4, router=partial(ScaleAdapterRouter, k=2), preserve=True)
        assert torch.equal(model.generate(**inputs, **options), expected)
        static = model.generate(**inputs, **options, cache_implementation="static")
        assert torch.equal(static, expected)

    def test_flattened_tokens(self):
        config = transformers.OPTConfig(
            **TOKENS, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=32,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config).eval()
        upcycle(model, experts=2, router=SwitchRouter)
        assert [r.mask.sum() for r in routed(model, **batch())] == [15] * 2

    def test_chunks_of_tokens_are_refused(self):
        model = bert(chunk_size_feed_forward=3)
        upcycle(model, experts=2, router=SwitchRouter)
        with pytest.raises(ValueError, match="set chunk_size_feed_forward to 0"):
            model(**batch())

    def test_a_mask_that_shows_no_tokens_is_refused(self):
        model = distilbert()
        upcycle(model, experts=2, router=SwitchRouter)
        block = model.transformer.layer[0]
        with pytest.raises(ValueError, match="the attention mask is a str"):
            block(torch.randn(1, 4, 16), attention_mask="causal")
        with pytest.raises(ValueError, match="does not fit 4 tokens"):
            block(torch.randn(1, 4, 16), attention_mask=torch.ones(1, 3))


def routed_loss(model):
    with collect_routing(model) as routings:
        y = model(**batch())[0]
        y[batch()["attention_mask"].bool()].square().sum().backward()
    return routings


def operations(model):
    """Replaced, structured and upcycled FFNs in one model, each expert of its own."""
    replace_ffn(model, structured(BlockDense, rank=8, blocks=2), layers=[1])
    replace_ffn(model, lambda ffn: moe_of(ffn, gated=ffn.gated, bias=ffn.bias), layers=[2])
    upcycle(model, experts=3, router=SwitchRouter, noise=0.1, layers=[0])
    return model.eval()


class TestRecord:
    def test_what_was_done_stands_in_the_configuration(self):
        model = distilbert()
        replace_ffn(model, structured(LowRank, rank=4), layers=[1, 2])
        router = partial(ScaleAdapterRouter, k=2, combine="concat")
        upcycle(model, experts=4, router=router, shared_weight=0.5, layers=[0])
        low_rank = {"type": "LowRank", "rank": 4, "bias": True, "init": "spectral"}
        recorded = json.loads(json.dumps(model.config.to_dict()))["feedforward"]
        assert recorded == [
            {
                "operation": "replace_ffn",
                "layers": [1, 2],
                "linears": [
                    low_rank | {"in_features": 16, "out_features": 32},
                    low_rank | {"in_features": 32, "out_features": 16},
                ],
            },
            {
                "operation": "upcycle",
                "layers": [0],
                "experts": 4,
                "router": {
                    "type": "ScaleAdapterRouter",
                    "dim": 16,
                    "experts": 4,
                    "k": 2,
                    "combine": "concat",
                },
                "shared": True,
                "shared_weight": 0.5,
                "capacity_factor": None,
                "noise": 0.0,
                "preserve": False,
            },
        ]

    def test_models_of_one_configuration_have_records_of_their_own(self):
        config = distilbert().config
        one, two = transformers.DistilBertModel(config), transformers.DistilBertModel(config)
        upcycle(one, experts=2, router=SwitchRouter)
        assert not hasattr(two.config, "feedforward")
        assert not hasattr(config, "feedforward")
        model = QA()
        upcycle(model, experts=2, router=SwitchRouter)
        assert model.distilbert.config is model.config

    def test_a_model_without_a_configuration_is_replaced_without_a_record(self):
        block = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        model = replace_ffn(nn.ModuleList([block]), structured(LowRank, rank=2))
        assert isinstance(model[0][0], LowRank)
        with pytest.raises(
            ValueError, match="save takes a model of transformers, given ModuleList"
        ):
            save(model, "nowhere")


class TestSavingAndLoading:
    @pytest.mark.parametrize("make", [*FOUR, *HEADS], ids=NAMES)
    def test_there_and_back(self, make, tmp_path):
        model = operations(make())
        save(model, tmp_path / "my model")
        loaded = load(tmp_path / "my model")
        assert type(loaded) is type(model)
        assert not loaded.training
        assert loaded.config.feedforward == model.config.feedforward
        assert loaded.state_dict().keys() == model.state_dict().keys()
        same(output(loaded), output(model))
        assert [r.mask.sum() for r in routed(loaded, **batch())] == [15] * 2
        # once more, from what was loaded
        save(loaded, tmp_path / "my model")
        same(output(load(tmp_path / "my model")), output(model))

    @pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
    @pytest.mark.parametrize("shared", [True, False])
    def test_every_router(self, router, shared, tmp_path):
        model = distilbert()
        upcycle(model, experts=4, router=router, shared=shared, preserve=True, layers=[-1])
        save(model, tmp_path / "model")
        loaded = load(tmp_path / "model")
        moes = [next(m for m in each.modules() if isinstance(m, MoE)) for each in (model, loaded)]
        assert repr(moes[0]) == repr(moes[1])
        same(output(loaded), output(model))

    @pytest.mark.parametrize("kind", [LowRank, BlockShuffle, BlockDense])
    def test_every_structured_layer_and_a_mixture_on_top(self, kind, tmp_path):
        model = gpt2()
        replace_ffn(model, structured(kind, parameters=0.5))
        upcycle(model, experts=2, router=SwitchRouter, layers=[1])
        save(model, tmp_path / "model")
        same(output(load(tmp_path / "model")), output(model))

    def test_models_whose_weights_transformers_renames(self, tmp_path):
        config = transformers.ViTConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=16,
        )  # fmt: skip
        model = transformers.ViTModel(config).eval()
        upcycle(model, experts=2, router=SwitchRouter, layers=[0])
        save(model, tmp_path / "model")
        loaded, image = load(tmp_path / "model"), torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            same(loaded(image)[0], model(image)[0])

    def test_tied_weights_stay_tied(self, tmp_path):
        model = operations(gpt2())
        save(model, tmp_path / "model")
        assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
        loaded = load(tmp_path / "model")
        assert loaded.lm_head.weight is loaded.transformer.wte.weight

    def test_the_type_of_the_weights_stays(self, tmp_path):
        model = operations(llama().to(torch.bfloat16))
        save(model, tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        same(output(loaded), output(model))

    def test_ordinary_checkpoints_load_strictly(self, tmp_path):
        model = bert()
        model.save_pretrained(tmp_path / "theirs")
        same(output(load(tmp_path / "theirs")), output(model))
        save(model, tmp_path / "ours")
        _, report = transformers.BertModel.from_pretrained(
            tmp_path / "ours", output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]

    def test_a_checkpoint_of_the_trainer_loads_as_well(self, tmp_path):
        model = operations(distilbert())
        model.save_pretrained(tmp_path / "theirs")
        same(output(load(tmp_path / "theirs")), output(model))

    def test_guided_training_continues_where_it_was_saved(self, tmp_path):
        model = replace_ffn(bert(), structured(LowRank, rank=2, guided={"steps": 8}), layers=[1])
        for _ in range(3):
            advance(model)
        save(model, tmp_path / "model")
        loaded = load(tmp_path / "model")
        guided = [m for m in loaded.modules() if isinstance(m, SelfGuided)]
        assert [g.alpha for g in guided] == [
            m.alpha for m in model.modules() if isinstance(m, SelfGuided)
        ]
        assert 0 < guided[0].alpha < 1
        release(loaded)
        save(loaded, tmp_path / "model")
        again = load(tmp_path / "model")
        assert not [m for m in again.modules() if isinstance(m, SelfGuided)]
        assert len([m for m in again.modules() if isinstance(m, LowRank)]) == 2
        same(output(again), output(loaded))

    def test_merged_layers(self, tmp_path):
        model = replace_ffn(bert(), structured(LowRank, rank=2))
        replace_ffn(model, lambda ffn: [PreMerged(m, threshold=9) for m in ffn.linears])
        save(model, tmp_path / "model")
        loaded = load(tmp_path / "model")
        with torch.no_grad():
            ids = torch.tensor([[5, 6, 7]])
            same(loaded(ids)[0], model(ids)[0])

    @pytest.mark.parametrize("make", [gpt2, bert, llama], ids=lambda make: make.__name__)
    @pytest.mark.parametrize("around", ["premerge", "guide", "premerge first", "released"])
    def test_what_is_put_around_layers_after_a_mixture_was_made(self, make, around, tmp_path):
        model = replace_ffn(make(), structured(LowRank, rank=4), layers=[0, 1])
        if around == "premerge first":
            premerge(model, threshold=7)
        if around == "released":
            guide(model, steps=3)
            save(model, tmp_path / "model")
            release(model)
        upcycle(model, experts=2, router=SwitchRouter, layers=[1])
        if around == "premerge":
            premerge(model, threshold=7)
        if around == "guide":
            advance(guide(model, steps=3).eval())
        save(model, tmp_path / "model")
        for loaded in (load(tmp_path / "model"), copy.deepcopy(model)):
            assert str(loaded) == str(model)
            assert [m.alpha for m in loaded.modules() if isinstance(m, SelfGuided)] == [
                m.alpha for m in model.modules() if isinstance(m, SelfGuided)
            ]
            same(output(loaded), output(model))
        # and away again, from what was loaded
        loaded = load(tmp_path / "model")
        if around == "guide":
            save(release(loaded), tmp_path / "model")
            same(output(load(tmp_path / "model")), output(model))
            assert "wrap" not in {o["operation"] for o in loaded.config.feedforward}

    @pytest.mark.parametrize("around", ["premerge", "guide"])
    @pytest.mark.parametrize("whole", [True, False], ids=["whole", "shared expert"])
    def test_what_is_put_around_a_layer_for_a_whole_ffn(self, around, whole, tmp_path):
        def build(ffn):
            layer = LowRank(ffn.dim, ffn.dim, rank=4)
            return layer if whole else moe_of(ffn, shared=layer)

        model = replace_ffn(gpt2(), build, layers=[0, 2])
        model = premerge(model, threshold=5) if around == "premerge" else guide(model, steps=3)
        save(model.eval(), tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert str(loaded) == str(model)
        same(output(loaded), output(model))
        made = from_config(model.config)
        assert made.state_dict().keys() == model.state_dict().keys()
        save(made, tmp_path / "made")

    def test_what_the_record_does_not_make_again_is_not_written(self, tmp_path):
        by_hand, shared, unrecorded = gpt2(), gpt2(), gpt2()
        upcycle(by_hand, experts=2, router=SwitchRouter, layers=[0])
        by_hand.transformer.h[1].mlp.c_fc = LowRank(16, 32, rank=2)
        shared.transformer.h[2].mlp = shared.transformer.h[0].mlp
        upcycle(shared, experts=2, router=SwitchRouter)
        unrecorded.transformer.h[1].mlp.c_fc = LowRank(16, 32, rank=2)
        for model in (by_hand, shared, unrecorded):
            with pytest.raises(ValueError, match="does not make this model again"):
                save(model, tmp_path / "model")
        assert not list(tmp_path.iterdir())

    def test_a_class_of_ones_own(self, tmp_path):
        class Reader(transformers.DistilBertModel):
            pass

        model = upcycle(distilbert(Reader), experts=2, router=SwitchRouter)
        save(model, tmp_path / "model")
        with pytest.raises(ValueError, match="'Reader', which transformers does not have"):
            load(tmp_path / "model")
        loaded = load(tmp_path / "model", cls=Reader)
        assert type(loaded) is Reader
        same(output(loaded), output(model))

    def test_a_configuration_alone_is_enough_to_count(self):
        model = operations(distilbert())
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures = ["DistilBertModel"]
        with torch.device("meta"):
            made = from_config(config)
        assert all(p.is_meta for p in made.parameters())
        assert count(made) == count(model)


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        save(upcycle(distilbert(), experts=2, router=SwitchRouter), tmp_path / "model")
        return tmp_path / "model"

    def change(self, folder, change):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    def test_a_missing_weight(self, folder):
        weights = load_file(folder / "model.safetensors")
        del weights["transformer.layer.1.ffn.body.w_in"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"missing transformer\.layer\.1\.ffn\.body\.w_in"):
            load(folder)

    def test_an_additional_weight(self, folder):
        weights = load_file(folder / "model.safetensors") | {"extra": torch.ones(2)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="unexpected extra"):
            load(folder)

    def test_a_weight_of_another_shape(self, folder):
        weights = load_file(folder / "model.safetensors")
        weights["transformer.layer.1.ffn.body.w_in"] = torch.ones(3, 3)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="cannot be loaded"):
            load(folder)

    @pytest.mark.parametrize("left", [0, 7, 1000, -1])
    def test_a_file_cut_short(self, folder, left):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:left])
        with pytest.raises(ValueError, match="cannot be loaded"):
            load(folder)

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="cannot be loaded"):
            load(folder)

    def test_pickled_weights_are_never_read(self, folder):
        (folder / "model.safetensors").unlink()
        torch.save(distilbert().state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be loaded"):
            load(folder)

    def test_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds no config\.json"):
            load(tmp_path / "nothing")

    def test_a_damaged_configuration(self, folder):
        (folder / "config.json").write_text('{"model_type": "distil')
        with pytest.raises(ValueError, match=r"config\.json cannot be read"):
            load(folder)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda o: o.update(operation="prune"), "unknown operation 'prune'"),
            (lambda o: o.update(layers=[9]), "cannot repeat .* layers names 9"),
            (lambda o: o.update(layers="01"), "cannot repeat"),
            (lambda o: o.pop("router"), "cannot repeat"),
            (lambda o: o["router"].update(type="os.system"), "unknown layer 'os.system'"),
            (lambda o: o["router"].update(k=9), "cannot repeat"),
            (lambda o: o.update(unrecorded="Mine"), "a Mine, which cannot be remade"),
            (lambda o: o.update(surprise=1), "cannot repeat"),
        ],
    )
    def test_a_changed_record(self, folder, change, told):
        self.change(folder, lambda config: change(config["feedforward"][0]))
        with pytest.raises(ValueError, match=told):
            load(folder)

    def test_a_record_of_another_form(self, folder):
        self.change(folder, lambda config: config.update(feedforward="upcycle"))
        with pytest.raises(ValueError, match="not a list of records"):
            load(folder)

    def test_a_lost_record(self, folder):
        self.change(folder, lambda config: config.pop("feedforward"))
        with pytest.raises(ValueError, match="do not fit its configuration: missing"):
            load(folder)

    def test_what_cannot_be_described_is_not_saved(self, tmp_path):
        class Mine(nn.Identity):
            pass

        model = replace_ffn(distilbert(), lambda ffn: Mine(), layers=[1])
        assert model.config.feedforward == [
            {"operation": "replace_ffn", "layers": [1], "unrecorded": "Mine"}
        ]
        with pytest.raises(
            ValueError, match=r"layers \[1\] hold a Mine, which cannot be described"
        ):
            save(model, tmp_path / "model")
        assert list(tmp_path.iterdir()) == []
        model = distilbert()
        replace_ffn(model, lambda ffn: moe_of(ffn, activation=torch.sin))
        with pytest.raises(ValueError, match="builtin_function_or_method"):
            save(model, tmp_path / "model")

    def test_a_full_disk_leaves_the_earlier_save(self, folder, monkeypatch):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        model = distilbert()
        write = type(model).save_pretrained

        def full(self, where, **options):
            write(self, where, **options)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(type(model), "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            save(model, folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert list(folder.parent.iterdir()) == [folder]

    def test_other_files_of_an_earlier_save_stay(self, folder):
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model-00001-of-00002.safetensors").write_text("of another save")
        save(distilbert(), folder)
        names = {file.name for file in folder.iterdir()}
        assert names == {"config.json", "model.safetensors", "tokenizer.json"}
        same(output(load(folder)), output(distilbert()))
        assert list(folder.parent.iterdir()) == [folder]

    def test_folders_of_others_are_not_replaced(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(ValueError, match="holds something else than a saved model"):
            save(distilbert(), tmp_path)
        with pytest.raises(ValueError, match="is a file"):
            save(distilbert(), tmp_path / "thesis.txt")
        assert (tmp_path / "thesis.txt").read_text() == "precious"


# pre-merge


def structured_block(**options) -> nn.Sequential:
    torch.manual_seed(0)
    maps = LowRank(12, 24, rank=4, **options), BlockShuffle(24, 12, blocks=3, **options)
    more = BlockDense(12, 24, rank=6, blocks=3, **options), LowRank(24, 12, rank=4, **options)
    return nn.Sequential(nn.Sequential(*maps), nn.Sequential(*more), nn.Linear(12, 3)).eval()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
def test_premerge_wraps_every_structured_layer_and_computes_the_same(dtype, tolerance):
    plain = structured_block(dtype=dtype)
    plain[2].to(dtype)
    merged = premerge(copy.deepcopy(plain), threshold=4)
    kinds = [type(layer) for part in merged[:2] for layer in part]
    assert kinds == [PreMerged] * 4
    assert type(merged[2]) is nn.Linear
    with torch.no_grad():
        for tokens in (1, 4, 5):
            x = torch.randn(tokens, 12, dtype=dtype)
            torch.testing.assert_close(merged(x), plain(x), rtol=tolerance, atol=tolerance)
    assert all(layer.threshold == 4 for part in merged[:2] for layer in part)
    # nothing is left to do
    with pytest.raises(ValueError, match="no structured layer that is not merged"):
        premerge(merged)


def test_premerge_measures_each_shape_once_and_leaves_what_never_wins(monkeypatch):
    model = nn.ModuleList([structured_block(), structured_block()])
    model.append(model[0][0])  # a shared part
    measured = []

    def measure(layers, *, largest):
        assert largest == 64
        measured.append((type(layers[0]).__name__, layers[0].in_features, len(layers)))
        return 0 if isinstance(layers[0], BlockShuffle) else layers[0].in_features

    monkeypatch.setattr("feedforward.surgery.merging.measure_threshold", measure)
    assert premerge(model, largest=64) is model
    assert sorted(measured) == [
        ("BlockDense", 12, 2),
        ("BlockShuffle", 24, 2),
        ("LowRank", 12, 2),
        ("LowRank", 24, 2),
    ]
    for block in model[:2]:
        assert [getattr(layer, "threshold", None) for part in block[:2] for layer in part] == [
            12, None, 12, 24,
        ]  # fmt: skip
    assert model[2][0] is model[0][0][0]
    monkeypatch.undo()
    assert type(premerge(LowRank(6, 8, rank=2), threshold=1)) is PreMerged
    layer = LowRank(6, 8, rank=2)
    assert premerge(layer, threshold=0) is layer


def test_premerge_measures_inside_the_running_model(monkeypatch):
    model = structured_block()
    # up to how many tokens the dense weight of a shape is the faster one
    wins = {(LowRank, 12): 5, (BlockShuffle, 24): 0, (BlockDense, 12): 64, (LowRank, 24): 1}
    ran = []

    def run(tokens):
        cost = 100.0
        for part in model[:2]:
            for layer in part:
                merged = layer.threshold >= tokens
                inner = layer.layer
                cost += (tokens - wins[type(inner), inner.in_features] - 0.5) * merged
        ran.append(cost)
        model(torch.randn(tokens, 12))

    def interleaved(runs, *, device, rounds, seconds):
        assert device == torch.device("cpu")
        for way in runs.values():
            way()
        return {name: [cost] for name, cost in zip(runs, ran[-2:], strict=True)}

    monkeypatch.setattr("feedforward.surgery.merging.interleaved", interleaved)
    assert premerge(model, run=run, largest=64) is model
    layers = [layer for part in model[:2] for layer in part]
    assert [getattr(layer, "threshold", None) for layer in layers] == [5, None, 64, 1]
    assert type(layers[1]) is BlockShuffle
    # with a real clock
    real = structured_block()
    monkeypatch.undo()
    premerge(real, run=lambda tokens: real(torch.randn(tokens, 12)), largest=2)
    assert all(getattr(layer, "threshold", 0) <= 2 for part in real[:2] for layer in part)


def test_premerge_refuses_what_it_cannot_merge():
    for changes in ({"threshold": 3}, {}):
        model = structured_block().train(not changes)
        with pytest.raises(ValueError, match="run measures in eval mode"):
            premerge(model, run=print, **changes)
        assert type(model[0][0]) is LowRank
    for model, says in (
        (nn.Linear(3, 4), "Linear has no structured layer"),
        (nn.Sequential(SelfGuided(LowRank(6, 8, rank=2), steps=3)), "release"),
    ):
        with pytest.raises(ValueError, match=says):
            premerge(model)
    layer = nn.Sequential(LowRank(6, 8, rank=2))
    with pytest.raises(ValueError, match="threshold is -1"):
        premerge(layer, threshold=-1)
    assert type(layer[0]) is LowRank


def test_a_premerged_model_is_saved_with_its_thresholds(tmp_path):
    model = replace_ffn(distilbert(), structured(LowRank, parameters=0.5))
    premerge(model.eval(), threshold=3)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    layers = [m for m in again.modules() if isinstance(m, PreMerged)]
    assert [layer.threshold for layer in layers] == [3] * 6
    tokens = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens)[0], model(tokens)[0])
