"""The mixture of experts against a float64 oracle that goes token by token."""

import copy
import math
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from feedforward import (
    MoE,
    ScaleAdapterRouter,
    SwitchRouter,
    TopKRouter,
    collect_routing,
    load_balancing_loss,
    router_z_loss,
)
from feedforward.layers import experts as module

DIM, HIDDEN, EXPERTS, TOKENS = 8, 16, 4, 13
ROUTERS = {
    "top-k": lambda e=EXPERTS: TopKRouter(DIM, e, k=min(2, e)),
    "switch": lambda e=EXPERTS: SwitchRouter(DIM, e),
    "add": lambda e=EXPERTS: ScaleAdapterRouter(DIM, e, k=min(2, e)),
    "concat": lambda e=EXPERTS: ScaleAdapterRouter(DIM, e, k=1, combine="concat"),
}
PADDED = (torch.arange(TOKENS) % 5 != 2) & (torch.arange(TOKENS) < TOKENS - 2)


def make(router: str = "top-k", dtype=torch.float64, experts=EXPERTS, seed=0, **options) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(DIM, HIDDEN, experts, router=ROUTERS[router](experts), **options)
    with torch.no_grad():
        for weight in moe.router.parameters():
            weight.normal_()
    return moe.to(dtype)


def tokens(*shape: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*(shape or (TOKENS,)), DIM, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


# -- the oracle: one token, one expert at a time, from the equations -----------------------------


def activation(name: str, h: torch.Tensor) -> torch.Tensor:
    if name == "gelu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    if name == "gelu_tanh":
        return h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    if name == "silu":
        return h / (1 + torch.exp(-h))
    if name == "relu":
        return h * (h > 0)
    return torch.where(h > 0, h, 0.01 * h)  # leaky_relu


def expert(moe: MoE, e: int, x: torch.Tensor) -> torch.Tensor:
    h = moe.w_in[e] @ x
    if moe.b_in is not None:
        h = h + moe.b_in[e]
    if moe.gated:
        h = activation(moe.activation, h[:HIDDEN]) * h[HIDDEN:]
    else:
        h = activation(moe.activation, h)
    y = moe.w_out[e] @ h
    return y if moe.b_out is None else y + moe.b_out[e]


def choices(router: nn.Module, x: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    p = torch.exp(router.gate @ x)
    p = p / p.sum()
    chosen = sorted(range(router.experts), key=lambda e: -p[e].item())[: router.k]
    if isinstance(router, TopKRouter):
        return [(e, p[e] / sum(p[c] for c in chosen)) for e in chosen]
    if isinstance(router, SwitchRouter):
        return [(e, p[e]) for e in chosen]
    if router.combine == "add":
        return [(e, p[e] + router.adapter[e] @ x) for e in chosen]
    mixed = torch.exp(router.adapter @ torch.cat([x, p]))
    return [(e, mixed[e] / mixed.sum()) for e in chosen]


def oracle(moe: MoE, x: torch.Tensor, mask=None) -> tuple[torch.Tensor, int]:
    """The layer's output for (T, dim) and how many choices had no room."""
    real = [t for t in range(len(x)) if mask is None or mask[t]]
    chosen = {t: choices(moe.router, x[t]) for t in real}
    room = [len(x)] * moe.experts
    if moe.capacity_factor is not None:
        limit = math.ceil(moe.capacity_factor * len(real) * moe.router.k / moe.experts)
        room = [limit] * moe.experts
    routed, dropped = {t: torch.zeros_like(x[t]) for t in real}, 0
    for rank in range(moe.router.k):  # first choices before second ones
        for t in real:
            e, weight = chosen[t][rank]
            if room[e] == 0:
                dropped += 1
                continue
            room[e] -= 1
            routed[t] = routed[t] + weight * expert(moe, e, x[t])
    rows = []
    for t in range(len(x)):
        if t not in routed:
            rows.append(torch.zeros_like(x[t]))
        elif moe.shared is None:
            rows.append(routed[t])
        elif moe.shared_weight is None:
            rows.append(moe.shared(x[t]) + routed[t])
        else:
            s = moe.shared_weight
            rows.append(s * moe.shared(x[t]) + (1 - s) * routed[t])
    return torch.stack(rows), dropped


def gradients(y: torch.Tensor, moe: MoE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a fixed weighted sum of y, for the input and every parameter."""
    generator = torch.Generator().manual_seed(11)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    names, parameters = zip(*moe.named_parameters(), strict=True)
    total = (y * g).sum() + 0.0 * x.sum()  # a graph even where everything is padding
    found = torch.autograd.grad(total, (x, *parameters), allow_unused=True)
    return dict(zip(("x", *names), found, strict=True))


def compare(moe: MoE, x: torch.Tensor, mask=None, *, tolerance=1e-10) -> int:
    """Values and gradients against the oracle in float64; returns the choices dropped."""
    twin, x64 = copy.deepcopy(moe).double(), x.detach().double().requires_grad_()
    expected, dropped = oracle(twin, x64, mask)
    y = moe(x, mask)
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, expected, **close)
    wanted, found = gradients(expected, twin, x64), gradients(y, moe, x)
    for name, gradient in found.items():
        assert gradient is not None, f"{name} has no gradient"
        want = torch.zeros_like(gradient) if wanted[name] is None else wanted[name]
        torch.testing.assert_close(gradient, want, **close, msg=lambda m, n=name: f"{n}: {m}")
    return dropped


# -- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)
def test_every_router_and_kind_of_expert(router, gated, bias, dtype, tolerance):
    # float64 takes the loop over experts, float32 the grouped product
    for options, mask in (({}, None), ({}, PADDED), ({"capacity_factor": 0.7}, PADDED)):
        moe = make(router, dtype, gated=gated, bias=bias, **options)
        dropped = compare(moe, tokens(dtype=dtype), mask, tolerance=tolerance)
        assert (dropped > 0) == bool(options)


@pytest.mark.parametrize("shared_weight", [None, 0.0, 0.5])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["", "padded"])
def test_shared_expert(shared_weight, mask):
    # bias, so that the shared output of a padded token would not be zero by itself
    shared = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))
    compare(make("add", shared=shared, shared_weight=shared_weight), tokens(), mask)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "leaky_relu", "silu"])
def test_activations(name):
    compare(make(activation=name), tokens())


def test_activation_may_be_a_function_or_a_module():
    x = tokens()
    given = make(activation=lambda h: h.relu())
    assert torch.equal(given(x), make(activation="relu")(x))
    assert torch.equal(make(activation=nn.ReLU())(x), make(activation="relu")(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.012)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_half_precision(dtype, tolerance, gated):
    compare(make("top-k", dtype, gated=gated, bias=True), tokens(dtype=dtype), tolerance=tolerance)
    compare(
        make("add", dtype, capacity_factor=1.0), tokens(dtype=dtype), PADDED, tolerance=tolerance
    )


def naive(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """The loop over experts as most people write it."""
    routing, y = moe.router(x), torch.zeros_like(x)
    for e in range(moe.experts):
        rows, rank = (routing.indices == e).nonzero(as_tuple=True)
        out = F.linear(F.gelu(F.linear(x[rows], moe.w_in[e])), moe.w_out[e])
        y = y.index_add(0, rows, out * routing.weights[rows, rank, None].to(out.dtype))
    return y


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_plain_loop_at_size(dtype, tolerance):
    torch.manual_seed(0)
    moe = MoE(64, 128, 8, router=TopKRouter(64, 8, k=2)).to(dtype)
    x = torch.randn(300, 64).to(dtype).requires_grad_()
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(moe(x), naive(moe, x), **close)
    found, wanted = gradients(moe(x), moe, x), gradients(naive(moe, x), moe, x)
    for name in found:
        scale = wanted[name].abs().max()
        torch.testing.assert_close(found[name] / scale, wanted[name] / scale, **close)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["", "padded"])
def test_grouped_product_and_loop_agree(monkeypatch, bias, mask):
    moe, x = (
        make("top-k", torch.float32, bias=bias, capacity_factor=1.0),
        tokens(dtype=torch.float32),
    )
    grouped = moe(x, mask)
    found = gradients(grouped, moe, x)
    monkeypatch.setattr(module, "_groupable", lambda rows, weight: False)
    looped = moe(x, mask)
    torch.testing.assert_close(grouped, looped)
    for name, gradient in gradients(looped, moe, x).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared_weight", [None, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("count", [1, 2, 13])
def test_few_tokens_without_a_gradient(router, bias, count, shared_weight, monkeypatch):
    shared = nn.Linear(DIM, DIM)
    moe = make(router, bias=bias, gated=True, shared=shared, shared_weight=shared_weight)
    x = tokens(count)
    expected = moe(x)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), expected.detach())
        # all to one expert
        same = x[:1].expand(5, DIM)
        torch.testing.assert_close(moe(same), expected[:1].detach().expand(5, DIM))
        few = moe(x)
        monkeypatch.setattr(module, "_FEW", 0)
        torch.testing.assert_close(few, moe(x))
        assert moe(x[:0]).shape == (0, DIM)


def test_few_tokens_under_autocast_have_its_type():
    moe, x = make("add", dtype=torch.float32, gated=True), tokens(dtype=torch.float32)
    for each in (x, x[:1]):
        with torch.autocast("cpu", torch.bfloat16):
            recorded = moe(each)
            with torch.no_grad():
                few = moe(each)
        assert few.dtype == recorded.dtype == torch.bfloat16
        torch.testing.assert_close(few, recorded.detach(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dim", [7, 6, 1])
def test_widths_that_the_grouped_product_refuses(dim):
    torch.manual_seed(0)
    moe = MoE(dim, 5, 3, router=TopKRouter(dim, 3, k=2))
    x = torch.randn(9, dim)
    torch.testing.assert_close(moe(x), naive(moe, x))


def test_transposed_weights_take_the_loop():
    moe, x = make("top-k", torch.float32), tokens(dtype=torch.float32)
    expected = moe(x)
    with torch.no_grad():
        moe.w_in.set_(moe.w_in.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(moe(x), expected)


class Poisoned(torch.autograd.Function):
    """A grouped product whose rows past the last offset are NaN, in both directions."""

    @staticmethod
    def forward(ctx, rows, weight, offsets):
        ctx.save_for_backward(rows, weight)
        ctx.ends = offsets.tolist()
        y = rows.new_full((len(rows), weight.shape[2]), float("nan"))
        for start, end, w in zip([0, *ctx.ends], ctx.ends, weight, strict=False):
            y[start:end] = rows[start:end] @ w
        return y

    @staticmethod
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        d_rows, d_weight = torch.full_like(rows, float("nan")), torch.zeros_like(weight)
        for e, (start, end) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
            d_rows[start:end] = gradient[start:end] @ weight[e].T
            d_weight[e] = rows[start:end].T @ gradient[start:end]
        return d_rows, d_weight, None


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", ["padded", "all padded", "capacity", "padded, capacity"])
def test_uninitialised_rows_are_never_used(monkeypatch, case, bias):
    monkeypatch.setattr(
        F, "grouped_mm", lambda rows, weight, *, offs: Poisoned.apply(rows, weight, offs)
    )
    mask = torch.zeros_like(PADDED) if case == "all padded" else PADDED
    mask = None if case == "capacity" else mask
    factor = 0.6 if "capacity" in case else None
    moe = make("top-k", torch.float32, bias=bias, capacity_factor=factor)
    dropped = compare(moe, tokens(dtype=torch.float32), mask, tolerance=1e-4)
    assert (dropped > 0) == ("capacity" in case)


# -- shapes and edges -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_leading_dimensions_and_no_tokens(shape, dtype, padded):
    moe = make("top-k", dtype, bias=True, shared=nn.Linear(DIM, DIM), capacity_factor=4.0)
    x = torch.randn(*shape, DIM, dtype=dtype, requires_grad=True)
    mask = torch.arange(math.prod(shape)).reshape(shape) % 2 == 0 if padded else None
    y = moe(x, mask)
    assert y.shape == x.shape
    flat = moe(x.reshape(-1, DIM), None if mask is None else mask.reshape(-1))
    torch.testing.assert_close(y.reshape(-1, DIM), flat)
    y.sum().backward()
    for parameter in (x, *moe.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_as_many_choices_as_experts(experts, dtype):
    torch.manual_seed(0)
    moe = MoE(DIM, HIDDEN, experts, router=TopKRouter(DIM, experts, k=experts)).to(dtype)
    compare(moe, tokens(dtype=dtype), tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_experts_that_nobody_chose_have_zero_gradients(dtype):
    moe = make("switch", dtype, bias=True)
    with torch.no_grad():
        moe.router.gate.zero_()[2] = 1.0
    x = tokens(dtype=dtype).detach().abs().requires_grad_()
    moe(x).sum().backward()
    for weight in (moe.w_in, moe.w_out, moe.b_in, moe.b_out):
        used = weight.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [None, 1.0])
def test_padding_gets_exact_zeros_and_leaves_no_trace(dtype, factor):
    shared = nn.Linear(DIM, DIM)
    moe = make("top-k", dtype, bias=True, shared=shared, capacity_factor=factor)
    x = tokens(2, TOKENS, dtype=dtype)
    mask = torch.stack([PADDED, PADDED.roll(3)])
    alone = moe(x[mask])
    expected = gradients(alone, moe, x)
    # whatever stands in padding, NaN too, reaches neither output nor gradient
    x = x.detach().masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    y = moe(x, mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    torch.testing.assert_close(y[mask], alone)
    for name, gradient in gradients(y[mask], moe, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_the_backward_does_not_index_experts_one_by_one():
    # w[e] under autograd fills a gradient as large as w for each expert; unbind and the grouped
    # product do not. Counted in nodes of the graph, not in seconds.
    for dtype in (torch.float32, torch.float64):
        moe, seen, names = make("top-k", dtype), set(), []
        pending = [moe(tokens(dtype=dtype)).grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in seen:
                seen.add(node)
                names.append(node.name())
                pending += [parent for parent, _ in node.next_functions]
        assert not [name for name in names if "Select" in name and "IndexSelect" not in name]


# -- capacity -------------------------------------------------------------------------------------


def test_capacity_serves_first_choices_and_early_tokens():
    moe = MoE(2, 4, 3, router=TopKRouter(2, 3, k=2, renormalize=False), capacity_factor=0.75)
    with torch.no_grad():
        moe.router.gate.copy_(torch.tensor([[4.0, 0.0], [2.0, 2.0], [0.0, 4.0]]))
    # four tokens prefer 0 then 1, two prefer 2 then 1: ceil(0.75 * 6 * 2 / 3) = 3 places each
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    with collect_routing(moe) as routings:
        moe(x)
    (routing,) = routings
    assert routing.indices.tolist() == [[0, 1], [0, 1], [2, 1], [0, 1], [0, 1], [2, 1]]
    kept = [[True, True], [True, True], [True, True], [True, False], [False, False], [True, False]]
    assert (routing.weights != 0).tolist() == kept
    whole = moe.router(x)
    assert torch.equal(routing.weights[routing.weights != 0], whole.weights[routing.weights != 0])
    # the balance loss is about what was chosen, not about what was served
    assert torch.equal(load_balancing_loss(routing), load_balancing_loss(whole))


@pytest.mark.parametrize("factor", [0.01, 0.3, 0.7, 1.0, 1.25, 2.0, 100.0])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["", "padded"])
def test_capacity_against_the_loop(factor, mask):
    moe, x = make("top-k", capacity_factor=factor), tokens()
    dropped = compare(moe, x, mask)
    with collect_routing(moe) as routings:
        moe(x, mask)
    real = torch.ones_like(PADDED) if mask is None else mask
    assert (routings[0].weights == 0)[real].sum() == dropped
    if factor == 100.0:
        assert dropped == 0
        assert torch.equal(moe(x, mask), make("top-k")(x, mask))


# -- types, autocast, compilation -----------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_autocast(router):
    moe = make(router, torch.float32, bias=True, shared=nn.Linear(DIM, DIM))
    x = tokens(dtype=torch.float32)
    with collect_routing(moe) as routings:
        plain = moe(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = moe(x)
    assert cast.dtype == torch.bfloat16
    for a, b in zip(routings[0][:4], routings[1][:4], strict=True):
        assert torch.equal(a, b)  # the router is not affected
    torch.testing.assert_close(cast.float(), plain, rtol=0.05, atol=0.05)
    wanted = gradients(plain, moe, x)
    for name, gradient in gradients(cast, moe, x).items():
        assert gradient.dtype == torch.float32
        scale = wanted[name].abs().max()
        torch.testing.assert_close(gradient / scale, wanted[name] / scale, rtol=0.05, atol=0.05)


def test_autocast_leaves_float64_alone():
    moe, x = make(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moe(x), make()(x))
        assert moe(x).dtype == torch.float64


def test_first_use_in_inference_mode_does_not_disable_the_grouped_product():
    module._grouped_mm_works.cache_clear()
    with torch.inference_mode():
        make("top-k", torch.float32)(tokens(dtype=torch.float32).detach())
    assert module._grouped_mm_works(torch.float32, torch.device("cpu"))
    assert not module._grouped_mm_works(torch.float64, torch.device("cpu"))


def test_a_torch_without_the_grouped_product(monkeypatch):
    expected = make("top-k", torch.float32)(tokens(dtype=torch.float32))
    monkeypatch.delattr(F, "grouped_mm")
    module._grouped_mm_works.cache_clear()
    try:
        assert not module._grouped_mm_works(torch.float32, torch.device("cpu"))
        got = make("top-k", torch.float32)(tokens(dtype=torch.float32))
    finally:
        module._grouped_mm_works.cache_clear()
    torch.testing.assert_close(got, expected)


def test_compiles_whole_in_bfloat16():
    torch.compiler.reset()
    moe = make("add", torch.bfloat16, gated=True, bias=True, capacity_factor=1.0)
    x = tokens(dtype=torch.bfloat16)
    found = []
    for run in (torch.compile(moe, backend="aot_eager", fullgraph=True), moe):
        torch.testing.assert_close(run(x), moe(x))
        with collect_routing(run) as routings:
            y = run(x, PADDED)
        assert len(routings) == 1
        loss = y.float().sum() + load_balancing_loss(routings[0])
        found.append(torch.autograd.grad(loss, (x, *moe.parameters())))
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.02)


def test_compiles_in_float32():
    torch.compiler.reset()
    moe, x = make("top-k", torch.float32), tokens(dtype=torch.float32)
    torch.testing.assert_close(torch.compile(moe, backend="aot_eager")(x, PADDED), moe(x, PADDED))


def test_gradcheck():
    moe, x = make("add", gated=True, bias=True), tokens(5)
    assert torch.autograd.gradcheck(lambda x, *_: moe(x), (x, *moe.parameters()), fast_mode=True)


# -- collecting the routing -----------------------------------------------------------------------


class Model(nn.Module):
    """A layer for each kind of router, under activation checkpointing when asked."""

    def __init__(self, reentrant: bool | None = None, dtype=torch.float64):
        super().__init__()
        self.layers = nn.ModuleList(make(r, dtype, seed=i) for i, r in enumerate(ROUTERS))
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def losses(routings) -> torch.Tensor:
    return sum(load_balancing_loss(r) + 0.1 * router_z_loss(r) for r in routings)


def test_collects_in_order_and_with_gradients():
    model, x = Model(), tokens()
    with collect_routing(model) as routings:
        model(x)
        model(x[:3])
    assert [len(r.indices) for r in routings] == [TOKENS] * 4 + [3] * 4
    y = x
    for layer, routing in zip(model.layers, routings[:4], strict=True):
        assert torch.equal(layer.router(y).probabilities, routing.probabilities)
        y = y + layer(y)
    losses(routings).backward()
    assert all(layer.router.gate.grad.abs().sum() > 0 for layer in model.layers)
    model(x)
    assert len(routings) == 8  # the block is over


def test_nested_collections():
    model, x = Model(), tokens()
    with collect_routing(model) as outer:
        model(x)
        with collect_routing(model) as inner, collect_routing(model.layers[1]) as one:
            model(x)
        model(x)
    assert (len(outer), len(inner), len(one)) == (12, 4, 1)
    assert all(a is b for a, b in zip(outer[4:8], inner, strict=True))
    assert one[0] is inner[1]


def test_collection_ends_with_an_error_too():
    model = Model()
    with pytest.raises(ValueError, match="the layer takes"), collect_routing(model) as routings:
        model(torch.zeros(3, DIM + 1))
    model(tokens())
    assert routings == []
    with collect_routing(nn.Linear(2, 2)) as routings:
        pass
    assert routings == []


@pytest.mark.parametrize("inside", [False, True], ids=["backward after", "backward inside"])
def test_checkpointing_collects_once_and_trains_the_gates(inside):
    plain, model, x = Model(), Model(reentrant=False), tokens()
    model.load_state_dict(plain.state_dict())
    for m in (plain, model):
        with collect_routing(m) as routings:
            loss = m(x).square().mean() + losses(routings)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert len(routings) == 4
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_reentrant_checkpointing_collects_once_and_warns():
    model, x = Model(reentrant=True), tokens()
    with collect_routing(model) as routings:
        with pytest.warns(UserWarning, match="use_reentrant=False"):
            y = model(x)
        y.sum().backward()
    assert len(routings) == 4
    assert not losses(routings).requires_grad
    model.eval()
    with warnings.catch_warnings(), torch.no_grad(), collect_routing(model):
        warnings.filterwarnings("error", message="a routing was collected")
        model(x)


def test_checkpointing_gives_the_same_gradients_with_capacity_and_padding():
    moe, x = make("add", capacity_factor=0.7), tokens()
    plain = gradients(moe(x, PADDED), moe, x)
    again = gradients(checkpoint(moe, x, PADDED, use_reentrant=False), moe, x)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def replica(model: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes of a model, without its devices."""
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for original, copied in copies.items():
        for name, child in original._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, weight in original._parameters.items():
            if weight is not None:
                setattr(copied, name, weight.clone())
    return copies[model]


def test_replicas_in_threads():
    model, x = Model(), tokens(12)
    with collect_routing(model) as routings:
        outputs = [None, None, None]

        def run(i):
            outputs[i] = replica(model)(x[4 * i : 4 * i + 4])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(torch.cat(outputs), model(x))
    assert len(routings) == 12
    losses(routings).backward()
    assert all(layer.router.gate.grad.abs().sum() > 0 for layer in model.layers)


def test_copies():
    moe, x = make(), tokens()
    with collect_routing(moe) as routings:
        shallow, deep = copy.copy(moe), copy.deepcopy(moe)
        stored = pickle.loads(pickle.dumps(moe))
        for layer in (shallow, deep, stored):
            assert torch.equal(layer(x), make()(x))
    assert len(routings) == 1  # the shallow copy is the same layer, the others are not
    shallow(x)
    assert len(routings) == 1


def test_a_layer_used_twice_is_collected_twice():
    moe, x = make(), tokens()
    with collect_routing(nn.Sequential(moe, moe)) as routings:
        moe(moe(x))
    assert len(routings) == 2


# -- making one -----------------------------------------------------------------------------------


def test_shapes_names_and_initial_values():
    torch.manual_seed(0)
    moe = MoE(32, 64, 3, router=TopKRouter(32, 3, k=1), gated=True, bias=True)
    shapes = {name: tuple(weight.shape) for name, weight in moe.named_parameters()}
    assert shapes == {
        "w_in": (3, 128, 32),
        "w_out": (3, 32, 64),
        "b_in": (3, 128),
        "b_out": (3, 32),
        "router.gate": (3, 32),
    }
    assert moe.w_in.abs().max().item() == pytest.approx(32**-0.5, rel=0.01)
    assert moe.w_out.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    assert not torch.equal(moe.w_in[0], moe.w_in[1])  # every expert is its own
    plain = MoE(32, 64, 3, router=TopKRouter(32, 3, k=1), device="meta", dtype=torch.bfloat16)
    assert sorted(plain.state_dict()) == ["router.gate", "w_in", "w_out"]
    assert (plain.w_in.shape, plain.w_in.dtype) == ((3, 64, 32), torch.bfloat16)
    assert "experts=3" in repr(moe)
    assert "gated=True" in repr(moe)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden": 0}, "hidden is 0; it must be at least 1"),
        ({"experts": 3}, "the router was made for experts=4, the layer for experts=3"),
        ({"dim": 16}, "the router was made for dim=8, the layer for dim=16"),
        ({"activation": "swish"}, "activation is 'swish'; choose one of gelu"),
        ({"shared_weight": 0.5}, "it takes a shared module"),
        ({"shared": nn.Identity(), "shared_weight": 1.5}, r"from \[0, 1\]"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0; it must be positive"),
        ({"capacity_factor": math.nan}, "capacity_factor is nan"),
    ],
)
def test_refuses_to_make(options, said):
    given = {"dim": DIM, "hidden": HIDDEN, "experts": EXPERTS, "router": ROUTERS["switch"]()}
    with pytest.raises(ValueError, match=said):
        MoE(**given | options)


@pytest.mark.parametrize(
    ("x", "mask", "said"),
    [
        (torch.zeros(3, 9), None, r"takes \(..., 8\), given \(3, 9\)"),
        (torch.tensor(1.0), None, r"takes \(..., 8\), given \(\)"),
        (torch.zeros(3, 8, dtype=torch.float64), None, "weights are torch.float32, given torch.f"),
        (torch.zeros(2, 3, 8), torch.ones(6, dtype=torch.bool), r"shape \(2, 3\).*given \(6,\)"),
        (torch.zeros(2, 3, 8), torch.ones(2, 3), r"torch.float32.*mask.bool\(\)"),
    ],
)
def test_refuses_input(x, mask, said):
    with pytest.raises(ValueError, match=said):
        make("switch", torch.float32)(x, mask)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 3, 100])
@pytest.mark.parametrize("options", [{}, {"gated": True, "bias": True, "capacity_factor": 1.0}])
def test_meta_device_gives_shapes(router, tokens, options):
    moe = make(router, dtype=torch.float32, **options).to("meta")
    x = torch.empty(2, tokens, DIM, device="meta")
    mask = torch.ones(2, tokens, dtype=torch.bool, device="meta")
    for y in (moe(x), moe(x, mask)):
        assert y.is_meta
        assert y.requires_grad
        assert y.shape == x.shape
    with torch.no_grad():
        assert moe(x).shape == x.shape
