"""How sure success rates are, what an expert's choice tells, and what another would change.

Explained in ``book/adamoe/04-do-experts-specialise`` and ``book/adamoe/05-controls-and-verdicts``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from torch import Tensor, nn

from feedforward.layers.experts import MoE
from feedforward.layers.routing import Routing
from feedforward.robot.simulation import is_count


def wilson(successes: int, attempts: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a success rate, from 0 to 1; sound near both ends too.

    Args:
        successes: Among the attempts.
        attempts: At least 1.
        level: Of confidence.

    Raises:
        ValueError: When the counts do not fit together or the level is no share.

    >>> low, high = wilson(50, 50)
    >>> round(low, 3), high
    (0.929, 1.0)
    """
    if attempts < 1 or not 0 <= successes <= attempts or not 0 < level < 1:
        raise ValueError(
            f"{successes} successes of {attempts} attempts at level {level}: give 0 <= successes "
            "<= attempts, at least one attempt, and a level between 0 and 1"
        )
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate, share = successes / attempts, z**2 / attempts
    centre = (rate + share / 2) / (1 + share)
    half = z * np.sqrt(rate * (1 - rate) / attempts + share / (4 * attempts)) / (1 + share)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


@dataclass(frozen=True)
class Difference:
    """A difference of two means over the same episodes, with its interval.

    Attributes:
        estimate: First minus second.
        low: Lower end.
        high: Upper end.
        episodes: Pairs.
    """

    estimate: float
    low: float
    high: float
    episodes: int


def paired_difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """The difference of two policies on the same episodes, by a paired bootstrap over episodes.

    Args:
        first: Scores by episode.
        second: Of the other policy, for the same episodes.
        level: Of confidence.
        resamples: Of the bootstrap.
        seed: Of the resamples.

    Raises:
        ValueError: When the episodes differ or there are none.

    >>> paired_difference({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0})
    Difference(estimate=1.0, low=1.0, high=1.0, episodes=2)
    """
    if not first or first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[:3]
        raise ValueError(f"a paired comparison needs the same episodes on both sides; odd: {odd}")
    gains = np.array([first[name] - second[name] for name in sorted(first)])
    rng = np.random.default_rng(seed)
    drawn = gains[rng.integers(len(gains), size=(resamples, len(gains)))].mean(1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(gains.mean()), float(low), float(high), len(gains))


# --- information --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Information:
    """What one label tells about another, in bits, and what chance would tell.

    Attributes:
        bits: The mutual information.
        shuffled: Its mean over the permutations.
        p: Share of the permutations that reach it, itself counted as one.
    """

    bits: float
    shuffled: float
    p: float


def mutual_information(counts: np.ndarray) -> float:
    """The mutual information of rows and columns of a table of counts, in bits.

    >>> mutual_information(np.array([[5, 0], [0, 5]]))
    1.0
    """
    joint = counts / counts.sum()
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / product[seen])).sum())


def task_information(
    uses: Sequence[np.ndarray], tasks: Sequence[int], *, permutations: int = 200, seed: int = 0
) -> Information:
    """What the expert tells about the task; permutations hand whole episodes to other tasks.

    Args:
        uses: Of each episode how often each expert was used at each step, (T, E).
        tasks: Of each episode, from 0.
        permutations: Of the test.
        seed: Of the permutations.

    Raises:
        ValueError: When there is not one task for each episode, or one is below 0; or without a
            permutation.
    """
    _require_permutations(permutations)
    tasks = _labels("tasks", tasks, len(uses))
    own = np.stack([use.sum(0) for use in uses])
    rng = np.random.default_rng(seed)

    def bits(labels: np.ndarray) -> float:
        table = np.zeros((labels.max() + 1, own.shape[1]))
        np.add.at(table, labels, own)
        return mutual_information(table)

    return _tested(bits(tasks), [bits(rng.permutation(tasks)) for _ in range(permutations)])


def phase_information(
    uses: Sequence[np.ndarray],
    phases: Sequence[np.ndarray],
    *,
    permutations: int = 200,
    seed: int = 0,
) -> Information:
    """What the expert tells about the phase of the manipulation, against phases out of place.

    Steps that follow one another are alike, so that single steps must not be shuffled: a
    permutation turns the phases of each episode by a random number of steps. What episodes differ
    in, their task above all, is thus the same on both sides, and what remains is within episodes.

    Args:
        uses: Of each episode how often each expert was used at each step, (T, E).
        phases: Of each episode the phase of each step, (T,), from 0.
        permutations: Of the test.
        seed: Of the permutations.

    Raises:
        ValueError: When there is not one phase for each step, or one is below 0; or without a
            permutation.
    """
    _require_permutations(permutations)
    phases = _phases(phases, uses)
    count = 1 + max(int(phase.max()) for phase in phases)
    uses = [np.asarray(use, dtype=np.float64) for use in uses]
    before = [np.concatenate([np.zeros((1, use.shape[1])), use.cumsum(0)]) for use in uses]
    runs = [_runs(phase) for phase in phases]
    rng = np.random.default_rng(seed)

    def bits(turned: bool) -> float:
        table = np.zeros((count, uses[0].shape[1]))
        for sums, own in zip(before, runs, strict=True):
            length = len(sums) - 1
            shift = int(rng.integers(length)) if turned else 0
            for phase, start, end in own:
                start, end = start + shift, end + shift
                for turn in (0, length):  # the part before the end, and what goes around
                    a, b = (min(max(at - turn, 0), length) for at in (start, end))
                    table[phase] += sums[b] - sums[a]
        return mutual_information(table)

    return _tested(bits(False), [bits(True) for _ in range(permutations)])


def exchanged_phase_information(
    uses: Sequence[np.ndarray],
    phases: Sequence[np.ndarray],
    tasks: Sequence[int],
    *,
    permutations: int = 200,
    seed: int = 0,
) -> Information:
    """What the expert tells about the phase, against the phases of other attempts at the task.

    A permutation gives each episode the phases of another one of its task, stretched to its length.
    So they keep their order, and roughly their times: what an expert tells by following the clock,
    or the task, is on both sides, where `phase_information` leaves the clock on one. Every episode
    counts the same, so that those in which a policy is stuck until the end do not outweigh others.

    Args:
        uses: Of each episode how often each expert was used at each step, (T, E).
        phases: Of each episode the phase of each step, (T,), from 0.
        tasks: Of each episode, from 0.
        permutations: Of the test.
        seed: Of the permutations.

    Raises:
        ValueError: When there is not one task for each episode or one phase for each step, or one
            is below 0; or without a permutation.
    """
    _require_permutations(permutations)
    phases, tasks = _phases(phases, uses), _labels("tasks", tasks, len(uses))
    count = 1 + max(int(phase.max()) for phase in phases)

    def crossed(use: np.ndarray, phase: np.ndarray) -> np.ndarray:
        middles = np.arange(len(use)) + 0.5  # of the steps
        there = phase[(middles * len(phase) / len(use)).astype(int)]
        return (there == np.arange(count)[:, None]) @ (use / use.sum())

    groups = [np.flatnonzero(tasks == task) for task in np.unique(tasks)]
    # of each group the table of every episode under the phases of every other
    tables = [
        np.stack([np.stack([crossed(uses[i], phases[j]) for j in own]) for i in own])
        for own in groups
    ]
    rng = np.random.default_rng(seed)

    def bits(exchanged: bool) -> float:
        table = 0.0
        for own in tables:
            rows = np.arange(len(own))
            table = table + own[rows, rng.permutation(rows) if exchanged else rows].sum(0)
        return mutual_information(table)

    return _tested(bits(False), [bits(True) for _ in range(permutations)])


def _require_permutations(permutations: int) -> None:
    if not is_count(permutations):
        raise ValueError(f"permutations is {permutations}; a p needs a whole number from 1")


def _labels(name: str, given: Sequence[int], count: int) -> np.ndarray:
    """Labels (count,), whole numbers from 0, of which there is at least one."""
    labels = np.asarray(given)
    if not count or labels.shape != (count,):
        raise ValueError(f"{name} have shape {labels.shape}; give ({count},), and at least one")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"{name} are {np.unique(labels).tolist()}; give whole numbers from 0")
    return labels


def _phases(phases: Sequence[np.ndarray], uses: Sequence[np.ndarray]) -> list[np.ndarray]:
    if not uses or len(phases) != len(uses):
        raise ValueError(f"there are phases of {len(phases)} episodes and uses of {len(uses)}")
    return [
        _labels(f"phases of episode {place}", own, len(use))
        for place, (own, use) in enumerate(zip(phases, uses, strict=True))
    ]


def _runs(phase: np.ndarray) -> list[tuple[int, int, int]]:
    """Stretches of one phase: it, its first step and the one after its last."""
    cuts = np.flatnonzero(np.diff(phase)) + 1
    edges = [0, *cuts.tolist(), len(phase)]
    return [(int(phase[a]), a, b) for a, b in pairwise(edges)]


def _tested(found: float, shuffled: list[float]) -> Information:
    # equal sums in another order differ in the last digits
    reached = sum(value >= found - 1e-12 for value in shuffled)
    return Information(
        bits=max(0.0, found),
        shuffled=float(np.mean(shuffled)),
        p=(1 + reached) / (1 + len(shuffled)),
    )


# --- other experts ------------------------------------------------------------------------------


@contextmanager
def rerouted(model: nn.Module, change: Callable[[Routing], Routing]) -> Iterator[None]:
    """Within the block the experts of every layer work by another routing than their router's.

    What a choice tells about a task or a phase says nothing of the experts: copies of one layer can
    be chosen by phase. What becomes of a plan when each token gets another expert at the same
    weight is the difference that the choice makes. Not in the paper. Explained in
    ``book/adamoe/04-do-experts-specialise``.

    Args:
        model: Holds ``MoE`` layers; as it was, after the block.
        change: From the router's ``Routing`` of T tokens to the one to use; `collect_routing` sees
            the latter.

    Raises:
        ValueError: When there is no layer with experts, or changed experts or weights have another
            shape, or the layer has no such expert.

    >>> import torch
    >>> from feedforward import SwitchRouter
    >>> layer = MoE(8, 16, 4, router=SwitchRouter(8, 4)).eval()
    >>> x = torch.randn(5, 8)
    >>> with rerouted(layer, lambda r: r._replace(weights=0 * r.weights)):
    ...     layer(x).abs().max().item()
    0.0
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers with experts to reroute")

    known: dict[tuple, Tensor] = {}  # looked at before: what is timed gives the same ones again

    def other(_router: nn.Module, _inputs: tuple, routing: Routing) -> Routing:
        changed = change(routing)
        for name in ("indices", "weights"):
            own, new = getattr(routing, name).shape, getattr(changed, name).shape
            if own != new:
                raise ValueError(
                    f"the changed {name} have shape {tuple(new)}; the router's have {tuple(own)}"
                )
        experts = routing.logits.shape[-1]
        kind = (changed.indices.shape, experts)
        if known.get(kind) is not changed.indices:
            _require_experts(changed.indices, experts)
            known[kind] = changed.indices
        return changed

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.router.register_forward_hook(other))
        yield


def _require_experts(indices: Tensor, experts: int) -> None:
    """Refuse experts that are not there: in their place memory would be read that nobody wrote."""
    low, high = (int(end) for end in indices.aminmax()) if indices.numel() else (0, 0)
    if low < 0 or high >= experts:
        raise ValueError(
            f"the changed indices go from {low} to {high}; the layer has the experts 0 to "
            f"{experts - 1}"
        )
