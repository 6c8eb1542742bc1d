"""How a model is trained: every choice, checked."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from feedforward.profiles import unknown

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; every field is checked.

    Args:
        steps: of the optimizer.
        lr: the peak learning rate.
        warmup: linear warm-up: a share of the steps (float below 1) or a number of them (int).
        schedule: after the warm-up: ``"cosine"``, ``"linear"`` or ``"constant"``.
        final_lr: where the schedule ends, as a share of `lr`.
        weight_decay: of AdamW, on matrices.
        decay_all: decay biases and norms too, as the structured-FFN paper does (its section 4).
        betas: of AdamW.
        clip: the largest norm of the gradient, None for no limit.
        accumulate: micro-batches per step.
        ema: decay of the exponential moving average of the weights, None for none.
        precision: ``"fp32"``, ``"bf16"`` (autocast; the weights stay float32), or ``"auto"``:
            bf16 where the hardware multiplies it.
        log_every: steps that a point of the curves is the mean of.
        evaluate_every: steps between evaluations, None for one at the end.
        checkpoint_every_steps: steps between checkpoints, None for none by steps.
        checkpoint_every_seconds: seconds between checkpoints, None for none by time.

    Raises:
        ValueError: if a value is not allowed, saying what is.
    """

    steps: int
    lr: float
    warmup: float | int = 0.1
    schedule: str = "cosine"
    final_lr: float = 0.1
    weight_decay: float = 0.1
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    accumulate: int = 1
    ema: float | None = None
    precision: str = "auto"
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_every_seconds: float | None = 120.0

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every"):
            require(name, getattr(self, name), _is_count, "a whole number from 1")
        for name in ("evaluate_every", "checkpoint_every_steps"):
            require(name, getattr(self, name), _or_none(_is_count), "a whole number or None")
        require("lr", self.lr, is_positive, "a number above 0")
        for name in ("clip", "checkpoint_every_seconds"):
            require(name, getattr(self, name), _or_none(is_positive), "above 0, or None")
        check_warmup("warmup", self.warmup, self.steps)
        require("final_lr", self.final_lr, lambda v: _is_number(v) and 0 <= v <= 1, "from 0 to 1")
        require("weight_decay", self.weight_decay, _is_nonnegative, "a number from 0")
        require("decay_all", self.decay_all, lambda v: isinstance(v, bool), "True or False")
        allowed = "two numbers from 0 and below 1"
        require("betas", self.betas, lambda v: isinstance(v, Iterable), allowed)
        object.__setattr__(self, "betas", tuple(self.betas))
        require("betas", self.betas, lambda v: len(v) == 2 and all(map(_is_share, v)), allowed)
        require("ema", self.ema, _or_none(_is_share), "from 0 and below 1, or None")
        if self.schedule not in SCHEDULES:
            raise ValueError(unknown("schedule", self.schedule, SCHEDULES))
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))

    def lr_share(self, step: int, warmup: float | int | None = None) -> float:
        """The learning rate of a step, counted from 0, as a share of its peak.

        Args:
            step: from 0 to ``steps - 1``; the last one gets ``final_lr``.
            warmup: in place of the configuration's own.

        >>> config = TrainingConfig(steps=11, lr=1e-3, warmup=2, final_lr=0.1)
        >>> [round(config.lr_share(step), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
        """
        warmup = self.warmup if warmup is None else warmup
        rising = warmup if isinstance(warmup, int) else round(warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, self.steps - 1 - rising))
        if self.schedule == "constant":
            return 1.0
        shape = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.final_lr + (1 - self.final_lr) * shape


def require(name: str, value: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    """Raise a ``ValueError`` with what is allowed, unless the value holds."""
    if not holds(value):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def check_warmup(name: str, value: Any, steps: int) -> None:
    """Raise a ``ValueError`` unless it is a warm-up of so many steps at most."""
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= steps
    share = isinstance(value, float) and 0 <= value < 1
    allowed = f"a share of the steps (float below 1) or a number of them (int up to {steps})"
    require(name, value, lambda _: whole or share, allowed)


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above zero."""
    return _is_number(value) and value > 0


def _is_nonnegative(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1
