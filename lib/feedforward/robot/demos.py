"""Demonstrations: collected from scripted experts, stored, read, and cut into chunks of actions.

What is stored is a data set in the LeRobot format v3.0 (see `feedforward.robot.lerobot`), so that
other programs read what is collected here, and data sets that others recorded train by the same
code.

Explained in ``book/adamoe/01-a-policy-that-flows``.
"""

import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from multiprocessing import get_context, parent_process
from operator import itemgetter
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from feedforward.files import DataError, atomic_write
from feedforward.profiles import unknown
from feedforward.robot.lerobot import (
    STILL,
    Clip,
    Episode,
    changed_files,
    encode,
    read_dataset,
    write_dataset,
)
from feedforward.robot.tasks import (
    CONTROL_HZ,
    Environment,
    Images,
    Simulator,
    Task,
    find_task,
    is_count,
    make_environment,
    scripted_expert,
    simulator_of,
    versions,
)

if TYPE_CHECKING:
    from torch import Tensor


_ATTEMPTS = "attempts by task"  # in the note of a collection


class CollectionError(RuntimeError):
    """Demonstrations that cannot be collected: the expert fails, or a process was ended."""


# --- demonstrations -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Statistics:
    """How the numbers of a feature are spread, each (D,) float32.

    Attributes:
        mean: Over frames.
        std: The standard deviation over frames.
        min: The least.
        max: The greatest.
    """

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Statistics":
        """Of (N, D) numbers over N frames."""
        values = np.asarray(values, dtype=np.float64)
        found = values.mean(0), values.std(0), values.min(0), values.max(0)
        return cls(*(numbers.astype(np.float32) for numbers in found))

    @property
    def scale(self) -> np.ndarray:
        """What to divide by: the deviation, or 1 for a number that stands still (`STILL`)."""
        return np.where(self.std < STILL, np.float32(1), self.std)

    def normalise(self, values):
        """Values (..., D), arrays or tensors, with mean 0 and deviation 1."""
        return (values - _like(self.mean, values)) / _like(self.scale, values)

    def denormalise(self, values):
        """The values that `normalise` gives these for."""
        return values * _like(self.scale, values) + _like(self.mean, values)


def _like(numbers: np.ndarray, values):
    return numbers if isinstance(values, np.ndarray) else values.new_tensor(numbers)


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """E episodes of N frames in all: what was seen and what was done.

    Attributes:
        state: (N, S) float32.
        actions: (N, A) float32.
        boundaries: (E + 1,) int64: episode e has the frames from ``boundaries[e]`` up to
            ``boundaries[e + 1]``.
        task: (E,) int64 the place of each episode's instruction.
        instructions: Of all tasks.
        state_statistics: For normalisation, as the data set has them.
        action_statistics: Likewise.
        fps: Frames a second.
        images: By camera N images; ``images[camera][places]`` gives (B, H, W, 3) uint8 and decodes
            what is stored as video only then.
        episodes: (E,) the numbers of the episodes in their data set.
        attempts: How often the scripted expert of each task tried, for the episodes of a whole
            collection; empty where that is not known.
    """

    state: np.ndarray
    actions: np.ndarray
    boundaries: np.ndarray
    task: np.ndarray
    instructions: tuple[str, ...]
    state_statistics: Statistics
    action_statistics: Statistics
    fps: float
    images: Mapping[str, Any]
    episodes: np.ndarray
    attempts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.state)

    @cached_property
    def episode(self) -> np.ndarray:
        """(N,) which episode each frame is of, counted from 0."""
        return np.repeat(np.arange(len(self.task)), np.diff(self.boundaries))

    def frames(self, episode: int) -> slice:
        """The frames of an episode, counted from 0."""
        return slice(int(self.boundaries[episode]), int(self.boundaries[episode + 1]))

    def select(self, episodes: Iterable[int]) -> "Demonstrations":
        """The same with some of the episodes, in the order given; the statistics stay.

        How many attempts some of them took is not known.

        Args:
            episodes: Their places, or for each episode True or False.

        Raises:
            ValueError: When there is no such episode, or none is named.
        """
        chosen, count = np.asarray(list(episodes)), len(self.task)
        if chosen.dtype == bool and len(chosen) == count:
            chosen = np.flatnonzero(chosen)
        whole = np.issubdtype(chosen.dtype, np.integer)
        if not len(chosen) or not whole or chosen.min() < 0 or chosen.max() >= count:
            raise ValueError(
                f"episodes {chosen.tolist()} of {count}: name some from 0 to below it, or say of "
                "each of them True or False"
            )
        places = np.concatenate([np.arange(len(self))[self.frames(it)] for it in chosen])
        lengths = np.diff(self.boundaries)[chosen]
        return Demonstrations(
            state=self.state[places],
            actions=self.actions[places],
            boundaries=_boundaries(lengths),
            task=self.task[chosen],
            instructions=self.instructions,
            state_statistics=self.state_statistics,
            action_statistics=self.action_statistics,
            fps=self.fps,
            images={
                camera: frames[places] if isinstance(frames, np.ndarray) else frames.select(places)
                for camera, frames in self.images.items()
            },
            episodes=self.episodes[chosen],
        )

    @classmethod
    def of(
        cls,
        episodes: Sequence[Episode],
        fps: float = CONTROL_HZ,
        *,
        attempts: Mapping[str, int] | None = None,
    ) -> "Demonstrations":
        """Of episodes in memory, with their images as arrays."""
        if not episodes:
            raise DataError("there is no episode")
        instructions = tuple(dict.fromkeys(episode.instruction for episode in episodes))
        state = np.concatenate([episode.state for episode in episodes]).astype(np.float32)
        actions = np.concatenate([episode.actions for episode in episodes]).astype(np.float32)
        return cls(
            state=state,
            actions=actions,
            boundaries=_boundaries([len(episode) for episode in episodes]),
            task=np.array([instructions.index(episode.instruction) for episode in episodes]),
            instructions=instructions,
            state_statistics=Statistics.of(state),
            action_statistics=Statistics.of(actions),
            fps=fps,
            images={
                camera: np.concatenate([episode.images[camera] for episode in episodes])
                for camera in episodes[0].images
            },
            episodes=np.arange(len(episodes)),
            attempts=dict(attempts or {}),
        )


def _boundaries(lengths: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(list(lengths), dtype=np.int64))])


def load_demonstrations(
    folder: str | os.PathLike,
    *,
    state_key: str = "observation.state",
    action_key: str = "action",
) -> Demonstrations:
    """Demonstrations from a data set in the LeRobot format v3.0, ours or a downloaded one.

    Args:
        folder: Of the data set.
        state_key: The feature that holds the states.
        action_key: The feature that holds the actions.

    Raises:
        DataError: When it is no data set, has another version, lacks a feature, or nothing of it
            can be read. A damaged episode is left out with a warning that names it.
    """
    stored = read_dataset(folder, state_key=state_key, action_key=action_key)

    def statistics(key: str, values: np.ndarray) -> Statistics:
        found = stored.statistics.get(key)
        if found is None or not {"mean", "std", "min", "max"} <= found.keys():
            return Statistics.of(values)
        return Statistics(
            *(found[name].astype(np.float32).reshape(-1) for name in ("mean", "std", "min", "max"))
        )

    return Demonstrations(
        state=stored.state,
        actions=stored.actions,
        boundaries=_boundaries(stored.lengths),
        task=stored.task,
        instructions=stored.instructions,
        state_statistics=statistics(state_key, stored.state),
        action_statistics=statistics(action_key, stored.actions),
        fps=stored.info["fps"],
        images=stored.images,
        episodes=stored.episodes,
        attempts=_attempts(Path(folder)),
    )


def _attempts(folder: Path) -> dict[str, int]:
    """What a collection notes of its attempts; nothing for other data sets and older ones."""
    try:
        note = json.loads((folder / "meta" / "collection.json").read_text(encoding="utf-8"))
        return dict(note.get(_ATTEMPTS, {}))
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


# --- chunks of actions --------------------------------------------------------------------------


class Chunks:
    """The batch of any step, computed from the step alone: a resumed run sees the same data.

    Each row begins at a frame drawn from all frames alike, and holds the actions from there on.

    Args:
        demonstrations: What is learnt from.
        batch: B rows.
        horizon: H actions a row.
        seed: Of the draws.
        also: More arrays with one entry a frame, by the name that they get in the batch, for
            instance ``{"corner2": demonstrations.images["corner2"]}`` or features of images that
            were computed once.

    Raises:
        ValueError: When a size is not positive, or an array has not one entry a frame.
    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        *,
        batch: int,
        horizon: int,
        seed: int,
        also: Mapping[str, Any] | None = None,
    ):
        if batch < 1 or horizon < 1:
            raise ValueError(f"batch {batch} and horizon {horizon} must be at least 1")
        self.demonstrations, self.batch, self.horizon, self.seed = (
            *(demonstrations, batch, horizon),
            seed,
        )
        self.also = dict(also or {})
        for name, values in self.also.items():
            if len(values) != len(demonstrations):
                raise ValueError(
                    f"{name!r} has {len(values)} entries for {len(demonstrations)} frames"
                )

    def frames(self, step: int) -> np.ndarray:
        """(B,) the frames that the rows of a step begin at."""
        rng = np.random.default_rng([self.seed, step])
        return rng.integers(len(self.demonstrations), size=self.batch)

    def __call__(self, step: int) -> "dict[str, Tensor]":
        """The batch of a step; see `at`."""
        return self.at(self.frames(step))

    def at(self, frames: np.ndarray) -> "dict[str, Tensor]":
        """The batch that begins at given frames.

        Args:
            frames: (B,) places of frames.

        Returns:
            ``state`` (B, S) float32 and ``actions`` (B, H, A) float32 as recorded; ``mask`` (B, H)
            bool, False for actions past the end of the episode, which repeat its last one;
            ``task`` (B,) int64 the place of the instruction; ``frame`` (B,) int64; and what else
            was given by frame.
        """
        import torch

        them = self.demonstrations
        episode = them.episode[frames]
        places = frames[:, None] + np.arange(self.horizon)
        end = them.boundaries[episode + 1][:, None]
        batch = {
            "state": them.state[frames],
            "actions": them.actions[np.minimum(places, end - 1)],
            "mask": places < end,
            "task": them.task[episode],
            "frame": frames,
        }
        batch |= {name: values[frames] for name, values in self.also.items()}
        return {name: torch.from_numpy(values) for name, values in batch.items()}


# --- collecting ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """What is collected; the same order gives the same episodes, however many processes help."""

    tasks: tuple[str, ...]
    episodes: int
    seed: int
    noise: float
    state: str
    images: Images | None
    attempts: int

    @property
    def simulator(self) -> Simulator:
        return simulator_of(self.tasks)

    @property
    def jobs(self) -> list[tuple[str, int]]:
        return [(task, number) for task in self.tasks for number in range(self.episodes)]

    def by_task(self, tried: Iterable[int]) -> dict[str, int]:
        """The attempts at each task, from those for each job."""
        attempts = dict.fromkeys(self.tasks, 0)
        for (task, _), count in zip(self.jobs, tried, strict=True):
            attempts[task] += count
        return attempts


def demonstrate(
    environment: Environment, start_state: int, *, noise: float = 0.0
) -> Episode | None:
    """One attempt of the scripted expert, until the task is solved.

    Noise moves the arm off the expert's path, and what is recorded is what the expert wanted to do
    there: so the demonstrations show how to come back (as in DART, arXiv 1703.09327).

    Args:
        environment: That the expert acts in.
        start_state: Seed of the start and of the noise.
        noise: Standard deviation of what is added to the moves of the simulator, see `Simulator`;
            in Meta-World 1 is 1 cm, in ALOHA half of what a joint can be turned.

    Returns:
        The episode, or None where the expert did not succeed in the steps of the task.
    """
    expert = scripted_expert(environment.task)
    simulator = environment.task.simulator
    moves = [simulator.action_names.index(name) for name in simulator.moves]
    rng = np.random.default_rng(start_state)
    states, actions, images = [], [], {}
    observation = environment.reset(start_state)
    while not environment.finished:
        action = expert(environment.full_state)
        states.append(observation.state)
        actions.append(action)
        for camera, image in observation.images.items():
            images.setdefault(camera, []).append(image)
        disturbed = action.copy()
        disturbed[moves] += rng.normal(0, noise, len(moves)).astype(np.float32)
        observation = environment.step(disturbed)
    if not observation.success:
        return None
    return Episode(
        instruction=environment.task.instruction,
        state=np.stack(states),
        actions=np.stack(actions),
        images={camera: np.stack(frames) for camera, frames in images.items()},
    )


def collect(
    tasks: Iterable[Task | str],
    episodes: int,
    *,
    seed: int = 0,
    noise: float = 0.1,
    images: Images | None = None,
    state: str = "full",
    folder: str | os.PathLike | None = None,
    workers: int | None = None,
    attempts: int = 20,
    progress: bool = True,
) -> Demonstrations:
    """Demonstrations of scripted experts; only attempts that succeed are kept, all are counted.

    An episode depends on the seed, its task and its number alone, not on the number of processes.
    With a folder, every finished episode is kept at once: a collection that was killed goes on
    where it was, and one that is complete is read. One whose files are not as they were written is
    collected anew with a warning, since training on what is left of it would be another run.

    Args:
        tasks: Tasks or their names, for instance ``suite("easy")``.
        episodes: Demonstrations of each task.
        seed: Of the start states and the noise.
        noise: See `demonstrate`.
        images: What images to record; None for none.
        state: The kind of state to record, see `feedforward.robot.tasks.Simulator`.
        folder: Where to store the data set; None keeps it in memory only.
        workers: Processes; None for one a core. More than one need a script to start its work
            under ``if __name__ == "__main__":``.
        attempts: Start states to try for one demonstration.
        progress: Show a bar.

    Raises:
        ValueError: When a task, a number, the kind of state or the size of images is not allowed,
            or the tasks have several simulators.
        RendererError: When images are wanted and there is no OpenGL.
        VideoError: When images are to be stored and there is no encoder.
        DataError: When the folder holds another collection.
        CollectionError: When an expert fails in all attempts, or a process was ended.
    """
    names = tuple(
        (find_task(task) if isinstance(task, str) else task).name
        for task in ([tasks] if isinstance(tasks, (str, Task)) else tasks)
    )
    order = _Order(names, episodes, seed, float(noise), state, images, attempts)
    whole = is_count(episodes) and is_count(attempts)
    if not names or not whole or not 0 <= noise < math.inf or seed < 0:
        raise ValueError(
            "give tasks, whole numbers of episodes and attempts from 1, noise and seed from 0: "
            f"{order}"
        )
    if workers is not None and not is_count(workers):
        raise ValueError(f"workers is {workers}; give at least 1, or None for one a core")
    if len(set(names)) < len(names):
        raise ValueError(f"a task is named twice: {names}")
    if state not in (kinds := order.simulator.state_names):
        raise ValueError(unknown("kind of state", state, kinds))
    if folder is not None and images and images.size % 2:
        raise ValueError(
            f"images of {images.size} pixels cannot be stored: video needs an even size"
        )
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    workers = min(workers, len(order.jobs))
    if folder is None:
        played = sorted(_played(order, None, order.jobs, workers, progress), key=itemgetter(0))
        episodes, tried = zip(*(one for _, one in played), strict=True)
        return Demonstrations.of(
            episodes, order.simulator.control_hz, attempts=order.by_task(tried)
        )
    return _collect_into(Path(folder), order, workers, progress)


def _played(
    order: _Order,
    shelf: "_Shelf | None",
    jobs: Sequence[tuple[str, int]],
    workers: int,
    progress: bool,
) -> Iterator[tuple[int, tuple[Episode, int] | None]]:
    """What `_play` gives for each job as it is done, with the job's place in the order."""
    bar = tqdm(
        desc="demonstrations",
        total=len(order.jobs),
        initial=len(order.jobs) - len(jobs),
        leave=False,
        unit="episode",
        **({} if progress else {"disable": True}),
    )
    places = {job: place for place, job in enumerate(order.jobs)}
    with bar:
        if workers == 1:
            for job in jobs:
                yield places[job], _play(order, job, shelf)
                bar.update()
            _environment.cache_clear()
            return
        pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_end_with_parent
        )
        try:
            waiting = {pool.submit(_play, order, job, shelf): job for job in jobs}
            for done in as_completed(waiting):
                yield places[waiting[done]], done.result()
                bar.update()
        except BrokenProcessPool as error:
            raise CollectionError(
                f"a process that collects was ended: {error}. It may have been short of memory, or "
                "a script collects outside of `if __name__ == '__main__':`; workers=1 needs neither"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end when the one that started it is killed, instead of waiting for work."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _environment(task: str, images: Images | None, state: str) -> Environment:
    return make_environment(task, images=images, state=state)


def _play(
    order: _Order, job: tuple[str, int], shelf: "_Shelf | None"
) -> tuple[Episode, int] | None:
    """Collect one episode, in whatever process, and how many attempts it took.

    Where there is a shelf they are put there, and nothing is returned.
    """
    task, number = job
    environment = _environment(task, order.images, order.state)
    for attempt in range(order.attempts):
        words = [order.seed, zlib.crc32(task.encode()), number, attempt]
        start_state = int(np.random.SeedSequence(words).generate_state(1)[0])
        if episode := demonstrate(environment, start_state, noise=order.noise):
            if shelf is None:
                return episode, attempt + 1
            shelf.put(job, episode, attempt + 1)
            return None
    raise CollectionError(
        f"the scripted expert of {task!r} failed from {order.attempts} start states (episode "
        f"{number}, noise {order.noise}): lower the noise, or allow more attempts"
    )


@dataclass(frozen=True)
class _Shelf:
    """Finished episodes of a collection under way: a file each, whole or not there."""

    folder: Path

    def path(self, job: tuple[str, int]) -> Path:
        return self.folder / f"{job[0]}-{job[1]:05d}.npz"

    def put(self, job: tuple[str, int], episode: Episode, tried: int) -> None:
        parts = {"state": episode.state, "actions": episode.actions, "attempts": np.array(tried)}
        for camera, frames in episode.images.items():
            clip = encode(frames, simulator_of([job[0]]).control_hz)
            parts[f"video {camera}"] = np.frombuffer(clip.data, dtype=np.uint8)
            parts[f"shape {camera}"] = np.array(clip.shape)
            parts[f"histogram {camera}"] = clip.histogram
        with atomic_write(self.path(job)) as file:
            np.savez(file, **parts)

    def get(self, job: tuple[str, int], images: Images | None) -> tuple[Episode, int] | None:
        """Episode and attempts, or None where they are not; what is damaged is thrown away."""
        path = self.path(job)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as parts:  # a zip file, with checksums
                clips = {
                    camera: Clip(
                        parts[f"video {camera}"].tobytes(),
                        tuple(parts[f"shape {camera}"].tolist()),
                        parts[f"histogram {camera}"],
                    )
                    for camera in (images.cameras if images else ())
                }
                words = find_task(job[0]).instruction
                episode = Episode(words, parts["state"], parts["actions"], clips)
                return episode, int(parts["attempts"])
        except Exception as error:  # whatever a damaged file makes zipfile and numpy raise
            warnings.warn(
                f"episode {path.name} is damaged ({type(error).__name__}: {error}) and collected "
                "again",
                stacklevel=2,
            )
            path.unlink()
            return None


def _collect_into(folder: Path, order: _Order, workers: int, progress: bool) -> Demonstrations:
    folder.parent.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps(asdict(order)))
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        shelf = _Shelf(folder.with_name(f".{folder.name}.collecting"))
        if folder.exists():
            _require_same(folder / "meta" / "collection.json", described, folder)
            # of a run that was killed when all was written
            shutil.rmtree(shelf.folder, ignore_errors=True)
            if not (changed := changed_files(folder)):
                return load_demonstrations(folder)
            warnings.warn(
                f"{folder} is not as it was written ({', '.join(changed)}) and collected again",
                stacklevel=3,
            )
            shutil.rmtree(folder)
        note = shelf.folder / "collection.json"
        if any(shelf.folder.glob("*.npz")):
            _require_same(note, described, shelf.folder)
        else:
            with atomic_write(note, "w") as file:
                json.dump(described, file, indent=1)
        for left in folder.parent.glob(f".{folder.name}.*.part"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        stored = (shelf.get(job, order.images) is not None for job in order.jobs)
        missing = [job for job, there in zip(order.jobs, stored, strict=True) if not there]
        for _ in _played(order, shelf, missing, max(1, min(workers, len(missing))), progress):
            pass
        simulator = order.simulator
        episodes, tried = zip(*(shelf.get(job, order.images) for job in order.jobs), strict=True)
        write_dataset(
            folder,
            episodes,
            fps=simulator.control_hz,
            state_names=simulator.state_names[order.state],
            action_names=simulator.action_names,
            robot=simulator.robot,
            notes={
                "collection": described | {_ATTEMPTS: order.by_task(tried)},
                "versions": versions(simulator),
            },
        )
        shutil.rmtree(shelf.folder)
    return load_demonstrations(folder)


def _require_same(note: Path, described: Mapping[str, Any], folder: Path) -> None:
    """Two collections do not share a folder."""
    try:
        there = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} was not collected here ({error}): give another folder, or delete it; what "
            "is in the format already is read by load_demonstrations"
        ) from error
    different = [
        f"{key} {there.get(key)!r} there, {value!r} here"
        for key, value in described.items()
        if there.get(key) != value
    ]
    if different:
        raise DataError(
            f"{folder} holds another collection ({'; '.join(different)}): give another folder, or "
            "delete it"
        )
