"""Other experts than the router's, and phases of other attempts."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from feedforward import MoE, SwitchRouter, TopKRouter, collect_routing
from feedforward.robot import scores
from feedforward.robot.scores import (
    exchanged_phase_information,
    phase_information,
    rerouted,
    task_information,
)

F64 = {"dtype": torch.float64}


def layers(k=1, copies=False):
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        router = SwitchRouter(6, 4, **F64) if k == 1 else TopKRouter(6, 4, k=k, **F64)
        made.append(MoE(6, 8, 4, router=router, **F64))
    if copies:
        with torch.no_grad():
            for moe in made:
                moe.w_in[:] = moe.w_in[0].clone()
                moe.w_out[:] = moe.w_out[0].clone()
    return nn.Sequential(*made).eval()


def next_one(routing):
    return routing._replace(indices=(routing.indices + 1) % 4)


@pytest.mark.parametrize("k", [1, 2])
def test_tokens_get_the_experts_that_they_are_told_at_their_own_weights(k):
    moe, x = layers(k)[0], torch.randn(10, 6, **F64)
    with collect_routing(moe) as own:
        moe(x)
    by_hand = torch.zeros_like(x)
    for t in range(10):
        for i, w in zip(own[0].indices[t], own[0].weights[t], strict=True):
            other = (i + 1) % 4
            hidden = nn.functional.gelu(moe.w_in[other] @ x[t])
            by_hand[t] += w * (moe.w_out[other] @ hidden)
    with rerouted(moe, next_one), collect_routing(moe) as seen:
        y = moe(x)
    assert torch.allclose(y, by_hand, atol=1e-12)
    assert torch.equal(seen[0].indices, (own[0].indices + 1) % 4)
    assert torch.equal(seen[0].weights, own[0].weights)


def test_every_layer_is_rerouted_and_none_stays_so():
    model, x = layers(), torch.randn(10, 6, **F64)
    before = model(x)
    with rerouted(model, next_one), collect_routing(model) as seen:
        inside = model(x)
    assert len(seen) == 2
    assert not torch.allclose(inside, before)
    assert torch.equal(model(x), before)


def test_another_copy_makes_no_difference():
    model, x = layers(copies=True), torch.randn(10, 6, **F64)
    before = model(x)
    with rerouted(model, next_one):
        assert torch.allclose(model(x), before, atol=1e-12)


def test_an_error_inside_leaves_the_model_as_it_was():
    model, x = layers(), torch.randn(10, 6, **F64)
    before = model(x)
    with pytest.raises(KeyError), rerouted(model, next_one):
        raise KeyError
    assert torch.equal(model(x), before)


def test_what_cannot_be_rerouted_is_refused():
    with (
        pytest.raises(ValueError, match="Linear has no layers with experts"),
        rerouted(nn.Linear(2, 2), next_one),
    ):
        pass
    model, x = layers(), torch.randn(10, 6, **F64)
    with (
        pytest.raises(ValueError, match=r"weights have shape \(9, 1\)"),
        rerouted(model, lambda r: r._replace(weights=r.weights[1:])),
    ):
        model(x)


@pytest.mark.parametrize("places", [-4, 1, 9])
def test_experts_that_are_not_there_are_refused(places):
    model, x = layers(), torch.randn(10, 6, **F64)
    there = rerouted(model, lambda r: r._replace(indices=3 + 0 * r.indices))
    with there:
        model(x)
    with (
        rerouted(model, lambda r: r._replace(indices=3 + places + 0 * r.indices)),
        pytest.raises(ValueError, match=rf"from {3 + places} to {3 + places}; .* experts 0 to 3"),
    ):
        model(x)


def test_experts_are_looked_at_once_where_they_are_always_the_same(monkeypatch):
    looked, original = [], scores._require_experts
    monkeypatch.setattr(
        scores, "_require_experts", lambda *given: looked.append(given) or original(*given)
    )
    model, x = layers(), torch.randn(10, 6, **F64)
    same = torch.zeros(10, 1, dtype=torch.long)
    with rerouted(model, lambda r: r._replace(indices=same)):
        for _ in range(3):
            model(x)
    assert len(looked) == 1  # else what is timed would hold the looking


# --- labels -------------------------------------------------------------------------------------


def test_labels_belong_to_what_they_label():
    uses = [np.array([[2, 0], [2, 0]]), np.array([[0, 2], [0, 2]])]
    phases = [np.array([0, 1]), np.array([0, 1])]
    for wrong in ([0], [0, 1, 1], [-1, 0], [0.5, 1.0]):
        for ask in (task_information, partial(exchanged_phase_information, phases=phases)):
            with pytest.raises(ValueError, match=r"tasks (have shape|are) .*give"):
                ask(uses, tasks=wrong)
    for wrong in ([phases[0], np.array([0, 1, 1])], [phases[0], np.array([0, -1])]):
        for ask in (phase_information, partial(exchanged_phase_information, tasks=[0, 0])):
            with pytest.raises(ValueError, match=r"phases of episode 1 (have shape|are)"):
                ask(uses, phases=wrong)
    with pytest.raises(ValueError, match="phases of 1 episodes and uses of 2"):
        phase_information(uses, phases[:1])
    with pytest.raises(ValueError, match="at least one"):
        task_information([], [])


@pytest.mark.parametrize("permutations", [0, -1, 2.5])
def test_a_p_needs_permutations(permutations):
    uses, labels = [np.array([[2, 0], [0, 2]])], [np.array([0, 1])]
    for ask in (
        partial(task_information, uses, [0]),
        partial(phase_information, uses, labels),
        partial(exchanged_phase_information, uses, labels, [0]),
    ):
        with pytest.raises(ValueError, match=f"permutations is {permutations}"):
            ask(permutations=permutations)


# --- phases of other attempts -------------------------------------------------------------------


def attempts(choose, count=40, seed=0):
    """Uses of two experts over three phases, and the tasks."""
    rng, uses, phases = np.random.default_rng(seed), [], []
    for _ in range(count):
        phase = np.repeat(np.arange(3), rng.integers(5, 40, 3))
        uses.append(np.eye(2, dtype=int)[choose(phase, rng)])
        phases.append(phase)
    return uses, phases, np.arange(count) % 2


def test_experts_that_follow_the_phase_are_found_beyond_the_clock():
    found = exchanged_phase_information(*attempts(lambda phase, _: (phase == 1).astype(int)))
    assert found.p < 0.01
    assert found.bits > 2 * found.shuffled


def test_experts_that_follow_the_clock_are_found_by_turns_alone():
    def clock(phase, _):
        return (2 * np.arange(len(phase)) >= len(phase)).astype(int)

    found = [attempts(clock, seed=seed) for seed in range(20)]
    assert all(phase_information(*each[:2], permutations=100).p < 0.01 for each in found)
    p = [exchanged_phase_information(*each, permutations=100).p for each in found]
    assert 0.2 < np.median(p) < 0.8


def test_what_tasks_differ_in_is_on_both_sides():
    phases = [np.full(20, task) for task in (0, 1) * 10]
    uses = [np.eye(2, dtype=int)[phase] for phase in phases]
    found = exchanged_phase_information(uses, phases, (0, 1) * 10)
    assert found.bits == pytest.approx(found.shuffled) == pytest.approx(1.0)
    assert found.p == 1.0


def test_p_is_right_where_choices_last_and_know_nothing():
    def lasting(phase, rng):
        return np.repeat(rng.integers(2, size=len(phase)), 12)[: len(phase)]

    p = [
        exchanged_phase_information(*attempts(lasting, 12, seed), permutations=39).p
        for seed in range(100)
    ]
    assert np.mean(np.array(p) <= 0.1) < 0.2
