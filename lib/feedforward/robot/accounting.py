"""What runs of policies cost before they are made: parameters, steps, FLOPs and memory.

Parameters are counted in models without memory. FLOPs are those of the linear maps on every token
of a batch of full chunks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from feedforward.layers.cost import count
from feedforward.profiles import Plan
from feedforward.robot.policy import FlowPolicy, PolicyConfig
from feedforward.robot.runs import EXPERIMENT, RobotConfig, Tuning, tuned

_WORDS = 12  # tokens of an instruction, with the special ones


@dataclass(frozen=True)
class PolicyCost:
    """What a policy costs.

    Attributes:
        parameters: All learned numbers.
        expert: Those of the action expert.
        active_expert: Those of them that one token uses.
        flops: Forward pass of the action expert, per token.
        training_flops: Of both streams, per chunk.
    """

    parameters: int
    expert: int
    active_expert: int
    flops: int
    training_flops: int


@lru_cache(maxsize=64)
def policy_cost(policy: PolicyConfig, tuning: Tuning | None = None) -> PolicyCost:
    """What a policy costs, without memory for its weights.

    Args:
        policy: The dense parent.
        tuning: What becomes of it; None for the parent itself.

    >>> from feedforward.robot.policy import CONFIGS
    >>> round(policy_cost(CONFIGS["pi0"]).expert / 1e9, 2)
    0.31
    """
    with torch.device("meta"):
        model = FlowPolicy(tuned(policy, tuning))
    expert, whole = count(model.action_expert), count(model)
    prefix = count(model.prefix)
    tokens = _WORDS + policy.cameras
    per_chunk = expert.training_flops * (1 + policy.horizon) + prefix.training_flops * tokens
    return PolicyCost(
        whole.parameters, expert.parameters, expert.active_parameters, expert.flops, per_chunk
    )


def least_plan_time(
    policy: PolicyConfig,
    tuning: Tuning | None = None,
    *,
    robots: int = 1,
    steps: int = 10,
    peak: float = 312e12,
    bandwidth: float = 2.039e12,
) -> float:
    """A lower bound on the time of a plan, in seconds: arithmetic at the peak, or one reading of
    the action expert's weights in each Euler step, whichever takes longer.

    All experts are read, since the tokens of a plan call on all of them, but for a collapsed
    router, whose others stay idle; two bytes a weight. The prefix, which is computed once, and
    whatever starting a kernel takes come on top. Explained in
    ``book/adamoe/05-controls-and-verdicts``.

    Args:
        policy: The dense parent.
        tuning: What becomes of it; None for the parent itself.
        robots: Planned for together.
        steps: Euler steps.
        peak: FLOP/s; by default those of an A100 in bf16.
        bandwidth: Bytes a second of the memory; by default those of an A100 with 80 GB.

    Raises:
        ValueError: When a number is not positive.
    """
    given = {"robots": robots, "steps": steps, "peak": peak, "bandwidth": bandwidth}
    for name, value in given.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be positive")
    cost = policy_cost(policy, tuning)
    idle = tuning is not None and tuning.ffn == "collapsed"
    read = 2 * (cost.active_expert if idle else cost.expert) / bandwidth
    return steps * max(robots * policy.horizon * cost.flops / peak, read)


def training_flops(config: RobotConfig) -> int:
    """The FLOPs of the parent's training and of the tuning."""
    total = config.parent.steps * policy_cost(config.policy).training_flops
    if config.tuning:
        cost = policy_cost(config.policy, config.tuning)
        total += config.tuning.training.steps * cost.training_flops
    return total * config.batch


def memory(config: RobotConfig) -> int:
    """An estimate of what weights, gradients, moments and average take in training, in bytes.

    Twenty bytes a parameter in float32: weight, gradient, two moments of AdamW and their average.
    """
    return 20 * policy_cost(config.policy, config.tuning).parameters


def plan(profile: str, configs: Iterable[RobotConfig]) -> Plan:
    """What runs would cost, and at `paper` the commands that start them.

    Args:
        profile: Theirs.
        configs: Of the runs.
    """
    configs = list(configs)
    rows = []
    for config in configs:
        cost = policy_cost(config.policy, config.tuning)
        steps = [config.parent.steps, *([config.tuning.training.steps] if config.tuning else [])]
        attempts = len(config.tasks) * config.evaluation.episodes
        rows.append(
            [
                config.variant,
                f"{cost.parameters / 1e6:.2f}",
                f"{cost.expert / 1e6:.2f}",
                f"{cost.active_expert / 1e6:.2f}",
                f"{cost.flops / 1e6:.1f}",
                " + ".join(f"{each:,}" for each in steps),
                f"{training_flops(config):.2e}",
                f"{memory(config) / 2**30:.2f}",
                f"{attempts:,}" if attempts else "-",
            ]
        )
        if profile == "paper":
            times = (least_plan_time(config.policy, config.tuning, robots=n) for n in (1, 32))
            rows[-1] += [f"{1e3 * time:.1f}" for time in times]
    parents = {(config.policy, config.parent, config.tasks) for config in configs}
    notes = [
        "M: parameters of the policy, of its action expert, and of that those that a token uses, "
        "in millions; MFLOP: of the action expert's forward pass, per token.",
        f"{len(configs)} runs share {len(parents)} dense parents a seed, each trained once.",
        "GiB: 20 bytes a parameter (weight, gradient, two moments, average); activations come on "
        "top.",
    ]
    commands = []
    if profile == "paper":
        variants = " ".join(config.variant for config in configs)
        start = f"FEEDFORWARD_DATA=data feedforward run {EXPERIMENT} --profile {profile} --record"
        commands = [f"{start} \\\n    --variants {variants}"]
        notes.append(
            "data/robot is a data set in the LeRobot format v3.0, for instance a download of "
            "LIBERO's; it gives losses, and success needs LIBERO's own simulator."
        )
    columns = ["run", "M", "M expert", "M active", "MFLOP", "steps", "FLOPs", "GiB", "attempts"]
    if profile == "paper":
        columns += ["ms a plan", "for 32"]
        notes.append(
            "ms a plan: at least, on an A100 in bf16, for one robot and for 32 together; the "
            "arithmetic or the reading of weights, whichever takes longer."
        )
    return Plan(tuple(columns), rows, notes, commands)
