"""Rollouts: paired, deterministic, stopped at NaN; intervals; what experts tell; films."""

from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from feedforward.robot import films, rendering, rollout
from feedforward.robot.films import drawn_frames, film, save_gif, save_video
from feedforward.robot.lerobot import decode
from feedforward.robot.policy import FlowPolicy, PolicyConfig, upcycled
from feedforward.robot.rollout import (
    Attempt,
    Rate,
    Start,
    make_starts,
    plan_latency,
    recorded_rate,
    roll_out,
)
from feedforward.robot.scores import (
    mutual_information,
    paired_difference,
    phase_information,
    task_information,
    wilson,
)
from feedforward.robot.tasks import ActionError, Images, find_task, scene

SMALL = PolicyConfig(state=39, action=4, horizon=4, width=16, depth=2, heads=2, hidden=16)


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Token states without the encoder, which takes seconds to load."""

    def states(texts):
        states = [torch.full((3, 384), float(len(text)) / 50) for text in texts]
        return torch.stack(states), torch.ones(len(texts), 3, dtype=torch.bool)

    monkeypatch.setattr(rollout, "token_states", states)


@pytest.fixture
def short(monkeypatch):
    """Attempts of few steps."""
    monkeypatch.setattr(
        "feedforward.robot.tasks.find_task", lambda name: replace(find_task(name), max_steps=10)
    )


def policy(seed=0, **experts):
    torch.manual_seed(seed)
    dense = FlowPolicy(SMALL).eval()
    return upcycled(dense, "adamoe", router_std=1.0, **experts) if experts else dense


def same(first, second):
    return all(
        a.start == b.start
        and a.success == b.success
        and np.array_equal(a.states, b.states)
        and np.array_equal(a.actions, b.actions)
        for a, b in zip(first.attempts, second.attempts, strict=True)
    )


def test_starts_are_paired_and_ask_with_unseen_words():
    one, two = make_starts(["reach", "drawer-open"], 3), make_starts(["drawer-open"], 2)
    assert one[3:5] == two
    assert len({start.start_state for start in one}) == 6
    assert {start.instruction for start in two} <= set(find_task("drawer-open").held_out)
    (plain,) = make_starts(["reach"], 1, held_out=False)
    assert plain.instruction == find_task("reach").instruction
    assert make_starts(["reach"], 1, seed=1)[0].start_state != one[0].start_state
    with pytest.raises(ValueError, match="drawer-open"):
        make_starts(["drawer-opne"], 1)
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"episodes is {wrong}"):
            make_starts(["reach"], wrong)
    assert make_starts("reach", 2) == make_starts(find_task("reach"), 2) == one[:2]


def test_rollouts_repeat_and_keep_the_experts_of_every_step(short):
    starts = make_starts(["reach", "drawer-close"], 2)
    torch.manual_seed(1)
    own = policy(experts=3, k=2)
    first = roll_out(own, starts, execute=3, steps=2, at_once=4, progress=False)
    torch.manual_seed(2)  # the global generator has no say
    assert same(first, roll_out(own, starts, execute=3, steps=2, at_once=4, progress=False))
    assert tuple(one.start for one in first.attempts) == starts
    attempt = first.attempts[0]
    assert attempt.states.shape == (11, 39)
    assert attempt.actions.shape == (10, 4)
    assert attempt.experts.shape == attempt.weights.shape == (10, 2, 2, 2)
    assert (attempt.uses(1, 3).sum(1) == 4).all()  # two Euler steps, two choices
    assert max(first.plan_rows) == 4
    assert len(first.plan_rows) == 4
    assert first.items.keys() == {start.id for start in starts}
    with pytest.raises(ValueError, match="no experts"):
        roll_out(policy(), starts[:1], steps=1, progress=False).attempts[0].uses(0, 4)


def test_kept_experts_are_those_that_the_plan_chose(short):
    """The first plan of an attempt, made again by hand."""
    from feedforward.layers.experts import collect_routing

    (start,) = make_starts(["reach"], 1)
    own = policy(experts=3)
    attempt = roll_out(own, [start], execute=3, steps=2, progress=False).attempts[0]
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(start.start_state))[None]
    text, real = rollout.token_states([start.instruction])
    state = torch.from_numpy(attempt.states[:1])
    with collect_routing(own) as routings:
        chunk = own.plan(state, text, real, steps=2, noise=noise)
    assert np.allclose(attempt.actions[:3], chunk[0, :3].numpy(), atol=1e-6)
    # layers of the state, then layer by layer of each Euler step
    for euler in range(2):
        for layer in range(2):
            found = routings[2 + 2 * euler + layer]
            assert np.array_equal(attempt.experts[:3, euler, layer], found.indices[:3].numpy())
            assert np.allclose(attempt.weights[:3, euler, layer], found.weights[:3].numpy())


def test_experts_beyond_a_byte_are_kept_as_they_are(short):
    wide = policy(experts=300, k=2)
    for block in wide.action_expert.blocks:  # the last ones are chosen throughout
        block.ffn.router.gate.data.zero_()
        block.ffn.router.gate.data[-2:] = torch.tensor([[1.0], [-1.0]])
    attempt = roll_out(wide, make_starts(["reach"], 1), steps=1, progress=False).attempts[0]
    assert attempt.experts.max() > 256
    assert attempt.uses(0, 300)[:, -2:].sum() > 0
    few = roll_out(policy(experts=3), make_starts(["reach"], 1), steps=1, progress=False)
    assert few.attempts[0].experts.dtype == np.uint8


def test_starts_of_one_name_are_not_counted_by_it(short):
    starts = make_starts(["reach"], 2) + make_starts(["reach"], 2, seed=1)
    found = roll_out(policy(), starts, steps=1, progress=False)
    assert tuple(one.start for one in found.attempts) == starts
    assert found.success.episodes == 4
    with pytest.raises(ValueError, match="several starts are called 'reach 0', 'reach 1'"):
        _ = found.items


@pytest.mark.slow
def test_processes_give_the_same_rollouts():
    starts = make_starts(["reach", "drawer-close"], 1)
    both = [roll_out(policy(), starts, steps=1, workers=n, progress=False) for n in (1, 2)]
    assert same(*both)
    broken = policy()
    broken.action_out.bias.data.fill_(float("nan"))
    with pytest.raises(ActionError, match="'reach', step 1"):
        roll_out(broken, starts, steps=1, workers=2, progress=False)


def test_nan_stops_with_task_and_step(short):
    broken = policy()
    plans, original = [], broken.plan

    def plan(*args, **options):
        plans.append(original(*args, **options))
        if len(plans) == 2:
            plans[-1][:, 1] = float("nan")
        return plans[-1]

    broken.plan = plan
    with pytest.raises(ActionError, match="task 'reach', step 6"):
        roll_out(broken, make_starts(["reach"], 1), steps=1, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [{"execute": 5}, {"execute": 0}, {"execute": 2.5}, {"at_once": 0}, {"workers": 0}],
)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=r"horizon 4"):
        roll_out(policy(), make_starts(["reach"], 1), **wrong)


def test_tasks_of_several_simulators_are_refused():
    starts = make_starts(["reach", "transfer-cube"], 1)
    with pytest.raises(ValueError, match=r"'reach' of Meta-World, 'transfer-cube' of ALOHA"):
        roll_out(policy(), starts, progress=False)


def test_a_policy_of_another_action_size_is_refused(short):
    other = FlowPolicy(replace(SMALL, action=7)).eval()
    with pytest.raises(ActionError, match=r"step 1: the action has shape \(7,\)"):
        roll_out(other, make_starts(["reach"], 1), steps=1, progress=False)


def test_latency_is_measured_side_by_side():
    timed = plan_latency({"dense": policy(), "adamoe": policy(experts=2)}, rounds=3, steps=1)
    assert timed.keys() == {"dense", "adamoe"}
    assert all(0 < one.median <= one.p95 and one.batch == 1 for one in timed.values())
    with pytest.raises(ValueError, match="policies is empty"):
        plan_latency({})


# --- intervals ----------------------------------------------------------------------------------


def test_wilson_by_hand():
    # the formula at 8 of 10 with z = 1.959964
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.49016, abs=1e-5), pytest.approx(0.94332, abs=1e-5))
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one attempt"):
        wilson(1, 0)


def test_paired_differences_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(0)
    first = {str(i): float(v) for i, v in enumerate(rng.random(200) < 0.5)}
    second = first | {str(i): 1.0 for i in range(10)}
    found = paired_difference(second, first)
    gain = np.mean([second[k] - first[k] for k in first])
    assert found.estimate == pytest.approx(gain)
    assert 0 <= found.low <= gain <= found.high < 0.1  # unpaired: about 0.14
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(first, {"a": 1.0})


# --- information --------------------------------------------------------------------------------


def episodes(depends, count=40, seed=0):
    """Uses of two experts over three phases, steps alike for a while."""
    rng = np.random.default_rng(seed)
    uses, phases = [], []
    for _ in range(count):
        lengths = rng.integers(5, 20, 3)
        phase = np.repeat(np.arange(3), lengths)
        expert = (
            (phase == 1).astype(int)
            if depends
            else np.repeat(rng.integers(2, size=len(phase)), 6)[: len(phase)]
        )
        uses.append(np.eye(2, dtype=int)[expert])
        phases.append(phase)
    return uses, phases


def test_mutual_information_by_hand():
    assert mutual_information(np.array([[2, 2], [2, 2]])) == 0
    table = np.array([[3.0, 1.0], [1.0, 3.0]])
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert mutual_information(table) == pytest.approx(1 - entropy)


def test_phases_that_experts_follow_are_found_and_others_are_not():
    there = phase_information(*episodes(True))
    assert there.p < 0.01
    assert there.bits > 2 * there.shuffled
    assert phase_information(*episodes(False)).p > 0.05


def test_an_expert_that_depends_on_the_episode_alone_tells_nothing_within_it():
    uses, phases = episodes(True)
    uses = [np.eye(2, dtype=int)[np.full(len(use), i % 2)] for i, use in enumerate(uses)]
    found = phase_information(uses, phases)
    assert found.bits == pytest.approx(found.shuffled)
    assert found.p == 1.0


def test_tasks_that_experts_follow_are_found():
    tasks = np.arange(40) % 4
    uses = [np.eye(4, dtype=int)[np.full(10, task)] for task in tasks]
    found = task_information(uses, tasks)
    assert found.bits == pytest.approx(2.0)
    assert found.p == pytest.approx(1 / 201)
    other = task_information([np.roll(use, int(i % 7), 1) for i, use in enumerate(uses)], tasks)
    assert other.bits < 1


# --- films --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attempt():
    from feedforward.robot.tasks import make_environment

    (start,) = make_starts(["assembly"], 1)
    environment = make_environment("assembly")
    environment.reset(start.start_state)
    states, actions = [environment.full_state], np.full((9, 4), 0.5, np.float32)
    for action in actions:
        environment.step(action)
        states.append(environment.full_state)
    environment.close()
    return Attempt(start, False, np.array(states, np.float32), actions)


def test_attempts_are_carried_out_again_exactly(attempt):
    looks = films._again(attempt, 4, lambda environment, _: environment.full_state)
    steps, states = zip(*looks, strict=True)
    assert steps == (0, 4, 8, 9)
    assert np.array_equal(np.array(states, np.float32), attempt.states[list(steps)])
    with pytest.raises(ValueError, match="every is 0"):
        list(films._again(attempt, 0, lambda *_: None))


def test_drawn_films_need_no_renderer(attempt, tmp_path, monkeypatch):
    monkeypatch.setattr(films, "choose_backend", lambda: "none")
    frames = film(attempt, size=160, every=4)
    assert frames.shape == (4, 160, 160, 3)
    assert frames.dtype == np.uint8
    assert (frames[0] != frames[-1]).any()  # the arm has moved
    assert np.array_equal(frames, drawn_frames(attempt, size=160, every=4))
    save_gif(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as stored:
        assert stored.n_frames == 4
        assert stored.size == (160, 160)
    save_video(frames, tmp_path / "film.mp4", fps=10)
    again = decode(tmp_path / "film.mp4", [0.0, 0.3], 10)
    assert np.abs(again[1].astype(int) - frames[3]).mean() < 10
    with pytest.raises(ValueError, match="0 frames"):
        save_gif(frames[:0], tmp_path / "none.gif")


def test_an_attempt_whose_simulator_shows_no_images_is_drawn(attempt, monkeypatch):
    monkeypatch.setattr(films, "choose_backend", lambda: "egl")
    monkeypatch.setattr(films, "rendered_frames", lambda *_, **__: "rendered")
    monkeypatch.setattr(films, "drawn_frames", lambda *_, **__: "drawn")
    assert film(attempt) == "rendered"
    assert film(replace(attempt, start=make_starts(["ketchup"], 1)[0])) == "drawn"


def test_an_object_in_its_goal_is_seen(attempt, monkeypatch):
    def there(state, simulator):
        here = scene(state, simulator)
        return replace(here, object=here.goal, second=np.zeros(3))

    monkeypatch.setattr(films, "scene", there)
    (frame, *_) = drawn_frames(attempt, every=9)
    for colour in ((255, 127, 14), (214, 39, 40)):
        assert (frame == colour).all(-1).sum() > 20


def test_the_style_of_figures_leaves_films_alone(attempt):
    plain = drawn_frames(attempt, every=9)
    with matplotlib.rc_context({"figure.constrained_layout.use": True, "axes.linewidth": 4.0}):
        assert np.array_equal(drawn_frames(attempt, every=9), plain)


def test_rendered_films(renderer, attempt):
    assert film(attempt, size=32, every=9).shape == (2, 32, 32, 3)


# --- images -------------------------------------------------------------------------------------


def test_pictures_are_taken_for_plans_alone(renderer, short, monkeypatch):
    taken, seen = [], []
    take = rendering.Renderer.__call__
    monkeypatch.setattr(
        rendering.Renderer, "__call__", lambda *given: taken.append(1) or take(*given)
    )

    def encoder(images):
        seen.append(images["corner2"].shape)
        return torch.from_numpy(images["corner2"]).float().mean((1, 2))[:, None] / 255

    torch.manual_seed(0)
    seeing = FlowPolicy(replace(SMALL, cameras=1, image_width=3)).eval()
    starts = make_starts(["reach"], 1)
    found = roll_out(seeing, starts, execute=4, images=Images(24), encoder=encoder, progress=False)
    assert len(found.attempts[0].actions) == 10
    assert seen == 3 * [(1, 24, 24, 3)]  # at steps 0, 4 and 8
    assert len(taken) == 3


def test_starts_have_readable_names():
    assert Start("reach", 3, 0, "go").id == "reach 3"


def test_the_recorded_rate_is_over_the_attempts_of_all_records():
    scores = [{"reach 0": 100, "reach 1": 0, "reach-wall 0": 100}, {"reach 0": 100}]
    runs = [SimpleNamespace(metrics={"items": {"success": items}}) for items in scores]
    assert recorded_rate(runs) == Rate.of([True, False, True, True])
    assert recorded_rate(runs, "reach") == Rate.of([True, False, True])
    low, high = wilson(3, 4)
    assert str(recorded_rate(runs)) == f"75.0 [{100 * low:.0f}, {100 * high:.0f}]"
    with pytest.raises(ValueError, match="no attempt at push"):
        recorded_rate(runs, "push")
