"""ALOHA's two arms: the task, the scene where its files are, the expert, and policies in it."""

import importlib.metadata
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from feedforward import packages, records
from feedforward.cli import main
from feedforward.files import DataError
from feedforward.robot import aloha, rendering, rollout, runs, tasks
from feedforward.robot.aloha import ACTION_NAMES, ALOHA, MAX_STEPS, SCENE, STATE_NAMES
from feedforward.robot.demos import collect, demonstrate, load_demonstrations
from feedforward.robot.experiment import ARMS, grid
from feedforward.robot.films import drawn_frames
from feedforward.robot.rollout import make_starts, roll_out
from feedforward.robot.runs import RobotConfig, run
from feedforward.robot.tasks import (
    PHASES,
    ActionError,
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
NAME = "transfer-cube"
NOISE = 0.003


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(records, "_git", lambda *arguments: None)


@pytest.fixture(scope="module")
def environment():
    """The scene; a test that asks for it is left out where its files are missing."""
    try:
        SCENE.installed()
    except DataError as error:
        pytest.skip(str(error))
    made = make_environment(NAME)
    yield made
    made.close()


@pytest.fixture(scope="module")
def attempts(environment):
    """Three attempts of the expert: their full states, and the last observation."""
    expert, found = scripted_expert(NAME), []
    for start_state in range(3):
        environment.reset(start_state)
        states = [environment.full_state]
        while not environment.finished:
            last = environment.step(expert(environment.full_state))
            states.append(environment.full_state)
        found.append((np.array(states), last))
    return found


@pytest.fixture
def words(monkeypatch):
    """Words without their encoder."""

    def states(texts):
        return torch.ones(len(texts), 3, 384), torch.ones(len(texts), 3, dtype=torch.bool)

    monkeypatch.setattr(runs, "token_states", states)
    monkeypatch.setattr(rollout, "token_states", states)


# --- the task -----------------------------------------------------------------------------------


def test_the_suite_has_one_task_that_says_which_arm_does_what():
    (task,) = suite("aloha")
    assert task is find_task(NAME)
    assert (task.state_size, task.action_size, task.max_steps) == (27, 14, 400)
    said = (task.instruction, *task.paraphrases, *task.held_out)
    assert len(set(said)) == len(said) == 6
    assert all("right" in wording and "left" in wording for wording in said)
    assert tasks.wordings(task.instruction) == (task.instruction, *task.paraphrases)
    assert not set(said) & {
        wording
        for other in (*suite("mt50"), *suite("libero-object"))
        for wording in (other.instruction, *other.paraphrases, *other.held_out)
    }


def test_states_are_parts_of_the_full_one():
    assert {kind: len(names) for kind, names in STATE_NAMES.items()} == {"full": 27, "robot": 14}
    for names in STATE_NAMES.values():
        assert len(set(names)) == len(names)
        assert set(names) <= set(FULL)
    assert set(ALOHA.moves) == set(ACTION_NAMES) - {"left_gripper", "right_gripper"}


def test_tasks_of_two_simulators_do_not_go_together():
    with pytest.raises(ValueError, match=r"'reach' of Meta-World, 'transfer-cube' of ALOHA"):
        simulator_of(("reach", NAME))


def test_a_misspelt_name_offers_the_nearest():
    with pytest.raises(ValueError, match=r"no task 'transfer-cub'; did you mean 'transfer-cube'"):
        find_task("transfer-cub")
    with pytest.raises(ValueError, match=r"no suite 'alhoa'; did you mean 'aloha'"):
        suite("alhoa")


# --- the files ----------------------------------------------------------------------------------


def test_the_registry_says_what_the_library_reads():
    entry = packages.registry()["aloha"]
    assert packages.PackageFiles.of("aloha", entry).files == SCENE.files
    assert (entry["package"], entry["version"]) == (SCENE.package, SCENE.version)
    assert entry["licence"] == "package Apache-2.0"


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(aloha, "_model", aloha._model.__wrapped__)
    with pytest.raises(DataError, match=r"ALOHA.*not installed.*--no-deps gym-aloha==0\.1\.5"):
        make_environment(NAME)
    with pytest.raises(SystemExit) as ended:
        main(["run", "adamoe-aloha", "--variants", "dense-parent"])
    assert ended.value.code == 2
    assert "gym-aloha==0.1.5" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_scene_is_not_simulated(environment, tmp_path, monkeypatch):
    assert environment.task is find_task(NAME)
    folder = tmp_path / "gym_aloha" / "assets"
    folder.mkdir(parents=True)
    for file in SCENE.read():
        changed = file.content.replace(b'mass="0.05"', b'mass="0.01"')
        (folder / file.place.name).write_bytes(changed)
    here = type("Here", (), {"locate_file": lambda _, path: tmp_path / path, "version": "0.1.5"})
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: here())
    with pytest.raises(DataError, match=r"\*\.xml differs: expected 29176 bytes"):
        aloha._model.__wrapped__()


def test_without_mujoco_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(rendering, "choose_backend", lambda: "none")
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r"pip install 'feedforward\[robot\]'"):
        aloha._mujoco()


# --- the simulation -----------------------------------------------------------------------------


def test_a_start_has_the_arms_at_rest_and_the_cube_anywhere_in_its_range(environment):
    places = []
    for start_state in range(20):
        seen = dict(zip(FULL, environment.reset(start_state).state, strict=True))
        places.append([seen[f"object_{axis}"] for axis in "xyz"])
        assert [seen[f"right_{joint}"] for joint in aloha._JOINTS] == pytest.approx(
            [0, -0.96, 1.16, 0, -0.3, 0]
        )
        assert seen["object_qw"] == 1
        # the arms mirror each other
        assert seen["gripper_x"] == pytest.approx(-seen["goal_x"], abs=1e-4)
    low, high = np.min(places, axis=0), np.max(places, axis=0)
    assert (low >= np.float32([0, 0.4, 0.05])).all()
    assert (high <= np.float32([0.2, 0.6, 0.05])).all()
    assert (high - low)[:2] == pytest.approx([0.2, 0.2], abs=0.05)


def test_the_same_seed_and_actions_give_the_same_states(environment, attempts):
    states, _ = attempts[1]
    first = environment.reset(1)
    assert np.array_equal(environment.full_state, states[0])
    expert = scripted_expert(NAME)
    for before, after in pairwise(states[:100]):
        environment.step(expert(before))
        assert np.array_equal(environment.full_state, after)
    other = make_environment(NAME)
    assert np.array_equal(other.reset(1).state, first.state)
    assert not np.array_equal(other.reset(2).state, first.state)


def test_joints_go_where_actions_send_them(environment):
    environment.reset(0)
    wanted = np.array([0.1, -0.3, 0.4, 0.1, -0.2, 0.2, 1, -0.1, -0.3, 0.4, -0.1, -0.2, 0.1, -1])
    for _ in range(60):
        environment.step(wanted)
    model, _ = environment._scene()
    assert environment._substeps * model.opt.timestep == pytest.approx(1 / 50)
    low, high = model.actuator_ctrlrange.T
    for arm, parts in ((aloha._LEFT, wanted[:6]), (aloha._RIGHT, wanted[7:13])):
        first = FULL.index(f"{arm.name}_waist")
        there = environment.full_state[first : first + 6]
        target = low[arm.joints] + (high - low)[arm.joints] / 2 * (parts + 1)
        assert there == pytest.approx(target, abs=0.03)
    openings = environment.full_state[[FULL.index("goal_opening"), FULL.index("opening")]]
    assert openings[0] > 0.95
    assert openings[1] < 0.1


def test_wrong_actions_name_task_and_step(environment):
    environment.reset(0)
    with pytest.raises(ActionError, match=r"'transfer-cube', step 1.*\(4,\).*\(14,\): left_waist"):
        environment.step(np.zeros(4))
    with pytest.raises(ActionError, match=r"'transfer-cube', step 1.*finite"):
        environment.step(np.full(14, np.nan))


def test_actions_that_tear_the_arms_apart_solve_nothing(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment.reset(0)
    rng = np.random.default_rng(0)
    while not environment._broken and not environment.finished:
        environment.step(rng.uniform(-1, 1, 14))
    assert environment._broken
    stands = environment.full_state
    assert np.isfinite(stands).all()
    seen = environment.step(np.zeros(14))
    assert not seen.success
    assert np.array_equal(environment.full_state, stands)
    assert not list(tmp_path.glob("MUJOCO*"))
    environment.reset(0)
    assert not environment._broken


def test_images_come_from_the_cameras_of_the_scene(environment, renderer):
    assert renderer
    with pytest.raises(ValueError, match=r"no camera 'corner2'; allowed: .*'top'"):
        make_environment(NAME, images=Images())
    drawing = make_environment(NAME, images=Images(32, ("top",)))
    image = drawing.reset(0).images["top"]
    drawing.close()
    assert image.shape == (32, 32, 3)
    assert ((image[..., 0] > 150) & (image[..., 1] < 60)).any()  # the cube is red


# --- the expert ---------------------------------------------------------------------------------


def test_the_expert_hands_the_cube_over(attempts):
    for states, last in attempts:
        assert last.success
        assert last.step < 350
        seen = scene(states, ALOHA)
        right, left = (np.linalg.norm(it - seen.object, axis=1) for it in (seen.gripper, seen.goal))
        assert seen.object[0, 2] == 0.05
        assert seen.object[-1, 2] > 0.2
        assert max(right[-1], left[-1]) < 0.03
        assert states[-1, FULL.index("goal_opening")] < 0.8  # it closes, and does not just bump
        found = phases(states, ALOHA)
        assert set(found) == set(range(len(PHASES)))
        assert (np.diff(found) >= 0).all()


def test_the_left_arm_holds_the_cube_alone_once_the_right_one_has_let_go(environment):
    expert = scripted_expert(NAME)
    environment.reset(4)
    for _ in range(MAX_STEPS):
        seen = environment.step(expert(environment.full_state))
    assert seen.success
    state = dict(zip(FULL, seen.state, strict=True))
    assert state["object_z"] > 0.2
    assert state["opening"] > 0.9
    assert state["gripper_x"] - state["object_x"] > 0.15


def test_the_expert_comes_back_from_noise_on_both_arms(environment):
    quiet, noisy = (demonstrate(environment, 5, noise=noise) for noise in (0.0, NOISE))
    assert noisy.state.shape == (len(noisy.actions), 27)
    assert noisy.actions.shape[1] == 14
    apart = np.abs(quiet.state[:50] - noisy.state[:50]).max(0)
    for arm in ("left", "right"):
        assert apart[FULL.index(f"{arm}_waist")] > 0.001
    # what is recorded is what the expert wanted to do there
    expert = scripted_expert(NAME)
    wanted = expert(noisy.state[60].astype(np.float64))
    assert noisy.actions[60] == pytest.approx(wanted, abs=1e-3)


# --- policies -----------------------------------------------------------------------------------


def test_demonstrations_are_collected_and_read_back(environment, tmp_path):
    assert environment.task is find_task(NAME)
    options = {"noise": NOISE, "folder": tmp_path / "set", "workers": 1, "progress": False}
    data = collect(suite("aloha"), 2, **options)
    again = load_demonstrations(tmp_path / "set")
    assert np.array_equal(data.state, again.state)
    assert np.array_equal(data.actions, again.actions)
    assert (again.fps, again.instructions) == (50, (find_task(NAME).instruction,))
    assert len(again.task) == 2
    assert np.abs(again.actions).max() <= 1


def test_a_run_is_scored_and_its_attempts_are_drawn(environment, words, monkeypatch):
    assert environment.task is find_task(NAME)
    short = {**tasks._tasks(), NAME: replace(find_task(NAME), max_steps=24)}
    config = grid("adamoe-aloha", "smoke")["adamoe"]
    tuning = replace(config.tuning, training=replace(config.tuning.training, steps=2))
    config = replace(config, parent=replace(config.parent, steps=3), tuning=tuning)
    runs.load_data(config, progress=False)
    monkeypatch.setattr(tasks, "_tasks", lambda: short)
    record = run(config, progress=False, device="cpu")
    assert record.experiment == "adamoe-aloha"
    assert record.metrics["simulator"].keys() == {"gym-aloha", "mujoco", "renderer"}
    assert record.metrics["items"]["success"].keys() == {"transfer-cube 0"}
    policy = runs.trained_policy(config, progress=False, device="cpu")
    (attempt,) = roll_out(policy, make_starts([NAME], 1), execute=8, progress=False).attempts
    assert attempt.states.shape == (25, 27)
    frames = drawn_frames(attempt, size=100, every=12)
    assert frames.shape == (3, 100, 100, 3)
    dark = (frames[0][50:] < 120).all(-1)  # from above, one arm on each side
    assert dark[:, :40].any()
    assert dark[:, 60:].any()
    assert not np.array_equal(frames[0], frames[-1])


def test_versions_stand_beside_scores(environment):
    assert versions(environment.task.simulator)["gym-aloha"] == "0.1.5"
    assert environment.bodies().keys() == set(environment.body_names)


def test_the_arms_differ_from_the_parts_in_what_aloha_needs():
    for profile in ("smoke", "cpu"):
        arms, other = grid("adamoe-aloha", profile), grid("adamoe", profile)
        assert list(arms) == ["dense-parent", "dense", "adamoe", "vanilla-moe"]
        for name, arm in arms.items():
            assert isinstance(arm, RobotConfig)
            assert (arm.experiment, arm.variant, arm.tasks) == ("adamoe-aloha", name, (NAME,))
            assert name == "dense-parent" or name in ARMS
            assert replace(arm.policy, state=39, action=4, horizon=8) == other[name].policy
    with pytest.raises(ValueError, match="no setting for 'gpu'; its profiles: smoke, cpu"):
        grid("adamoe-aloha", "gpu")
