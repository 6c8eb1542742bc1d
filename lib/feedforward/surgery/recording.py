"""What was done to a model, in its configuration: modules as JSON, and made of it again."""

import copy
import inspect

from torch import nn

from feedforward.layers.experts import MoE
from feedforward.layers.guided import SelfGuided
from feedforward.layers.routing import ScaleAdapterRouter, SwitchRouter, TopKRouter
from feedforward.layers.structured import BlockDense, BlockShuffle, LowRank, PreMerged
from feedforward.surgery.finding import DenseFFN, FeedForward, find_ffns

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
    # another model may have been made of the same configuration object
    changed = copy.deepcopy(config)
    changed.feedforward = recorded
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = changed


def refresh(model: nn.Module) -> None:
    """Describe structured layers anew: ``guided.release`` changes what was recorded."""
    recorded = getattr(model.config, "feedforward", None) or []
    linears = {i: o["linears"] for o in recorded if "linears" in o for i in o["layers"]}
    for ffn in find_ffns(model) if linears else ():
        described = described_as("linears", ffn.linears, ffn)
        if ffn.index in linears and described != {"linears": linears[ffn.index]}:
            record(model, {"operation": "replace_ffn", "layers": [ffn.index], **described})
