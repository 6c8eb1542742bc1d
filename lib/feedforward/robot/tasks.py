"""Manipulation tasks by name, simulated without a display, and what their states say.

The tasks of Meta-World, of LIBERO and of ALOHA, with instructions in words. Explained in
``book/adamoe/01-a-policy-that-flows``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from feedforward.profiles import unknown
from feedforward.robot import aloha, libero, metaworld
from feedforward.robot.metaworld import ACTION_NAMES, CONTROL_HZ, METAWORLD, STATE_NAMES, SUITES
from feedforward.robot.rendering import choose_backend
from feedforward.robot.simulation import (
    ActionError,
    Environment,
    Images,
    Observation,
    Simulator,
    Task,
    is_count,
)

__all__ = [
    "ACTION_NAMES",
    "CONTROL_HZ",
    "METAWORLD",
    "PHASES",
    "STATE_NAMES",
    "SUITES",
    "ActionError",
    "Environment",
    "Images",
    "Observation",
    "Scene",
    "Simulator",
    "Task",
    "find_task",
    "is_count",
    "make_environment",
    "phases",
    "scene",
    "scripted_expert",
    "simulator_of",
    "suite",
    "versions",
    "wordings",
]


@cache
def _tasks() -> dict[str, Task]:
    return {task.name: task for task in (*metaworld.tasks(), *libero.TASKS, *aloha.TASKS)}


def find_task(name: str) -> Task:
    """The task of a name; Meta-World's own ending ``-v3`` may stand behind it.

    >>> find_task("drawer-open").instruction
    'open the drawer'

    Raises:
        ValueError: When there is none, with the nearest names.
    """
    tasks = _tasks()
    if (found := tasks.get(name.removesuffix("-v3"))) is None:
        raise ValueError(unknown("task", name, tasks))
    return found


def suite(name: str) -> tuple[Task, ...]:
    """The tasks of a suite: ``"easy"`` (6), ``"hard"`` (12), ``"mt50"``, ``"libero-object"`` (10),
    ``"aloha"`` (1).

    >>> [task.name for task in suite("easy")][:2]
    ['button-press-topdown', 'door-open']

    Raises:
        ValueError: When there is no such suite.
    """
    found = tuple(task for task in _tasks().values() if name in task.suites)
    if not found:
        known = dict.fromkeys(suite for task in _tasks().values() for suite in task.suites)
        raise ValueError(unknown("suite", name, known))
    return found


def wordings(instruction: str) -> tuple[str, ...]:
    """All that a policy is trained on in the place of an instruction: it, and its paraphrases.

    >>> wordings("reach it")
    ('reach it',)
    """
    for task in _tasks().values():
        if task.instruction == instruction:
            return (instruction, *task.paraphrases)
    return (instruction,)


def simulator_of(tasks: Iterable[Task | str]) -> Simulator:
    """The simulator that carries out all of these tasks; Meta-World where there is none.

    >>> simulator_of(["reach", "push"]).name
    'Meta-World'

    Raises:
        ValueError: When there is no such task, or they have several simulators.
    """
    found = {_found(task).simulator: _found(task).name for task in tasks}
    if len(found) > 1:
        each = ", ".join(f"{task!r} of {simulator.name}" for simulator, task in found.items())
        raise ValueError(f"tasks of one simulator go together; these are of several: {each}")
    return next(iter(found), METAWORLD)


def _found(task: Task | str) -> Task:
    return find_task(task) if isinstance(task, str) else task


# --- the simulation -----------------------------------------------------------------------------


def make_environment(
    task: Task | str, seed: int = 0, *, images: Images | None = None, state: str = "full"
) -> Environment:
    """A simulated task, ready to be reset.

    Args:
        task: A task or its name.
        seed: Of the start states that `Environment.reset` takes where it is given none.
        images: What images observations hold; None for none.
        state: The kind of state that observations hold, see `Simulator`.

    Raises:
        ValueError: When there is no such task, kind of state or camera.
        RendererError: When images are wanted and there is no OpenGL.
        ImportError: When Meta-World, or for ALOHA MuJoCo, is not installed.
        DataError: When LIBERO, or the scene of ALOHA, is not installed.
    """
    task = _found(task)
    return task.simulator.environment(task, seed, images, state)


def scripted_expert(task: Task | str) -> Callable[[np.ndarray], np.ndarray]:
    """The scripted policy of a task: from a full state to an action, each number from -1 to 1.

    Meta-World's own, with small corrections in six tasks, and in the place of soccer's one that
    carries the ball; those of LIBERO and ALOHA are written here.
    """
    task = _found(task)
    return task.simulator.expert(task)


def versions(simulator: Simulator | None = None) -> dict[str, str]:
    """What decides how a simulation runs and looks: versions and renderer, for records.

    Scores change with MuJoCo's version, so that they belong beside every one.

    Args:
        simulator: That runs; None for Meta-World.
    """
    from importlib.metadata import version

    packages = (simulator or METAWORLD).packages
    return {name: version(name) for name in packages} | {"renderer": choose_backend()}


# --- what a state says --------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Where things are, read off states (..., S): enough to draw a rollout without a renderer.

    Attributes:
        gripper: (..., 3) metres.
        opening: (...) from 0, closed, to 1.
        object: (..., 3) what the task is about, metres.
        second: (..., 3) the second object, zeros where a task has one only.
        goal: (..., 3) metres.
    """

    gripper: np.ndarray
    opening: np.ndarray
    object: np.ndarray
    second: np.ndarray
    goal: np.ndarray


def scene(state: np.ndarray, simulator: Simulator | None = None) -> Scene:
    """Read positions off states that hold objects.

    Args:
        state: (..., 39) or (..., 21) of Meta-World, see `STATE_NAMES`; or of another simulator.
        simulator: Whose states they are; None for Meta-World.

    Raises:
        ValueError: When states of this size hold no positions of objects.
    """
    state = np.asarray(state)
    kinds = (simulator or METAWORLD).state_names.values()
    holding = {len(names): names for names in kinds if "object_x" in names}
    if (names := holding.get(state.shape[-1])) is None:
        sizes = list(holding)
        raise ValueError(f"states of {state.shape[-1]} numbers hold no objects; give {sizes}")

    def position(of: str) -> np.ndarray:
        if f"{of}_x" not in names:
            return np.zeros_like(state[..., :3])
        first = names.index(f"{of}_x")
        return state[..., first : first + 3]

    return Scene(
        gripper=position("gripper"),
        opening=state[..., names.index("opening")],
        object=position("object"),
        second=position("object2"),
        goal=position("goal"),
    )


PHASES = ("reach", "grasp", "move", "place")


def phases(
    states: np.ndarray,
    simulator: Simulator | None = None,
    *,
    near: float = 0.08,
    moved: float = 0.01,
    placed: float = 0.07,
) -> np.ndarray:
    """The phase of every step of one attempt, by rules of distance.

    Before the object has moved: ``reach`` while the gripper is away from it, ``grasp`` once it is
    near. Afterwards: ``move``, and ``place`` once the object is near where it is at the end. The
    rules look at the whole attempt, so that they are for its description and not for control.

    Args:
        states: (T, S) of an attempt, in order; see `scene`.
        simulator: Whose states they are; None for Meta-World.
        near: Metres from the gripper that count as near.
        moved: Metres that an object must have gone to count as moved.
        placed: Metres from the object's last position that count as placed.

    Returns:
        (T,) places in `PHASES`.
    """
    here = scene(states, simulator)
    if here.object.ndim != 2 or not len(here.object):
        raise ValueError(f"give the states of one attempt, (T, S) with T >= 1, not {states.shape}")
    distance = np.linalg.norm(here.gripper - here.object, axis=-1)
    left = np.linalg.norm(here.object - here.object[-1], axis=-1)
    # an object may settle before the gripper comes: what it then goes is no move
    first = int(np.argmax(distance <= near))  # 0 where the gripper never comes near
    gone = np.linalg.norm(here.object - here.object[first], axis=-1)
    has_moved = np.maximum.accumulate((gone > moved) & (np.arange(len(gone)) >= first))
    return np.where(
        has_moved,
        np.where(left <= placed, PHASES.index("place"), PHASES.index("move")),
        np.where(distance <= near, PHASES.index("grasp"), PHASES.index("reach")),
    )
