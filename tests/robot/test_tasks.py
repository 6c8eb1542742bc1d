"""Tasks have words, start states are functions of a seed, actions are checked, positions read."""

import sys

import numpy as np
import pytest

from feedforward.robot import metaworld, rendering
from feedforward.robot.rendering import RendererError
from feedforward.robot.tasks import (
    PHASES,
    STATE_NAMES,
    ActionError,
    Images,
    find_task,
    make_environment,
    phases,
    scene,
    scripted_expert,
    suite,
    versions,
)


def solve(environment, start_state=0):
    """Attempt a task with its expert: the states, the actions and the last observation."""
    expert = scripted_expert(environment.task)
    observation = environment.reset(start_state)
    states, actions = [environment.full_state], []
    while not environment.finished:
        actions.append(expert(environment.full_state))
        observation = environment.step(actions[-1])
        states.append(environment.full_state)
    return np.array(states), np.array(actions), observation


@pytest.fixture(scope="module")
def drawer():
    environment = make_environment("drawer-open")
    yield environment
    environment.close()


# --- tasks --------------------------------------------------------------------------------------


def test_suites_have_their_tasks_and_mt50_is_all_of_meta_world():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert len(suite("easy")) == 6
    hard = {task.name for task in suite("hard")}
    assert 10 <= len(hard) <= 12
    assert hard >= {"assembly", "peg-insert-side", "pick-place-wall", "stick-pull", "shelf-place"}
    assert hard >= {"hammer", "basketball", "hand-insert"}
    assert not hard & {task.name for task in suite("easy")}
    assert {f"{task.name}-v3" for task in suite("mt50")} == set(ALL_V3_ENVIRONMENTS)
    for name in ("easy", "hard", "mt50"):
        assert all(name in task.suites for task in suite(name))


def test_every_wording_belongs_to_one_task_and_to_training_or_evaluation():
    wordings = [
        wording.casefold()
        for task in suite("mt50")
        for wording in (task.instruction, *task.paraphrases, *task.held_out)
    ]
    assert len(set(wordings)) == len(wordings)
    assert all(wording.strip() == wording and wording for wording in wordings)
    assert all(len(task.paraphrases) >= 3 and len(task.held_out) >= 2 for task in suite("mt50"))


def test_a_misspelt_name_offers_the_nearest():
    with pytest.raises(ValueError, match=r"no task 'pick-plase'; did you mean 'pick-place'"):
        find_task("pick-plase")
    with pytest.raises(ValueError, match=r"no suite 'hrad'; did you mean 'hard'"):
        suite("hrad")
    with pytest.raises(ValueError, match=r"did you mean 'drawer-open'"):
        make_environment("draweropen")
    assert find_task("drawer-open-v3") is find_task("drawer-open")


# --- start states -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peg-insert-side", "assembly"])
def test_a_start_state_is_the_same_in_a_used_and_in_a_new_environment(name):
    used, new = make_environment(name, seed=1), make_environment(name, seed=2)
    solve(used, start_state=5)
    first, second = used.reset(7), new.reset(7)
    assert np.array_equal(first.state, second.state)
    expert = scripted_expert(name)
    for _ in range(40):
        action = expert(used.full_state)
        assert np.array_equal(used.step(action).state, new.step(action).state)
    assert not np.array_equal(used.reset(8).state, first.state)
    used.close()
    new.close()


def test_the_own_sequence_of_start_states_follows_the_seed():
    def starts(seed):
        environment = make_environment("reach", seed)
        return np.array([environment.reset().state for _ in range(3)])

    first = starts(1)
    assert np.array_equal(first, starts(1))
    assert not np.array_equal(first, starts(2))
    assert len(np.unique(first, axis=0)) == 3


def test_the_goal_is_in_the_state_and_stays_there(drawer):
    before = drawer.reset(0).state[-3:]
    after = drawer.step(np.zeros(4)).state[-3:]
    assert np.allclose(before, drawer._simulator._target_pos)
    assert np.array_equal(before, after)


def test_a_start_state_must_be_a_seed(drawer):
    with pytest.raises(ValueError, match="seed from 0"):
        drawer.reset(-1)


# --- states -------------------------------------------------------------------------------------


def test_kinds_of_state_are_parts_of_the_full_one():
    environments = {kind: make_environment("push", state=kind) for kind in STATE_NAMES}
    states = {}
    for kind, environment in environments.items():
        environment.reset(3)
        environment.step(np.full(4, 0.5))
        observation = environment.step(np.full(4, -0.5))
        assert observation.state.dtype == np.float32
        assert observation.state.shape == (environment.state_size,) == (len(STATE_NAMES[kind]),)
        states[kind] = dict(zip(STATE_NAMES[kind], observation.state, strict=True))
    assert [len(names) for names in STATE_NAMES.values()] == [39, 21, 4]
    assert states["current"].items() <= states["full"].items()
    assert states["robot"].items() <= states["current"].items()
    assert states["full"]["previous_gripper_x"] != states["full"]["gripper_x"]
    with pytest.raises(ValueError, match="did you mean 'robot'"):
        make_environment("push", state="robott")


def test_positions_are_read_off_states(drawer):
    observation = drawer.reset(0)
    here = scene(np.stack([observation.state] * 2))
    assert here.gripper.shape == (2, 3)
    assert here.opening.shape == (2,)
    assert np.allclose(here.gripper[0], drawer.bodies()["hand"], atol=1e-6)
    assert np.allclose(here.goal[0], drawer._simulator._target_pos)
    assert np.allclose(scene(observation.state).second, 0)
    closed = drawer
    for _ in range(30):
        observation = closed.step([0, 0, 0, 1])
    assert scene(observation.state).opening < here.opening[0] - 0.2
    with pytest.raises(ValueError, match=r"states of 4 numbers.*\[39, 21\]"):
        scene(np.zeros(4))


def test_phases_of_picking_and_placing_come_in_order():
    states, _, last = solve(make_environment("pick-place"), start_state=1)
    assert last.success
    found = phases(states)
    assert (np.diff(found) >= 0).all()
    assert set(found) == set(range(len(PHASES)))
    with pytest.raises(ValueError, match="one attempt"):
        phases(states[None])


def test_an_object_that_settles_before_the_gripper_comes_has_not_moved():
    environment = make_environment("hammer")
    states, _, last = solve(environment, start_state=0)
    assert last.success
    objects = scene(states).object
    assert np.linalg.norm(objects[10] - objects[0]) > 0.01  # else the test shows nothing
    found = phases(states)
    assert list(dict.fromkeys(found.tolist()))[:2] == [0, 1]
    assert (found[:10] == PHASES.index("reach")).all()


# --- actions ------------------------------------------------------------------------------------


def test_actions_that_cannot_be_carried_out_name_the_task_and_the_step(drawer):
    drawer.reset(0)
    drawer.step(np.zeros(4))
    before = drawer.full_state
    with pytest.raises(ActionError, match=r"'drawer-open', step 2.*shape \(3,\).*\(4,\)"):
        drawer.step(np.zeros(3))
    with pytest.raises(ActionError, match=r"'drawer-open', step 2.*nan.*finite"):
        drawer.step([0, np.nan, 0, 0])
    with pytest.raises(ActionError, match=r"step 2.*inf"):
        drawer.step([0, np.inf, 0, 0])
    assert np.array_equal(drawer.full_state, before)
    assert drawer.step(np.zeros(4)).step == 2


def test_actions_are_cut_off_at_one(drawer):
    drawer.reset(0)
    first = drawer.step([5, -5, 0, 9]).state
    drawer.reset(0)
    assert np.array_equal(first, drawer.step([1, -1, 0, 1]).state)


def test_an_attempt_begins_with_a_reset_and_ends():
    environment = make_environment("reach")
    for use in (lambda: environment.step(np.zeros(4)), lambda: environment.full_state):
        with pytest.raises(ValueError, match="reset it first"):
            use()
    environment.reset(0)
    while not environment.finished:
        observation = environment.step([0, 0, 0, 0])
    assert observation.step == environment.task.max_steps
    assert not observation.success
    with pytest.raises(ValueError, match=r"all its .* steps"):
        environment.step(np.zeros(4))


def test_experts_succeed_and_success_stays(drawer):
    _, actions, last = solve(drawer, start_state=11)
    assert last.success
    assert drawer.finished
    assert len(actions) == last.step < drawer.task.max_steps
    assert np.abs(actions).max() <= 1
    for _ in range(5):
        last = drawer.step([0, -1, 0, -1])
    assert last.success
    assert not drawer.reset(11).success


@pytest.mark.slow
@pytest.mark.parametrize(("name", "starts"), [("easy", 8), ("hard", 8), ("mt50", 3)])
def test_the_experts_of_a_suite_solve_95_percent(name, starts):
    solved = {}
    for task in suite(name):
        environment = make_environment(task)
        solved[task.name] = [solve(environment, start)[2].success for start in range(starts)]
        environment.close()
    # so few starts tell no task's 95 % from 90: for that every collection counts its attempts
    assert np.mean(list(solved.values())) >= 0.95
    assert min(map(sum, solved.values())) >= starts - 1, solved


MENDED = {
    "box-close": [1011, 1023, 1025],
    "peg-unplug-side": [1007, 1038, 1046],
    "soccer": [1, 18, 28],
    "sweep-into": [6002, 6016, 6030],
}


@pytest.mark.parametrize(("name", "start"), [(n, s) for n, those in MENDED.items() for s in those])
def test_experts_solve_starts_at_which_the_scripts_of_meta_world_fail(name, start):
    assert solve(make_environment(name), start)[2].success


def test_experts_need_nothing_but_the_state():
    states, actions, _ = solve(make_environment("window-open"))
    again = scripted_expert("window-open")
    assert np.array_equal([again(state) for state in states[:-1]], actions)


# --- the machine --------------------------------------------------------------------------------


def test_versions_name_simulator_and_renderer():
    found = versions()
    assert set(found) == {"metaworld", "mujoco", "gymnasium", "renderer"}
    assert all(found.values())


def test_a_simulator_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(ImportError, match=r"pip install 'feedforward\[robot\]'"):
        metaworld._metaworld()


def test_without_a_renderer_states_work_and_images_say_how_to_get_one(monkeypatch):
    monkeypatch.setattr(rendering, "choose_backend", lambda: "none")
    environment = make_environment("reach")
    assert environment.reset(0).state.shape == (39,)
    assert environment.bodies()["hand"].shape == (3,)
    for draw in (environment.render, lambda: make_environment("reach", images=Images())):
        with pytest.raises(RendererError, match="libosmesa6, or libegl1"):
            draw()


def test_images_stand_beside_the_same_states(renderer):
    images = Images(size=40, cameras=("corner2", "topview"))
    seen = make_environment("reach", images=images)
    blind = make_environment("reach")
    observation = seen.reset(4)
    assert np.array_equal(observation.state, blind.reset(4).state)
    assert set(observation.images) == set(images.cameras)
    for image in observation.images.values():
        assert image.shape == (40, 40, 3)
        assert image.dtype == np.uint8
        assert image.std() > 10
    moved = seen.step([1, 1, 1, 0]).images["corner2"]
    assert not np.array_equal(moved, observation.images["corner2"])
    assert np.array_equal(seen.reset(4).images["corner2"], observation.images["corner2"])
    seen.close()


@pytest.mark.parametrize("size", [0, 84.0, True])
def test_a_picture_needs_a_size(drawer, size):
    drawer.reset(0)
    with pytest.raises(ValueError, match=f"size is {size}; give a whole number of pixels"):
        drawer.render(size=size)


def test_a_camera_must_be_there(renderer):
    with pytest.raises(ValueError, match="no camera 'corner5'; did you mean 'corner"):
        make_environment("reach", images=Images(cameras=("corner5",)))


def test_images_need_a_size_and_names():
    for size in (0, 84.0, True):
        with pytest.raises(ValueError, match="size from 1"):
            Images(size=size)
    with pytest.raises(ValueError, match=r"give names, as in \('corner2',\)"):
        Images(cameras="corner2")
    with pytest.raises(ValueError, match="named twice"):
        Images(cameras=("corner2", "corner2"))
    assert Images(cameras=["top"]) == Images(cameras=("top",))
