"""What was done to a model, in its configuration: modules as JSON, and made of it again."""

import copy
import inspect

from torch import nn

from feedforward.layers.experts import MoE
from feedforward.layers.guided import SelfGuided
from feedforward.layers.routing import ScaleAdapterRouter, SwitchRouter, TopKRouter
from feedforward.layers.structured import (
    BlockDense,
    BlockShuffle,
    LowRank,
    PreMerged,
    StructuredLinear,
)
from feedforward.surgery.finding import DenseFFN, FeedForward, Place, find_ffns

_SIZES = ("in_features", "out_features", "bias")
# what describes a module, by type: arguments of its constructor
_RECORDED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: _SIZES,
    LowRank: (*_SIZES, "rank", "init"),
    BlockShuffle: (*_SIZES, "blocks", "init"),
    BlockDense: (*_SIZES, "rank", "blocks", "init"),
    SelfGuided: ("layer", "steps", "schedule", "stochastic"),
    PreMerged: ("layer", "threshold"),
    TopKRouter: ("dim", "experts", "k", "renormalize"),
    SwitchRouter: ("dim", "experts", "jitter"),
    ScaleAdapterRouter: ("dim", "experts", "k", "combine"),
    MoE: (
        "dim", "hidden", "experts", "router", "activation", "gated", "bias", "shared",
        "shared_weight", "capacity_factor",
    ),
}  # fmt: skip
KINDS = {kind.__name__: kind for kind in _RECORDED}
# stands for the activation of the replaced FFN, or for that FFN as the shared expert
_PARENT = "parent"
# what is put around a structured layer wherever it is, after the operation that put the layer in
_WRAPPERS: tuple[type[nn.Module], ...] = (SelfGuided, PreMerged)


class _Unrecorded(Exception):
    """A module that cannot be described in JSON."""


def _describe(value: object, ffn: FeedForward) -> object:
    """A module as JSON; `remake` makes it of that again."""
    if isinstance(value, tuple):
        return [_describe(each, ffn) for each in value]
    if value is ffn.activation or isinstance(value, DenseFFN):
        return _PARENT
    if type(value) in _RECORDED:
        described = {"type": type(value).__name__}
        for name in _RECORDED[type(value)]:
            if name == "bias":
                bias = value.b_in if isinstance(value, MoE) else value.bias
                described[name] = bias is not None
            else:
                described[name] = _describe(getattr(value, name), ffn)
        return described
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Unrecorded(type(value).__name__)


def described_as(key: str, value: object, ffn: FeedForward) -> dict:
    """An entry of a record: what was put in as JSON, or the type that cannot be described."""
    try:
        return {key: _describe(value, ffn)}
    except _Unrecorded as error:
        return {"unrecorded": str(error)}


def remake(described: object, ffn: FeedForward) -> object:
    """A module of its JSON, with the sizes and the activation of the FFN that it replaces."""
    if isinstance(described, list):
        return tuple(remake(each, ffn) for each in described)
    if not isinstance(described, dict):
        return described
    kind = KINDS.get(described.get("type"))
    if kind is None:
        raise ValueError(f"unknown layer {described.get('type')!r}; known are {', '.join(KINDS)}")
    options = {key: remake(value, ffn) for key, value in described.items() if key != "type"}
    if options.get("activation") == _PARENT:
        options["activation"] = ffn.activation
    if options.get("shared") == _PARENT:
        options["shared"] = ffn.dense()
    if "device" in inspect.signature(kind).parameters:
        options |= {"device": ffn.device, "dtype": ffn.dtype}
    return kind(**options)


def record(model: nn.Module, operation: dict) -> None:
    """Add an operation to a Hugging Face model's configuration; others have no place for it."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return
    recorded = copy.deepcopy(getattr(config, "feedforward", None) or [])
    if operation["operation"] == "replace_ffn":  # what stood there before is gone
        for earlier in recorded:
            earlier["layers"] = [i for i in earlier["layers"] if i not in operation["layers"]]
        recorded = [earlier for earlier in recorded if earlier["layers"]]
    if recorded and recorded[-1] | {"layers": 0} == operation | {"layers": 0}:
        recorded[-1]["layers"] += operation["layers"]
    else:
        recorded.append(operation)
    set_record(model, recorded)


def set_record(model: nn.Module, recorded: list[dict]) -> None:
    """Give a Hugging Face model's configuration these operations in the place of its own."""
    config = model.config
    # another model may have been made of the same configuration object
    changed = copy.deepcopy(config)
    changed.feedforward = recorded
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = changed


def refresh(model: nn.Module) -> None:
    """Describe structured layers anew: ``guided.release`` changes what was recorded."""
    recorded = getattr(getattr(model, "config", None), "feedforward", None) or []
    linears = {i: o["linears"] for o in recorded if "linears" in o for i in o["layers"]}
    for ffn in find_ffns(model) if linears else ():
        described = described_as("linears", ffn.linears, ffn)
        if ffn.index in linears and described != {"linears": linears[ffn.index]}:
            record(model, {"operation": "replace_ffn", "layers": [ffn.index], **described})


def wrappers(model: nn.Module) -> dict[str, dict | None]:
    """Of each structured layer: what is around it as JSON, None for nothing, by its path."""
    found: dict[str, dict | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _WRAPPERS):
            names = (name for name in _RECORDED[type(module)] if name != "layer")
            found[path] = {"type": type(module).__name__}
            found[path] |= {name: getattr(module, name) for name in names}
        elif isinstance(module, StructuredLinear) and path.removesuffix(".layer") not in found:
            found[path] = None
    return found


def wrap(model: nn.Module, at: dict[str, dict | None]) -> None:
    """Put around the structured layers at these paths what `wrappers` tells of another model."""
    made: dict[nn.Module, nn.Module] = {}  # a shared layer gets one
    for path, described in at.items():
        layer = model.get_submodule(path)
        layer = layer.layer if isinstance(layer, _WRAPPERS) else layer
        if layer not in made:
            options = dict(described or {})
            kind = KINDS.get(options.pop("type", None))
            if described is not None and kind not in _WRAPPERS:
                raise ValueError(f"{described} is nothing to put around a structured layer")
            made[layer] = kind(layer, **options) if described else layer
        owner, _, name = path.rpartition(".")
        Place(model.get_submodule(owner), name).put(made[layer])
