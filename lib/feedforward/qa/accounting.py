"""What runs of readers cost before they are made: parameters, steps, FLOPs and memory.

Parameters are counted, those of an encoder in its module, made without weights from its
configuration. Steps are given, or at least as many as one window a question makes; FLOPs
are those of windows of full length. Memory is an estimate, and says from what.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from feedforward.encoders import outline
from feedforward.layers.cost import count
from feedforward.profiles import Plan
from feedforward.qa.model import ReaderConfig, repeated_flops, switched_layers
from feedforward.qa.runs import EXPERIMENT, QuestionAnsweringConfig
from feedforward.surgery.operations import choose


@dataclass(frozen=True)
class ReaderCost:
    """What a reader costs.

    Attributes:
        parameters: All learned numbers.
        active_parameters: Those that one token uses.
        flops: Forward pass, per token of a window of full length.
        width: Of a token.
        layers: That keep activations, the stacked ones and those of all encoders included.
    """

    parameters: int
    active_parameters: int
    flops: int
    width: int
    layers: int


_outline = lru_cache(maxsize=8)(outline)


def reader_cost(config: ReaderConfig, length: int) -> ReaderCost:
    """What a reader costs, without making it.

    Args:
        config: Which reader.
        length: Tokens of a window.

    Raises:
        MissingEncoder: When its encoder cannot be loaded.
        ValueError: When it does not fit its encoder, as ``build_reader`` says.
    """
    encoder = _outline(config.encoder)
    whole = count(encoder, context=length)
    d = encoder.config.hidden_size
    hidden, experts = config.hidden or 4 * d, config.experts
    parameters, active = whole.parameters, whole.active_parameters
    flops = whole.flops + repeated_flops(encoder)
    layers, ends = encoder.config.num_hidden_layers, 2 * d + 2
    if config.form == "mixture":
        gate = experts * d * experts
        total = experts * (parameters + ends) + gate
        # all encoders run, their gate once a window
        flops = experts * (flops + 4 * d) + 2 * gate // length
        return ReaderCost(total, total, flops, d, experts * layers)
    if config.form in ("moe-head", "dense-head"):
        one = 2 * d * hidden
        if config.form == "moe-head":
            gate = experts * d
            parameters += experts * one + gate
            used = config.k * one + gate
        else:
            used = (config.k if config.match == "active" else experts) * one
            parameters += used
        active, flops = active + used, flops + 2 * used
    elif config.form == "switch":
        ffns = choose(encoder, switched_layers(encoder, config))
        maps = [p for ffn in ffns for linear in ffn.linears for p in linear.parameters()]
        gates = len(ffns) * experts * d
        parameters += (experts - 1) * sum(p.numel() for p in maps) + gates
        active, flops = active + gates, flops + 2 * gates
    elif config.form == "stacked":
        attention, gate = 4 * d * d + 4 * d, experts * d
        expert = 2 * d * hidden + d + hidden
        norms = 4 * d
        parameters += config.depth * (attention + norms + gate + experts * expert) + 2 * d
        used = attention + norms + gate + expert
        active += config.depth * used + 2 * d
        products = 4 * d * d + gate + 2 * d * hidden
        flops += config.depth * (2 * products + 4 * d * length)
        layers += config.depth
    return ReaderCost(parameters + ends, active + ends, flops + 4 * d, d, layers)


def training_flops(config: QuestionAnsweringConfig) -> int:
    """The FLOPs of all stages with windows of full length: three times the forward ones."""
    windows = sum(stage.training.steps * stage.batch for stage in config.stages)
    return 3 * reader_cost(config.reader, config.length).flops * windows * config.length


def memory(config: QuestionAnsweringConfig) -> int:
    """An estimate of the memory that training takes in bf16 autocast, in bytes.

    ``18 P + 34 n H L``: for each of the P parameters 16 bytes in float32 (weight, gradient, two
    moments of AdamW) and 2 for the copy in bf16; for each of the n tokens of a batch and of the L
    layers 34 bytes for each of its H numbers (Korthikanti et al. 2022, arXiv 2205.05198, with
    fused attention).
    """
    cost = reader_cost(config.reader, config.length)
    tokens = max(stage.batch for stage in config.stages) * config.length
    return 18 * cost.parameters + 34 * tokens * cost.width * cost.layers


_COLUMNS = ("run", "M all", "M active", "steps", "FLOPs")


def plan(profile: str, configs: Iterable[QuestionAnsweringConfig]) -> Plan:
    """What runs would cost, and at `paper` the commands that start them.

    Args:
        profile: Theirs; memory is estimated at those for GPUs.
        configs: Of the runs.
    """
    configs = list(configs)
    with_memory = profile in ("gpu", "paper")
    rows = []
    for config in configs:
        cost = reader_cost(config.reader, config.length)
        steps = (f"{'>=' * bool(s.epochs)}{s.training.steps:,}" for s in config.stages)
        row = [
            config.variant,
            f"{cost.parameters / 1e6:.1f}",
            f"{cost.active_parameters / 1e6:.1f}",
            " + ".join(steps),
            f"{training_flops(config):.2e}",
        ]
        rows.append([*row, *([f"{memory(config) / 2**30:.1f}"] if with_memory else [])])
    notes = [
        "steps: of each stage. FLOPs: 3 x those of the forward pass, all windows of full length "
        "and attention over all of it included.",
        _shared(configs),
    ]
    if any(stage.epochs for config in configs for stage in config.stages):
        notes.append(
            ">=: these stages are given in epochs, and a long passage makes several windows; steps "
            "and FLOPs shown are those of one window a question."
        )
    if with_memory:
        notes.append(
            "GiB: an estimate: 18 bytes for each parameter (weight, gradient, two moments, bf16 "
            "copy) and 34 for each number of each layer and token of a batch."
        )
    commands = []
    if profile == "paper":
        variants = " ".join(config.variant for config in configs)
        start = f"feedforward run {EXPERIMENT} --profile {profile} --record"
        commands = [f"{start} \\\n    --variants {variants}"]
    return Plan((*_COLUMNS, *(["GiB"] if with_memory else [])), rows, notes, commands)


def _shared(configs: list[QuestionAnsweringConfig]) -> str:
    """How many of the stages are trained once for several runs."""
    stages, steps, made = 0, 0, set()
    for config in configs:
        for number in range(1, len(config.stages) + 1):
            stages += 1
            decisive = (config.reader, config.stages[:number], config.length, config.pad_to_length)
            if decisive not in made:
                made.add(decisive)
                steps += config.stages[number - 1].training.steps
    return (
        f"{stages} stages of {len(configs)} runs, {len(made)} of them different: runs that begin "
        f"alike share the weights, so that {steps:,} steps are made for each seed."
    )
