"""Policies in the simulator: many environments, one batched plan for all that need one.

An attempt begins at a start state that its task and number decide, so that policies meet the same
ones and are compared episode by episode. A policy plans a chunk of actions, the first of them are
carried out, and it plans anew.

Explained in ``book/adamoe/01-a-policy-that-flows``.
"""

import contextlib
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from feedforward.encoders import token_states
from feedforward.layers.experts import collect_routing
from feedforward.records import Record
from feedforward.robot.policy import FlowPolicy, routes
from feedforward.robot.scores import wilson
from feedforward.robot.tasks import (
    Images,
    Observation,
    Task,
    find_task,
    is_count,
    make_environment,
    simulator_of,
)
from feedforward.timing import interleaved, threads

#: From images by camera, each (B, H, W, 3) uint8, to features (B, C, F).
Encoder = Callable[[Mapping[str, np.ndarray]], Tensor]


class RolloutError(RuntimeError):
    """Attempts that cannot go on: a process of the simulation was ended."""


@dataclass(frozen=True)
class Start:
    """How an attempt begins.

    Attributes:
        task: Its name.
        number: Among the attempts at the task.
        start_state: Seed of where things are, and of the policy's noise.
        instruction: What the policy is told.
    """

    task: str
    number: int
    start_state: int
    instruction: str

    @property
    def id(self) -> str:
        """Unique among the attempts of an evaluation."""
        return f"{self.task} {self.number}"


def make_starts(
    tasks: Iterable[Task | str] | Task | str,
    episodes: int,
    *,
    seed: int = 0,
    held_out: bool = True,
) -> tuple[Start, ...]:
    """The starts of an evaluation: the same for every policy.

    Args:
        tasks: Tasks or their names; one may stand for itself.
        episodes: Attempts at each.
        seed: Of the start states; they are not those of demonstrations.
        held_out: Ask with the wordings that no policy is trained on, in turns; else with the
            instruction itself.

    Raises:
        ValueError: When there is no such task, or `episodes` is no whole number from 1.

    >>> [start.id for start in make_starts(["reach"], 2)]
    ['reach 0', 'reach 1']
    """
    if not is_count(episodes):
        raise ValueError(f"episodes is {episodes}; give a whole number from 1")
    found = []
    for each in [tasks] if isinstance(tasks, str | Task) else tasks:
        task = find_task(each) if isinstance(each, str) else each
        wordings = task.held_out if held_out else (task.instruction,)
        for number in range(episodes):
            # the word in front keeps them apart from the start states of demonstrations
            words = [zlib.crc32(b"evaluation"), seed, zlib.crc32(task.name.encode()), number]
            state = int(np.random.SeedSequence(words).generate_state(1)[0])
            found.append(Start(task.name, number, state, wordings[number % len(wordings)]))
    return tuple(found)


# --- what comes out -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Attempt:
    """One attempt of T steps.

    Attributes:
        start: How it began.
        success: Whether the task was solved.
        states: (T + 1, S) float32, the full states, before each step and at the end.
        actions: (T, A) float32, what was carried out.
        experts: (T, Euler steps, layers, k) the experts that each carried out action was given in
            each step of its plan, uint8 for up to 256; None for a policy without experts.
        weights: Likewise the weights of their outputs, float32.
    """

    start: Start
    success: bool
    states: np.ndarray
    actions: np.ndarray
    experts: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def uses(self, layer: int, experts: int) -> np.ndarray:
        """How often each of E experts was used at each step in a layer, (T, E).

        Raises:
            ValueError: When the policy had no experts.
        """
        if self.experts is None:
            raise ValueError(f"{self.start.id}: the policy has no experts")
        chosen = self.experts[:, :, layer].reshape(len(self), -1)
        return (chosen[:, :, None] == np.arange(experts)).sum(1)


@dataclass(frozen=True)
class Rate:
    """A success rate in percent with Wilson's interval.

    Attributes:
        success: Percent.
        low: Lower end.
        high: Upper end.
        episodes: Attempts.
    """

    success: float
    low: float
    high: float
    episodes: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> "Rate":
        """Of the outcomes of some attempts."""
        low, high = wilson(sum(outcomes), len(outcomes))
        return cls(100 * sum(outcomes) / len(outcomes), 100 * low, 100 * high, len(outcomes))

    def __str__(self) -> str:
        return f"{self.success:.1f} [{self.low:.0f}, {self.high:.0f}]"


def recorded_rate(records: Iterable[Record], task: str | None = None) -> Rate:
    """The success rate over the attempts of some records, as if all were independent.

    Runs of other seeds are tried from the same start states, so that the interval is of attempts
    and not of trainings: differences between policies are for ``feedforward.claims.compare``.

    Args:
        records: Of runs that were tried.
        task: Attempts at this one alone; None for all.

    Raises:
        ValueError: When there is no attempt at it.
    """
    outcomes = [
        solved > 0
        for record in records
        for start, solved in record.metrics["items"]["success"].items()
        if task is None or start.rpartition(" ")[0] == task
    ]
    if not outcomes:
        raise ValueError(f"these records hold no attempt{f' at {task}' if task else ''}")
    return Rate.of(outcomes)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """All attempts of an evaluation, in the order of their starts.

    Attributes:
        attempts: They.
        plan_seconds: Wall time of each batched plan.
        plan_rows: How many plans each of them made.
    """

    attempts: tuple[Attempt, ...]
    plan_seconds: tuple[float, ...]
    plan_rows: tuple[int, ...]

    @cached_property
    def items(self) -> dict[str, float]:
        """Success of each attempt in percent, 0 or 100, by the id of its start.

        Raises:
            ValueError: When starts of one id, as of other seeds or wordings, were rolled out
                together: then `attempts` tells them apart by their places.
        """
        names = Counter(one.start.id for one in self.attempts)
        if twice := [name for name, times in names.items() if times > 1]:
            raise ValueError(
                f"several starts are called {', '.join(map(repr, twice[:3]))}: look at attempts, "
                "or roll them out one after the other"
            )
        return {one.start.id: 100.0 * one.success for one in self.attempts}

    def by_task(self) -> dict[str, Rate]:
        """The success rate of each task."""
        outcomes: dict[str, list[bool]] = {}
        for one in self.attempts:
            outcomes.setdefault(one.start.task, []).append(one.success)
        return {task: Rate.of(own) for task, own in outcomes.items()}

    @property
    def success(self) -> Rate:
        """The success rate over all attempts."""
        return Rate.of([one.success for one in self.attempts])


# --- the environments ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What became of one lane: what was gone through, and what the policy is shown next."""

    states: np.ndarray  # full ones, after each step that was taken
    success: bool
    finished: bool
    shown: Observation
    full: np.ndarray  # of what is shown


class _Lanes:
    """Some environments in this process, each for one task, told apart by number."""

    def __init__(self, tasks: Mapping[int, str], state: str, images: Images | None):
        self.lanes = {
            lane: make_environment(task, images=images, state=state) for lane, task in tasks.items()
        }

    def __call__(self, orders: Mapping[int, tuple[np.ndarray | None, int | None]]):
        """Carry out actions, then begin anew where the attempt is over and a start is given."""
        return {lane: self._one(self.lanes[lane], *order) for lane, order in orders.items()}

    def _one(self, environment, actions, start_state) -> _Seen:
        states, shown, success, finished = [], None, False, actions is None
        actions = [] if actions is None else list(actions)
        for number, action in enumerate(actions, start=1):
            # the last picture alone is planned from, and one takes longer than a step
            shown = environment.step(action, render=number == len(actions))
            states.append(environment.full_state.astype(np.float32))
            success, finished = shown.success, environment.finished
            if finished:
                break
        if finished and start_state is not None:
            shown = environment.reset(start_state)
        full = environment.full_state.astype(np.float32)
        return _Seen(np.array(states), success, finished, shown, full)

    def close(self) -> None:
        for environment in self.lanes.values():
            environment.close()


def _serve(pipe, *arguments) -> None:
    """The work of a process: lanes, asked through a pipe until it closes."""
    try:
        lanes = _Lanes(*arguments)
        pipe.send(None)
        while (orders := pipe.recv()) is not None:
            pipe.send(lanes(orders))
        lanes.close()
    except EOFError:  # the other process is gone
        return
    except Exception as error:
        pipe.send(error)


class _Processes:
    """The same lanes dealt to processes."""

    def __init__(self, tasks: Mapping[int, str], state: str, images: Images | None, workers: int):
        context, self.members = get_context("spawn"), []
        for number in range(workers):
            own = {lane: task for lane, task in tasks.items() if lane % workers == number}
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, own, state, images), daemon=True)
            process.start()
            theirs.close()
            self.members.append((set(own), ours, process))
        for member in self.members:
            self._answer(member)

    def __call__(self, orders):
        asked = []
        for member in self.members:
            if own := {lane: order for lane, order in orders.items() if lane in member[0]}:
                member[1].send(own)
                asked.append(member)
        return {lane: seen for member in asked for lane, seen in self._answer(member).items()}

    def _answer(self, member) -> Any:
        _, pipe, process = member
        try:
            answer = pipe.recv()
        except EOFError as error:
            process.join()
            raise RolloutError(
                f"a process of the simulation ended with {process.exitcode}: it may have been "
                "short of memory, or a script evaluates outside of `if __name__ == '__main__':`; "
                "workers=1 needs neither"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        for _, pipe, process in self.members:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.terminate()


# --- rolling out --------------------------------------------------------------------------------


@dataclass
class _Running:
    """An attempt under way."""

    start: Start
    noise: torch.Generator
    states: list
    actions: list
    experts: list
    weights: list

    @classmethod
    def begin(cls, start: Start, full: np.ndarray) -> "_Running":
        noise = torch.Generator().manual_seed(start.start_state)
        return cls(start, noise, [full[None]], [], [], [])

    def end(self, success: bool) -> Attempt:
        routed = [
            np.concatenate(parts) if parts else None for parts in (self.experts, self.weights)
        ]
        states, actions = np.concatenate(self.states), np.concatenate(self.actions)
        return Attempt(self.start, success, states, actions, *routed)


def roll_out(
    policy: FlowPolicy,
    starts: Sequence[Start],
    *,
    execute: int | None = None,
    steps: int = 10,
    at_once: int = 24,
    workers: int = 1,
    state: str = "full",
    images: Images | None = None,
    encoder: Encoder | None = None,
    progress: bool = True,
) -> Rollouts:
    """Let a policy attempt tasks, until each is solved or out of steps.

    On one machine the same call gives the same result, however many processes simulate: what is
    planned together follows from `starts` and `at_once` alone, and each attempt has noise of its
    own.

    Args:
        policy: In evaluation mode afterwards; it plans where it lies.
        starts: From `make_starts`.
        execute: Actions of a chunk that are carried out before the next plan; None for all.
        steps: Euler steps of a plan.
        at_once: Environments side by side, at least one for each task.
        workers: Processes that simulate; 1 simulates in this one. More need a script to start its
            work under ``if __name__ == "__main__":``.
        state: The kind of state that the policy is shown.
        images: What images it is shown; None for none.
        encoder: Their features.
        progress: Show a bar.

    Raises:
        ActionError: When an action is not finite or has another size, with task and step.
        RolloutError: When a process was ended.
        RendererError: When images are wanted and there is no OpenGL.
        ValueError: When a number is out of range, or the tasks have several simulators.
    """
    horizon = policy.config.horizon
    execute = horizon if execute is None else execute
    whole = all(map(is_count, (execute, at_once, workers)))
    if not starts or not whole or execute > horizon:
        raise ValueError(
            f"{len(starts)} starts, execute {execute}, at_once {at_once}, workers {workers}: give "
            f"a start, execute from 1 to the horizon {horizon}, and the others from 1, all whole"
        )
    simulator_of(start.task for start in starts)  # refuses what has none, or several
    if (images is None) != (encoder is None):
        raise ValueError("give images and their encoder together, or neither")
    policy.eval()
    told, words = _texts(starts)
    waiting = _dealt(starts, at_once)
    tasks = {lane: queue[0].task for lane, queue in enumerate(waiting)}
    workers = min(workers, len(tasks))
    lanes = (
        _Lanes(tasks, state, images) if workers == 1 else _Processes(tasks, state, images, workers)
    )
    planner = _Planner(policy, told, words, execute, steps, encoder)
    done: dict[Start, Attempt] = {}
    bar = tqdm(
        desc="attempts",
        total=len(starts),
        leave=False,
        unit="attempt",
        **({} if progress else {"disable": True}),
    )
    with contextlib.closing(lanes), bar:
        running: dict[int, _Running] = {}
        shown = lanes({lane: (None, queue[0].start_state) for lane, queue in enumerate(waiting)})
        for lane, queue in enumerate(waiting):
            running[lane] = _Running.begin(queue.pop(0), shown[lane].full)
        while running:
            planned = planner(running, shown)
            following = {lane: waiting[lane][0] if waiting[lane] else None for lane in running}
            orders = {
                lane: (planned.actions[row], following[lane] and following[lane].start_state)
                for row, lane in enumerate(running)
            }
            shown = lanes(orders)
            for row, lane in enumerate(list(running)):
                seen, one = shown[lane], running[lane]
                planned.note(one, row, len(seen.states))
                one.states.append(seen.states)
                if seen.finished:
                    done[one.start] = one.end(seen.success)
                    bar.update()
                    if following[lane]:
                        running[lane] = _Running.begin(waiting[lane].pop(0), seen.full)
                    else:
                        del running[lane]
    return Rollouts(
        tuple(done[start] for start in starts), tuple(planner.seconds), tuple(planner.rows)
    )


def _dealt(starts: Sequence[Start], at_once: int) -> list[list[Start]]:
    """The starts of each lane, all of one task."""
    by_task: dict[str, list[Start]] = {}
    for start in starts:
        by_task.setdefault(start.task, []).append(start)
    each = max(1, at_once // len(by_task))
    dealt = (own[first::each] for own in by_task.values() for first in range(each))
    return [queue for queue in dealt if queue]


def _texts(starts: Sequence[Start]) -> tuple[tuple[Tensor, Tensor], dict[str, int]]:
    """Token states of all instructions, and the place of each."""
    words = list(dict.fromkeys(start.instruction for start in starts))
    return token_states(words), {text: place for place, text in enumerate(words)}


@dataclass(frozen=True)
class _Planned:
    """Plans of B rows: actions (B, n, A), experts and weights (B, n, Euler steps, layers, k)."""

    actions: np.ndarray
    experts: np.ndarray | None
    weights: np.ndarray | None

    def note(self, one: _Running, row: int, count: int) -> None:
        """Note the actions that were carried out, so many of this row's."""
        one.actions.append(self.actions[row, :count])
        if self.experts is not None:
            one.experts.append(self.experts[row, :count])
            one.weights.append(self.weights[row, :count])


class _Planner:
    """One batched plan for all attempts under way."""

    def __init__(self, policy, told, words, execute, steps, encoder):
        self.policy, self.execute, self.steps, self.encoder = policy, execute, steps, encoder
        self.device = policy.position.device
        self.text, self.real = (part.to(self.device) for part in told)
        self.words = words
        self.seconds: list[float] = []
        self.rows: list[int] = []

    def __call__(self, running: Mapping[int, _Running], shown: Mapping[int, _Seen]) -> _Planned:
        policy, config = self.policy, self.policy.config
        seen = [shown[lane].shown for lane in running]
        places = [self.words[one.start.instruction] for one in running.values()]
        noise = torch.stack(
            [
                torch.randn(config.horizon, config.action, generator=one.noise)
                for one in running.values()
            ]
        )
        state = torch.from_numpy(np.stack([each.state for each in seen])).to(self.device)
        images = None
        if self.encoder:
            cameras = {
                name: np.stack([each.images[name] for each in seen]) for name in seen[0].images
            }
            images = self.encoder(cameras).to(self.device)
        started = time.perf_counter()
        with collect_routing(policy) as routings:
            actions = policy.plan(
                state,
                self.text[places],
                self.real[places],
                images,
                steps=self.steps,
                noise=noise.to(self.device),
            )
        actions = actions.float().cpu().numpy()[:, : self.execute]
        self.seconds.append(time.perf_counter() - started)
        self.rows.append(len(seen))
        return _Planned(actions, *self._routed(routings))

    def _routed(self, routings) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not routings:
            return None, None
        experts, weights = (
            part.permute(2, 3, 0, 1, 4)[:, : self.execute].cpu().numpy()
            for part in routes(routings, self.policy.config)
        )
        holding = np.min_scalar_type(self.policy.config.experts - 1)
        return experts.astype(holding), weights.astype(np.float32)


# --- how long a plan takes ----------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """How long a plan takes, in milliseconds.

    Attributes:
        median: Of the repetitions.
        p95: The 95th percentile.
        batch: Plans made together.
    """

    median: float
    p95: float
    batch: int


def planning(
    policy: FlowPolicy,
    *,
    batch: int = 1,
    steps: int = 10,
    instruction: str = "put the ring on the peg",
) -> Callable[[], Tensor]:
    """A plan to be made again and again, always of the same made-up states and noise.

    Args:
        policy: Whose plan.
        batch: Plans made together.
        steps: Euler steps.
        instruction: What it is told.
    """
    config, generator = policy.config, torch.Generator().manual_seed(0)
    device = policy.position.device
    text, real = token_states([instruction])
    shape = (batch, config.cameras, config.image_width or 0)
    state = torch.randn(batch, config.state, generator=generator).to(device)
    images = torch.randn(shape, generator=generator).to(device) if config.cameras else None
    noise = torch.randn(batch, config.horizon, config.action, generator=generator).to(device)
    told = text.expand(batch, -1, -1).to(device), real.expand(batch, -1).to(device)
    return lambda: policy.plan(state, *told, images, steps=steps, noise=noise)


def plan_latency(
    policies: Mapping[str, FlowPolicy],
    *,
    batch: int = 1,
    steps: int = 10,
    rounds: int = 30,
    instruction: str = "put the ring on the peg",
) -> dict[str, Latency]:
    """Time the plans of policies turn and turn about, on one thread of a processor or on a GPU.

    On a processor it is processor time, which other programs touch by sharing its memory alone.
    What a policy is shown is made up (`planning`): the work is the same for any state.

    Args:
        policies: By name, on one device.
        batch: Plans made together.
        steps: Euler steps.
        rounds: Repetitions.
        instruction: What they are told.

    Raises:
        ValueError: When there is no policy, or a number is too small.
    """
    if not policies:
        raise ValueError("policies is empty; give at least one to time, by its name")
    device = next(iter(policies.values())).position.device
    with threads(1):
        timed = interleaved(
            {
                name: planning(policy, batch=batch, steps=steps, instruction=instruction)
                for name, policy in policies.items()
            },
            device=device,
            rounds=rounds,
            least=min(3, rounds),
        )
    return {
        name: Latency(*(float(1e3 * np.quantile(own, q)) for q in (0.5, 0.95)), batch)
        for name, own in timed.items()
    }
