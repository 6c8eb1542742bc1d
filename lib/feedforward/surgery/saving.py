"""Models of Hugging Face with replaced layers: made of a configuration, saved, loaded."""

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from feedforward.layers.experts import MoE
from feedforward.layers.guided import SelfGuided
from feedforward.layers.structured import PreMerged, StructuredLinear
from feedforward.surgery.operations import check_built, choose, install, upcycled
from feedforward.surgery.recording import KINDS, refresh, remake, set_record, wrap, wrappers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def _replay(model: nn.Module, operations: list) -> None:
    """Repeat recorded operations; the weights are for the caller to fill in."""
    if not isinstance(operations, list) or not all(isinstance(o, dict) for o in operations):
        raise ValueError(
            f"feedforward in the configuration is {operations!r}, not a list of records"
        )
    for operation in operations:
        options = dict(operation)
        name, layers = options.pop("operation", None), options.pop("layers", None)
        if name not in ("replace_ffn", "upcycle", "wrap"):
            raise ValueError(
                f"unknown operation {name!r} in the configuration; this release knows replace_ffn, "
                "upcycle and wrap"
            )
        if "unrecorded" in options:
            raise ValueError(f"{name} put in a {options['unrecorded']}, which cannot be remade")
        try:
            if name == "wrap":
                wrap(model, options["at"])
                continue
            chosen = choose(model, layers)
            if name == "upcycle":
                router = options.pop("router")
                sizes = {k: v for k, v in options.items() if k not in ("noise", "preserve")}
                made = [upcycled(ffn, remake(router, ffn), **sizes) for ffn in chosen]
            else:
                ((_, described),) = options.items()
                made = [check_built(remake(described, ffn), ffn) for ffn in chosen]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot repeat {operation}: {error}") from error
        for ffn, new in zip(chosen, made, strict=True):
            install(ffn, new)


def from_config(config: "PreTrainedConfig", cls: "type[PreTrainedModel] | None" = None):
    """Make a model of a configuration and repeat the operations recorded in it; random weights.

    Args:
        config: a configuration of ``transformers``, such as ``model.config``.
        cls: class of the model; None for the one that ``config.architectures`` names.

    Returns:
        The model. Under ``torch.device("meta")`` it takes no memory, which is enough to count it.

    Raises:
        ValueError: no such class in ``transformers``, or an operation that cannot be repeated.
    """
    return _with_operations(cls or _model_class(config))(config)


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Save a Hugging Face model with replaced FFNs: configuration and weights, through safetensors.

    Everything is written to a temporary folder beside that then takes the place of `folder`; when
    something fails, an earlier save stays as it was. Other files in it (a tokenizer) are kept.

    Args:
        model: a model of ``transformers``; replaced or not.
        folder: where to; new, empty, or with an earlier save.

    Raises:
        ValueError: not a model of ``transformers``, a module that cannot be described in the
            configuration, a model that was changed otherwise, so that `load` could not make it
            again, or a folder with something else in it. Nothing is written then.
        OSError: it cannot be written.
    """
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"save takes a model of transformers, given {type(model).__name__}; save the "
            "state_dict() of others with safetensors.torch.save_file"
        )
    refresh(model)
    for operation in getattr(model.config, "feedforward", None) or []:
        if "unrecorded" in operation:
            raise ValueError(
                f"layers {operation['layers']} hold a {operation['unrecorded']}, which cannot be "
                f"described in the configuration (known are {', '.join(KINDS)}), so load could "
                "not remake it; save the state_dict() with safetensors.torch.save_file instead"
            )
    _check_remade(model)
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; save takes a folder")
    earlier = list(folder.iterdir()) if folder.is_dir() else []
    if earlier and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds something else than a saved model; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
    ) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        # under the names that the model uses, not those of an older release of its class
        model.save_pretrained(new, save_original_format=False)
        for file in earlier:
            if not (file.suffix == ".safetensors" or (new / file.name).exists()):
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _check_remade(model: nn.Module) -> None:
    """Record what is around the structured layers, and see that the record makes the model."""
    ours = (StructuredLinear, SelfGuided, PreMerged, MoE)
    recorded = getattr(model.config, "feedforward", None) or []
    if not recorded and not any(isinstance(module, ours) for module in model.modules()):
        return
    operations = [o for o in recorded if o["operation"] != "wrap"]
    config = copy.deepcopy(model.config)
    config.feedforward = operations
    cls = getattr(type(model), "_unoperated", type(model))
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            twin = _with_operations(cls)(config)
    except Exception as error:  # whatever a class of one's own makes of a configuration alone
        raise ValueError(
            f"{cls.__name__} cannot be made again from its configuration, as load would: {error}"
        ) from error
    made = wrappers(twin)
    at = {path: it for path, it in wrappers(model).items() if path in made and made[path] != it}
    if at:
        operations.append({"operation": "wrap", "layers": [], "at": at})
        wrap(twin, at)
    own, theirs = (
        {name: tuple(weight.shape) for name, weight in m.state_dict().items()}
        for m in (model, twin)
    )
    if wrong := sorted(k for k in own.keys() | theirs.keys() if own.get(k) != theirs.get(k)):
        name = wrong[0]
        raise ValueError(
            f"what is recorded in the configuration does not make this model again: {len(wrong)} "
            f"weights differ, the first is {name!r}, {own.get(name, 'absent')} in the model and "
            f"{theirs.get(name, 'absent')} in what load would make. Change models with replace_ffn "
            "and upcycle, which record it, or save the state_dict() with "
            "safetensors.torch.save_file instead"
        )
    if operations != recorded:
        set_record(model, operations)


def load(folder: str | os.PathLike, cls: "type[PreTrainedModel] | None" = None):
    """Load what ``save`` wrote: make the model, repeat the operations, load every weight strictly.

    A checkpoint without replaced FFNs loads as well. Only safetensors files are read and no code
    from the folder is run.

    Args:
        folder: the folder.
        cls: class of the model; None for the one that the configuration names.

    Returns:
        The model, in evaluation mode as ``from_pretrained`` leaves it.

    Raises:
        ValueError: no folder or no weights, a file that is damaged or cut short, missing,
            additional or differently shaped weights, an unknown class or operation.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder that save wrote")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    cls = cls or _model_class(config)
    made = _with_operations(cls) if getattr(config, "feedforward", None) else cls
    try:
        model, report = made.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {error}") from error
    wrong = {
        what: sorted(map(str, report.get(f"{what}_keys") or []))
        for what in ("missing", "unexpected", "mismatched")
    }
    if any(wrong.values()):
        told = "; ".join(f"{what} {', '.join(keys)}" for what, keys in wrong.items() if keys)
        raise ValueError(f"the weights in {folder} do not fit its configuration: {told}")
    # loading a module's own weights runs what it does after loading: guides take up their count
    model.load_state_dict(model.state_dict())
    model.__class__ = cls
    return model


def _model_class(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    import transformers

    named = (getattr(config, "architectures", None) or [None])[0]
    cls = getattr(transformers, named, None) if isinstance(named, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"the configuration names the model class {named!r}, which transformers does not have; "
            "give the class as cls"
        )
    return cls


def _with_operations(cls: "type[PreTrainedModel]") -> "type[PreTrainedModel]":
    """The class, whose models have the operations of their configuration done."""

    class Operated(cls):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            _replay(self, getattr(config, "feedforward", None) or [])

    Operated.__name__ = cls.__name__  # transformers writes it into configurations
    Operated._unoperated = cls
    return Operated
