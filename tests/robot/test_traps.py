import pytest
import torch

from feedforward import MoE, ScaleAdapterRouter
from feedforward.robot.traps import gathered, gathered_twice, not_gathered


def layer(k):
    """A layer, some tokens, what all its experts make of them, and its routing."""
    torch.manual_seed(0)
    router = ScaleAdapterRouter(6, 4, k=k)
    router.init_std = 1.0
    router.reset_parameters()
    moe = MoE(6, 8, 4, router=router).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    hidden = torch.nn.functional.gelu(torch.einsum("td,ehd->teh", x, moe.w_in))
    outputs = torch.einsum("teh,edh->ted", hidden, moe.w_out)
    return moe, x, outputs, router(x)


@pytest.mark.parametrize("k", [1, 2])
def test_the_right_form_is_what_the_layer_computes(k):
    moe, x, outputs, routing = layer(k)
    scales = routing.probabilities + x @ moe.router.adapter.t()
    torch.testing.assert_close(gathered(outputs, routing.indices, scales), moe(x))


def test_scales_that_are_not_gathered_add_up():
    moe, x, outputs, routing = layer(1)
    scales = routing.logits + x @ moe.router.adapter.t()
    wrong = not_gathered(outputs, routing.indices, scales)
    for t in range(12):
        chosen = outputs[t, routing.indices[t, 0]]
        torch.testing.assert_close(wrong[t], scales[t].sum() * chosen)
    assert not torch.allclose(wrong, moe(x), rtol=0.1)


def test_gathering_twice_leaves_the_columns():
    _, _, outputs, routing = layer(1)
    right = gathered(outputs, routing.indices, routing.probabilities)
    wrong = gathered_twice(
        outputs, routing.indices, routing.probabilities.gather(1, routing.indices)
    )
    first = routing.indices[:, 0] == 0
    assert first.any()
    assert not first.all()
    torch.testing.assert_close(wrong[first], right[first])
    assert wrong[~first].isnan().all()


def test_gathering_twice_mixes_choices_up():
    outputs = torch.tensor([[[1.0], [10.0], [100.0]]])
    indices, weights = torch.tensor([[1, 0]]), torch.tensor([[0.7, 0.2]])
    assert gathered_twice(outputs, indices, weights).item() == pytest.approx(0.2 * 10 + 0.7 * 1)


def selection_gradient(form, which):
    """The gradient of the router's matrix, less what all of its rows have in common."""
    torch.manual_seed(0)
    router = ScaleAdapterRouter(6, 4, k=1, dtype=torch.float64)
    x, target = torch.randn(2, 50, 6, dtype=torch.float64)
    outputs = torch.randn(50, 4, 6, dtype=torch.float64)
    routing = router(x)
    y = form(outputs, routing.indices, getattr(routing, which) + x @ router.adapter.t())
    (y - target).square().mean().backward()
    return router.gate.grad - router.gate.grad.mean(0)


def test_scales_that_are_not_gathered_teach_no_selection():
    # what is added to all logits alike changes no probability
    assert selection_gradient(gathered, "probabilities").norm() > 1e-3
    for which in ("logits", "probabilities"):
        assert selection_gradient(not_gathered, which).norm() < 1e-12
