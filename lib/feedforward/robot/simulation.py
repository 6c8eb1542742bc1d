"""What is common to the simulators of a robot: tasks, environments, and what they show and take.

`feedforward.robot.metaworld`, `feedforward.robot.libero` and `feedforward.robot.aloha` are three of
them; `feedforward.robot.tasks` knows the tasks of all by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

import numpy as np

from feedforward.profiles import unknown
from feedforward.robot.rendering import Renderer


def is_count(value: object) -> bool:
    """Whether something is a whole number from 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


class ActionError(ValueError):
    """An action that cannot be carried out: names the task, the step and what was given."""


@dataclass(frozen=True, eq=False)
class Simulator:
    """What carries tasks out, and what its states and actions hold.

    Attributes:
        name: In words.
        robot: As data sets call it.
        control_hz: Steps a second.
        state_names: By the name of a kind of state what it holds, in order; ``"full"`` has all.
            Positions that every simulator has are ``gripper_x``, ``object_x`` and ``goal_x``, each
            with its y and z, and ``opening``.
        action_names: What an action holds, in order.
        packages: Whose versions decide how a simulation runs.
        environment: The class of its environments.
        expert: From a task to its scripted policy, see `scripted_expert`.
        moves: The names of those parts of an action that move an arm from place to place, and that
            noise is added to in demonstrations.
        revision: Of what is written here: raised when an expert or a state changes, so that
            demonstrations which are kept are collected anew.
    """

    name: str
    robot: str
    control_hz: int
    state_names: Mapping[str, tuple[str, ...]]
    action_names: tuple[str, ...]
    packages: tuple[str, ...]
    environment: "type[Environment]"
    expert: "Callable[[Task], Callable[[np.ndarray], np.ndarray]]"
    moves: tuple[str, ...] = ("x", "y", "z")
    revision: int = 1


@dataclass(frozen=True)
class Task:
    """A manipulation task and what it is called in words.

    Attributes:
        name: As in its simulator, in short: ``"pick-place"``.
        instruction: What to do, in one sentence.
        paraphrases: Three more wordings to train on.
        held_out: Two wordings that no policy is trained on, for evaluation.
        suites: The suites it is in.
        max_steps: Steps that an attempt may take.
        simulator: That carries it out.
    """

    name: str
    instruction: str
    paraphrases: tuple[str, ...]
    held_out: tuple[str, ...]
    suites: tuple[str, ...]
    max_steps: int
    simulator: Simulator = field(repr=False)

    @property
    def state_size(self) -> int:
        """Numbers of the full state."""
        return len(self.simulator.state_names["full"])

    @property
    def action_size(self) -> int:
        """Numbers of an action, each from -1 to 1.

        In Meta-World the move in x, y, z, where 1 is 1 cm, and the gripper's effort, which closes
        above 0; in ALOHA joints are sent to places, see `feedforward.robot.aloha.ACTION_NAMES`.
        """
        return len(self.simulator.action_names)


@dataclass(frozen=True)
class Images:
    """What images an environment gives beside its states.

    Attributes:
        size: Height and width in pixels; an even number where they are stored, as video.
        cameras: Names in the scene; in Meta-World ``corner``, ``corner2``, ``corner3``,
            ``corner4``, ``topview``, ``behindGripper``, ``gripperPOV``, in ALOHA ``top``,
            ``angle``, ``front_close``, ``left_pillar``, ``right_pillar``, ``left_wrist``,
            ``right_wrist``.

    Raises:
        ValueError: When the size is no whole number from 1, there is no camera, or one twice.
    """

    size: int = 84
    cameras: tuple[str, ...] = ("corner2",)

    def __post_init__(self):
        if isinstance(self.cameras, str):  # would be taken apart into letters
            raise ValueError(f"cameras is {self.cameras!r}; give names, as in ({self.cameras!r},)")
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not is_count(self.size) or not self.cameras:
            raise ValueError(f"images need a whole size from 1 and a camera, not {self}")
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"a camera is named twice: {self.cameras}")


@dataclass(frozen=True)
class Observation:
    """What a policy is shown after a step.

    Attributes:
        state: (S,) float32, see `Simulator`.
        images: By camera (size, size, 3) uint8; empty where none were asked for.
        success: Whether the task has been solved at this step or before.
        step: Steps taken since the reset.
    """

    state: np.ndarray
    images: dict[str, np.ndarray] = field(default_factory=dict)
    success: bool = False
    step: int = 0


class View(NamedTuple):
    """How a scene is drawn without a renderer: which axes of it, in metres, and how much of them.

    Attributes:
        name: In words.
        across: The axis of the scene, 0 to 2, that goes across the picture.
        up: The one that goes up.
        across_limits: What is at the left end and at the right.
        up_limits: What is below and above.
    """

    name: str
    across: int
    up: int
    across_limits: tuple[float, float]
    up_limits: tuple[float, float]


class Environment:
    """One task in its simulator; made by `make_environment`.

    The class of a simulator says how an attempt begins and goes on (`_begin` and `_advance`), and
    where MuJoCo has its scene (`_scene`).
    """

    #: The robot's parts from its foot to its hand, then its two fingers; of each arm in turn.
    body_names: tuple[str, ...] = ()
    #: How many arms these are of.
    arms: int = 1
    #: Whether cameras show its scene, where something renders.
    shows_images: bool = True
    #: Two pictures of the scene, each twice as wide as high.
    views: tuple[View, View] = (
        View("from the side", 1, 2, (-0.3, 1.3), (-0.05, 0.75)),
        View("from above", 1, 0, (-0.3, 1.3), (0.4, -0.4)),
    )

    def __init__(self, task: Task, seed: int, images: Images | None, state: str):
        kinds = task.simulator.state_names
        if state not in kinds:
            raise ValueError(unknown("kind of state", state, kinds))
        self.task, self.images, self.state = task, images, state
        self._places = np.array([kinds["full"].index(name) for name in kinds[state]])
        self._seeds = np.random.SeedSequence(seed)
        self._renderer: Renderer | None = None
        self._full, self._steps, self._success = None, 0, False

    @property
    def state_size(self) -> int:
        """Numbers of an observation's state."""
        return len(self._places)

    @property
    def full_state(self) -> np.ndarray:
        """(S,) float64: what the scripted experts look at, whatever a policy is shown."""
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
        self._full = self._begin(start_state)
        self._steps, self._success = 0, False
        return self._observation()

    def step(self, action: np.ndarray, *, render: bool = True) -> Observation:
        """Carry out one action, for one period of the simulator's control.

        Args:
            action: (A,) see `Task`; what is beyond -1 and 1 is cut off there.
            render: False leaves the images out, for a step that nobody looks at.

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
                f"({self.task.action_size},): {', '.join(self.task.simulator.action_names)}, "
                "each from -1 to 1"
            )
        if not np.isfinite(action).all():
            raise ActionError(
                f"{where}: the action is {action.tolist()}; all its numbers must be finite. "
                "A policy that gives NaN was trained too fast or normalised by a deviation of 0."
            )
        self._full, success = self._advance(np.clip(action, -1, 1))
        self._steps += 1
        self._success |= success
        return self._observation(render=render)

    def bodies(self) -> dict[str, np.ndarray]:
        """Where the robot's parts are now, from its foot to its fingers: by name (3,) metres."""
        self._require_reset()
        _, data = self._scene()
        return {name: data.body(name).xpos.copy() for name in self.body_names}

    def render(self, size: int = 480, camera: str = "corner2") -> np.ndarray:
        """One image (size, size, 3) uint8 of the scene as it is now, apart from observations.

        Raises:
            RendererError: When there is no OpenGL.
            ValueError: When the size is no whole number from 1, or the scene has no such camera.
        """
        if not is_count(size):
            raise ValueError(f"size is {size!r}; give a whole number of pixels from 1")
        self._require_reset()
        model, data = self._scene()
        renderer = Renderer(model, size=size, cameras=(camera,))
        try:
            return renderer(data)[camera]
        finally:
            renderer.close()

    def close(self) -> None:
        """Free the simulation and its renderer."""
        if self._renderer:
            self._renderer.close()
        self._end()

    def _begin(self, start_state: int) -> np.ndarray:
        """Lay the scene of a start; the full state."""
        raise NotImplementedError

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Carry out an action within bounds: the full state, and whether the task is solved."""
        raise NotImplementedError

    def _scene(self):
        """MuJoCo's model and its data."""
        raise NotImplementedError

    def _end(self) -> None:
        """Free the simulation."""
        raise NotImplementedError

    def _require_reset(self) -> None:
        if self._full is None:
            raise ValueError(f"{self.task.name} has not begun: reset it first")

    def _observation(self, *, render: bool = True) -> Observation:
        return Observation(
            state=self._full[self._places].astype(np.float32),
            images=self._renderer(self._scene()[1]) if self._renderer and render else {},
            success=self._success,
            step=self._steps,
        )
