"""Train policies, dense parents first, and measure them in the simulator.

``run`` makes a record of one configuration, ``trained_policy`` gives its policy for pictures and
rollouts. The weights of a parent lie under the key of all that decides them, so that all arms of a
seed start from one parent, trained once. Explained in ``book/adamoe/02-upcycling``.
"""

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedforward.encoders import token_states
from feedforward.files import DataError, atomic_write, cache_directory
from feedforward.layers.cost import count
from feedforward.layers.routing import Routing
from feedforward.profiles import resolve_device, unknown
from feedforward.records import (
    Provenance,
    Record,
    RecordError,
    config_key,
    plain_config,
    run_directory,
    run_lock,
)
from feedforward.robot.demos import Chunks, Demonstrations, Statistics, collect, load_demonstrations
from feedforward.robot.lerobot import dataset_key
from feedforward.robot.policy import (
    FlowPolicy,
    Objective,
    PolicyConfig,
    load_policy,
    parameter_groups,
    save_policy,
    upcycled,
    widened,
)
from feedforward.robot.rollout import Rollouts, make_starts, roll_out
from feedforward.robot.scores import exchanged_phase_information, rerouted, task_information
from feedforward.robot.tasks import (
    Images,
    find_task,
    is_count,
    phases,
    simulator_of,
    versions,
    wordings,
)
from feedforward.robot.vision import frame_features, image_features
from feedforward.training import TrainingConfig, seed_everything, train

EXPERIMENT = "adamoe"
SCRIPTED = "scripted"
"""The source of demonstrations that scripted experts give here."""
LOCAL = "FEEDFORWARD_DATA"
"""The source of runs on the reader's own data: the folder ``robot`` in ``$FEEDFORWARD_DATA``."""
_LOSS_ROWS = 1024  # frames that the losses at the start and the end of tuning are taken on


@dataclass(frozen=True)
class Tuning:
    """What becomes of the dense parent: another kind of FFN, and more steps.

    Args:
        training: Steps, rates and the rest of the loop; base and experts have its rate.
        ffn: The kind, as in ``PolicyConfig``; ``"dense"`` goes on with the parent.
        experts: As in ``PolicyConfig``.
        k: As in ``PolicyConfig``.
        shared_weight: As in ``PolicyConfig``.
        preserve: Start with the parent's function.
        hidden: Width that a dense FFN grows to; None for the parent's.
        balance: Weight of the balance loss, in the first steps and later.
        switch: Number of the first steps.
        router_rate: How many times the rate of the base router and adapter have.
        router_warmup: Steps of their warm-up.

    Raises:
        ValueError: When a dense FFN is given experts, or experts a width; when the kind of FFN is
            unknown, or a number is not allowed.
    """

    training: TrainingConfig
    ffn: str = "dense"
    experts: int = 4
    k: int = 1
    shared_weight: float | None = None
    preserve: bool = False
    hidden: int | None = None
    balance: tuple[float, float] = (0.01, 0.005)
    switch: int = 500
    router_rate: float = 2.0
    router_warmup: int = 10

    def __post_init__(self):
        Objective(self.balance, self.switch)  # refuses what are no weights
        object.__setattr__(self, "balance", tuple(self.balance))
        if self.ffn != "dense" and self.hidden is not None:
            raise ValueError(f"hidden is {self.hidden}; experts are as wide as the parent's FFN")
        if self.ffn == "dense" and self.preserve:
            raise ValueError("preserve is of experts; ffn is 'dense'")
        _with_experts(PolicyConfig(state=1, action=1), self)  # what fits no parent
        if not 0 < self.router_rate < math.inf or self.router_warmup < 0:
            raise ValueError(
                f"router_rate is {self.router_rate} and router_warmup {self.router_warmup}; give a "
                "positive number and steps from 0"
            )

    def apply(self, parent: FlowPolicy, seed: int) -> FlowPolicy:
        """The policy to tune, made from a parent, which stays as it is."""
        if self.ffn == "dense":
            return widened(parent, tuned(parent.config, self).hidden, seed=seed)
        return upcycled(
            parent,
            self.ffn,
            experts=self.experts,
            k=self.k,
            shared_weight=self.shared_weight,
            preserve=self.preserve,
            seed=seed,
        )


def tuned(policy: PolicyConfig, tuning: Tuning | None) -> PolicyConfig:
    """The sizes of what a dense parent becomes.

    Args:
        policy: The parent's.
        tuning: What becomes of it; None for the parent itself.

    Raises:
        ValueError: When it cannot become that.
    """
    if tuning is None:
        return policy
    if tuning.ffn == "dense":
        return policy.widened(policy.hidden if tuning.hidden is None else tuning.hidden)
    return _with_experts(policy, tuning)


def _with_experts(policy: PolicyConfig, tuning: Tuning) -> PolicyConfig:
    names = ("ffn", "experts", "k", "shared_weight")
    return replace(policy, **{name: getattr(tuning, name) for name in names})


@dataclass(frozen=True)
class Evaluation:
    """How a policy is scored.

    Args:
        episodes: Attempts at each task.
        execute: Actions of a chunk that are carried out before the next plan.
        steps: Euler steps of a plan.
        at_once: Environments side by side.
        seed: Of the start states, the same for all seeds of training.
        held_out: Ask with wordings that no policy is trained on; else with the instruction itself.

    Raises:
        ValueError: When one is no whole number from 1, or the seed below 0.
    """

    episodes: int = 25
    execute: int = 8
    steps: int = 10
    at_once: int = 24
    seed: int = 0
    held_out: bool = True

    def __post_init__(self):
        for name in ("episodes", "execute", "steps", "at_once"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number from 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True)
class RobotConfig:
    """Everything that decides the numbers of one run.

    Args:
        variant: The arm of the comparison.
        policy: The dense parent.
        parent: Its training.
        tuning: What becomes of it; None leaves it as it is.
        tasks: Their names, kept as `find_task` has them, or one of them; without any nothing is
            simulated, and the record has losses alone.
        demonstrations: Of each task.
        evaluation: How it is scored.
        seed: Of weights, order of the data, and the demonstrations of scripted experts.
        source: Of the demonstrations: `SCRIPTED`, a folder in the LeRobot format, or `LOCAL`.
        noise: Of scripted experts, as ``collect`` takes it.
        batch: Chunks of actions a step.
        state: The kind of state that the policy is shown.
        images: What images it is shown, by cameras that the simulator has and a folder has images
            of; None for none, or without tasks for those of the folder as they come.
        long_tasks: The tasks that count as long.
        experiment: The part of the book.

    Raises:
        ValueError: When parts do not fit together.
    """

    variant: str
    policy: PolicyConfig
    parent: TrainingConfig
    tuning: Tuning | None = None
    tasks: tuple[str, ...] = ()
    demonstrations: int = 10
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0
    source: str = SCRIPTED
    noise: float = 0.1
    batch: int = 64
    state: str = "full"
    images: Images | None = None
    long_tasks: tuple[str, ...] = ()
    experiment: str = EXPERIMENT

    def __post_init__(self):
        for name in ("tasks", "long_tasks"):
            given = getattr(self, name)  # a name alone would be taken apart into letters
            given = (given,) if isinstance(given, str) else given
            found = tuple(find_task(each).name for each in given)
            if len(set(found)) < len(found):
                raise ValueError(f"{name} names a task twice: {found}")
            object.__setattr__(self, name, found)
        simulator = simulator_of(map(find_task, self.tasks))
        kinds = simulator.state_names
        if self.state not in kinds:
            raise ValueError(unknown("kind of state", self.state, kinds))
        if odd := set(self.long_tasks) - set(self.tasks):
            raise ValueError(f"long_tasks names {sorted(odd)}, which are not among the tasks")
        if self.policy.ffn != "dense":
            raise ValueError(f"policy is the dense parent, not {self.policy.ffn!r}: see tuning")
        if self.source == SCRIPTED and not self.tasks:
            raise ValueError("scripted experts need tasks: name some")
        tuned(self.policy, self.tuning)
        for name in ("demonstrations", "batch"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number from 1")
        if self.seed < 0 or not 0 <= self.noise < math.inf:
            raise ValueError(f"seed is {self.seed} and noise {self.noise}; both are from 0")
        if self.tasks and self.evaluation.execute > self.policy.horizon:
            raise ValueError(
                f"execute is {self.evaluation.execute} of a horizon of {self.policy.horizon}"
            )
        if self.tasks and self.policy.state != len(kinds[self.state]):
            raise ValueError(
                f"the policy takes {self.policy.state} numbers of state and {self.state!r} has "
                f"{len(kinds[self.state])}"
            )
        if self.tasks and self.policy.action != len(simulator.action_names):
            raise ValueError(
                f"the policy gives actions of {self.policy.action} numbers and {simulator.name} "
                f"takes {len(simulator.action_names)}: {', '.join(simulator.action_names)}"
            )
        cameras = self.images.cameras if self.images else ()
        if (self.images or self.tasks) and len(cameras) != self.policy.cameras:
            raise ValueError(
                f"the policy sees through {self.policy.cameras} cameras and images name "
                f"{len(cameras)}: {', '.join(cameras) or 'none'}"
            )
        if self.images and self.tasks and not simulator.environment.shows_images:
            raise ValueError(f"{simulator.name} shows states here: no images")

    def inputs(self) -> dict[str, str]:
        """What tells the data of a folder, which the fields only name, from others.

        Nothing where the source is `LOCAL` and that is not set: what was recorded can be loaded.

        Raises:
            DataError: When there is no such folder, or it holds no data set.
        """
        if self.source == SCRIPTED or (self.source == LOCAL and not os.environ.get(LOCAL)):
            return {}
        return {"data": dataset_key(_folder_of(self.source))}


# --- one run ------------------------------------------------------------------------------------


def run(
    config: RobotConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> Record:
    """Train the policy of `config` and measure it.

    A run that was killed continues: demonstrations where they were, training from its last
    checkpoint, and a parent that another run trained is loaded.

    Args:
        config: What to run.
        progress: Show bars.
        device: Where to run it.

    Returns:
        The record. ``success`` is in percent, the mean over tasks; ``success by task`` has for each
        the rate with Wilson's interval; ``success on long tasks`` and ``success on short tasks``
        split them; ``items`` has those of single attempts. ``first loss`` and ``last loss`` are the
        flow-matching loss before and after the last stage of training, on the same frames, noise
        and times for all arms of a seed. Of policies with experts: ``load`` gives each layer's
        share of choices by expert, ``phase information`` and ``task information`` the bits that an
        expert tells about phase and task, a mean over the layers, with their shuffled counterparts
        and p, and ``loss with other experts`` is the last loss with each choice handed to the next
        expert. ``expert attempts`` is how often scripted experts tried for the demonstrations of
        each task. ``data seconds`` went into collecting these, or reading what lay in the cache,
        and into features of their images. ``simulator`` has the versions and the renderer.

    Raises:
        DataError: When demonstrations are missing or damaged.
        CollectionError: When they cannot be collected.
        TrainingError: When the loss is no longer finite.
        ActionError: When the policy's actions are not finite.
        ValueError: When several processes run it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "policies are trained by one process: start the run without torchrun, several runs "
            "side by side with --shard"
        )
    device = resolve_device(str(device))
    folder = run_directory(run, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with run_lock(folder.with_name(folder.name + ".run.lock")):
        try:
            return Record.load(folder / "record.json")
        except (FileNotFoundError, RecordError):
            pass
        training = _Training(config, progress, device)
        policy, logs = training.after()
        record = _measured(config, training, policy.to(device), logs, progress, device)
        record.save(folder / "record.json")
    return record


def trained_policy(
    config: RobotConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> FlowPolicy:
    """The policy of a configuration, in evaluation mode: from the cache, else trained now.

    Args:
        config: Of the run.
        progress: Show bars while training.
        device: Where to train and to put it.
    """
    device = resolve_device(str(device))
    policy, _ = _Training(config, progress, device).after()
    return policy.to(device).eval()


def rollouts_of(
    config: RobotConfig,
    policy: FlowPolicy,
    *,
    episodes: int | None = None,
    tasks: Sequence[str] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Rollouts:
    """The attempts of a policy as its run makes them, or fewer of them.

    Args:
        config: Of the run.
        policy: Trained.
        episodes: Attempts at each task; None for the configuration's.
        tasks: Some of the configuration's; None for all.
        workers: Processes that simulate.
        progress: Show a bar.
    """
    how = config.evaluation
    starts = make_starts(
        tasks or config.tasks, episodes or how.episodes, seed=how.seed, held_out=how.held_out
    )
    return roll_out(
        policy,
        starts,
        execute=how.execute,
        steps=how.steps,
        at_once=how.at_once,
        workers=workers,
        state=config.state,
        images=config.images,
        encoder=partial(image_features, device=policy.position.device) if config.images else None,
        progress=progress,
    )


def load_data(config: RobotConfig, *, progress: bool = True) -> Demonstrations:
    """The demonstrations of a run: collected once and kept in the cache, or read from a folder.

    What the cache holds is collected anew where it is damaged; of a folder damaged episodes are
    left out with a warning.

    Raises:
        DataError: When a folder is missing or no data set.
        CollectionError: When the scripted experts fail.
    """
    if config.source != SCRIPTED:
        return load_demonstrations(_folder_of(config.source))
    decisive = plain_config(config)
    names = ("tasks", "demonstrations", "seed", "noise", "state", "images")
    decided = {name: decisive[name] for name in names}
    decided["revision"] = simulator_of(map(find_task, config.tasks)).revision
    if config.images:
        decided["video"] = "lossless"  # what was stored with loss looks different
    key = config_key(decided, "demonstrations")
    return collect(
        config.tasks,
        config.demonstrations,
        seed=config.seed,
        noise=config.noise,
        images=config.images,
        state=config.state,
        folder=cache_directory("demonstrations", key),
        workers=1,
        progress=progress,
    )


def _folder_of(source: str) -> Path:
    if source != LOCAL:
        return Path(source).expanduser()
    given = os.environ.get(LOCAL)
    folder = Path(given or ".").expanduser() / "robot"
    if not given or not folder.is_dir():
        state = f"is {given!r}, which has no folder robot" if given else "is not set"
        raise DataError(
            f"this run needs demonstrations of your own and {LOCAL} {state}. Set it to a folder "
            "that holds robot/, a data set in the LeRobot format v3.0; the profiles smoke and cpu "
            "collect theirs."
        )
    return folder


# --- batches ------------------------------------------------------------------------------------


class _Batches:
    """Chunks of demonstrations with the token states of a wording of each instruction."""

    def __init__(self, config: RobotConfig, data: Demonstrations, device: torch.device):
        also, cameras, views = None, config.policy.cameras, data.images
        if config.images:
            views = _views(config, data)
        elif cameras and len(data.images) != cameras:
            raise DataError(
                f"the policy of {config.variant} sees through {cameras} cameras and the "
                f"demonstrations ({config.source}) have {len(data.images)}: "
                f"{', '.join(data.images) or 'none'}. Give a data set with as many, or a policy "
                "for as many cameras."
            )
        if cameras:
            also = {"images": frame_features(views, len(data), device=device)}
        self.chunks = Chunks(
            data, batch=config.batch, horizon=config.policy.horizon, seed=config.seed, also=also
        )
        self.seed = config.seed
        told = [wordings(instruction) for instruction in data.instructions]
        self.counts = np.array([len(each) for each in told])
        self.first = np.concatenate([[0], self.counts.cumsum()[:-1]])
        self.text, self.real = token_states([text for each in told for text in each])

    def __call__(self, step: int) -> dict[str, Tensor]:
        batch = self.chunks(step)
        tasks = batch["task"].numpy()
        drawn = np.random.default_rng([self.seed, step, 1]).integers(self.counts[tasks])
        return self._told(batch, self.first[tasks] + drawn)

    def fixed(self, rows: int) -> dict[str, Tensor]:
        """A batch at frames spread over all demonstrations, told by the instruction itself."""
        frames = np.linspace(0, len(self.chunks.demonstrations) - 1, rows).astype(np.int64)
        batch = self.chunks.at(frames)
        return self._told(batch, self.first[batch["task"].numpy()])

    def _told(self, batch: dict[str, Tensor], places: np.ndarray) -> dict[str, Tensor]:
        kept = {name: batch[name] for name in ("state", "actions", "mask")}
        if "images" in batch:
            kept["images"] = batch["images"]
        real = self.real[places]
        length = int(real.sum(1).max())
        return kept | {"text": self.text[places][:, :length], "text_mask": real[:, :length]}


def _views(config: RobotConfig, data: Demonstrations) -> dict[str, Any]:
    """The images of the cameras that the simulator will show, in the same order."""
    if missing := [name for name in config.images.cameras if name not in data.images]:
        raise DataError(
            f"the policy of {config.variant} is shown {', '.join(config.images.cameras)} and the "
            f"demonstrations ({config.source}) have no images of {', '.join(missing)} but of "
            f"{', '.join(data.images) or 'none'}. Give a data set that calls its cameras so."
        )
    return {name: data.images[name] for name in config.images.cameras}


def _warn_of_rate(config: RobotConfig, data: Demonstrations) -> None:
    """An action lasts as long as a step: a policy that learnt another rate is too fast or slow.

    No more than a warning, for data sets are about that differ in what they say alone: LIBERO's,
    which takes 20 actions a second, are offered as of 10.
    """
    simulator = simulator_of(config.tasks)
    if config.tasks and data.fps != simulator.control_hz:
        warnings.warn(
            f"the demonstrations ({config.source}) have {data.fps:g} frames a second and "
            f"{simulator.name} takes {simulator.control_hz} actions: unless the action of a frame "
            "was for one step of it, success says little",
            stacklevel=2,
        )


def _statistics(own: Statistics) -> dict[str, Any]:
    return {"mean": own.mean, "std": own.scale}


# --- training -----------------------------------------------------------------------------------


class _Training:
    """The parent and what becomes of it, each from the cache where it is there."""

    def __init__(self, config: RobotConfig, progress: bool, device: torch.device):
        self.config, self.progress, self.device = config, progress, device
        # other code never goes on with these weights
        self.code = run_directory(run, config).name.rpartition("-")[2]
        self._data: Demonstrations | None = None
        self._batches: _Batches | None = None
        self.data_seconds = 0.0  # for demonstrations and the features of their images

    @property
    def data(self) -> Demonstrations:
        """Collected or read when they are first needed."""
        if self._data is None:
            started = time.perf_counter()
            self._data = load_data(self.config, progress=self.progress)
            self.data_seconds += time.perf_counter() - started
            _warn_of_rate(self.config, self._data)
        return self._data

    @property
    def batches(self) -> _Batches:
        """Likewise."""
        if self._batches is None:
            data, started = self.data, time.perf_counter()
            self._batches = _Batches(self.config, data, self.device)
            self.data_seconds += time.perf_counter() - started
        return self._batches

    def folder(self, tuned: bool) -> Path:
        """Where weights lie: under all that decides them."""
        plain = plain_config(self.config)
        names = ("policy", "parent", "tasks", "demonstrations", "seed", "source", "noise", "batch")
        decisive = {name: plain[name] for name in (*names, "state", "images")}
        decisive |= self.config.inputs()
        if tuned:
            decisive["tuning"] = plain["tuning"]
        key = f"{config_key(decisive, 'policies')}-{self.code}"
        return cache_directory("runs", self.config.experiment, "policies", key)

    def after(self) -> tuple[FlowPolicy, list[dict[str, Any]]]:
        """The policy of the run in evaluation mode, and what each stage did."""
        return self._stage(self.config.tuning is not None)

    def _stage(self, tuned: bool) -> tuple[FlowPolicy, list[dict[str, Any]]]:
        folder = self.folder(tuned)
        folder.mkdir(parents=True, exist_ok=True)
        with run_lock(folder.with_name(folder.name + ".lock")):
            try:
                logs = json.loads((folder / "stages.json").read_text())
                return load_policy(folder / "policy.safetensors"), logs
            except (FileNotFoundError, ValueError, DataError):
                pass
            seed_everything(self.config.seed)
            if tuned:
                parent, logs = self._stage(False)
                policy = self.config.tuning.apply(parent, self.config.seed)
            else:
                policy, logs = FlowPolicy(self.config.policy), []
                policy.set_statistics(
                    {
                        "observation.state": _statistics(self.data.state_statistics),
                        "action": _statistics(self.data.action_statistics),
                    }
                )
            logs.append(self._train(policy, tuned, folder))
            save_policy(policy, folder / "policy.safetensors")
            # last: its presence says that the stage ended
            with atomic_write(folder / "stages.json", "w") as file:
                json.dump(logs, file)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return policy.eval(), logs

    def _train(self, policy: FlowPolicy, tuned: bool, folder: Path) -> dict[str, Any]:
        config, tuning = self.config, self.config.tuning
        training = tuning.training if tuned else config.parent
        # the parent saw the first batches: its continuation goes on behind them
        shift = config.parent.steps if tuned else 0
        first = self.loss(policy)
        objective = Objective(tuning.balance, tuning.switch) if tuned else Objective()
        groups = None
        if tuned and tuning.ffn != "dense":
            warmup = min(tuning.router_warmup, training.steps)
            rates = {"lr": training.lr * tuning.router_rate, "warmup": warmup}
            groups = parameter_groups(router=rates)
        seed_everything(config.seed)
        result = train(
            policy,
            lambda step: self.batches(step + shift),
            objective,
            training,
            parameter_groups=groups,
            on_step=objective.on_step,
            checkpoint=folder / "checkpoints" if _checkpoints(training) else None,
            device=self.device,
            progress=self.progress,
            description=f"{config.variant if tuned else 'parent'}, seed {config.seed}",
        )
        if result.ema:
            averaged = {name: p.clone() for name, p in result.ema.state_dict(policy).items()}
            policy.load_state_dict(averaged, strict=False)
        return {
            "first loss": first,
            "last loss": self.loss(policy),
            "steps": training.steps,
            "seconds": result.seconds,
            "curves": {
                name: {axis: [float(f"{v:.6g}") for v in values] for axis, values in own.items()}
                for name, own in result.curves.items()
            },
        }

    @torch.no_grad()
    def loss(self, policy: FlowPolicy) -> float:
        """The loss on frames, noise and times that are the same for all arms of a seed."""
        policy = policy.to(self.device).eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = self.batches.fixed(_LOSS_ROWS)
        rows = {name: part.to(self.device) for name, part in rows.items()}
        return float(policy(rows, generator))


def _checkpoints(training: TrainingConfig) -> bool:
    """Whether a killed stage goes on; a short one may rather begin again than write them."""
    return bool(training.checkpoint_every_steps or training.checkpoint_every_seconds)


# --- measuring ----------------------------------------------------------------------------------


def _measured(config, training, policy, logs, progress, device) -> Record:
    started, before = time.perf_counter(), training.data_seconds
    last = logs[-1]
    whole, expert = count(policy), count(policy.action_expert)
    metrics: dict[str, Any] = {
        "items": {},
        "first loss": last["first loss"],
        "last loss": last["last loss"],
        "parameters": whole.parameters,
        "active parameters": whole.active_parameters,
        "action expert parameters": expert.parameters,
        "active action expert parameters": expert.active_parameters,
        "training seconds": sum(log["seconds"] for log in logs),
        "steps": [log["steps"] for log in logs],
        "frames": len(training.data),
    }
    if training.data.attempts:
        metrics["expert attempts"] = dict(training.data.attempts)
    metrics |= config.inputs()
    if config.tuning and config.tuning.ffn != "dense" and config.tuning.experts > 1:
        with rerouted(policy, _to_the_next_expert):
            metrics["loss with other experts"] = training.loss(policy)
    if config.tasks:
        rollouts = rollouts_of(config, policy, progress=progress)
        metrics |= _scored(config, rollouts)
        if rollouts.attempts[0].experts is not None:
            metrics |= specialisation(rollouts, config.tuning.experts)
    metrics["data seconds"] = training.data_seconds
    spent = before + metrics["training seconds"] + time.perf_counter() - started
    return Record.of(
        config,
        metrics=metrics,
        curves={
            f"{stage}: {name}": curve
            for stage, log in zip(("parent", "tuning"), logs, strict=False)
            for name, curve in log["curves"].items()
        },
        provenance=Provenance.here(seconds=spent, device=device),
    )


def _to_the_next_expert(routing: Routing) -> Routing:
    """Each choice at its weight, of the expert that comes after the chosen one."""
    return routing._replace(indices=(routing.indices + 1) % routing.logits.shape[-1])


def _scored(config: RobotConfig, rollouts: Rollouts) -> dict[str, Any]:
    by_task = rollouts.by_task()
    items = {"success": rollouts.items}
    for name, own in (
        ("success on long tasks", config.long_tasks),
        ("success on short tasks", set(config.tasks) - set(config.long_tasks)),
    ):
        if config.long_tasks and own:
            items[name] = {
                one.start.id: rollouts.items[one.start.id]
                for one in rollouts.attempts
                if one.start.task in own
            }
    solved = [len(one) for one in rollouts.attempts if one.success]
    return {
        **{name: float(np.mean(list(scores.values()))) for name, scores in items.items()},
        "items": items,
        "success by task": {task: asdict(rate) for task, rate in by_task.items()},
        "success interval": [rollouts.success.low, rollouts.success.high],
        "mean steps of solved attempts": float(np.mean(solved)) if solved else None,
        "simulator": versions(simulator_of(config.tasks)),
    }


def specialisation(rollouts: Rollouts, experts: int, *, permutations: int = 200) -> dict[str, Any]:
    """How experts were used over the steps of rollouts, and what they tell about task and phase.

    Explained in ``book/adamoe/04-do-experts-specialise``.

    Args:
        rollouts: Of a policy with experts.
        experts: Their number E.
        permutations: Of the tests.

    Returns:
        ``load``, of each layer each expert's share; ``largest share`` and ``mean weight``; and for
        ``task`` and ``phase`` the ``information`` in bits with ``shuffled`` and ``p``, as a mean
        over layers and by layer. A mean's p is the smallest of the layers' times their number.
    """
    attempts = rollouts.attempts
    names = list(dict.fromkeys(one.start.task for one in attempts))
    of_task = [names.index(one.start.task) for one in attempts]
    simulator = simulator_of(names)
    of_phase = [phases(one.states[:-1], simulator) for one in attempts]
    layers = attempts[0].experts.shape[2]
    load, found = [], {"task": [], "phase": []}
    for layer in range(layers):
        uses = [one.uses(layer, experts) for one in attempts]
        total = np.sum([own.sum(0) for own in uses], axis=0)
        load.append((total / total.sum()).tolist())
        found["task"].append(task_information(uses, of_task, permutations=permutations))
        found["phase"].append(
            exchanged_phase_information(uses, of_phase, of_task, permutations=permutations)
        )
    metrics: dict[str, Any] = {
        "load": [[round(share, 6) for share in layer] for layer in load],
        "largest share": float(np.mean([max(layer) for layer in load])),
        "mean weight": float(np.mean([one.weights.mean() for one in attempts])),
    }
    for name, own in found.items():
        metrics |= {
            f"{name} information": float(np.mean([each.bits for each in own])),
            f"shuffled {name} information": float(np.mean([each.shuffled for each in own])),
            f"{name} information p": min(1.0, layers * min(each.p for each in own)),
            f"{name} information by layer": [asdict(each) for each in own],
        }
    return metrics
