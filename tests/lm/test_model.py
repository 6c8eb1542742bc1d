"""The decoder: against transformers' Llama, and each kind of feed-forward layer in its place."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from feedforward import count
from feedforward.layers.cost import PAPER_SHAPES
from feedforward.layers.experts import MoE
from feedforward.lm.model import (
    PAPER_MODELS,
    STRUCTURED,
    Decoder,
    DecoderConfig,
    FeedForward,
    KeyValueCache,
    attend,
    from_gpt2,
    paper_config,
    rotate,
)
from feedforward.records import plain_config

SMALL = {"vocabulary": 61, "width": 32, "layers": 3, "heads": 4, "context": 16}
KINDS = {
    "dense": {},
    "learned": {"positions": "learned", "head_width": 5, "eps": 1e-3},
    "gated": {"gated": True, "activation": "silu", "norm": "rms", "bias": False, "hidden": 48},
    "grouped": {"kv_heads": 2, "head_width": 4, "tied": False},
    "lowrank": {"ffn": "lowrank", "rank": 8},
    "lowrank-share": {"ffn": "lowrank", "share": 0.32},
    "blockshuffle": {"ffn": "blockshuffle", "blocks": 4},
    "blockdense": {"ffn": "blockdense", "rank": 16, "blocks": 4},
    "moe": {"ffn": "moe", "experts": 4, "k": 2},
    "moe-no-bias": {"ffn": "moe", "experts": 4, "k": 2, "bias": False},
    "switch": {"ffn": "switch", "experts": 4},
    "switch-late": {"ffn": "switch", "experts": 4, "dense_layers": 2},
}


def decoder(name: str, **changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**SMALL | KINDS[name] | changes)).eval()


def some_tokens(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def test_it_is_transformers_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            rms_norm_eps=1e-5,
            max_position_embeddings=16,
            tie_word_embeddings=False,
            attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    ).eval()
    ours = decoder("gated", kv_heads=2, head_width=12, tied=False)
    names = {
        "model.embed_tokens.": "embedding.",
        "model.norm.": "norm.",
        "lm_head.": "head.",
        "model.layers.": "blocks.",
        "self_attn.q_proj.": "attention.query.",
        "self_attn.k_proj.": "attention.key.",
        "self_attn.v_proj.": "attention.value.",
        "self_attn.o_proj.": "attention.output.",
        "mlp.up_proj.": "ffn.up.",
        "mlp.gate_proj.": "ffn.gate.",
        "mlp.down_proj.": "ffn.down.",
        "input_layernorm.": "attention_norm.",
        "post_attention_layernorm.": "ffn_norm.",
    }
    weights = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value + 0.1 * torch.randn_like(value)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights.values(), strict=True)))
    ours.load_state_dict(weights)
    tokens = some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


def gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 20, "n_layer": 3, "n_head": 4, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **changes)).double()
    with torch.no_grad():  # biases and norms are not zero and one in a trained model
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": 36, "activation_function": "gelu", "layer_norm_epsilon": 1e-2},
        {"tie_word_embeddings": False, "attn_implementation": "eager"},
    ],
    ids=["plain", "other", "untied"],
)
def test_it_is_transformers_gpt2(changes):
    theirs, tokens = gpt2(**changes).eval(), some_tokens()
    ours = from_gpt2(theirs)
    assert not ours.training
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens)
        torch.testing.assert_close(ours(tokens), expected.logits, rtol=1e-10, atol=1e-10)
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        # the loss is taken in float32
        torch.testing.assert_close(ours(tokens, targets).double(), expected.loss.double())
    parameters = sum(p.numel() for p in theirs.parameters())
    assert count(ours).parameters == count(ours.config).parameters == parameters
    assert count(ours, context=0) == count(ours.config, context=0, dtype=torch.float64)
    theirs.transformer.wte.weight.data.zero_()  # ours are copies
    assert ours.embedding.weight.any()


def test_what_the_decoder_does_not_have_is_refused():
    for changes, says in (
        ({"activation_function": "relu"}, "'relu'.*gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ):
        with pytest.raises(ValueError, match=says):
            from_gpt2(gpt2(**changes))


# millions of parameters and training FLOPs that the paper prints (papers' tables, some computed)
PRINTED = {
    "s": (110, 1.69e18), "s-lowrank-63": (90, 1.44e18), "s-lowrank-32": (74, 1.22e18),
    "m": (335, 1.55e19), "m-lowrank-63": (262, 1.26e19), "m-lowrank-32": (202, 1.01e19),
    "l": (729, 7.03e19), "l-lowrank-63": (566, 5.61e19), "l-lowrank-32": (430, 4.42e19),
    "xl": (1274, 2.10e20), "xl-lowrank-63": (985, 1.66e20), "xl-lowrank-32": (744, 1.29e20),
    "xl-blockdense-63": (955, 1.61e20), "xl-blockdense-32": (728, 1.27e20),
    "xl-blockshuffle-63": (985, 1.66e20), "xl-blockshuffle-32": (744, 1.29e20),
    "m-gqa": (335, None), "m-ws": (219, None), "l-gqa": (729, None), "l-ws": (464, None),
}  # fmt: skip
TOKENS = {"s": 2.2e9, "m": 6.7e9, "l": 14.58e9, "xl": 25.5e9}


@pytest.mark.parametrize("name", PRINTED)
def test_the_papers_models_cost_what_it_prints(name):
    millions, flops = PRINTED[name]
    cost = count(paper_config(name))
    assert cost.parameters / 1e6 == pytest.approx(millions, rel=0.01)
    if flops is not None:
        tokens = TOKENS[name.partition("-")[0]]
        assert cost.training_flops * tokens == pytest.approx(flops, rel=0.01)


def test_every_language_model_of_the_paper_has_its_shape():
    assert len(PAPER_MODELS) == 4 * 7 + 4
    for name in PAPER_MODELS:
        config = paper_config(name)
        assert config.shape() == PAPER_SHAPES[name]
        assert config.activation == "gelu_tanh"
    with torch.device("meta"):
        model = Decoder(paper_config("l-ws"))
    assert count(model).parameters == count(PAPER_SHAPES["l-ws"]).parameters
    for name in ("distilbert", "m-lowrank", None):
        with pytest.raises(ValueError, match="no language model of the paper"):
            paper_config(name)
    with pytest.raises(ValueError, match="did you mean 'xl-lowrank-32'"):
        paper_config("xl-lowrnk-32")


def test_later_fields_do_not_change_the_identity_of_recorded_runs():
    assert not {"positions", "eps", "init"} & plain_config(DecoderConfig()).keys()
    assert plain_config(DecoderConfig(positions="learned"))["positions"] == "learned"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("parts", [(7, 1, 1, 1), (1, 5, 4), (10,)], ids=str)
def test_a_cache_gives_the_logits_of_the_whole_sequence(name, parts):
    model, tokens = decoder(name).double(), some_tokens(2, 10)
    cache = [KeyValueCache(12) for _ in model.blocks]
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-10, atol=1e-10)
    assert [(c.length, *c.keys.shape) for c in cache] == [
        (10, 2, model.config.key_heads, 12, model.config.per_head)
    ] * 3


@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing(name):
    capacity = {"capacity_factor": 0.5} if "moe" in name or "switch" in name else {}
    model, tokens = decoder(name, **capacity).double(), some_tokens(3, 10)
    padding = torch.tensor([4, 0, 9])
    if capacity:  # which is shared by the rows: what padding holds still takes none of it
        other = tokens.clone()
        other[0, :4] = other[2, :9] = 7
        with torch.no_grad():
            pair = [model(rows, padding=padding) for rows in (tokens, other)]
        for row, skip in enumerate(padding):
            torch.testing.assert_close(pair[0][row, skip:], pair[1][row, skip:])
        return
    cache = [KeyValueCache(10) for _ in model.blocks]
    with torch.no_grad():
        padded = model(tokens, padding=padding)
        first, *later = tokens.split((8, 1, 1), dim=1)
        pieces = [model(piece, padding=padding, cache=cache) for piece in (first, *later)]
        for row, skip in enumerate(padding):
            alone = model(tokens[row : row + 1, skip:])[0]
            for batch in (padded, torch.cat(pieces, 1)):
                torch.testing.assert_close(batch[row, skip:], alone, rtol=1e-10, atol=1e-10)


def test_a_cache_ends_at_its_capacity_and_at_the_context():
    model = decoder("dense")
    with torch.no_grad():
        cache = [KeyValueCache(8) for _ in model.blocks]
        model(some_tokens(2, 8), cache=cache)
        with pytest.raises(ValueError, match="9 tokens are more than the 8"):
            model(some_tokens(2, 1), cache=cache)
        cache = [KeyValueCache(32) for _ in model.blocks]
        model(some_tokens(2, 16), cache=cache)
        with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
            model(some_tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="capacity is 0"):
        KeyValueCache(0)


@pytest.mark.parametrize("name", KINDS)
def test_a_token_sees_only_what_came_before(name):
    model, tokens = decoder(name), some_tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert before.shape == (2, 16, 61)
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:], before[:, 9:])


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_is_used_and_counted(name):
    model, tokens = decoder(name), some_tokens(8)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    # a switch need not send anything to an expert; its stacked weights get a gradient all the same
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "key.bias" not in n)
    assert count(model.config).parameters == sum(p.numel() for p in model.parameters())
    assert loss.item() == pytest.approx(math.log(61), abs=0.2)
    logits = model(tokens[:, :-1])
    expected = F.cross_entropy(logits.reshape(-1, 61), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["dense", "lowrank", "blockshuffle", "moe", "switch"])
def test_it_learns_a_sequence_by_heart(name):
    model, tokens = decoder(name, std=0.1).train(), some_tokens(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, 1:-1].argmax(-1), tokens[:, 2:])


def test_experts_have_the_dense_layers_active_flops():
    cost = {name: count(DecoderConfig(**KINDS[name])) for name in ("dense", "moe", "switch")}
    routers = 2 * 4 * 4 * 128  # layers, experts, width
    for name in ("moe", "switch"):
        assert cost[name].flops == cost["dense"].flops + routers
        assert cost[name].parameters > 1.5 * cost["dense"].parameters


def test_structured_models_keep_the_first_layer_dense():
    for name in STRUCTURED:
        ffns = [block.ffn for block in decoder(name).blocks]
        assert isinstance(ffns[0].up, torch.nn.Linear)
        assert all(isinstance(ffn.up, STRUCTURED[name]) for ffn in ffns[1:])
        assert all(isinstance(ffn.down, STRUCTURED[name]) for ffn in ffns[1:])
        all_structured = decoder(name, dense_layers=0)
        assert isinstance(all_structured.blocks[0].ffn.up, STRUCTURED[name])
    kinds = [type(block.ffn) for block in decoder("switch-late").blocks]
    assert kinds == [FeedForward, FeedForward, MoE]


def test_weights_start_from_one_gaussian_and_tie():
    model = decoder("moe", width=64, std=0.03)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", ".b_in", ".b_out")):
            assert not parameter.any(), name
        elif parameter.ndim > 1 and "router" not in name:
            assert parameter.std().item() == pytest.approx(0.03, rel=0.1), name
    assert model.head.weight is model.embedding.weight
    assert decoder("grouped").head.weight is not decoder("grouped").embedding.weight


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    model = decoder("dense")
    x, y = torch.randn(2, 8)
    x, y = (v.expand(16, 8) for v in (x, y))
    x, y = (rotate(v, model.cosines, model.sines) for v in (x, y))
    torch.testing.assert_close(x.norm(dim=-1), x[:1].norm(dim=-1).expand(16))
    scores = x @ y.T
    torch.testing.assert_close(scores[5, 2], scores[13, 10])
    assert not torch.isclose(scores[5, 2], scores[5, 3])


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        decoder("dense")(some_tokens(1, 17))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 30}, "not divisible by heads"),
        ({"width": 12}, "even width"),
        ({"kv_heads": 3}, "must divide heads"),
        ({"layers": 0}, "layers is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"width": 32.0}, "whole number"),
        ({"norm": "batch"}, "allowed: layer, rms"),
        ({"activation": "relu"}, "allowed: gelu"),
        ({"ffn": "sparse"}, "allowed: dense, lowrank"),
        ({"std": 0.0}, "must be positive"),
        ({"eps": 0.0}, "must be positive"),
        ({"positions": "absolute"}, "allowed: rotary, learned"),
        ({"dense_layers": 4}, "0 to 3"),
        ({"ffn": "lowrank"}, "takes share or rank"),
        ({"ffn": "lowrank", "rank": 4, "share": 0.3}, "given: rank, share"),
        ({"ffn": "blockshuffle", "rank": 4}, "takes share or blocks"),
        ({"ffn": "blockdense", "blocks": 4}, "given: blocks"),
        ({"share": 0.3}, "takes none"),
        ({"ffn": "moe", "experts": 4, "k": 5}, "at most that"),
        ({"ffn": "moe", "k": 3}, "not divisible by k 3"),
    ],
)
def test_an_impossible_shape_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        DecoderConfig(**SMALL | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn": "lowrank", "rank": 33},
        {"ffn": "blockshuffle", "blocks": 5},
        {"ffn": "blockdense", "rank": 16, "blocks": 3},
    ],
)
def test_a_structure_that_does_not_fit_is_refused(changes):
    with pytest.raises(ValueError, match=r"rank|block|divis"):
        DecoderConfig(**SMALL | changes)


def test_a_wide_dense_layer_before_narrow_experts_is_counted_from_its_shape():
    config = dataclasses.replace(DecoderConfig(**SMALL | KINDS["moe"]), dense_layers=1)
    assert config.per_expert != config.ffn_hidden
    by_shape, by_module = count(config, context=0), count(Decoder(config), context=0)
    assert by_shape.parameters == by_module.parameters
    assert by_shape.active_parameters == by_module.active_parameters


def some_heads(heads, key_heads, length, dtype, width=8):
    generator = torch.Generator().manual_seed(2)
    sizes = [(2, n, length, width) for n in (heads, key_heads, key_heads)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]


def attention_written_out(q, k, v):
    """softmax(QK^T / sqrt(d)) V of each head and query, in float64."""
    rows = []
    for head in range(q.shape[1]):
        keys, values = (t[:, head * t.shape[1] // q.shape[1]] for t in (k, v))
        for i in range(q.shape[2]):
            scores = torch.einsum("bd,bjd->bj", q[:, head, i], keys[:, : i + 1])
            shares = (scores / math.sqrt(q.shape[-1])).softmax(-1)
            rows.append(torch.einsum("bj,bjd->bd", shares, values[:, : i + 1]))
    return torch.stack(rows, 1).view(q.shape)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 2, 19])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_attention_and_its_gradients_match_the_definition(heads, key_heads, length, kind):
    """Both ways: the fused kernel, and the plain products of bf16 training on a processor."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    given = some_heads(heads, key_heads, length, dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    weighting = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = attend(*given)
    assert y.dtype == dtype
    expected = attention_written_out(*exact)
    (y.float() * weighting).sum().backward()
    (expected * weighting.double()).sum().backward()
    tolerance = 1e-5 if kind == "fp32" else 0.03
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(given, exact, strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm().clamp(min=1.0)
        assert error < tolerance
    with torch.no_grad():  # the fused kernel says the same
        torch.testing.assert_close(attend(*given), y, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_never_looks_ahead(dtype):
    q, k, v = some_heads(4, 2, 12, dtype)
    y = attend(q, k, v)
    y[:, :, :7].float().sum().backward()
    for tensor in (k, v):
        assert not tensor.grad[:, :, 7:].any()
        assert tensor.grad[:, :, :7].any()
    with torch.no_grad():
        k[:, :, 7:], v[:, :, 7:] = 5.0, -9.0
    assert torch.equal(attend(q, k, v)[:, :, :7], y[:, :, :7])


def test_plain_attention_is_for_bf16_training_on_a_processor_alone(monkeypatch):
    fused, calls = F.scaled_dot_product_attention, []

    def counted(*arguments, **options):
        calls.append(options)
        return fused(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    attend(*some_heads(2, 1, 512, torch.bfloat16))
    assert not calls
    attend(*some_heads(2, 1, 513, torch.bfloat16))  # the scores would fill the memory
    attend(*some_heads(2, 2, 9, torch.float32))
    with torch.no_grad():
        attend(*some_heads(2, 1, 9, torch.bfloat16))
    assert [options["enable_gqa"] for options in calls] == [True, False, True]


@pytest.mark.parametrize("name", ["dense", "grouped", "blockdense"])
def test_training_in_bf16_follows_float32(name):
    model, tokens = decoder(name).train(), some_tokens(4)
    gradients = []
    for bf16 in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        gradients.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), (exact, exact_gradient) = gradients
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=1e-3)
    assert F.cosine_similarity(gradient, exact_gradient, dim=0) > 0.999


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_layers_start_as_the_configuration_says(name):
    for init in (None, "spectral", "orthonormal", "gaussian"):
        ffns = [block.ffn for block in decoder(name, init=init).blocks[1:]]
        own = "spectral" if name == "lowrank" else "orthonormal"  # the paper's
        assert {layer.init for ffn in ffns for layer in (ffn.up, ffn.down)} == {init or own}
    config = decoder(name).config
    assert dataclasses.replace(config, init=own) != config
    by_default, by_name = decoder(name), decoder(name, init=own)
    assert all(map(torch.equal, by_default.parameters(), by_name.parameters()))


def test_a_start_is_given_to_structured_layers_alone():
    with pytest.raises(ValueError, match="init 'spectral' is of structured layers; ffn is 'dense'"):
        DecoderConfig(**SMALL, init="spectral")
    with pytest.raises(ValueError, match="init is 'kaiming'; allowed: spectral, orthonormal"):
        DecoderConfig(**SMALL | KINDS["lowrank"], init="kaiming")


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@pytest.mark.parametrize("name", ["dense", "learned", "grouped", "moe"])
def test_made_on_meta_and_filled_it_is_the_same_model(name, assign):
    config = DecoderConfig(**SMALL, **KINDS[name])
    expected, x = Decoder(config).bfloat16().eval(), torch.randint(61, (2, 16))
    with torch.device("meta"):
        model = Decoder(config).bfloat16().eval()
    keys = list(model.state_dict())
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict(), assign=assign)
    assert torch.equal(model(x), expected(x))
    assert (model.head.weight is model.embedding.weight) is config.tied
    assert list(model.state_dict()) == keys == list(expected.state_dict())
    # inside of another module too
    with torch.device("meta"):
        outer = torch.nn.Sequential(Decoder(config).bfloat16()).eval()
    if not assign:
        outer.to_empty(device="cpu")
    outer.load_state_dict(torch.nn.Sequential(expected).state_dict(), assign=assign)
    assert torch.equal(outer(x), expected(x))


def test_rotary_tables_are_as_exact_as_their_type():
    config = DecoderConfig(**SMALL | {"context": 1024})
    angles = torch.arange(1024.0)[:, None] / 10_000.0 ** (torch.arange(0, 8, 2).float() / 8)
    single = torch.cat((angles, angles), -1)  # as in all recorded runs
    model = Decoder(config)
    assert torch.equal(model.cosines, single.cos())
    model.double()
    exact = torch.arange(1024.0).double()[:, None] / 10_000 ** (torch.arange(0, 8, 2).double() / 8)
    torch.testing.assert_close(model.sines, torch.cat((exact, exact), -1).sin(), rtol=0, atol=1e-12)
    assert torch.equal(model.bfloat16().sines, single.sin().bfloat16())
    assert torch.equal(model.float().sines, single.sin())
    assert model.head.weight is model.embedding.weight


def test_tokens_have_two_dimensions_and_may_be_none():
    model = Decoder(DecoderConfig(**SMALL))
    for shape in ((0, 4), (2, 0)):
        assert model(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 61)
    for shape in ((4,), (1, 2, 4)):
        with pytest.raises(ValueError, match=r"give \(B, T\)"):
            model(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ffn": "lowrank", "share": 2.0}, "parameters is 2.0"),
        ({"ffn": "lowrank", "rank": 1000}, "rank is 1000"),
        ({"ffn": "blockshuffle", "blocks": 7}, "7 equal blocks"),
        ({"ffn": "blockdense", "rank": 10, "blocks": 4}, "rank = 10 cannot be cut"),
        ({"ffn": "switch", "jitter": 3.0}, "jitter is 3.0"),
        ({"ffn": "moe", "capacity_factor": -1.0}, "capacity_factor is -1.0"),
        ({"std": math.nan}, "std nan"),
    ],
)
def test_what_no_layer_can_be_made_of_is_refused_at_once(changes, says):
    with pytest.raises(ValueError, match=says):
        DecoderConfig(**SMALL, **changes)
