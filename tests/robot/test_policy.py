import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from feedforward import MoE, ScaleAdapterRouter, TopKRouter, collect_routing, count
from feedforward import load_balancing_loss as balance_loss
from feedforward.files import DataError
from feedforward.layers.cost import PAPER_SHAPES
from feedforward.robot.demos import Statistics
from feedforward.robot.policy import (
    CONFIGS,
    FFNS,
    FlowPolicy,
    Objective,
    PolicyConfig,
    load_policy,
    parameter_groups,
    routes,
    sample_times,
    save_policy,
    time_embedding,
    upcycled,
    widened,
)
from feedforward.training import TrainingConfig, train

SMALL = PolicyConfig(
    state=5, action=3, horizon=4, width=16, depth=3, heads=4, hidden=24, text_width=10,
    prefix_width=12, prefix_hidden=20,
)  # fmt: skip
SEEING = replace(SMALL, image_width=7, cameras=2, kv_heads=2, head_width=6)
STATISTICS = {
    "observation.state": {"mean": [1.0, 2, 3, 4, 5], "std": [1.0, 2, 3, 4, 0]},
    "action": {"mean": [0.5, -0.5, 0.0], "std": [0.1, 2.0, 1.0]},
}


def make(config=SMALL, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    policy = FlowPolicy(config).to(dtype).eval()
    policy.set_statistics(STATISTICS)
    return policy


def make_batch(config=SMALL, rows=6, seed=1, dtype=torch.float64):
    """Texts of different lengths, and chunks of which the last actions do not always count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    length = torch.arange(rows) % 3 + 3
    counted = torch.arange(rows) % config.horizon + 1
    batch = {
        "state": draw(rows, config.state),
        "actions": draw(rows, config.horizon, config.action),
        "mask": torch.arange(config.horizon) < counted[:, None],
        "text": draw(rows, 5, config.text_width),
        "text_mask": torch.arange(5) < length[:, None],
    }
    if config.cameras:
        batch["images"] = draw(rows, config.cameras, config.image_width)
    return batch


def seen(batch):
    return batch["state"], batch["text"], batch["text_mask"], batch.get("images")


def loss_of(policy, batch):
    return policy.loss(batch, torch.Generator().manual_seed(7))


# -- the flow --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ffn", FFNS)
def test_every_parameter_is_trained_but_idle_experts(ffn):
    policy, batch = make(replace(SEEING, ffn=ffn)), make_batch(SEEING, rows=24)
    loss, parts = Objective()(policy, batch)
    assert loss.shape == ()
    assert ("balance" in parts) == (ffn != "dense")
    loss.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_loss_is_the_masked_error_of_the_velocity():
    policy, batch = make(), make_batch()
    torch.manual_seed(3)
    noise = torch.randn(6, 4, 3)
    times = sample_times(6).double()
    torch.manual_seed(3)
    loss = policy.loss(batch)
    noise = noise.double()
    std = torch.tensor([0.1, 2.0, 1.0], dtype=torch.float64)
    mean = torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)
    total = count = 0
    for row in range(6):
        actions = (batch["actions"][row] - mean) / std
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        noisy = times[row] * noise[row] + (1 - times[row]) * actions
        velocity = policy.velocity(
            noisy[None], times[row : row + 1], *seen(alone), mask=alone["mask"]
        )
        for step in range(4):
            if batch["mask"][row, step]:
                target = noise[row, step] - actions[step]
                total += (velocity[0, step] - target).square().mean()
                count += 1
    torch.testing.assert_close(loss, total / count)


def test_the_generator_decides_noise_and_times():
    policy, batch = make(), make_batch()
    assert torch.equal(loss_of(policy, batch), loss_of(policy, batch))
    assert not torch.equal(
        loss_of(policy, batch), policy.loss(batch, torch.Generator().manual_seed(8))
    )
    before = torch.get_rng_state()
    loss_of(policy, batch)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ffn", ["dense", "adamoe"])
def test_padding_of_text_and_actions_is_never_seen(ffn):
    policy, batch = make(replace(SMALL, ffn=ffn)), make_batch()
    dirty = {name: value.clone() for name, value in batch.items()}
    dirty["text"][~dirty["text_mask"]] = torch.nan
    dirty["actions"][~dirty["mask"]] = torch.nan
    loss = loss_of(policy, dirty)
    assert torch.equal(loss, loss_of(policy, batch))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64)
    plans = policy.plan(*seen(dirty), noise=noise)
    row = {
        name: value[3:4, : 3 if name.startswith("text") else None] for name, value in dirty.items()
    }
    assert row["text_mask"].all()
    torch.testing.assert_close(plans[3:4], policy.plan(*seen(row), noise=noise[3:4]))


def jacobian_is_zero(output, given):
    (gradient,) = torch.autograd.grad(output.sum(), given, retain_graph=True, allow_unused=True)
    return gradient is None or not gradient.abs().any()


def test_attention_is_blockwise():
    policy, batch = make(SEEING), make_batch(SEEING, rows=2)
    memories = []
    policy.action_expert.register_forward_hook(
        lambda module, args, output: memories.append((args[1], output[1]))
    )
    state = batch["state"].requires_grad_()
    text = batch["text"].requires_grad_()
    actions = batch["actions"].requires_grad_()
    times = torch.tensor([0.3, 0.8], dtype=torch.float64)
    velocity = policy.velocity(actions, times, state, text, batch["text_mask"], batch["images"])
    prefix, everything = memories[0]
    last_prefix, last = prefix[-1][0], everything[-1][0]
    assert last_prefix.shape[2] == 2 + 5
    assert last.shape[2] == 2 + 5 + 1 + 4
    # keys of the last layer know what their tokens have seen
    image_keys, state_keys, action_keys = last[:, :, :2], last[:, :, 7:8], last[:, :, 8:]
    assert not jacobian_is_zero(image_keys, text)
    assert jacobian_is_zero(last_prefix, state)
    assert jacobian_is_zero(last_prefix, actions)
    assert not jacobian_is_zero(state_keys, text)
    assert jacobian_is_zero(state_keys, actions)
    assert not jacobian_is_zero(action_keys[:, :, 0], state)
    (gradient,) = torch.autograd.grad(velocity[:, 0].sum(), actions)
    assert (gradient.abs().sum(-1) > 0).all()  # the first action sees the last one


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("padded", [True, False])
def test_cached_plan_equals_the_uncached_flow(ffn, padded):
    config = replace(SEEING, ffn=ffn)
    policy, batch = make(config), make_batch(config)
    if not padded:
        batch["text_mask"] = torch.ones_like(batch["text_mask"])
    actions = torch.randn(6, 4, 3, dtype=torch.float64)
    plan = policy.plan(*seen(batch), steps=5, noise=actions)
    for step in range(5):
        times = torch.full((6,), 1 - step / 5, dtype=torch.float64)
        actions = actions - 0.2 * policy.velocity(actions, times, *seen(batch))
    expected = actions * policy.action_std + policy.action_mean
    torch.testing.assert_close(plan, expected)
    assert not plan.requires_grad


def test_plan_draws_from_its_generator():
    policy, batch = make(), make_batch()

    def plan(seed):
        return policy.plan(*seen(batch), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(plan(0), plan(0))
    assert not torch.equal(plan(0), plan(1))


def test_routes_of_a_plan():
    config = replace(SMALL, ffn="adamoe", k=2)
    policy, batch = make(config), make_batch()
    given = []
    for block in policy.action_expert.blocks:
        block.ffn.register_forward_pre_hook(lambda moe, args: given.append((moe, args[0])))
    with collect_routing(policy) as routings:
        policy.plan(*seen(batch), steps=5)
    indices, weights = routes(routings, config)
    assert indices.shape == weights.shape == (5, 3, 6, 4, 2)
    # the third step, second layer, fifth row, last action; before come the layers of the state
    moe, x = given[3 + 2 * 3 + 1]
    routing = moe.router(x[4, 3:])
    assert torch.equal(indices[2, 1, 4, 3], routing.indices[0])
    torch.testing.assert_close(weights[2, 1, 4, 3], routing.weights[0])
    for wrong in ([], routings[:-1], routings[:3], routings + routings):
        with pytest.raises(ValueError, match="not those of one plan"):
            routes(wrong, config)


@pytest.mark.parametrize("ffn", ["dense", "adamoe"])
def test_half_precision_by_autocast(ffn):
    policy = make(replace(SEEING, ffn=ffn), dtype=torch.float32)
    batch = make_batch(SEEING, dtype=torch.float32)
    expected = loss_of(policy, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(policy, batch)
        plan = policy.plan(*seen(batch))
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    loss.backward()
    assert plan.isfinite().all()
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_times_are_those_of_pi0():
    times = sample_times(20_000, generator=torch.Generator().manual_seed(0)).double()
    assert 0.001 <= times.min() < 0.02
    assert 0.999 < times.max() <= 1.0
    beta = torch.distributions.Beta(1.5, 1.0)
    assert times.mean() == pytest.approx(0.999 * beta.mean.item() + 0.001, abs=0.005)
    assert times.var() == pytest.approx(beta.variance.item(), rel=0.03)


def test_time_embedding_by_hand():
    width, t = 8, 0.37
    periods = [4e-3 * (4.0 / 4e-3) ** (i / 3) for i in range(4)]
    angles = [2 * math.pi * t / period for period in periods]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    found = time_embedding(torch.tensor([t], dtype=torch.float64), width)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))
    assert periods[0] == 4e-3
    assert periods[-1] == pytest.approx(4.0)


def test_a_small_policy_learns_two_chunks():
    """Which of two chunks is asked for only the text tells."""
    config = replace(SMALL, state=1, action=1, width=32, hidden=64, depth=2, horizon=3)
    torch.manual_seed(0)
    policy = FlowPolicy(config)
    text = torch.randn(2, 4, 10)[torch.arange(32) % 2]
    real = torch.ones(32, 4, dtype=torch.bool)
    chunks = torch.tensor([[[1.0], [2], [3]], [[-3.0], [-2], [-1]]])
    batch = {
        "state": torch.zeros(32, 1),
        "actions": chunks[torch.arange(32) % 2],
        "mask": torch.ones(32, 3, dtype=torch.bool),
        "text": text,
        "text_mask": real,
    }
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        policy.loss(batch).backward()
        optimizer.step()
    plan = policy.plan(batch["state"][:2], text[:2], real[:2])
    assert (plan - chunks).abs().max() < 0.5


# -- experts ---------------------------------------------------------------------------------------


def expert_output(moe, e, x):
    gate, up = (moe.w_in[e] @ x).chunk(2)
    return moe.w_out[e] @ (nn.functional.gelu(gate, approximate="tanh") * up)


def by_hand(moe, ffn, x, k, shared_weight, real):
    """One FFN of the paper, token by token."""
    rows = []
    for token, counts in zip(x, real, strict=True):
        if not counts:
            rows.append(torch.zeros_like(token))
            continue
        scores = moe.router.gate @ token
        p = scores.exp() / scores.exp().sum()
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[:k]
        if ffn == "adamoe":
            weights = p + moe.router.adapter @ token
        elif ffn == "csmoe":
            scores = moe.router.adapter @ torch.cat([token, p])
            weights = scores.exp() / scores.exp().sum()
        else:
            weights = p
        routed = sum(weights[e] * expert_output(moe, e, token) for e in chosen)
        if moe.shared is None:
            rows.append(routed)
            continue
        shared = moe.shared.down.weight @ (
            nn.functional.gelu(moe.shared.gate.weight @ token, approximate="tanh")
            * (moe.shared.up.weight @ token)
        )
        s = shared_weight
        rows.append(shared + routed if s is None else s * shared + (1 - s) * routed)
    return torch.stack(rows)


@pytest.mark.parametrize("ffn", ["adamoe", "moe", "csmoe"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("shared", "shared_weight"), [(True, None), (True, 0.5), (False, None)])
def test_layers_equal_the_formula_by_hand(ffn, k, shared, shared_weight):
    config = replace(
        SMALL, ffn=ffn, k=k, shared=shared, shared_weight=shared_weight, router_std=0.5
    )
    moe = make(config).action_expert.blocks[1].ffn
    x = torch.randn(7, 16, dtype=torch.float64)
    real = torch.tensor([True] * 5 + [False, True])
    with collect_routing(moe) as routings:
        found = moe(x, real)
    if ffn == "adamoe":
        assert (routings[0].weights < 0).any()
    torch.testing.assert_close(found, by_hand(moe, ffn, x, k, shared_weight, real))


def test_kinds_differ_in_their_routers():
    def router(ffn):
        return make(replace(SMALL, ffn=ffn)).action_expert.blocks[0].ffn.router

    assert isinstance(router("adamoe"), ScaleAdapterRouter)
    assert router("adamoe").combine == "add"
    assert router("csmoe").combine == "concat"
    assert isinstance(router("moe"), TopKRouter)
    assert not router("moe").renormalize


def test_router_starts_with_its_deviation():
    config = replace(SMALL, width=128, ffn="adamoe", experts=8, router_std=0.006)
    router = make(config).action_expert.blocks[0].ffn.router
    for weight in (router.gate, router.adapter):
        assert weight.std().item() == pytest.approx(0.006, rel=0.1)


def test_experts_are_in_the_action_expert_alone():
    policy = make(replace(SMALL, ffn="adamoe"))
    names = [name for name, module in policy.named_modules() if isinstance(module, MoE)]
    assert names == [f"action_expert.blocks.{i}.ffn" for i in range(3)]


def test_collapsed_router_sends_all_to_the_first_expert():
    config = replace(SMALL, ffn="collapsed", shared=False)
    policy, batch = make(config), make_batch()
    moe = policy.action_expert.blocks[0].ffn
    x = torch.randn(9, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(x), torch.stack([expert_output(moe, 0, each) for each in x]))
    loss_of(policy, batch).backward()
    assert moe.w_in.grad[0].abs().sum() > 0
    assert not moe.w_in.grad[1:].any()
    assert not list(moe.router.parameters())


# -- upcycling -------------------------------------------------------------------------------------


def test_upcycling_copies_the_parent_and_leaves_it():
    parent = make()
    before = copy.deepcopy(parent.state_dict())
    policy = upcycled(parent, "adamoe", k=2, experts=3)
    assert policy.config == replace(SMALL, ffn="adamoe", k=2, experts=3)
    assert all(torch.equal(before[n], value) for n, value in parent.state_dict().items())
    for block, old in zip(policy.action_expert.blocks, parent.action_expert.blocks, strict=True):
        moe = block.ffn
        both = torch.cat([old.ffn.gate.weight, old.ffn.up.weight])
        for e in range(3):
            assert torch.equal(moe.w_in[e], both)
            assert torch.equal(moe.w_out[e], old.ffn.down.weight)
        assert torch.equal(moe.shared.down.weight, old.ffn.down.weight)
        assert moe.shared.down.weight is not old.ffn.down.weight
    assert make(policy.config).state_dict().keys() == policy.state_dict().keys()
    fresh = make(policy.config, seed=5)
    fresh.load_state_dict(policy.state_dict())
    batch = make_batch()
    torch.testing.assert_close(loss_of(fresh, batch), loss_of(policy, batch))


def test_upcycling_follows_its_seed_and_no_other():
    parent = make()
    first = upcycled(parent, "adamoe", noise=0.1, seed=3).state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = upcycled(parent, "adamoe", noise=0.1, seed=3).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    w_in = first["action_expert.blocks.0.ffn.w_in"]
    assert (w_in[0] - w_in[1]).std().item() == pytest.approx(0.1 * 2**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("shared_weight", "share"), [(0.5, 0.5 + 0.5 * 0.25), (None, 1.25)], ids=["released", "paper"]
)
def test_first_output_of_the_papers_upcycling(shared_weight, share):
    parent = make(replace(SMALL, width=128, hidden=256))
    policy = upcycled(parent, "adamoe", shared_weight=shared_weight)
    x = nn.functional.rms_norm(torch.randn(500, 128, dtype=torch.float64), (128,))
    old = parent.action_expert.blocks[0].ffn(x)
    new = policy.action_expert.blocks[0].ffn(x)
    shares = (new * old).sum(1) / old.square().sum(1)
    assert shares.mean().item() == pytest.approx(share, rel=0.05)
    assert loss_of(policy, make_batch(parent.config)) != loss_of(parent, make_batch(parent.config))


@pytest.mark.parametrize("ffn", ["adamoe", "moe", "csmoe", "collapsed"])
@pytest.mark.parametrize(("shared", "shared_weight"), [(True, None), (True, 0.5), (False, None)])
def test_preserving_upcycling_starts_at_the_parents_loss(ffn, shared, shared_weight):
    parent, batch = make(), make_batch()
    policy = upcycled(
        parent, ffn, k=1 if ffn == "collapsed" else 2, shared=shared,
        shared_weight=shared_weight, preserve=True,
    )  # fmt: skip
    torch.testing.assert_close(loss_of(policy, batch), loss_of(parent, batch), rtol=1e-5, atol=0)


def test_one_expert_with_an_adapter_is_output_scaling():
    policy = upcycled(make(), "adamoe", experts=1, router_std=0.3)
    moe = policy.action_expert.blocks[0].ffn
    x = torch.randn(9, 16, dtype=torch.float64)
    scale = 1 + x @ moe.router.adapter[0]
    torch.testing.assert_close(moe(x), moe.shared(x) * (1 + scale[:, None]))


def test_upcycling_refuses_what_is_not_dense():
    with pytest.raises(ValueError, match="from a dense policy"):
        upcycled(make(replace(SMALL, ffn="moe")), "adamoe")
    with pytest.raises(ValueError, match="from a dense policy"):
        upcycled(make(), "dense")


@pytest.mark.parametrize(("match", "hidden"), [("active", 48), ("total", 120)])
def test_widening_starts_at_the_parents_function_and_learns(match, hidden):
    parent, batch = make(replace(SMALL, prefix_hidden=None)), make_batch()
    assert replace(SMALL, ffn="adamoe").dense_hidden(match) == hidden
    policy = widened(parent, hidden)
    assert policy.config.hidden == hidden
    assert policy.config.prefix_sizes == (12, 24)
    torch.testing.assert_close(loss_of(policy, batch), loss_of(parent, batch), rtol=1e-12, atol=0)
    loss_of(policy, batch).backward()
    down = policy.action_expert.blocks[0].ffn.down.weight
    assert down.shape == (16, hidden)
    assert (down.grad[:, 24:].abs().sum(0) > 0).all()
    fresh = make(policy.config, seed=5)
    fresh.load_state_dict(policy.state_dict())
    with pytest.raises(ValueError, match="at least its hidden width"):
        widened(parent, 23)


def test_matched_parameters():
    def ffn_cost(policy):
        return count(policy.action_expert.blocks[0].ffn)

    moe = ffn_cost(make(replace(SMALL, ffn="adamoe", k=2)))
    router = 2 * 4 * 16
    for match, number in (("active", moe.active_parameters), ("total", moe.parameters)):
        hidden = replace(SMALL, ffn="adamoe", k=2).dense_hidden(match)
        assert ffn_cost(make(replace(SMALL, hidden=hidden))).parameters == number - router


def test_pi0_counts_as_the_paper():
    with torch.device("meta"):
        dense = count(FlowPolicy(CONFIGS["pi0"]).action_expert)
        moe = count(FlowPolicy(CONFIGS["pi0-adamoe"]).action_expert)
    assert dense.parameters == count(PAPER_SHAPES["pi0-action-expert"]).parameters
    assert moe.parameters == count(PAPER_SHAPES["adamoe-action-expert"]).parameters
    assert dense.parameters == pytest.approx(0.31e9, rel=0.02)
    assert moe.parameters == pytest.approx(1.22e9, rel=0.02)
    assert moe.active_parameters == pytest.approx(0.54e9, rel=0.02)


@pytest.mark.parametrize(("name", "millions"), [("small", 1.0), ("large", 40)])
def test_named_configurations_are_as_large_as_they_say(name, millions):
    with torch.device("meta"):
        parameters = count(FlowPolicy(CONFIGS[name])).parameters
    assert parameters == pytest.approx(millions * 1e6, rel=0.15)


# -- training --------------------------------------------------------------------------------------


def test_objective_adds_the_papers_balance_loss():
    policy, batch = make(replace(SMALL, ffn="adamoe")), make_batch()
    objective = Objective((0.7, 0.3), switch=2)
    losses = []
    for step in range(4):
        torch.manual_seed(0)
        objective.on_step(policy, step)
        losses.append(objective(policy, batch))
    torch.manual_seed(0)
    with collect_routing(policy) as routings:
        flow = policy.loss(batch)
    assert len(routings) == 3
    assert routings[0].mask.sum() == batch["mask"].sum() + 6  # the states are routed too
    by_hand = 0
    for routing in routings:
        p, chosen = routing.probabilities[routing.mask], routing.indices[routing.mask]
        f = torch.stack([(chosen == e).double().mean() for e in range(4)])
        by_hand += (f * p.mean(0)).mean() / 3
        torch.testing.assert_close(balance_loss(routing, form="mean"), (f * p.mean(0)).mean())
    for (loss, parts), weight in zip(losses, (0.7, 0.7, 0.3, 0.3), strict=True):
        torch.testing.assert_close(loss, flow + weight * by_hand)
        torch.testing.assert_close(parts["balance"], by_hand)
        torch.testing.assert_close(parts["flow"], flow)


def test_balance_loss_does_not_train_the_adapter():
    policy, batch = make(replace(SMALL, ffn="adamoe")), make_batch()
    _, parts = Objective()(policy, batch)
    parts["balance"].backward()
    router = policy.action_expert.blocks[-1].ffn.router
    assert router.gate.grad.abs().sum() > 0
    assert router.adapter.grad is None


class Killed(Exception):
    pass


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    config = TrainingConfig(
        steps=6, lr=1e-3, warmup=2, ema=0.9, checkpoint_every_steps=2, log_every=1,
        precision="fp32",
    )  # fmt: skip
    batches = [make_batch(seed=i, dtype=torch.float32) for i in range(6)]

    def run(folder, dies=None):
        policy = upcycled(make(dtype=torch.float32), "adamoe")
        objective = Objective((50.0, 0.0), switch=3)
        torch.manual_seed(4)

        def batch(index):
            if index == dies:
                raise Killed
            return batches[index]

        groups = parameter_groups(experts={"lr": 5e-4}, router={"lr": 5e-3, "warmup": 1})
        result = train(
            policy, batch, objective, config, parameter_groups=groups,
            on_step=objective.on_step, checkpoint=folder, device="cpu", progress=False,
        )  # fmt: skip
        return policy, result

    whole, expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", dies=4)
    resumed, result = run(tmp_path / "killed")
    assert result.resumed_from == 4
    assert result.curves == expected.curves
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    flow, loss, balance = (expected.curves[n]["value"] for n in ("flow", "loss", "balance"))
    weights = [(a - b) / c for a, b, c in zip(loss, flow, balance, strict=True)]
    assert weights == pytest.approx([50] * 3 + [0] * 3, abs=1e-3)


def test_parameter_groups_name_experts_and_routers():
    groups = parameter_groups(experts={"lr": 1.0}, router={"lr": 2.0})
    policy = make(replace(SMALL, ffn="adamoe"))
    found = {}
    for name, parameter in policy.named_parameters():
        found.setdefault(groups(name, parameter).get("lr"), set()).add(name.rpartition(".")[2])
    assert found[1.0] == {"w_in", "w_out"}
    assert found[2.0] == {"gate", "adapter"}
    shared = "action_expert.blocks.0.ffn.shared.down.weight"
    assert groups(shared, None) == {}


# -- statistics, files, bad input ------------------------------------------------------------------


def test_statistics_normalise_inside():
    torch.manual_seed(0)
    plain = FlowPolicy(SMALL).double().eval()
    policy = make()
    batch = make_batch()
    noise = torch.randn(6, 4, 3, dtype=torch.float64)
    mean = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    std = torch.tensor([1.0, 2, 3, 4, 1], dtype=torch.float64)  # what never changes is not scaled
    state, *others = seen(batch)
    expected = plain.plan((state - mean) / std, *others, noise=noise)
    expected = expected * torch.tensor([0.1, 2, 1]) + torch.tensor([0.5, -0.5, 0])
    torch.testing.assert_close(policy.plan(state, *others, noise=noise), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": {"mean": [0.0] * 3}}, "no 'std'"),
        ({"action": {"mean": [0.0] * 2, "std": [1.0] * 2}}, r"shape \(2,\)"),
        ({"action": {"mean": [0.0] * 3, "std": [1.0, -1.0, 1.0]}}, "not usable"),
        ({"action": {"mean": [0.0, math.nan, 0.0], "std": [1.0] * 3}}, "not usable"),
        ({"action": None}, "mean of action holds no numbers"),
        ({"action": {"mean": ["a", "b", "c"], "std": [1.0] * 3}}, "holds no numbers"),
    ],
)
def test_unusable_statistics(change, message):
    policy = FlowPolicy(SMALL)
    with pytest.raises(ValueError, match=message):
        policy.set_statistics(STATISTICS | change)
    assert not policy.state_mean.any()  # nothing is half applied


def test_both_normalisers_agree_on_what_stands_still():
    values = 1 + np.array([[5e-5, 2e-4]]) * np.array([[-1.0], [1.0]])
    own = Statistics.of(values)
    policy = FlowPolicy(replace(SMALL, state=2, action=2))
    policy.set_statistics(dict.fromkeys(("observation.state", "action"), vars(own)))
    assert policy.state_std.tolist() == own.scale.tolist() == [1, pytest.approx(2e-4)]


def test_saved_and_loaded(tmp_path):
    policy = upcycled(make(SEEING, dtype=torch.float32), "csmoe", shared_weight=0.5)
    save_policy(policy, tmp_path / "policy.safetensors")
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert loaded.config == policy.config
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    batch = make_batch(SEEING, dtype=torch.float32)
    noise = torch.randn(6, 4, 3)
    assert torch.equal(
        loaded.plan(*seen(batch), noise=noise), policy.plan(*seen(batch), noise=noise)
    )


def test_unreadable_files(tmp_path):
    path = tmp_path / "policy.safetensors"
    with pytest.raises(DataError, match="no policy that can be read"):
        load_policy(path)
    save_policy(make(dtype=torch.float32), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="no policy that can be read"):
        load_policy(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": 0}, "state is 0"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"heads": 3}, "not divisible by heads"),
        ({"kv_heads": 3}, "must divide heads"),
        ({"width": 15, "heads": 5}, "even"),
        ({"cameras": 2}, "give both"),
        ({"image_width": 7}, "give both"),
        ({"ffn": "adamo"}, "did you mean 'adamoe'"),
        ({"ffn": "adamoe", "k": 5}, "from 1 to 4"),
        ({"ffn": "collapsed", "k": 2}, "from 1 to 1"),
        ({"ffn": "adamoe", "shared": False, "shared_weight": 0.5}, "shared_weight is 0.5"),
        ({"ffn": "adamoe", "shared_weight": 1.5}, "shared_weight is 1.5"),
        ({"ffn": "adamoe", "router_std": -1.0}, "router_std"),
        ({"k": 2}, "has no experts"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(6, 4)}, r"state has shape \(6, 4\)"),
        ({"actions": torch.zeros(6, 4, 2)}, r"takes \(6, 4, 3\)"),
        ({"actions": torch.zeros(6, 5, 3)}, "actions has shape"),
        ({"text": torch.zeros(6, 5, 11)}, "text has shape"),
        ({"text_mask": torch.ones(6, 5)}, "torch.bool"),
        ({"mask": torch.ones(6, 4)}, "mask has shape"),
        ({"images": torch.zeros(6, 2, 7)}, "made for 0 cameras"),
    ],
)
def test_batches_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        make().loss(make_batch() | change)


def test_a_velocity_is_asked_for_what_fits():
    policy, batch = make(), make_batch()
    actions, times = batch["actions"], torch.rand(6, dtype=torch.float64)
    policy.velocity(actions, times, *seen(batch), mask=batch["mask"])
    for changed, message in (
        ({"actions": actions[:, :1]}, "actions has shape"),
        ({"times": times[:2]}, "times has shape"),
        ({"state": torch.zeros(6, 4)}, "state has shape"),
        ({"text": torch.zeros(6, 5, 11)}, "text has shape"),
        ({"mask": torch.ones(6, 4)}, "mask has shape"),
    ):
        names = ("state", "text", "text_mask", "images")
        given = dict(zip(names, seen(batch), strict=False))
        given |= {"actions": actions, "times": times} | changed
        with pytest.raises(ValueError, match=message):
            policy.velocity(**given)


@pytest.mark.parametrize("name", ["state", "actions"])
def test_numbers_that_are_not_finite_are_named_with_their_rows(name):
    policy, batch = make(), make_batch()
    batch[name][3] = float("nan")
    with pytest.raises(ValueError, match=rf"'{name}' of the batch is not finite in rows \[3\]"):
        policy.loss(batch)
    batch["mask"][3] = False  # what does not count may be anything
    if name == "actions":
        assert policy.loss(batch).isfinite()


def test_other_bad_input():
    policy, batch = make(), make_batch()
    with pytest.raises(ValueError, match="no mask, text"):
        policy.loss({name: batch[name] for name in ("state", "actions", "text_mask")})
    with pytest.raises(ValueError, match="steps is 0"):
        policy.plan(*seen(batch), steps=0)
    with pytest.raises(ValueError, match="noise has shape"):
        policy.plan(*seen(batch), noise=torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="images are not given"):
        make(SEEING).plan(*seen(batch))
    for wrong in ((-1.0, 0.0), 0.01, (0.1,)):
        with pytest.raises(ValueError, match="weights is"):
            Objective(wrong)
    with pytest.raises(ValueError, match="switch is"):
        Objective(switch=-1)
    with pytest.raises(ValueError, match="match is 'all'"):
        SMALL.dense_hidden("all")
