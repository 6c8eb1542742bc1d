"""Self-guided training: start, schedule, mixture, resuming, and the end of the guide."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from feedforward import BlockDense, BlockShuffle, LowRank, PreMerged, SelfGuided
from feedforward.layers.guided import advance, guide, release

LAYERS = {
    "lowrank": lambda **o: LowRank(12, 48, rank=5, **o),
    "shuffle-up": lambda **o: BlockShuffle(12, 48, blocks=2, **o),
    "shuffle-down": lambda **o: BlockShuffle(48, 12, blocks=4, **o),
    "blockdense": lambda **o: BlockDense(12, 48, rank=6, blocks=3, **o),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def guided(make=LAYERS["shuffle-up"], *, seed=0, steps=10, **options):
    torch.manual_seed(seed)
    layer = make()
    nn.init.normal_(layer.bias)
    return SelfGuided(layer, steps=steps, **options)


def model(**options):
    """A small network with two guided layers, one of them nested, and something dense."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.Sequential(
            SelfGuided(LowRank(12, 24, rank=4), steps=8, **options),
            nn.GELU(),
            SelfGuided(BlockShuffle(24, 12, blocks=2), steps=8, **options),
        ),
        nn.Linear(12, 3),
    )


def train(model, optimizer, steps, *, advance_too=True):
    for _ in range(steps):
        loss = model(torch.randn(16, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if advance_too:
            advance(model)


# the start


@every_layer
@pytest.mark.parametrize("stochastic", [True, False])
def test_switching_it_on_does_not_change_the_function(make, stochastic):
    """W_0 = U_0 V_0, with BlockShuffle's permutations."""
    module = guided(make, stochastic=stochastic)
    layer = module.layer
    x = torch.randn(7, layer.in_features)
    identity = torch.eye(layer.in_features)
    product = (layer(identity) - layer.bias).T
    assert module.guide.shape == (layer.out_features, layer.in_features)
    assert (module.guide - product).abs().max() < 1e-6
    assert module.alpha == 1.0
    for _ in range(5):
        assert (module(x) - layer(x)).abs().max() < 1e-5
        module.advance()


def test_the_guide_of_block_shuffle_is_not_the_product_without_shuffles():
    module = guided()
    plain = torch.block_diag(*module.layer.u) @ torch.block_diag(*module.layer.v)
    assert (module.guide - plain).norm() / module.guide.norm() > 0.5


@every_layer
def test_reset_parameters_starts_anew(make):
    module = guided(make)
    before = module.guide.detach().clone()
    module.advance()
    module.reset_parameters()
    assert module.alpha == 1.0
    assert not torch.equal(module.guide, before)
    assert (module.guide - module.layer.dense_weight()).abs().max() < 1e-6


# the schedule


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule(schedule):
    module = guided(steps=8, schedule=schedule)
    for t in range(12):
        part = min(t / 8, 1)
        expected = 0.5 * (1 + math.cos(math.pi * part)) if schedule == "cosine" else 1 - part
        assert module.alpha == pytest.approx(expected, abs=1e-12)
        assert type(module.alpha) is float
        assert module.step.item() == t
        module.advance()
    assert module.alpha == 0.0


def test_advance_reaches_every_guided_layer_once():
    network = model()
    advance(network)
    advance(network)
    assert [m.step.item() for m in network.modules() if isinstance(m, SelfGuided)] == [2, 2]


# the mixture


def expected_mixture(module, x):
    layer, alpha = module.layer, module.alpha
    structured = x @ layer.dense_weight().T
    return alpha * x @ module.guide.T + (1 - alpha) * structured + layer.bias


@every_layer
@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)], ids=str)
def test_mixture_with_the_bias_once(make, leading):
    module = guided(make, stochastic=False).double()
    nn.init.normal_(module.guide)
    x = torch.randn(*leading, module.in_features, dtype=torch.float64, requires_grad=True)
    for _ in range(10):
        torch.testing.assert_close(module(x), expected_mixture(module, x), rtol=1e-10, atol=1e-10)
        module.advance()
    torch.testing.assert_close(module(x), module.layer(x), rtol=0, atol=0)


def test_gradients_are_shared_out_by_alpha():
    module = guided(stochastic=False).double()
    for _ in range(3):
        module.advance()
    x = torch.randn(5, 12, dtype=torch.float64)
    module(x).sum().backward()
    ours = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    expected_mixture(module, x).sum().backward()
    assert set(ours) == {"guide", "layer.v", "layer.u", "layer.bias"}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)


# rectangular and odd, every width and rank
ODD = {
    "lowrank-up": lambda **o: LowRank(7, 15, rank=3, **o),
    "lowrank-down": lambda **o: LowRank(13, 5, rank=5, **o),
    "shuffle-up": lambda **o: BlockShuffle(9, 21, blocks=3, **o),
    "shuffle-down": lambda **o: BlockShuffle(35, 15, blocks=5, **o),
    "shuffle-square": lambda **o: BlockShuffle(25, 25, blocks=5, **o),
    "blockdense-up": lambda **o: BlockDense(15, 17, rank=9, blocks=3, **o),
    "blockdense-down": lambda **o: BlockDense(25, 11, rank=5, blocks=5, **o),
}


def written_out(layer, v, u, x):
    """U(Vx) of one layer entry by entry, as the paper defines it; all tensors in float64."""
    if isinstance(layer, LowRank):
        return torch.einsum("mr,rn,tn->tm", u, v, x)
    blocks = layer.blocks
    parts = x.chunk(blocks, dim=1)
    h = torch.cat([part @ block.T for part, block in zip(parts, v, strict=True)], dim=1)
    if isinstance(layer, BlockDense):
        return h @ u.T
    # entry j of h goes to block j mod B, position j div B; row i of block c is output i * B + c
    columns = [[] for _ in range(blocks)]
    for j in range(h.shape[1]):
        columns[j % blocks].append(h[:, j])
    results = [torch.stack(c, dim=1) @ block.T for c, block in zip(columns, u, strict=True)]
    return torch.stack([results[i % blocks][:, i // blocks] for i in range(layer.out_features)], 1)


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("done", [0, 2, 5], ids=lambda done: f"step {done} of 6")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_values_and_gradients_match_the_definition(make, bias, done, dtype, tolerance):
    """o = a Wx + (1 - a) U(Vx) + b, of which W, U, V, b and x get their gradients."""
    torch.manual_seed(1)
    layer = make(bias=bias, dtype=dtype)
    if bias:
        nn.init.normal_(layer.bias)
    module = SelfGuided(layer, steps=6, stochastic=False)
    nn.init.normal_(module.guide, std=0.3)
    for _ in range(done):
        module.advance()
    x = torch.randn(9, layer.in_features, dtype=dtype, requires_grad=True)
    weighting = torch.randn(9, layer.out_features, dtype=dtype)
    y = module(x)
    (y * weighting).sum().backward()

    given = {"x": x} | dict(module.named_parameters())
    assert set(given) == {"x", "guide", "layer.v", "layer.u"} | ({"layer.bias"} if bias else set())
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    alpha = 0.5 * (1 + math.cos(math.pi * done / 6))
    structured = written_out(layer, exact["layer.v"], exact["layer.u"], exact["x"])
    expected = alpha * exact["x"] @ exact["guide"].T + (1 - alpha) * structured
    if bias:
        expected = expected + exact["layer.bias"]
    (expected * weighting.double()).sum().backward()

    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for name, tensor in given.items():
        torch.testing.assert_close(
            tensor.grad.double(),
            exact[name].grad,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_the_guide_starts_as_the_layers_own_matrix_on_odd_shapes(make):
    torch.manual_seed(2)
    layer = make(dtype=torch.float64)
    identity = torch.eye(layer.in_features, dtype=torch.float64)
    product = written_out(layer, layer.v, layer.u, identity).T
    difference = SelfGuided(layer, steps=3).guide - product
    assert difference.abs().max() < 1e-14


def test_without_a_bias():
    module = SelfGuided(LowRank(6, 8, rank=2, bias=False), steps=4, stochastic=False)
    nn.init.normal_(module.guide)
    module.advance()
    x = torch.randn(3, 6)
    expected = module.alpha * x @ module.guide.T + (1 - module.alpha) * module.layer(x)
    torch.testing.assert_close(module(x), expected)
    assert "layer.bias" not in module.state_dict()


def test_stochastic_form_mixes_as_often_as_alpha_says():
    module = guided(steps=10, schedule="linear")
    nn.init.normal_(module.guide)
    for _ in range(3):
        module.advance()
    x = torch.randn(2, 12)
    structured, mixture = module.layer(x), expected_mixture(module, x)
    assert not torch.allclose(structured, mixture)
    with torch.no_grad():
        outputs = torch.stack([module(x) for _ in range(400)])
    mixes = (outputs - mixture).abs().amax((1, 2)) < 1e-4
    assert (mixes | ((outputs - structured).abs().amax((1, 2)) == 0)).all()
    assert mixes.sum().item() == pytest.approx(280, abs=37)  # four standard deviations


def test_stochastic_draws_follow_the_seed_and_are_replayed_by_checkpointing():
    module = guided(schedule="linear")
    for _ in range(5):
        module.advance()
    nn.init.normal_(module.guide)
    x = torch.randn(2, 12)

    def run():
        torch.manual_seed(1)
        return torch.stack([module(x) for _ in range(20)])

    assert torch.equal(run(), run())
    torch.manual_seed(1)
    again = [torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False) for _ in range(20)]
    torch.stack(again).sum().backward()  # raises if the second run drew otherwise
    replayed = module.guide.grad.clone()
    module.zero_grad()
    run().sum().backward()
    torch.testing.assert_close(replayed, module.guide.grad)


@pytest.mark.parametrize("stochastic", [True, False])
def test_eval_mode_is_plain_and_never_random(stochastic):
    module = guided(stochastic=stochastic)
    nn.init.normal_(module.guide)
    module.advance()
    module.eval()
    x = torch.randn(4, 12)
    state = torch.get_rng_state()
    outputs = [module(x) for _ in range(50)]
    assert all(torch.equal(y, module.layer(x)) for y in outputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_of_the_layer_is_kept():
    assert not SelfGuided(LowRank(6, 8, rank=2).eval(), steps=3).training


@every_layer
def test_made_under_autocast_the_guide_is_the_layers_own_weight(make):
    with torch.autocast("cpu", torch.bfloat16):
        layer = guided(make, stochastic=False)
    assert torch.equal(layer.guide, layer.layer.dense_weight())
    with torch.autocast("cpu", torch.bfloat16):
        layer.reset_parameters()
    assert torch.equal(layer.guide, layer.layer.dense_weight())
    assert layer(torch.ones(3, layer.in_features)).dtype == torch.float32


def test_autocast_mixes_in_bf16():
    module = guided(stochastic=False)
    module.advance()
    x = torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


# resuming


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [True, False])
def test_steps_are_not_compiled_one_by_one(stochastic, dtype, schedule):
    layer = guided(steps=12, stochastic=stochastic, schedule=schedule).to(dtype)
    plain = copy.deepcopy(layer)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=not stochastic)
    x = torch.randn(5, 12, dtype=dtype)
    counts, close = [], {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for step in range(16):
        results = []
        for one, call in ((layer, compiled), (plain, plain)):
            torch.manual_seed(step)
            y = call(x)
            y.sum().backward()
            one.advance()
            results.append(y)
        torch.testing.assert_close(*results, **close)
        counts.append(counter.frame_count)
    torch.testing.assert_close(layer.guide.grad, plain.guide.grad, **close)
    assert counts[11] == counts[4]  # with the guide and without it was seen before the fifth
    assert counts[-1] <= counts[11] + 1


def test_checkpoint_keys():
    keys = set(guided().state_dict())
    assert keys == {"guide", "step", "layer.v", "layer.u", "layer.bias"}


@pytest.mark.parametrize("assign", [True, False])
def test_resumed_training_ends_with_the_same_numbers(assign):
    def optimizer_of(network):
        return torch.optim.AdamW(network.parameters(), lr=0.01)

    whole = model()
    optimizer = optimizer_of(whole)
    torch.manual_seed(7)
    train(whole, optimizer, 3)
    file = io.BytesIO()
    torch.save(
        {
            "model": whole.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        },
        file,
    )
    train(whole, optimizer, 7)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = model()
    resumed.load_state_dict(saved["model"], assign=assign)
    assert resumed[1][0].alpha == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 8)))
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    train(resumed, optimizer, 7)

    assert resumed[1][0].alpha == whole[1][0].alpha == 0.0
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_deepcopy_goes_its_own_way():
    module = guided()
    module.advance()
    other = copy.deepcopy(module)
    other.load_state_dict(guided().state_dict())
    assert (module.step.item(), other.step.item()) == (1, 0)
    assert other.alpha == 1.0 > module.alpha


# the end of the guide


def test_release_of_one_layer():
    module = guided()
    layer = module.release()
    assert layer is module.layer
    assert set(layer.state_dict()) == {"v", "u", "bias"}
    # what is left of the wrapper is plain too
    assert [n for n, _ in module.named_parameters()] == ["layer.v", "layer.u", "layer.bias"]
    assert module.alpha == 0.0
    x = torch.randn(3, 12)
    assert torch.equal(module(x), layer(x))
    assert release(guided()).state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("groups", ["one", "guides apart"])
def test_release_takes_the_guides_from_model_optimizer_and_checkpoints(groups):
    network = model()
    guides = [m.guide for m in network.modules() if isinstance(m, SelfGuided)]
    if groups == "one":
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    else:
        others = [p for n, p in network.named_parameters() if not n.endswith("guide")]
        optimizer = torch.optim.AdamW([{"params": guides}, {"params": others}], lr=0.01)
    torch.manual_seed(0)
    train(network, optimizer, 4)
    assert all(guide in optimizer.state for guide in guides)
    network.eval()
    x = torch.randn(5, 6)
    before = network(x)

    assert release(network, optimizer) is network

    assert torch.equal(network(x), before)
    assert not any(isinstance(m, SelfGuided) for m in network.modules())
    ours = {id(p) for p in network.parameters()}
    assert ours.isdisjoint({id(guide) for guide in guides})
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert set(in_groups) == ours
    assert len(in_groups) == len(ours)
    assert {id(p) for p in optimizer.state} == ours
    assert len(optimizer.param_groups) == (1 if groups == "one" else 2)

    # the plain model, made without any guide, loads both checkpoints and trains on
    plain = nn.Sequential(
        nn.Linear(6, 12),
        nn.Sequential(LowRank(12, 24, rank=4), nn.GELU(), BlockShuffle(24, 12, blocks=2)),
        nn.Linear(12, 3),
    )
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain(x), before)
    if groups == "one":
        fresh = torch.optim.AdamW(plain.parameters(), lr=0.01)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for continued, its_optimizer in ((network, optimizer), (plain, fresh)):
            torch.manual_seed(1)
            continued.train()
            train(continued, its_optimizer, 3)
        for name, weight in network.state_dict().items():
            torch.testing.assert_close(plain.state_dict()[name], weight)


def test_release_of_a_layer_in_two_places():
    shared = guided(LAYERS["lowrank"])
    network = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})
    release(network)
    assert network["a"] is network["b"] is shared.layer
    assert release(network) is network  # nothing left to do


def test_training_with_a_guide_that_sleeps():
    """Where the draw goes against the guide it has no gradient, and the optimizer passes it by."""
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    torch.manual_seed(0)
    train(network, optimizer, 8)
    assert network[1][0].alpha == 0.0
    before = network[1][0].guide.detach().clone()
    train(network, optimizer, 2)
    assert torch.equal(network[1][0].guide, before)


# a whole model


class Tower(nn.Module):
    """Structured layers at several depths, one of them in three places, and dense ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 9)
        self.shared = BlockShuffle(9, 9, blocks=3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": LowRank(9, 15, rank=3),
                    "down": BlockDense(15, 9, rank=3, blocks=3, bias=False),
                    "again": self.shared,
                }
            )
            for _ in range(2)
        )

    def forward(self, x):
        x = self.shared(self.first(x))
        for block in self.blocks:
            x = x + block["again"](block["down"](block["up"](x).tanh()))
        return x


def tower():
    torch.manual_seed(4)
    return Tower()


def guided_layers(network):
    return [m for m in network.modules() if isinstance(m, SelfGuided)]


def test_guide_wraps_every_structured_layer_once():
    network = tower()
    structured = [
        m for m in network.modules() if isinstance(m, (LowRank, BlockShuffle, BlockDense))
    ]
    random = torch.get_rng_state()
    assert guide(network, steps=7, schedule="linear", stochastic=False) is network
    assert torch.equal(torch.get_rng_state(), random)  # what is drawn later does not change
    found = guided_layers(network)
    assert len(structured) == len(found) == 5
    assert {id(m.layer) for m in found} == {id(m) for m in structured}
    assert {(m.steps, m.schedule, m.stochastic) for m in found} == {(7, "linear", False)}
    assert network.shared is network.blocks[0]["again"] is network.blocks[1]["again"]
    assert type(network.first) is nn.Linear
    assert sum(name.endswith("guide") for name, _ in network.named_parameters()) == 5
    advance(network)
    assert [m.step.item() for m in found] == [1] * 5  # the shared one too


def test_guide_does_not_change_the_function():
    network, plain = tower(), tower()
    guide(network, steps=4)
    x = torch.randn(6, 5)
    for mode in (True, False):
        network.train(mode)
        torch.testing.assert_close(network(x), plain(x), rtol=1e-5, atol=1e-6)
    for module in guided_layers(network):
        nn.init.normal_(module.guide)
    assert torch.equal(network.eval()(x), plain(x))
    assert not torch.allclose(network.train()(x), plain(x))


def test_guide_has_the_right_gradients_at_its_start():
    """With a = 1 the guides get those of dense layers, and the structured ones none."""
    network = guide(tower().double(), steps=4, stochastic=False)
    dense = copy.deepcopy(network)
    for parent in dense.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, SelfGuided):
                linear = nn.Linear(child.in_features, child.out_features, dtype=torch.float64)
                linear.weight, linear.bias = child.guide, child.layer.bias
                setattr(parent, name, linear)
    dense.blocks[0]["again"] = dense.blocks[1]["again"] = dense.shared
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(network(x), dense(x), rtol=1e-10, atol=1e-10)
    network(x).square().sum().backward()
    dense(x).square().sum().backward()
    theirs = dict(dense.named_parameters())
    for name, parameter in network.named_parameters():
        if name.endswith((".v", ".u")):
            assert not parameter.grad.any(), name
            continue
        name = name.replace(".guide", ".weight").replace("layer.", "")
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-10, atol=1e-10)


def test_release_undoes_guide():
    network, plain = tower(), tower()
    release(guide(network, steps=4))
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert network.shared is network.blocks[0]["again"] is network.blocks[1]["again"]
    assert not guided_layers(network)
    assert guided_layers(guide(network, steps=4))  # and it can be guided again


def test_guide_leaves_the_guided_alone_and_adds_the_missing():
    network = nn.Sequential(guided(LAYERS["lowrank"]), LowRank(48, 6, rank=2))
    before = network[0]
    guide(network, steps=3)
    assert network[0] is before
    assert type(network[0].layer) is LowRank
    assert (network[0].steps, network[1].steps) == (10, 3)


def test_guide_of_one_layer_gives_the_guided_one():
    layer = LowRank(6, 8, rank=2)
    module = guide(layer, steps=3)
    assert isinstance(module, SelfGuided)
    assert module.layer is layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "Sequential has no structured.*replace_ffn"),
        (lambda: nn.Linear(3, 3), "Linear has no structured layer"),
        (lambda: guided(), "SelfGuided has no structured layer without a guide"),
        (
            lambda: nn.Sequential(PreMerged(LowRank(6, 8, rank=2), threshold=4)),
            "has a PreMerged layer.*merge then",
        ),
        (lambda: PreMerged(LowRank(6, 8, rank=2), threshold=4), "has a PreMerged layer"),
    ],
)
def test_guide_refuses_what_it_cannot_guide(make, message):
    with pytest.raises(ValueError, match=message):
        guide(make(), steps=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps is 0"), ({"steps": 3, "schedule": "step"}, "schedule is 'step'")],
)
def test_guide_that_is_refused_leaves_the_model_as_it_was(options, message):
    network = tower()
    with pytest.raises(ValueError, match=message):
        guide(network, **options)
    assert network.state_dict().keys() == tower().state_dict().keys()


# bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda layer: SelfGuided(layer, steps=0), "steps is 0"),
        (lambda layer: SelfGuided(layer, steps=-3), "steps is -3"),
        (lambda layer: SelfGuided(layer, steps=2.5), r"steps is 2\.5"),
        (lambda layer: SelfGuided(layer, steps=True), "steps is True"),
        (lambda layer: SelfGuided(layer, steps=3, schedule="step"), "'step'.*cosine, linear"),
        (lambda layer: SelfGuided(nn.Linear(2, 2), steps=3), "is a Linear; give a LowRank"),
        (lambda layer: SelfGuided(SelfGuided(layer, steps=3), steps=3), "is a SelfGuided"),
        (lambda layer: SelfGuided(PreMerged(layer, threshold=1), steps=3), "is a PreMerged"),
    ],
)
def test_arguments_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make(LowRank(6, 8, rank=2))


def test_wrong_width_of_the_input():
    with pytest.raises(ValueError, match="in_features = 12"):
        guided(stochastic=False)(torch.randn(3, 11))


def test_repr():
    text = repr(SelfGuided(LowRank(6, 8, rank=2), steps=3, schedule="linear"))
    assert "steps=3, schedule='linear', stochastic=True" in text
    assert "rank=2" in text


def test_the_guide_has_the_type_of_the_weights():
    module = SelfGuided(LowRank(6, 8, rank=2, dtype=torch.bfloat16), steps=3)
    assert module.guide.dtype == torch.bfloat16
    assert module.half().step.dtype == torch.int64
