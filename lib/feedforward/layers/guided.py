"""Self-guided training: a dense matrix that helps a structured layer through its first steps."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedforward.layers.autocast import without_autocast
from feedforward.layers.structured import PreMerged, StructuredLinear, check_structured

Schedule = Literal["cosine", "linear"]

SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear")


class SelfGuided(nn.Module):
    """A structured layer trained together with a dense guide: ``y = aWx + (1 - a)U(Vx) + b``.

    The guide W starts as the structured layer's own dense weight, so wrapping a layer never
    changes its function; W is learned too, while a falls from 1 to 0 over `steps` optimizer steps.
    Then W is dropped. In eval mode, and where a is 0, the structured layer computes alone. Source:
    arXiv 2406.16450, section 4 (self-guided training). Explained in
    ``book/foundations/03-structured-matrices``.

    In a loop, call `advance` after each optimizer step and `release` when the guided phase is over;
    the functions of the same name do it for a whole model. A checkpoint of a guided layer has the
    keys ``guide`` (M, N), ``step`` (how often `advance` was called), ``layer.v``, ``layer.u`` and
    ``layer.bias``, and loading it continues where it was taken. After `release` the keys are the
    plain layer's: ``v``, ``u``, ``bias``.

    Args:
        layer: a `LowRank`, `BlockShuffle` or `BlockDense`; kept as ``.layer``.
        steps: optimizer steps T until a is 0.
        schedule: ``"cosine"``, a(t) = (1 + cos(pi t/T))/2, or ``"linear"``, a(t) = 1 - t/T.
        stochastic: the cheap form: each forward pass in training draws p from U(0, 1), and uses
            the mixture where p < a, else the structured layer alone, so that the guide costs half
            of a dense layer on average. Under DistributedDataParallel the ranks draw on their own,
            so it needs ``find_unused_parameters=True``.

    Raises:
        ValueError: If `layer` is of another kind, `steps` is not a positive whole number, or the
            schedule is unknown.

    >>> from feedforward import LowRank
    >>> layer = SelfGuided(LowRank(6, 8, rank=2), steps=4)
    >>> layer.advance()
    >>> round(layer.alpha, 4), layer(torch.ones(3, 6)).shape
    (0.8536, torch.Size([3, 8]))
    >>> layer.release()
    LowRank(in_features=6, out_features=8, rank=2, bias=True, init='spectral')
    """

    guide: nn.Parameter | None
    step: Tensor

    def __init__(
        self,
        layer: StructuredLinear,
        *,
        steps: int,
        schedule: Schedule = "cosine",
        stochastic: bool = True,
    ):
        super().__init__()
        check_structured(layer)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}; give a whole number of optimizer steps from 1")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; choose one of {', '.join(SCHEDULES)}")
        self.layer = layer
        self.steps, self.schedule, self.stochastic = steps, schedule, stochastic
        self.in_features, self.out_features = layer.in_features, layer.out_features
        with without_autocast(layer.v.device.type):
            self.guide = nn.Parameter(layer.dense_weight().detach().clone())
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=layer.v.device))
        # the same count as a Python number, so that no forward pass waits for a GPU to read it
        self._count(0)
        self.register_load_state_dict_post_hook(_count_after_loading)
        self.train(layer.training)

    @property
    def alpha(self) -> float:
        """The guide's part a of the output in training, from 1 at the start to 0; 0 if released."""
        if self.guide is None:
            return 0.0
        return self._alpha_of(min(self._done / self.steps, 1.0), math.cos)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features).

        Raises:
            ValueError: If the last dimension of `x` is not `in_features`.
        """
        y = self.layer(x)
        guiding = self.training and self._guiding and self.guide is not None
        if not guiding or (self.stochastic and not self._drawn()):
            return y
        # both sides carry the bias, so the mixture has it once
        guided = F.linear(x, self.guide, self.layer.bias)
        if not torch.compiler.is_compiling():
            return torch.lerp(y, guided, self.alpha)
        # a tensor, since another number would be compiled anew after every step
        wide = torch.promote_types(y.dtype, torch.float32)
        alpha = self._alpha_of((self.step.to(wide) / self.steps).clamp(max=1.0), torch.cos)
        return torch.lerp(y.to(wide), guided.to(wide), alpha).to(y.dtype)

    @torch.compiler.disable  # it reads how many steps are done
    def _drawn(self) -> bool:
        return torch.rand(()).item() < self.alpha

    def _alpha_of(self, progress, cos):
        if self.schedule == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + cos(math.pi * progress))

    def advance(self) -> None:
        """Count one optimizer step."""
        self._count(self._done + 1)
        self.step.fill_(self._done)

    def _count(self, done: int) -> None:
        self._done, self._guiding = done, done < self.steps

    def release(self) -> StructuredLinear:
        """Drop the guide and give back the structured layer, to be put in this one's place."""
        self.guide = None
        return self.layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: the structured layer's weights, the guide as their product, and step 0."""
        self.layer.reset_parameters()
        self._count(0)
        self.step.zero_()
        if self.guide is not None:
            with without_autocast(self.guide.device.type):
                self.guide.copy_(self.layer.dense_weight())

    def extra_repr(self) -> str:
        """The arguments that make this layer."""
        return f"steps={self.steps}, schedule={self.schedule!r}, stochastic={self.stochastic}"


def guide(
    model: nn.Module, *, steps: int, schedule: Schedule = "cosine", stochastic: bool = True
) -> nn.Module:
    """Put a guide beside every structured layer of `model`; see `SelfGuided`.

    Explained in ``book/structured-ffn/03-self-guided-training``.

    Args:
        model: the model, changed in place. It may be a structured layer itself.
        steps: optimizer steps until the guides have no part in the output.
        schedule: how their part falls: ``"cosine"`` or ``"linear"``.
        stochastic: the cheap form, which uses the guide in half of the forward passes.

    Returns:
        The model; the guided layer, if `model` was a structured layer itself.

    Raises:
        ValueError: If there is no structured layer without a guide, one is pre-merged, or `steps`
            or `schedule` is not allowed.
    """
    if any(isinstance(module, PreMerged) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has a PreMerged layer, which is for decoding; "
            "train its structured layer with a guide, and merge then"
        )
    options = {"steps": steps, "schedule": schedule, "stochastic": stochastic}
    if isinstance(model, StructuredLinear):
        return SelfGuided(model, **options)
    guided: dict[StructuredLinear, SelfGuided] = {}  # a shared layer gets one guide
    for parent in list(model.modules()):
        if isinstance(parent, SelfGuided):
            continue
        for name, child in parent._modules.items():
            if isinstance(child, StructuredLinear):
                if child not in guided:
                    guided[child] = SelfGuided(child, **options)
                setattr(parent, name, guided[child])
    if not guided:
        raise ValueError(
            f"{type(model).__name__} has no structured layer without a guide; "
            "put some in with feedforward.replace_ffn"
        )
    return model


def advance(model: nn.Module) -> None:
    """Count one optimizer step in every guided layer of `model`; call it once per step.

    Explained in ``book/foundations/03-structured-matrices``.
    """
    for module in model.modules():
        if isinstance(module, SelfGuided):
            module.advance()


def release(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Put the structured layer in the place of every guided one, and forget the guides.

    The guides leave the model, the optimizer's parameter groups and its state, and so all later
    checkpoints. Explained in ``book/foundations/03-structured-matrices``.

    Args:
        model: the model, changed in place. It may be a guided layer itself.
        optimizer: the optimizer that trains it.

    Returns:
        The model; the structured layer, if `model` was a guided layer itself.
    """
    guides = {
        id(guided.guide): guided.guide
        for guided in model.modules()
        if isinstance(guided, SelfGuided) and guided.guide is not None
    }
    for parent, name, guided in list(_places(model)):
        setattr(parent, name, guided.release())
    if isinstance(model, SelfGuided):
        model = model.release()
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in guides]
        for guide in guides.values():
            optimizer.state.pop(guide, None)
    return model


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, SelfGuided]]:
    """Where guided layers are: parent, name and layer; a shared one in each of its places."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if isinstance(child, SelfGuided):
                yield parent, name, child


def _count_after_loading(module: SelfGuided, incompatible_keys) -> None:
    module._count(int(module.step))
