"""One training loop for every model of the book: exact to resume, on one processor or many GPUs.

A run that was killed continues from its last checkpoint and ends with the same numbers, bit for
bit on the same machine: a batch is a function of its index, and a checkpoint holds the weights,
the optimizer, the moving average, the random states and the curves so far.
"""

import contextlib
import errno
import io
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from feedforward.files import sha256
from feedforward.profiles import resolve_device, unknown
from feedforward.records import has_fast_bf16

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "fp32", "bf16")

_VERSION = 1
_RESUMABLE = ("checkpoint_every_steps", "checkpoint_every_seconds")  # may differ when resuming


class TrainingError(FloatingPointError):
    """Training that cannot go on: the loss or the gradient is no longer finite."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read: no space, truncated, or of another run."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; every field is checked.

    Args:
        steps: of the optimizer.
        lr: the peak learning rate.
        warmup: linear warm-up: a share of the steps (float below 1) or a number of them (int).
        schedule: after the warm-up: ``"cosine"``, ``"linear"`` or ``"constant"``.
        final_lr: where the schedule ends, as a share of `lr`.
        weight_decay: of AdamW, on matrices.
        decay_all: decay biases and norms too, as the structured-FFN paper does (its section 4).
        betas: of AdamW.
        clip: the largest norm of the gradient, None for no limit.
        accumulate: micro-batches per step.
        ema: decay of the exponential moving average of the weights, None for none.
        precision: ``"fp32"``, ``"bf16"`` (autocast; the weights stay float32), or ``"auto"``:
            bf16 where the hardware multiplies it.
        log_every: steps that a point of the curves is the mean of.
        evaluate_every: steps between evaluations, None for one at the end.
        checkpoint_every_steps: steps between checkpoints, None for none by steps.
        checkpoint_every_seconds: seconds between checkpoints, None for none by time.

    Raises:
        ValueError: if a value is not allowed, saying what is.
    """

    steps: int
    lr: float
    warmup: float | int = 0.1
    schedule: str = "cosine"
    final_lr: float = 0.1
    weight_decay: float = 0.1
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    accumulate: int = 1
    ema: float | None = None
    precision: str = "auto"
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_every_seconds: float | None = 120.0

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every"):
            _require(name, getattr(self, name), _is_count, "a whole number from 1")
        for name in ("evaluate_every", "checkpoint_every_steps"):
            _require(name, getattr(self, name), _or_none(_is_count), "a whole number or None")
        _require("lr", self.lr, _is_positive, "a number above 0")
        for name in ("clip", "checkpoint_every_seconds"):
            _require(name, getattr(self, name), _or_none(_is_positive), "above 0, or None")
        _check_warmup("warmup", self.warmup, self.steps)
        _require("final_lr", self.final_lr, lambda v: _is_number(v) and 0 <= v <= 1, "from 0 to 1")
        _require("weight_decay", self.weight_decay, _is_nonnegative, "a number from 0")
        _require("decay_all", self.decay_all, lambda v: isinstance(v, bool), "True or False")
        object.__setattr__(self, "betas", tuple(self.betas))
        allowed = "two numbers from 0 and below 1"
        _require("betas", self.betas, lambda v: len(v) == 2 and all(map(_is_share, v)), allowed)
        _require("ema", self.ema, _or_none(_is_share), "from 0 and below 1, or None")
        if self.schedule not in SCHEDULES:
            raise ValueError(unknown("schedule", self.schedule, SCHEDULES))
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))

    def lr_share(self, step: int, warmup: float | int | None = None) -> float:
        """The learning rate of a step, counted from 0, as a share of its peak.

        Args:
            step: from 0 to ``steps - 1``; the last one gets ``final_lr``.
            warmup: in place of the configuration's own.

        >>> config = TrainingConfig(steps=11, lr=1e-3, warmup=2, final_lr=0.1)
        >>> [round(config.lr_share(step), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
        """
        warmup = self.warmup if warmup is None else warmup
        rising = warmup if isinstance(warmup, int) else round(warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, self.steps - 1 - rising))
        if self.schedule == "constant":
            return 1.0
        shape = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.final_lr + (1 - self.final_lr) * shape


class EMA:
    """The exponential moving average of a model's trainable weights.

    Args:
        model: its weights now are where the average starts.
        decay: share of the average that a step keeps, for instance 0.99.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._average = get_ema_multi_avg_fn(decay)
        self._shadows = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

    def update(self, model: nn.Module) -> None:
        """Move the average by one step; forget the weights that the model no longer has."""
        self._shadows = {p: self._shadows[p] for p in model.parameters() if p in self._shadows}
        parameters = [p.detach() for p in self._shadows]
        if parameters:
            self._average(list(self._shadows.values()), parameters, 1)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """A context in which `model` has the averaged weights; afterwards it has its own again."""
        own = {p: p.detach().clone() for p in model.parameters() if p in self._shadows}
        try:
            with torch.no_grad():
                for parameter in own:
                    parameter.copy_(self._shadows[parameter])
            yield model
        finally:
            with torch.no_grad():
                for parameter, value in own.items():
                    parameter.copy_(value)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The average by the names that its weights have in `model`."""
        return {n: self._shadows[p] for n, p in model.named_parameters() if p in self._shadows}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Take over an average that :meth:`state_dict` gave for the same model."""
        for name, shadow in self.state_dict(model).items():
            shadow.copy_(state[name])


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves besides the model's weights.

    Args:
        curves: by name ``{"step": [...], "value": [...]}``; steps count those done. ``"loss"``,
            ``"lr"``, ``"gradient norm"``, what the loss reported, and the evaluations.
        seconds: of wall time, the pieces before a resume included.
        steps: of the optimizer.
        resumed_from: the step of the checkpoint that this call went on from, 0 for none.
        precision: that the products were computed in: ``"fp32"`` or ``"bf16"``.
        ema: the average of the weights where the configuration asks for one.
    """

    curves: dict[str, dict[str, list[float]]]
    seconds: float
    steps: int
    resumed_from: int
    precision: str
    ema: EMA | None


def seed_everything(seed: int) -> None:
    """Seed every random generator that a run draws from: Python's, numpy's and torch's."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that draw from it are seeded too
    torch.manual_seed(seed)


def train(
    model: nn.Module,
    batches: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Tensor | tuple[Tensor, dict[str, Any]]],
    config: TrainingConfig,
    *,
    evaluate: Callable[[nn.Module], float | dict[str, float]] | None = None,
    parameter_groups: Callable[[str, nn.Parameter], dict[str, float]] | None = None,
    on_step: Callable[[nn.Module, int], None] | None = None,
    checkpoint: str | os.PathLike | None = None,
    device: torch.device | str = "auto",
    tokens_per_step: int | None = None,
    progress: bool = True,
    description: str = "training",
) -> TrainingResult:
    """Train a model in place with AdamW, and leave it in eval mode on `device`.

    Under torchrun every process gets batches of its own and the gradients are averaged
    (``accelerate`` does both); alone it needs no configuration.

    Args:
        model: its forward pass is called through `loss` only.
        batches: the micro-batch of an index, counted from 0 over the whole run, always the same
            for the same index: that is what makes the order of the data exact to resume.
        loss: ``loss(model, batch)`` gives the scalar loss, or the loss and a dict of scalars that
            become curves.
        config: how to train.
        evaluate: called with the model in eval mode, without gradients, holding the averaged
            weights where there is an average; its numbers become curves. It cannot disturb the
            training's random states.
        parameter_groups: ``parameter_groups(name, parameter)`` may give ``lr``, ``warmup`` and
            ``weight_decay`` of that parameter in place of the configuration's.
        on_step: called with the model and the number of steps done, after every step, and once
            when resuming, before the weights are loaded: what it changes in the model's structure
            must follow from the number alone. Parameters that it removes leave the optimizer and
            the checkpoints; it may not add any.
        checkpoint: a folder of this run alone; a checkpoint there is continued.
        device: a device or its name.
        tokens_per_step: shown as a rate by the progress bar.
        progress: show the bar.
        description: of the bar.

    Raises:
        TrainingError: if the loss or the gradient is no longer finite, with the step; the last
            checkpoint stays.
        CheckpointError: if a checkpoint cannot be written or read, or belongs to another run.
        ValueError: if the device is not there, or a parameter group sets something else.
    """
    started = time.perf_counter()
    accelerator, device = _accelerator(config, resolve_device(str(device)))
    alone = accelerator.num_processes == 1
    model.to(device)
    checkpoints = _Checkpoints(checkpoint, config) if checkpoint is not None else None
    found = checkpoints.latest() if checkpoints else None
    if found and on_step:
        on_step(model, found.step)

    optimizer = _adamw(model, config, parameter_groups)
    ema = EMA(model, config.ema) if config.ema is not None else None
    log = _Log()
    earlier = 0.0
    if found:
        earlier = found.restore(model, optimizer, ema, log, accelerator)
    first = saved = found.step if found else 0
    saved_at = time.monotonic()
    wrapped = model if alone else accelerator.prepare_model(model, device_placement=False)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))

    def save(step: int) -> None:
        seconds = earlier + time.perf_counter() - started
        randomness = gather_object([_random_states()])
        if accelerator.is_main_process:
            checkpoints.save(step, model, optimizer, ema, log, seconds, randomness)
        accelerator.wait_for_everyone()

    # left out where a bar is wanted, so that TQDM_DISABLE has its say
    silent = {} if progress and accelerator.is_main_process else {"disable": True}
    bar = tqdm(
        desc=description,
        total=config.steps,
        initial=first,
        leave=False,
        unit="step",
        mininterval=0.5,
        **silent,
    )
    with bar:
        for step in range(first, config.steps):
            model.train()
            totals: dict[str, Tensor] = {}
            for micro in range(config.accumulate):
                index = (step * config.accumulate + micro) * accelerator.num_processes
                batch = send_to_device(batches(index + accelerator.process_index), device)
                last = micro == config.accumulate - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        value, extra = _loss_and_extra(loss(wrapped, batch))
                    accelerator.backward(value)
                for name, number in {"loss": value, **extra}.items():
                    number = torch.as_tensor(number, dtype=torch.float32, device=device).detach()
                    totals[name] = totals.get(name, 0.0) + number / config.accumulate

            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = accelerator.clip_grad_norm_(parameters, config.clip or math.inf)
            means = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean")
            numbers = torch.cat([means, norm.reshape(1).to(means)]).tolist()
            numbers = dict(zip([*totals, "gradient norm"], numbers, strict=True))
            _require_finite(numbers, step + 1, saved if checkpoints else None)

            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * config.lr_share(step, group["warmup"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if on_step:
                on_step(model, step + 1)
                if _follow_structure(model, optimizer) and not alone:
                    del wrapped
                    accelerator.free_memory()
                    wrapped = accelerator.prepare_model(model, device_placement=False)
            if ema:
                ema.update(model)

            done = step + 1
            log.add(numbers | {"lr": config.lr * config.lr_share(step)})
            if done % config.log_every == 0 or done == config.steps:
                log.point(done)
            due = config.evaluate_every and done % config.evaluate_every == 0
            if evaluate and (due or done == config.steps):
                log.extend(done, _evaluate(evaluate, model, ema))
            if checkpoints:
                aged = time.monotonic() - saved_at
                if _due(config, done, aged, accelerator) or done == config.steps:
                    save(done)
                    saved, saved_at = done, time.monotonic()
            _show(bar, numbers["loss"], tokens_per_step)

    model.eval()
    return TrainingResult(
        curves=log.curves,
        seconds=earlier + (time.perf_counter() - started if first < config.steps else 0.0),
        steps=config.steps,
        resumed_from=first,
        precision="bf16" if bf16 else "fp32",
        ema=ema,
    )


# -- the parts of a step ---------------------------------------------------------------------------


def _accelerator(config: TrainingConfig, device: torch.device) -> tuple[Accelerator, torch.device]:
    """The processes of this run. Alone, the device is ours; under torchrun it is the process's."""
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=distributed and device.type == "cpu",
        mixed_precision="no",  # autocast is entered around the loss and never wraps the model
        device_placement=False,
        gradient_accumulation_steps=config.accumulate,
        # a router or self-guidance may leave parameters out of a step
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    return accelerator, accelerator.device if distributed else device


def _loss_and_extra(result: Tensor | tuple[Tensor, dict]) -> tuple[Tensor, dict[str, Any]]:
    value, extra = result if isinstance(result, tuple) else (result, {})
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss must be a tensor with one element, not {shape}: take its mean")
    return value.reshape(()), extra


def _adamw(
    model: nn.Module,
    config: TrainingConfig,
    parameter_groups: Callable[[str, nn.Parameter], dict[str, float]] | None,
) -> torch.optim.AdamW:
    """AdamW over groups of parameters with the same settings; the fused form for all devices."""
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # the biases of stacked experts are matrices, one row an expert
        is_bias = name.rpartition(".")[2].startswith(("bias", "b_"))
        decays = config.decay_all or not (parameter.ndim < 2 or is_bias)
        settings = {
            "lr": config.lr,
            "warmup": config.warmup,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        given = parameter_groups(name, parameter) if parameter_groups else {}
        if wrong := given.keys() - settings.keys():
            raise ValueError(unknown("setting of a parameter group", min(wrong), settings))
        settings |= given
        _require(f"lr of {name}", settings["lr"], _is_positive, "a number above 0")
        _check_warmup(f"warmup of {name}", settings["warmup"], config.steps)
        groups.setdefault(tuple(settings.items()), settings | {"params": []})
        groups[tuple(settings.items())]["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient: nothing to train")
    for group in groups.values():
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups.values(), lr=config.lr, betas=config.betas, fused=True)


def _follow_structure(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Drop the parameters that the model no longer has from the optimizer; whether any were."""
    alive = {p for p in model.parameters() if p.requires_grad}
    known = {p for group in optimizer.param_groups for p in group["params"]}
    if added := alive - known:
        names = [name for name, p in model.named_parameters() if p in added]
        raise ValueError(f"on_step added the parameters {names}: add them before training")
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p in alive]
    for parameter in known - alive:
        optimizer.state.pop(parameter, None)
    return known != alive


def _require_finite(numbers: dict[str, float], step: int, saved: int | None) -> None:
    if wrong := {name: value for name, value in numbers.items() if not math.isfinite(value)}:
        what = ", ".join(f"{name} is {value}" for name, value in wrong.items())
        kept = f" The checkpoint of step {saved} is kept." if saved else ""
        raise TrainingError(
            f"{what} at step {step}: lower the learning rate, lengthen the warm-up, clip the "
            f"gradient, or train in fp32.{kept}"
        )


def _evaluate(
    evaluate: Callable[[nn.Module], float | dict[str, float]], model: nn.Module, ema: EMA | None
) -> dict[str, float]:
    states = _random_states()
    model.eval()
    with torch.no_grad(), ema.applied(model) if ema else contextlib.nullcontext():
        result = evaluate(model)
    _set_random_states(states)
    result = result if isinstance(result, dict) else {"evaluation": result}
    return {name: float(value) for name, value in result.items()}


def _due(config: TrainingConfig, done: int, aged: float, accelerator: Accelerator) -> bool:
    if config.checkpoint_every_steps and done % config.checkpoint_every_steps == 0:
        return True
    if config.checkpoint_every_seconds is None:
        return False
    due = aged >= config.checkpoint_every_seconds
    if accelerator.num_processes == 1:
        return due
    mine = torch.tensor(float(due and accelerator.is_main_process), device=accelerator.device)
    return accelerator.reduce(mine, reduction="sum").item() > 0  # one clock for all processes


def _show(bar: tqdm, loss: float, tokens_per_step: int | None) -> None:
    shown = {"loss": f"{loss:.3f}"}
    seconds = bar.format_dict["elapsed"]
    if tokens_per_step and seconds:
        rate = tokens_per_step * (bar.n + 1 - bar.initial) / seconds
        shown["tokens/s"] = f"{rate:,.0f}"
    bar.set_postfix(shown, refresh=False)
    bar.update()


class _Log:
    """The curves so far, and the sums behind their next points."""

    def __init__(self):
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.pending: dict[str, list[float]] = {}

    def add(self, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            total, count = self.pending.get(name, (0.0, 0))
            self.pending[name] = [total + value, count + 1]

    def point(self, step: int) -> None:
        self.extend(step, {name: total / count for name, (total, count) in self.pending.items()})
        self.pending = {}

    def extend(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            curve = self.curves.setdefault(name, {"step": [], "value": []})
            curve["step"].append(step)
            curve["value"].append(value)


# -- checkpoints -----------------------------------------------------------------------------------


class _Checkpoints:
    """The checkpoints of one run: folders ``step-<number>``, each whole or not there.

    A folder holds ``model``, ``optimizer`` and ``ema`` as safetensors, the rest in ``state.pt``,
    and the checksums of them all. The one before stays until the new one is complete.
    """

    def __init__(self, folder: str | os.PathLike, config: TrainingConfig):
        self.folder = Path(folder)
        self.config = config

    def latest(self) -> "_Checkpoint | None":
        steps = sorted(self.folder.glob("step-*"))
        return _Checkpoint(steps[-1], self.config) if steps else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        log: _Log,
        seconds: float,
        randomness: list[dict[str, Any]],
    ) -> None:
        weights, other = _model_state(model)
        state = {
            "version": _VERSION,
            "config": asdict(self.config),
            "step": step,
            "curves": log.curves,
            "pending": log.pending,
            "seconds": seconds,
            "random": randomness,
            "other": other,
        }
        tensors = {"model": weights, "optimizer": _optimizer_state(model, optimizer)}
        if ema:
            tensors["ema"] = ema.state_dict(model)
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step-*.part"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".step-", suffix=".part"))
            for name, content in tensors.items():
                save_file({k: v.contiguous() for k, v in content.items()}, temporary / _file(name))
            (temporary / "state.pt").write_bytes(_serialized(state))
            checksums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
            (temporary / "checksums.json").write_text(json.dumps(checksums, indent=1))
            for path in [*temporary.iterdir(), temporary]:
                _flush(path)
            temporary.rename(self.folder / f"step-{step:08d}")
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise self._unwritten(step, error) from error
        finally:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
        for old in sorted(self.folder.glob("step-*"))[:-1]:
            shutil.rmtree(old, ignore_errors=True)

    def _unwritten(self, step: int, error: Exception) -> CheckpointError:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = "there is no space left" if full else str(error)
        kept = sorted(self.folder.glob("step-*"))
        last = f"the last one, {kept[-1]}, is kept" if kept else "there is no earlier one"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {why}; {last}. "
            "Free space or give another folder, and run again."
        )


class _Checkpoint:
    """One complete checkpoint, read and compared with the run that wants to go on from it."""

    def __init__(self, path: Path, config: TrainingConfig):
        self.path = path
        try:
            checksums = json.loads((path / "checksums.json").read_text())
            for name, expected in checksums.items():
                if sha256(path / name) != expected:
                    raise self._unusable(f"{path / name} is truncated or was changed")
            self._state = torch.load(path / "state.pt", weights_only=True)
            version = self._state["version"]
            self._tensors = {
                name: load_file(path / _file(name))
                for name in ("model", "optimizer", "ema")
                if _file(name) in checksums
            }
            self.step = self._state["step"]
            saved = self._state["config"]
        except CheckpointError:
            raise
        except Exception as error:  # whatever a foreign or damaged file makes a reader raise
            raise self._unusable(f"{type(error).__name__}: {error}") from error
        if version != _VERSION:
            raise self._unusable(f"its version is {version!r} and this library reads {_VERSION}")
        own = asdict(config)
        differences = [
            f"{f.name} {saved.get(f.name)!r} there, {own[f.name]!r} here"
            for f in fields(config)
            if f.name not in _RESUMABLE and saved.get(f.name) != own[f.name]
        ]
        if differences:
            raise self._unusable(f"another configuration wrote it ({'; '.join(differences)})")

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        log: _Log,
        accelerator: Accelerator,
    ) -> float:
        """Bring everything to the checkpoint's step; the seconds that the run took until then."""
        weights, _ = _model_state(model)
        for name, own in (("model", weights), ("ema", ema.state_dict(model) if ema else {})):
            self._require_shapes(name, own)
        randomness = self._state["random"]
        if len(randomness) != accelerator.num_processes:
            raise self._unusable(
                f"{len(randomness)} processes wrote it and there are {accelerator.num_processes}"
            )
        model.load_state_dict({**self._tensors["model"], **self._state["other"]}, strict=False)
        _load_optimizer_state(model, optimizer, self._tensors["optimizer"])
        if ema:
            ema.load_state_dict(model, self._tensors["ema"])
        log.curves, log.pending = self._state["curves"], self._state["pending"]
        _set_random_states(randomness[accelerator.process_index])
        return self._state["seconds"]

    def _require_shapes(self, name: str, own: dict[str, Tensor]) -> None:
        theirs = {key: tuple(tensor.shape) for key, tensor in self._tensors.get(name, {}).items()}
        own = {key: tuple(tensor.shape) for key, tensor in own.items()}
        if different := sorted(
            key for key in theirs.keys() | own.keys() if theirs.get(key) != own.get(key)
        ):
            key = different[0]
            raise self._unusable(
                f"another model wrote it: {len(different)} tensors differ, the first is {key!r}, "
                f"{theirs.get(key, 'absent')} there, {own.get(key, 'absent')} here"
            )

    def _unusable(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be continued from: {why}. Delete {self.path.parent} to start "
            "again, or give another folder."
        )


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _serialized(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()  # torch's own writer hides why a write failed
    torch.save(state, buffer)
    return buffer.getvalue()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _model_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and buffers, tied ones once, and what modules keep besides tensors."""
    state = model.state_dict()
    names = dict([*model.named_parameters(), *model.named_buffers()])
    weights = {name: state[name] for name in names if name in state}
    other = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return weights, other


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def _load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]
) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, _, entry = key.rpartition("/")
        by_name.setdefault(name, {})[entry] = value
    # a parameter that had no gradient yet has no state
    state = {i: by_name[names[p]] for i, p in enumerate(order) if names[p] in by_name}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_states() -> dict[str, Any]:
    """The states of every random generator, in types that ``torch.load`` reads without pickle."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


# -- checks of a configuration ---------------------------------------------------------------------


def _require(name: str, value: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    if not holds(value):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _check_warmup(name: str, value: Any, steps: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= steps
    share = isinstance(value, float) and 0 <= value < 1
    allowed = f"a share of the steps (float below 1) or a number of them (int up to {steps})"
    _require(name, value, lambda _: whole or share, allowed)


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_nonnegative(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1
