"""Meta-World's manipulation tasks with instructions in words, simulated without a display.

A Sawyer arm with a gripper does 50 tasks in MuJoCo. Meta-World gives the scenes, the test of
success and a scripted expert for each; the instructions are written here. The simulation needs
``pip install 'feedforward[robot]'``; the list of tasks needs nothing.

Explained in ``book/adamoe/01-a-policy-that-flows``.
"""

import tomllib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from feedforward.profiles import unknown
from feedforward.robot.rendering import Renderer, choose_backend

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "easy": (
            "button-press-topdown",
            "door-open",
            "drawer-close",
            "drawer-open",
            "reach",
            "window-open",
        ),
        "hard": (
            "assembly",
            "basketball",
            "bin-picking",
            "hammer",
            "hand-insert",
            "peg-insert-side",
            "pick-out-of-hole",
            "pick-place-wall",
            "push-wall",
            "shelf-place",
            "stick-pull",
            "stick-push",
        ),
    }
)

ACTION_NAMES = ("x", "y", "z", "gripper")
CONTROL_HZ = 80

_POSE = ("x", "y", "z", "qx", "qy", "qz", "qw")
_FRAME_NAMES = (
    *("gripper_x", "gripper_y", "gripper_z", "opening"),
    *(f"object_{name}" for name in _POSE),
    *(f"object2_{name}" for name in _POSE),
)
_GOAL_NAMES = ("goal_x", "goal_y", "goal_z")

STATE_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "full": (*_FRAME_NAMES, *(f"previous_{name}" for name in _FRAME_NAMES), *_GOAL_NAMES),
        "current": (*_FRAME_NAMES, *_GOAL_NAMES),
        "robot": _FRAME_NAMES[:4],
    }
)
"""What a state holds, in order, by the name of its kind.

``"full"`` (39): the gripper, two objects, all of this again one step ago, and the goal;
``"current"`` (21): without the step before; ``"robot"`` (4): the gripper alone, as beside images.
Positions are in metres, turns are quaternions, the opening goes from 0 (closed) to 1. Where a task
has one object only, the second is 0.
"""

_STATE_PLACES = {
    kind: np.array([STATE_NAMES["full"].index(name) for name in names])
    for kind, names in STATE_NAMES.items()
}


class ActionError(ValueError):
    """An action that cannot be carried out: names the task, the step and what was given."""


# --- tasks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A manipulation task and what it is called in words.

    Attributes:
        name: As in Meta-World, without its version: ``"pick-place"``.
        instruction: What to do, in one sentence.
        paraphrases: Three more wordings to train on.
        held_out: Two wordings that no policy is trained on, for evaluation.
        suites: The suites it is in.
        max_steps: Steps that an attempt may take.
        state_size: Numbers of the full state.
        action_size: Numbers of an action: the move in x, y, z and the gripper's effort (above 0
            closes), each from -1 to 1. A move of 1 is 1 cm.
    """

    name: str
    instruction: str
    paraphrases: tuple[str, ...]
    held_out: tuple[str, ...]
    suites: tuple[str, ...]
    max_steps: int
    state_size: int = len(STATE_NAMES["full"])
    action_size: int = len(ACTION_NAMES)


@cache
def _tasks() -> dict[str, Task]:
    with open(Path(__file__).with_name("tasks.toml"), "rb") as file:
        written = tomllib.load(file)
    return {
        name: Task(
            name=name,
            instruction=words["instruction"],
            paraphrases=tuple(words["paraphrases"]),
            held_out=tuple(words["held_out"]),
            suites=(*(suite for suite, names in SUITES.items() if name in names), "mt50"),
            max_steps=words.get("max_steps", 200),
        )
        for name, words in sorted(written.items())
    }


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
    """The tasks of a suite: ``"easy"`` (6), ``"hard"`` (12) or ``"mt50"`` (all).

    >>> [task.name for task in suite("easy")][:2]
    ['button-press-topdown', 'door-open']

    Raises:
        ValueError: When there is no such suite.
    """
    if name == "mt50":
        return tuple(_tasks().values())
    if name not in SUITES:
        raise ValueError(unknown("suite", name, [*SUITES, "mt50"]))
    return tuple(map(find_task, SUITES[name]))


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


def scene(state: np.ndarray) -> Scene:
    """Read positions off full or current states.

    Args:
        state: (..., 39) or (..., 21), see `STATE_NAMES`.

    Raises:
        ValueError: When states of this size hold no positions of objects.
    """
    state = np.asarray(state)
    sizes = [len(STATE_NAMES[kind]) for kind in ("full", "current")]
    if state.shape[-1] not in sizes:
        raise ValueError(f"states of {state.shape[-1]} numbers hold no objects; give {sizes}")
    return Scene(
        gripper=state[..., 0:3],
        opening=state[..., 3],
        object=state[..., 4:7],
        second=state[..., 11:14],
        goal=state[..., -3:],
    )


PHASES = ("reach", "grasp", "move", "place")


def phases(
    states: np.ndarray, *, near: float = 0.08, moved: float = 0.01, placed: float = 0.07
) -> np.ndarray:
    """The phase of every step of one attempt, by rules of distance.

    Before the object has moved: ``reach`` while the gripper is away from it, ``grasp`` once it is
    near. Afterwards: ``move``, and ``place`` once the object is near where it is at the end. The
    rules look at the whole attempt, so that they are for its description and not for control.

    Args:
        states: (T, 39) or (T, 21) of an attempt, in order.
        near: Metres from the gripper that count as near.
        moved: Metres that an object must have gone to count as moved.
        placed: Metres from the object's last position that count as placed.

    Returns:
        (T,) places in `PHASES`.
    """
    here = scene(states)
    if here.object.ndim != 2 or not len(here.object):
        raise ValueError(f"give the states of one attempt, (T, S) with T >= 1, not {states.shape}")
    distance = np.linalg.norm(here.gripper - here.object, axis=-1)
    gone = np.linalg.norm(here.object - here.object[0], axis=-1)
    left = np.linalg.norm(here.object - here.object[-1], axis=-1)
    has_moved = np.maximum.accumulate(gone > moved)
    return np.where(
        has_moved,
        np.where(left <= placed, PHASES.index("place"), PHASES.index("move")),
        np.where(distance <= near, PHASES.index("grasp"), PHASES.index("reach")),
    )


# --- the simulation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What images an environment gives beside its states.

    Attributes:
        size: Height and width in pixels.
        cameras: Names in the scene: ``corner``, ``corner2``, ``corner3``, ``corner4``,
            ``topview``, ``behindGripper``, ``gripperPOV``.
    """

    size: int = 84
    cameras: tuple[str, ...] = ("corner2",)

    def __post_init__(self):
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if self.size < 1 or not self.cameras:
            raise ValueError(f"images need a size from 1 and a camera, not {self}")


@dataclass(frozen=True)
class Observation:
    """What a policy is shown after a step.

    Attributes:
        state: (S,) float32, see `STATE_NAMES`.
        images: By camera (size, size, 3) uint8; empty where none were asked for.
        success: Whether the task has been solved at this step or before.
        step: Steps taken since the reset.
    """

    state: np.ndarray
    images: dict[str, np.ndarray] = field(default_factory=dict)
    success: bool = False
    step: int = 0


class Environment:
    """One task in the simulator; made by `make_environment`."""

    def __init__(self, task: Task, seed: int, images: Images | None, state: str):
        if state not in STATE_NAMES:
            raise ValueError(unknown("kind of state", state, STATE_NAMES))
        self.task, self.images, self.state = task, images, state
        self._seeds = np.random.SeedSequence(seed)
        self._simulator = _simulator(task.name)
        self._model = _snapshot(self._simulator.model)
        cameras = images and Renderer(
            self._simulator.model, size=images.size, cameras=images.cameras
        )
        self._renderer = cameras or None
        self._full, self._steps, self._success = None, 0, False

    @property
    def state_size(self) -> int:
        """Numbers of an observation's state."""
        return len(STATE_NAMES[self.state])

    @property
    def full_state(self) -> np.ndarray:
        """(39,) float64: what the scripted experts look at, whatever a policy is shown."""
        self._require_reset()
        return self._full.copy()

    @property
    def finished(self) -> bool:
        """Whether the attempt is over: solved, or out of steps."""
        return self._success or self._steps >= self.task.max_steps

    def reset(self, start_state: int | None = None) -> Observation:
        """Begin an attempt.

        Args:
            start_state: A seed from 0; the same one gives the same positions of all things, in
                this environment and in others of the task, whatever happened before. None takes
                the next one of the environment's own sequence.
        """
        if start_state is None:
            start_state = int(self._seeds.spawn(1)[0].generate_state(1)[0])
        if start_state < 0:
            raise ValueError(f"start_state is {start_state}; give a seed from 0")
        from gymnasium.envs.mujoco import MujocoEnv

        simulator = self._simulator
        for name, values in self._model.items():
            getattr(simulator.model, name)[:] = values
        simulator.seed(start_state)
        simulator.curr_path_length = 0
        # Meta-World's own reset lays the scene twice; the second time is the one that counts
        full, _ = MujocoEnv.reset(simulator)
        full[18:36] = full[:18]
        simulator._prev_obs = full[:18].copy()
        self._full, self._steps, self._success = full, 0, False
        return self._observation()

    def step(self, action: np.ndarray) -> Observation:
        """Carry out one action, 1/80 of a second.

        Args:
            action: (4,) see `Task`; what is beyond -1 and 1 is cut off there.

        Raises:
            ActionError: When the action has another shape or holds what is not a number; the
                message names the task and the step.
            ValueError: When the environment was not reset, or all its steps were taken.
        """
        self._require_reset()
        if self._steps >= self.task.max_steps:
            raise ValueError(
                f"{self.task.name} has taken all its {self.task.max_steps} steps: reset it"
            )
        action = np.asarray(action, dtype=np.float32)
        where = f"task {self.task.name!r}, step {self._steps + 1}"
        if action.shape != (self.task.action_size,):
            raise ActionError(
                f"{where}: the action has shape {action.shape} and must have "
                f"({self.task.action_size},): {', '.join(ACTION_NAMES)}, each from -1 to 1"
            )
        if not np.isfinite(action).all():
            raise ActionError(
                f"{where}: the action is {action.tolist()}; all its numbers must be finite. "
                "A policy that gives NaN was trained too fast or normalised by a deviation of 0."
            )
        self._full, _, _, _, info = self._simulator.step(np.clip(action, -1, 1))
        self._steps += 1
        self._success |= bool(info["success"])
        return self._observation()

    def bodies(self) -> dict[str, np.ndarray]:
        """Where the robot's parts are now, from its foot to its fingers: by name (3,) metres."""
        self._require_reset()
        data = self._simulator.data
        return {name: data.body(name).xpos.copy() for name in _BODIES}

    def render(self, size: int = 480, camera: str = "corner2") -> np.ndarray:
        """One image (size, size, 3) uint8 of the scene as it is now, apart from observations.

        Raises:
            RendererError: When there is no OpenGL.
        """
        self._require_reset()
        renderer = Renderer(self._simulator.model, size=size, cameras=(camera,))
        try:
            return renderer(self._simulator.data)[camera]
        finally:
            renderer.close()

    def close(self) -> None:
        """Free the simulation and its renderer."""
        if self._renderer:
            self._renderer.close()
        self._simulator.close()

    def _require_reset(self) -> None:
        if self._full is None:
            raise ValueError(f"{self.task.name} has not begun: reset it first")

    def _observation(self) -> Observation:
        return Observation(
            state=self._full[_STATE_PLACES[self.state]].astype(np.float32),
            images=self._renderer(self._simulator.data) if self._renderer else {},
            success=self._success,
            step=self._steps,
        )


def make_environment(
    task: Task | str, seed: int = 0, *, images: Images | None = None, state: str = "full"
) -> Environment:
    """A simulated task, ready to be reset.

    Args:
        task: A task or its name.
        seed: Of the start states that `Environment.reset` takes where it is given none.
        images: What images observations hold; None for none.
        state: The kind of state that observations hold, see `STATE_NAMES`.

    Raises:
        ValueError: When there is no such task, kind of state or camera.
        RendererError: When images are wanted and there is no OpenGL.
        ImportError: When the simulator is not installed.
    """
    return Environment(find_task(task) if isinstance(task, str) else task, seed, images, state)


_BODIES = (
    *("right_arm_base_link", "right_l0", "right_l1", "right_l2", "right_l3", "right_l4"),
    *("right_l5", "right_l6", "hand", "leftclaw", "rightclaw"),
)


def _metaworld():
    choose_backend()
    try:
        import metaworld.env_dict
        import metaworld.policies
    except ImportError as error:
        raise ImportError(
            f"the simulator does not load ({error}): pip install 'feedforward[robot]'"
        ) from error
    return metaworld


def _simulator(name: str):
    """Meta-World's own environment, with the goal in its state and its start states seeded."""
    simulator = _metaworld().env_dict.ALL_V3_ENVIRONMENTS[f"{name}-v3"]()
    simulator._partially_observable = False
    # made while the goal was hidden, it would cut the goal off to zeros
    del simulator.sawyer_observation_space
    simulator._freeze_rand_vec = False
    simulator.seeded_rand_vec = True
    simulator._set_task_called = True
    return simulator


def _snapshot(model) -> dict[str, np.ndarray]:
    """What Meta-World moves in the scene's model when it lays a scene."""
    names = ("body_pos", "body_quat", "site_pos", "site_quat", "geom_pos", "geom_quat")
    return {name: getattr(model, name).copy() for name in names}


# Three scripts fail in one of ten to twenty attempts; told that a thing is a little elsewhere (in
# metres), they do not.
_CORRECTIONS = {
    # a grasped peg hangs 27 mm below the hand, and from 25 mm on the script reaches for it again
    "peg-insert-side": ("object_z", 0.010),
    # the hand lifts the block by its upper edge, and it slips
    "shelf-place": ("object_z", -0.005),
    # the stick drags the thermos 2 cm behind itself, which then stops short of the goal
    "stick-pull": ("goal_y", -0.020),
}


def scripted_expert(task: Task | str) -> Callable[[np.ndarray], np.ndarray]:
    """The scripted policy of a task: from a full state (39,) to an action (4,).

    Meta-World's own, with small corrections in three tasks. Its actions are cut off at -1 and 1,
    where the simulator would cut them.
    """
    task = find_task(task) if isinstance(task, str) else task
    policy = _metaworld().policies.ENV_POLICY_MAP[f"{task.name}-v3"]()
    name, shift = _CORRECTIONS.get(task.name, ("object_z", 0.0))
    place = STATE_NAMES["full"].index(name)

    def act(full_state: np.ndarray) -> np.ndarray:
        seen = np.array(full_state, dtype=np.float64)  # some scripts write into what they are given
        seen[place] += shift
        with warnings.catch_warnings():
            # says that actions are cut off, which is meant
            warnings.filterwarnings("ignore", message="Constant", category=UserWarning)
            action = policy.get_action(seen)
        return np.clip(action, -1, 1).astype(np.float32)

    return act


def versions() -> dict[str, str]:
    """What decides how a simulation runs and looks: versions and renderer, for records.

    Scores change with MuJoCo's version, so that they belong beside every one.
    """
    from importlib.metadata import version

    packages = ("metaworld", "mujoco", "gymnasium")
    return {name: version(name) for name in packages} | {"renderer": choose_backend()}
