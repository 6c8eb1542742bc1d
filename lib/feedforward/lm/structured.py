"""The arms of the structured part of the book: which models, on how many tokens, at which rates.

Two experiments use the runs of `feedforward.lm.experiment`. ``structured-ffn`` compares dense and
structured models at equal tokens and at equal FLOPs. ``structured-ffn-stability`` trains the
smallest of them at several learning rates, counts spikes, compares the ways to start the weights
and the forms of self-guided training, and so finds the learning rate of each arm. The chapters of
``book/structured-ffn`` explain both.
"""

import math
from dataclasses import replace

from feedforward.layers.cost import count
from feedforward.lm.experiment import Guidance, LanguageModelConfig, guided_share, run
from feedforward.lm.model import DecoderConfig
from feedforward.profiles import get_profile, unknown
from feedforward.training import TrainingConfig

__all__ = ["LEARNING_RATES", "RATES", "grid", "run"]

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
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
# of them the one with the least validation loss at width 64, mean over the seeds; at another
# width it falls as 1 / width
LEARNING_RATES = {arm: 1.6e-2 for arm in (*FFNS, *(f"{arm}-guided" for arm in STRUCTURED_32))}

_BACKBONE = {"vocabulary": 1024, "layers": 4, "heads": 2, "context": 128}
_PAPER = {"activation": "gelu_tanh"}  # the rest of the paper's backbone is the default
_BATCH = 16  # small, so that a small model has as many steps as the paper's smallest
_TOKENS_PER_PARAMETER = 10  # of the dense model, for every arm of its size


def _model(width: int, arm: str, **changes) -> DecoderConfig:
    return DecoderConfig(width=width, **_BACKBONE | _PAPER | FFNS[arm] | changes)


def _training(steps: int, lr: float) -> TrainingConfig:
    """The paper's optimizer: AdamW with decay on everything, 10 % warm-up, cosine to a tenth."""
    return TrainingConfig(
        steps=steps,
        lr=lr,
        betas=(0.9, 0.999),
        decay_all=True,
        precision="bf16",
        log_every=5,
        evaluate_every=max(1, steps // 20),
        checkpoint_every_seconds=60.0,
    )


def _steps(model: DecoderConfig, tokens_per_parameter: float = _TOKENS_PER_PARAMETER) -> int:
    tokens = tokens_per_parameter * count(model).parameters
    return math.ceil(tokens / (_BATCH * model.context))


def _run(
    variant: str,
    model: DecoderConfig,
    steps: int,
    lr: float,
    *,
    guidance: Guidance | None = None,
    experiment: str = "structured-ffn",
) -> LanguageModelConfig:
    return LanguageModelConfig(
        variant=variant,
        model=model,
        training=_training(steps, lr),
        batch=_BATCH,
        curve_tokens=16_384,
        experiment=experiment,
        guidance=guidance,
    )


def _guided(variant: str, dense: DecoderConfig, model: DecoderConfig, steps: int, lr: float):
    """Self-guided training at the FLOPs of the dense model: T steps, the first of them twice."""
    guided = round(guided_share(dense, model) * steps)
    return _run(variant, model, steps + guided, lr, guidance=Guidance(guided, repeat=True))


def _equal_flops(variant: str, dense: DecoderConfig, model: DecoderConfig, steps: int, lr: float):
    """More tokens, at the FLOPs of the dense model."""
    more = count(dense).training_flops / count(model).training_flops
    return _run(variant, model, round(more * steps), lr)


# --- structured-ffn -----------------------------------------------------------------------------


def _compared(width: int) -> list[LanguageModelConfig]:
    """Every kind at equal tokens, and the small ones at the FLOPs of the dense model."""
    dense, runs = _model(width, "dense"), []
    steps = _steps(dense)
    for arm in FFNS:
        runs.append(_run(arm, _model(width, arm), steps, _rate(arm, width)))
    for arm in STRUCTURED_32:
        common = dense, _model(width, arm), steps
        runs.append(_guided(f"{arm}-guided", *common, _rate(f"{arm}-guided", width)))
        runs.append(_equal_flops(f"{arm}-equal-flops", *common, _rate(arm, width)))
    return runs


def _sized(width: int, arms=("dense", "lowrank-63", "lowrank-32")) -> list[LanguageModelConfig]:
    """The arms of the scaling curves at one more width, at equal tokens."""
    steps = _steps(_model(width, "dense"))
    return [_run(f"{arm}-w{width}", _model(width, arm), steps, _rate(arm, width)) for arm in arms]


def _wide(width: int, tokens_per_parameter: float, suffix: str = "") -> list[LanguageModelConfig]:
    """Grouped queries against wide and structured, in the proportions of the paper's table.

    Both have feed-forward layers of 4.75 times the width; wide and structured has attention of
    half the width and LowRank of rank ``width / 2``, and as many training FLOPs.
    """
    sizes = {"head_width": width // 4, "kv_heads": 1, "hidden": 19 * width // 4}
    grouped = _model(width, "dense", heads=4, **sizes)
    wide = _model(width, "dense", heads=2, **sizes, ffn="lowrank", rank=width // 2)
    steps, rates = _steps(grouped, tokens_per_parameter), (_rate("dense", width),)
    rates += (_rate("lowrank-63", width),)
    return [
        _run(f"gqa{suffix}", grouped, steps, rates[0]),
        _equal_flops(f"wide-structured{suffix}", grouped, wide, steps, rates[1]),
        _guided(f"wide-structured-guided{suffix}", grouped, wide, steps, rates[1]),
    ]


def _rate(arm: str, width: int) -> float:
    return LEARNING_RATES[arm] * 64 / width


def _structured_ffn(profile: str) -> list[LanguageModelConfig]:
    if profile == "smoke":
        small = {"batch": 8, "curve_tokens": 4_096, "final_tokens": 16_384}
        return [_shortened(config, 48, **small) for config in _compared(64)]
    if profile == "cpu":
        return [
            *_compared(128),
            *_sized(64),
            *_sized(96),
            *_wide(128, _TOKENS_PER_PARAMETER),
            *_wide(64, 60, "-overtrained"),
        ]
    raise ValueError(f"structured-ffn has no profile {profile!r}: it has smoke and cpu")


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
    dense = _model(64, "dense")
    steps = _steps(dense)

    def arm(variant: str, model: DecoderConfig, lr: float, guidance: Guidance | None = None):
        run = _run(variant, model, steps, lr, guidance=guidance, experiment=_STABILITY)
        return replace(run, training=replace(run.training, log_every=_FINE))

    def swept(name: str, model: DecoderConfig, guidance: Guidance | None = None):
        return [arm(f"{name}-lr{lr:g}", model, lr, guidance) for lr in RATES]

    half = Guidance(steps // 2)
    runs = [run for name in FFNS for run in swept(name, _model(64, name))]
    runs += swept("lowrank-32-guided", _model(64, "lowrank-32"), half)
    for init in ("orthonormal", "gaussian"):
        runs += swept(f"lowrank-32-{init}", _model(64, "lowrank-32", init=init))
    for name in STRUCTURED_32:
        model, lr = _model(64, name), LEARNING_RATES[name]
        runs.append(arm(f"{name}-halfguided", model, lr, half))
        runs.append(arm(f"{name}-halfmixed", model, lr, replace(half, stochastic=False)))
    wrong = replace(half, released_start=True)
    model, lr = _model(64, "blockshuffle-32"), LEARNING_RATES["blockshuffle-32"]
    runs.append(arm("blockshuffle-32-released-guide", model, lr, wrong))
    if profile == "cpu":
        return runs
    if profile == "smoke":
        small = {"batch": 8, "curve_tokens": 4_096, "final_tokens": 16_384}
        return [_shortened(config, 48, **small) for config in runs]
    raise ValueError(f"{_STABILITY} has no profile {profile!r}: it has smoke and cpu")


_STABILITY = "structured-ffn-stability"
_FINE = 5  # steps that a point of the curves is the mean of, where spikes are looked for

PARTS = {"structured-ffn": _structured_ffn, _STABILITY: _stability}


def grid(part: str, profile: str) -> dict[str, LanguageModelConfig]:
    """The arms of an experiment at a profile, by name, all with seed 0.

    ``structured-ffn``: dense and structured models at equal tokens; the structured ones of 32 %
    also at the dense model's FLOPs, with self-guided training (``-guided``) and with more tokens
    (``-equal-flops``); further widths (``-w64``); grouped queries against wide and structured
    models, and both ``-overtrained``. ``structured-ffn-stability``: a width of 64 at the learning
    rates of `RATES`, the starts of LowRank, and forms of self-guided training over the first half.

    Raises:
        ValueError: When the experiment or the profile is unknown, or it has no such profile.
    """
    if part not in PARTS:
        raise ValueError(unknown("part", part, PARTS))
    return {config.variant: config for config in PARTS[part](get_profile(profile).name)}
