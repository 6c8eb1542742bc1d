"""How long policies plan: each beside a dense one, turn and turn about.

``grid`` lists what the experiment ``adamoe-speed`` times at a profile, ``run`` times one of it and
returns its record. Weights are drawn and not trained, for the work depends on them in one thing
alone: how many experts the tokens of a plan choose. Here they choose all in turn, as the balance
loss would have it, which is the most work; a policy whose tokens agree is faster. The seeds are
repetitions of the whole measurement, and an interval over them is the noise of timing. The chapter
``book/adamoe/05-controls-and-verdicts`` shows the results.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from feedforward.layers.routing import Routing
from feedforward.profiles import get_profile, resolve_device, unknown
from feedforward.records import Provenance, Record
from feedforward.robot import experiment
from feedforward.robot.accounting import policy_cost, tuned
from feedforward.robot.policy import CONFIGS, FlowPolicy, PolicyConfig
from feedforward.robot.rollout import plan_latency
from feedforward.robot.scores import rerouted
from feedforward.timing import threads
from feedforward.training import seed_everything

EXPERIMENT = "adamoe-speed"

#: The arms of the part that plan at another cost than the dense policy.
ARMS = (
    "adamoe",
    "vanilla-moe",
    "csmoe",
    "adamoe-k2",
    "adamoe-e8",
    "single-expert",
    "dense-matched",
    "dense-matched-total",
)


@dataclass(frozen=True)
class PlanSpeedConfig:
    """What decides the times of a policy's plans next to those of a dense one.

    Args:
        variant: The policy's name, not ``"dense"``.
        policy: Its sizes.
        reference: Those of the dense policy.
        batches: Numbers of robots planned for together.
        steps: Euler steps of a plan.
        rounds: In which both have a turn; at least 3.
        seed: Of weights, states and noise; each is a repetition of the measurement.
        experiment: The part of the book.

    Raises:
        ValueError: When a number is out of range.
    """

    variant: str
    policy: PolicyConfig
    reference: PolicyConfig
    batches: tuple[int, ...] = (1, 32)
    steps: int = 10
    rounds: int = 30
    seed: int = 0
    experiment: str = EXPERIMENT

    def __post_init__(self):
        if self.variant == "dense":
            raise ValueError("variant is 'dense', which is the reference; give another name")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches is {self.batches!r}; give whole numbers from 1")
        if self.steps < 1 or self.rounds < 3:
            raise ValueError(
                f"steps is {self.steps} and rounds {self.rounds}; give at least 1 step and 3 rounds"
            )


def run(
    config: PlanSpeedConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> Record:
    """Time what `config` says, on a machine that has nothing else to do.

    Args:
        config: What to time.
        progress: Taken for the other experiments' sake; there is no bar.
        device: Where.

    Returns:
        The record. ``latency`` and ``dense latency`` are median times of a plan in milliseconds and
        ``latency ratio`` is the one over the other; ``, p95`` marks a 95th percentile, ``at n`` a
        plan for n robots together. ``FLOPs over dense`` are the action expert's, per token.
    """
    with threads(1):  # on which plans are timed, and as many stand in the record
        return _timed(config, resolve_device(str(device)))


def _timed(config: PlanSpeedConfig, device: torch.device) -> Record:
    start = time.perf_counter()
    seed_everything(config.seed)
    own = FlowPolicy(config.policy).to(device).eval()
    both = {"dense": FlowPolicy(config.reference).to(device).eval(), config.variant: own}
    flops = [policy_cost(sizes).flops for sizes in (config.policy, config.reference)]
    metrics = {"FLOPs over dense": flops[0] / flops[1]}
    with nullcontext() if config.policy.ffn == "dense" else rerouted(own, _in_turn):
        for batch in config.batches:
            at = "" if batch == 1 else f" at {batch}"
            timed = plan_latency(both, batch=batch, steps=config.steps, rounds=config.rounds)
            metrics |= {
                f"latency{at}": timed[config.variant].median,
                f"latency{at}, p95": timed[config.variant].p95,
                f"dense latency{at}": timed["dense"].median,
                f"latency ratio{at}": timed[config.variant].median / timed["dense"].median,
            }
    spent = time.perf_counter() - start
    return Record.of(
        config, metrics=metrics, provenance=Provenance.here(seconds=spent, device=device)
    )


def _in_turn(routing: Routing) -> Routing:
    """Each choice at its weight, of experts in turn."""
    (tokens, k), device = routing.indices.shape, routing.indices.device
    return routing._replace(indices=_turns(tokens, k, routing.logits.shape[-1], device))


@lru_cache
def _turns(tokens: int, k: int, experts: int, device: torch.device) -> Tensor:
    return torch.arange(tokens * k, device=device).view(tokens, k) % experts


def grid(part: str, profile: str) -> Mapping[str, PlanSpeedConfig]:
    """What is timed at a profile, by variant, all with seed 0.

    Each of `ARMS` at the size of the profile's recorded policies, and at cpu ``adamoe-small``, of
    the policies `feedforward.robot.policy.CONFIGS` calls ``small``.

    Raises:
        ValueError: When the part or the profile is unknown, or the part has no such profile.
    """
    if part != EXPERIMENT:
        raise ValueError(unknown("part", part, (EXPERIMENT,)))
    name = get_profile(profile).name
    if name == "paper":
        raise ValueError(f"{part} has no profile 'paper': it has smoke, cpu, gpu")
    rounds = {"rounds": 3, "steps": 2} if name == "smoke" else {}
    arms = experiment.grid(experiment.EXPERIMENT, name)
    timed = {
        arm: PlanSpeedConfig(
            arm, tuned(arms[arm].policy, arms[arm].tuning), arms[arm].policy, **rounds
        )
        for arm in ARMS
    }
    if name == "cpu":
        small = CONFIGS["small"]
        timed["adamoe-small"] = PlanSpeedConfig(
            "adamoe-small", tuned(small, arms["adamoe"].tuning), small
        )
    return timed
