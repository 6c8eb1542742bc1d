"""A small decoder-only language model whose feed-forward layers can be any of this library.

The backbone is the one of arXiv 2406.16450 (section 4): pre-norm blocks, rotary positions, tied
embeddings. Attention and embeddings stay dense; what stands in the place of the feed-forward
layer is a matter of the configuration.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedforward.layers.cost import PAPER_SHAPES, TransformerShape
from feedforward.layers.experts import MoE
from feedforward.layers.routing import SwitchRouter, TopKRouter
from feedforward.layers.structured import INITS, BlockDense, BlockShuffle, LowRank
from feedforward.profiles import unknown
from feedforward.records import added

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

_NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
STRUCTURED: dict[str, type[LowRank | BlockShuffle | BlockDense]] = {
    "lowrank": LowRank,
    "blockshuffle": BlockShuffle,
    "blockdense": BlockDense,
}
EXPERTS = ("moe", "switch")
FFNS = ("dense", *STRUCTURED, *EXPERTS)
POSITIONS = ("rotary", "learned")
#: Names that `paper_config` takes: the language models of arXiv 2406.16450.
PAPER_MODELS = tuple(n for n in PAPER_SHAPES if n.partition("-")[0] in ("s", "m", "l", "xl"))


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and of its feed-forward layers.

    The defaults of the experts give dense, ``moe`` and ``switch`` the same active FLOPs: a token
    meets ``hidden`` units in each, in one dense layer, in k experts of ``hidden / k``, or in one
    expert of ``hidden``.

    Args:
        vocabulary: Number of tokens.
        width: Width of the residual stream.
        layers: Number of blocks.
        heads: Query heads.
        kv_heads: Key and value heads, a divisor of `heads`; None: as many (no grouping).
        head_width: Width of a head, even; None: ``width / heads``. The attention's own width
            ``heads * head_width`` may differ from `width` (the paper's wide and structured models).
        hidden: Hidden width of the feed-forward layer; None: ``4 * width``.
        context: The longest sequence, in tokens.
        norm: ``"layer"`` or ``"rms"``.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"`` (the paper's) or ``"silu"``.
        gated: Feed-forward layers with a gate: SwiGLU with ``activation="silu"``.
        bias: Biases in linear layers, experts and norms; routers and logits have none.
        tied: The output matrix is the embedding matrix.
        rope_base: Base of the rotary positions' wavelengths.
        std: Standard deviation of the weights at the start; structured layers keep their own.
        ffn: One of ``dense``, ``lowrank``, ``blockshuffle``, ``blockdense``, ``moe``, ``switch``.
        dense_layers: How many of the first blocks keep a dense feed-forward layer; None: the
            paper's one for the structured kinds, none for experts.
        share: Structured: parameters relative to dense, such as 0.63 or 0.32 (the paper's two).
        rank: Structured, in place of `share`: rank of ``lowrank`` and ``blockdense``.
        blocks: Structured: blocks of ``blockshuffle`` and ``blockdense``; with `share` only for
            the latter.
        experts: Experts of ``moe`` and ``switch``.
        k: Experts a token goes to in ``moe``.
        expert_hidden: Hidden width of an expert; None: ``hidden / k``, ``hidden`` for ``switch``.
        jitter: ``switch``: range of the noise on what the router sees in training.
        capacity_factor: Experts' capacity; None drops no token.
        init: Structured: ``"spectral"``, ``"orthonormal"`` or ``"gaussian"``; None: each kind's
            own, as the paper has it.
        positions: ``"rotary"``, or ``"learned"``: a vector for each position, added to the
            embedding of the token there (GPT-2).
        eps: Of the norms.

    Raises:
        ValueError: When sizes do not fit together or a name is unknown.
    """

    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    head_width: int | None = None
    hidden: int | None = None
    context: int = 128
    norm: str = "layer"
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    tied: bool = True
    rope_base: float = 10_000.0
    std: float = 0.02
    ffn: str = "dense"
    dense_layers: int | None = None
    share: float | None = None
    rank: int | None = None
    blocks: int | None = None
    experts: int = 8
    k: int = 2
    expert_hidden: int | None = None
    jitter: float = 0.0
    capacity_factor: float | None = None
    init: str | None = added(None)
    positions: str = added("rotary")
    eps: float = added(1e-5)

    def __post_init__(self):
        for name in ("vocabulary", "width", "layers", "heads", "context", "experts", "k"):
            _positive(name, getattr(self, name))
        optional = ("kv_heads", "head_width", "hidden", "rank", "blocks", "expert_hidden")
        for name in optional:
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        _one_of("norm", self.norm, _NORMS)
        _one_of("activation", self.activation, _ACTIVATIONS)
        _one_of("ffn", self.ffn, FFNS)
        _one_of("positions", self.positions, POSITIONS)
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}: "
                "change one of them, or give head_width"
            )
        if self.per_head % 2 and self.positions == "rotary":
            raise ValueError(f"a head is {self.per_head} wide; rotary positions need an even width")
        if self.heads % self.key_heads:
            raise ValueError(
                f"kv_heads {self.kv_heads} must divide heads {self.heads}: each key head serves "
                "the same number of query heads"
            )
        if not (self.std > 0 and self.eps > 0 and self.rope_base > 1):
            raise ValueError(
                f"std {self.std} and eps {self.eps} must be positive, "
                f"rope_base {self.rope_base} above 1"
            )
        if self.dense_layers is not None and not 0 <= self.dense_layers <= self.layers:
            raise ValueError(f"dense_layers is {self.dense_layers}; allowed: 0 to {self.layers}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}; choose it from [0, 1), 0 for none")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}; it must be positive, or None for no "
                "limit"
            )
        self._check_structure()
        if self.init is not None:
            _one_of("init", self.init, INITS)
            if self.ffn not in STRUCTURED:
                raise ValueError(f"init {self.init!r} is of structured layers; ffn is {self.ffn!r}")
        if self.ffn == "moe" and self.k > self.experts:
            raise ValueError(
                f"k is {self.k} but there are {self.experts} experts; k is at most that"
            )
        if self.ffn == "moe" and self.expert_hidden is None and self.ffn_hidden % self.k:
            raise ValueError(
                f"hidden {self.ffn_hidden} is not divisible by k {self.k}, so that active FLOPs "
                "cannot equal the dense layer's: give expert_hidden"
            )
        if self.ffn in STRUCTURED:
            for widths in ((self.width, self.ffn_hidden), (self.ffn_hidden, self.width)):
                self.structured()(*widths, device="meta")  # what fits no such layer is an error

    def _check_structure(self) -> None:
        given = {name for name in ("share", "rank", "blocks") if getattr(self, name) is not None}
        allowed = {
            "lowrank": ({"share"}, {"rank"}),
            "blockshuffle": ({"share"}, {"blocks"}),
            "blockdense": ({"share"}, {"share", "blocks"}, {"rank", "blocks"}),
        }.get(self.ffn, (set(),))
        if given not in allowed:
            choices = " or ".join(" and ".join(sorted(names)) or "none" for names in allowed)
            raise ValueError(
                f"ffn {self.ffn!r} takes {choices} of share, rank and blocks; "
                f"given: {', '.join(sorted(given)) or 'none'}"
            )

    @property
    def per_head(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of a dense feed-forward layer."""
        return self.hidden or 4 * self.width

    @property
    def active_experts(self) -> int:
        """Experts a token goes to."""
        return 1 if self.ffn == "switch" else self.k

    @property
    def first_dense(self) -> int:
        """How many of the first blocks keep a dense feed-forward layer."""
        if self.dense_layers is not None:
            return self.dense_layers
        return 1 if self.ffn in STRUCTURED else 0

    @property
    def per_expert(self) -> int:
        """Hidden width of one expert."""
        return self.expert_hidden or self.ffn_hidden // self.active_experts

    def new_norm(self) -> nn.Module:
        """A norm of the residual stream."""
        kind = {"bias": self.bias} if self.norm == "layer" else {}
        return _NORMS[self.norm](self.width, eps=self.eps, **kind)

    def structured(self) -> Callable[..., nn.Module]:
        """Makes a structured map from its widths in and out."""
        kind = STRUCTURED[self.ffn]
        sizes = {name: getattr(self, name) for name in ("rank", "blocks")}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if self.init is not None:
            sizes["init"] = self.init
        if self.share is None:
            return partial(kind, **sizes, bias=self.bias)
        return partial(kind.from_ratio, parameters=self.share, **sizes, bias=self.bias)

    def shape(self) -> TransformerShape:
        """The sizes that decide the cost, for `feedforward.count`."""
        kind, hidden, sizes = "dense", self.ffn_hidden, {}
        if self.ffn in STRUCTURED:
            layer = self.structured()(self.width, hidden, device="meta")
            kind = type(layer).__name__
            sizes = {n: getattr(layer, n) for n in ("rank", "blocks") if hasattr(layer, n)}
        elif self.ffn in EXPERTS:
            sizes = {"experts": self.experts, "k": self.active_experts}
            sizes["dense_hidden"] = hidden if self.first_dense else None
            kind, hidden = "MoE", self.per_expert
        return TransformerShape(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            hidden=hidden,
            vocabulary=self.vocabulary,
            context=self.context,
            kv_heads=self.key_heads,
            attention_width=self.heads * self.per_head,
            gated=self.gated,
            bias=self.bias,
            norm_bias=self.bias and self.norm == "layer",
            positions=self.context if self.positions == "learned" else 0,
            logits="tied" if self.tied else "own",
            ffn=kind,
            dense_layers=self.first_dense,
            **sizes,
        )


def paper_config(name: str) -> DecoderConfig:
    """The decoder of arXiv 2406.16450 of this name, made from its shape in ``PAPER_SHAPES``.

    ``s``, ``m``, ``l``, ``xl`` are dense (table 1 there); ``<size>-<kind>-<63 | 32>`` have
    ``lowrank``, ``blockshuffle`` or ``blockdense`` layers of that percentage; ``m-gqa`` and
    ``l-gqa`` have grouped queries, ``m-ws`` and ``l-ws`` are wide and structured. All have a tanh
    GELU, 32,000 tokens in the vocabulary and a context of 1024. Explained in
    ``book/structured-ffn/05-scaling``.

    Raises:
        ValueError: When the paper has no such language model, with the nearest name.

    >>> config = paper_config("m-ws")
    >>> config.width, config.heads * config.per_head, config.key_heads, config.rank
    (1024, 512, 4, 512)
    """
    if name not in PAPER_MODELS:
        raise ValueError(unknown("language model of the paper", name, PAPER_MODELS))
    shape = PAPER_SHAPES[name]
    return DecoderConfig(
        vocabulary=shape.vocabulary,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        hidden=shape.hidden,
        context=shape.context,
        activation="gelu_tanh",
        ffn=shape.ffn.lower(),
        dense_layers=shape.dense_layers,
        rank=shape.rank,
        blocks=shape.blocks,
    )


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")


def _one_of(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


# --- the parts ----------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between: ``down(act(up(x)))``.

    With a gate: ``down(act(gate(x)) * up(x))`` (Shazeer 2020). The linear maps can be structured
    (arXiv 2406.16450, section 2). Chapter: ``book/foundations/01-feed-forward``.

    Args:
        width: Of input and output.
        hidden: Between the two maps.
        activation: ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        gated: Whether there is a gate.
        linear: Makes a map from its widths in and out; `nn.Linear` or a structured layer.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
    ):
        super().__init__()
        self.activation = activation
        self.up = linear(width, hidden)
        self.gate = linear(width, hidden) if gated else None
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (..., width)."""
        act = _ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden)


def build_ffn(config: DecoderConfig, layer: int) -> nn.Module:
    """The feed-forward layer of block `layer` (from 0): dense, structured, or experts."""
    width, hidden = config.width, config.ffn_hidden
    dense = partial(nn.Linear, bias=config.bias)
    common = {"activation": config.activation, "gated": config.gated}
    if config.ffn == "dense" or layer < config.first_dense:
        return FeedForward(width, hidden, linear=dense, **common)
    if config.ffn in STRUCTURED:
        return FeedForward(width, hidden, linear=config.structured(), **common)
    if config.ffn == "moe":
        router = TopKRouter(width, config.experts, k=config.k)
    else:
        router = SwitchRouter(width, config.experts, jitter=config.jitter)
    return MoE(
        width,
        config.per_expert,
        config.experts,
        router=router,
        bias=config.bias,
        capacity_factor=config.capacity_factor,
        **common,
    )


class KeyValueCache:
    """Keys and values of the tokens that one attention layer has seen, so that none is made twice.

    Only the key heads are kept: with grouped queries they are fewer than the query heads. The room
    is taken at the first `append`, in the type and on the device of what comes. Explained in
    ``book/structured-ffn/04-decoding``.

    Args:
        capacity: Number of tokens that it has room for.

    Attributes:
        length: Number of tokens that it holds.
        keys: (B, key heads, capacity, d), None before the first `append`.
        values: Likewise.
    """

    def __init__(self, capacity: int):
        _positive("capacity", capacity)
        self.capacity, self.length = capacity, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next T tokens, (B, key heads, T, d), and return all there are.

        Raises:
            ValueError: When there is no room for them.
        """
        start, end = self.length, self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"{end} tokens are more than the {self.capacity} that the cache has room for; "
                "make it with a larger capacity"
            )
        if self.keys is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, start:end], self.values[:, :, start:end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass(frozen=True)
class Span:
    """Where the tokens of a forward pass stand: what all blocks need to know about them.

    Attributes:
        rotation: Cosines and sines of rotary positions, each (T, d) or (B, 1, T, d), or None.
        visible: Which tokens each of them sees, (1 or B, 1, T, tokens so far) bool; None: those
            before it and itself.
        real: False for padding, (B, T) bool; None: no padding.
    """

    rotation: tuple[Tensor, Tensor] | None
    visible: Tensor | None = None
    real: Tensor | None = None


class Attention(nn.Module):
    """Causal attention with rotary positions and, if asked for, grouped key and value heads."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.heads, self.key_heads, self.per_head = config.heads, config.key_heads, config.per_head
        self.query = nn.Linear(config.width, self.heads * self.per_head, bias=config.bias)
        self.key = nn.Linear(config.width, self.key_heads * self.per_head, bias=config.bias)
        self.value = nn.Linear(config.width, self.key_heads * self.per_head, bias=config.bias)
        self.output = nn.Linear(self.heads * self.per_head, config.width, bias=config.bias)

    def forward(self, x: Tensor, span: Span, cache: KeyValueCache | None = None) -> Tensor:
        """x and the result: (B, T, width); with a cache they come after the tokens in it."""
        rows, length, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(rows, length, heads, self.per_head).transpose(1, 2)

        q, k = split(self.query(x), self.heads), split(self.key(x), self.key_heads)
        v = split(self.value(x), self.key_heads)
        if span.rotation is not None:
            q, k = rotate(q, *span.rotation), rotate(k, *span.rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        if span.visible is None and k.shape[2] == length:
            y = attend(q, k, v)
        else:
            y = attend_to(q, k, v, span.visible)
        return self.output(y.transpose(1, 2).reshape(rows, length, self.heads * self.per_head))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; with fewer key heads than query heads, each serves as many.

    Args:
        q: (B, heads, T, d).
        k: (B, key heads, T, d).
        v: (B, key heads, T, d).

    Returns:
        (B, heads, T, d).
    """
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if not plain or length > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    # PyTorch's fused kernel is 4 to 6 times slower here, most of all its backward pass (measured
    # with 2.13 and 128 to 256 tokens); of long sequences the scores would fill the memory
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    later = q.new_full((length, length), -torch.inf).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores + later).softmax(-1).to(v.dtype) @ v


def attend_to(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention of the last tokens to all there are, or to those of them that are visible.

    Args:
        q: (B, heads, T, d).
        k: (B, key heads, tokens, d).
        v: (B, key heads, tokens, d).
        visible: (1 or B, 1, T, tokens) bool; None: all.

    Returns:
        (B, heads, T, d).
    """
    rows, heads, length, width = q.shape
    groups = heads // k.shape[1]
    if length == 1:
        # the query heads of a group are as good as queries of one head: keys are read in place
        q = q.reshape(rows, -1, groups, width)
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return y.reshape(rows, heads, length, width)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864): turn feature i with feature i + d/2.

    Args:
        x: (..., T, d).
        cosines: (T, d), or what goes with x.
        sines: Likewise.
    """
    first, second = x.chunk(2, dim=-1)  # the backward pass of a slice would fill what it leaves out
    turned = torch.cat((-second, first), dim=-1)
    return x * cosines.to(x.dtype) + turned * sines.to(x.dtype)


def rotary_tables(
    config: DecoderConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines that `rotate` takes, for every position of the context.

    Args:
        config: Gives the context, the width of a head and the base of the wavelengths.
        dtype: Of the tables; the angles are computed in it, in float32 at least.
        device: Where they are made.

    Returns:
        Two tensors (context, width of a head).
    """
    exact = torch.promote_types(dtype, torch.float32)
    each = torch.arange(0, config.per_head, 2, device=device).to(exact) / config.per_head
    angles = torch.arange(config.context, device=device).to(exact)[:, None]
    angles = angles / config.rope_base**each
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attention_norm = config.new_norm()
        self.attention = Attention(config)
        self.ffn_norm = config.new_norm()
        self.ffn = build_ffn(config, layer)

    def forward(self, x: Tensor, span: Span, cache: KeyValueCache | None = None) -> Tensor:
        """x and the result: (B, T, width)."""
        x = x + self.attention(self.attention_norm(x), span, cache)
        # padding takes no capacity of experts
        masked = span.real is not None and isinstance(self.ffn, MoE)
        return x + self.ffn(self.ffn_norm(x), *((span.real,) if masked else ()))


class Decoder(nn.Module):
    """A language model (arXiv 2406.16450, section 4), with any feed-forward layer.

    Made on the meta device it is filled by ``to_empty`` and loading, or by loading with
    ``assign=True``; then it has its tied head and its rotary tables as well.

    Chapters: ``book/foundations/02-mixture-of-experts``,
    ``book/foundations/03-structured-matrices``; generation in ``book/structured-ffn/04-decoding``.

    >>> model = Decoder(DecoderConfig(width=32, layers=2, ffn="switch", experts=4))
    >>> model(torch.zeros(3, 10, dtype=torch.long)).shape
    torch.Size([3, 10, 2048])
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = config.new_norm()
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        else:
            cosines, sines = rotary_tables(config)
            self.register_buffer("cosines", cosines, persistent=False)
            self.register_buffer("sines", sines, persistent=False)
        self.apply(self._initialise)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.register_load_state_dict_post_hook(_complete_after_loading)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        """What ``to``, ``double`` and ``to_empty`` go through: it keeps the tie and the tables."""
        tied = self.head.weight is self.embedding.weight
        tables = getattr(self, "cosines", None)
        super()._apply(fn, recurse)
        if tied:
            self.head.weight = self.embedding.weight
        # of another type they are made anew, as exact as that type is; from meta comes nothing
        if tables is not None and (tables.dtype != self.cosines.dtype or tables.is_meta):
            self._fill_tables()
        return self

    def _fill_tables(self) -> None:
        device, dtype = self.embedding.weight.device, self.cosines.dtype
        if device.type != "meta":
            tables = rotary_tables(self.config, dtype=dtype, device="cpu")
            self.cosines, self.sines = (table.to(device) for table in tables)

    def _initialise(self, module: nn.Module) -> None:
        """The same Gaussian everywhere; structured layers and routers drew their own."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, MoE):
            for weight in (module.w_in, module.w_out):
                nn.init.normal_(weight, std=self.config.std)
            for bias in (module.b_in, module.b_out):
                if bias is not None:
                    nn.init.zeros_(bias)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        cache: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Scores of the next token, or the loss of predicting it.

        Args:
            tokens: (B, T) int64, T at most the context.
            targets: (B, T) int64, the token after each; -100 for none.
            padding: As `states` takes it.
            cache: As `states` takes it.

        Returns:
            Logits (B, T, vocabulary); with targets the mean cross-entropy, a scalar in nats.

        Raises:
            ValueError: When the tokens are not (B, T), or T is longer than the context.
        """
        logits = self.head(self.states(tokens, padding=padding, cache=cache))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())

    def states(
        self,
        tokens: Tensor,
        *,
        padding: Tensor | None = None,
        cache: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """What the logits are made from, by ``model.head``.

        Args:
            tokens: (B, T) int64; with a cache those that follow the tokens in it.
            padding: (B,) int64, how many tokens at the left of each row (of the cache's, if there
                is one) are padding: no other token sees them, and the first real one has position
                0. None: none.
            cache: One for each block, which gets the new tokens' keys and values.

        Returns:
            (B, T, width); of padding without meaning.

        Raises:
            ValueError: When the tokens are not (B, T), or with those in the cache more than the
                context.
        """
        if tokens.dim() != 2:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; give (B, T), a single sequence as "
                "tokens[None]"
            )
        length = tokens.shape[-1]
        start = cache[0].length if cache else 0
        end = start + length
        if end > self.config.context:
            raise ValueError(
                f"{end} tokens are more than the context of {self.config.context}: "
                "cut the sequence, or build the model with a longer context"
            )
        place, visible, real = slice(start, end), None, None
        if padding is not None or (start and length > 1):
            slots = torch.arange(end, device=tokens.device)
            new = slots[start:, None]
            visible = slots <= new
            if padding is not None:
                place = slots[start:] - padding[:, None]
                real = place >= 0 if length > 1 else None
                place = place.clamp(min=0)
                # padding sees itself: a softmax over nothing would be NaN, and spread
                visible = visible & (slots >= padding[:, None, None]) | (slots == new)
            visible = visible.view(-1, 1, length, end)
        x, rotation = self.embedding(tokens), None
        if self.config.positions == "learned":
            x = x + self.positions.weight[place]
        else:
            rotation = self.cosines[place], self.sines[place]
            if padding is not None:  # one for each row, the same for its heads
                rotation = tuple(table.unsqueeze(1) for table in rotation)
        span = Span(rotation, visible, real)
        for block, memory in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, span, memory)
        return self.norm(x)


def _complete_after_loading(model: Decoder, incompatible_keys) -> None:
    """Loading with ``assign=True`` gives a model made on meta weights, but no tie and no tables."""
    if model.config.tied and model.head.weight is not model.embedding.weight:
        model.head.weight = model.embedding.weight
    if model.config.positions == "rotary" and model.cosines.is_meta:
        model.cosines = model.cosines.to(model.embedding.weight.dtype)
        model._fill_tables()


_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
}


@torch.no_grad()
def from_gpt2(model: "GPT2LMHeadModel") -> Decoder:
    """The same model as a GPT-2 of transformers, with copies of its weights; dropout is left out.

    Args:
        model: A ``GPT2LMHeadModel``.

    Returns:
        The decoder, with learned positions, in the type, on the device and in the mode of `model`.

    Raises:
        ValueError: When the model has something that the decoder does not: another activation,
            scaling of attention by layer, or cross-attention.
    """
    theirs = model.config
    if theirs.activation_function not in _GPT2_ACTIVATIONS:
        raise ValueError(
            f"activation_function is {theirs.activation_function!r}; "
            f"the decoder has {', '.join(_GPT2_ACTIVATIONS)}"
        )
    expected = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for name, value in expected.items():
        if getattr(theirs, name) != value:
            raise ValueError(f"{name} is {not value}; the decoder's attention has {value}")
    body, embedding = model.transformer, model.transformer.wte.weight
    ours = Decoder(
        DecoderConfig(
            vocabulary=embedding.shape[0],
            width=theirs.n_embd,
            layers=theirs.n_layer,
            heads=theirs.n_head,
            hidden=theirs.n_inner,
            context=theirs.n_positions,
            activation=_GPT2_ACTIVATIONS[theirs.activation_function],
            tied=model.lm_head.weight is embedding,
            positions="learned",
            eps=theirs.layer_norm_epsilon,
        )
    ).to(embedding)

    def copy(to: nn.Module, weight: Tensor, bias: Tensor) -> None:
        to.weight.copy_(weight)
        to.bias.copy_(bias)

    ours.embedding.weight.copy_(embedding)
    ours.head.weight.copy_(model.lm_head.weight)
    ours.positions.weight.copy_(body.wpe.weight)
    copy(ours.norm, body.ln_f.weight, body.ln_f.bias)
    for mine, block in zip(ours.blocks, body.h, strict=True):
        copy(mine.attention_norm, block.ln_1.weight, block.ln_1.bias)
        copy(mine.ffn_norm, block.ln_2.weight, block.ln_2.bias)
        # their linear maps are transposed, and query, key and value stand side by side
        joined, attention = block.attn.c_attn, mine.attention
        parts = zip(joined.weight.t().chunk(3), joined.bias.chunk(3), strict=True)
        for to, (weight, bias) in zip(
            (attention.query, attention.key, attention.value), parts, strict=True
        ):
            copy(to, weight, bias)
        copy(attention.output, block.attn.c_proj.weight.t(), block.attn.c_proj.bias)
        copy(mine.ffn.up, block.mlp.c_fc.weight.t(), block.mlp.c_fc.bias)
        copy(mine.ffn.down, block.mlp.c_proj.weight.t(), block.mlp.c_proj.bias)
    return ours.train(model.training)
