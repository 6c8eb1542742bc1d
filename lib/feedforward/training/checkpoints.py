"""Checkpoints of a training run: whole or not there, compared before a run goes on from one."""

import errno
import io
import json
import os
import random
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from feedforward.files import atomic_write, sha256
from feedforward.training.averages import EMA, Log
from feedforward.training.config import TrainingConfig

_VERSION = 1
_RESUMABLE = ("checkpoint_every_steps", "checkpoint_every_seconds")  # may differ when resuming


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read: no space, truncated, or of another run."""


class Checkpoints:
    """The checkpoints of one run: folders ``step-<number>``, each whole or not there.

    A folder holds ``model``, ``optimizer`` and ``ema`` as safetensors, the rest in ``state.pt``,
    and the checksums of them all. The one before stays until the new one is complete.
    """

    def __init__(self, folder: str | os.PathLike, config: TrainingConfig):
        self.folder = Path(folder)
        self.config = config

    def latest(self) -> "Checkpoint | None":
        steps = sorted(self.folder.glob("step-*"))
        return Checkpoint(steps[-1], self.config) if steps else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        log: Log,
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


class Checkpoint:
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
        log: Log,
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
        set_random_states(randomness[accelerator.process_index])
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


def save_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model's parameters to a safetensors file, whole or not at all."""
    weights = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    with atomic_write(path) as file:
        file.write(save(weights))


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Give a model the parameters that `save_weights` wrote.

    Raises:
        ValueError: if the file is damaged, or of a model with other parameters; the model is then
            as it was.
    """
    try:
        weights = load(Path(path).read_bytes())
        own = dict(model.named_parameters())
        if weights.keys() != own.keys():
            raise ValueError(f"other names: {sorted(weights.keys() ^ own.keys())[:3]}")
        for name, parameter in own.items():  # copy_ would broadcast
            if weights[name].shape != parameter.shape:
                shapes = tuple(weights[name].shape), tuple(parameter.shape)
                raise ValueError(f"{name} is {shapes[0]} there and {shapes[1]} here")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Delete it to train again.") from error


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


def random_states() -> dict[str, Any]:
    """The states of every random generator, in types that ``torch.load`` reads without pickle."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Bring every random generator to what `random_states` noted."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
