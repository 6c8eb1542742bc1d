"""Dense weights beside the structured ones of a whole model, for generation with it."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import nn

from feedforward.layers.guided import SelfGuided
from feedforward.layers.structured import (
    PreMerged,
    StructuredLinear,
    measure_threshold,
    search_threshold,
)
from feedforward.surgery.finding import Place
from feedforward.timing import interleaved


def premerge(
    model: nn.Module,
    *,
    threshold: int | Literal["measure"] = "measure",
    run: Callable[[int], object] | None = None,
    largest: int = 1024,
) -> nn.Module:
    """Put a ``PreMerged`` around every structured layer of a model, for generation with it.

    A step of decoding then multiplies by the dense weight, and the many tokens of a prompt go
    through the structured one: the number of tokens in flight decides. Where the dense weight never
    wins, the layer stays as it is, and costs no memory. Load weights before. Explained in
    ``book/structured-ffn/04-decoding``.

    Args:
        model: the model, changed in place. It may be a structured layer itself.
        threshold: as ``PreMerged`` takes it; ``"measure"`` measures the layers of each shape
            together, on the device that they are on.
        run: to measure: runs the model, in eval mode, with that many tokens in flight. Both ways of
            the layers are then timed in there, next to everything else that the model reads and
            does, which takes longer and is right where they are close. None: by themselves.
        largest: to measure: the largest number of tokens to try.

    Returns:
        The model; with a threshold the wrapped layer, if `model` was a structured layer itself.

    Raises:
        ValueError: a threshold that is neither a whole number from 0 nor ``"measure"``, no
            structured layer, one with a guide, or `run` with a threshold or in training mode.

    >>> from feedforward import LowRank, premerge
    >>> block = nn.Sequential(LowRank(16, 64, rank=4), nn.GELU(), LowRank(64, 16, rank=4))
    >>> premerge(block.eval(), threshold=16)[0]
    PreMerged(
      threshold=16
      (layer): LowRank(in_features=16, out_features=64, rank=4, bias=True, init='spectral')
    )
    """
    if run is not None and (threshold != "measure" or model.training):
        raise ValueError(
            f"run measures in eval mode; threshold is {threshold!r} and training {model.training}: "
            'give threshold="measure" and call model.eval()'
        )
    if any(isinstance(module, SelfGuided) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has guided layers; drop the guides first with "
            "feedforward.layers.guided.release"
        )
    places = [
        Place(parent, name)
        for parent in model.modules()
        if not isinstance(parent, PreMerged)
        for name, child in parent._modules.items()
        if isinstance(child, StructuredLinear)
    ]
    layers = [getattr(place.owner, place.name) for place in places]
    if isinstance(model, StructuredLinear):
        layers.append(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no structured layer that is not merged already; put some "
            "in with feedforward.replace_ffn"
        )
    shapes: dict[tuple, list[StructuredLinear]] = {}
    for layer in dict.fromkeys(layers):  # a shared one counts once
        shapes.setdefault(_shape(layer), []).append(layer)
    wrapped: dict[StructuredLinear, nn.Module] = {}
    for alike in shapes.values():
        tokens = threshold
        if threshold == "measure":
            tokens = measure_threshold(alike, largest=largest) if run is None else 0
        for layer in alike:
            keep = tokens == 0 and run is None
            wrapped[layer] = layer if keep else PreMerged(layer, threshold=tokens)

    def put() -> None:
        for place, layer in zip(places, layers, strict=False):
            setattr(place.owner, place.name, wrapped[layer])

    put()
    if run is not None:
        for alike in shapes.values():
            merged = [wrapped[layer] for layer in alike]
            _measure_in_place(merged, run, largest)
            if merged[0].threshold == 0:
                wrapped |= {layer: layer for layer in alike}
        put()
    return wrapped.get(model, model)


def _measure_in_place(merged: Sequence[PreMerged], run: Callable[[int], object], largest: int):
    """Set the threshold of layers of one shape, with which the whole model is the fastest."""

    def use(threshold: int) -> None:
        for layer in merged:
            layer.threshold = threshold

    def way(threshold: int, tokens: int) -> None:
        use(threshold)
        run(tokens)

    def ratio(tokens: int) -> float:
        runs = {True: partial(way, tokens, tokens), False: partial(way, 0, tokens)}
        times = interleaved(runs, device=merged[0].layer.v.device, rounds=11, seconds=2.0)
        return statistics.median(times[True]) / statistics.median(times[False])

    use(search_threshold(ratio, largest=largest))


def _shape(layer: StructuredLinear) -> tuple:
    """What decides how long a structured layer takes."""
    weights = (layer.v, layer.u)
    return (
        type(layer), layer.in_features, layer.out_features, layer.bias is None,
        *((weight.shape, weight.dtype, weight.device) for weight in weights),
    )  # fmt: skip
