"""The structured layers against explicit permutation matrices and block diagonals in float64."""

import copy
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from feedforward import BlockDense, BlockShuffle, LowRank, PreMerged
from feedforward.layers.structured import INITS, measure_threshold, search_threshold

# odd and rectangular on purpose: up, down and square, B dividing m/B and not, one block, full rank
CASES = {
    "lowrank-up": (LowRank, 7, 15, {"rank": 3}),
    "lowrank-down": (LowRank, 15, 7, {"rank": 7}),
    "shuffle-up": (BlockShuffle, 12, 30, {"blocks": 3}),
    "shuffle-down": (BlockShuffle, 30, 12, {"blocks": 2}),
    "shuffle-paper": (BlockShuffle, 12, 48, {"blocks": 2}),
    "shuffle-paper-down": (BlockShuffle, 48, 12, {"blocks": 4}),
    "shuffle-square": (BlockShuffle, 18, 18, {"blocks": 3}),
    "shuffle-thin": (BlockShuffle, 10, 25, {"blocks": 5}),
    "shuffle-one": (BlockShuffle, 5, 9, {"blocks": 1}),
    "dense-up": (BlockDense, 12, 17, {"rank": 9, "blocks": 3}),
    "dense-down": (BlockDense, 20, 11, {"rank": 10, "blocks": 5}),
    "dense-one": (BlockDense, 9, 11, {"rank": 4, "blocks": 1}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# every width odd, one wide, one as thin as can be: for what is compared with the definition
MORE = {
    "lowrank-odd": (LowRank, 129, 257, {"rank": 65}),
    "lowrank-thin": (LowRank, 13, 5, {"rank": 1}),
    "lowrank-column": (LowRank, 9, 1, {"rank": 1}),
    "shuffle-odd": (BlockShuffle, 15, 21, {"blocks": 3}),
    "shuffle-odd-down": (BlockShuffle, 45, 35, {"blocks": 5}),
    "shuffle-full": (BlockShuffle, 7, 21, {"blocks": 7}),
    "shuffle-wide": (BlockShuffle, 96, 384, {"blocks": 4}),
    "dense-odd": (BlockDense, 15, 23, {"rank": 9, "blocks": 3}),
    "dense-odd-down": (BlockDense, 35, 11, {"rank": 5, "blocks": 5}),
    "dense-wide": (BlockDense, 384, 96, {"rank": 64, "blocks": 4}),
}
more_cases = pytest.mark.parametrize("case", (CASES | MORE).values(), ids=(CASES | MORE).keys())
shuffles = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c[0] is BlockShuffle], ids=lambda c: f"{c[1:3]}{c[3]}"
)


def build(case, seed=0, **options):
    kind, n, m, sizes = case
    torch.manual_seed(seed)
    layer = kind(n, m, **sizes, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def shuffle_matrix(size, blocks):
    """P with (Ph)[(j mod B) * size/B + j div B] = h[j]."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for j in range(size):
        matrix[(j % blocks) * (size // blocks) + j // blocks, j] = 1
    return matrix


def unshuffle_matrix(size, blocks):
    """P with (Py)[i * B + c] = y[c * size/B + i]."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for c in range(blocks):
        for i in range(size // blocks):
            matrix[i * blocks + c, c * (size // blocks) + i] = 1
    return matrix


def oracle(layer, v, u):
    """The dense weight of the float64 tensors `v` and `u`, from explicit matrices."""
    if isinstance(layer, LowRank):
        return u @ v
    v = torch.block_diag(*v)
    if isinstance(layer, BlockDense):
        return u @ v
    u = torch.block_diag(*u)
    before = shuffle_matrix(v.shape[0], layer.blocks)
    return unshuffle_matrix(u.shape[0], layer.blocks) @ u @ before @ v


def test_the_two_shuffles_undo_each_other():
    product = unshuffle_matrix(12, 3) @ shuffle_matrix(12, 3)
    assert torch.equal(product, torch.eye(12, dtype=torch.float64))
    assert not torch.equal(shuffle_matrix(12, 3), shuffle_matrix(12, 3).T)


@more_cases
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_values_and_gradients_match_explicit_matrices(case, bias, dtype, tolerance):
    layer = build(case, dtype=dtype, bias=bias)
    x = torch.randn(2, 9, layer.in_features, dtype=dtype, requires_grad=True)
    weighting = torch.randn(2, 9, layer.out_features, dtype=dtype)
    y = layer(x)
    (y * weighting).sum().backward()

    given = {"x": x} | dict(layer.named_parameters())
    assert list(given) == ["x", "v", "u"] + ["bias"] * bias
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    weight = oracle(layer, exact["v"], exact["u"])
    expected = F.linear(exact["x"], weight, exact.get("bias"))
    (expected * weighting.double()).sum().backward()

    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for name, tensor in given.items():
        assert tensor.grad.shape == tensor.shape
        torch.testing.assert_close(
            tensor.grad.double(),
            exact[name].grad,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@shuffles
def test_many_tokens_are_dealt_out_as_few_are(case):
    layer = build(case, dtype=torch.float64)
    x = torch.randn(2 * layer.in_features, layer.in_features, dtype=torch.float64)
    one_by_one = torch.cat([layer(token) for token in x.split(1)])
    torch.testing.assert_close(layer(x), one_by_one, rtol=1e-12, atol=1e-12)


@every_case
def test_any_leading_dimensions_with_and_without_gradients(case):
    layer = build(case, dtype=torch.float64)
    weight = oracle(layer, layer.v, layer.u).detach()
    for leading in ((), (0,), (1,), (17,), (2, 0, 3), (2, 3, 5)):
        x = torch.randn(*leading, layer.in_features, dtype=torch.float64)
        expected = F.linear(x, weight, layer.bias)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@every_case
def test_an_input_that_is_not_contiguous(case):
    layer = build(case, dtype=torch.float64)
    x = torch.randn(layer.in_features, 2, 20, dtype=torch.float64).permute(2, 1, 0)
    expected = F.linear(x, oracle(layer, layer.v, layer.u), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:3]), expected[:3])


@every_case
def test_dense_weight_and_to_linear(case):
    layer = build(case, dtype=torch.float64).eval()
    weight = layer.dense_weight()
    assert weight.shape == (layer.out_features, layer.in_features)
    torch.testing.assert_close(weight, oracle(layer, layer.v, layer.u), rtol=1e-10, atol=1e-10)
    weight.sum().backward()
    assert layer.v.grad.any()
    assert layer.u.grad.any()

    linear = layer.to_linear()
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-10, atol=1e-10)
    assert type(linear) is nn.Linear
    assert not linear.training
    assert all(p.requires_grad and p.is_leaf for p in linear.parameters())
    before = layer.bias.clone()
    with torch.no_grad():
        linear.bias.add_(1)  # a copy: the structured layer does not follow
    assert torch.equal(layer.bias, before)
    assert build(case, bias=False).to_linear().bias is None


@every_case
def test_gradcheck(case):
    layer = build(case, dtype=torch.float64)
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)

    def function(x, *weights):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)

    torch.autograd.gradcheck(function, (x, *layer.parameters()), fast_mode=True)


def test_one_block_is_low_rank():
    low, block = LowRank(10, 14, rank=6), BlockDense(10, 14, rank=6, blocks=1)
    block.load_state_dict({"v": low.v[None], "u": low.u, "bias": torch.ones(14)})
    nn.init.ones_(low.bias)
    x = torch.randn(20, 10)
    torch.testing.assert_close(block(x), low(x))
    torch.testing.assert_close(block.dense_weight(), low.dense_weight())


@shuffles
def test_every_output_sees_every_input_only_through_the_shuffle(case):
    layer = build(case)
    if layer.v.shape[1] >= layer.blocks:  # else nothing runs between some pairs of blocks
        assert (layer.dense_weight() != 0).all()
    if layer.blocks > 1:
        unshuffled = torch.block_diag(*layer.u) @ torch.block_diag(*layer.v)
        assert (unshuffled == 0).any()
        assert not torch.allclose(unshuffled, layer.dense_weight())


@every_case
def test_names_shapes_and_counts(case):
    kind, n, m, sizes = case
    layer = build(case)
    b, r, least = layer.__dict__.get("blocks"), layer.__dict__.get("rank"), min(n, m)
    shapes = {
        LowRank: lambda: ((r, n), (m, r)),
        BlockShuffle: lambda: ((b, least // b, n // b), (b, m // b, least // b)),
        BlockDense: lambda: ((b, r // b, n // b), (m, r)),
    }[kind]()
    assert [name for name, _ in layer.named_parameters()] == ["v", "u", "bias"]
    assert (tuple(layer.v.shape), tuple(layer.u.shape)) == shapes
    formula = {
        LowRank: lambda: r * (n + m),
        BlockShuffle: lambda: least * (n + m) // b,
        BlockDense: lambda: r * (m + n // b),
    }[kind]()
    assert kind.weight_count(n, m, **sizes) == formula == layer.v.numel() + layer.u.numel()
    assert layer.flops_per_token == 2 * formula
    assert f"in_features={n}, out_features={m}" in repr(layer)
    for name, size in sizes.items():
        assert f"{name}={size}" in repr(layer)


# how weights start


def assert_orthonormal(matrices):
    rows, columns = matrices.shape[-2:]
    gram = matrices @ matrices.mT if rows <= columns else matrices.mT @ matrices
    torch.testing.assert_close(
        gram, torch.eye(min(rows, columns)).expand_as(gram), atol=1e-5, rtol=0
    )


@every_case
def test_orthonormal_init(case):
    layer = build(case, init="orthonormal")
    assert_orthonormal(layer.v.detach())
    assert_orthonormal(layer.u.detach())


@every_case
def test_gaussian_init(case):
    kind, n, m, sizes = case
    torch.manual_seed(0)
    layer = kind(40 * n, 40 * m, **sizes, init="gaussian")
    for weight in (layer.v, layer.u):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not layer.bias.any()


@every_case
def test_spectral_init_splits_each_singular_value_evenly(case):
    """V V^T = U^T U at every place where V and U meet is what an even split means."""
    layer = build(case, init="spectral", dtype=torch.float64)
    v, u = layer.v.detach(), layer.u.detach()
    if isinstance(layer, LowRank):
        torch.testing.assert_close(v @ v.T, u.T @ u)
    elif isinstance(layer, BlockDense):
        u = u.view(layer.out_features, layer.blocks, -1).transpose(0, 1)
        torch.testing.assert_close(v @ v.mT, u.mT @ u)
    else:
        torch.testing.assert_close(v.square().sum(), u.square().sum())


def test_spectral_low_rank_is_the_truncation_of_a_gaussian_of_std_0_02():
    torch.manual_seed(3)
    layer = LowRank(30, 50, rank=8, init="spectral")
    torch.manual_seed(3)
    gaussian = torch.randn(50, 30) * 0.02
    left, values, right = torch.linalg.svd(gaussian)
    best = left[:, :8] * values[:8] @ right[:8]
    torch.testing.assert_close(layer.dense_weight(), best, atol=1e-6, rtol=1e-4)


@every_case
def test_spectral_init_keeps_a_matrix_that_has_the_structure(case):
    layer = build(case, dtype=torch.float64, init="gaussian")
    weight = layer.dense_weight().detach()
    with torch.no_grad():
        for parameter, part in zip((layer.v, layer.u), layer._project(weight), strict=True):
            assert part.shape == parameter.shape
            parameter.copy_(part)
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", [LowRank, BlockShuffle, BlockDense])
def test_default_init_is_the_papers(kind):
    layer = kind.from_ratio(16, 64)
    assert layer.init == ("spectral" if kind is LowRank else "orthonormal")


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_starts_and_computes(init, dtype):
    for name in ("lowrank-up", "shuffle-up", "shuffle-thin", "dense-up"):
        layer = build(CASES[name], init=init, dtype=dtype)
        x = torch.randn(3, layer.in_features, dtype=dtype)
        weight = oracle(layer, layer.v.double(), layer.u.double())
        y = layer(x)
        assert y.dtype == layer.v.dtype == dtype
        expected = F.linear(x.double(), weight, layer.bias.double())
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)


@every_case
def test_reset_parameters_draws_anew(case):
    layer = build(case)
    v, u = layer.v.detach().clone(), layer.u.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.v, v)
    assert not torch.equal(layer.u, u)
    assert not layer.bias.any()
    torch.manual_seed(5)
    layer.reset_parameters()
    again = layer.v.detach().clone()
    torch.manual_seed(5)
    layer.reset_parameters()
    assert torch.equal(layer.v, again)


@every_case
def test_meta_device_allocates_and_draws_nothing(case):
    state = torch.get_rng_state()
    layer = case[0](case[1], case[2], **case[3], device="meta")
    assert layer.v.is_meta
    assert layer.u.is_meta
    assert layer.dense_weight().shape == (case[2], case[1])
    assert torch.equal(torch.get_rng_state(), state)


# from_ratio


@pytest.mark.parametrize("width", [128, 384, 768, 1024, 1536, 2048])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_from_ratio_picks_what_the_paper_picked(width, up):
    n, m = (width, 4 * width) if up else (4 * width, width)
    for share, divisor in ((0.63, 2), (0.625, 2), (0.32, 4), (0.3125, 4)):
        made = {"parameters": share, "device": "meta"}
        assert LowRank.from_ratio(n, m, **made).rank == width // divisor
        assert BlockShuffle.from_ratio(n, m, **made).blocks == divisor
        if width % 3 == 0:
            assert BlockDense.from_ratio(n, m, **made).rank == 4 * width // divisor // 3
    for share, rank in ((0.586, 3 * width // 4), (0.293, 3 * width // 8)):
        made = {"parameters": share, "blocks": 4, "device": "meta"}
        assert BlockDense.from_ratio(n, m, **made).rank == rank


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.4, 0.5, 0.75])
@pytest.mark.parametrize(("n", "m"), [(96, 250), (250, 96), (98, 388), (640, 640)])
def test_from_ratio_is_close_to_any_share(share, n, m):
    def count(kind, n, m):
        return kind.from_ratio(n, m, parameters=share, device="meta").flops_per_token / 2

    # round within 2.5 %, or the nearest that there is
    tolerance = max(0.0251 * share, (n + m) / (n * m))
    assert count(LowRank, n, m) / (n * m) == pytest.approx(share, abs=tolerance)
    # BlockDense: the share of a layer and its mirror image together
    both = count(BlockDense, n, m) + count(BlockDense, m, n)
    assert both / (2 * n * m) == pytest.approx(share, abs=tolerance)


def test_from_ratio_gives_both_layers_of_an_ffn_the_same_rank():
    for kind in (LowRank, BlockDense):
        up, down = (kind.from_ratio(*widths, device="meta") for widths in ((96, 384), (384, 96)))
        assert up.rank == down.rank


def test_from_ratio_passes_the_other_arguments_on():
    layer = BlockDense.from_ratio(
        12, 24, parameters=0.5, blocks=3, bias=False, init="gaussian", dtype=torch.float64
    )
    assert (layer.blocks, layer.bias, layer.init) == (3, None, "gaussian")
    assert layer.v.dtype == torch.float64


@pytest.mark.parametrize("kind", [LowRank, BlockShuffle, BlockDense])
@pytest.mark.parametrize("share", [0, -0.1, 1.5, math.nan])
def test_from_ratio_refuses_a_share_that_is_none(kind, share):
    with pytest.raises(ValueError, match="above 0, at most 1"):
        kind.from_ratio(8, 32, parameters=share)


# bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(8, 32, rank=9), r"rank is 9.*from 1 to 8"),
        (lambda: LowRank(32, 8, rank=9), r"rank is 9.*from 1 to 8"),
        (lambda: LowRank(8, 32, rank=0), "rank is 0"),
        (lambda: LowRank(8, 32, rank=2.0), r"rank is 2\.0"),
        (lambda: LowRank(0, 32, rank=1), "in_features is 0"),
        (lambda: LowRank(8, -1, rank=1), "out_features is -1"),
        (lambda: LowRank(8, 32, rank=2, init="kaiming"), "kaiming.*spectral, orthonormal, gauss"),
        (lambda: BlockShuffle(9, 32, blocks=2), "in_features = 9 .*2 equal blocks.*: 1$"),
        (lambda: BlockShuffle(24, 36, blocks=5), "in_features = 24 .*: 1, 2, 3, 4, 6, 12$"),
        (lambda: BlockShuffle(8, 31, blocks=2), "out_features = 31"),
        (lambda: BlockShuffle(8, 32, blocks=0), "blocks is 0"),
        (lambda: BlockShuffle(8, 32, blocks=-2), "blocks is -2"),
        (lambda: BlockShuffle(8, 32, blocks=True), "blocks is True"),
        (lambda: BlockShuffle(8, 32, blocks=2, init=None), "init is None"),
        (lambda: BlockShuffle.from_ratio(7, 11), "no common divisor"),
        (lambda: BlockDense(8, 32, rank=12, blocks=2), "rank is 12.*from 1 to 8"),
        (lambda: BlockDense(9, 32, rank=4, blocks=2), "in_features = 9"),
        (lambda: BlockDense(8, 32, rank=5, blocks=2), "rank = 5 cannot be cut"),
        (lambda: BlockDense(8, 32, rank=4, blocks=0), "blocks is 0"),
        (lambda: BlockDense(8, 32, rank=4, blocks=2, init=""), "init is ''"),
        (lambda: BlockDense.from_ratio(9, 32), "in_features = 9"),
        (lambda: BlockDense.weight_count(8, 32, rank=5, blocks=2), "rank = 5"),
    ],
)
def test_arguments_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_case
def test_wrong_width_of_the_input(case):
    layer = build(case)
    premerged = PreMerged(build(case), threshold=100).eval()
    for shape in ((3, layer.in_features + 1), (2 * layer.in_features,), (layer.in_features, 1), ()):
        for module in (layer, premerged):
            with pytest.raises(ValueError, match=rf"in_features = {layer.in_features}"):
                module(torch.zeros(shape))
            with pytest.raises(ValueError, match="last dimension"), torch.no_grad():
                module(torch.zeros(shape))


# in company


@every_case
def test_autocast(case):
    layer = build(case)
    for tokens in (3, 40):
        x = torch.randn(tokens, layer.in_features)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            with torch.no_grad():
                inferred = layer(x)
        assert y.dtype == inferred.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
        torch.testing.assert_close(inferred, y)
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["lowrank-up", "shuffle-up", "dense-up"])
def test_compiles_whole(name):
    layer = build(CASES[name])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(5, layer.in_features)
    compiled(x).sum().backward()
    gradient = layer.v.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.v.grad, gradient)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", ["lowrank-up", "shuffle-up", "shuffle-paper", "dense-up"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_an_exported_graph_is_for_any_number_of_tokens(name, mode):
    layer = build(CASES[name])
    tokens = torch.export.Dim("tokens", max=4096)
    with mode():
        example = torch.randn(2, layer.in_features)
        graph = torch.export.export(layer, (example,), dynamic_shapes=({0: tokens},)).module()
        for number in (1, 2, 17, 100):
            x = torch.randn(number, layer.in_features)
            torch.testing.assert_close(graph(x), layer(x))


@every_case
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.filterwarnings("ignore")  # of the check of the width, which is one of the example
def test_a_traced_graph_is_for_any_number_of_tokens(case, mode):
    layer = build(case)
    for number in (2, 100):
        with mode():
            traced = torch.jit.trace(layer, torch.randn(number, layer.in_features))
        for other in (1, 17, 100):
            x = torch.randn(other, layer.in_features)
            torch.testing.assert_close(traced(x), layer(x))


@every_case
def test_state_dict_round_trip_and_deepcopy(case):
    layer, other = build(case), build(case, seed=1)
    assert list(layer.state_dict()) == ["v", "u", "bias"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, layer.in_features)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


# PreMerged


def spy(monkeypatch):
    """Counts how often the structured way is taken."""
    calls = []
    for kind in (LowRank, BlockShuffle, BlockDense):
        original = kind._multiply
        monkeypatch.setattr(
            kind,
            "_multiply",
            lambda self, x, original=original: (calls.append(len(x)), original(self, x))[1],
        )
    return calls


@every_case
def test_premerged_is_dense_up_to_the_threshold(case, monkeypatch):
    calls = spy(monkeypatch)
    layer = build(case, dtype=torch.float64)
    merged = PreMerged(layer, threshold=4).eval()
    inputs = [
        torch.randn(*s, layer.in_features, dtype=torch.float64)
        for s in ((), (0,), (1,), (4,), (2, 2), (5,), (2, 3))
    ]
    with torch.no_grad():
        outputs = [merged(x) for x in inputs]
        assert calls == [5, 6]
        for x, y in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(y, layer(x), rtol=1e-10, atol=1e-10)


class Operations(TorchDispatchMode):
    """Lists what torch is told to compute, and on which tensors: their names or their shapes."""

    def __init__(self, **named):
        super().__init__()
        self.names = {tensor.data_ptr(): name for name, tensor in named.items()}
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = [self.names.get(t.data_ptr(), tuple(t.shape)) for t in tensors]
        self.done.append((func, known))
        return func(*args, **kwargs)


@torch.no_grad()
@every_case
def test_premerged_computes_what_the_way_it_takes_does_and_nothing_else(case):
    """So it can be slower than the faster of the two ways by no more than its decision."""
    layer = build(case)
    merged = PreMerged(layer, threshold=4).eval()

    def operations(run, x):
        named = {"x": x, "W": merged.merged} | dict(layer.named_parameters())
        with Operations(**named) as listed:
            run(x)
        return listed.done

    def dense(x):
        return F.linear(x, merged.merged, layer.bias)

    for tokens in (1, 4, 5, 40):
        x = torch.randn(tokens, layer.in_features)
        taken, ways = operations(merged, x), {way: operations(way, x) for way in (dense, layer)}
        assert taken == ways[dense if tokens <= 4 else layer]
        assert ways[dense] != ways[layer]


@torch.no_grad()
def test_premerged_decides_in_few_calls():
    """Counted are those of functions, in Python and below it; a time would be the machine's too."""
    layer = build(CASES["lowrank-up"])
    merged = PreMerged(layer, threshold=4).eval()
    plain = layer.to_linear()

    def calls(run, x):
        run(x)
        events = []
        sys.setprofile(lambda frame, event, what: events.append(event))
        try:
            run(x)
        finally:
            sys.setprofile(None)
        return sum(event.endswith("call") for event in events)

    for tokens, way in ((4, plain), (5, layer)):
        x = torch.randn(tokens, layer.in_features)
        assert calls(merged, x) - calls(way, x) <= 20


def test_premerged_threshold_zero_never_merges(monkeypatch):
    calls = spy(monkeypatch)
    merged = PreMerged(LowRank(6, 8, rank=2), threshold=0).eval()
    with torch.no_grad():
        merged(torch.randn(6))
    assert calls == [1]


def test_premerged_trains_the_structured_weights(monkeypatch):
    calls = spy(monkeypatch)
    merged = PreMerged(LowRank(6, 8, rank=2), threshold=100)
    assert merged.merged is None
    merged(torch.randn(3, 6)).sum().backward()
    with torch.no_grad():
        merged(torch.randn(3, 6))  # training mode decides, not the gradient
    assert calls == [3, 3]
    # gradients are not lost in eval mode either
    merged.eval().zero_grad()
    merged(torch.randn(3, 6)).sum().backward()
    assert merged.layer.v.grad.any()
    # frozen weights use the dense one under autograd too, and pass the input's gradient on
    merged.requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    merged(x).sum().backward()
    assert calls == [3, 3, 3]
    torch.testing.assert_close(x.grad, merged.layer.dense_weight().sum(0).expand(3, 6))


@torch.no_grad()
@pytest.mark.parametrize(
    "change", ["train", "in place", "replaced", "load", "load assigned", "load parent"]
)
def test_premerged_follows_the_weights(change):
    torch.manual_seed(0)
    layer = BlockShuffle(6, 8, blocks=2)
    merged = PreMerged(layer, threshold=100).eval()
    x = torch.randn(3, 6)
    before = merged(x)
    state = {name: 2 * weight for name, weight in merged.state_dict().items()}
    if change == "train":
        merged.train()
        assert merged.merged is None
        layer.v.mul_(2)
        merged.eval()
    elif change == "in place":
        layer.u.mul_(2)
    elif change == "replaced":
        layer.u = nn.Parameter(2 * layer.u)
    elif change == "load parent":
        nn.Sequential(merged).load_state_dict({f"0.{n}": w for n, w in state.items()})
    else:
        merged.load_state_dict(state, assign="assigned" in change)
    after = merged(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, layer(x))


def test_premerged_keeps_the_dense_weight_out_of_checkpoints_and_moves_with_the_module():
    merged = PreMerged(LowRank(6, 8, rank=2), threshold=4).eval()
    assert list(merged.state_dict()) == ["layer.v", "layer.u", "layer.bias"]
    assert "merged" not in dict(merged.named_parameters())
    merged.to(torch.bfloat16)
    assert merged.merged.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        merged.float().layer.v.mul_(2)
        merged(torch.randn(6))
    assert merged.merged.dtype == torch.float32
    copied = copy.deepcopy(merged)
    with torch.no_grad():
        copied.load_state_dict({n: 3 * w for n, w in merged.state_dict().items()})
        x = torch.randn(6)
        torch.testing.assert_close(copied(x), copied.layer(x))
        assert not torch.allclose(copied(x), merged(x))


def test_premerged_works_in_inference_mode():
    with torch.inference_mode():
        merged = PreMerged(LowRank(6, 8, rank=2), threshold=4).eval()
        x = torch.randn(6)
        torch.testing.assert_close(merged(x), merged.layer(x))


def test_premerged_compiles_whole():
    merged = PreMerged(LowRank(6, 8, rank=2), threshold=4).eval()
    compiled = torch.compile(merged, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (2, 6):
            x = torch.randn(tokens, 6)
            torch.testing.assert_close(compiled(x), merged.layer(x))
        merged.load_state_dict({n: 2 * w for n, w in merged.state_dict().items()})
        x = torch.randn(2, 6)
        torch.testing.assert_close(compiled(x), merged.layer(x))


@pytest.mark.parametrize("step", ["AdamW", "SGD", ".data"])
def test_premerged_follows_what_writes_past_the_count_of_changes(step):
    merged = PreMerged(LowRank(6, 8, rank=2), threshold=4).eval()
    x = torch.randn(3, 6)
    for _ in range(2):
        merged(x).square().mean().backward()
        if step == ".data":
            for weight in merged.parameters():
                weight.data -= weight.grad
        else:
            getattr(torch.optim, step)(merged.parameters(), lr=0.1, fused=True).step()
        merged.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(merged(x), merged.layer(x))
    # without gradients of its own nothing is made anew
    kept = merged.requires_grad_(False).merged
    merged(x.requires_grad_()).sum().backward()
    assert merged.merged is kept


@pytest.mark.parametrize("name", ["v", "u", "bias"])
@pytest.mark.parametrize("change", ["weight norm", "pruned"])
def test_premerged_leaves_weights_that_are_made_anew_to_the_layer(name, change):
    merged = PreMerged(LowRank(6, 8, rank=2), threshold=4).eval()
    torch.nn.init.normal_(merged.layer.bias)
    x = torch.randn(3, 6)
    with torch.no_grad():
        merged(x)
    if change == "pruned":
        prune.random_unstructured(merged.layer, name, 0.5)
    else:
        parametrizations.weight_norm(merged.layer, name)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.mul_(2)
        assert torch.equal(merged(x), merged.layer(x))
        merged.train().eval()
        assert torch.equal(merged(x), merged.layer(x))
        if change == "pruned":
            prune.remove(merged.layer, name)
        else:
            parametrize.remove_parametrizations(merged.layer, name)
        torch.testing.assert_close(merged(x), merged.layer(x))


def test_premerged_in_a_replica():
    merged = PreMerged(LowRank(6, 8, rank=2), threshold=4).eval()
    # what nn.DataParallel makes for another device: weights are attributes there
    replica, layer = merged._replicate_for_data_parallel(), merged.layer
    replica.layer = layer._replicate_for_data_parallel()
    for name, weight in layer.named_parameters():
        setattr(replica.layer, name, weight.detach().clone())
    x = torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(replica(x), layer(x))


def test_premerged_gives_autograd_no_tensor_of_inference_mode():
    merged = PreMerged(LowRank(6, 8, rank=2), threshold=4).eval().requires_grad_(False).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.inference_mode():
        merged(x)
    merged(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, merged.layer.dense_weight().sum(0).expand(3, 6))


@torch.no_grad()
@pytest.mark.parametrize("merge", [False, True])
@every_case
def test_transforms_of_functions_without_gradients(case, merge):
    layer = build(case, dtype=torch.float64).eval()
    module = PreMerged(layer, threshold=8) if merge else layer
    x, dx = torch.randn(2, 2, 3, layer.in_features, dtype=torch.float64)
    expected = F.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(torch.func.vmap(module)(x), expected)
    tangent = F.linear(dx, layer.dense_weight())
    torch.testing.assert_close(torch.func.jvp(module, (x[0],), (dx[0],))[1], tangent[0])
    with forward_ad.dual_level():
        y = module(forward_ad.make_dual(x[0], dx[0]))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, tangent[0])
    # three layers at once, on the same input
    stacked = {n: torch.stack([w, 2 * w, 3 * w]) for n, w in module.named_parameters()}
    y = torch.func.vmap(lambda w: torch.func.functional_call(module, w, (x[0],)))(stacked)
    torch.testing.assert_close(y[0], expected[0])
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("merge", [False, True])
@every_case
def test_vmap_over_one_of_the_weights(case, merge):
    layer = build(case, dtype=torch.float64).eval()
    module = PreMerged(layer, threshold=8) if merge else layer
    for tokens in (3, 40):
        x = torch.randn(tokens, layer.in_features, dtype=torch.float64)
        for name, weight in module.named_parameters():

            def function(w, name=name, x=x):
                return torch.func.functional_call(module, {name: w}, (x,))

            three = torch.stack([weight, 2 * weight, 3 * weight])
            each = torch.stack([function(w) for w in three])
            torch.testing.assert_close(torch.func.vmap(function)(three), each)


@pytest.mark.parametrize("merge", [False, True])
@every_case
def test_meta_device_gives_shapes(case, merge):
    layer = build(case, device="meta").eval()
    module = PreMerged(layer, threshold=8) if merge else layer
    for tokens in (2, 40):
        with torch.no_grad():
            y = module(torch.empty(tokens, layer.in_features, device="meta"))
        assert y.is_meta
        assert y.shape == (tokens, layer.out_features)
    # filled later, it computes as if it had been made there
    filled = build(case, seed=1).eval()
    module.to_empty(device="cpu")
    layer.load_state_dict(filled.state_dict())
    x = torch.randn(2, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(module(x), filled(x))


@every_case
def test_made_dense_under_autocast_it_is_as_exact(case):
    layer = build(case)
    with torch.autocast("cpu", torch.bfloat16):
        linear = layer.to_linear()
    assert torch.equal(linear.weight, layer.dense_weight())


@pytest.mark.parametrize("threshold", [-1, 1.5, "auto", None, True])
def test_premerged_refuses_a_bad_threshold(threshold):
    with pytest.raises(ValueError, match="threshold is"):
        PreMerged(LowRank(6, 8, rank=2), threshold=threshold)


def test_premerged_refuses_another_layer():
    with pytest.raises(ValueError, match=r"is a Linear; .*LowRank"):
        PreMerged(nn.Linear(6, 8), threshold=1)
    with pytest.raises(ValueError, match="meta"):
        PreMerged(LowRank(6, 8, rank=2, device="meta"), threshold="measure")


def clocked(monkeypatch, dense, structured):
    """Gives the two ways these times, as functions of the tokens, on a clock of our own."""
    now = [0.0]
    clock = SimpleNamespace(**dict.fromkeys(("perf_counter", "process_time"), lambda: now[0]))
    clock.monotonic = time.monotonic
    monkeypatch.setattr("feedforward.timing.time", clock)
    linear, multiply = F.linear, LowRank._multiply

    def slow_linear(x, weight, bias=None):
        if weight.shape == (8, 6):
            now[0] += dense(x.shape[0])
        return linear(x, weight, bias)

    def slow_multiply(self, x):
        now[0] += structured(x.shape[0])
        return multiply(self, x)

    monkeypatch.setattr("feedforward.layers.structured.F.linear", slow_linear)
    monkeypatch.setattr(LowRank, "_multiply", slow_multiply)


@pytest.mark.parametrize("found", [0, 1, 2, 5, 23, 1024])
def test_premerged_measures_the_crossing(found, monkeypatch):
    """With a clock that makes the dense weight win up to that many tokens."""
    crossing = 10**6 if found == 1024 else found + 0.5
    clocked(monkeypatch, lambda tokens: tokens, lambda tokens: crossing)
    merged = PreMerged(LowRank(6, 8, rank=2), threshold="measure")
    assert merged.threshold == found
    assert f"threshold={found}" in repr(merged)
    assert merged.measure(largest=16, rounds=3) == min(found, 16)
    assert measure_threshold([merged.layer] * 3, rounds=3) == found


@pytest.mark.parametrize(
    ("dense", "found"),
    [
        ({1: 0.9, 2: 1.04, 4: 0.5}, 4),  # loses a little with 2 tokens and wins much with 4
        ({1: 1.5, 2: 1.04, 4: 0.9}, 0),  # wins less with 4 tokens than it loses with 1
        ({1: 1.2, 2: 1.2, 4: 0.1}, 0),  # lost twice in a row: nobody looks further
        ({1: 0.9, 2: 0.9, 4: 1.1, 8: 0.9, 16: 0.9}, 16),  # one of them was timed badly
    ],
)
def test_where_no_threshold_is_right_it_costs_as_little_as_it_can(dense, found):
    assert search_threshold(lambda tokens: dense.get(tokens, 1.5)) == found


@pytest.mark.parametrize("largest", [1, 3, 16, 48, 63, 100])
@pytest.mark.parametrize("crossing", [0, 1, 5, 31, 32, 33, 47, 48, 1000])
def test_the_search_goes_on_to_the_largest_number(largest, crossing):
    asked = []

    def ratio(tokens):
        asked.append(tokens)
        return 0.5 if tokens <= crossing else 2.0

    assert search_threshold(ratio, largest=largest) == min(crossing, largest)
    assert max(asked) <= largest


def test_a_threshold_is_of_layers_that_can_be_timed():
    for layers, says in (
        ([], "no layers"),
        ([LowRank(6, 8, rank=2), nn.Linear(6, 8)], "is a Linear"),
        ([LowRank(6, 8, rank=2, device="meta")], "meta"),
    ):
        with pytest.raises(ValueError, match=says):
            measure_threshold(layers)
    with pytest.raises(ValueError, match="largest is 0"):
        measure_threshold([LowRank(6, 8, rank=2)], largest=0)


def test_premerged_measures_with_a_real_clock():
    merged = PreMerged(BlockDense(8, 16, rank=4, blocks=2), threshold="measure")
    assert 0 <= merged.threshold <= 1024
    assert merged.measure(largest=2, rounds=3) in {0, 1, 2}
