"""What a model costs: parameters, active parameters, FLOPs and bytes for each token."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from feedforward.layers.experts import MoE
from feedforward.layers.guided import SelfGuided
from feedforward.layers.structured import (
    BlockDense,
    BlockShuffle,
    LowRank,
    PreMerged,
    StructuredLinear,
)


@dataclass(frozen=True)
class Cost:
    """What one token costs.

    A multiplication and the addition after it are two FLOPs. Norms, biases, activations, softmax
    and lookups are left out of the FLOPs, as in the papers. Costs add up with ``+``. Explained in
    ``book/foundations/01-feed-forward``.

    Attributes:
        parameters: learned numbers; a table shared by embedding and logits counts once.
        active_parameters: those that one token uses: k of E experts, everything else whole.
        flops: forward pass, per token.
        training_flops: forward and backward pass, per token: three times the forward one, and
            what the guides of ``SelfGuided`` layers add, a stochastic one half of its cost.
        bytes: weights read to process one token by itself, as in decoding without a batch: every
            active weight once, of an embedding only the token's row, of a ``PreMerged`` layer the
            dense weight. Keys and values of earlier tokens are left out.
    """

    parameters: int = 0
    active_parameters: int = 0
    flops: int = 0
    training_flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))


class HasShape(Protocol):
    """A configuration that can say its ``TransformerShape``; ``count`` takes any such object."""

    def shape(self) -> "TransformerShape": ...


@dataclass(frozen=True)
class TransformerShape:
    """The sizes of a Transformer, as far as they decide what it costs.

    The defaults are those of arXiv 2406.16450: pre-norm decoder with biases, rotary positions and
    logits tied to the embedding. Explained in ``book/foundations/01-feed-forward``.

    Args:
        width: width H of a token.
        layers: number of layers.
        heads: query heads.
        hidden: hidden width of a feed-forward layer (FFN), of one expert with ``ffn="MoE"``.
        vocabulary: rows of the token embedding; 0 for a part of a model without one.
        context: tokens that a token attends to.
        kv_heads: key and value heads; None for as many as `heads`.
        attention_width: width of all query heads together; None for `width`.
        gated: FFN with a gate: three linear maps and not two.
        bias: biases on every linear map but router and logits.
        norm_bias: norms with a bias (LayerNorm); False for RMSNorm.
        positions: rows of further embedding tables (learned positions, token types).
        logits: "tied" to the embedding, "own" for a matrix of their own, None for none.
        ffn: "dense", "LowRank", "BlockShuffle", "BlockDense" or "MoE".
        rank: rank R of LowRank or BlockDense.
        blocks: number of blocks B of BlockShuffle or BlockDense.
        dense_layers: leading layers whose FFN stays dense whatever `ffn` is (1 in the paper).
        dense_hidden: hidden width of those dense layers; None for `hidden`.
        experts: routed experts E of an MoE.
        k: routed experts that a token uses.
        shared: shared experts, always on.
        adapter: a scale adapter beside the gate, of the gate's size (AdaMoE).

    Raises:
        ValueError: a size that is not positive, widths that heads or blocks do not divide, or a
            size that the `ffn` needs and does not have, or has and does not need.

    >>> shape = TransformerShape(width=768, layers=12, heads=12, hidden=3072, vocabulary=32_000)
    >>> count(shape).parameters
    109632000
    """

    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int = 0
    context: int = 0
    kv_heads: int | None = None
    attention_width: int | None = None
    gated: bool = False
    bias: bool = True
    norm_bias: bool = True
    positions: int = 0
    logits: str | None = "tied"
    ffn: str = "dense"
    rank: int | None = None
    blocks: int | None = None
    dense_layers: int = 0
    dense_hidden: int | None = None
    experts: int | None = None
    k: int | None = None
    shared: int = 0
    adapter: bool = False

    def __post_init__(self):
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.attention_width is None:
            object.__setattr__(self, "attention_width", self.width)
        if self.dense_hidden is None:
            object.__setattr__(self, "dense_hidden", self.hidden)
        positive = ("width", "layers", "heads", "hidden", "kv_heads", "attention_width")
        for name in (*positive, "dense_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("vocabulary", "context", "positions", "dense_layers", "shared"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.attention_width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads must divide attention_width {self.attention_width}, and "
                f"{self.kv_heads} kv_heads must divide the heads"
            )
        if self.logits not in ("tied", "own", None):
            raise ValueError(f"logits is {self.logits!r}; choose 'tied', 'own' or None")
        if self.dense_layers > self.layers:
            raise ValueError(f"dense_layers is {self.dense_layers} of {self.layers} layers")
        if self.ffn not in _NEEDS:
            raise ValueError(f"ffn is {self.ffn!r}; choose one of {', '.join(_NEEDS)}")
        for name in ("rank", "blocks", "experts", "k"):
            value, needed = getattr(self, name), name in _NEEDS[self.ffn]
            if needed and (value is None or value < 1):
                raise ValueError(f"{name} is {value}; an FFN of kind {self.ffn} needs at least 1")
            if not needed and value is not None:
                raise ValueError(f"{name} is {value}; an FFN of kind {self.ffn} has none")
        if (self.shared or self.adapter) and self.ffn != "MoE":
            raise ValueError(f"shared and adapter belong to an MoE; this FFN is {self.ffn}")
        if self.ffn == "MoE" and self.k > self.experts:
            raise ValueError(f"k is {self.k} with {self.experts} experts; choose k from 1 to E")
        _ffn(self, self.ffn, self.hidden)  # a rank or blocks that fit no such layer are errors

    def shape(self) -> "TransformerShape":
        """Itself: a shape is a configuration that can say its shape."""
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that `ffn` needs, as arguments of the layer: rank and blocks, experts and k."""
        return {name: getattr(self, name) for name in _NEEDS[self.ffn]}

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.attention_width // self.heads

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_width


# the sizes that each kind of FFN needs
_NEEDS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "LowRank": ("rank",),
    "BlockShuffle": ("blocks",),
    "BlockDense": ("rank", "blocks"),
    "MoE": ("experts", "k"),
}
_STRUCTURED: dict[str, type[StructuredLinear]] = {
    kind.__name__: kind for kind in (LowRank, BlockShuffle, BlockDense)
}


def count(
    model_or_config: nn.Module | HasShape | object,
    *,
    context: int | None = None,
    dtype: torch.dtype | None = None,
) -> Cost:
    """Count what one token costs in a model, or in a model of this configuration without making it.

    In a module every linear map is taken to work on every token, so a pooler or a classification
    head, which sees one token of a text, is counted as if it saw all; a module that occurs at two
    places, of one parent or of several, is counted as run twice. For a configuration of
    ``transformers`` the class that its ``architectures`` names (else the bare model) is made on the
    meta device and counted. Explained in ``book/foundations/01-feed-forward``.

    Args:
        model_or_config: a module; a ``TransformerShape`` or an object with a method ``shape()``
            that gives one; or a configuration of ``transformers``.
        context: tokens that a token attends to: attention itself costs ``4 * layers * context *
            attention width`` FLOPs (as arXiv 2406.16450 counts). None: the context that the shape
            names; without a shape 0, so linear maps alone.
        dtype: type in which weights are read; None: the module's own, float32 for a shape.

    Returns:
        The cost of a token.

    Raises:
        ValueError: an object of another kind, a module with weights of unknown use, or a context
            for a module whose configuration does not say how wide its attention is.
    """
    if isinstance(model_or_config, nn.Module):
        attention = _attention_flops(getattr(model_or_config, "config", None), context)
        return _count_module(model_or_config, dtype) + attention
    if callable(getattr(model_or_config, "shape", None)):
        return sum(breakdown(model_or_config, context=context, dtype=dtype).values(), Cost())
    if isinstance(getattr(model_or_config, "model_type", None), str):
        attention = _attention_flops(model_or_config, context)
        return _count_module(_on_meta(model_or_config), dtype) + attention
    raise ValueError(
        f"count was given a {type(model_or_config).__name__}; it takes a module, a "
        "TransformerShape (or an object whose shape() gives one), or a transformers configuration"
    )


def breakdown(
    config: HasShape, *, context: int | None = None, dtype: torch.dtype | None = None
) -> dict[str, Cost]:
    """Where the cost of a token goes: embedding, attention, ffn, norms, logits.

    Args:
        config: a ``TransformerShape``, or an object with a method ``shape()`` that gives one.
        context: tokens that a token attends to; None for the shape's own.
        dtype: type in which weights are read; None for float32.

    Returns:
        The cost of each part; together they are what ``count`` gives. Tied logits have FLOPs and
        bytes but no parameters of their own.

    Raises:
        ValueError: a negative context.

    >>> parts = breakdown(PAPER_SHAPES["xl"])
    >>> {name: round(part.parameters / 1e6) for name, part in parts.items()}
    {'embedding': 66, 'attention': 403, 'ffn': 806, 'norms': 0, 'logits': 0}
    """
    shape = config.shape()
    context = shape.context if context is None else context
    if context < 0:
        raise ValueError(f"context is {context}; it must not be negative")
    itemsize = (dtype or torch.float32).itemsize

    def cost(
        parameters: int, active: int, *, multiplied: int = 0, attended: int = 0, read: int
    ) -> Cost:
        flops = 2 * multiplied + attended
        return Cost(parameters, active, flops, 3 * flops, read * itemsize)

    table = shape.vocabulary * shape.width
    tables = table + shape.positions * shape.width
    # of a table that the logits read whole, no row more
    rows = shape.width * ((table > 0 and shape.logits != "tied") + (shape.positions > 0))
    logits = table if shape.logits else 0
    own = table if shape.logits == "own" else 0
    projections = shape.layers * 2 * shape.width * (shape.attention_width + shape.kv_width)
    biases = shape.attention_width + 2 * shape.kv_width + shape.width
    attention = projections + shape.layers * biases * shape.bias
    attended = 4 * shape.layers * context * shape.attention_width
    norms = (2 * shape.layers + 1) * shape.width * (1 + shape.norm_bias)
    others = shape.layers - shape.dense_layers
    ffn, active, multiplied = (
        shape.dense_layers * first + others * other
        for first, other in zip(
            _ffn(shape, "dense", shape.dense_hidden),
            _ffn(shape, shape.ffn, shape.hidden),
            strict=True,
        )
    )
    return {
        "embedding": cost(tables, tables, read=rows),
        "attention": cost(
            attention, attention, multiplied=projections, attended=attended, read=attention
        ),
        "ffn": cost(ffn, active, multiplied=multiplied, read=active),
        "norms": cost(norms, norms, read=norms),
        "logits": cost(own, own, multiplied=logits, read=logits),
    }


def ffn_maps(shape: TransformerShape, hidden: int) -> list[tuple[int, int]]:
    """The linear maps of one FFN: two, or three if it is gated.

    Explained in ``book/foundations/01-feed-forward``.

    Args:
        shape: Of the model.
        hidden: Hidden width of the FFN; that of an expert may be another than the shape's.

    Returns:
        (in, out) of each map, in the order of the computation.

    >>> ffn_maps(PAPER_SHAPES["s"], 3072)
    [(768, 3072), (3072, 768)]
    """
    into, out = (shape.width, hidden), (hidden, shape.width)
    return [into, into, out] if shape.gated else [into, out]


def _ffn(shape: TransformerShape, kind: str, hidden: int) -> tuple[int, int, int]:
    """Of one FFN: parameters, active parameters, and those that matrix products use."""
    linears = ffn_maps(shape, hidden)
    biases = shape.bias * sum(m for _, m in linears)
    if kind in _STRUCTURED:
        count_weights = _STRUCTURED[kind].weight_count
        weights = sum(count_weights(n, m, **shape.sizes) for n, m in linears)
    else:
        weights = sum(n * m for n, m in linears)
    total = weights + biases
    if kind != "MoE":
        return total, total, weights
    router = shape.experts * shape.width * (1 + shape.adapter)
    used = shape.k + shape.shared
    everything = (shape.experts + shape.shared) * total + router
    return everything, used * total + router, used * weights + router


def _count_module(model: nn.Module, dtype: torch.dtype | None) -> Cost:
    """The cost of a token in a module, attention's own products apart."""
    share: dict[int, tuple[int, Fraction]] = {}  # of each parameter: its size, the part in use
    read: dict[int, int] = {}  # of each parameter: bytes read for one token
    flops = training_only = 0

    def use(parameter: nn.Parameter, part: Fraction, numbers: int | None = None) -> None:
        key, size = id(parameter), parameter.numel()
        share[key] = size, max(part, share.get(key, (0, Fraction(0)))[1])
        numbers = int(part * size) if numbers is None else numbers
        read[key] = max(numbers * (dtype or parameter.dtype).itemsize, read.get(key, 0))

    def visit(module: nn.Module, name: str) -> None:
        nonlocal flops, training_only
        part, own = Fraction(1), dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            use(module.weight, part, module.embedding_dim)
            return
        if isinstance(module, SelfGuided) and module.guide is not None:
            guide = own.pop("guide")
            use(guide, Fraction(0))
            # a stochastic guide runs in half of the forward passes: alpha is 1/2 on average
            training_only += (3 if module.stochastic else 6) * guide.numel()
        elif isinstance(module, PreMerged) and module.threshold >= 1:
            layer = module.layer
            for parameter in layer.parameters():
                use(parameter, part, None if parameter is layer.bias else 0)
            flops += layer.flops_per_token
            merged = layer.in_features * layer.out_features
            read[id(module)] = merged * (dtype or layer.v.dtype).itemsize
            return
        elif isinstance(module, MoE):
            part = Fraction(_experts_per_token(module, name), module.experts)
        elif not isinstance(module, _KNOWN):
            unknown = [tuple(p.shape) for p in own.values() if p.dim() >= 3]
            if unknown:
                raise ValueError(
                    f"count does not know how {type(module).__name__} {name!r} uses its weights "
                    f"of shape {unknown}; count the modules around it instead"
                )
        for key, parameter in own.items():
            use(parameter, part)
            if parameter.dim() >= 2 and key not in ("b_in", "b_out"):
                flops += int(2 * part * parameter.numel())
        # not named_children, which leaves out what stands there twice
        for key, child in module._modules.items():
            if child is not None:
                visit(child, f"{name}.{key}" if name else key)

    visit(model, "")
    return Cost(
        parameters=sum(size for size, _ in share.values()),
        active_parameters=sum(int(part * size) for size, part in share.values()),
        flops=flops,
        training_flops=3 * flops + training_only,
        bytes=sum(read.values()),
    )


# modules whose weights of three and more dimensions work once on every token
_KNOWN = (StructuredLinear, nn.modules.conv._ConvNd)


def _experts_per_token(moe: MoE, name: str) -> int:
    k = getattr(moe.router, "k", None)
    if not isinstance(k, int):
        raise ValueError(
            f"the router {type(moe.router).__name__} of {name or 'the MoE'!r} does not say how "
            "many experts a token uses; give it an attribute k"
        )
    return k


def _attention_flops(config: object, context: int | None) -> Cost:
    """What attention itself costs in a model of this configuration."""
    if callable(getattr(config, "shape", None)):
        shape = config.shape()
        context = shape.context if context is None else context
        width = shape.layers * shape.attention_width
    elif not context:
        width, context = 0, context or 0
    else:
        heads = getattr(config, "num_attention_heads", None)
        layers = getattr(config, "num_hidden_layers", None)
        if not isinstance(heads, int) or not isinstance(layers, int):
            raise ValueError(
                f"context is {context}, but {type(config).__name__} does not say how many layers "
                "and attention heads there are; leave context out to count the linear maps alone"
            )
        width = layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    if context < 0:
        raise ValueError(f"context is {context}; it must not be negative")
    return Cost(flops=4 * width * context, training_flops=12 * width * context)


def _on_meta(config) -> nn.Module:
    """The model of a configuration of ``transformers``, without memory for its weights."""
    import transformers

    if getattr(config, "feedforward", None):
        raise ValueError(
            "this configuration records replaced FFNs; make the model with "
            "feedforward.surgery.from_config under torch.device('meta') and count that"
        )
    named = (config.architectures or [None])[0]
    with torch.device("meta"):
        if named and hasattr(transformers, named):
            return getattr(transformers, named)(config)
        return transformers.AutoModel.from_config(config)


def _paper_shapes() -> dict[str, TransformerShape]:
    text = {"vocabulary": 32_000, "context": 1024}
    widths = {"s": (12, 768, 12), "m": (24, 1024, 16), "l": (24, 1536, 12), "xl": (24, 2048, 16)}
    shapes = {}
    for name, (layers, width, heads) in widths.items():
        sizes = text | {"layers": layers, "width": width, "heads": heads, "hidden": 4 * width}
        shapes[name] = TransformerShape(**sizes)
        # BlockDense at its larger size; half of that rank at the smaller one
        blocks, rank = (2, 2 * width // 3) if name in "sl" else (4, 3 * width // 4)
        for percent, divisor in ((63, 1), (32, 2)):
            for ffn, numbers in (
                ("LowRank", {"rank": width // 2 // divisor}),
                ("BlockShuffle", {"blocks": 2 * divisor}),
                ("BlockDense", {"rank": rank // divisor, "blocks": blocks}),
            ):
                shapes[f"{name}-{ffn.lower()}-{percent}"] = TransformerShape(
                    **sizes, ffn=ffn, dense_layers=1, **numbers
                )
    for name, heads, kv_heads, hidden in (("m", 16, 4, 4864), ("l", 12, 2, 7424)):
        layers, width, _ = widths[name]
        sizes = text | {"layers": layers, "width": width, "hidden": hidden}
        shapes[f"{name}-gqa"] = TransformerShape(**sizes, heads=heads, kv_heads=kv_heads)
        # attention of half the width, in heads of 64, 4 of them for keys and values
        shapes[f"{name}-ws"] = TransformerShape(
            **sizes,
            heads=width // 2 // 64,
            kv_heads=4,
            attention_width=width // 2,
            ffn="LowRank",
            rank=width // 2,
            dense_layers=1,
        )
    expert = {
        "width": 1024, "layers": 18, "heads": 8, "kv_heads": 1, "attention_width": 2048,
        "hidden": 4096, "gated": True, "bias": False, "norm_bias": False, "logits": None,
    }  # fmt: skip
    shapes["pi0-action-expert"] = TransformerShape(**expert)
    shapes["adamoe-action-expert"] = TransformerShape(
        **expert, ffn="MoE", experts=4, k=1, shared=1, adapter=True
    )
    shapes["distilbert"] = TransformerShape(
        width=768, layers=6, heads=12, hidden=3072, vocabulary=30_522, positions=512, logits=None
    )
    return shapes


PAPER_SHAPES: Mapping[str, TransformerShape] = MappingProxyType(_paper_shapes())
"""The models of the three papers by name.

- ``s``, ``m``, ``l``, ``xl``: the dense models of arXiv 2406.16450; ``<size>-<kind>-<percent>``
  with ``lowrank``, ``blockshuffle``, ``blockdense`` and 63 or 32: the structured ones, whose first
  layer is dense; ``m-gqa``, ``m-ws``, ``l-gqa``, ``l-ws``: grouped queries, wide and structured.
- ``pi0-action-expert``, ``adamoe-action-expert``: arXiv 2510.14300. That paper gives width, layers
  and FFN; the attention (8 query heads of 256, 1 key and value head) is that of ``gemma_300m`` in
  openpi, on which it builds, and gives the 0.31 billion parameters.
- ``distilbert``: the encoder of arXiv 2204.09598, without a head.
"""
