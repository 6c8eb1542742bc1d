"""The loop: steps of AdamW, curves, evaluations, checkpoints."""

import contextlib
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from feedforward.profiles import resolve_device, unknown
from feedforward.records import has_fast_bf16
from feedforward.training.averages import EMA, Log
from feedforward.training.checkpoints import Checkpoints, random_states, set_random_states
from feedforward.training.config import TrainingConfig, check_warmup, is_positive, require
from feedforward.training.precision import bf16_products


class TrainingError(FloatingPointError):
    """Training that cannot go on: the loss or the gradient is no longer finite."""


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
    checkpoints = Checkpoints(checkpoint, config) if checkpoint is not None else None
    found = checkpoints.latest() if checkpoints else None
    if found and on_step:
        on_step(model, found.step)

    optimizer = _adamw(model, config, parameter_groups)
    ema = EMA(model, config.ema) if config.ema is not None else None
    log = Log()
    earlier = 0.0
    if found:
        earlier = found.restore(model, optimizer, ema, log, accelerator)
    first = saved = found.step if found else 0
    saved_at = time.monotonic()
    wrapped = model if alone else accelerator.prepare_model(model, device_placement=False)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))

    def save(step: int) -> None:
        seconds = earlier + time.perf_counter() - started
        randomness = gather_object([random_states()])
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
                syncing = contextlib.nullcontext() if last else accelerator.no_sync(wrapped)
                with syncing, bf16_products(device, bf16):
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
        require(f"lr of {name}", settings["lr"], is_positive, "a number above 0")
        check_warmup(f"warmup of {name}", settings["warmup"], config.steps)
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
    states = random_states()
    model.eval()
    with torch.no_grad(), ema.applied(model) if ema else contextlib.nullcontext():
        result = evaluate(model)
    set_random_states(states)
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
