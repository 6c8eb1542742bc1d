"""ALOHA's two arms: the right one picks a cube up and hands it over to the left one.

The stand-in for RoboTwin's two arms, whose simulator needs a GPU and downloads. The scene, where
the cube starts, the control and the test of success are those of the task ``AlohaTransferCube`` of
``gym-aloha``, after ALOHA (arXiv 2304.13705). Its package is not run: the scene is read out of its
files and simulated by MuJoCo itself, so that neither dm_control nor a renderer is needed.
Instructions and the scripted expert are written here.

An attempt is solved, and over, when the left arm's left finger touches the cube while the cube is
off the table, as there; that the right arm has let go is not asked for. It has 400 steps of 1/50 of
a second, as in ALOHA's own code; ``gym-aloha`` takes 300 unless told otherwise. Actions that tear
at the arms until their accelerations are no longer finite leave the scene standing as it was, and
the attempt unsolved.

Explained in ``book/adamoe/05-controls-and-verdicts``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from feedforward.packages import PackageFiles
from feedforward.robot.rendering import Renderer, loading_simulator
from feedforward.robot.simulation import Environment, Images, Simulator, Task, View

_INSIDE = "gym_aloha/assets"
# as data/registry.toml has it, for use without a checkout
SCENE = PackageFiles(
    "aloha",
    title="ALOHA, two robot arms at a table,",
    package="gym-aloha",
    version="0.1.5",
    files={
        f"{_INSIDE}/*.stl": (
            1562576,
            "516ca4a272bdeae04e776595c3fcbb2a5f5cd48caaa2d0c6e1a48bd1d748e14f",
        ),
        f"{_INSIDE}/*.xml": (
            29176,
            "11eb138b2219bdd63e97cdd3427eae33a79d6fef81e4cc839b67b55f0ab91898",
        ),
    },
)
"""The files of the scene: MuJoCo's description of it, and the shapes of the arms."""

MAX_STEPS = 400
CONTROL_HZ = 50

_ARMS = ("left", "right")
_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
_XYZ = ("x", "y", "z")
_BY_ARM = tuple(tuple(f"{arm}_{joint}" for joint in _JOINTS) for arm in _ARMS)

STATE_NAMES = {
    "full": (
        *(f"gripper_{axis}" for axis in _XYZ),
        "opening",
        *(f"object_{name}" for name in (*_XYZ, "qx", "qy", "qz", "qw")),
        *(f"goal_{axis}" for axis in _XYZ),
        "goal_opening",
        *_BY_ARM[0],
        *_BY_ARM[1],
    ),
    "robot": (*_BY_ARM[0], "goal_opening", *_BY_ARM[1], "opening"),
}
"""What a state of ALOHA holds, in order, by the name of its kind.

``"full"`` (27): the right gripper, which picks the cube up, and its opening from 0 (closed) to 1;
the cube, with its turn as a quaternion; the goal, which is the place of the left gripper, since
that is where the cube must go, with the left gripper's opening; and the angles of both arms' six
joints. ``"robot"`` (14): the joints and openings alone, the left arm first. Positions are in
metres, that of a gripper is between the tips of its fingers; angles are in radians.
"""

ACTION_NAMES = (*_BY_ARM[0], "left_gripper", *_BY_ARM[1], "right_gripper")
"""What an action of ALOHA holds: where each joint is to go, and how far each gripper is to open.

From -1 to 1, which is spread evenly over the range that the scene lets each joint be controlled in:
for the waist 1 is half a turn, for a gripper it is open.
"""


# --- the scene ----------------------------------------------------------------------------------


@cache
def _model():
    """MuJoCo's model of the scene, compared with its checksums; environments share it.

    Raises:
        DataError: When the package or one of its files is missing or damaged.
        ImportError: When MuJoCo is not installed.
    """
    files = {file.place.name: file.content for file in SCENE.read()}
    return _mujoco().MjModel.from_xml_string(
        files["bimanual_viperx_transfer_cube.xml"].decode(), files
    )


def _mujoco():
    with loading_simulator():
        import mujoco
    return mujoco


@dataclass(frozen=True, eq=False)
class _Arm:
    """Where an arm's parts are in MuJoCo's arrays, for joints and controls alike."""

    name: str
    joints: slice
    fingers: slice


_LEFT = _Arm("left", slice(0, 6), slice(6, 8))
_RIGHT = _Arm("right", slice(8, 14), slice(14, 16))
_START = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.02239, -0.02239) * 2
_LOW, _HIGH = (0.0, 0.4, 0.05), (0.2, 0.6, 0.05)  # of the cube's centre at the start, metres
_TIPS = np.array([0.14, 0.0, 0.0])  # between the tips of the fingers, seen from the gripper


def _grip(data, arm: _Arm) -> np.ndarray:
    link = data.body(f"vx300s_{arm.name}/gripper_link")
    return link.xpos + link.xmat.reshape(3, 3) @ _TIPS


class _Aloha(Environment):
    body_names = tuple(
        f"vx300s_{arm}{part}"
        for arm in _ARMS
        for part in (
            *("", "/shoulder_link", "/upper_arm_link", "/upper_forearm_link"),
            *("/lower_forearm_link", "/wrist_link", "/gripper_link"),
            *("/left_finger_link", "/right_finger_link"),
        )
    )
    arms = 2
    views = (
        View("from the side", 0, 2, (-0.7, 0.7), (-0.06, 0.64)),
        View("from above", 0, 1, (-0.7, 0.7), (0.15, 0.85)),
    )

    def __init__(self, task: Task, seed: int, images: Images | None, state: str):
        super().__init__(task, seed, images, state)
        self._mujoco, self._model, self._broken = _mujoco(), _model(), False
        self._data = self._mujoco.MjData(self._model)
        names = [self._model.geom(place).name for place in range(self._model.ngeom)]
        self._cube, self._table, self._finger = map(
            names.index, ("red_box", "table", "vx300s_left/10_left_gripper_finger")
        )
        self._substeps = round(1 / CONTROL_HZ / self._model.opt.timestep)
        if images:
            self._renderer = Renderer(self._model, size=images.size, cameras=images.cameras)

    def _begin(self, start_state: int) -> np.ndarray:
        data = self._data
        self._mujoco.mj_resetData(self._model, data)
        self._broken = False
        data.qpos[:16] = data.ctrl[:] = _START
        data.qpos[16:] = *np.random.default_rng(start_state).uniform(_LOW, _HIGH), 1, 0, 0, 0
        self._mujoco.mj_forward(self._model, data)
        return self._read()

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        self._data.ctrl[:] = _controls(self._model, action)
        for _ in range(self._substeps):
            # what mj_step does, without its messages: actions that tear at the joints end in
            # accelerations that cannot be carried on with
            self._mujoco.mj_forward(self._model, self._data)
            self._broken |= not (np.abs(self._data.qacc) < self._mujoco.mjMAXVAL).all()
            if self._broken:
                return self._full, False
            self._mujoco.mj_Euler(self._model, self._data)
        self._mujoco.mj_step1(self._model, self._data)  # places and contacts as they are now
        touching = self._data.contact.geom
        touching = touching[(touching == self._cube).any(1)]
        held = (touching == self._finger).any() and not (touching == self._table).any()
        return self._read(), bool(held)

    def _scene(self):
        return self._model, self._data

    def _end(self) -> None:
        pass

    def _read(self) -> np.ndarray:
        data = self._data
        x, y, z, qw, *turn = data.qpos[16:]
        return np.concatenate(
            [
                _grip(data, _RIGHT),
                [_opening(self._model, data, _RIGHT)],
                [x, y, z, *turn, qw],
                _grip(data, _LEFT),
                [_opening(self._model, data, _LEFT)],
                data.qpos[_LEFT.joints],
                data.qpos[_RIGHT.joints],
            ]
        )


def _controls(model, action: np.ndarray) -> np.ndarray:
    """What both arms' actuators are told: joints, and two fingers that mirror each other."""
    spread = np.concatenate([part[[0, 1, 2, 3, 4, 5, 6, 6]] for part in np.split(action, 2)])
    spread[[7, 15]] *= -1
    low, high = model.actuator_ctrlrange.T
    return low + (spread + 1) / 2 * (high - low)


def _opening(model, data, arm: _Arm) -> float:
    """How far the fingers are apart, from 0 to 1."""
    low, high = model.actuator_ctrlrange[arm.fingers.start]
    left, right = data.qpos[arm.fingers]
    return ((left - right) / 2 - low) / (high - low)


# --- the expert ---------------------------------------------------------------------------------


_MEETING = np.array([0.0, 0.5, 0.25])  # where the cube is handed over, metres
_WAITING = np.array([-0.12, 0.5, 0.25])  # where the left gripper is until the cube is there
_RETREAT = np.array([0.2, 0.5, 0.3])  # where the right gripper goes when it has let go
_DEEP = np.array([0.0, 0.0, 0.005])  # from the cube's centre to the right gripper that holds it
_BESIDE = np.array([-0.006, 0.0, 0.0])  # and to the left one
_BACK = {"left": np.array([-1.0, 0.0, 0.0]), "right": np.array([0.0, 0.0, 1.0])}
_APPROACH = 0.08  # metres at most that a gripper stays back until it is in line with the cube
_HELD = 0.64  # an opening at which fingers have closed on the cube, which is 4 cm wide
_STRIDE, _TURN = 0.010, 0.06  # metres and radians at most that a gripper is sent on in a step
_DAMPING = 1e-3
# how far ahead of a joint its target is, for each radian of a step: the waist turns slowly
_LEADS = np.array([4.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def _turned(*angles: tuple[tuple[float, float, float], float]) -> np.ndarray:
    """Turns about axes one after the other, as a matrix."""
    mujoco, matrix = _mujoco(), np.eye(3)
    for axis, angle in angles:
        quaternion, turn = np.empty(4), np.empty(9)
        mujoco.mju_axisAngle2Quat(quaternion, np.array(axis, dtype=float), angle)
        mujoco.mju_quat2Mat(turn, quaternion)
        matrix = turn.reshape(3, 3) @ matrix
    return matrix


class _Reach:
    """Joints that bring a gripper nearer to a pose, by MuJoCo's Jacobian (differential kinematics).

    Args:
        turns: By arm how its gripper is to be turned, (3, 3).
    """

    def __init__(self, turns: dict[_Arm, np.ndarray]):
        self.mujoco, self.model = _mujoco(), _model()
        self.data, self.turns = self.mujoco.MjData(self.model), turns
        self.links = {arm: self.model.body(f"vx300s_{arm.name}/gripper_link").id for arm in turns}

    def __call__(self, joints: dict[_Arm, np.ndarray], points: dict[_Arm, np.ndarray]):
        """By arm the joints after a step from `joints` towards `points` of the grippers."""
        mujoco, model, data = self.mujoco, self.model, self.data
        for arm, own in joints.items():
            data.qpos[arm.joints] = own
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        found = {}
        for arm, point in points.items():
            link, grip = self.links[arm], _grip(data, arm)
            jacobian = np.zeros((6, model.nv))
            mujoco.mj_jac(model, data, jacobian[:3], jacobian[3:], grip, link)
            jacobian = jacobian[:, arm.joints]
            turn = self.turns[arm] @ data.xmat[link].reshape(3, 3).T
            quaternion, about = np.empty(4), np.empty(3)
            mujoco.mju_mat2Quat(quaternion, turn.ravel())
            mujoco.mju_quat2Vel(about, quaternion, 1.0)
            wanted = np.concatenate([_at_most(point - grip, _STRIDE), _at_most(about, _TURN)])
            square = jacobian @ jacobian.T + _DAMPING * np.eye(6)
            found[arm] = joints[arm] + _LEADS * (jacobian.T @ np.linalg.solve(square, wanted))
        return found


def _at_most(vector: np.ndarray, length: float) -> np.ndarray:
    return vector * min(1.0, length / max(np.linalg.norm(vector), 1e-12))


def _approach(arm: _Arm, grip: np.ndarray, point: np.ndarray, opening: float):
    """Where an open gripper goes so that its fingers get around a point, and whether they close."""
    back = _BACK[arm.name]
    gap = (grip - point) @ back
    aside = np.linalg.norm(grip - point - gap * back)
    if max(aside, abs(gap)) < (0.02 if 0.5 < opening < 0.9 else 0.01):
        return point, -1.0
    return point + back * min(_APPROACH, 8 * max(0.0, aside - 0.006)), 1.0


def _expert(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    """Pick up with the right arm, bring to the middle, grasp with the left arm, let go.

    It looks at the state alone and has no memory: that a gripper holds the cube is told by its
    fingers, which are around it and have closed as far as it lets them.
    """
    names = STATE_NAMES["full"]
    # the right gripper points down at 60 degrees, the left one lies on its side, so that the
    # fingers of both fit around the cube
    pitch, half, side = ((0, 1, 0), np.pi / 3), ((0, 0, 1), np.pi), ((1, 0, 0), np.pi / 2)
    reach = _Reach({_RIGHT: _turned(pitch, half), _LEFT: _turned(side)})
    low, high = reach.model.actuator_ctrlrange.T

    def of(full: np.ndarray, what: str, count: int = 3) -> np.ndarray:
        first = names.index(what)
        return full[first : first + count]

    def act(full: np.ndarray) -> np.ndarray:
        cube = of(full, "object_x")
        grips = {_LEFT: of(full, "goal_x"), _RIGHT: of(full, "gripper_x")}
        openings = {_LEFT: of(full, "goal_opening", 1)[0], _RIGHT: of(full, "opening", 1)[0]}
        around = {_LEFT: cube + _BESIDE, _RIGHT: cube + _DEEP}
        holds = {
            arm: np.linalg.norm(around[arm] - grips[arm]) < 0.025 and openings[arm] < _HELD
            for arm in around
        }
        points, efforts = {_LEFT: _WAITING, _RIGHT: _RETREAT}, {_LEFT: 1.0, _RIGHT: 1.0}
        if holds[_LEFT]:
            points[_LEFT], efforts[_LEFT] = _MEETING + _BESIDE, -1.0
            if openings[_RIGHT] < 0.8:
                points[_RIGHT] = grips[_RIGHT]
        elif holds[_RIGHT]:
            points[_RIGHT], efforts[_RIGHT] = grips[_RIGHT] + _MEETING - cube, -1.0
            if np.linalg.norm(cube - _MEETING) < 0.02:
                points[_LEFT], efforts[_LEFT] = _approach(
                    _LEFT, grips[_LEFT], around[_LEFT], openings[_LEFT]
                )
        else:
            points[_RIGHT], efforts[_RIGHT] = _approach(
                _RIGHT, grips[_RIGHT], around[_RIGHT], openings[_RIGHT]
            )
        joints = reach({arm: of(full, f"{arm.name}_waist", 6) for arm in points}, points)
        action = [
            part
            for arm in points
            for part in (
                2 * (joints[arm] - low[arm.joints]) / (high - low)[arm.joints] - 1,
                [efforts[arm]],
            )
        ]
        return np.clip(np.concatenate(action), -1, 1).astype(np.float32)

    return act


ALOHA = Simulator(
    name="ALOHA",
    robot="aloha",
    control_hz=CONTROL_HZ,
    state_names=STATE_NAMES,
    action_names=ACTION_NAMES,
    moves=(*_BY_ARM[0], *_BY_ARM[1]),
    packages=("gym-aloha", "mujoco"),
    environment=_Aloha,
    expert=_expert,
)

TASKS = (
    Task(
        name="transfer-cube",
        instruction="pick up the cube with the right arm and hand it over to the left arm",
        paraphrases=(
            "take the cube with the right gripper and pass it to the left gripper",
            "the right arm lifts the cube and gives it to the left arm",
            "transfer the cube from the right hand to the left hand",
        ),
        held_out=(
            "let the right arm grab the cube and the left arm take it over",
            "hand the cube across from the right gripper to the left one",
        ),
        suites=("aloha",),
        max_steps=MAX_STEPS,
        simulator=ALOHA,
    ),
)
"""The task of the suite ``aloha``."""
