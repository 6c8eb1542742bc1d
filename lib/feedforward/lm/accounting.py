"""What runs of language models cost before they are made, next to the figures of arXiv 2406.16450.

Parameters, tokens and FLOPs are counted; memory and hours are estimates, and say from what.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from feedforward.layers.cost import PAPER_SHAPES, breakdown, count
from feedforward.lm.experiment import LanguageModelConfig, guide_parameters, training_flops
from feedforward.lm.model import EXPERTS, STRUCTURED
from feedforward.lm.scaling import PERPLEXITIES
from feedforward.profiles import Plan

A100_FLOPS = 312e12
"""Peak of an NVIDIA A100 in bf16, FLOPs a second."""


@dataclass(frozen=True)
class Figure:
    """A number as the paper gives it.

    Args:
        value: In the unit of what it is compared with.
        mark: Where it was read: ``T`` in the text, ``I`` in a picture of a table, ``D`` digitised
            from a plot.
    """

    value: float
    mark: str


def _printed() -> dict[str, dict[str, Figure]]:
    names = ("parameters", "FFN parameters", "training FLOPs", "A100 hours")
    of_xl = {
        "dense": (1274e6, 805e6, 2.10e20, 352.2),
        "lowrank-63": (985e6, 516e6, 1.66e20, 302.2),
        "lowrank-32": (744e6, 275e6, 1.29e20, 260.2),
        "blockdense-63": (955e6, 486e6, 1.61e20, 298.7),
        "blockdense-32": (728e6, 260e6, 1.27e20, 261.2),
        "blockshuffle-63": (985e6, 516e6, 1.66e20, 330.6),
        "blockshuffle-32": (744e6, 275e6, 1.29e20, 284.9),
    }
    figures = {
        f"{arm}-xl": {name: Figure(value, "I") for name, value in zip(names, values, strict=True)}
        for arm, values in of_xl.items()
    }
    others = {"s": (110e6, 2.2e9), "m": (335e6, 6.7e9), "l": (729e6, 14.58e9), "xl": (None, 25.5e9)}
    for size, (parameters, tokens) in others.items():
        own = figures.setdefault(f"dense-{size}", {})
        own["tokens"] = Figure(tokens, "T")
        if parameters:
            own["parameters"] = Figure(parameters, "T")
    for variant, parameters in {
        "gqa-m": 335e6,
        "wide-structured-m": 219e6,
        "wide-structured-guided-m": 219e6,
        "gqa-l": 729e6,
        "wide-structured-l": 464e6,
        "wide-structured-guided-l": 464e6,
    }.items():
        figures[variant] = {"parameters": Figure(parameters, "I")}
    for variant, row in PERPLEXITIES.items():
        for size, printed in row.items():
            figures.setdefault(f"{variant}-{size}", {})["validation perplexity"] = Figure(*printed)
    return figures


PRINTED: Mapping[str, Mapping[str, Figure]] = MappingProxyType(_printed())
"""The figures of arXiv 2406.16450 by variant of the profile `paper`, and by quantity.

``parameters``, ``FFN parameters``, ``training FLOPs``, ``tokens``, ``A100 hours`` and
``validation perplexity``, as far as it gives them. The digitised perplexities are good to about
0.02, those at equal FLOPs (``-guided``, ``-equal-flops``) to 0.05.
"""


# --- one run ------------------------------------------------------------------------------------


def account(config: LanguageModelConfig) -> dict[str, float]:
    """What a run costs, by quantity.

    Args:
        config: Of a run with dense or structured feed-forward layers.

    Returns:
        ``parameters``, ``FFN parameters``, ``tokens`` (repeated ones included), ``training FLOPs``,
        ``bytes per GPU`` (see `memory`) and ``A100 hours`` (see `gpu_hours`, all GPUs together).

    Raises:
        ValueError: When the model has experts, or gates.
    """
    flops = training_flops(config)
    return {
        "parameters": count(config.model).parameters,
        "FFN parameters": breakdown(config.model)["ffn"].parameters,
        "tokens": config.tokens,
        "training FLOPs": flops,
        "bytes per GPU": memory(config),
        "A100 hours": gpu_hours(flops),
    }


def memory(config: LanguageModelConfig) -> int:
    """An estimate of the memory that training takes on each GPU in bf16 autocast, in bytes.

    ``22 P + n A``. For each of the P parameters, those of guides included, 4 bytes in float32 for
    the weight, its gradient, two moments of AdamW and its place in the buckets in which GPUs
    average gradients (not on a single one: 18), and 2 for the copy in bf16. For each of the n
    tokens of a micro-batch A bytes: `activation_bytes`. Not in it: what the allocator cannot use,
    the libraries' own share (about a GiB), and evaluation, which takes less.

    Args:
        config: Of a run with dense or structured feed-forward layers.

    Raises:
        ValueError: When the model has experts, or gates.
    """
    parameters = count(config.model).parameters
    if config.guidance is not None:
        parameters += guide_parameters(config.model)
    each = 22 if config.processes > 1 else 18
    tokens = config.batch * config.model.context
    return each * parameters + tokens * activation_bytes(config)


def activation_bytes(config: LanguageModelConfig) -> int:
    """Bytes that the backward pass needs of one token, in bf16 autocast with fused attention.

    A layer keeps ``16 H + 4 A + 4 K + 4 F + 4 R + 4 h + 16`` bytes, with the width H, the width A
    of h query heads, K of the key heads, F between the two maps and R, in structured layers,
    between V and U: the inputs of both norms in float32, and 8 bytes of statistics; their outputs
    in bf16, for each of four maps a copy; q, k, v, the attention's output and its normaliser; both
    sides of the activation; what stands between V and U of both maps.

    The end takes ``6 H + 24`` for the last norm, the token and its target, and ``12`` for each
    entry of the vocabulary, the log-probabilities and two gradients: the backward pass begins with
    its largest moment.

    Args:
        config: Of a run with dense or structured feed-forward layers.

    Raises:
        ValueError: When the model has experts, or gates.
    """
    model, shape = config.model, config.model.shape()
    if model.ffn in EXPERTS or model.gated:
        kind = f"{'gated ' * model.gated}{model.ffn}"
        raise ValueError(
            f"the feed-forward layers are {kind}; activations are estimated for layers without a "
            f"gate that are dense, {', '.join(STRUCTURED)}"
        )
    attention = 4 * (shape.attention_width + shape.kv_width + shape.heads)
    layer = 16 * shape.width + attention + 4 * shape.hidden + 16
    between = 0
    if model.ffn in STRUCTURED:
        between = 4 * (shape.rank or min(shape.width, shape.hidden))
    end = 6 * shape.width + 24 + 12 * shape.vocabulary
    return shape.layers * layer + (shape.layers - shape.dense_layers) * between + end


def gpu_hours(flops: float) -> float:
    """An estimate of the hours that a run takes on NVIDIA A100 GPUs, those of all added up.

    All runs are taken to use the share of the peak that the paper's dense model `xl` used:
    `utilisation`. The paper's structured models used less of it, so that their hours come out 8 to
    24 % short of the printed ones.

    Args:
        flops: Of the training.
    """
    return flops / (utilisation() * A100_FLOPS) / 3600


@functools.cache
def utilisation() -> float:
    """The share of the peak of its A100s that the paper's dense model `xl` used.

    Its FLOPs over its printed hours (352.2, read from a picture).

    >>> f"{utilisation():.0%}"
    '53%'
    """
    figures = PRINTED["dense-xl"]
    flops = count(PAPER_SHAPES["xl"]).training_flops * figures["tokens"].value
    return flops / (figures["A100 hours"].value * 3600 * A100_FLOPS)


# --- all runs of a profile ----------------------------------------------------------------------

# by profile, column: quantity, what it is divided by, format
_GPU_COLUMNS = {
    "M all": ("parameters", 1e6, ".1f"),
    "M FFN": ("FFN parameters", 1e6, ".1f"),
    "B tokens": ("tokens", 1e9, ".2f"),
    "FLOPs": ("training FLOPs", 1.0, ".2e"),
    "GiB/GPU": ("bytes per GPU", 2**30, ".1f"),
}
_COLUMNS = {
    "gpu": _GPU_COLUMNS,
    "paper": _GPU_COLUMNS
    | {
        "A100 h": ("A100 hours", 1.0, ".1f"),
        "ppl": ("validation perplexity", 1.0, ".2f"),
    },
}
# at all others models are small
_SMALL_COLUMNS = {
    "M all": ("parameters", 1e6, ".3f"),
    "M FFN": ("FFN parameters", 1e6, ".3f"),
    "M tokens": ("tokens", 1e6, ".3f"),
    "FLOPs": ("training FLOPs", 1.0, ".2e"),
}


def plan(profile: str, configs: Iterable[LanguageModelConfig]) -> Plan:
    """What runs would cost; at `paper` also the paper's own figures and the commands to start them.

    Args:
        profile: Theirs. Memory is estimated at those for GPUs, hours only at `paper`.
        configs: Of the runs.
    """
    configs = list(configs)
    columns = _COLUMNS.get(profile, _SMALL_COLUMNS)
    rows = [row for config in configs for row in _rows(config, columns, profile == "paper")]
    notes = [_FLOPS_NOTE]
    if profile in ("gpu", "paper"):
        notes += [_MEMORY_NOTE, *_texts(configs)]
    if profile == "paper":
        notes += [
            f"A100 h: an estimate: FLOPs / ({utilisation():.1%} of {A100_FLOPS / 1e12:.0f} "
            "TFLOP/s), all GPUs together. That share is what the paper's dense xl used in its "
            "352.2 hours; it is the one calibration for all runs.",
            "paper: T in its text, I in a picture of a table, D digitised from a plot; "
            "ppl: validation perplexity.",
            *_steps(configs),
        ]
    commands = [_command(profile, config) for config in configs if config.processes > 1]
    return Plan(("run", *columns), rows, notes, commands)


_FLOPS_NOTE = (
    "FLOPs: 3 x tokens x (2 x parameters in matrix products, tied logits included, + 4 x layers x "
    "context x attention width); a stochastic guide adds 3 for each of its parameters and guided "
    "tokens. Tokens seen again count again."
)
_MEMORY_NOTE = (
    "GiB/GPU: an estimate: for each parameter, guides included, 16 bytes (weight, gradient, two "
    "moments) + 2 (bf16 copy) + 4 on several GPUs (buckets of gradients); for each token of a "
    "micro-batch layers x (16 H + 4 A + 4 K + 4 F + 4 R) + 12 x vocabulary bytes, with H the "
    "width, A and K that of queries and of keys, F the hidden one, R that between V and U."
)


def _rows(
    config: LanguageModelConfig, columns: Mapping[str, tuple], with_paper: bool
) -> list[list[str]]:
    """One row with our numbers; where the paper has some, one with them and one that compares."""
    own, paper = account(config), PRINTED.get(config.variant, {}) if with_paper else {}
    ours, theirs, compared = [config.variant], ["  paper"], ["  ours / paper"]
    for quantity, unit, form in columns.values():
        number, figure = own.get(quantity), paper.get(quantity)
        ours.append("" if number is None else f"{number / unit:{form}}")
        theirs.append(f"{figure.value / unit:{form}} {figure.mark}" if figure else "")
        both = figure is not None and number is not None
        compared.append(f"{number / figure.value - 1:+.1%}" if both else "")
    return [row for row in (ours, theirs, compared) if row is ours or any(row[1:])]


def _texts(configs: list[LanguageModelConfig]) -> list[str]:
    """Which text is streamed, and what it takes on the disk."""
    streamed: dict[str, set[int]] = {}
    for config in configs:
        if config.text_tokens:
            streamed.setdefault(config.source, set()).add(config.text_tokens)
    return [
        f"text: {source}, streamed and encoded once for each length, by the first run that needs "
        f"it: {', '.join(f'{n / 1e9:.2f}' for n in sorted(numbers))} B tokens of 2 bytes."
        for source, numbers in streamed.items()
    ]


def _steps(configs: list[LanguageModelConfig]) -> list[str]:
    """How a step's sequences are shared out."""
    shared = {(c.processes, c.training.accumulate, c.batch, c.model.context) for c in configs}
    return [
        f"a step: {gpus} GPUs x {micro} micro-batches x {batch} sequences of {context} tokens = "
        f"{gpus * micro * batch} sequences. Other GPUs: --nproc-per-node and the configuration's "
        "processes, accumulate and batch change together."
        for gpus, micro, batch, context in sorted(shared)
    ]


def _command(profile: str, config: LanguageModelConfig) -> str:
    return (
        f"torchrun --nproc-per-node {config.processes} -m feedforward.cli run {config.experiment} "
        f"--profile {profile} \\\n    --record --variants {config.variant}"
    )
