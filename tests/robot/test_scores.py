"""Other experts than the router's: what changes, what does not, and that nothing stays behind."""

import pytest
import torch
from torch import nn

from feedforward import MoE, SwitchRouter, TopKRouter, collect_routing
from feedforward.robot.scores import rerouted

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
