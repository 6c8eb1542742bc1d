"""The decoder: against transformers' Llama, and each kind of feed-forward layer in its place."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from feedforward import count
from feedforward.layers.experts import MoE
from feedforward.lm.model import STRUCTURED, Decoder, DecoderConfig, FeedForward, attend, rotate

SMALL = {"vocabulary": 61, "width": 32, "layers": 3, "heads": 4, "context": 16}
KINDS = {
    "dense": {},
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
    assert torch.equal(model.generate(tokens[:, :2], 14, temperature=0)[:, 1:], tokens[:, 1:])


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


def test_generation_follows_its_own_forward_pass():
    model, tokens = decoder("moe").train(), some_tokens(2, 5)
    greedy = model.generate(tokens, 20, temperature=0)
    assert greedy.shape == (2, 25)
    assert model.training
    assert torch.equal(greedy[:, :5], tokens)
    model.eval()
    with torch.no_grad():
        for end in (6, 16, 25):  # beyond the context only its end is seen
            logits = model(greedy[:, max(0, end - 17) : end - 1])
            assert torch.equal(greedy[:, end - 1], logits[:, -1].argmax(-1))
    assert torch.equal(model.generate(tokens, 9, top_k=1), model.generate(tokens, 9, temperature=0))
    seeds = (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    draws = [model.generate(tokens, 9, generator=seed) for seed in seeds]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_generation_refuses_nothing_and_negative_temperature():
    model = decoder("dense")
    with pytest.raises(ValueError, match=r"\(2, 0\).*T >= 1"):
        model.generate(torch.zeros(2, 0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="temperature is -1"):
        model.generate(some_tokens(), 3, temperature=-1)


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
def test_a_structure_that_does_not_fit_is_refused_when_built(changes):
    with pytest.raises(ValueError, match=r"rank|block|divis"):
        Decoder(DecoderConfig(**SMALL | changes))


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
