"""Runs of policies: parents shared, resumed exactly, scored as the ledger reads them."""

import re
import shutil
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from feedforward import records
from feedforward.files import DataError, checkout
from feedforward.profiles import PROFILES, load_experiment
from feedforward.robot import rollout, runs
from feedforward.robot.accounting import least_plan_time, plan, policy_cost, training_flops
from feedforward.robot.demos import Demonstrations
from feedforward.robot.experiment import ARMS, grid
from feedforward.robot.lerobot import Episode, write_dataset
from feedforward.robot.policy import PolicyConfig
from feedforward.robot.runs import (
    LOCAL,
    Evaluation,
    RobotConfig,
    Tuning,
    load_data,
    run,
    trained_policy,
)
from feedforward.robot.tasks import Images, find_task
from feedforward.robot.vision import FEATURES
from feedforward.training import TrainingConfig

TASKS = ("drawer-close", "reach")
TRAINING = TrainingConfig(
    6, 1e-3, warmup=2, precision="fp32", log_every=2, ema=0.5, checkpoint_every_seconds=None
)
ADAMOE = Tuning(replace(TRAINING, steps=4), "adamoe", experts=3, router_warmup=1)
CONFIG = RobotConfig(
    "adamoe",
    PolicyConfig(state=39, action=4, horizon=4, width=16, depth=2, heads=2, hidden=16),
    TRAINING,
    ADAMOE,
    tasks=TASKS,
    demonstrations=2,
    batch=8,
    evaluation=Evaluation(episodes=2, execute=3, steps=2, at_once=4),
    long_tasks=("reach",),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(records, "_git", lambda *arguments: None)


@pytest.fixture(autouse=True)
def given(monkeypatch):
    """Demonstrations made by hand, words without their encoder, and short attempts."""

    def states(texts):
        states = [torch.full((3, 384), float(len(text)) / 50) for text in texts]
        return torch.stack(states), torch.ones(len(texts), 3, dtype=torch.bool)

    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            find_task(TASKS[place % 2]).instruction,
            rng.normal(size=(12, 39)).astype(np.float32),
            rng.uniform(-1, 1, size=(12, 4)).astype(np.float32),
            {},
        )
        for place in range(4)
    ]
    short = {name: replace(find_task(name), max_steps=6) for name in TASKS}
    monkeypatch.setattr("feedforward.robot.tasks.find_task", lambda name: short[name])
    monkeypatch.setattr(runs, "token_states", states)
    monkeypatch.setattr(rollout, "token_states", states)
    monkeypatch.setattr(runs, "collect", lambda *args, **options: Demonstrations.of(episodes))
    return episodes


def trained(config):
    return trained_policy(config, progress=False, device="cpu")


def test_a_record_holds_what_the_ledger_reads():
    record = run(CONFIG, progress=False, device="cpu")
    metrics = record.metrics
    for name in ("success", "success on long tasks", "success on short tasks"):
        items = metrics["items"][name]
        assert np.mean(list(items.values())) == metrics[name]
    assert len(metrics["items"]["success"]) == 4
    assert set(metrics["items"]["success on long tasks"]) == {"reach 0", "reach 1"}
    assert metrics["success by task"].keys() == set(TASKS)
    assert np.shape(metrics["load"]) == (2, 3)
    assert np.allclose(np.sum(metrics["load"], 1), 1, atol=1e-5)
    for name in ("phase", "task"):
        assert metrics[f"{name} information"] >= 0
        assert 0 < metrics[f"{name} information p"] <= 1
    assert metrics["loss with other experts"] != metrics["last loss"]
    assert metrics["simulator"]["mujoco"]
    assert metrics["action expert parameters"] > metrics["active action expert parameters"]
    assert {"parent: loss", "tuning: loss", "tuning: balance"} <= record.curves.keys()
    assert run(CONFIG, progress=False, device="cpu") == record  # kept, not run again


def test_every_metric_of_the_claims_is_in_the_arms():
    """Names in the claims are those of arms; which metrics they need is seen above."""
    text = (checkout() / "book" / "claims.yml").read_text(encoding="utf-8")
    mine = [entry for entry in yaml.safe_load(text) if entry["paper"] == "adamoe"]
    names = {
        arm
        for entry in mine
        for one in entry["statistics"]
        for arm in (
            [one["variant"], one.get("reference", one["variant"])]
            if "variant" in one
            else [term["variant"] for term in one["terms"]]
        )
    }
    assert len(mine) == 9
    assert names <= grid("adamoe", "cpu").keys()


@pytest.mark.parametrize(("robots", "bound"), [(1, "weights"), (10_000, "arithmetic")])
def test_a_plan_takes_at_least_its_arithmetic_and_its_reading(robots, bound):
    config = grid("adamoe", "paper")["adamoe"]
    cost = policy_cost(config.policy, config.tuning)
    taken = least_plan_time(
        config.policy, config.tuning, robots=robots, steps=3, peak=1e12, bandwidth=1e10
    )
    ways = {
        "weights": 3 * 2 * cost.expert / 1e10,
        "arithmetic": 3 * robots * config.policy.horizon * cost.flops / 1e12,
    }
    assert taken == pytest.approx(ways[bound]) == pytest.approx(max(ways.values()))
    with pytest.raises(ValueError, match="robots is 0"):
        least_plan_time(config.policy, robots=0)


def test_another_copy_makes_no_difference():
    """Experts that were not tuned are copies, so that the loss stays what it was."""
    copies = replace(CONFIG, tuning=replace(ADAMOE, training=replace(ADAMOE.training, lr=1e-30)))
    metrics = run(copies, progress=False, device="cpu").metrics
    assert metrics["loss with other experts"] == pytest.approx(metrics["last loss"], rel=1e-5)


def test_the_first_loss_is_the_parents_where_the_function_is_kept():
    dense = replace(CONFIG, variant="dense", tuning=Tuning(ADAMOE.training))
    kept = replace(CONFIG, variant="adamoe-preserved", tuning=replace(ADAMOE, preserve=True))
    wide = replace(CONFIG, variant="dense-matched", tuning=Tuning(ADAMOE.training, hidden=32))
    parent = replace(CONFIG, variant="dense-parent", tuning=None)
    log = {c.variant: runs._Training(c, False, torch.device("cpu")).after()[1] for c in
           (parent, dense, kept, wide, CONFIG)}  # fmt: skip
    last = log["dense-parent"][-1]["last loss"]
    assert log["dense"][-1]["first loss"] == pytest.approx(last, abs=1e-6)
    assert log["adamoe-preserved"][-1]["first loss"] == pytest.approx(last, abs=1e-5)
    assert log["dense-matched"][-1]["first loss"] == pytest.approx(last, abs=1e-5)
    assert abs(log["adamoe"][-1]["first loss"] - last) > 1e-4


def test_the_time_for_data_is_counted_once_and_by_itself(given, monkeypatch):
    def slow(*args, **options):
        time.sleep(0.5)
        return Demonstrations.of(given, attempts={"reach": 3, "drawer-close": 2})

    monkeypatch.setattr(runs, "collect", slow)
    config = replace(CONFIG, seed=5, evaluation=Evaluation(episodes=1, execute=3, steps=1))
    record = run(config, progress=False, device="cpu")
    metrics, spent = record.metrics, record.provenance.seconds
    assert 0.5 <= metrics["data seconds"] < spent - metrics["training seconds"] + 0.01
    assert metrics["expert attempts"] == {"reach": 3, "drawer-close": 2}
    # another run of a policy that is there reads the data while it is measured
    started = time.perf_counter()
    again = run(replace(config, variant="again"), progress=False, device="cpu")
    took = time.perf_counter() - started
    assert again.metrics["data seconds"] >= 0.5
    assert again.provenance.seconds - again.metrics["training seconds"] < took + 0.01


def test_arms_share_a_parent_and_seeds_do_not(monkeypatch):
    steps = []
    original = runs.train

    def counted(model, batches, loss, config, **options):
        steps.append(config.steps)
        return original(model, batches, loss, config, **options)

    monkeypatch.setattr(runs, "train", counted)
    for config in (CONFIG, replace(CONFIG, variant="dense", tuning=Tuning(ADAMOE.training))):
        trained(config)
    assert steps == [6, 4, 4]
    trained(replace(CONFIG, evaluation=Evaluation(episodes=1, execute=1)))
    assert steps == [6, 4, 4]  # how it is scored does not decide its weights
    trained(replace(CONFIG, seed=1))
    assert steps == [6, 4, 4, 6, 4]


def test_a_killed_run_goes_on_to_the_same_weights(monkeypatch):
    whole = trained(replace(CONFIG, evaluation=Evaluation(episodes=3, execute=3)))
    saved = replace(TRAINING, checkpoint_every_steps=2)
    config = replace(CONFIG, parent=saved, tuning=replace(ADAMOE, training=replace(saved, steps=4)))
    original = runs.Objective.on_step

    def killed(self, model, step):
        original(self, model, step)
        if step == 3:
            raise KeyboardInterrupt

    for _ in range(2):  # once in the parent, once in the tuning
        monkeypatch.setattr(runs.Objective, "on_step", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(config)
        monkeypatch.setattr(runs.Objective, "on_step", original)
        trained(replace(config, tuning=None))
    resumed = trained(config)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_training_words_are_those_of_the_instruction(given):
    batches = runs._Batches(CONFIG, Demonstrations.of(given), torch.device("cpu"))
    assert batches.counts.tolist() == [4, 4]  # the instruction and three paraphrases
    first, again = batches(3), batches(3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first.keys() == {"state", "actions", "mask", "text", "text_mask"}
    lengths = {len(words) / 50 for task in TASKS for words in find_task(task).held_out}
    seen = {round(float(x), 4) for step in range(20) for x in batches(step)["text"][:, 0, 0]}
    own = {
        round(len(words) / 50, 4)
        for task in TASKS
        for words in (find_task(task).instruction, *find_task(task).paraphrases)
    }
    assert seen == own != lengths


def test_a_folder_in_the_format_trains_without_a_simulator(given, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "robot"
    write_dataset(
        folder,
        given,
        fps=10,
        state_names=[str(i) for i in range(39)],
        action_names=list("xyzg"),
        robot="other",
    )
    config = replace(CONFIG, tasks=(), long_tasks=(), source=LOCAL)
    monkeypatch.delenv(LOCAL, raising=False)
    with pytest.raises(DataError, match="FEEDFORWARD_DATA is not set"):
        load_data(config)
    monkeypatch.setenv(LOCAL, str(folder.parent))
    metrics = run(config, progress=False, device="cpu").metrics
    assert metrics["last loss"] > 0
    assert "success" not in metrics
    seeing = replace(config.policy, cameras=2, image_width=FEATURES)
    with pytest.raises(DataError, match=r"2 cameras and the demonstrations .* have 0: none"):
        trained(replace(config, policy=seeing))


def folder_of(path, episodes, fps=80):
    names = {"state_names": [str(i) for i in range(39)], "action_names": list("xyzg")}
    return write_dataset(path, episodes, fps=fps, **names)


def test_other_data_in_the_readers_folder_are_another_run(given, tmp_path, monkeypatch):
    config = replace(CONFIG, tasks=(), long_tasks=(), source=LOCAL)
    options = {"progress": False, "device": "cpu"}
    frames, losses, keys = [], [], []
    for name, count in (("one", 2), ("other", 4)):
        folder_of(tmp_path / name / "robot", given[:count])
        monkeypatch.setenv(LOCAL, str(tmp_path / name))
        record = records.cached(run, config, profile="smoke", **options)
        assert run(config, **options).metrics == record.metrics
        frames.append(record.metrics["frames"])
        losses.append(record.metrics["last loss"])
        keys.append(config.inputs())
    assert frames == [24, 48]
    assert losses[0] != losses[1]
    monkeypatch.setenv(LOCAL, str(tmp_path / "one"))
    assert records.cached(run, config, profile="smoke", **options).metrics["frames"] == 24
    # a folder by its path, in which episodes are replaced by others
    there = replace(config, source=str(tmp_path / "one" / "robot"))
    first = run(there, **options).metrics["last loss"]
    shutil.rmtree(tmp_path / "one")
    folder_of(tmp_path / "one" / "robot", given[2:])
    assert run(there, **options).metrics["last loss"] != first
    assert there.inputs() not in keys
    assert CONFIG.inputs() == {}
    with pytest.raises(DataError, match="is no data set"):
        run(replace(config, source=str(tmp_path / "none")), **options)


def test_views_are_those_of_the_cameras_in_their_order(given, tmp_path, monkeypatch):
    shown = []

    def features(images, frames, **_):
        shown.append({name: int(own[:1].mean()) for name, own in images.items()})
        return np.zeros((frames, len(images), FEATURES), np.float32)

    monkeypatch.setattr(runs, "frame_features", features)
    values = {"gripperPOV": 10, "corner2": 20, "topview": 30}
    cameras = {name: np.full((12, 16, 16, 3), it, np.uint8) for name, it in values.items()}
    seen = [replace(it, state=it.state[:, :4], images=cameras) for it in given]
    data = Demonstrations.of(seen)
    config = replace(
        CONFIG,
        policy=replace(CONFIG.policy, state=4, cameras=2, image_width=FEATURES),
        state="robot",
        source="somewhere",
        images=Images(16, ("corner2", "gripperPOV")),
    )
    runs._Batches(config, data, torch.device("cpu"))
    assert list(shown[0].items()) == [("corner2", 20), ("gripperPOV", 10)]
    other = replace(config, images=Images(16, ("corner2", "behindGripper")))
    with pytest.raises(DataError, match="no images of behindGripper but of gripperPOV, corner2"):
        runs._Batches(other, data, torch.device("cpu"))


def test_another_rate_than_the_simulators_is_told(given, tmp_path):
    for fps, told in ((80, False), (10, True)):
        config = replace(CONFIG, source=str(folder_of(tmp_path / str(fps), given, fps)))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            _ = runs._Training(config, False, torch.device("cpu")).data
        assert any("10 frames a second" in str(it.message) for it in found) == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("reahc",), "long_tasks": ()}, "reach"),
        ({"long_tasks": ("assembly",)}, "not among the tasks"),
        ({"state": "robot"}, "39 numbers of state"),
        ({"tasks": (), "long_tasks": ()}, "need tasks"),
        ({"batch": 0}, "batch is 0"),
        ({"demonstrations": 1.5}, "demonstrations is 1.5; give a whole number"),
        ({"evaluation": Evaluation(execute=5)}, "horizon of 4"),
        ({"tuning": Tuning(TRAINING, hidden=8)}, "at least its hidden width 16"),
        ({"tuning": Tuning(TRAINING, hidden=0)}, "hidden is 0"),
        ({"images": Images()}, "through 0 cameras and images name 1: corner2"),
        ({"policy": replace(CONFIG.policy, cameras=1, image_width=9)}, "images name 0: none"),
        ({"policy": replace(CONFIG.policy, action=7)}, "7 numbers and Meta-World takes 4: x, y"),
        ({"tasks": ("reach", "reach-v3")}, "tasks names a task twice"),
        ({"seed": -1}, "seed is -1"),
        ({"noise": -0.1}, "noise -0.1"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, message, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_tuning_refuses_what_does_not_go_together():
    with pytest.raises(ValueError, match="hidden"):
        Tuning(TRAINING, "adamoe", hidden=8)
    with pytest.raises(ValueError, match="preserve"):
        Tuning(TRAINING, preserve=True)
    for wrong, message in (
        ({"ffn": "adamoo"}, "adamoe"),
        ({"experts": 8}, "experts is 8 with ffn='dense'"),
        ({"k": 2}, "k is 2 with ffn='dense'"),
        ({"shared_weight": 0.5}, "shared_weight is 0.5 with ffn='dense'"),
        ({"ffn": "adamoe", "k": 5}, "k is 5"),
        ({"ffn": "adamoe", "shared_weight": 7.0}, "shared_weight is 7.0"),
        ({"ffn": "adamoe", "balance": (-0.1, 0.0)}, "give two numbers from 0"),
        ({"ffn": "adamoe", "balance": (0.1,)}, "give two numbers from 0"),
        ({"ffn": "adamoe", "balance": 0.1}, "give two numbers from 0"),
        ({"ffn": "adamoe", "switch": -1}, "switch is -1"),
        ({"ffn": "adamoe", "router_rate": 0.0}, "router_rate is 0.0"),
        ({"ffn": "adamoe", "router_warmup": -1}, "router_warmup -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Tuning(TRAINING, **wrong)
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match=f"episodes is {wrong}"):
            Evaluation(episodes=wrong)
    with pytest.raises(ValueError, match="seed is -1"):
        Evaluation(seed=-1)


def test_names_of_tasks_are_kept_as_they_are_found():
    long = replace(CONFIG, tasks=("drawer-close-v3", "reach"), long_tasks=("reach-v3",))
    assert long == CONFIG
    assert records.config_key(long) == records.config_key(CONFIG)
    assert replace(CONFIG, tasks="reach", long_tasks="reach-v3").tasks == ("reach",)


# --- the arms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_the_arms_at_equal_training(profile):
    assert load_experiment("adamoe").grid is grid
    arms = grid("adamoe", profile)
    tuned = {name: arm for name, arm in arms.items() if arm.tuning}
    assert tuned.keys() == ARMS.keys()
    untuned = tuned.pop("adamoe-untuned")
    assert len({(arm.policy, arm.parent, arm.tuning.training) for arm in tuned.values()}) == 1
    assert untuned.parent == tuned["adamoe"].parent
    assert all(name == arm.variant for name, arm in arms.items())
    table = plan(profile, arms.values())
    assert len(table.rows) == len(arms)
    assert bool(table.commands) == (profile == "paper")
    with pytest.raises(ValueError, match="adamoe"):
        grid("adamo", profile)


@pytest.mark.parametrize("part", ["adamoe-images", "adamoe-libero"])
@pytest.mark.parametrize("profile", ["smoke", "cpu"])
def test_further_parts_have_some_of_the_arms_under_their_own_name(part, profile):
    arms = grid(part, profile)
    assert {"dense-parent", "dense", "adamoe"} <= arms.keys()
    assert {arm.experiment for arm in arms.values()} == {part}
    assert {bool(arm.images) for arm in arms.values()} == {part == "adamoe-images"}
    assert all(arm.policy.cameras == len(arm.images.cameras) for arm in arms.values() if arm.images)
    with pytest.raises(ValueError, match=f"{part} has no setting for 'paper'.*smoke, cpu"):
        grid(part, "paper")


def test_the_untuned_arm_is_its_parent_with_copies_for_experts():
    tuning = grid("adamoe", "smoke")["adamoe-untuned"].tuning
    metrics = run(replace(CONFIG, tuning=tuning), progress=False, device="cpu").metrics
    assert metrics["last loss"] == pytest.approx(metrics["first loss"], abs=1e-6)
    assert metrics["loss with other experts"] == pytest.approx(metrics["last loss"], abs=1e-6)
    parent = run(replace(CONFIG, tuning=Tuning(TRAINING)), progress=False, device="cpu").metrics
    assert metrics["first loss"] == pytest.approx(parent["first loss"], abs=1e-6)


def test_the_recorded_scale_is_large_enough():
    arms = grid("adamoe", "cpu")
    assert arms["adamoe"].evaluation.episodes >= 25
    assert 5 <= arms["adamoe"].demonstrations <= 10
    assert len(arms["adamoe"].long_tasks) * 2 == len(arms["adamoe"].tasks)


def test_matched_arms_have_the_parameters_that_they_match():
    arms = grid("adamoe", "cpu")
    cost = {name: policy_cost(arm.policy, arm.tuning) for name, arm in arms.items()}
    assert cost["dense-matched"].expert == pytest.approx(cost["single-expert"].expert, rel=0.01)
    active = cost["adamoe"].active_expert
    assert cost["dense-matched"].active_expert == pytest.approx(active, rel=0.01)
    assert cost["dense-matched-total"].expert == pytest.approx(cost["adamoe"].expert, rel=0.01)
    assert training_flops(arms["adamoe"]) > training_flops(arms["dense"])


def test_the_papers_action_expert_is_counted():
    arms = grid("adamoe", "paper")
    dense, sparse = (policy_cost(arms[name].policy, arms[name].tuning) for name in
                     ("dense", "adamoe"))  # fmt: skip
    found = [round(n / 1e9, 2) for n in (dense.expert, sparse.expert, sparse.active_expert)]
    assert found == [0.31, 1.22, 0.54]
