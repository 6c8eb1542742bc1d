"""Routers and their losses against plain loops, and the faults found in other implementations."""

import math

import pytest
import torch

from feedforward import (
    Routing,
    ScaleAdapterRouter,
    SwitchRouter,
    TopKRouter,
    load_balancing_loss,
    router_z_loss,
)

DIM, EXPERTS, TOKENS = 6, 5, 11
ROUTERS = {
    "top-k": lambda **o: TopKRouter(DIM, EXPERTS, k=2, **o),
    "top-k, as they are": lambda **o: TopKRouter(DIM, EXPERTS, k=3, renormalize=False, **o),
    "switch": lambda **o: SwitchRouter(DIM, EXPERTS, **o),
    "add": lambda **o: ScaleAdapterRouter(DIM, EXPERTS, k=2, **o),
    "concat": lambda **o: ScaleAdapterRouter(DIM, EXPERTS, k=2, combine="concat", **o),
}


def make(name: str, dtype=torch.float64):
    torch.manual_seed(3)
    router = ROUTERS[name](dtype=dtype)
    with torch.no_grad():  # far apart logits, and scales of both signs
        for weight in router.parameters():
            weight.normal_()
    return router


def tokens(count: int = TOKENS, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64).to(dtype)


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def by_hand(name: str, router, x: list[float]) -> tuple[list[int], list[float], list[float]]:
    """Chosen experts, weights and probabilities of one token, from the equations."""
    p = softmax([dot(row, x) for row in router.gate.tolist()])
    chosen = sorted(range(EXPERTS), key=lambda e: -p[e])[: router.k]
    if name == "top-k":
        weights = [p[e] / sum(p[c] for c in chosen) for e in chosen]
    elif name == "add":
        adapter = router.adapter.tolist()
        weights = [p[e] + dot(adapter[e], x) for e in chosen]
    elif name == "concat":
        mixed = softmax([dot(row, x + p) for row in router.adapter.tolist()])
        weights = [mixed[e] for e in chosen]
    else:
        weights = [p[e] for e in chosen]
    return chosen, weights, p


@pytest.mark.parametrize("name", ROUTERS)
def test_follows_the_equations(name):
    router, x = make(name), tokens()
    routing = router(x)
    assert routing.indices.dtype == torch.int64
    assert routing.mask is None
    for t, token in enumerate(x.tolist()):
        chosen, weights, p = by_hand(name, router, token)
        assert routing.indices[t].tolist() == chosen
        assert routing.weights[t].tolist() == pytest.approx(weights, abs=1e-12)
        assert routing.probabilities[t].tolist() == pytest.approx(p, abs=1e-12)
        assert routing.logits[t].softmax(0).tolist() == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_of_the_weights(name):
    router, x = make(name), tokens(4).requires_grad_()

    def weights(x, *parameters):
        named = dict(zip((n for n, _ in router.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(router, named, (x,)).weights

    assert torch.autograd.gradcheck(weights, (x, *router.parameters()), fast_mode=True)


def test_the_scale_of_the_chosen_expert_alone_counts():
    # The first release of the AdaMoE code multiplied by the sum of the scales of all experts, and
    # added raw logits. Scales of 1, 10, 100, ... make any other combination visible.
    router = make("add")
    scales = torch.tensor([10.0**e for e in range(EXPERTS)], dtype=torch.float64)
    with torch.no_grad():
        router.adapter.zero_()[:, 0] = scales
    x = tokens()
    x[:, 0] = 1.0
    routing = router(x)
    assert torch.equal(routing.indices, routing.probabilities.topk(2).indices)
    expected = routing.probabilities.gather(1, routing.indices) + scales[routing.indices]
    torch.testing.assert_close(routing.weights, expected)


def test_the_last_expert_can_be_the_only_choice():
    # The vanilla path of the AdaMoE code gathered twice: the second time with expert ids on an
    # array of k columns, out of range for every expert from k on.
    router = TopKRouter(DIM, EXPERTS, k=1, renormalize=False)
    with torch.no_grad():
        router.gate.zero_()[-1] = 1.0
    routing = router(torch.ones(3, DIM))
    assert routing.indices.tolist() == [[EXPERTS - 1]] * 3
    expected = math.exp(DIM) / (math.exp(DIM) + EXPERTS - 1)
    torch.testing.assert_close(routing.weights, torch.full((3, 1), expected))


@pytest.mark.parametrize("name", ["add", "concat"])
def test_the_adapter_never_selects(name):
    router, x = make(name), tokens()
    before = router(x)
    with torch.no_grad():
        router.adapter.mul_(-3.0)
    after = router(x)
    assert torch.equal(before.indices, after.indices)
    assert not torch.allclose(before.weights, after.weights)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_has_weight_zero_and_changes_nothing(name):
    router, x = make(name), tokens()
    mask = torch.arange(TOKENS) % 3 != 1
    x[~mask] = float("nan")  # attention over padding alone leaves NaN
    x.requires_grad_()
    routing, alone = router(x, mask), router(x[mask])
    assert torch.equal(routing.mask, mask)
    assert (routing.weights[~mask] == 0).all()
    torch.testing.assert_close(routing.weights[mask], alone.weights)
    for loss in (load_balancing_loss, router_z_loss):
        torch.testing.assert_close(loss(routing), loss(alone))
    (routing.weights.sum() + load_balancing_loss(routing) + router_z_loss(routing)).backward()
    assert (x.grad[~mask] == 0).all()
    assert x.grad[mask].abs().sum() > 0
    assert all(weight.grad.isfinite().all() for weight in router.parameters())


@pytest.mark.parametrize("name", ROUTERS)
def test_half_precision_and_autocast_route_in_float32(name):
    router, x = make(name, torch.bfloat16), tokens(dtype=torch.bfloat16)
    expected = make(name, torch.bfloat16).float()(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)
    for routing in (router(x), inside):
        assert torch.equal(routing.indices, expected.indices)
        for field in ("weights", "probabilities", "logits"):
            torch.testing.assert_close(
                getattr(routing, field), getattr(expected, field), rtol=0, atol=0
            )


def test_jitter_only_in_training_and_within_its_bounds():
    router = SwitchRouter(DIM, EXPERTS, jitter=0.25, dtype=torch.float64)
    with torch.no_grad():
        router.gate.fill_(1.0)
    x = torch.ones(4000, DIM, dtype=torch.float64)
    torch.manual_seed(0)
    jittered = router(x).logits[:, 0].detach() / DIM
    assert 0.75 <= jittered.min() < 0.9
    assert 1.1 < jittered.max() <= 1.25
    assert jittered.mean() == pytest.approx(1.0, abs=0.01)
    router.eval()
    assert (router(x).logits == DIM).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_evaluation_is_deterministic(name):
    router, x = make(name).eval(), tokens()
    torch.manual_seed(1)
    first = router(x)
    torch.manual_seed(2)
    second = router(x)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def balanced(experts: int, k: int) -> Routing:
    """Every expert chosen equally often, every probability the same."""
    indices = torch.arange(experts * k).reshape(experts, k) % experts
    even = torch.full((experts, experts), 1.0 / experts)
    return Routing(indices, even[:, :k], even, even.log())


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 1), (4, 2), (8, 3), (5, 5)])
def test_balance_loss_of_perfect_balance(experts, k):
    routing = balanced(experts, k)
    assert load_balancing_loss(routing).item() == pytest.approx(1.0)
    assert load_balancing_loss(routing, form="mean").item() == pytest.approx(experts**-2)


def test_balance_loss_of_collapse():
    certain = torch.zeros(7, 4).index_fill(1, torch.tensor([2]), 1.0)
    routing = Routing(torch.full((7, 1), 2), certain[:, 2:3], certain, certain)
    assert load_balancing_loss(routing).item() == pytest.approx(4.0)
    assert load_balancing_loss(routing, form="mean").item() == pytest.approx(0.25)


@pytest.mark.parametrize("name", ROUTERS)
def test_losses_against_a_loop(name):
    router, x = make(name), tokens()
    mask = torch.arange(TOKENS) % 4 != 0
    routing = router(x, mask)
    chosen, mean, squares, count = [0] * EXPERTS, [0.0] * EXPERTS, 0.0, 0
    for t, token in enumerate(x.tolist()):
        if mask[t]:
            choices, _, p = by_hand(name, router, token)
            for e in choices:
                chosen[e] += 1
            mean = [m + q for m, q in zip(mean, p, strict=True)]
            scores = [dot(row, token) for row in router.gate.tolist()]
            squares += math.log(sum(map(math.exp, scores))) ** 2
            count += 1
    total = dot(chosen, mean) / (count * router.k) / count
    assert load_balancing_loss(routing).item() == pytest.approx(EXPERTS * total)
    assert load_balancing_loss(routing, form="mean").item() == pytest.approx(total / EXPERTS)
    assert router_z_loss(routing).item() == pytest.approx(squares / count)


def test_losses_train_the_gate_alone():
    router = make("add")
    routing = router(tokens())
    (load_balancing_loss(routing) + router_z_loss(routing)).backward()
    assert router.gate.grad.abs().sum() > 0
    assert router.adapter.grad is None


def test_descending_the_balance_loss_balances():
    torch.manual_seed(0)
    router, x = SwitchRouter(DIM, 4), torch.randn(256, DIM) + 1.0
    with torch.no_grad():
        router.gate[0] += 0.5  # nearly everything goes to the first expert

    def largest_share() -> float:
        return router(x).indices.flatten().bincount(minlength=4).max().item() / 256

    assert largest_share() > 0.8
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        load_balancing_loss(router(x)).backward()
        optimizer.step()
    assert largest_share() < 0.4


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
@pytest.mark.parametrize("case", ["no tokens", "padding alone"])
def test_losses_without_a_real_token_are_zero_with_a_graph(loss, case):
    router = make("switch")
    if case == "no tokens":
        routing = router(tokens()[:0])
    else:
        routing = router(tokens(), torch.zeros(TOKENS, dtype=torch.bool))
    value = loss(routing)
    assert value.item() == 0.0
    value.backward()
    assert (router.gate.grad == 0).all()


def test_losses_of_any_routing_ignore_what_padding_holds():
    logits = torch.tensor([[1.0, 2.0], [float("nan")] * 2], requires_grad=True)
    p = logits.softmax(1)
    routing = Routing(torch.ones(2, 1).long(), p[:, 1:], p, logits, torch.tensor([True, False]))
    for loss in (load_balancing_loss(routing), router_z_loss(routing)):
        assert loss.isfinite()
    router_z_loss(routing).backward()
    assert logits.grad.isfinite().all()


def test_as_many_choices_as_experts():
    router = TopKRouter(DIM, EXPERTS, k=EXPERTS, dtype=torch.float64)
    routing = router(tokens())
    assert (routing.indices.sort(dim=1).values == torch.arange(EXPERTS)).all()
    torch.testing.assert_close(routing.weights, routing.probabilities.gather(1, routing.indices))


def test_shapes_of_the_parameters():
    assert TopKRouter(6, 3, k=1).gate.shape == (3, 6)
    assert ScaleAdapterRouter(6, 3, k=1).adapter.shape == (3, 6)
    assert ScaleAdapterRouter(6, 3, k=1, combine="concat").adapter.shape == (3, 9)
    assert [name for name, _ in SwitchRouter(6, 3).named_parameters()] == ["gate"]
    assert SwitchRouter(6, 3, device="meta", dtype=torch.float16).gate.dtype == torch.float16


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: TopKRouter(8, 4, k=5), "k is 5 with 4 experts; choose k from 1 to 4"),
        (lambda: TopKRouter(8, 4, k=0), "k is 0 with 4 experts"),
        (lambda: ScaleAdapterRouter(8, 4, k=1.5), "k is 1.5 with 4 experts"),
        (lambda: SwitchRouter(8, 0), "experts is 0"),
        (lambda: SwitchRouter(0, 4), "dim is 0"),
        (lambda: SwitchRouter(8, 4, jitter=1.0), r"jitter is 1.0; choose it from \[0, 1\)"),
        (lambda: ScaleAdapterRouter(8, 4, k=1, combine="mul"), "combine is 'mul'; choose 'add'"),
    ],
)
def test_refuses_to_make(make_it, said):
    with pytest.raises(ValueError, match=said):
        make_it()


@pytest.mark.parametrize(
    ("x", "mask", "said"),
    [
        (torch.zeros(3, 7), None, r"shape \(T, 6\), given \(3, 7\)"),
        (torch.zeros(2, 3, 6), None, "flatten leading dimensions"),
        (torch.zeros(3, 6), torch.ones(4, dtype=torch.bool), r"shape \(3,\).*given \(4,\)"),
        (torch.zeros(3, 6), torch.ones(3, dtype=torch.int64), r"torch.int64.*mask.bool\(\)"),
    ],
)
def test_refuses_input(x, mask, said):
    with pytest.raises(ValueError, match=said):
        SwitchRouter(6, 4)(x, mask)


def test_refuses_another_form():
    with pytest.raises(ValueError, match="form is 'sum'; choose 'switch'"):
        load_balancing_loss(balanced(4, 1), form="sum")
