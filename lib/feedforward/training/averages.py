"""What training keeps beside the weights: their moving average, and curves of means."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """The exponential moving average of a model's trainable weights.

    Args:
        model: its weights now are where the average starts.
        decay: share of the average that a step keeps, for instance 0.99.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._average = get_ema_multi_avg_fn(decay)
        self._shadows = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

    def update(self, model: nn.Module) -> None:
        """Move the average by one step; forget the weights that the model no longer has."""
        self._shadows = {p: self._shadows[p] for p in model.parameters() if p in self._shadows}
        parameters = [p.detach() for p in self._shadows]
        if parameters:
            self._average(list(self._shadows.values()), parameters, 1)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """A context in which `model` has the averaged weights; afterwards it has its own again."""
        own = {p: p.detach().clone() for p in model.parameters() if p in self._shadows}
        try:
            with torch.no_grad():
                for parameter in own:
                    parameter.copy_(self._shadows[parameter])
            yield model
        finally:
            with torch.no_grad():
                for parameter, value in own.items():
                    parameter.copy_(value)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The average by the names that its weights have in `model`."""
        return {n: self._shadows[p] for n, p in model.named_parameters() if p in self._shadows}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Take over an average that :meth:`state_dict` gave for the same model."""
        for name, shadow in self.state_dict(model).items():
            shadow.copy_(state[name])


class Log:
    """The curves so far, and the sums behind their next points."""

    def __init__(self):
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.pending: dict[str, list[float]] = {}

    def add(self, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            total, count = self.pending.get(name, (0.0, 0))
            self.pending[name] = [total + value, count + 1]

    def point(self, step: int) -> None:
        self.extend(step, {name: total / count for name, (total, count) in self.pending.items()})
        self.pending = {}

    def extend(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            curve = self.curves.setdefault(name, {"step": [], "value": []})
            curve["step"].append(step)
            curve["value"].append(value)
