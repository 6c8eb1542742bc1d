"""The arms of the structured part of the book: which models, on how many tokens, at which rates.

Two experiments use the runs of `feedforward.lm.experiment`. ``structured-ffn`` compares dense and
structured models at equal tokens and at equal FLOPs. ``structured-ffn-stability`` trains the
smallest of them at several learning rates, counts spikes, compares the ways to start the weights
and the forms of self-guided training, and so finds the learning rate of each arm. The chapters of
``book/structured-ffn`` explain both.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from feedforward.layers.cost import count
from feedforward.lm.accounting import plan
from feedforward.lm.experiment import Guidance, LanguageModelConfig, guided_share, run
from feedforward.lm.model import DecoderConfig, paper_config
from feedforward.profiles import get_profile, unknown
from feedforward.training import TrainingConfig

__all__ = ["LEARNING_RATES", "PAPER_TRAINING", "RATES", "grid", "half_guided", "plan", "run"]

# kind of feed-forward layer by arm, at its two sizes
_KINDS = {
    "lowrank": {63: {"share": 0.625}, 32: {"share": 0.3125}},
    "blockdense": {63: {"share": 0.625, "blocks": 2}, 32: {"share": 0.3125, "blocks": 2}},
    "blockshuffle": {63: {"blocks": 2}, 32: {"blocks": 4}},
}
FFNS = {"dense": {"ffn": "dense"}} | {
    f"{kind}-{percent}": {"ffn": kind, **sizes}
    for kind, both in _KINDS.items()
    for percent, sizes in both.items()
}
STRUCTURED_32 = tuple(f"{kind}-32" for kind in _KINDS)

# the learning rates that are tried at width 64
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
# of them one whose validation loss at width 64, mean over the seeds, is at most 0.005 nats above
# the least: closer rates are not told apart, and of those all arms but one take the same; at
# another width it falls as 1 / width
LEARNING_RATES = {arm: 1.6e-2 for arm in (*FFNS, *(f"{arm}-guided" for arm in STRUCTURED_32))}
LEARNING_RATES["blockshuffle-32-guided"] = 8e-3


# --- sizes of models, and kinds of run ----------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """What the runs of a profile share: fields of their configurations, beside the paper's own.

    Args:
        run: Of `LanguageModelConfig`.
        training: Of `TrainingConfig`.
        model: Of `DecoderConfig`.
        depths: Layers and query heads by width; 4 and 2 at all others.
        rates: Peak learning rate of each arm at width 64.
    """

    run: Mapping[str, Any]
    training: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    depths: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Size:
    """Models of one size that are compared, and how all of them are trained.

    Args:
        scale: The profile's.
        model: The model of an arm: one of `FFNS`, ``gqa``, ``wide-structured``, or ``gqa-small``,
            which is not among the paper's: as large as the one before, and dense.
        rate: The peak learning rate of an arm.
        tokens: At equal tokens, for a reference model of this size.
        suffix: Of the names of the runs.
        precision: Of `TrainingConfig`.
    """

    scale: _Scale
    model: Callable[[str], DecoderConfig]
    rate: Callable[[str], float]
    tokens: Callable[[DecoderConfig], float]
    suffix: str = ""
    precision: str = "bf16"

    def steps(self, reference: DecoderConfig) -> int:
        """Steps of the arms that have equal tokens."""
        one = self.run("one", reference, 1, 1.0)
        return math.ceil(self.tokens(reference) / one.tokens_per_step)

    def plain(self, arm: str, steps: int) -> LanguageModelConfig:
        """So many steps, all on fresh text."""
        return self.run(arm, self.model(arm), steps, self.rate(arm))

    def guided(self, arm: str, reference: str) -> LanguageModelConfig:
        """Self-guided training at the FLOPs of a reference: T steps, the first of them twice."""
        dense, model = self.model(reference), self.model(arm)
        steps = self.steps(dense)
        guidance = Guidance(round(guided_share(dense, model) * steps), repeat=True)
        name, steps = f"{arm}-guided", steps + guidance.steps
        return self.run(name, model, steps, self.rate(name), guidance=guidance)

    def equal_flops(self, arm: str, reference: str, name: str = "") -> LanguageModelConfig:
        """More tokens, at the FLOPs of a reference."""
        dense, model = self.model(reference), self.model(arm)
        more = count(dense).training_flops / count(model).training_flops
        steps = round(more * self.steps(dense))
        return self.run(name or f"{arm}-equal-flops", model, steps, self.rate(arm))

    def run(self, name: str, model: DecoderConfig, steps: int, lr: float, **changes):
        """The paper's optimizer: decay on everything, 10 % warm-up, cosine to a tenth."""
        training = TrainingConfig(
            steps=steps,
            lr=lr,
            betas=(0.9, 0.999),
            decay_all=True,
            precision=self.precision,
            evaluate_every=max(1, steps // 20),
            **self.scale.training,
        )
        own = {"experiment": "structured-ffn", **self.scale.run, **changes}
        variant = f"{name}{self.suffix}"
        return LanguageModelConfig(variant=variant, model=model, training=training, **own)


def _width(
    scale: _Scale,
    width: int,
    tokens_per_parameter: float = 10,
    suffix: str = "",
    precision: str = "bf16",
) -> _Size:
    """Models of a width, in the proportions of the paper's, trained on tokens in proportion."""
    layers, heads = scale.depths.get(width, (4, 2))

    def model(arm: str) -> DecoderConfig:
        if arm in FFNS:
            kind = {"heads": heads, **FFNS[arm]}
        else:  # as in the paper's table: feed-forward layers of 4.75 times the width
            queries = max(4, heads)
            kind = {"heads": queries, "head_width": width // queries, "kv_heads": queries // 4}
            kind["hidden"] = 19 * width // 4
        if arm == "wide-structured":  # attention of half the width
            kind |= {"heads": queries // 2, "ffn": "lowrank", "rank": width // 2}
        shape = {"width": width, "layers": layers, "activation": "gelu_tanh"}
        made = DecoderConfig(**scale.model | shape | kind)
        if arm == "gqa-small":
            return _as_large_as(model("wide-structured"), made)
        return made

    return _Size(
        scale,
        model,
        rate=lambda arm: scale.rates[_RATED.get(arm, arm)] * 64 / width,
        tokens=lambda reference: tokens_per_parameter * count(reference).parameters,
        suffix=suffix,
        precision=precision,
    )


def _as_large_as(other: DecoderConfig, model: DecoderConfig) -> DecoderConfig:
    """The model with the hidden width at which it has as many parameters as the other."""
    one, two = (count(replace(model, hidden=hidden)).parameters for hidden in (1, 2))
    return replace(model, hidden=1 + round((count(other).parameters - one) / (two - one)))


# arms that have the learning rate of another
_RATED = {
    "gqa": "dense",
    "gqa-small": "dense",
    "wide-structured": "lowrank-63",
    "wide-structured-guided": "lowrank-63",
}


def _paper_size(size: str) -> _Size:
    """The paper's models and training: one rate for all arms of a size."""
    tokens, lr = PAPER_TRAINING[size]

    def model(arm: str) -> DecoderConfig:
        name = {"dense": "", "wide-structured": "-ws"}.get(arm, f"-{arm}")
        return paper_config(f"{size}{name}")

    return _Size(_PAPER, model, lambda arm: lr, lambda reference: tokens, f"-{size}")


_CPU = _Scale(
    # few sequences, so that a small model has as many steps as the paper's smallest
    run={"batch": 16, "curve_tokens": 16_384},
    training={"log_every": 5, "checkpoint_every_seconds": 60.0},
    model={"vocabulary": 1024, "context": 128},
    rates=LEARNING_RATES,
)
_GPU = _Scale(
    run={
        "batch": 64,
        "curve_tokens": 1_048_576,
        "source": "hub:HuggingFaceFW/fineweb:sample-10BT",
    },
    training={"log_every": 10, "checkpoint_every_seconds": 60.0, "accumulate": 2},
    model={"vocabulary": 8192, "context": 512},
    depths={256: (4, 4), 384: (6, 6), 512: (8, 8), 768: (12, 12)},
    # not tuned: the paper's rate of its smallest model, 6e-4 at width 768
    rates=dict.fromkeys(LEARNING_RATES, 6e-4 * 768 / 64),
)
# 512 sequences a step: 8 GPUs with 8 micro-batches of 8
_PAPER = _Scale(
    run={
        "batch": 8,
        "processes": 8,
        "curve_tokens": 1_048_576,
        "source": "hub:tiiuae/falcon-refinedweb",
    },
    training={"log_every": 10, "checkpoint_every_seconds": 1800.0, "accumulate": 8},
)
# by size: tokens, 20 for each parameter of the dense model, and the peak learning rate
PAPER_TRAINING = {
    "s": (2.2e9, 6e-4),
    "m": (6.7e9, 3e-4),
    "l": (14.58e9, 2.5e-4),
    "xl": (25.5e9, 2e-4),
}


# --- structured-ffn -----------------------------------------------------------------------------


def _compared(size: _Size) -> list[LanguageModelConfig]:
    """Every kind at equal tokens, and the small ones at the FLOPs of the dense model."""
    steps = size.steps(size.model("dense"))
    runs = [size.plain(arm, steps) for arm in FFNS]
    for arm in STRUCTURED_32:
        runs += [size.guided(arm, "dense"), size.equal_flops(arm, "dense")]
    return runs


def _curves(size: _Size) -> list[LanguageModelConfig]:
    """The arms of the scaling curves at one more size, at equal tokens."""
    steps = size.steps(size.model("dense"))
    return [size.plain(arm, steps) for arm in ("dense", "lowrank-63", "lowrank-32")]


def _wide(size: _Size, *, control: bool = True) -> list[LanguageModelConfig]:
    """Grouped queries against wide and structured at as many training FLOPs.

    The control is a small dense model with as many parameters and as many FLOPs as the structured
    one: what it gains too comes from more tokens and not from structure.
    """
    small = ("gqa-small", "wide-structured") if control else ("wide-structured",)
    return [
        size.plain("gqa", size.steps(size.model("gqa"))),
        *(size.equal_flops(arm, "gqa", arm) for arm in small),
        size.guided("wide-structured", "gqa"),
    ]


def _on_one_text(runs: list[LanguageModelConfig]) -> list[LanguageModelConfig]:
    """The runs on the same stretch of a streamed text: what the longest of them needs."""
    tokens = max(run.fresh_steps * run.tokens_per_step for run in runs)
    return [replace(run, text_tokens=tokens) for run in runs]


def _structured_ffn(profile: str) -> list[LanguageModelConfig]:
    if profile == "smoke":
        small = {"batch": 8, "curve_tokens": 4_096, "final_tokens": 16_384}
        return [_shortened(config, 48, **small) for config in _compared(_width(_CPU, 64))]
    if profile == "cpu":
        return [
            *_compared(_width(_CPU, 128)),
            *_curves(_width(_CPU, 64, suffix="-w64")),
            *_curves(_width(_CPU, 96, suffix="-w96")),
            # the largest, for processors without bf16; and what the precision itself changes
            *_compared(_width(_CPU, 160, suffix="-w160", precision="fp32")),
            *_curves(_width(_CPU, 64, suffix="-w64-fp32", precision="fp32")),
            *_wide(_width(_CPU, 128)),
            *_wide(_width(_CPU, 64, 60, "-overtrained")),
        ]
    if profile == "gpu":
        return _on_one_text(
            [
                *_compared(_width(_GPU, 384, 20)),
                *_wide(_width(_GPU, 384, 20)),
                *_wide(_width(_GPU, 256, 60, "-overtrained")),
                *_curves(_width(_GPU, 256, 20, "-w256")),
                *_curves(_width(_GPU, 512, 20, "-w512")),
                # three quarters of what all together cost
                *_curves(_width(_GPU, 768, 20, "-w768")),
            ]
        )
    runs = []
    for size in map(_paper_size, PAPER_TRAINING):
        wide = _wide(size, control=False) if size.suffix in ("-m", "-l") else []
        runs += _on_one_text([*_compared(size), *wide])
    return runs


def _shortened(config: LanguageModelConfig, steps: int, **changes) -> LanguageModelConfig:
    """The same run in a few steps, to see that it works; its phases keep their shares."""
    share = steps / config.training.steps
    training = replace(config.training, steps=steps, precision="fp32", evaluate_every=steps // 4)
    guidance = config.guidance
    if guidance is not None:
        guidance = replace(guidance, steps=max(1, round(guidance.steps * share)))
    return replace(config, training=training, guidance=guidance, **changes)


# --- structured-ffn-stability -------------------------------------------------------------------


def _stability(profile: str) -> list[LanguageModelConfig]:
    size = _width(_CPU, 64)
    steps = size.steps(size.model("dense"))

    def arm(variant: str, model: DecoderConfig, lr: float, guidance: Guidance | None = None):
        run = size.run(variant, model, steps, lr, guidance=guidance, experiment=_STABILITY)
        return replace(run, training=replace(run.training, log_every=_FINE))

    def swept(name: str, model: DecoderConfig, guidance: Guidance | None = None):
        return [arm(f"{name}-lr{lr:g}", model, lr, guidance) for lr in RATES]

    half = Guidance(steps // 2)
    runs = [run for name in FFNS for run in swept(name, size.model(name))]
    for name in STRUCTURED_32:
        runs += swept(f"{name}-guided", size.model(name), half)
    for init in ("orthonormal", "gaussian"):
        runs += swept(f"lowrank-32-{init}", replace(size.model("lowrank-32"), init=init))
    for name in STRUCTURED_32:
        mixed = replace(half, stochastic=False)
        runs.append(arm(f"{name}-halfmixed", size.model(name), LEARNING_RATES[name], mixed))
    wrong = replace(half, released_start=True)
    model, lr = size.model("blockshuffle-32"), LEARNING_RATES["blockshuffle-32"]
    runs.append(arm("blockshuffle-32-released-guide", model, lr, wrong))
    if profile == "cpu":
        return runs
    if profile == "smoke":
        small = {"batch": 8, "curve_tokens": 4_096, "final_tokens": 16_384}
        return [_shortened(config, 48, **small) for config in runs]
    raise ValueError(f"{_STABILITY} has no profile {profile!r}: it has smoke and cpu")


def half_guided(arm: str) -> str:
    """The name of the stability run that guides an arm over its first half, at the arm's own rate.

    Raises:
        ValueError: When there is no such run of the arm: it has not 32 %, or is no arm.

    >>> half_guided("lowrank-32")
    'lowrank-32-guided-lr0.016'
    """
    if arm not in STRUCTURED_32:
        raise ValueError(unknown("guided arm", arm, STRUCTURED_32))
    return f"{arm}-guided-lr{LEARNING_RATES[arm]:g}"


_STABILITY = "structured-ffn-stability"
_FINE = 5  # steps that a point of the curves is the mean of, where spikes are looked for

PARTS = {"structured-ffn": _structured_ffn, _STABILITY: _stability}


def grid(part: str, profile: str) -> dict[str, LanguageModelConfig]:
    """The arms of an experiment at a profile, by name, all with seed 0.

    ``structured-ffn``: dense and structured models at equal tokens; the structured ones of 32 %
    also at the dense model's FLOPs, with self-guided training (``-guided``) and with more tokens
    (``-equal-flops``); all of them at a larger width (``-w160``) and some at smaller ones
    (``-w64``), one also in another precision (``-fp32``); grouped queries against wide and
    structured models and a small dense control, and all of them ``-overtrained``. At `paper` the
    paper's sizes (``-s``, ``-m``, ``-l``, ``-xl``), 512 sequences a step on eight GPUs.
    ``structured-ffn-stability``: a width of 64 at the learning rates of `RATES`, the starts of
    LowRank, and forms of self-guided training over the first half.

    Raises:
        ValueError: When the experiment or the profile is unknown, or it has no such profile.
    """
    if part not in PARTS:
        raise ValueError(unknown("part", part, PARTS))
    return {config.variant: config for config in PARTS[part](get_profile(profile).name)}
