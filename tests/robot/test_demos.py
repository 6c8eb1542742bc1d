"""Collecting is a function of the order, chunks are functions of the step, runs go on."""

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from feedforward.files import DataError
from feedforward.robot import demos
from feedforward.robot.demos import (
    Chunks,
    CollectionError,
    Demonstrations,
    Statistics,
    collect,
    demonstrate,
    load_demonstrations,
)
from feedforward.robot.lerobot import write_dataset
from feedforward.robot.tasks import Images, find_task, make_environment

QUICK = ["handle-press", "coffee-button"]  # solved in some thirty steps


@pytest.fixture(scope="module")
def collected():
    return collect(QUICK, 2, seed=3, workers=1, progress=False)


@pytest.fixture
def interrupt(monkeypatch):
    """Let a collection be interrupted after some episodes; tells how many were begun."""

    def after(count):
        begun = []

        def attempt(environment, start_state, **more):
            if len(begun) == count:
                raise KeyboardInterrupt
            begun.append(start_state)
            return demonstrate(environment, start_state, **more)

        monkeypatch.setattr(demos, "demonstrate", attempt)
        return begun

    return after


def same(one, other):
    return (
        np.array_equal(one.state, other.state)
        and np.array_equal(one.actions, other.actions)
        and np.array_equal(one.boundaries, other.boundaries)
        and np.array_equal(one.task, other.task)
        and one.instructions == other.instructions
    )


# --- collecting ---------------------------------------------------------------------------------


def test_demonstrations_are_of_the_tasks_asked_for(collected):
    assert collected.instructions == tuple(find_task(name).instruction for name in QUICK)
    assert collected.task.tolist() == [0, 0, 1, 1]
    assert collected.state.shape == (len(collected), 39)
    assert collected.actions.shape == (len(collected), 4)
    assert np.abs(collected.actions).max() <= 1
    assert collected.boundaries[-1] == len(collected)
    starts = collected.state[collected.boundaries[:-1]]
    assert len(np.unique(starts, axis=0)) == 4
    assert not collected.images


def test_processes_and_folders_change_nothing(collected, tmp_path):
    folder = tmp_path / "set"
    stored = collect(QUICK, 2, seed=3, workers=2, folder=folder, progress=False)
    assert same(stored, collected)
    assert same(load_demonstrations(folder), collected)
    for name in ("mean", "std", "min", "max"):
        for kind in ("state_statistics", "action_statistics"):
            theirs, ours = (getattr(getattr(it, kind), name) for it in (stored, collected))
            assert np.allclose(theirs, ours, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} <= {"set", ".set.lock"}
    assert json.loads((folder / "meta/versions.json").read_text())["mujoco"]


def test_the_seed_decides(collected):
    assert not same(collect(QUICK, 2, seed=4, workers=1, progress=False), collected)
    fewer = collect(QUICK, 1, seed=3, workers=1, progress=False)
    assert same(fewer, collected.select([0, 2]))


def test_noise_moves_the_arm_and_the_expert_comes_back():
    environment = make_environment("handle-press")
    clean, noisy = (demonstrate(environment, 5, noise=noise) for noise in (0.0, 0.4))
    length = min(len(clean), len(noisy))
    assert np.array_equal(clean.state[0], noisy.state[0])
    assert not np.allclose(clean.state[:length], noisy.state[:length], atol=1e-3)
    expert = demos.scripted_expert("handle-press")
    wanted = np.array([expert(state) for state in noisy.state])
    assert np.allclose(noisy.actions, wanted, atol=1e-4)  # what was wanted, not what was done


def test_only_success_is_kept(monkeypatch):
    environment = make_environment(dataclasses.replace(find_task("handle-press"), max_steps=5))
    assert demonstrate(environment, 0) is None
    monkeypatch.setattr(demos, "demonstrate", lambda *_, **__: None)
    with pytest.raises(CollectionError, match=r"'handle-press' failed from 3 start states"):
        collect("handle-press", 1, attempts=3, workers=1, progress=False)


def test_an_interrupted_collection_goes_on(collected, tmp_path, interrupt):
    folder = tmp_path / "set"
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        collect(QUICK, 2, seed=3, workers=1, folder=folder, progress=False)
    assert not folder.exists()
    begun = interrupt(9)
    assert same(collect(QUICK, 2, seed=3, workers=1, folder=folder, progress=False), collected)
    assert len(begun) == 1
    # as a run leaves it that is killed when the set is there
    (tmp_path / ".set.collecting").mkdir()
    begun = interrupt(0)
    assert same(collect(QUICK, 2, seed=3, workers=1, folder=folder, progress=False), collected)
    assert begun == []
    assert {path.name for path in tmp_path.iterdir()} <= {"set", ".set.lock"}


def test_a_damaged_episode_of_an_interrupted_collection_is_named_and_collected_again(
    collected, tmp_path, interrupt
):
    folder = tmp_path / "set"
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        collect(QUICK, 2, seed=3, workers=1, folder=folder, progress=False)
    path = tmp_path / ".set.collecting" / "handle-press-00001.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    begun = interrupt(9)
    with pytest.warns(UserWarning, match=r"episode handle-press-00001.npz is damaged"):
        again = collect(QUICK, 2, seed=3, workers=1, folder=folder, progress=False)
    assert same(again, collected)
    assert len(begun) == 2


@pytest.mark.parametrize("damage", ["a byte", "no checksums"])
def test_a_collection_that_was_damaged_is_collected_again(collected, tmp_path, interrupt, damage):
    """A run on what is left of it would be another run, and say nothing of it."""
    folder, options = tmp_path / "set", {"seed": 3, "workers": 1, "progress": False}
    collect(QUICK, 2, folder=folder, **options)
    if damage == "a byte":
        data = folder / "data/chunk-000/file-000.parquet"
        content = bytearray(data.read_bytes())
        content[300] ^= 255
        data.write_bytes(content)
        with pytest.warns(UserWarning, match="episode 0 .* is left out"):
            assert len(load_demonstrations(folder).task) == 3  # a data set of one's own
    else:
        (folder / "meta/checksums.json").unlink()
    begun = interrupt(9)
    with pytest.warns(UserWarning, match=r"set is not as it was written .* collected again"):
        assert same(collect(QUICK, 2, folder=folder, **options), collected)
    assert len(begun) == 4
    assert same(collect(QUICK, 2, folder=folder, **options), collected)
    assert len(begun) == 4
    assert {path.name for path in tmp_path.iterdir()} <= {"set", ".set.lock"}


def test_failed_attempts_are_counted_with_the_others(tmp_path, monkeypatch):
    tried = []

    def attempt(environment, start_state, **more):
        tried.append(start_state)
        return None if len(tried) in (1, 2, 4) else demonstrate(environment, start_state, **more)

    monkeypatch.setattr(demos, "demonstrate", attempt)
    folder, options = tmp_path / "set", {"seed": 3, "workers": 1, "progress": False}
    found = [collect(QUICK, 2, **options)]
    tried.clear()
    found += [collect(QUICK, 2, folder=folder, **options), load_demonstrations(folder)]
    for one in found:
        assert one.attempts == {"handle-press": 5, "coffee-button": 2}
    assert found[0].select([0]).attempts == {}  # nobody knows which
    note = folder / "meta/collection.json"
    note.write_text(json.dumps({"attempts": 20}))  # as older ones have it
    (folder / "meta/checksums.json").unlink()
    assert load_demonstrations(folder).attempts == {}


def test_processes_end_with_the_one_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from feedforward.robot.demos import _end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    # its output ends when the last process that holds it does, or never
    ran = subprocess.run(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=120
    )
    assert ran.returncode == -signal.SIGKILL
    assert int(ran.stdout)


def test_a_folder_holds_one_collection(collected, tmp_path, interrupt):
    folder = tmp_path / "set"
    interrupt(1)
    with pytest.raises(KeyboardInterrupt):
        collect(QUICK, 2, seed=3, workers=1, folder=folder, progress=False)
    with pytest.raises(DataError, match=r"another collection \(seed 3 there, 4 here\)"):
        collect(QUICK, 2, seed=4, workers=1, folder=folder, progress=False)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="was not collected here"):
        collect(QUICK, 2, seed=3, workers=1, folder=tmp_path / "other", progress=False)


def test_what_cannot_be_collected_is_refused():
    with pytest.raises(ValueError, match="did you mean 'reach'"):
        collect(["raech"], 1)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="episodes and attempts from 1"):
            collect(["reach"], wrong)
    with pytest.raises(ValueError, match="noise and seed from 0"):
        collect(["reach"], 1, noise=float("nan"))
    with pytest.raises(ValueError, match="workers is 0"):
        collect(["reach"], 1, workers=0)
    with pytest.raises(ValueError, match="named twice"):
        collect(["reach", "reach-v3"], 1)
    with pytest.raises(ValueError, match="kind of state"):
        collect(["reach"], 1, state="whole")


def test_images_that_cannot_be_stored_are_refused_before_anything_is_simulated(tmp_path, interrupt):
    begun = interrupt(1)
    with pytest.raises(ValueError, match=r"images of 85 pixels.*even size"):
        collect(QUICK, 1, images=Images(85), folder=tmp_path / "set", workers=1, progress=False)
    assert begun == []
    assert list(tmp_path.iterdir()) == []


# --- images -------------------------------------------------------------------------------------


def test_images_are_stored_as_video_and_decoded_when_asked_for(renderer, tmp_path):
    options = {"images": Images(size=32), "state": "robot", "workers": 1, "progress": False}
    kept = collect("handle-press", 1, **options)
    stored = collect("handle-press", 1, folder=tmp_path / "set", **options)
    assert same(kept, stored)
    assert stored.state.shape[1] == 4
    assert kept.images["corner2"].shape == stored.images["corner2"].shape
    ours, theirs = kept.images["corner2"], stored.images["corner2"][:]
    assert np.abs(ours.astype(int) - theirs).mean() < 8
    places = np.array([7, 2, 7])
    batch = Chunks(
        stored, batch=3, horizon=2, seed=0, also={"corner2": stored.images["corner2"]}
    ).at(places)
    assert torch.equal(batch["corner2"], torch.from_numpy(theirs[places]))


# --- demonstrations -----------------------------------------------------------------------------


def test_episodes_are_selected_with_their_frames(make_episodes):
    episodes = make_episodes()
    them = Demonstrations.of(episodes, fps=20)
    some = them.select([3, 1])
    for place, episode in enumerate((episodes[3], episodes[1])):
        frames = some.frames(place)
        assert np.array_equal(some.state[frames], episode.state)
        assert np.array_equal(some.images["front"][frames], episode.images["front"])
        assert some.instructions[some.task[place]] == episode.instruction
    assert some.episodes.tolist() == [3, 1]
    assert some.state_statistics is them.state_statistics
    assert np.array_equal(some.episode, np.repeat([0, 1], [len(episodes[3]), len(episodes[1])]))
    mask = np.array([False, True, False, True])
    assert them.select(mask).episodes.tolist() == [1, 3]
    for wrong in ([4], [-1], [], [0.9, 1.7], mask[:3], ~mask & mask):
        with pytest.raises(ValueError, match="of 4: name some"):
            them.select(wrong)


def test_statistics_are_those_of_the_set(make_episodes, tmp_path):
    names = {"state_names": list("abcde"), "action_names": list("xyz")}
    folder = write_dataset(tmp_path / "set", make_episodes(), fps=20, **names)
    path = folder / "meta/stats.json"
    content = json.loads(path.read_text())
    content["action"]["mean"] = [7, 8, 9]
    (folder / "meta/checksums.json").unlink()
    path.write_text(json.dumps(content))
    found = load_demonstrations(folder)
    assert found.fps == 20
    assert found.action_statistics.mean.tolist() == [7, 8, 9]
    assert np.allclose(found.state_statistics.std, found.state.std(0), atol=1e-5)


def test_normalising_is_undone_and_leaves_what_stands_still_alone():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, size=(500, 3)).astype(np.float32)
    values[:, 1] = 0.5
    statistics = Statistics.of(values)
    normal = statistics.normalise(values)
    assert np.allclose(normal.mean(0), 0, atol=1e-4)
    assert np.allclose(normal.std(0), [1, 0, 1], atol=1e-4)
    assert statistics.scale[1] == 1
    assert np.allclose(statistics.denormalise(normal), values, atol=1e-5)
    tensor = torch.from_numpy(values)
    assert torch.allclose(statistics.normalise(tensor), torch.from_numpy(normal))
    assert torch.allclose(statistics.denormalise(statistics.normalise(tensor)), tensor, atol=1e-5)


# --- chunks -------------------------------------------------------------------------------------


@pytest.fixture
def them(make_episodes):
    return Demonstrations.of(make_episodes(), fps=20)


def test_a_chunk_holds_the_actions_from_its_frame_to_the_end_of_the_episode(them):
    chunks = Chunks(them, batch=200, horizon=8, seed=0)
    batch = chunks(4)
    assert {name: (tuple(it.shape), it.dtype) for name, it in batch.items()} == {
        "state": ((200, 5), torch.float32),
        "actions": ((200, 8, 3), torch.float32),
        "mask": ((200, 8), torch.bool),
        "task": ((200,), torch.int64),
        "frame": ((200,), torch.int64),
    }
    padded = 0
    for row, frame in enumerate(batch["frame"].tolist()):
        episode = int(np.searchsorted(them.boundaries, frame, side="right")) - 1
        end = int(them.boundaries[episode + 1])
        inside = min(8, end - frame)
        padded += 8 - inside
        assert np.array_equal(batch["state"][row], them.state[frame])
        assert batch["mask"][row].tolist() == [True] * inside + [False] * (8 - inside)
        assert np.array_equal(batch["actions"][row, :inside], them.actions[frame : frame + inside])
        last = torch.from_numpy(them.actions[end - 1])
        assert (batch["actions"][row, inside:] == last).all()
        assert batch["task"][row] == them.task[episode]
    assert padded


def test_a_batch_is_a_function_of_its_step(them):
    one, other = (Chunks(them, batch=16, horizon=4, seed=5) for _ in range(2))
    for step in (3, 0, 1000):
        for name, values in one(step).items():
            assert torch.equal(values, other(step)[name])
    assert not torch.equal(one(0)["frame"], one(1)["frame"])
    assert not torch.equal(one(0)["frame"], Chunks(them, batch=16, horizon=4, seed=6)(0)["frame"])


def test_all_frames_are_drawn_alike(them):
    chunks = Chunks(them, batch=1000, horizon=1, seed=0)
    counts = np.bincount(
        np.concatenate([chunks.frames(step) for step in range(40)]), minlength=len(them)
    )
    expected = 40_000 / len(them)
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


def test_other_arrays_come_along_by_frame(them):
    features = np.arange(len(them) * 2, dtype=np.float32).reshape(-1, 2)
    batch = Chunks(them, batch=9, horizon=2, seed=0, also={"features": features})(0)
    assert torch.equal(batch["features"][:, 0], batch["frame"] * 2.0)
    with pytest.raises(ValueError, match=r"'features' has 3 entries"):
        Chunks(them, batch=9, horizon=2, seed=0, also={"features": features[:3]})
    with pytest.raises(ValueError, match="at least 1"):
        Chunks(them, batch=0, horizon=2, seed=0)
